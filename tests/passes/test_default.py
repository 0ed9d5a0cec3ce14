"""The default pipeline on whole models: real exports end in the same few ops, weights stay unread."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from hal.frontends import load
from hal.frontends.opset import to_current
from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.passes import CAUSAL_KEY, WINDOW_KEY, default_pipeline
from hal.passes.quantize import Calibration
from tests import models
from tests.passes.toys import Toy, feeds, largest_difference, ops

IMPORTANT = (
    "Attention",
    "Conv",
    "BatchNormalization",
    "Gelu",
    "LayerNormalization",
    "MatMul",
    "MixtureOfExperts",
    "RMSNormalization",
    "RotaryEmbedding",
    "Softmax",
    "Swish",
    "SwiGLU",
)


class _Encoder(torch.nn.Module):
    """BERT with plain arguments, as the old exporter wants it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def old_export(module: torch.nn.Module, inputs: dict[str, torch.Tensor], opset: int) -> Graph:
    """Export through TorchScript without any optimization, as files from years ago are."""
    stream = io.BytesIO()
    axes = {
        n: {0: "batch", 1: "sequence"} if t.dim() == 2 else {0: "batch"} for n, t in inputs.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            stream,
            dynamo=False,
            opset_version=opset,
            input_names=list(inputs),
            output_names=["y"],
            dynamic_axes=axes,
            do_constant_folding=False,
        )
    model = ir.from_proto(onnx.load_model_from_string(stream.getvalue()))
    to_current(model)
    return Graph(model)


@pytest.mark.parametrize(("attention", "opset"), [("eager", 13), ("sdpa", 14)])
def test_an_old_file_of_bert_ends_in_high_level_ops(attention: str, opset: int):
    model = models.build("bert")
    model.config._attn_implementation = attention
    example = models.example("bert")
    inputs = {"ids": example["input_ids"], "mask": example["attention_mask"]}
    graph = old_export(_Encoder(model), inputs, opset)
    result, _ = default_pipeline().run(graph)
    assert ops(result, *IMPORTANT) == {
        "Attention": 2,
        "Gelu": 2,
        "LayerNormalization": 5,
        "MatMul": 12,
    }
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    assert largest_difference(graph, result, arrays) < 1e-5


def test_an_old_file_of_a_convolutional_network_has_no_normalization_left():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 8, 3, bias=False)
            self.norm = torch.nn.BatchNorm2d(8)
            self.last = torch.nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.norm(self.first(x))).mean((2, 3)))

    torch.manual_seed(0)
    net = Net()
    net(torch.randn(4, 3, 8, 8))  # moves the running statistics
    inputs = {"x": torch.randn(2, 3, 8, 8)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = old_export(net.eval(), inputs, 13)
    result, _ = default_pipeline().run(graph)
    assert ops(result, *IMPORTANT) == {"Conv": 1, "MatMul": 1}
    assert largest_difference(graph, result, {"x": inputs["x"].numpy()}) < 1e-5


_DECODER = {"Attention": 2, "RotaryEmbedding": 4}
EXPECTED: dict[str, dict[str, int]] = {
    "llama": {**_DECODER, "RMSNormalization": 5, "SwiGLU": 2, "MatMul": 15},
    "qwen3": {**_DECODER, "RMSNormalization": 9, "SwiGLU": 2, "MatMul": 15},
    "gemma3": {**_DECODER, "RMSNormalization": 13, "Gelu": 2, "MatMul": 15},
    "mixtral": {
        **_DECODER,
        "RMSNormalization": 5,
        "MixtureOfExperts": 2,
        "MatMul": 11,
        "Softmax": 2,
    },
    "deepseek_v3": {
        **_DECODER,
        "RMSNormalization": 9,
        "MixtureOfExperts": 1,
        "SwiGLU": 2,
        "MatMul": 20,  # absorbed: one map into the queries and one out of the result, not one out
    },
    "vit": {"Attention": 2, "Conv": 1, "Gelu": 2, "LayerNormalization": 5, "MatMul": 13},
    "resnet": {"Conv": 16, "MatMul": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", list(EXPECTED))
def test_every_family_ends_in_the_ops_that_its_architecture_names(family: str):
    graph = load(models.build(family)).graph
    result, _ = default_pipeline().run(graph)
    assert ops(result, *IMPORTANT) == EXPECTED[family]
    if graph.input_specs().keys() != result.input_specs().keys():  # the state has another form
        pairs = zip(two_steps(graph), two_steps(result), strict=True)
        assert all(np.abs(before - after).max() < 1e-5 for before, after in pairs)
    else:
        for batch, sequence, past in ((2, 3, 5), (1, 12, 0)):
            given = feeds(graph, batch=batch, sequence=sequence, past=past)
            assert largest_difference(graph, result, given) < 1e-5
    marks = [attention_kind(n) for n in result.nodes() if n.op_type == "Attention"]
    if family == "gemma3":
        assert marks == ["window 8", "causal"]
    elif family in ("llama", "qwen3", "mixtral", "deepseek_v3"):
        assert marks == ["causal"] * 2


def two_steps(graph: Graph) -> list[np.ndarray]:
    """Logits of a prompt of two rows and of what follows it, by the state that the graph carries."""
    first, second = np.random.default_rng(0).integers(0, 4, (2, 2, 5))
    found = evaluate(graph, dict(Calibration.from_tokens(graph, first).samples[0]))
    state = {carried.input: found[carried.output] for carried in graph.state}
    name = graph.signature().inputs[0].name
    return [found["logits"], evaluate(graph, {name: second, **state})["logits"]]


def attention_kind(node: ir.Node) -> str:
    if WINDOW_KEY in node.metadata_props:
        return f"window {node.metadata_props[WINDOW_KEY]}"
    if CAUSAL_KEY in node.metadata_props:
        return "causal mask"
    attribute = node.attributes.get("is_causal")
    return "causal" if attribute is not None and attribute.value else "plain"


def unreadable(*dims: int) -> ir.LazyTensor:
    """A weight that must not be read."""

    def read() -> Any:
        raise AssertionError("a pass read a weight")

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(dims))


def test_no_weight_is_read_by_any_pass():
    t = Toy(x=["batch", "sequence", 256])
    hidden = t.x
    lazies = []
    for _ in range(2):
        weight = t.constant(np.zeros(1, np.float32))
        weight.const_value, weight.shape = unreadable(1024, 256), ir.Shape([1024, 256])
        lazies.append(weight)
        wide = t("MatMul", hidden, t("Transpose", weight, perm=[1, 0]))
        down = t.constant(np.zeros(1, np.float32))
        down.const_value, down.shape = unreadable(256, 1024), ir.Shape([256, 1024])
        active = t("Mul", wide, t("Sigmoid", wide))
        rows = t("Reshape", active, np.array([-1, 1024]))
        back = t("Gemm", rows, down, t.weight(256), transB=1)
        shape = t("Concat", t("Shape", hidden, start=0, end=2), np.array([256]), axis=0)
        hidden = t("Add", hidden, t("Reshape", back, shape))
    t.output(hidden)
    result, reports = default_pipeline().run(t.graph())
    assert ops(result) == Counter({"MatMul": 4, "Add": 4, "Swish": 2})
    assert reports[-1].bytes_after < 1.01 * reports[0].bytes_before
