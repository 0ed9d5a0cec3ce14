"""Options that several commands share, and the small languages of ``--input`` and ``--dynamic``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hal.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from hal.bundle import Bundle


def path_of(text: str) -> Path:
    """A path on the command line; an empty one would mean this folder.

    Raises:
        BadParameter: it is empty.
    """
    if not text:
        raise typer.BadParameter("the path is empty")
    return Path(text)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
BundlePath = Annotated[
    Path,
    typer.Argument(metavar="BUNDLE", help="A bundle: a .hal file or a folder.", parser=path_of),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target", "-t", metavar="NAME[:ROUTE]", help="Which build; default: the best one here."
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", "-t", metavar="NAME[:ROUTE]", help="A target, for example host:tvm; repeatable."
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT.hal",
        help="One file if it ends in .hal, else a folder.",
        parser=path_of,
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads; default: all usable cores.")
]
Limit = Annotated[
    float | None,
    typer.Option(
        "--limit",
        min=0.1,
        metavar="SECONDS",
        help="Give up after this long; for software of vendors that hangs.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of random inputs.")]
Dims = Annotated[
    list[str] | None,
    typer.Option(
        "--dim", metavar="NAME=N", help="Extent of a dynamic dim in random inputs; repeatable."
    ),
]

_DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
)


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """``--input name:dtype:dims``: dims are extents, or symbols for dynamic ones."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


def parse_input(text: str) -> InputSpec:
    """Read ``x:float32:batch,3,224,224`` (or ``1x3x224x224``).

    Raises:
        InputError: it does not read so.
    """
    hint = "write name:dtype:dims, for example x:float32:1,3,224,224 or ids:int64:batch,sequence"
    # From the right: a name may contain colons, as exported names do.
    parts = text.rsplit(":", 2)
    if len(parts) != 3 or not parts[0]:
        raise InputError(f"--input {text!r} is not name:dtype:dims", hint)
    name, dtype, dims = parts
    if dtype not in _DTYPES:
        raise InputError(f"--input {text!r}: unknown dtype {dtype!r}", did_you_mean(dtype, _DTYPES))
    separator = "x" if re.fullmatch(r"\d+(x\d+)+", dims) else ","
    found: list[int | str] = []
    for part in dims.split(separator) if dims else []:
        if part.isdecimal():
            found.append(int(part))
        elif part.isidentifier():
            found.append(part)
        else:
            raise InputError(f"--input {text!r}: {part!r} is neither an extent nor a symbol", hint)
    return InputSpec(name, dtype, tuple(found))


def parse_dynamic(texts: Iterable[str]) -> dict[str, dict[int, str]]:
    """Read ``name:axis=symbol`` options into ``{"name": {axis: "symbol"}}``.

    Raises:
        InputError: one does not read so.
    """
    dynamic: dict[str, dict[int, str]] = {}
    for text in texts:
        found = re.fullmatch(r"(.+):(\d+)=([A-Za-z_]\w*)", text)
        if found is None:
            raise InputError(
                f"--dynamic {text!r} is not name:axis=symbol", "for example --dynamic x:0=batch"
            )
        dynamic.setdefault(found[1], {})[int(found[2])] = found[3]
    return dynamic


def parse_dims(texts: Iterable[str]) -> dict[str, int]:
    """Read ``name=extent`` options.

    Raises:
        InputError: one does not read so.
    """
    extents: dict[str, int] = {}
    for text in texts:
        name, _, extent = text.partition("=")
        if not name or not extent.isdecimal() or int(extent) < 1:
            raise InputError(f"--dim {text!r} is not name=extent", "for example --dim batch=4")
        if extents.get(name, int(extent)) != int(extent):
            raise InputError(
                f"--dim {name} is given twice, {extents[name]} and {extent}", "give one"
            )
        extents[name] = int(extent)
    return extents


def example_inputs(specs: Iterable[InputSpec], seed: int = 0) -> dict[str, Any]:
    """Random arrays for ``--input`` options, by name."""
    from hal.ir import TensorSpec
    from hal.runtime.samples import sample_inputs

    return sample_inputs([TensorSpec(s.name, s.dtype, s.dims) for s in specs], seed=seed)


def dynamic_of(specs: Iterable[InputSpec]) -> dict[str, dict[int, str]]:
    """The symbols that ``--input`` options name."""
    named = {
        s.name: {axis: dim for axis, dim in enumerate(s.dims) if isinstance(dim, str)}
        for s in specs
    }
    return {name: axes for name, axes in named.items() if axes}


def open_bundle(path: Path) -> Bundle:
    """Load a bundle, digests checked.

    Raises:
        BundleError: see :func:`hal.load`.
    """
    import hal

    return hal.load(path)


def survived(
    bundle: Bundle, target: str | None, work: Callable[[], None], limit: float | None = None
) -> None:
    """Do ``work``; in a process of its own if software of others has a part in the builds.

    ``target`` as the command was given it: then only its build counts.

    Raises:
        TargetError: that software ended the process, or raised what is no error of hal; or the
            work took longer than ``limit`` seconds.
    """
    from hal.runtime.opening import find_build
    from hal.targets import foreign_names, guarded

    builds = bundle.manifest.builds
    name = None if target is None else find_build(target, builds)
    chosen = list(builds.values()) if name is None else [builds[name]]
    others = foreign_names(
        str(each) for r in chosen for each in (r.backend, *(s["backend"] for s in r.segments))
    )
    if others or limit is not None:
        guarded(lambda _: work(), " or ".join(others) or "the run", limit, theirs=bool(others))
    else:
        work()


def check_page(option: str, file: Path) -> None:
    """Refuse a place for a page that is another file, or in no folder.

    Raises:
        InputError: it is.
    """
    if not file.parent.is_dir():
        raise InputError(f"{option} {file}: there is no such folder", "make it first")
    if file.is_dir():
        raise InputError(f"{option} {file} is a folder", "name a file")
    if file.exists() and file.stat().st_size:
        with file.open("rb") as opened:
            if not opened.read(15).lower().startswith(b"<!doctype html"):
                raise InputError(
                    f"{option} {file} exists and is no page", "name another file, or remove it"
                )


def is_bundle(path: Path) -> bool:
    """Whether ``path`` is meant as a bundle rather than as a model."""
    return path.suffix == ".hal" or (path / "manifest.json").is_file()
