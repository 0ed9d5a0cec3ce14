"""Targets of the library that run here, through vendors' own software or an emulator.

Nothing but the target's name differs. Each sets itself up (``hal targets setup``), from the package
registries; what a machine lacks is told by a skip with the reason.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("tvm")

from hal.conformance import ModelCase, model_cases, run_case
from hal.errors import TargetError
from hal.targets import load_backend, resolve

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
    assert outcome.status == recorded["status"], outcome.reason
    if outcome.status == "passed":
        assert outcome.share == pytest.approx(recorded["share"], abs=0.01)


@pytest.mark.parametrize(
    ("name", "mnemonics"),
    [("raspberry-pi-5:c", ("sdot",)), ("rv64gcv:c", ("vfmacc", "vfmadd"))],
)
def test_programs_have_the_chips_own_instructions(
    name: str, mnemonics: tuple[str, ...], tmp_path: Path
) -> None:
    """What a quantized product, and a product of floats, are compiled to."""
    from tvm import IRModule, compile, target

    from hal.kernels.matmul import row_major
    from hal.kernels.quantized_layout import Layout, byte_dot
    from hal.kernels.quantized_matmul import matmul
    from hal.targets.aot import AotOptions
    from hal.targets.tvm.backend import shaping_of
    from hal.targets.tvm.target import completed_target

    found = resolve(name)
    described, shaping = found.descriptor, shaping_of(found.descriptor)
    dot = byte_dot(described)
    if dot is not None:
        layout = Layout(64, 128, 4, 32, dot.lanes, integer=True, signed=dot.signed)
        kernel = matmul(layout, shaping.registers, dot)
    else:
        kernel = row_major(128, 64, shaping.lanes, shaping.registers)
    chosen = completed_target(described, AotOptions.of_route(found.route).target)
    module = IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    text = compile(module, target=target.Target(chosen)).mod.inspect_source("asm")
    assert any(word in text for word in mnemonics)
