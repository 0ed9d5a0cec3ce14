"""Rewriting one attention so that it carries the values of a cut."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from hal.errors import GraphError
from hal.ir import Graph, State
from hal.passes import _absorb as absorb
from hal.passes._cut import Option
from hal.passes._edit import Editor, attribute, is_op
from hal.passes._retime import InPlace, Retimed
from hal.passes._tokens import TokenPaths
from hal.passes.causal_mask import CAUSAL_KEY, WINDOW_KEY


@dataclasses.dataclass(frozen=True)
class Carried:
    """A new state of the graph: its input, and the value that becomes its output."""

    state: State
    past: ir.Value
    present: ir.Value


@dataclasses.dataclass(frozen=True)
class Absorption:
    """What a latent cut needs: the carried values side by side, and the maps to both operands.

    ``parts`` are in the order in which they are carried. Values are a prefix of them, unless keys
    and values share none: then each has a state of its own (``joint`` is False).
    """

    parts: tuple[ir.Value, ...]
    key_parts: tuple[ir.Value, ...]
    value_parts: tuple[ir.Value, ...]
    joint: bool
    key_map: absorb.LinearMap
    value_map: absorb.LinearMap
    solve_key: absorb.Solve
    solve_value: absorb.Solve


def absorption(paths: TokenPaths, cut: Sequence[ir.Value]) -> Absorption | None:
    """How a cut's linear maps can be absorbed; None where the algebra does not allow it."""
    for_key, for_value = paths.reaching(paths.key), paths.reaching(paths.value)
    value_parts = tuple(sorted((v for v in cut if v in for_value), key=lambda v: v not in for_key))
    others = tuple(v for v in cut if v not in for_value)
    if any(v.dtype != paths.query.dtype for v in cut):
        return None  # a cast after the cut: parts would have to be carried in another type
    joint = any(v in for_key for v in value_parts)
    parts = (*value_parts, *others)
    key_parts = parts if joint else others
    solvers = [
        absorb.linear_program(paths, key_parts, paths.key).solve,
        absorb.linear_program(paths, value_parts, paths.value).solve,
    ]
    try:
        key_map, value_map = (solve() for solve in solvers)
    except GraphError:
        return None  # an op that no reference evaluator runs
    if key_map.offset.any() and attribute(paths.node, "softcap", 0.0):
        return None  # a constant added to all scores of a query changes them where they are capped
    if value_map.offset.any() and _mask(paths) is not None and not _causal(paths):
        return None  # rows that see nothing have no weights that sum to one
    solve_key, solve_value = (
        _kept(found, solve) for found, solve in zip((key_map, value_map), solvers, strict=True)
    )
    return Absorption(
        parts, key_parts, value_parts, joint, key_map, value_map, solve_key, solve_value
    )


def _kept(found: absorb.LinearMap, solve: absorb.Solve) -> absorb.Solve:
    """A small map is kept, a large one solved again when its matrices are read."""
    return (lambda: found) if found.matrix.nbytes <= absorb.LAZY_BYTES else solve


def _mask(paths: TokenPaths) -> ir.Value | None:
    return paths.node.inputs[3] if len(paths.node.inputs) > 3 else None


def _causal(paths: TokenPaths) -> bool:
    marks = paths.node.metadata_props
    return CAUSAL_KEY in marks or WINDOW_KEY in marks or bool(attribute(paths.node, "is_causal", 0))


