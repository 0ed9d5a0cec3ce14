"""What a language model carries from token to token, chosen by price."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import onnx_ir as ir

from hal.descriptor import Descriptor
from hal.errors import InputError, did_you_mean
from hal.ir import Graph
from hal.passes._carry import Absorption, Rewrite, absorption, swap_states
from hal.passes._cut import Option, absorbed, expanded, machine_balance, recomputed
from hal.passes._edit import SCOPE_KEY, Editor, remove_unused
from hal.passes._symbolic import analyse
from hal.passes._tokens import NotTokenWiseError, TokenPaths, token_paths
from hal.passes.base import Outcome, Pass

MODES = ("auto", "latent", "expanded")


@dataclasses.dataclass(frozen=True)
class KvCache(Pass):
    """Carry what costs least per step between the hidden state and the keys and values.

    Everything there is computed token by token, so the carried state may be cut anywhere: a
    minimum cut in bytes per token and recomputed operations, priced by the target's balance of
    arithmetic and memory. Linear maps left after the cut move into the queries and the output.
    ``auto`` takes the cheapest form, ``latent`` the fewest bytes, ``expanded`` keys and values as
    the attention op uses them. Preserves results up to rounding; the carried state changes.
    """

    name: ClassVar[str] = "kv_cache"
    mode: str = "auto"
    descriptor: Descriptor | None = None

    def __str__(self) -> str:
        """The pass as text: mode and balance instead of the whole descriptor."""
        balance = machine_balance(self.descriptor, ir.DataType.FLOAT)
        return f"{self.name}(mode={self.mode!r}, balance={balance:.3g})"

    def run(self, graph: Graph) -> Outcome:
        """Choose and rewrite at every ``Attention``; see ``graph.metadata["cache"]``.

        Raises:
            InputError: the mode is unknown, or ``latent`` finds no smaller cut.
        """
        if self.mode not in MODES:
            raise InputError(f"unknown kv_cache mode {self.mode!r}", did_you_mean(self.mode, MODES))
        edit, shapes = Editor(graph), analyse(graph)
        layers: list[dict[str, Any]] = []
        nodes = [n for n in graph.nodes() if n.op_type == "Attention" and not n.domain]
        for node in nodes if graph.state else []:
            layer = {"layer": _place(node)}
            try:
                paths = token_paths(graph, edit, node, shapes)
                layers.append(layer | self._choose(graph, edit, paths))
            except NotTokenWiseError as error:
                layers.append(layer | {"form": "as exported", "reason": str(error)})
        remove_unused(graph)
        if self.mode == "latent":
            _require_latent(layers)
        return self._outcome(graph, layers)

    def _choose(self, graph: Graph, edit: Editor, paths: TokenPaths) -> dict[str, Any]:
        balance = machine_balance(self.descriptor, paths.key.dtype)
        options = self._options(paths, balance)
        exported = sum(paths.bytes(v) for v in {a.new: None for a in paths.appends.values()})
        chosen, found = _pick(paths, options, fewest=self.mode == "latent")
        changed = not (chosen.form == "expanded" and _is_expanded(paths))
        names = [a.state.name for a in paths.appends.values()]
        if changed:
            rewrite = Rewrite(graph, edit, paths)
            if found is not None:
                rewrite.absorb(found)
            elif chosen.form == "recomputed":
                rewrite.recompute(chosen)
            else:
                rewrite.expand()
            swap_states(graph, edit, rewrite.removed, rewrite.carried)
            names = [new.state.name for new in rewrite.carried]
        return {
            "form": chosen.form,
            "changed": changed,
            "states": names,
            "bytes_exported": exported,
            "bytes": chosen.bytes,
            "bytes_expanded": options[0].bytes,
            "price": round(chosen.price),
            "cut": [_described(paths, v) for v in chosen.cut],
            "alternatives": [_option_json(o) for o in options if o is not chosen],
            "balance": round(balance, 2),
        }

    def _options(self, paths: TokenPaths, balance: float) -> list[Option]:
        """Ways to carry that the mode allows, the simplest first."""
        plain = expanded(paths, balance)
        if self.mode == "expanded":
            return [plain]
        fewest = self.mode == "latent"
        again = recomputed(paths, balance, fewest=fewest)
        others = [absorbed(paths, balance, fewest=fewest), again]
        return [plain, *(o for o in others if set(o.cut) != set(plain.cut))]

    def _outcome(self, graph: Graph, layers: list[dict[str, Any]]) -> Outcome:
        if not layers:
            return Outcome(0)
        graph.metadata["cache"] = {"mode": self.mode, "layers": layers}
        forms = [layer["form"] for layer in layers]
        details: dict[str, Any] = {form: forms.count(form) for form in dict.fromkeys(forms)}
        known = [layer for layer in layers if "bytes" in layer]
        if known:
            before, after, plain = (
                sum(layer[key] for layer in known)
                for key in ("bytes_exported", "bytes", "bytes_expanded")
            )
            details["bytes per token"] = f"{before:,} exported, {after:,} carried"
            details["as keys and values"] = f"{plain:,}"
            cuts = {" + ".join(c.get("op", "input") for c in layer["cut"]) for layer in known}
            details["cut after"] = " or ".join(sorted(cuts))
        return Outcome(sum(layer.get("changed", False) for layer in layers), details)


def _pick(
    paths: TokenPaths, options: Iterable[Option], *, fewest: bool
) -> tuple[Option, Absorption | None]:
    """The best option that can be built, and how its maps are absorbed if it is latent."""

    def rank(option: Option) -> tuple[float, ...]:
        price = round(option.price, 3)
        return (option.bytes, price) if fewest else (price,)

    for option in sorted(options, key=rank):
        if option.form != "latent":
            return option, None
        found = absorption(paths, option.cut)
        if found is not None:
            return option, found
    raise AssertionError("carrying keys and values is always possible")


def _is_expanded(paths: TokenPaths) -> bool:
    """Whether the op carries its keys and values already."""
    new = [a.new for a in paths.appends.values()]
    return len(paths.node.inputs) > 5 and new == [paths.key, paths.value]


def _require_latent(layers: list[dict[str, Any]]) -> None:
    """Raise unless some layer carries fewer bytes than its keys and values."""
    smallest = ""
    for layer in layers:
        if "bytes" in layer and layer["bytes"] < layer["bytes_expanded"]:
            return
        cut = " + ".join(f"{c['value']!r}" for c in layer.get("cut", []))
        if cut and not smallest:
            smallest = f"; at {layer['layer']} the smallest is {cut}, {layer['bytes']} bytes"
    raise InputError(
        f"kv_cache='latent' finds no cut that carries less than the keys and values{smallest}",
        "use kv_cache='auto'",
    )


def _place(node: ir.Node) -> str:
    return node.metadata_props.get(SCOPE_KEY) or node.name or "attention"


def _described(paths: TokenPaths, value: ir.Value) -> dict[str, Any]:
    maker = value.producer()
    found = {"value": value.name, "bytes": paths.bytes(value)}
    if maker is not None:
        found["op"] = maker.op_type
        if SCOPE_KEY in maker.metadata_props:
            found["scope"] = maker.metadata_props[SCOPE_KEY]
    return found


def _option_json(option: Option) -> dict[str, Any]:
    return {
        "form": option.form,
        "bytes": option.bytes,
        "price": round(option.price),
        "cut": [v.name for v in option.cut],
    }
