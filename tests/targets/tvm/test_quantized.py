"""Graphs with quantized weights: fused where a kernel fits, and equal to dequantized weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm")

from hal.ir import HAL_DOMAIN, OPSET, Graph
from hal.ir.inline import infer_types
from hal.ir.ops import ensure_functions
from hal.kernels.quantized_layout import byte_dot, rounded
from hal.targets import resolve
from hal.targets.tvm.direct import compile_graph
from hal.targets.tvm.fuse_quantized import fuse_quantized
from hal.targets.tvm.lowering import Shaping
from hal.targets.tvm.own_ops import DOMAIN
from hal.targets.tvm.target import tvm_target

_DTYPES: dict[str, Any] = {
    "i8": np.int8,
    "u8": np.uint8,
    "i4": ml_dtypes.int4,
    "u4": ml_dtypes.uint4,
    "i2": ml_dtypes.int2,
    "u2": ml_dtypes.uint2,
    "f8": ml_dtypes.float8_e4m3fn,
    "f4": ml_dtypes.float4_e2m1fn,
}


@dataclasses.dataclass
class Case:
    """A product ``x [b, t, k] @ wᵀ`` with weights ``[n, k]``; ``round`` rounds activations."""

    n: int = 24
    k: int = 64
    codes: str = "i4"
    group: int = 32
    zero: int | str | None = None
    channel: bool = False
    flipped: bool = False
    round: int | None = None
    tied: bool = False
    op: str = "MatMul"
    scale: Any = np.float16

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.n + self.k)
        bits = int(self.codes[1]) if self.codes != "planes" else 3
        low = -(1 << (bits - 1)) if self.codes[0] == "i" else 0
        dtype = _DTYPES.get(self.codes, np.uint8)
        codes = rng.integers(low, low + (1 << bits), (self.n, self.k))
        if self.codes[0] == "f":
            codes = rng.integers(0, 16 if bits == 4 else 127, codes.shape).astype(np.uint8)
            codes |= (rng.integers(0, 2, codes.shape) << (bits - 1)).astype(np.uint8)
            codes = codes.view(dtype).astype(np.float32)
        groups = 1 if self.channel else -(-self.k // self.group)
        scale = rng.random((self.n, groups)).astype(self.scale)
        if self.scale is not np.float16 and self.codes == "f4":
            scale = np.exp2(rng.integers(-8, 3, scale.shape)).astype(self.scale)
        zeros = np.zeros((self.n, groups), np.int64)
        if self.zero is not None:
            some = rng.integers(low, low + (1 << bits), zeros.shape)
            zeros = some if self.zero == "random" else np.full(zeros.shape, self.zero)
        spread = np.arange(self.k) // (self.k if self.channel else self.group)
        self.weights = (codes - zeros[:, spread]).astype(np.float32) * scale.astype(np.float32)[
            :, spread
        ]
        tensors = {"codes": codes.astype(dtype), "scale": scale}
        if self.zero is not None:
            tensors["zero"] = zeros.astype(dtype)
        if self.channel:
            tensors = {n: a if n == "codes" else a[:, 0] for n, a in tensors.items()}
        if self.flipped:
            tensors = {n: np.ascontiguousarray(a.T) for n, a in tensors.items()}
        if self.codes == "planes":
            tensors["codes"] = _planes(codes)
        self.tensors = tensors

    def graph(self) -> Graph:
        values = {n: _initializer(n, a) for n, a in self.tensors.items()}
        initializers = list(values.values())
        x = _input("x", ["b", "t", self.k] if self.op == "MatMul" else ["b", self.k])
        nodes: list[ir.Node] = []

        def add(op: str, inputs: list[ir.Value], domain: str = "", **attributes: Any) -> ir.Value:
            node = ir.node(op, inputs, attributes, domain=domain, name=f"{op}{len(nodes)}")
            node.outputs[0].name = f"{op}{len(nodes)}.out"
            nodes.append(node)
            return node.outputs[0]

        if self.codes == "planes":
            values["codes"] = add("UnpackBits", [values["codes"]], HAL_DOMAIN, bits=3)
        axis = int(self.channel == self.flipped)
        block = {} if self.channel else {"block_size": self.group}
        sources = [values[n] for n in ("codes", "scale", "zero") if n in values]
        w = add("DequantizeLinear", sources, axis=axis, output_dtype=1, **block)
        if self.round is not None:
            data = add("RoundActivations", [x], HAL_DOMAIN, bits=8, block_size=self.round)
        else:
            data = x
        inputs = [x]
        if self.op == "Gemm":
            bias = _initializer("bias", np.arange(self.n, dtype=np.float32))
            initializers.append(bias)
            outputs = [add("Gemm", [data, w, bias], transB=1)]
        else:
            turned = w if self.flipped else add("Transpose", [w], perm=[1, 0])
            outputs = [add("MatMul", [data, turned])]
        if self.tied:
            inputs.append(_input("ids", ["b", "t"], ir.DataType.INT64))
            outputs.append(add("Gather", [w, inputs[-1]]))
        for index, value in enumerate(outputs):
            value.name, value.type = f"y{index}", ir.TensorType(ir.DataType.FLOAT)
        outputs[0].shape = ir.Shape([*x.shape[:-1], self.n])  # type: ignore[index]
        if self.tied:
            outputs[1].shape = ir.Shape(["b", "t", self.k])
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=nodes,
            initializers=initializers,
            opset_imports={"": OPSET, HAL_DOMAIN: 1},
            name="case",
        )
        model = ir.Model(graph, ir_version=11)
        ensure_functions(model)
        infer_types(model)
        return Graph(model)

    def check(self, shaping: Shaping, target: Any, fused: int = 1) -> None:
        graph = self.graph()
        fuse_quantized(copy := graph.clone(), shaping)
        assert sum(n.domain == DOMAIN for n in copy.graph) == fused + (self.tied and fused > 0)
        if fused:
            assert not any(n.op_type == "DequantizeLinear" for n in copy.graph)
        run = compile_graph(graph, target, shaping)
        for lead in [(1, 1), (2, 5)] if self.op == "MatMul" else [(1,), (9,)]:
            rng = np.random.default_rng(len(lead))
            x = rng.standard_normal((*lead, self.k)).astype(np.float32)
            ids = rng.integers(-self.n, self.n, lead)
            got = run({"x": x, "ids": ids} if self.tied else {"x": x})
            exact = x if self.round is None else rounded(x, self.round or self.k)
            wanted = exact @ self.weights.T
            if self.op == "Gemm":
                wanted = wanted + np.arange(self.n)
            size = np.abs(exact) @ np.abs(self.weights).T
            assert np.max(np.abs(got["y0"] - wanted) / np.maximum(size, 1)) < 1e-6
            if self.tied:
                np.testing.assert_allclose(got["y1"], self.weights[ids], rtol=1e-6)


def _planes(codes: np.ndarray) -> np.ndarray:
    """Three-bit codes as ``hal::UnpackBits`` takes them."""
    low = (codes & 3).reshape(len(codes), -1, 4) << np.arange(0, 8, 2)
    high = (codes >> 2).reshape(len(codes), -1, 8) << np.arange(8)
    return np.concatenate([low.sum(-1), high.sum(-1)], axis=1).astype(np.uint8)


def _initializer(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(
        name=name,
        const_value=tensor,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
    )


def _input(name: str, dims: list[Any], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))


@functools.cache
def host() -> tuple[Shaping, Any]:
    descriptor = resolve("host").descriptor
    registers = descriptor.vector.registers or 16
    lanes = max(4, descriptor.vector_lanes("float32"))
    shaping = Shaping(lanes=lanes, registers=registers, dot=byte_dot(descriptor))
    return shaping, tvm_target(descriptor)


NARROW = (Shaping(lanes=4), {"kind": "llvm"})

CASES = {
    "four bits": Case(),
    "rounded in blocks": Case(round=32, tied=True),
    "rounded per token": Case(round=0, codes="u4", zero="random"),
    "activations in wider blocks": Case(round=64, group=16, k=128),
    "activations in narrower blocks": Case(round=16, group=32, codes="i8"),
    "unsigned around the middle": Case(codes="u4", zero=8, tied=True),
    "per channel": Case(codes="i8", channel=True, round=0),
    "per channel, asymmetric table": Case(codes="u8", channel=True, zero="random", tied=True),
    "stored by columns": Case(codes="u2", flipped=True, zero="random"),
    "three bits": Case(codes="planes", zero=4, round=32, tied=True),
    "three bits, asymmetric": Case(codes="planes", zero="random"),
    "ragged": Case(n=7, k=75, codes="i8"),
    "signed with zero points": Case(codes="i8", zero="random"),
    "floats of eight bits": Case(codes="f8", tied=True),
    "floats of eight bits, ragged": Case(n=7, k=75, codes="f8", channel=True),
    "floats of eight bits, rounded activations": Case(codes="f8", round=32),
    "floats of four bits": Case(codes="f4", scale=ml_dtypes.float8_e8m0fnu, tied=True),
    "floats of four bits, rounded activations": Case(
        n=40, codes="f4", scale=ml_dtypes.float8_e8m0fnu, round=32
    ),
    "floats of four bits, other scales": Case(codes="f4", k=72, tied=True),
    "floats of four bits, by columns": Case(codes="f4", flipped=True, round=0),
    "Gemm with bias": Case(codes="u8", op="Gemm"),
}


@pytest.mark.parametrize("name", CASES)
def test_products_with_quantized_weights_run_on_packed_codes(name: str) -> None:
    CASES[name].check(*host())


@pytest.mark.parametrize(
    "name",
    [
        "rounded in blocks",
        "three bits",
        "floats of eight bits",
        "floats of four bits",
        "floats of four bits, rounded activations",
    ],
)
def test_a_chip_without_dot_products_gives_the_same(name: str) -> None:
    CASES[name].check(*NARROW)


def test_scales_that_do_not_fit_float16_are_left_alone() -> None:
    Case(scale=np.float32).check(*NARROW, fused=0)


def test_packed_weights_take_the_bits_that_they_have() -> None:
    case = Case(n=64, k=256, round=32)
    graph = case.graph()
    fuse_quantized(graph, Shaping(lanes=4))
    (packed,) = [v for v in graph.graph.initializers.values() if v.name == "codes.packed"]
    assert packed.const_value is not None
    assert packed.const_value.nbytes == 64 * 256 // 2 + 64 * 8 * 2
    assert packed.dtype is ir.DataType.UINT8


def test_products_of_one_tensor_share_packed_weights_and_a_table_keeps_its_codes() -> None:
    graph = Case(tied=True).graph()
    fuse_quantized(graph, Shaping(lanes=4))
    names = {v.name for v in graph.graph.initializers.values() if v.uses()}
    assert names == {"codes.packed", "codes.bytes", "scale"}


def _branches(picked: bool) -> tuple[Graph, np.ndarray]:
    """Two products of the same rounded activations, one after picking rows; and the weights."""
    rng = np.random.default_rng(3)
    shaping, _ = host()
    n, k = 4 * shaping.lanes, 64
    codes = rng.integers(-8, 8, (2, n, k))
    scales = rng.random((2, n, k // 32)).astype(np.float16)
    x = _input("x", ["b", "t", k])
    nodes = [ir.node("RoundActivations", [x], {"bits": 8, "block_size": 32}, domain=HAL_DOMAIN)]
    rounded_x = nodes[0].outputs[0]
    inputs, initializers, outputs = [x], [], []
    if picked:
        inputs.append(_input("pick", ["b", "p", 1], ir.DataType.INT64))
        nodes.append(ir.node("GatherND", [rounded_x, inputs[1]], {"batch_dims": 1}))
        codes, scales = codes[:1], scales[:1]
    for index, (c, s) in enumerate(zip(codes, scales, strict=True)):
        sources = [
            _initializer(f"c{index}", c.astype(ml_dtypes.int4)),
            _initializer(f"s{index}", s),
        ]
        initializers += sources
        attributes = {"axis": 1, "block_size": 32, "output_dtype": 1}
        w = ir.node("DequantizeLinear", sources, attributes)
        turned = ir.node("Transpose", w.outputs, {"perm": [1, 0]})
        activations = nodes[1].outputs[0] if picked else rounded_x
        product = ir.node("MatMul", [activations, turned.outputs[0]])
        nodes += [w, turned, product]
        product.outputs[0].name = f"y{index}"
        product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        product.outputs[0].shape = ir.Shape(["b", "p" if picked else "t", n])
        outputs.append(product.outputs[0])
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": OPSET, HAL_DOMAIN: 1},
        name="branches",
    )
    model = ir.Model(graph, ir_version=11)
    ensure_functions(model)
    infer_types(model)
    return Graph(model), codes * np.repeat(scales.astype(np.float32), 32, axis=-1)


def test_products_of_the_same_activations_become_one() -> None:
    graph, weights = _branches(picked=False)
    fuse_quantized(copy := graph.clone(), host()[0])
    assert [n.op_type for n in copy.graph] == ["QuantizedMatMul", "Split"]
    x = np.random.default_rng(0).standard_normal((1, 3, 64)).astype(np.float32)
    got = compile_graph(graph, host()[1], host()[0])({"x": x})
    for index, w in enumerate(weights):
        wanted = rounded(x, 32) @ w.T
        np.testing.assert_allclose(got[f"y{index}"], wanted, rtol=1e-4, atol=1e-4)


def test_rows_are_picked_before_they_are_rounded() -> None:
    graph, weights = _branches(picked=True)
    fuse_quantized(copy := graph.clone(), host()[0])
    assert [n.op_type for n in copy.graph] == ["GatherND", "QuantizedMatMul"]
    x = np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32)
    pick = np.array([[[2]], [[0]]])
    got = compile_graph(graph, host()[1], host()[0])({"x": x, "pick": pick})
    wanted = rounded(x, 32)[[0, 1], [2, 0]] @ weights[0].T
    np.testing.assert_allclose(got["y0"][:, 0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "recipe",
    ["w3a16,head=w3a8,embedding=w3a16", "w3a16-asym,head=w2a16-asym,embedding=w3a16-asym",
     "w8a8,embedding=w2a16", "ternary-g64,head=w4a16-channel,embedding=w4a16", "fp8,head=fp8-channel",
     "mxfp4,head=mxfp4a8,embedding=mxfp4"],
)  # fmt: skip
def test_what_the_quantize_pass_makes_runs_as_the_neutral_graph_means_it(recipe: str) -> None:
    from hal.ir.evaluate import evaluate
    from hal.passes.base import Pipeline
    from hal.passes.quantize import Quantize, parse_recipe
    from tests.passes.quantize.toy import language_model

    graph = Pipeline("test", (Quantize(parse_recipe(recipe)),)).run(language_model())[0]
    given = {"ids": np.arange(40).reshape(2, 20) % 96}
    right = evaluate(graph, given)["logits"]
    found = compile_graph(graph)(given)["logits"]
    limit = 0.02 if "a8" in recipe else 1e-5  # a tie may be rounded to either side
    assert np.abs(found - right).max() < limit * np.abs(right).max()
