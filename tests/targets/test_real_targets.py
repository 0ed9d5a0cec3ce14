"""Targets of the library that run here, through vendors' own software or an emulator.

Nothing but the target's name differs. Each sets itself up (``hal targets setup``), from the package
registries; what a machine lacks is told by a skip with the reason.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("tvm")

from hal.conformance import ModelCase, model_cases, run_case
from hal.errors import TargetError
from hal.targets import load_backend, resolve

TARGETS = (
    "host:onnxruntime",
    "host:tvm",
    "openvino",
    "hexagon-v73",
    "hexagon-v75",
    "webgpu",
    "raspberry-pi-5:c",
    "graviton4:c",
    "rv64gcv:c",
    "spacemit-k1:c",
    "wasm32",
)
NEEDS = {"wasm32": "node"}
STATIC = {"hexagon-v73", "hexagon-v75", "raspberry-pi-5:c", "graviton4:c", "rv64gcv:c",
          "spacemit-k1:c", "wasm32"}  # fmt: skip
"""Have no dynamic shapes, and so no language models yet."""

_HALF = "computes float32 in float16, and is held to float32's tolerance"
_QEMU = "QEMU 7.2 fails an assertion of its own: decode_save_opc"
KNOWN = {
    ("hexagon-v73", "mlp"): _HALF,
    ("hexagon-v73", "encoder"): _HALF,
    ("hexagon-v75", "mlp"): _HALF,
    ("hexagon-v75", "encoder"): _HALF,
    ("webgpu", "cnn-int8"): "a node that it took is left for the CPU when the model is loaded",
    ("webgpu", "language-model"): "wrong logits, cause not known",
    ("openvino", "language-model"): "the provider cannot read the graph",
    ("rv64gcv:c", "cnn-int8"): _QEMU,
    ("spacemit-k1:c", "cnn-int8"): _QEMU,
}
"""What fails today, as docs/targets.md has it; a test that passes all the same fails."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=TARGETS)
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
def test_models_run_on_the_target(
    target: str, case: ModelCase, request: pytest.FixtureRequest
) -> None:
    if (target, case.name) in KNOWN:
        reason = KNOWN[target, case.name]
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    outcome = run_case(case, target, fallback=True)
    if case.name == "language-model" and target in STATIC:
        assert outcome.status == "unsupported", outcome.reason
        return
    assert outcome.status == "passed", outcome.reason
    assert outcome.share is not None
    assert outcome.share > 0.5


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
