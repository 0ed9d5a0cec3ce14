"""A small convolutional network with everything that lies between convolutions."""

from __future__ import annotations

import numpy as np

from hal.ir import Graph
from hal.passes.quantize import Calibration
from tests.passes.toys import Toy


def network(classes: int = 10) -> Graph:
    """A residual block, a depthwise one, branches that are joined, a pool, a linear layer."""
    toy, rng = Toy(x=["batch", 3, 16, 16]), np.random.default_rng(5)

    def conv(x, channels, kernel=3, group=1, inputs=16, limit=None, stride=1):  # type: ignore[no-untyped-def]
        shape = (channels, inputs // group, kernel, kernel)
        scale = np.sqrt(2.0 / np.prod(shape[1:]))
        weight = toy.constant((scale * rng.standard_normal(shape)).astype(np.float32))
        bias = toy.constant((0.2 * rng.standard_normal(channels)).astype(np.float32))
        pads = [kernel // 2] * 4
        made = toy("Conv", x, weight, bias, pads=pads, group=group, strides=[stride, stride])
        if limit == "relu":
            return toy("Relu", made)
        return made if limit is None else toy("Clip", made, np.float32(0), np.float32(limit))

    x = toy("MaxPool", conv(toy.x, 16, inputs=3, limit="relu"), kernel_shape=[2, 2], strides=[2, 2])
    x = toy("Relu", toy("Add", conv(conv(x, 16, limit="relu"), 16), x))
    x = conv(conv(x, 16, group=16, limit=1.0), 32, kernel=1)
    x = toy("Concat", conv(x, 16, inputs=32, limit="relu"), conv(x, 16, 1, inputs=32), axis=1)
    x = toy("Relu", conv(x, 64, inputs=32))
    flat = toy("Flatten", toy("ReduceMean", x, np.array([2, 3]), keepdims=1))
    weight = toy.constant(0.3 * rng.standard_normal((64, classes)))
    toy.output(toy("Add", toy("MatMul", flat, weight), toy.constant(np.ones(classes))), "y")
    return toy.graph()


def images(count: int = 24, size: int = 16, seed: int = 0) -> np.ndarray:
    """Smooth random images float32 ``[count, 3, size, size]`` in 0..1."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((count, 3, size // 4, size // 4)).astype(np.float32)
    fine = rng.random((count, 3, size, size)).astype(np.float32)
    return (0.7 * coarse.repeat(4, 2).repeat(4, 3) + 0.3 * fine).astype(np.float32)


def calibration(**changed: np.ndarray) -> Calibration:
    """Two calls of some of the images."""
    array = changed.get("x", images())
    return Calibration([{"x": part} for part in np.array_split(array, 2)])
