"""Small models of each family, with seeded random weights and static shapes.

They are judged as any bundle is: the build against the neutral graph's reference, on inputs of
which one is what the model was made for.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

STEP = {"batch": 1, "sequence": 1, "past": 64}
"""A language model on chips with static shapes: a token at a time, and a small cache."""

_OPSET = 21
_IR_VERSION = 10


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A model as :func:`hal.compile` takes it.

    ``write`` puts it into a folder and says where; ``options`` are further arguments, ``dims``
    extents for targets with static shapes. ``op`` is what the case is about, and ``about`` says
    more for readers. ``faults``: the session is given wrong inputs as well, and has to go on.
    """

    name: str
    write: Callable[[Path], Path]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    op: str = "model"
    about: str = ""
    dims: Mapping[str, int] = dataclasses.field(default_factory=dict)
    faults: bool = False


FORMATS = ("w8a16", "w8a8", "w4a16", "w4a8", "w3a16", "w2a16", "ternary", "fp8", "mxfp4")
"""Of weights, and of activations where they are rounded, that a target is tried with."""

CACHES = ("paged", "int8", "paged,int4")
"""Forms of the language model's cache beside the one that the target prefers."""


def model_cases() -> list[ModelCase]:
    """A perceptron, a convolutional network in float32 and int8, an encoder, a language model."""
    rng = np.random.default_rng(0)
    images = [{"x": rng.standard_normal((1, 3, 32, 32)).astype(np.float32)} for _ in range(8)]
    return [
        ModelCase("mlp", _mlp),
        ModelCase("cnn", _cnn),
        ModelCase("cnn-int8", _cnn, {"quantize": "w8a8", "calibration": images}),
        ModelCase("encoder", _encoder),
        ModelCase("language-model", _language_model, dims=STEP),
    ]


def further_cases() -> list[ModelCase]:
    """Quantized formats, forms of a carried state, and what a target does about wrong inputs."""
    return [
        *(
            ModelCase(f"mlp-{form}", _mlp, {"quantize": form}, about="quantized weights")
            for form in FORMATS
        ),
        *(
            ModelCase(
                f"language-model-{form.replace(',', '-')}", _language_model, {"kv_cache": form},
                about="another cache", dims=STEP,
            )
            for form in CACHES
        ),
        ModelCase("mlp-faults", _mlp, about="wrong inputs are refused, right ones still work",
                  faults=True),
    ]  # fmt: skip


class _Net:
    """Nodes one after the other: ``net.Relu(x)`` adds one."""

    def __init__(self) -> None:
        self._tape = tape.Tape()
        self._weights: list[ir.Value] = []
        self._rng = np.random.default_rng(1)

    def __getattr__(self, op: str) -> Any:
        def add(*inputs: Any, **attributes: Any) -> Any:
            return self._tape.op(op, inputs, attributes)

        return add

    def constant(self, array: np.ndarray) -> ir.Value:
        name = f"w{len(self._weights)}"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.type, value.shape = (
            ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            ir.Shape(array.shape),
        )
        self._weights.append(value)
        return value

    def weight(self, *dims: int) -> ir.Value:
        """Random numbers, scaled so that what goes through keeps its size."""
        fan = int(np.prod(dims[1:])) if len(dims) == 4 else dims[0]
        return self.constant((self._rng.standard_normal(dims) / np.sqrt(fan)).astype(np.float32))

    def linear(self, x: Any, n_in: int, n_out: int) -> Any:
        return self.Add(
            self.MatMul(x, self.weight(n_in, n_out)), self.constant(np.zeros(n_out, np.float32))
        )

    def save(self, path: Path, x: ir.Value, y: ir.Value, shape: list[int]) -> Path:
        y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        graph = ir.Graph(
            [x], [y], nodes=list(self._tape.nodes), initializers=self._weights,
            opset_imports={"": _OPSET}, name="model",
        )  # fmt: skip
        ir.save(ir.Model(graph, ir_version=_IR_VERSION), path)
        return path


def _input(dims: list[int], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name="x", shape=ir.Shape(dims), type=ir.TensorType(dtype))


def _mlp(folder: Path) -> Path:
    net, x = _Net(), _input([1, 64])
    hidden = net.Relu(net.linear(x, 64, 128))
    hidden = net.Relu(net.linear(hidden, 128, 128))
    return net.save(folder / "mlp.onnx", x, net.linear(hidden, 128, 10), [1, 10])


def _cnn(folder: Path) -> Path:
    """Convolutions with strides, in groups, a residual, a pool."""
    net, x = _Net(), _input([1, 3, 32, 32])
    stem = net.Relu(net.Conv(x, net.weight(16, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1]))
    deep = net.Relu(net.Conv(stem, net.weight(16, 1, 3, 3), group=16, pads=[1, 1, 1, 1]))
    flat = net.Conv(deep, net.weight(16, 16, 1, 1))
    joined = net.Relu(net.Add(stem, flat))
    last = net.Relu(net.Conv(joined, net.weight(32, 16, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1]))
    pooled = net.Flatten(net.GlobalAveragePool(last))
    return net.save(folder / "cnn.onnx", x, net.linear(pooled, 32, 10), [1, 10])


def _encoder(folder: Path, size: int = 64, heads: int = 4, length: int = 16) -> Path:
    """Two layers that look both ways: attention without a mask, GELU, normalization after."""
    net, x = _Net(), _input([1, length], ir.DataType.INT64)
    ones, zeros = np.ones(size, np.float32), np.zeros(size, np.float32)

    def normal(value: Any) -> Any:
        return net.LayerNormalization(value, net.constant(ones), net.constant(zeros), axis=-1)

    def split(value: Any) -> Any:
        shape = net.constant(np.array([1, length, heads, size // heads], np.int64))
        return net.Transpose(net.Reshape(value, shape), perm=[0, 2, 1, 3])

    stream = net.Gather(net.weight(256, size), x)
    stream = normal(net.Add(stream, net.weight(length, size)))
    for _ in range(2):
        q, k, v = (split(net.linear(stream, size, size)) for _ in range(3))
        scale = net.constant(np.array((size // heads) ** -0.5, np.float32))
        scores = net.Mul(net.MatMul(q, net.Transpose(k, perm=[0, 1, 3, 2])), scale)
        mixed = net.MatMul(net.Softmax(scores, axis=-1), v)
        flat = net.constant(np.array([1, length, size], np.int64))
        mixed = net.Reshape(net.Transpose(mixed, perm=[0, 2, 1, 3]), flat)
        stream = normal(net.Add(stream, net.linear(mixed, size, size)))
        inner = net.Gelu(net.linear(stream, size, 4 * size))
        stream = normal(net.Add(stream, net.linear(inner, 4 * size, size)))
    return net.save(folder / "encoder.onnx", x, stream, [1, length, size])


def _language_model(folder: Path) -> Path:
    """The demonstration's model: a prompt, and tokens one by one on a carried state."""
    return Path(str(importlib.resources.files("hal.demo_model")))
