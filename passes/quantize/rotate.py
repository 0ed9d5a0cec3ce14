"""The pass that turns residual streams, so that no channel stands out.

Few bits suit numbers that are spread evenly. A residual stream has channels that are much larger
than others, in activations and in the weights that write them. What reads and writes the stream is
linear but for norms, and a norm by root mean square commutes with an orthogonal matrix Q once its
scale is in the weights behind it. So with ``x Q`` in the place of x the model computes the same:
weights that make x become ``W Q``, those that read it ``Qᵀ diag(scale) W``. A norm that takes the
mean off becomes one that does not, once the weights make values whose mean is zero. Sources:
Ashkboos et al., arXiv 2404.00456 (QuaRot) and 2401.15024 (SliceGPT).

    >>> graph, reports = Pipeline("turn", (Rotate(),)).run(graph)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from hal.ir import Graph
from hal.passes._edit import Editor, attribute, is_op, remove_unused
from hal.passes.base import Outcome, Pass
from hal.passes.quantize.hadamard import Rotation
from hal.passes.quantize.residual import Stream, Use, find_streams

_Step = Callable[[np.ndarray], np.ndarray]

_AT_ONCE = 1 << 22
"""Numbers of a weight that are turned together: some copies of them are alive meanwhile."""


@dataclasses.dataclass(frozen=True)
class Turned:
    """What was done.

    Attributes:
        sizes: channels of each stream that was turned.
        reasons: why other values that norms read were left alone.
        basis: names of new weights ``[K, K]``, which stand where a scale could not go into a
            weight because the weight is also looked up.
    """

    sizes: tuple[int, ...]
    reasons: tuple[str, ...]
    basis: frozenset[str]

    def __str__(self) -> str:
        """For reports."""
        if not self.sizes:
            return "none: " + ("; ".join(self.reasons[:2]) or "no norms")
        left = f", left: {'; '.join(self.reasons[:2])}" if self.reasons else ""
        return ", ".join(f"{size} channels" for size in self.sizes) + left


@dataclasses.dataclass(frozen=True)
class Rotate(Pass):
    """Turn residual streams by randomized Hadamard matrices, folded into the weights.

    Results stay the same up to rounding. Models without such a stream stay as they are.
    """

    name: ClassVar[str] = "rotate"

    def run(self, graph: Graph) -> Outcome:
        """Turn every stream that there is."""
        turned = rotate(graph)
        return Outcome(len(turned.sizes), {"streams": str(turned)})


def rotate(graph: Graph) -> Turned:
    """Turn the residual streams of ``graph`` in place; new weights are computed when read."""
    streams, reasons = find_streams(graph)
    basis: set[str] = set()
    for stream in streams:
        basis |= _Turn(graph, stream).run()
    if streams:
        remove_unused(graph)
    return Turned(tuple(s.size for s in streams), tuple(reasons), frozenset(basis))


class _Turn:
    """The turning of one stream."""

    def __init__(self, graph: Graph, stream: Stream) -> None:
        self.graph, self.stream = graph, stream
        self.edit = Editor(graph)
        self.rotation = Rotation(stream.size)
        self.basis: set[str] = set()

    def run(self) -> set[str]:
        self._biases()
        groups: dict[tuple[ir.Value, int], list[Use]] = {}
        for use in self.stream.uses:
            groups.setdefault((use.weight, use.axis), []).append(use)
        steps: dict[ir.Value, dict[int, _Step]] = {}
        for (weight, axis), uses in groups.items():
            steps.setdefault(weight, {})[axis] = self._step(weight, axis, uses)
        for weight, todo in steps.items():
            _later(weight, todo)
        for node, index in self.stream.added.items():
            value = node.inputs[index]
            assert value is not None
            new = self.edit.tensor(_tensor(value), f"{value.name}.turned")
            _later(new, {-1: self._maker(-1)})
            node.replace_input_with(index, new)
        for norm in self.stream.norms:
            self._plain(norm)
        for node, index in self.stream.factors.items():
            value = node.inputs[1 - index]
            assert value is not None
            node.outputs[0].replace_all_uses_with(value)
        return self.basis

    def _step(self, weight: ir.Value, axis: int, uses: list[Use]) -> _Step:
        """What becomes of a weight along one axis; scales that are not the same stay outside."""
        scales = [use.scale for use in uses]
        first = scales[0]
        same = all(_equal(first, scale) for scale in scales)
        if not same:
            for use in uses:
                if use.scale is not None:
                    self._change_basis(weight, use, use.scale)
            first = None
        if any(use.read is None for use in uses):
            return self._maker(axis)

        def read(array: np.ndarray) -> np.ndarray:
            if first is not None:
                array = array * first.reshape([-1 if a == axis else 1 for a in range(array.ndim)])
            return self.rotation.apply(array, axis)

        return read

    def _maker(self, axis: int) -> _Step:
        centred = self.stream.centred

        def made(array: np.ndarray) -> np.ndarray:
            if centred:
                array = array - array.mean(axis, keepdims=True)
            return self.rotation.apply(array, axis)

        return made

    def _change_basis(self, weight: ir.Value, use: Use, scale: np.ndarray) -> None:
        """``n Qᵀ diag(scale) Q`` in the place of what is read; the mean of the scale apart."""
        read = use.read
        assert read is not None
        mean = float(scale.mean())
        rest = self.rotation.diagonal(scale - np.float32(mean))
        for product in _products(use):
            self.edit.at(product)
            dtype = (read.dtype or ir.DataType.FLOAT).numpy()
            value = read
            if mean != 1:
                value = self.edit.op("Mul", [read, self.edit.constant(dtype.type(mean))], like=read)
            if np.abs(rest).max() > 1e-6 * abs(mean):
                turn = self.edit.tensor(ir.tensor(rest.astype(dtype)), f"{weight.name}.basis")
                self.basis.add(turn.name or "")
                other = self.edit.op("MatMul", [read, turn], like=read)
                value = self.edit.op("Add", [value, other], like=read)
            product.replace_input_with(0, value)

    def _biases(self) -> None:
        """What norms add to channels is added to the results of the products behind them."""
        for use in self.stream.uses:
            if use.bias is None or not use.bias.any():
                continue
            matrix = np.asarray(_tensor(use.weight).numpy(), np.float32)
            added = np.tensordot(matrix, use.bias, ((use.axis,), (0,)))
            for product in _products(use):
                old = product.outputs[0]
                users = tuple(old.uses())
                self.edit.at(product)
                dtype = (old.dtype or ir.DataType.FLOAT).numpy()
                bias = self.edit.constant(added, f"{use.weight.name}.bias", dtype)
                new = self.edit.op("Add", [old, bias], like=old)
                _move_behind(new.producer(), product)
                for user in users:
                    user.node.replace_input_with(user.idx, new)
                for index, value in enumerate(self.graph.graph.outputs):
                    if value is old:
                        old.name, new.name = new.name, old.name
                        self.graph.graph.outputs[index] = new

    def _plain(self, norm: ir.Node) -> None:
        """The norm without scale and bias, by root mean square."""
        scale = norm.inputs[1]
        assert scale is not None
        ones = np.ones(self.stream.size, (scale.dtype or ir.DataType.FLOAT).numpy())
        value = self.edit.constant(ones, "ones")
        if is_op(norm, "RMSNormalization"):
            norm.replace_input_with(1, value)
            return
        self.edit.at(norm)
        attributes = {
            name: found
            for name in ("axis", "epsilon", "stash_type")
            if (found := attribute(norm, name)) is not None
        }
        old = norm.outputs[0]
        new = self.edit.op("RMSNormalization", [norm.inputs[0], value], attributes, like=old)
        old.replace_all_uses_with(new)


def _products(use: Use) -> list[ir.Node]:
    """Nodes that multiply what is read with the weight: the node itself, or behind a transpose."""
    assert use.read is not None
    behind = use.node.outputs[0] if is_op(use.node, "Transpose") else None
    return [
        reader.node
        for reader in use.read.uses()
        if reader.idx == 0
        and (reader.node is use.node or (behind is not None and reader.node.inputs[1] is behind))
    ]


def _move_behind(node: ir.Node | None, other: ir.Node) -> None:
    assert node is not None
    assert other.graph is not None
    other.graph.remove(node)
    other.graph.insert_after(other, node)


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return bool(np.array_equal(one, other))


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _later(value: ir.Value, steps: dict[int, _Step]) -> None:
    """Put a value's tensor through ``steps``, by their axes, in float32 whenever it is read."""
    tensor = _tensor(value)

    def compute() -> ir.TensorProtocol:
        array = tensor.numpy()
        made = np.empty(array.shape, tensor.dtype.numpy())
        for block in _blocks(array.shape, steps):
            part = np.asarray(array[block], np.float32)
            for step in steps.values():
                part = step(part)
            made[block] = part
        return ir.Tensor(made, tensor.dtype, name=value.name)

    value.const_value = ir.LazyTensor(compute, tensor.dtype, tensor.shape, name=value.name)  # type: ignore[arg-type]


def _blocks(shape: tuple[int, ...], axes: Iterable[int]) -> Iterator[tuple[slice, ...]]:
    """Slices along one axis that is not among ``axes``, of a limited size if there is such one."""
    taken = {axis % len(shape) for axis in axes}
    free = [axis for axis in range(len(shape)) if axis not in taken]
    if not free:
        yield ()
        return
    axis = max(free, key=lambda a: shape[a])
    size = max(1, _AT_ONCE * shape[axis] // max(1, math.prod(shape)))
    for start in range(0, shape[axis], size):
        yield (*(slice(None),) * axis, slice(start, start + size))


__all__ = ["Rotate", "Turned", "rotate"]
