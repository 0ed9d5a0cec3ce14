"""Complex tensors of an exported program as pairs of real ones.

ONNX operators have no complex types. A complex tensor ``[…]`` becomes a real tensor ``[…, 2]``
that holds real and imaginary parts; each operator that touches one is replaced by real operators,
by a rule per operator. Nothing here knows about any model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from hal.errors import ExportError

aten = torch.ops.aten

Rule = Callable[..., Node]


def as_real_pairs(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return an equal program without complex tensors; ``program`` itself if it has none.

    Complex parameters, buffers, inputs and outputs become real ones with a last axis of size 2.

    Raises:
        ExportError: an operator on complex tensors has no rule.
    """
    if not any(_is_complex(node) for node in program.graph.nodes):
        return program
    # A copy through torch's own functionalization: no in-place operators, few composite ones.
    program = program.run_decompositions(_decompositions())
    _Rewriter(program.graph_module).run()
    for table in (program.state_dict, program.constants):
        for name, tensor in table.items():
            if isinstance(tensor, torch.Tensor) and tensor.is_complex():
                table[name] = torch.view_as_real(tensor)
    return program


def _decompositions() -> Any:
    """The default table without what ONNX has operators for."""
    table: Any = torch.export.default_decompositions()
    for operator_kept in (
        aten.scaled_dot_product_attention.default,
        aten.linear.default,
        aten.layer_norm.default,
        aten.silu.default,
    ):
        table.pop(operator_kept, None)
    return table


def _is_complex(value: Any) -> bool:
    if isinstance(value, Node):
        value = value.meta.get("val")
    if isinstance(value, (list, tuple)):
        return any(_is_complex(item) for item in value)
    return isinstance(value, torch.Tensor) and value.is_complex()


def _rank(node: Node) -> int:
    return int(node.meta["val"].dim())  # of the original, complex tensor


class _Rewriter:
    """Walks a graph once and puts real operators before each complex one."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.graph = module.graph
        self.pairs: dict[Node, Node] = {}  # complex node → node of its pair

    def run(self) -> None:
        for node in list(self.graph.nodes):
            touches = _is_complex(node) or any(_is_complex(n) for n in node.all_input_nodes)
            if node.op == "placeholder" and touches:
                self.pairs[node] = node
            elif node.op == "output" and touches:
                node.args = torch.fx.map_arg(node.args, lambda n: self.pairs.get(n, n))
            elif touches and node.op == "call_function":
                self._rewrite(node)
        for node in self.pairs:
            if node.op == "placeholder":
                node.meta["val"] = torch.view_as_real(node.meta["val"])
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.module.recompile()

    def _rewrite(self, node: Node) -> None:
        if node.target in _CHECKS:
            self.graph.erase_node(node)
            return
        rule = _RULES.get(node.target)
        if rule is None:
            raise ExportError(
                f"the model uses the torch operator {node.target} on complex numbers, which has no"
                " translation",
                "compute with real and imaginary parts, or with cos and sin",
            )
        with self.graph.inserting_before(node):
            pair = rule(self, node, *node.args, **node.kwargs)
        if _is_complex(node):
            self.pairs[node] = pair
        else:
            node.replace_all_uses_with(pair)
            self.pairs.pop(node, None)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert an operator; its meta value comes from running it on the inputs' fakes."""
        node = self.graph.call_function(target, args, kwargs)
        fakes = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        mode = next(
            t.fake_mode for t in torch.utils._pytree.tree_leaves(fakes) if hasattr(t, "fake_mode")
        )
        with mode:
            node.meta["val"] = target(*fakes[0], **fakes[1])
        return node

    def pair(self, value: Any) -> Any:
        """The pair ``[…, 2]`` of a complex node; other values as they are."""
        return self.pairs.get(value, value)

    def parts(self, value: Any) -> tuple[Any, Any]:
        """Real and imaginary part of a complex or real node, or of a number."""
        if isinstance(value, Node) and value in self.pairs:
            pair = self.pairs[value]
            return self.emit(aten.select.int, pair, -1, 0), self.emit(aten.select.int, pair, -1, 1)
        if isinstance(value, complex):
            return value.real, value.imag
        return value, None

    def stack(self, real: Node, imaginary: Node) -> Node:
        """The pair of two real tensors of one shape."""
        return self.emit(aten.stack.default, [real, imaginary], -1)

    def calculate(self, target: Any, a: Any, b: Any) -> Any:
        """``a + b``, ``a - b`` or ``a * b`` of tensors or numbers, where None is zero."""
        if a is None or b is None:
            if target is aten.mul:
                return None
            if b is None:
                return a
            return self.emit(aten.neg.default, b) if target is aten.sub else b
        if not isinstance(a, Node) and not isinstance(b, Node):
            return {aten.add: operator.add, aten.sub: operator.sub, aten.mul: operator.mul}[target](
                a, b
            )
        if not isinstance(a, Node):
            if target is aten.sub:
                return self.emit(aten.add.Tensor, self.emit(aten.neg.default, b), a)
            a, b = b, a
        return self.emit(target.Tensor, a, b)