class Rewrite:
    """Puts the new form before the old node, which is left for dead-code removal."""

    def __init__(self, graph: Graph, edit: Editor, paths: TokenPaths) -> None:
        self._edit, self._paths = edit, paths
        self._removed = list(dict.fromkeys(a.state for a in paths.appends.values()))
        self._appends = {a.state: a for a in paths.appends.values()}
        self._new = Retimed(paths, {}, InPlace(edit), fresh=False)
        self._names: set[str] = {s.name for s in graph.state if s not in self._removed}
        self.carried: list[Carried] = []
        edit.at(paths.node)

    @property
    def removed(self) -> list[State]:
        """States that the rewritten attention no longer reads."""
        return self._removed

    def expand(self) -> None:
        """Carry keys and values as the op uses them."""
        paths = self._paths
        key, value = self._new(paths.key), self._new(paths.value)
        past_key = self._past("key", paths.key, flat=False)
        shared = paths.key is paths.value
        past_value = past_key if shared else self._past("value", paths.value, flat=False)
        outputs = self._attention(paths.query, key, value, past_key, past_value, paths.value)
        self._present(past_key, outputs[1], "key")
        if not shared:
            self._present(past_value, outputs[2], "value")
        self._edit.replace(paths.node.outputs[0], outputs[0])

    def recompute(self, option: Option) -> None:
        """Carry the cut and compute old keys and values from it at each step."""
        paths, leaves = self._paths, dict[ir.Value, ir.Value]()
        for_key, for_value = paths.reaching(paths.key), paths.reaching(paths.value)
        for value in option.cut:
            both = value in for_key and value in for_value
            kind = "latent" if both else "key" if value in for_key else "value"
            past = self._past(kind, value, flat=not self._by_heads(value))
            leaves[value] = self._from_carried(value, past)
            present = self._op("Concat", [past, self._to_carried(value)], {"axis": 2}, value)
            self._present(past, present, kind)
        old = Retimed(paths, leaves, InPlace(self._edit), fresh=False)
        outputs = self._attention(
            paths.query, self._new(paths.key), self._new(paths.value),
            old(paths.key), old(paths.value), paths.value,
        )  # fmt: skip
        self._edit.replace(paths.node.outputs[0], outputs[0])

    def absorb(self, found: Absorption) -> None:
        """Carry the cut, and attend to it as one head that all query heads share."""
        edit, paths = self._edit, self._paths
        blocks = absorb.query_blocks(paths, found.key_parts, found.key_map)
        query = absorb.absorbed_query(edit, paths, blocks, found.solve_key)
        width = sum(paths.per_token(v) for v in found.value_parts)
        key = self._joined(found.key_parts)
        past_key = self._past("latent" if found.joint else "key", *found.key_parts, flat=True)
        if not found.joint:
            value = self._joined(found.value_parts)
            past_value = self._past("value", *found.value_parts, flat=True)
        elif found.parts == found.value_parts:
            value, past_value = key, past_key
        else:
            value = absorb.sliced(edit, key, 0, width)
            past_value = absorb.sliced(edit, past_key, 0, width)
        outputs = self._attention(query, key, value, past_key, past_value, *found.value_parts)
        self._present(past_key, outputs[1], "latent" if found.joint else "key")
        if not found.joint:
            self._present(past_value, outputs[2], "value")
        out = absorb.absorbed_output(edit, paths, outputs[0], found.value_map, found.solve_value)
        edit.replace(paths.node.outputs[0], out)

    # -- pieces ---------------------------------------------------------------------------

    def _op(
        self, op: str, inputs: Sequence[ir.Value | None], attributes: dict[str, object],
        like: ir.Value,
    ) -> ir.Value:  # fmt: skip
        made = self._edit.op(op, inputs, attributes)
        made.type = like.type
        return made

    def _attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, past_k: ir.Value, past_v: ir.Value,
        *summed: ir.Value,
    ) -> Sequence[ir.Value]:  # fmt: skip
        """The op on new and past keys and values: output, present keys, present values.

        ``summed`` are the values whose channels ``v`` has side by side.
        """
        node, mask = self._paths.node, _mask(self._paths)
        attributes = {name: a.value for name, a in node.attributes.items()}
        size = int(self._paths.shapes.shape[self._paths.query][3])
        attributes.setdefault("scale", 1.0 / math.sqrt(size))
        marks = dict(node.metadata_props)
        if mask is not None and marks.pop(CAUSAL_KEY, ""):
            mask, attributes["is_causal"] = None, 1
        first = self._edit.op("Attention", [q, k, v, mask, past_k, past_v], attributes, outputs=3)
        made = first.producer()
        assert made is not None
        made.metadata_props.update(marks)
        for value in made.outputs:
            value.type = node.outputs[0].type
        if summed == (self._paths.value,):
            width = self._paths.extents(self._paths.value)[3]
        else:
            width = sum(self._paths.per_token(value) for value in summed)
        assert self._paths.query.shape is not None
        first.shape = ir.Shape([*self._paths.query.shape[:3], width])
        return list(made.outputs)

    def _by_heads(self, value: ir.Value) -> bool:
        """Whether a value is laid out ``[batch, heads, position, channels]``."""
        return len(self._paths.extents(value)) == 4 and self._paths.position(value) == 2

    def _to_carried(self, value: ir.Value, *, flat: bool = False) -> ir.Value:
        """New tokens of a value as ``[batch, heads, position, channels]``; ``flat``: one head."""
        made, extents = self._new(value), self._paths.extents(value)
        if self._by_heads(value) and (extents[1] == 1 or not flat):
            return made
        where = self._paths.position(value)
        if where != 1:
            order = [0, where, *(i for i in range(1, len(extents)) if i != where)]
            made = self._op("Transpose", [made], {"perm": order}, value)
        target = [0, 1, -1, self._paths.per_token(value)]
        return self._op(
            "Reshape", [made, self._edit.constant(target, "shape", np.int64)], {}, value
        )

    def _from_carried(self, value: ir.Value, past: ir.Value) -> ir.Value:
        """The way back for old tokens."""
        if self._by_heads(value):
            return past
        extents, where = self._paths.extents(value), self._paths.position(value)
        rest = [e for e in extents if e > 0]
        shape = self._edit.constant([0, -1, *rest], "shape", np.int64)
        made = self._op("Reshape", [past, shape], {}, value)
        if where == 1:
            return made
        order = [0, *range(2, len(extents))]
        order.insert(where, 1)
        return self._op("Transpose", [made], {"perm": order}, value)

    def _joined(self, parts: Sequence[ir.Value]) -> ir.Value:
        """Carried values side by side, new tokens only: ``[batch, 1, sequence, C]``."""
        made = [self._to_carried(v, flat=True) for v in parts]
        return made[0] if len(made) == 1 else self._op("Concat", made, {"axis": 3}, parts[0])

    def _past(self, kind: str, *values: ir.Value, flat: bool) -> ir.Value:
        """A new graph input for the old tokens of these values, side by side."""
        old = self._removed[0]
        growth = old.growth_axis
        given = self._appends[old].past
        assert given.shape is not None
        assert growth is not None
        heads = 1 if flat else self._paths.extents(values[0])[1]
        channels = sum(self._paths.per_token(v) for v in values) // heads
        dims = [given.shape[old.axes.index("batch")], heads, given.shape[growth], channels]
        return ir.Value(name=f"new.{kind}", shape=ir.Shape(dims), type=values[0].type)

    def _present(self, past: ir.Value, present: ir.Value, kind: str) -> None:
        """Record a new state; names follow those of the first old one."""
        old = self._removed[0]
        growth = old.growth_axis
        assert growth is not None
        given = self._appends[old].present.shape
        assert past.shape is not None
        assert given is not None
        dims = list(past.shape)
        dims[2] = given[growth]
        present.shape = ir.Shape(dims)
        name = kind if not old.name.endswith(f".{old.kind}") else _renamed(old.name, old, kind)
        names = [name, _renamed(old.input, old, kind), _renamed(old.output, old, kind)]
        if name in self._names:
            names = [f"{n}.{len(self._names)}" for n in names]
        self._names.add(names[0])
        axes = ("batch", "head", "position", "channel")
        state = State(names[0], names[1], names[2], kind, axes, 2)
        self.carried.append(Carried(state, past, present))


