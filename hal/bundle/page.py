"""A build as a static page for browsers, ``hal page``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.bundle.files import checked_path
from hal.bundle.manifest import BuildRecord
from hal.bundle.output import readable_os_errors
from hal.descriptor import parse
from hal.errors import InputError, TargetError, UnsupportedError
from hal.runtime.cache import scratch_folder
from hal.runtime.opening import find_build
from hal.runtime.samples import integer_range
from hal.targets import blaming, load_backend
from hal.targets.backend import LoadContext

if TYPE_CHECKING:
    from hal.bundle.bundle import Bundle


def write_page(bundle: Bundle, output: str | Path, target: str | None = None) -> dict[str, Any]:
    """See :meth:`hal.Bundle.page`."""
    builds = bundle.manifest.builds
    named = find_build(target, builds) if target else None
    if target and named is None:
        raise TargetError(
            f"the bundle has no build for {target!r}",
            f"it has {', '.join(builds) or 'none'}; make one: "
            f"hal retarget {bundle.path} --target {target} -o OTHER.hal",
        )
    goal = checked_path(output, "output")
    with readable_os_errors(goal):
        _require_place(goal)
        with scratch_folder(goal.parent, f".{goal.name}.tmp-") as scratch:
            folder = scratch / "page"
            used = _first(bundle, [named] if named else list(builds), folder)
            files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
            if goal.is_dir():
                _require_earlier(goal, files)
                goal.rename(scratch / "old")
            folder.rename(goal)
    return {"page": str(goal), "target": used, "files": files, "bytes": sum(files.values())}


def _require_place(goal: Path) -> None:
    if not goal.parent.is_dir():
        raise InputError(f"folder {goal.parent} does not exist", f"mkdir -p {goal.parent}")
    if goal.exists() and not goal.is_dir():
        raise InputError(f"{goal} exists and is not a folder", "choose another output name")


def _require_earlier(goal: Path, files: Mapping[str, int]) -> None:
    """Refuse to replace a folder of which anything would be lost."""
    others = sorted(p.name for p in goal.iterdir() if p.name not in files or not p.is_file())
    if others:
        raise InputError(
            f"{goal} holds {others[0]!r}, which is of no page", "choose another output name"
        )


def _first(bundle: Bundle, names: list[str], folder: Path) -> str:
    """Write the first build that can be a page, and say which."""
    reasons: dict[str, UnsupportedError] = {}
    for name in names:
        folder.mkdir()
        try:
            _write(bundle, bundle.manifest.builds[name], folder)
        except UnsupportedError as error:
            reasons[name] = error
            folder.rmdir()
            continue
        return name
    if len(reasons) == 1:
        raise next(iter(reasons.values()))
    told = "; ".join(f"{name}: {error.message}" for name, error in reasons.items())
    raise UnsupportedError(
        f"no build of the bundle is for a browser ({told or 'it has none'})",
        f"hal retarget {bundle.path} --target TARGET -o OTHER.hal; see docs/edge-developers.md",
    )


def _write(bundle: Bundle, record: BuildRecord, folder: Path) -> None:
    manifest = bundle.manifest
    _require_whole(record)
    if manifest.state:
        carried = manifest.state[0]["name"]
        raise UnsupportedError(
            f"the model carries {carried!r} from call to call, and a page does not",
            "choose a model without state",
        )
    (segment,) = record.segments
    descriptor = parse(record.descriptor, f"{bundle.path} ({record.target})")
    context = LoadContext(descriptor, segment["folder"], bundle.files)
    ranges = {
        spec.name: integer_range(spec.name, manifest.metadata)
        for spec in manifest.inputs
        if "int" in spec.dtype
    }
    backend = load_backend(segment["backend"])
    with blaming(backend, "writing a page"):
        backend.page(segment["record"], context, folder, manifest.name, ranges)


def _require_whole(record: BuildRecord) -> None:
    """Refuse a build of which a browser would have only a part."""
    if len(record.segments) == 1 and record.segments[0]["backend"] == record.backend:
        return
    placement = record.placement
    refused = [_refusal(entry) for entry in placement.get("refused", [])]
    reasons = "; ".join(refused) or str(placement.get("summary", ""))
    raise UnsupportedError(
        f"the build {record.target!r} leaves nodes to the host, which a page has not: {reasons}",
        "rewrite these nodes in the model, or choose another target",
    )


def _refusal(entry: Mapping[str, Any]) -> str:
    names = [name for name in entry["nodes"] if name]
    more = "" if entry["count"] == len(entry["nodes"]) else ", …"
    where = f" ({', '.join(map(repr, names))}{more})" if names else ""
    return f"{entry['count']} × {entry['op']}{where}: {entry['reason']}"
