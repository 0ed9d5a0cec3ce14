"""Routes of vendors' providers: what is checked before anything of a vendor is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import hal
from hal.errors import DescriptorError, TargetError, UnsupportedError
from hal.targets import Registry, check_routes
from hal.targets.provider.backend import _refusals, judged
from hal.targets.provider.options import Left, ProviderOptions
from hal.targets.provider.serve import placed
from hal.targets.provider.worker import Worker
from tests.passes.toys import Toy

DESCRIPTOR = """
schema = 1
name = "chip"
kind = "npu"
[behaviour]
dynamic_shapes = {dynamic}
[routes.chip]
backend = "provider"
{route}
"""
ROUTE = 'provider = "ChipExecutionProvider"\npackages = ["chip==1"]\n'


def described(folder: Path, route: str = ROUTE, dynamic: str = "true") -> Path:
    file = folder / "chip.toml"
    file.write_text(DESCRIPTOR.format(route=route, dynamic=dynamic))
    return file


@pytest.fixture(autouse=True)
def environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HAL_ENVIRONMENTS", str(tmp_path / "environments"))
    return tmp_path / "environments"


def model(folder: Path, rows: int | str = 2) -> Path:
    toy = Toy(x=[rows, 4])
    toy.output(toy("MatMul", toy.x, np.ones((4, 3), np.float32)), "y")
    ir.save(toy.graph().model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ('packages = ["chip"]', "provider: Field required"),
        ('provider = "P"', "packages: Field required"),
        ('provider = "P"\npackages = []', "packages: .*at least 1"),
        (ROUTE + "seconds = 0", "seconds: .*greater than 0"),
        (ROUTE + "speed = 3", "speed: Extra inputs"),
    ],
)
def test_a_wrong_route_is_told(tmp_path: Path, route: str, words: str) -> None:
    file = described(tmp_path, route)
    with pytest.raises(DescriptorError, match=words):
        check_routes(Registry.discover("").from_file(file), str(file))


def test_an_environment_that_is_not_made_is_told(tmp_path: Path) -> None:
    target = str(described(tmp_path))
    with pytest.raises(TargetError, match=r"needs numpy, chip==1 in an environment") as caught:
        hal.compile(model(tmp_path), target=target, output=tmp_path / "m.hal")
    assert caught.value.hint == "hal targets setup chip:chip"


def test_static_shapes_are_asked_for_by_name(tmp_path: Path) -> None:
    target = str(described(tmp_path, dynamic="false"))
    with pytest.raises(UnsupportedError, match=r"static shapes only.*'batch'") as caught:
        hal.compile(model(tmp_path, "batch"), target=target, output=tmp_path / "m.hal")
    assert "--dim batch=" in caught.value.hint


def test_what_a_descriptor_leaves_out_is_told_by_op_input_and_constant() -> None:
    toy = Toy(x=[2, 4], axes=[1])
    fixed = toy("ReduceMean", toy.x, np.array([1]))
    toy.output(toy("ReduceMean", fixed, toy.axes), "y")
    graph = toy.graph()
    constant, computed = graph.graph[0], graph.graph[-1]
    always = Left(op="ReduceMean", reason="wrong")
    given = Left(op="ReduceMean", input=1, reason="wrong")
    unknown = Left(op="ReduceMean", input=1, computed=True, reason="wrong")
    known = Left(op="ReduceMean", input=1, computed=False, reason="wrong")
    flat = Left(op="ReduceMean", input=0, rank=1, reason="wrong")
    square = Left(op="ReduceMean", input=0, rank=2, reason="wrong")
    absent = Left(op="ReduceMean", input=2, reason="wrong")
    other = Left(op="Pad", reason="wrong")
    for left, expected in (
        (always, (True, True)),
        (given, (True, True)),
        (unknown, (False, True)),
        (known, (True, False)),
        (flat, (False, False)),
        (square, (True, True)),
        (absent, (False, False)),
        (other, (False, False)),
    ):
        assert (left.applies(constant), left.applies(computed)) == expected


def test_nodes_that_the_runtime_rewrites_with_what_a_provider_lacks_are_refused() -> None:
    log = """
 VerifyEachNodeIsAssignedToAnEp]  Node(s) placed on [CPUExecutionProvider]. Number of nodes: 2
 VerifyEachNodeIsAssignedToAnEp]   Shape (size)
 VerifyEachNodeIsAssignedToAnEp]   QuantizeLinear (QuantizeLinear_token_6)
 VerifyEachNodeIsAssignedToAnEp]  Node(s) placed on [ChipExecutionProvider]. Number of nodes: 3
 VerifyEachNodeIsAssignedToAnEp]   Conv (conv_token_1)
 VerifyEachNodeIsAssignedToAnEp]   Transpose (Transpose_token_4)
 VerifyEachNodeIsAssignedToAnEp]   Relu (relu)
"""
    told = {"all": False, **placed(log)}
    assert judged(told, ["size", "conv", "relu"], "Chip") == {
        "size": "Chip does not take it",
        "conv": "the runtime rewrites it with nodes that Chip does not take",
    }
    harmless = {"all": False, **placed(log.replace("QuantizeLinear_token_6", "size"))}
    assert judged(harmless, ["size", "conv", "relu"], "Chip") == {"size": "Chip does not take it"}
    whole = {"all": True, "nodes": []}
    assert judged(whole, ["conv"], "Chip") == {"conv": "Chip does not take it"}


def test_a_log_that_names_no_node_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="does not say where"):
        placed("nothing")


class _Fickle:
    """A worker whose provider takes ``Relu`` only in the company of ``MatMul``."""

    def ask(
        self, _head: dict[str, Any], arrays: dict[str, np.ndarray], *, limit: float
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        ops = {n.name: n.op_type for n in onnx.load_from_string(bytes(arrays["model"])).graph.node}
        if "MatMul" not in ops.values():
            return {"all": True, "nodes": []}, {}
        return {"all": False, "nodes": [n for n, op in ops.items() if op == "MatMul"]}, {}


def test_a_provider_is_asked_again_about_the_segments_that_its_answer_leaves() -> None:
    toy = Toy(x=[2, 4])
    product = toy("MatMul", toy.x, np.ones((4, 4), np.float32))
    toy.output(toy("Relu", product), "y")
    graph = toy.graph()
    for index, node in enumerate(graph.graph):
        node.name = f"{node.op_type}_{index}"
    options = ProviderOptions(provider="Chip", packages=("chip==1",))
    refused = _refusals(graph, cast("Worker", _Fickle()), options)
    assert refused == dict.fromkeys(("MatMul_0", "Relu_1"), "Chip does not take it")
