"""Modules, exported programs and .pt2 files."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.integrations.moe  # noqa: F401  registers grouped_mm_fallback

from hal import ExportError, InputError, ModelError
from hal.frontends import torch_module
from hal.ir import OPSET, Graph
from tests.frontends.reference import run, session


class Affine(torch.nn.Module):
    """One weight, so that its memory can be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def op_types(graph: Graph) -> list[str]:
    return [node.op_type for node in graph.nodes()]


def test_nothing_keeps_the_weights_once_module_and_graph_are_gone() -> None:
    class Tied(Affine):
        """Two names for one weight; an exporter drops one of them."""

        def __init__(self) -> None:
            super().__init__()
            self.again = torch.nn.Linear(4, 3, bias=False)
            self.again.weight = self.linear.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.again(x) + self.linear(x)

    module = Tied()
    storage = weakref.ref(module.linear.weight)
    graph = torch_module.from_module(module, torch.randn(1, 4))
    assert graph.weight_bytes() >= 48
    del module, graph
    gc.collect()
    assert storage() is None


def test_dynamic_dims_come_out_as_named_and_take_any_size() -> None:
    module = Affine()
    graph = torch_module.from_module(module, torch.randn(1, 4), {"x": {0: "batch"}})
    assert str(graph.signature().inputs[0]) == "x: float32[batch, 4]"
    assert str(graph.signature().outputs[0]) == "output: float32[batch, 3]"
    assert graph.model.opset_imports[""] == OPSET
    sess = session(graph)
    for size in (0, 1, 2, 7):
        x = torch.randn(size, 4)
        np.testing.assert_allclose(run(sess, {"x": x})["output"], module(x).detach(), atol=1e-6)


def test_weights_are_torchs_memory_and_tied_ones_are_kept_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(300, 64)
            self.head = torch.nn.Linear(64, 300, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(ids))

    module = Tied()
    graph = torch_module.from_module(module, torch.zeros(2, 3, dtype=torch.int64))
    shared = [
        value
        for value in graph.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes == 300 * 64 * 4
    ]
    assert len(shared) == 1
    address = shared[0].const_value.numpy().__array_interface__["data"][0]
    assert address == module.embedding.weight.data_ptr()


def test_nested_and_keyword_inputs_and_named_outputs_are_flattened() -> None:
    class Nested(torch.nn.Module):
        def forward(self, pair: list[torch.Tensor], *, scale: torch.Tensor) -> dict[str, Any]:
            total = pair[0] + pair[1]
            return {"sum": total, "scaled": [total * scale, pair[0]]}

    x = torch.randn(2, 3)
    inputs = {"pair": [x, x + 1], "scale": torch.tensor(2.0)}
    graph = torch_module.from_module(Nested(), inputs, {"pair": [{0: "n"}, {0: "n"}]})
    assert [str(s) for s in graph.signature().inputs] == [
        "pair_0: float32[n, 3]",
        "pair_1: float32[n, 3]",
        "scale: float32[]",
    ]
    assert [s.name for s in graph.signature().outputs] == ["sum", "scaled.0", "scaled.1"]
    got = run(session(graph), {"pair_0": x, "pair_1": x + 1, "scale": torch.tensor(3.0)})
    np.testing.assert_allclose(got["scaled.0"], (2 * x + 1) * 3, rtol=1e-6)
    np.testing.assert_array_equal(got["scaled.1"], x)


def test_a_pt2_file_gives_the_same_graph(tmp_path: Path) -> None:
    module, x = Affine().eval(), torch.randn(2, 4)
    program = torch.export.export(
        module, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=False
    )
    torch.export.save(program, tmp_path / "m.pt2")
    graph = torch_module.from_file(tmp_path / "m.pt2")
    assert graph.signature().inputs[0].dims == ("x_0", 4)
    np.testing.assert_allclose(
        run(session(graph), {"x": x})["output"], module(x).detach(), atol=1e-6
    )


