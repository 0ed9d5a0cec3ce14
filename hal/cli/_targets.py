"""``hal targets list|show|validate|setup|new|schema``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hal.cli._options import Json
from hal.cli._output import (
    format_bytes,
    print_facts,
    print_json,
    print_line,
    print_table,
    progress,
)

if TYPE_CHECKING:
    from hal.descriptor import Descriptor, Quantity
    from hal.targets import BackendInfo, ResolvedTarget

_PROBE_SECONDS = 30.0
"""What a backend of another package may take to say whether it can run here."""

Name = Annotated[
    str, typer.Argument(metavar="TARGET", help="A name, NAME:ROUTE, or the path of a .toml file.")
]


def create() -> typer.Typer:
    """The group of commands about targets."""
    app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.callback(epilog="Example: hal targets show host")(_group)
    app.command("list", epilog="Example: hal targets list --probe")(list_command)
    app.command("show", epilog="Example: hal targets show x86-64-v4 --json")(show_command)
    app.command("validate", epilog="Example: hal targets validate my-chip.toml")(validate_command)
    app.command("setup", epilog="Example: hal targets setup my-chip")(setup_command)
    app.command("new", epilog="Example: hal targets new my-chip --vendor Acme")(new_command)
    app.command("schema", epilog="Example: hal targets schema > descriptor.schema.json")(
        schema_command
    )
    return app


def _group() -> None:
    """List, show and check target descriptors."""


def list_command(
    probe: Annotated[
        bool, typer.Option("--probe", help="Also ask each backend whether it can run here.")
    ] = False,
    json: Json = False,
) -> None:
    """List every target that can be found, and what is wrong with those that cannot be used."""
    from hal.targets import list_backends, list_targets

    infos = list_targets()
    backends = list_backends(_asked_apart) if probe else []
    if json:
        print_json(
            {
                "targets": [vars(info) for info in infos],
                "backends": [vars(backend) for backend in backends],
            }
        )
        return
    print_table(
        "",
        ("target", "kind", "routes", "from", "description"),
        [
            (i.name, i.kind, ", ".join(i.routes), i.origin, i.description)
            for i in infos
            if not i.problem
        ],
    )
    for info in infos:
        if info.problem:
            print_line(f"cannot be used: {info.name} ({info.origin}): {info.problem}")
    if backends:
        print_table(
            "backends",
            ("backend", "status", "from", "reason"),
            [(b.name, b.status, b.origin, b.reason) for b in backends],
        )


def _asked_apart(ask: Callable[[], BackendInfo], blamed: str) -> BackendInfo:
    from hal.targets import guarded

    return guarded(lambda _: ask(), blamed, _PROBE_SECONDS)


def show_command(target: Name, json: Json = False) -> None:
    """Show a target's complete descriptor, every figure with its source, and what looks wrong."""
    from hal.targets import resolve
    from hal.targets.doubts import doubts

    found = resolve(target)
    warnings = doubts(found.descriptor)
    if json:
        described = found.descriptor.to_dict()
        print_json({"target": found.name, "descriptor": described, "warnings": warnings})
        return
    _print_descriptor(found.descriptor)
    for warning in warnings:
        print_line(f"warning: {warning}")


def validate_command(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Descriptor files (TOML).")
    ],
    json: Json = False,
) -> None:
    """Check descriptor files against the schema, parents and routes included.

    Figures that are possible and look like another one (a link's bandwidth as that of memory, a
    sparse rate as a dense one) are only warned of.
    """
    from hal.targets import Registry, check_routes
    from hal.targets.doubts import doubts

    registry = Registry.discover()
    found: list[tuple[Path, str, list[str]]] = []
    for file in files:
        described = registry.from_file(file)
        check_routes(described, str(file))
        found.append((file, described.name, doubts(described)))
    if json:
        print_json({"valid": [{"file": str(f), "name": n, "warnings": w} for f, n, w in found]})
        return
    for file, name, warnings in found:
        print_line(f"{file}: ok, describes {name!r}")
        for warning in warnings:
            print_line(f"warning: {file}: {warning}")


def setup_command(
    targets: Annotated[
        list[str], typer.Argument(metavar="TARGET...", help="Names, NAME:ROUTE, or .toml files.")
    ],
    json: Json = False,
) -> None:
    """Install the vendor's software that targets need, each into an environment of its own."""
    from hal.targets import load_backend, resolve

    done = []
    for found in [stage for name in targets for stage in _stages(resolve(name))]:
        backend = load_backend(found.backend)
        with progress(quiet=json) as say:
            place = backend.setup(found.descriptor, say)
        probe = backend.probe()
        absent = probe.reason if probe.status == "absent" else backend.cannot_run(found.descriptor)
        package = getattr(found.route, "package", None) if place is None else None
        facts = {"environment": place, "package": package, "cannot_run": absent or None}
        done.append({"target": found.name, **facts})
        if not json:
            print_line(f"{found.name}: {_setup_text(place, package)}{absent and f', but {absent}'}")
    if json:
        print_json({"targets": done})