# --- rules: (rewriter, node, *args) -> node of the pair, or of the real result ---


def _same(r: _Rewriter, node: Node, *args: Any, **kwargs: Any) -> Node:
    """Operators that act on each number's parts alike and name no axis from the end."""
    args, kwargs = torch.fx.map_arg((args, kwargs), lambda n: r.pair(n))
    return r.emit(node.target, *args, **kwargs)


def _axis(position: int, default: int | None = None, extra: int = 0) -> Rule:
    """As :func:`_same` for operators with an axis argument, which may count from the end."""

    def rule(r: _Rewriter, node: Node, *args: Any, **kwargs: Any) -> Node:
        values = list(args)
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if "dim" in kwargs:
            values.insert(position, kwargs.pop("dim"))
        if position >= len(values) and default is not None:
            values.append(default)
        if position < len(values):
            rank = _rank(first) + extra
            axes = values[position]
            values[position] = (
                [a % rank for a in axes] if isinstance(axes, (list, tuple)) else axes % rank
            )
        return _same(r, node, *values, **kwargs)

    return rule


def _transpose(r: _Rewriter, node: Node, x: Node, a: int, b: int) -> Node:
    rank = _rank(x)
    return r.emit(node.target, r.pair(x), a % rank, b % rank)


def _permute(r: _Rewriter, node: Node, x: Node, axes: list[int]) -> Node:
    rank = _rank(x)
    return r.emit(node.target, r.pair(x), [*(a % rank for a in axes), rank])


def _shape(r: _Rewriter, node: Node, x: Node, sizes: list[Any], **kwargs: Any) -> Node:
    return r.emit(node.target, r.pair(x), [*sizes, 2], **kwargs)


def _repeat(r: _Rewriter, node: Node, x: Node, times: list[Any]) -> Node:
    return r.emit(node.target, r.pair(x), [*times, 1])


def _squeeze_all(r: _Rewriter, node: Node, x: Node) -> Node:
    axes = [axis for axis, size in enumerate(x.meta["val"].shape) if size == 1]
    return r.emit(aten.squeeze.dims, r.pair(x), axes)


def _cast(r: _Rewriter, node: Node, x: Node, *args: Any, **kwargs: Any) -> Node:
    """Between complex and real: the imaginary part is dropped or zero."""
    dtype = node.meta["val"].dtype
    real_dtype = torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype
    if not dtype.is_complex:
        return r.emit(aten._to_copy.default, r.parts(x)[0], dtype=real_dtype)
    if x in r.pairs:
        return r.emit(aten._to_copy.default, r.pair(x), dtype=real_dtype)
    real = r.emit(aten._to_copy.default, x, dtype=real_dtype)
    return r.stack(real, r.emit(aten.zeros_like.default, real))


