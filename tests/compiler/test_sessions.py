"""Sessions of a compiled model: calls, and state that is carried from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import hal
from tests import files
from tests.compiler.support import ROUTE, x_of

# -- calls ------------------------------------------------------------------------------------


class OnlyDlpack:
    """An array of some other library that speaks nothing but DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda x: x, id="numpy"),
        pytest.param(lambda x: x.tolist(), id="lists"),
        pytest.param(torch.from_numpy, id="torch"),
        pytest.param(lambda x: torch.from_numpy(x).requires_grad_(), id="torch with gradient"),
        pytest.param(OnlyDlpack, id="DLPack"),
        pytest.param(lambda x: np.asfortranarray(x), id="not contiguous"),
        pytest.param(lambda x: x[::-1][::-1], id="view"),
    ],
)
def test_a_session_takes_arrays_of_any_kind(
    bundle: hal.Bundle, given: Callable[[np.ndarray], Any]
) -> None:
    x = x_of(4)
    expected = files.mlp_expected(x)
    with bundle.session() as session:
        assert np.allclose(session(given(x)), expected, atol=1e-5)
        assert np.allclose(session(x=given(x)), expected, atol=1e-5)
        results = session.run({"x": given(x)})
    assert list(results) == ["y"]
    assert isinstance(results["y"], np.ndarray)


def test_several_outputs_come_in_the_order_of_the_signature(tmp_path: Path) -> None:
    session = hal.compile(files.two_in_two_out(tmp_path / "pair.onnx"), target=ROUTE).session()
    a, b = np.array([[5, 6]]), np.array([[1, 2]])
    for total, difference in (session(a, b), session(a, b=b), session(b=b, a=a)):
        assert total.tolist() == [[6, 8]]
        assert difference.tolist() == [[4, 4]]
    with pytest.raises(hal.InputError, match="input 'a' is given twice"):
        session(a, b, a=a)
    with pytest.raises(hal.InputError, match="3 inputs given, the model takes 2"):
        session(a, b, a)


def test_an_output_that_is_an_input_is_a_copy(tmp_path: Path) -> None:
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [3]) for n in "xy"]
    nodes = [onnx.helper.make_node("Neg", ["x"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends)
    onnx.save_model(onnx.helper.make_model(graph, ir_version=10), tmp_path / "m.onnx")
    x = np.ones(3, np.float32)
    with hal.compile(tmp_path / "m.onnx", target=ROUTE).session() as session:
        same, _ = session(x)
    x[:] = 9
    assert same.tolist() == [1, 1, 1]


@pytest.mark.parametrize("given", [["x"], []], ids=["full", "empty"])
def test_optional_outputs_are_arrays_or_none(given: list[str], tmp_path: Path) -> None:
    tensor = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [3])
    optional = onnx.helper.make_optional_type_proto(tensor)
    nodes = [
        onnx.helper.make_node("Optional", given, ["y"], **({} if given else {"type": tensor})),
        onnx.helper.make_node("Neg", ["x"], ["z"]),
    ]
    ends = [onnx.helper.make_value_info(n, t) for n, t in (("y", optional), ("z", tensor))]
    inputs = [onnx.helper.make_value_info("x", tensor)]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", inputs, ends), ir_version=10)
    onnx.save_model(model, tmp_path / "m.onnx")
    bundle = hal.compile(tmp_path / "m.onnx", target=ROUTE)
    assert bundle.manifest.builds[ROUTE].verification["passed"]
    value, _ = bundle.session()(np.ones(3, np.float32))
    assert value.tolist() == [1, 1, 1] if given else value is None


def test_results_do_not_change_under_later_calls(bundle: hal.Bundle) -> None:
    first, second = x_of(2, seed=1), x_of(2, seed=2)
    with bundle.session() as session:
        kept = session(first)
        session(second)
        assert np.allclose(kept, files.mlp_expected(first), atol=1e-5)


def test_two_sessions_of_one_bundle_are_independent(memory: hal.Bundle) -> None:
    one, two = memory.session(), memory.session()
    x = np.ones((1, 2, 4), np.float32)
    one(x)
    assert two(x).tolist() == [[2, 2, 2, 2]]
    assert one(x).tolist() == [[4, 4, 4, 4]]


# -- state ------------------------------------------------------------------------------------


def test_state_is_carried_from_call_to_call_and_forgotten_on_reset(memory: hal.Bundle) -> None:
    session = memory.session()
    ones = np.ones((1, 3, 4), np.float32)
    assert session(ones).tolist() == [[3, 3, 3, 3]]
    assert session(ones[:, :1]).tolist() == [[4, 4, 4, 4]]
    assert session.position == 4
    assert session.export_arrays()["0.memory"].shape == (1, 4, 4)
    session.reset()
    assert session.position == 0
    assert session.export_arrays() == {}
    assert session(ones).tolist() == [[3, 3, 3, 3]]


def test_another_batch_size_needs_a_reset(memory: hal.Bundle) -> None:
    session = memory.session()
    session(np.ones((1, 2, 4), np.float32))
    with pytest.raises(hal.InputError, match="the batch is 2, the carried state has 1") as caught:
        session(np.ones((2, 2, 4), np.float32))
    assert "reset" in caught.value.hint
    session.reset()
    assert session(np.ones((2, 2, 4), np.float32)).shape == (2, 4)


def test_a_refused_call_does_not_touch_the_state(memory: hal.Bundle) -> None:
    session = memory.session()
    ones = np.ones((1, 2, 4), np.float32)
    session(ones)
    with pytest.raises(hal.InputError):
        session(np.ones((1, 2, 5), np.float32))
    assert session.position == 2
    assert session(ones).tolist() == [[4, 4, 4, 4]]


def test_decoding_step_by_step_equals_one_long_prefill(
    language_model: tuple[torch.nn.Module, hal.Bundle],
) -> None:
    module, compiled = language_model
    ids = np.random.default_rng(0).integers(3, 256, (2, 8))
    with torch.no_grad():
        expected = module(torch.from_numpy(ids)).logits.numpy()
    session = compiled.session()
    steps = [session(ids[:, :4])] + [session(ids[:, i : i + 1]) for i in range(4, 8)]
    assert np.abs(np.concatenate(steps, axis=1) - expected).max() < 1e-4