class Casts(torch.nn.Module):
    """``Tensor.to`` in its forms, reshapes that only tracing resolves, and dropout."""

    def forward(self, input: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = input.to(torch.int64).contiguous().reshape(-1)
        wide = whole.to("cpu", torch.float64).to(like)
        y = torch.nn.functional.dropout(wide.type_as(input), 0.5, self.training)
        return y, input.to(torch.float32), (input.half() + 1).float()


class WritesInPlace(torch.nn.Module):
    def forward(self, input: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        y = input + 1
        y[:, 1:] = like[:, 1:]
        return y.mul_(2)


@pytest.mark.parametrize(("module", "traced"), [(Casts(), 0), (WritesInPlace(), 1)])
def test_a_program_is_traced_again_only_where_it_must_be(
    module: torch.nn.Module, traced: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = (torch.randn(2, 3) * 4, torch.randn(2, 3))
    program = torch.export.export(module.eval(), inputs, strict=False)
    before, calls = str(program.graph), []
    decompose = torch.export.ExportedProgram.run_decompositions

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(self)
        return decompose(self, *args, **options)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    graph = torch_module.from_exported_program(program)
    assert len(calls) == traced
    assert str(program.graph) == before
    want = module(*(x.clone() for x in inputs))
    got = run(session(graph), {"input": inputs[0], "like": inputs[1]})
    for have, expected in zip(
        got.values(), want if isinstance(want, tuple) else [want], strict=True
    ):
        np.testing.assert_allclose(have, expected, rtol=2e-3)  # float16 has ten bits


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut off", b"text"])
def test_a_damaged_pt2_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(data)
    with pytest.raises(ModelError, match=r"m\.pt2"):
        torch_module.from_file(tmp_path / "m.pt2")


def test_grouped_matmuls_of_users_become_one_node_each() -> None:
    class Grouped(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            return torch.ops.transformers.grouped_mm_fallback(x, w, ends)

    x, w = torch.randn(5, 8), torch.randn(3, 8, 4)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    graph = torch_module.from_module(Grouped(), (x, w, ends), {"x": {0: "tokens"}})
    assert op_types(graph) == ["GroupedMatMul"]
    got = run(session(graph), {"x": x, "w": w, "ends": ends})["output"]
    np.testing.assert_allclose(got, Grouped()(x, w, ends), atol=1e-5)


def test_control_flow_on_values_is_one_sentence_with_the_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Branches(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            print("said by the module", file=sys.stderr)
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(ExportError) as error:
        torch_module.from_module(Branches(), torch.randn(3))
    message = error.value.message
    assert "Branches" in message
    assert "depends on the values of a tensor" in message
    assert set(capsys.readouterr().err.split("\n")) == {"said by the module", ""}  # no graph dump
    assert "test_torch_module.py:" in message
    assert "\n" not in message
    assert len(message) < 300
    assert error.value.hint


def test_a_dynamic_axis_that_the_model_fixes_is_named() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(3, 4) * 2

    with pytest.raises(ExportError, match=r"axis 0 \('n'\) of input 'x' cannot be dynamic"):
        torch_module.from_module(Fixed(), torch.randn(3, 4), {"x": {0: "n"}})


def test_unknown_names_and_axes_in_dynamic_are_refused() -> None:
    with pytest.raises(InputError, match="'y', which is no tensor input"):
        torch_module.from_module(Affine(), torch.randn(2, 4), {"y": {0: "n"}})
    with pytest.raises(InputError, match="axis 2 of 'x' does not exist"):
        torch_module.from_module(Affine(), torch.randn(2, 4), {"x": {2: "n"}})


def test_a_module_that_changes_its_buffers_is_refused() -> None:
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(x)
            return self.seen * 2

    with pytest.raises(ExportError, match="changes its buffer 'seen'"):
        torch_module.from_module(Counts(), torch.randn(3))


def test_an_operator_without_translation_is_named() -> None:
    class Rare(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.qr(x)[1]

    with pytest.raises(ExportError, match=r"torch operator aten[.:]+linalg_qr"):
        torch_module.from_module(Rare(), torch.randn(3, 3))


def test_inputs_that_do_not_fit_the_signature_are_refused() -> None:
    with pytest.raises(ExportError, match=r"do not fit Affine\.forward"):
        torch_module.from_module(Affine(), (torch.randn(2, 4), torch.randn(2, 4)))
    with pytest.raises(ExportError, match="needs example inputs"):
        torch_module.from_module(Affine(), None)


def test_the_module_is_left_in_the_mode_it_was_in() -> None:
    module = Affine().train()
    torch_module.from_module(module, torch.randn(2, 4))
    assert module.training