def _polar(r: _Rewriter, node: Node, radius: Node, angle: Node) -> Node:
    cos, sin = r.emit(aten.cos.default, angle), r.emit(aten.sin.default, angle)
    return r.stack(r.emit(aten.mul.Tensor, radius, cos), r.emit(aten.mul.Tensor, radius, sin))


def _complex(r: _Rewriter, node: Node, real: Node, imaginary: Node) -> Node:
    return r.stack(real, imaginary)


def _pair_is(r: _Rewriter, node: Node, x: Node) -> Node:
    """view_as_complex and view_as_real: the pair is the real view."""
    pair: Node = r.pair(x)
    return pair


def _part(index: int) -> Rule:
    def rule(r: _Rewriter, node: Node, x: Node) -> Node:
        part: Node | None = r.parts(x)[index]
        return r.emit(aten.zeros_like.default, x) if part is None else part

    return rule


def _conjugate(r: _Rewriter, node: Node, x: Node) -> Node:
    real, imaginary = r.parts(x)
    return r.stack(real, r.emit(aten.neg.default, imaginary))


def _abs(r: _Rewriter, node: Node, x: Node) -> Node:
    return r.emit(aten.sqrt.default, _squared_norm(r, *r.parts(x)))


def _squared_norm(r: _Rewriter, real: Any, imaginary: Any) -> Any:
    return r.calculate(
        aten.add, r.calculate(aten.mul, real, real), r.calculate(aten.mul, imaginary, imaginary)
    )


def _angle(r: _Rewriter, node: Node, x: Node) -> Node:
    real, imaginary = r.parts(x)
    return r.emit(aten.atan2.default, imaginary, real)


def _both(r: _Rewriter, node: Node, real: Any, imaginary: Any) -> Node:
    """A pair from parts that broadcasting left at different shapes or that are zero."""
    shape = list(node.meta["val"].shape)
    like = real if isinstance(real, Node) else imaginary
    parts = []
    for part in (real, imaginary):
        if not isinstance(part, Node):
            part = r.emit(aten.full_like.default, like, 0.0 if part is None else part)
        if list(part.meta["val"].shape) != shape:
            other = imaginary if part is real else real
            part = r.emit(aten.add.Tensor, part, r.emit(aten.mul.Tensor, other, 0.0))
        parts.append(part)
    return r.stack(*parts)


def _sum(target: Any) -> Rule:
    def rule(r: _Rewriter, node: Node, a: Any, b: Any, alpha: Any = 1) -> Node:
        (ar, ai), (br, bi) = r.parts(a), r.parts(b)
        if alpha != 1:
            br, bi = r.calculate(aten.mul, br, alpha), r.calculate(aten.mul, bi, alpha)
        return _both(r, node, r.calculate(target, ar, br), r.calculate(target, ai, bi))

    return rule


def _multiply(r: _Rewriter, node: Node, a: Any, b: Any) -> Node:
    return _both(r, node, *_product(r, r.parts(a), r.parts(b)))