def _stages(found: ResolvedTarget) -> tuple[ResolvedTarget, ...]:
    return found.stages or (found,)


def _setup_text(place: Path | None, package: str | None) -> str:
    if package is not None:
        return f"runs with its vendor's runtime, which is yours to install: pip install {package}"
    return f"ready in {place}" if place else "needs nothing"


def new_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new target.")],
    vendor: Annotated[str, typer.Option("--vendor", help="Who makes it.")],
    route: Annotated[
        str, typer.Option("--route", help="custom (a backend of its own), onnxruntime or tvm.")
    ] = "custom",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where; default: hal-NAME."),
    ] = None,
    json: Json = False,
) -> None:
    """Write a package that makes a chip known, with tests, to begin with."""
    from hal.targets.new_package import write_package

    folder = output or Path(f"hal-{name}")
    written = write_package(name, vendor, route, folder)
    if json:
        print_json({"folder": str(folder), "files": [str(path) for path in written]})
        return
    print_table("", ("written",), [(str(path),) for path in written])
    print_line(f"next: pip install -e {folder} && hal conformance {name} --op MatMul,Relu")


def schema_command(
    json: Annotated[
        bool, typer.Option("--json", help="Accepted for uniformity: the output is JSON anyway.")
    ] = False,
) -> None:
    """Print the JSON Schema of descriptors."""
    from hal.descriptor import json_schema

    print_json(json_schema())


def _print_descriptor(described: Descriptor) -> None:
    print_facts(
        f"{described.name}: {described.description}",
        [
            ("kind", described.kind),
            ("vendor", described.vendor),
            ("family", described.family),
            ("extends", described.extends),
            ("cores", described.cores),
            ("clock", described.clock and f"{described.clock.value:g} {described.clock.unit}"),
            ("vector", _vector_text(described)),
            ("features", ", ".join(described.features)),
            ("int64", described.behaviour.int64),
            ("dynamic shapes", "yes" if described.behaviour.dynamic_shapes else "no"),
            ("dtypes", ", ".join(f"{k} {v}" for k, v in described.behaviour.dtypes.items())),
            ("notes", " ".join(described.notes)),
        ],
    )
    _print_figures(described)
    offered = [(i.does, i.lanes, i.k, " ".join(i.types), i.llvm or "") for i in described.offered()]
    if offered:
        print_table("instructions", ("does", "lanes", "k", "types", "llvm"), offered)
    routes = [
        (name, route.backend, _route_text(route.model_dump(mode="json")))
        for name, route in described.routes.items()
    ]
    print_table("routes", ("route", "backend", "options"), routes)


def _print_figures(described: Descriptor) -> None:
    rows: list[tuple[str, ...]] = []
    for level in described.memory:
        rows.append(_figure_row(f"{level.level} capacity", level.capacity))
        rows.append(_figure_row(f"{level.level} bandwidth", level.bandwidth))
    rows += [_figure_row(f"peak {dtype}", figure) for dtype, figure in described.peaks.items()]
    for table, label in ((described.power, "power"), (described.price, "price")):
        rows += [_figure_row(f"{label} {name}", figure) for name, figure in table if figure]
    if rows:
        print_table("figures", ("what", "value", "basis", "confidence", "source"), rows)


def _figure_row(label: str, figure: Quantity | None) -> tuple[str, ...]:
    if figure is None:
        return label, "unknown", "", "", ""
    value = f"{figure.value:g} {figure.unit}"
    if figure.unit == "B":
        value = format_bytes(figure.value)
    others = "".join(f"; {o.value:g} {o.unit}: {o.source}" for o in figure.alternatives)
    return label, value, figure.basis or "", figure.confidence, figure.source + others


def _vector_text(described: Descriptor) -> str:
    vector = described.vector
    if not vector.bits:
        return ""
    registers = f", {vector.registers} registers" if vector.registers else ""
    return f"{vector.bits} bits{registers}"


def _route_text(options: dict[str, Any]) -> str:
    shown = {k: v for k, v in options.items() if k != "backend" and v not in (None, {}, [])}
    return ", ".join(f"{name} = {value}" for name, value in shown.items())
