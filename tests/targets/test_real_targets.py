"""Targets of the library that run here, through vendors' own software or an emulator.

Nothing but the target's name differs. Each sets itself up (``hal targets setup``), from the package
registries; what a machine lacks is told by a skip with the reason.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("tvm")

import torch

import hal
from hal.conformance import ModelCase, model_cases, run_case
from hal.errors import TargetError
from hal.runtime.here import NOT_RUN
from hal.targets import load_backend, resolve
from hal.targets.environments import Environment

RECORDED = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "results" / "targets.json").read_text()
)
STATUS = {row["target"]: row["models"] for row in RECORDED["rows"]}
"""What ``benchmarks/targets.py`` found, and docs/targets.md shows."""

NEEDS = {"wasm32": "node"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=STATUS)
def target(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    tool = NEEDS.get(name)
    if tool and shutil.which(tool) is None:
        pytest.skip(f"{name} needs {tool}")
    found = resolve(name)
    try:
        load_backend(found.backend).setup(found.descriptor, print)
    except TargetError as error:
        pytest.skip(f"{name} cannot be set up here: {error.message}")
    return name


@pytest.mark.parametrize("case", model_cases(), ids=lambda case: case.name)
def test_models_do_on_the_target_what_the_table_says(target: str, case: ModelCase) -> None:
    outcome = run_case(case, target, fallback=True)
    recorded = STATUS[target][case.name]
    status = "built" if outcome.status == NOT_RUN else outcome.status
    assert status == recorded["status"] or recorded["status"] == "built", outcome.reason
    if outcome.status == "passed":
        assert outcome.share == pytest.approx(recorded["share"], abs=0.01)


STEPS = [name for name, models in STATUS.items() if models["language-model"]["status"] == "passed"]


@pytest.mark.parametrize("name", [n for n in STEPS if n.endswith(":c") or n.startswith("hex")])
def test_greedy_tokens_on_static_shapes_are_the_hosts(name: str) -> None:
    found = resolve(name)
    try:
        load_backend(found.backend).setup(found.descriptor, print)
    except TargetError as error:
        pytest.skip(f"{name} cannot be set up here: {error.message}")
    (case,) = (case for case in model_cases() if case.name == "language-model")
    free = hal.compile(case.write(Path()), target="host:onnxruntime")
    built = free.retarget(name, dims=case.dims)
    prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    with free.session() as one, built.session() as other:
        wanted = list(one.generate(prompt, max_new_tokens=16, stop_token_ids=[]))
        assert list(other.generate(prompt, max_new_tokens=16, stop_token_ids=[])) == wanted


BINUTILS = Environment(
    debian=("binutils-aarch64-linux-gnu", "binutils-riscv64-linux-gnu", "libbinutils")
)


def disassembled(program: Path, machine: str) -> list[str]:
    """Every instruction of a finished program, mnemonic and operands."""
    folder = BINUTILS.files / "usr"
    done = subprocess.run(
        [folder / "bin" / f"{machine}-linux-gnu-objdump", "-d", "--no-show-raw-insn", program],
        env={"LD_LIBRARY_PATH": str(folder / "lib" / "x86_64-linux-gnu")},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split("\t", 1)[1] for line in done.stdout.splitlines() if "\t" in line]


@pytest.mark.parametrize(
    ("name", "machine", "quantize", "wide", "scalar"),
    [
        ("raspberry-pi-5:c", "aarch64", None, r"fmla\s+v\d+\.4s", r"fn?m(ul|add|sub)\s+[sd]\d"),
        ("raspberry-pi-5:c", "aarch64", "w4a8", r"sdot\s+v", r"s?m(ul|add)l?\s+[wx]\d"),
        ("graviton3:c", "aarch64", "w4a8", r"sdot\s+v", r"s?m(ul|add)l?\s+[wx]\d"),
        ("rv64gcv:c", "riscv64", None, r"vfm(acc|add)\.", r"fn?m(ul|add|sub)\.[sd]"),
        ("rv64gcv:c", "riscv64", "w4a8", r"vfm(acc|add)\.", r"fn?m(ul|add|sub)\.[sd]"),
    ],
)
def test_programs_compute_with_the_chips_own_instructions(
    name: str, machine: str, quantize: str | None, wide: str, scalar: str, tmp_path: Path
) -> None:
    """The finished program of a perceptron multiplies in vectors; scalars are left for edges."""
    found = resolve(name)
    try:
        load_backend(found.backend).setup(found.descriptor, print)
        BINUTILS.make(print)
    except TargetError as error:
        pytest.skip(f"{name} cannot be set up here: {error.message}")
    torch.manual_seed(0)
    layers = [torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 64)]
    hal.compile(
        torch.nn.Sequential(*layers),
        target=name,
        inputs=(torch.randn(4, 256),),
        quantize=quantize,
        output=tmp_path / "built",
    )
    (program,) = (tmp_path / "built").rglob("program")
    text = disassembled(program, machine)
    many = sum(bool(re.match(wide, line)) for line in text)
    few = sum(bool(re.match(scalar, line)) for line in text)
    assert many > 100
    assert few < many / 2, (many, few)