def _renamed(text: str, old: State, kind: str) -> str:
    """``past.3.key`` → ``past.3.latent``."""
    return f"{text.removesuffix(old.kind)}{kind}" if text.endswith(old.kind) else f"{text}.{kind}"


def swap_states(graph: Graph, edit: Editor, removed: Sequence[State], added: list[Carried]) -> None:
    """Replace states of a graph; what reads the old ones' extents reads the new ones'."""
    inputs, outputs = graph.graph.inputs, graph.graph.outputs
    old_inputs = {v.name: v for v in inputs if v.name in {s.input for s in removed}}
    for state in removed:
        for use in list(old_inputs[state.input].uses()):
            if is_op(use.node, "Shape"):
                _redirect(edit, use.node, state, added[0].past)
    old_outputs = [v for v in outputs if v.name in {s.output for s in removed}]
    place_in = min(inputs.index(v) for v in old_inputs.values())
    place_out = min(outputs.index(v) for v in old_outputs)
    for value in old_outputs:
        outputs.remove(value)
        value.name = edit.fresh(f"{value.name}_exported")
    for index, new in enumerate(added):
        outputs.insert(place_out + index, new.present)
        inputs.insert(place_in + index, new.past)
    for value in old_inputs.values():
        inputs.remove(value)
        value.name = edit.fresh(f"{value.name}_exported")
    for new in added:
        new.past.name, new.present.name = new.state.input, new.state.output
    states = list(graph.state)
    place = min(states.index(s) for s in removed)
    kept = [s for s in states if s not in removed]
    graph.state = (*kept[:place], *(new.state for new in added), *kept[place:])


def _redirect(edit: Editor, node: ir.Node, state: State, past: ir.Value) -> None:
    """Let a ``Shape`` of an old state be computed from a new one's batch and length."""
    given = node.inputs[0]
    assert given is not None
    assert given.shape is not None
    size = len(given.shape)
    start, end = attribute(node, "start", 0), attribute(node, "end", size)
    edit.at(node)
    made = []
    for axis in range(size)[start:end]:
        extent = given.shape[axis]
        if axis == state.growth_axis or state.axes[axis] == "batch":
            source = 2 if axis == state.growth_axis else 0
            made.append(edit.op("Shape", [past], {"start": source, "end": source + 1}))
        else:
            assert isinstance(extent, int)
            made.append(edit.constant([extent], "extent", np.int64))
    for value in made:
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    result = made[0] if len(made) == 1 else edit.op("Concat", made, {"axis": 0})
    edit.replace(node.outputs[0], result)