def _product(r: _Rewriter, a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    mul, add, sub = aten.mul, aten.add, aten.sub
    real = r.calculate(sub, r.calculate(mul, a[0], b[0]), r.calculate(mul, a[1], b[1]))
    imaginary = r.calculate(add, r.calculate(mul, a[0], b[1]), r.calculate(mul, a[1], b[0]))
    return real, imaginary


def _divide(r: _Rewriter, node: Node, a: Any, b: Any) -> Node:
    real, imaginary = r.parts(b)
    if imaginary is None:
        inverse = r.emit(aten.reciprocal.default, real) if isinstance(real, Node) else 1.0 / real
        return _both(r, node, *_product(r, r.parts(a), (inverse, None)))
    norm = _squared_norm(r, real, imaginary)
    scale = r.emit(aten.reciprocal.default, norm) if isinstance(norm, Node) else 1.0 / norm
    negative = r.calculate(aten.mul, imaginary, -1.0)
    scaled = r.calculate(aten.mul, real, scale), r.calculate(aten.mul, negative, scale)
    return _both(r, node, *_product(r, r.parts(a), scaled))


def _reciprocal(r: _Rewriter, node: Node, x: Node) -> Node:
    return _divide(r, node, 1.0, x)


def _exponential(r: _Rewriter, node: Node, x: Node) -> Node:
    real, imaginary = r.parts(x)
    return _polar(r, node, r.emit(aten.exp.default, real), imaginary)


def _matmul(r: _Rewriter, node: Node, a: Node, b: Node) -> Node:
    (ar, ai), (br, bi) = r.parts(a), r.parts(b)

    def dot(x: Any, y: Any) -> Any:
        return None if x is None or y is None else r.emit(node.target, x, y)

    real = r.calculate(aten.sub, dot(ar, br), dot(ai, bi))
    return _both(r, node, real, r.calculate(aten.add, dot(ar, bi), dot(ai, br)))


def _where(r: _Rewriter, node: Node, condition: Node, a: Any, b: Any) -> Node:
    (ar, ai), (br, bi) = r.parts(a), r.parts(b)
    zero = r.emit(aten.zeros_like.default, ar)
    real = r.emit(aten.where.self, condition, ar, br)
    imaginary = r.emit(
        aten.where.self, condition, zero if ai is None else ai, zero if bi is None else bi
    )
    return r.stack(real, imaginary)


def _ones_like(r: _Rewriter, node: Node, x: Node, **kwargs: Any) -> Node:
    real = r.parts(x)[0]
    return r.stack(r.emit(aten.ones_like.default, real), r.emit(aten.zeros_like.default, real))


_CHECKS = {aten._assert_tensor_metadata.default}

_RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            aten.neg.default,
            aten.clone.default,
            aten.alias.default,
            aten.detach.default,
            aten.lift_fresh_copy.default,
            aten.contiguous.default,
            aten.zeros_like.default,
            aten.sym_size.int,
            operator.getitem,
        ),
        _same,
    ),
    aten.unsqueeze.default: _axis(1, extra=1),
    aten.squeeze.dim: _axis(1),
    aten.squeeze.dims: _axis(1),
    aten.squeeze.default: _squeeze_all,
    aten.slice.Tensor: _axis(1, default=0),
    aten.select.int: _axis(1),
    aten.index_select.default: _axis(1),
    aten.index.Tensor: _same,
    aten.cat.default: _axis(1, default=0),
    aten.stack.default: _axis(1, default=0, extra=1),
    aten.split.Tensor: _axis(2, default=0),
    aten.split_with_sizes.default: _axis(2, default=0),
    aten.sum.dim_IntList: _axis(1),
    aten.mean.dim: _axis(1),
    aten.cumsum.default: _axis(1),
    aten.flip.default: _axis(1),
    aten.roll.default: _axis(2),
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.view.default: _shape,
    aten.reshape.default: _shape,
    aten._unsafe_view.default: _shape,
    aten.expand.default: _shape,
    aten.repeat.default: _repeat,
    aten._to_copy.default: _cast,
    aten.polar.default: _polar,
    aten.complex.default: _complex,
    aten.view_as_complex.default: _pair_is,
    aten.view_as_real.default: _pair_is,
    aten.view_as_real_copy.default: _pair_is,
    aten.view_as_complex_copy.default: _pair_is,
    aten.resolve_conj.default: _pair_is,
    aten.resolve_neg.default: _pair_is,
    aten.real.default: _part(0),
    aten.imag.default: _part(1),
    aten._conj.default: _conjugate,
    aten._conj_physical.default: _conjugate,
    aten.conj_physical.default: _conjugate,
    aten.abs.default: _abs,
    aten.angle.default: _angle,
    aten.add.Tensor: _sum(aten.add),
    aten.sub.Tensor: _sum(aten.sub),
    aten.mul.Tensor: _multiply,
    aten.mul.Scalar: _multiply,
    aten.div.Tensor: _divide,
    aten.div.Scalar: _divide,
    aten.reciprocal.default: _reciprocal,
    aten.exp.default: _exponential,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.where.self: _where,
    aten.ones_like.default: _ones_like,
}
