"""``hal inspect``: what is in a model or a bundle."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hal.cli._options import Json, Target, check_page, is_bundle, open_bundle
from hal.cli._output import format_bytes, print_facts, print_json, print_line, print_table
from hal.cli._report import (
    build_json,
    print_builds,
    print_passes,
    print_quantization,
    print_signature,
)
from hal.errors import InputError, TargetError, did_you_mean

if TYPE_CHECKING:
    from hal.bundle.manifest import BuildRecord
    from hal.ir import Graph

EXAMPLE = "Example: hal inspect my-model.hal --json"


def inspect_command(
    path: Annotated[
        str, typer.Argument(metavar="MODEL|BUNDLE", help="A model as for compile, or a bundle.")
    ],
    explain: Annotated[bool, typer.Option("--explain", help="Print the passes too.")] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Draw a build: what runs each node."),
    ] = None,
    target: Target = None,
    json: Json = False,
) -> None:
    """Show signature, state, ops, bytes, builds and placement."""
    if html is not None:
        _draw(Path(path), target, html)
        if not json:
            print_line(f"wrote {html}")
            return
    found = _bundle_facts(Path(path)) if is_bundle(Path(path)) else _model_facts(path)
    facts, builds = found
    if json:
        print_json(facts)
        return
    print_facts(
        path,
        [
            ("name", facts["name"]),
            ("task", facts["task"]),
            ("source", ", ".join(f"{k} {v}" for k, v in facts["source"].items())),
            ("nodes", facts["nodes"]),
            ("weights", format_bytes(facts["weight_bytes"])),
            (
                "state per token",
                format_bytes(facts["state_bytes_per_token"]) if facts["state"] else "",
            ),
        ],
    )
    for title in ("inputs", "outputs"):
        print_signature(title, [(s["name"], s["dtype"], s["dims"]) for s in facts[title]])
    _print_state(facts["state"])
    _print_cache(facts["cache"])
    print_quantization(facts["quantization"], each=True)
    print_table("ops of the neutral graph", ("op", "count"), facts["ops"].items())
    print_builds(builds, facts["quantization"])
    if explain and facts.get("passes"):
        print_passes(facts["passes"])


def _draw(path: Path, target: str | None, output: Path) -> None:
    """Write the page of a build of the bundle."""
    from hal.bundle.drawing import page
    from hal.runtime.opening import find_build

    if not is_bundle(path):
        raise InputError(f"{path} is no bundle, so nothing is placed", "compile it first")
    check_page("--html", output)
    bundle = open_bundle(path)
    builds = bundle.manifest.builds
    name = find_build(target, builds) if target else next(iter(builds), None)
    if name is None:
        raise TargetError(
            f"the bundle has no build for {target!r}", did_you_mean(target or "", builds)
        )
    output.write_text(page(bundle.graph(), builds[name]), encoding="utf-8")


def _bundle_facts(path: Path) -> tuple[dict[str, Any], dict[str, BuildRecord]]:
    bundle = open_bundle(path)
    manifest = bundle.manifest
    facts = _graph_facts(bundle.graph())
    facts |= {
        "name": manifest.name,
        "task": manifest.task,
        "source": manifest.source,
        "format": manifest.format,
        "producer": manifest.producer,
        "passes": manifest.passes,
        "files": {name: record.size for name, record in manifest.files.items()},
        "builds": {name: build_json(record) for name, record in manifest.builds.items()},
    }
    return facts, manifest.builds


def _model_facts(model: str) -> tuple[dict[str, Any], dict[str, BuildRecord]]:
    from hal import frontends

    loaded = frontends.load(model)
    facts = _graph_facts(loaded.graph)
    return facts | {"source": {"model": loaded.source}}, {}


def _graph_facts(graph: Graph) -> dict[str, Any]:
    signature, specs = graph.signature(), graph.input_specs()
    ops = collections.Counter(
        f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in graph.nodes()
    )
    state = [
        {**s.to_json(), "dtype": specs[s.input].dtype, "dims": list(specs[s.input].dims or ())}
        for s in graph.state
    ]
    return {
        "name": graph.name,
        "task": str(graph.metadata.get("task", "generic")),
        "source": {},
        "nodes": graph.node_count(),
        "weight_bytes": graph.weight_bytes(),
        "inputs": [_spec_json(s) for s in signature.inputs],
        "outputs": [_spec_json(s) for s in signature.outputs],
        "state": state,
        "state_bytes_per_token": sum(_bytes_per_token(s) for s in state),
        "cache": graph.metadata.get("cache"),
        "quantization": graph.metadata.get("quantization"),
        "ops": dict(ops.most_common()),
    }


def _spec_json(spec: Any) -> dict[str, Any]:
    dims = None if spec.dims is None else list(spec.dims)
    return {"name": spec.name, "dtype": spec.dtype, "dims": dims}


def _bytes_per_token(state: dict[str, Any]) -> int:
    """Bytes that one position of one sequence adds; 0 for state that does not grow."""
    if state["growth_axis"] is None:
        return 0
    from hal.descriptor import dtype_bits

    elements = 1
    for axis, dim in enumerate(state["dims"]):
        if axis != state["growth_axis"] and isinstance(dim, int):
            elements *= dim
    return elements * dtype_bits(state["dtype"]) // 8


def _print_state(state: list[dict[str, Any]]) -> None:
    rows = [
        (
            s["name"],
            s["kind"],
            s["dtype"],
            "[" + ", ".join(map(str, s["dims"])) + "]",
            ", ".join(s["axes"]),
        )
        for s in state
    ]
    if rows:
        print_table("carried state", ("name", "kind", "dtype", "dims", "axes"), rows)


def _print_cache(cache: dict[str, Any] | None) -> None:
    """What each attention carries, what it was exported with, and what else was possible."""
    rows = collections.Counter(_cache_row(layer) for layer in (cache or {}).get("layers", []))
    if not rows:
        return
    print_table(
        "what is carried per token of one sequence",
        ("layers", "form", "exported", "carried", "cut after", "instead"),
        [(count, *row) for row, count in rows.items()],
    )


def _cache_row(layer: dict[str, Any]) -> tuple[str, ...]:
    """One attention as text; equal layers give equal rows."""
    if "bytes" not in layer:
        return layer["form"], "", "", layer.get("reason", ""), ""
    cut = " + ".join(f"{c.get('op', 'input')} {format_bytes(c['bytes'])}" for c in layer["cut"])
    others = ", ".join(
        f"{o['form']} {format_bytes(o['bytes'])} (price {o['price']:,})"
        for o in layer["alternatives"]
    )
    price = f"{format_bytes(layer['bytes'])} (price {layer['price']:,})"
    return layer["form"], format_bytes(layer["bytes_exported"]), price, cut, others
