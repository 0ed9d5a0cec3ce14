"""The software of an invented NPU: what it claims, its compiler, its driver.

The chip takes 8-bit tensors and gives 8-bit tensors. In the graphs that hal hands over, such a
tensor is a ``DequantizeLinear`` of integers in front of an op and a ``QuantizeLinear`` behind it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from hal.errors import UnsupportedError
from hal.targets import Backend, Executable, Probe, Verdict

BYTES = (ir.DataType.INT8, ir.DataType.UINT8)
PRODUCTS = frozenset({"Conv", "MatMul", "Gemm"})
"""Ops that multiply 8-bit tensors."""
AFTER = frozenset(
    {"Relu", "Clip", "Add", "MaxPool", "GlobalAveragePool", "ReduceMean", "Flatten", "Reshape"}
)
"""Ops that work on what a product has summed up, or on an 8-bit tensor."""

FAULT = os.environ.get("TINY_NPU_FAULT", "")
"""For tests, how the software misbehaves: ``probe`` (raises), ``probe-crash``, ``api``, ``lie``,
``raise``, ``crash``, ``exit`` or ``hang``."""


class TinyNpuBackend(Backend):
    """Claims nodes of 8-bit networks; NumPy simulates the chip."""

    name: ClassVar[str] = "tiny_npu"
    hal_api: ClassVar[str] = "99" if FAULT == "api" else "1"

    def probe(self) -> Probe:
        """The simulator is part of the package."""
        if FAULT == "probe":
            raise RuntimeError("the driver is in a bad mood")
        if FAULT == "probe-crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        return Probe("simulator", "NumPy simulates the chip", {"hal-tiny-npu": "1.0"})

    def supports(self, node: ir.Node, descriptor: Any) -> Verdict:
        """Claim what stays within 8-bit tensors of static shapes."""
        if FAULT == "lie":
            return Verdict.yes()
        if node.domain:
            return Verdict.no("the chip knows ONNX's own operations only")
        for value in (*node.inputs, *node.outputs):
            if value is not None and (value.shape is None or not value.shape.is_static()):
                return Verdict.no("the chip's programs have static shapes")
        if node.op_type == "DequantizeLinear":
            if _is_bias(node):
                return Verdict.yes()
            verdict = _of_bytes(node.inputs[0])
            return _fits(node, descriptor) if verdict.claimed else verdict
        if node.op_type == "QuantizeLinear":
            return _of_bytes(node.outputs[0])
        if node.op_type not in PRODUCTS | AFTER:
            return Verdict.no(f"the chip has no operation {node.op_type}")
        for value in _activations(node):
            if not _is_8_bit(value):
                return Verdict.no("the chip computes on 8-bit integers only")
        return _fits(node, descriptor)

    def build(self, graph: Any, context: Any) -> dict[str, Any]:
        """The "compiler": checks what fits, and writes the segment down."""
        if FAULT == "lie":
            raise UnsupportedError("the compiler of tiny-npu: no such operation", "do not lie")
        if FAULT == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if FAULT == "exit":
            os._exit(3)
        if FAULT == "raise":
            raise KeyError("no such register")
        if FAULT == "hang":
            time.sleep(3600)
        weights = sum(_weight_bytes(node) for node in graph.graph)
        room = context.descriptor.memory_capacity()
        if weights > room:
            raise UnsupportedError(
                f"the weights of the segment take {weights / 1024:.0f} KiB, "
                f"{(weights - room) / 1024:.0f} KiB more than tiny-npu has",
                "quantize further, or choose a chip with more memory",
            )
        model = graph.model.clone()
        for value in model.graph.initializers.values():
            value.const_value = ir.Tensor(np.array(value.const_value.numpy()), name=value.name)
        (context.folder / "program.onnx").write_bytes(ir.to_proto(model).SerializeToString())
        return {"outputs": [v.name for v in graph.graph.outputs], "weight_bytes": weights}

    def load(self, record: Mapping[str, Any], context: Any) -> Executable:
        """The "driver"."""
        data = bytes(context.files.mapped(f"{context.folder}/program.onnx"))
        return _Program(onnx.ModelProto.FromString(data), list(record["outputs"]))


class _Program(Executable):
    """A program in the simulator."""

    def __init__(self, model: onnx.ModelProto, outputs: list[str]) -> None:
        self._simulator, self._outputs = ReferenceEvaluator(model), outputs

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: np.asarray(value) for name, value in inputs.items()}
        results = self._simulator.run(self._outputs, given)
        return dict(zip(self._outputs, results, strict=True))


def _of_bytes(value: ir.Value | None) -> Verdict:
    if value is not None and value.dtype in BYTES:
        return Verdict.yes()
    return Verdict.no("the chip computes on 8-bit integers only")


def _activations(node: ir.Node) -> list[ir.Value]:
    """Float inputs that are neither constants nor biases."""
    floats = [v for v in node.inputs if v is not None and v.dtype is ir.DataType.FLOAT]
    return [v for v in floats if v.const_value is None and not _is_bias(v.producer())]


def _is_bias(node: ir.Node | None) -> bool:
    """Whether a node gives a constant that is added to sums: the chip adds in 32 bits."""
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return False
    return node.inputs[0].dtype is ir.DataType.INT32 and node.inputs[0].const_value is not None


def _is_8_bit(value: ir.Value) -> bool:
    """Whether a float tensor is an 8-bit one to the chip, or a sum of products of such."""
    maker = value.producer()
    if maker is None:
        return False
    if maker.op_type == "DequantizeLinear":
        return maker.inputs[0] is not None and maker.inputs[0].dtype in BYTES
    return maker.op_type in PRODUCTS | AFTER and all(_is_8_bit(v) for v in _activations(maker))


def _weight_bytes(node: ir.Node) -> int:
    return sum(v.const_value.nbytes for v in node.inputs if v is not None and v.const_value)


def _fits(node: ir.Node, descriptor: Any) -> Verdict:
    makers = [v.producer() for v in node.inputs if v is not None]
    size = _weight_bytes(node) + sum(_weight_bytes(m) for m in makers if m is not None)
    room = descriptor.memory_capacity()
    if size > room:
        return Verdict.no(f"its weights take {size / 1024:.0f} KiB, the chip has {room / 1024:.0f}")
    return Verdict.yes()
