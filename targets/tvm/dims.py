"""Dynamic dims: from the names of an ONNX graph to TVM expressions, and arithmetic on them.

A dim is a Python ``int`` or an int64 ``tirx`` expression over symbols; symbols are shared by name.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tvm
from tvm import tirx

Dim = Any
"""An ``int`` or an int64 ``tirx.Expr``."""


class Refused(Exception):  # noqa: N818 - a verdict, not an error
    """A node (or a use of it) that this backend does not run; the text is the reason."""


_WORDS = """
    and asm auto bool break case catch char class const continue default delete do double else enum
    explicit export extern false float for friend goto if inline int long mutable namespace new not
    operator or private protected public register return short signed sizeof static struct switch
    template this throw true try typedef typeid typename union unsigned using virtual void volatile
    while xor
"""
_RESERVED = frozenset(_WORDS.split())
"""What code generators for C++ print as it is, and its compilers do not take as a name."""


class Symbols:
    """The dynamic dims of one graph by name, with an analyzer that knows that none is negative."""

    _LARGEST = 1 << 40

    def __init__(self, fixed: Mapping[str, int] | None = None) -> None:
        """``fixed``: dims that are known numbers in this lowering."""
        self._fixed = dict(fixed or {})
        self._by_name: dict[str, tirx.Var] = {}
        self._count = itertools.count()
        self.analyzer = tvm.sym.Analyzer()

    def named(self, name: str) -> tirx.Var:
        """The symbol called ``name``, made on first use."""
        if name not in self._by_name:
            clean = "".join(c if c.isalnum() else "_" for c in name) or "dim"
            var = tirx.Var(f"{clean}_" if clean in _RESERVED else clean, "int64")
            self.analyzer.bind(var, tvm.ir.Range(0, self._LARGEST))
            self._by_name[name] = var
        return self._by_name[name]

    def fresh(self, hint: str = "dim") -> tirx.Var:
        """A symbol that no other value shares."""
        return self.named(f"{hint}.{next(self._count)}")

    def all(self) -> Iterable[tirx.Var]:
        """Every symbol made so far."""
        return self._by_name.values()

    def parse(self, text: str | None) -> Dim:
        """The dim that ``text`` names: a symbol or an expression such as ``past + sequence``."""
        if not text or text == "?":
            return self.fresh("unnamed")
        if text in self._fixed:
            return self._fixed[text]
        try:
            return self._evaluate(ast.parse(text, mode="eval").body)
        except (SyntaxError, Refused):
            return self.named(text)

    def _evaluate(self, node: ast.expr) -> Dim:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return self._fixed[node.id] if node.id in self._fixed else self.named(node.id)
        if isinstance(node, ast.BinOp):
            left, right = self._evaluate(node.left), self._evaluate(node.right)
            if isinstance(node.op, ast.Add):
                return self.simplify(left + right)
            if isinstance(node.op, ast.Sub):
                return self.simplify(left - right)
            if isinstance(node.op, ast.Mult):
                return self.simplify(left * right)
            if isinstance(node.op, (ast.FloorDiv, ast.Div)):
                return self.simplify(floordiv(left, right))
        raise Refused("a dim that is no sum or product of names")

    def simplify(self, dim: Dim) -> Dim:
        """Reduce ``dim``; a constant becomes an ``int``."""
        if isinstance(dim, (int, bool)):
            return int(dim)
        return as_int(self.analyzer.simplify(dim))

    def decide(self, condition: Any) -> bool | None:
        """Truth of a condition over dims, or None where it depends on the input."""
        if isinstance(condition, bool):
            return condition
        result = self.analyzer.simplify(condition)
        if isinstance(result, tirx.IntImm):
            return bool(result.value)
        return None

    def equal(self, left: Dim, right: Dim) -> bool:
        """Whether two dims are equal for every input."""
        if isinstance(left, int) and isinstance(right, int):
            return left == right
        return self.simplify(left - right) == 0 if is_static(self.simplify(left - right)) else False

    def broadcast(self, shapes: Sequence[Sequence[Dim]]) -> list[Dim]:
        """Shape that the ``shapes`` broadcast to, as NumPy does.

        Raises:
            Refused: two static extents differ and neither is 1.
        """
        rank = max((len(s) for s in shapes), default=0)
        result: list[Dim] = []
        for axis in range(rank):
            dims = [s[axis - rank + len(s)] for s in shapes if axis - rank + len(s) >= 0]
            result.append(self._broadcast_dim(dims))
        return result

    def _broadcast_dim(self, dims: Sequence[Dim]) -> Dim:
        known = {d for d in dims if isinstance(d, int) and d != 1}
        if len(known) > 1:
            raise Refused(f"extents {sorted(known)} do not broadcast")
        if known:
            return known.pop()
        unique: list[Dim] = []
        for dim in dims:
            if not isinstance(dim, int) and not any(self.equal(dim, u) for u in unique):
                unique.append(dim)
        if not unique:
            return 1
        result = unique[0]
        for dim in unique[1:]:
            result = tirx.max(result, dim)
        return result

    def divide_product(self, numerator: Sequence[Dim], denominator: Sequence[Dim]) -> Dim:
        """``prod(numerator) // prod(denominator)``, equal dims cancelled first."""
        top, bottom = list(numerator), []
        for dim in denominator:
            match = next((i for i, t in enumerate(top) if self.equal(t, dim)), None)
            if match is None:
                bottom.append(dim)
            else:
                del top[match]
        static_top = math.prod(d for d in top if isinstance(d, int))
        static_bottom = math.prod(d for d in bottom if isinstance(d, int))
        if static_bottom > 1 and static_top % static_bottom == 0:
            static_top, static_bottom = static_top // static_bottom, 1
        over = product([static_top, *(d for d in top if not isinstance(d, int))])
        under = product([static_bottom, *(d for d in bottom if not isinstance(d, int))])
        if isinstance(under, int) and under == 0:
            return 0
        return self.simplify(floordiv(over, under))


def is_static(dim: Any) -> bool:
    """Whether ``dim`` is a known number."""
    return isinstance(dim, int)


def as_int(dim: Any) -> Dim:
    """Turn an integer constant of any kind into ``int``; leave other expressions."""
    if isinstance(dim, int):
        return int(dim)
    if isinstance(dim, tirx.IntImm):
        return int(dim.value)
    if hasattr(dim, "item"):
        return int(dim.item())
    return dim


def floordiv(left: Dim, right: Dim) -> Dim:
    """Floor division of dims (their operator ``//`` does not take two ints)."""
    if isinstance(left, int) and isinstance(right, int):
        return left // right
    return tirx.floordiv(left, right)


def product(dims: Iterable[Dim]) -> Dim:
    """Product of dims; 1 for none."""
    result: Dim = 1
    for dim in dims:
        if isinstance(dim, int) and dim == 1:
            continue
        result = dim if isinstance(result, int) and result == 1 else result * dim
    return result


def at_least(dim: Dim, other: Dim) -> Dim:
    """The larger of two dims."""
    if isinstance(dim, int) and isinstance(other, int):
        return max(dim, other)
    return tirx.max(
        *(d if not isinstance(d, int) else tirx.const(d, "int64") for d in (dim, other))
    )


def at_most(dim: Dim, other: Dim) -> Dim:
    """The smaller of two dims."""
    if isinstance(dim, int) and isinstance(other, int):
        return min(dim, other)
    return tirx.min(
        *(d if not isinstance(d, int) else tirx.const(d, "int64") for d in (dim, other))
    )
