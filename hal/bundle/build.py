"""Build one target into a bundle folder: legalize, claim, plan, compile each segment.

Finished builds are kept in a content-addressed cache: the same graph and weights, descriptor, route
and toolchain give the same files, so a second compile copies them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

import hal
from hal.bundle.manifest import BuildRecord, FileRecord
from hal.descriptor import Descriptor
from hal.errors import BuildError, TargetError, UnsupportedError
from hal.ir import Graph, used_values
from hal.ir.cache_plan import FIXED_KEY, PLAN_KEY
from hal.ir.inline import infer_types
from hal.ir.picks import PICK
from hal.ir.step import STEP_KEY
from hal.runtime.cache import cache_folder, entry_writer
from hal.targets import (
    ResolvedTarget,
    backend_digest,
    blamed,
    blaming,
    code_digest,
    is_foreign,
    load_backend,
    partition,
    resolve,
)
from hal.targets.backend import Backend, BuildContext
from hal.targets.detect import HOST

FALLBACK_BACKEND = "onnxruntime"
"""Runs what a target's own backend refuses; it is a core dependency, so it is always there."""

CACHED_BYTES = 1 << 30
"""Builds larger than this are not kept in the cache."""


def build_folder(target: str) -> str:
    """Folder of a target's build, relative to the bundle (``host:tvm`` → ``builds/host.tvm``)."""
    return "builds/" + target.replace(":", ".")


def build_target(
    root: Path,
    graph: Graph,
    target: ResolvedTarget,
    *,
    fallback: bool = True,
    digests: dict[str, FileRecord] | None = None,
    cache: bool = True,
) -> BuildRecord:
    """Compile ``graph`` for ``target`` into ``root/builds/<target>``.

    Args:
        root: bundle folder being written; holds the weights that ``graph`` refers to.
        graph: the neutral graph, its growing state lowered to pools or not; large weights are
            external tensors relative to ``root``.
        target: what to build for.
        fallback: give refused nodes to the host runtime; otherwise a refusal is an error.
        digests: records of ``graph.onnx`` and the weight files; without them the cache is not used.
        cache: use and fill the build cache.

    Raises:
        TargetError: the backend cannot run here.
        UnsupportedError: nodes that nothing covers.
    """
    if target.stages:
        return _build_stages(root, graph, target, fallback)
    backend = load_backend(target.backend)
    toolchain = _toolchain(target, backend)
    folder = root / build_folder(target.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    entry = None
    if cache and digests:
        # A cache that cannot be written is no reason to fail.
        with contextlib.suppress(OSError):
            entry = cache_folder("builds") / _key(graph, target, toolchain, fallback, digests)
        if entry is not None and (entry / "record.json").exists():
            return _from_cache(entry, folder)
    folder.mkdir()
    record = _build(root, folder, graph, target, backend, toolchain, fallback)
    if entry is not None and _size(folder) <= CACHED_BYTES:
        with contextlib.suppress(OSError), entry_writer(entry) as temporary:
            shutil.copytree(folder, temporary / "files")
            (temporary / "record.json").write_text(record.model_dump_json())
    return record


_PROCESSOR = "cpu"
"""By it the host runs what a chip refuses, where the chip's own routes say another."""


def _require_room(graph: Graph, plan: partition.Plan, name: str, target: ResolvedTarget) -> None:
    """Refuse a model whose weights on the chip are larger than its memory.

    What the chip refuses and the host runs does not count. This machine is no such chip: it maps
    weights from files, and reads what fits no memory again.

    Raises:
        UnsupportedError: they are; by how much, and what would help.
    """
    room = target.descriptor.memory_capacity()
    if room is None or target.descriptor.name == HOST:
        return
    own = (node for s in plan.segments if s.backend == name for node in s.nodes)
    weights = {v for node in own for v in used_values(node) if v.const_value is not None}
    held = sum(v.const_value.nbytes for v in weights if v.const_value is not None)
    size = min(graph.weight_bytes(), held)
    if size > room:
        raise UnsupportedError(
            f"the model does not fit {target.name}: its weights take {size / 2**20:.2f} MiB, the"
            f" memory holds {room / 2**20:.2f}, {(size - room) / 2**20:.2f} MiB too little",
            f"quantize it (--quantize), or split it over several: --target {target.name}+host",
        )


def _toolchain(target: ResolvedTarget, backend: Backend) -> dict[str, str]:
    """Versions of everything that has a part in a build.

    Raises:
        TargetError: the backend cannot run here.
    """
    probe = backend.probe()
    if probe.status == "absent":
        raise TargetError(
            f"target {target.name!r} cannot be built here: {probe.reason}", _hint(backend)
        )
    toolchain = {"hal": hal.__version__, "code": code_digest(), **probe.versions}
    if theirs := backend_digest(backend):
        toolchain["backend_code"] = theirs
    return toolchain


def _build_stages(root: Path, graph: Graph, target: ResolvedTarget, fallback: bool) -> BuildRecord:
    """Build a model for several chips that run one after the other, as much on each as fits."""
    folder = root / build_folder(target.name)
    folder.mkdir(parents=True)
    names = [stage.name for stage in target.stages]
    rooms = [stage.descriptor.memory_capacity() for stage in target.stages]
    graph = graph.clone()
    infer_types(graph.model)  # whatever crosses a cut is an input
    parts = partition.stages(graph, names, rooms)
    records = []
    for index, part in enumerate(parts):
        stage = next(s for s in target.stages if s.name == part.backend)
        backend = load_backend(stage.backend)
        alone = partition.extract(graph, part, f"{graph.name}_{index}")
        place = folder / f"stage{index}"
        place.mkdir()
        toolchain = _toolchain(stage, backend)
        record = _build(root, place, alone, stage, backend, toolchain, fallback)
        for segment in record.segments:
            segment["target"] = stage.name
            segment.setdefault("descriptor", record.descriptor)
        records.append(record)
    return _joined(graph, target, parts, records)


def _joined(
    graph: Graph,
    target: ResolvedTarget,
    parts: Sequence[partition.Segment],
    records: Sequence[BuildRecord],
) -> BuildRecord:
    """One record of the builds of a model's stages."""
    total = graph.node_count()
    first, cache = records[0], graph.metadata.get(PLAN_KEY)
    fixed = any((r.cache or {}).get("fixed") for r in records)
    assigned: Counter[str] = Counter()
    for part in parts:
        assigned[part.backend] += len(part.nodes)
    placement = {
        "backend": target.name,
        "nodes": total,
        "assigned": dict(assigned),
        "summary": ", ".join(f"{n} of {total} nodes on {name}" for name, n in assigned.items()),
        "segments": sum(r.placement["segments"] for r in records),
        "moved_bytes": partition.moved_bytes(parts)
        + sum(r.placement["moved_bytes"] for r in records),
        "refused": [refusal for r in records for refusal in r.placement["refused"]],
        "stages": [{"target": r.target, **r.placement} for r in records],
    }
    return BuildRecord(
        target=target.name,
        route=first.route,
        backend=first.backend,
        folder=build_folder(target.name),
        descriptor=first.descriptor,
        segments=[segment for r in records for segment in r.segments],
        placement=placement,
        toolchain={key: value for r in records for key, value in r.toolchain.items()},
        cache=None if cache is None else {**cache, "fixed": fixed or cache["fixed"]},
        picks=_picks(graph),
        step=graph.metadata.get(STEP_KEY),
    )


def _build(
    root: Path,
    folder: Path,
    graph: Graph,
    target: ResolvedTarget,
    backend: Backend,
    toolchain: dict[str, str],
    fallback: bool,
) -> BuildRecord:
    with blaming(backend, "legalizing"):
        legal = backend.legalize(graph.clone(), target.descriptor)
    # As initializers, constants are copied into every segment that uses them.
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(legal.model)
    with blaming(backend, "asked for its nodes"):
        verdicts = {n: backend.supports(n, target.descriptor) for n in legal.graph}
    other = FALLBACK_BACKEND if fallback and backend.name != FALLBACK_BACKEND else None
    processor = target.descriptor
    if other in processor.routes:  # the chip's own use of that runtime, not the host's
        processor = resolve(_PROCESSOR).descriptor
    plan = partition.plan(
        legal,
        backend.name,
        verdicts,
        other,
        movable=_runs_on(other, processor),
        move_cost=target.descriptor.move_cost(),
    )
    _require_room(graph, plan, backend.name, target)
    segments: list[dict[str, Any]] = []
    fixed = bool(legal.metadata.get(FIXED_KEY))
    for index, segment in enumerate(plan.segments):
        owner = backend if segment.backend == backend.name else load_backend(segment.backend)
        part = (
            legal
            if len(plan.segments) == 1
            else partition.extract(legal, segment, f"{graph.name}_{index}")
        )
        chip = target.descriptor if owner is backend else processor
        if owner is not backend:
            part = owner.legalize(part, chip)
            refused = [
                (n, verdict.reason)
                for n in part.graph
                if not (verdict := owner.supports(n, chip)).claimed
            ]
            partition.require_all(refused, f"{backend.name} or {owner.name}")
        fixed |= bool(part.metadata.get(FIXED_KEY))
        place = folder / f"{index:02d}-{owner.name}"
        place.mkdir()
        try:
            with blaming(owner, "building"):
                built = owner.build(part, BuildContext(chip, place, root))
        except UnsupportedError as error:
            who = f"{blamed(owner.name)} claimed what it cannot build: "
            message = f"{who if is_foreign(owner) else ''}{error.message}"
            raise BuildError(message, error.hint) from error
        segments.append(
            {
                "backend": owner.name,
                "folder": place.relative_to(root).as_posix(),
                "inputs": [v.name for v in part.graph.inputs],
                "outputs": [v.name for v in part.graph.outputs],
                "record": built,
                **({} if chip is target.descriptor else {"descriptor": chip.to_dict()}),
            }
        )
    cache = graph.metadata.get(PLAN_KEY)
    return BuildRecord(
        target=target.name,
        route=target.route_name,
        backend=target.backend,
        folder=build_folder(target.name),
        descriptor=target.descriptor.to_dict(),
        segments=segments,
        placement=plan.placement(),
        toolchain=toolchain,
        cache=None if cache is None else {**cache, "fixed": fixed or cache["fixed"]},
        picks=_picks(graph),
        step=graph.metadata.get(STEP_KEY),
    )


def _runs_on(name: str | None, descriptor: Descriptor) -> Callable[[ir.Node], bool]:
    """Whether that backend has a node as it is: what a backend made for itself is no other's."""
    if name is None:
        return lambda _: False
    other = load_backend(name)
    return lambda node: not node.domain and other.supports(node, descriptor).claimed


def _picks(graph: Graph) -> bool:
    """Whether the graph computes logits at positions that it is given."""
    return any(v.name == PICK for v in graph.graph.inputs)


def _key(
    graph: Graph,
    target: ResolvedTarget,
    toolchain: dict[str, str],
    fallback: bool,
    digests: dict[str, FileRecord],
) -> str:
    facts = {
        "target": target.name,
        "route": target.route_name,
        "descriptor": target.descriptor.digest(),
        "toolchain": toolchain,
        "fallback": fallback,
        "cache": graph.metadata.get(PLAN_KEY),
        "picks": _picks(graph),
        "step": graph.metadata.get(STEP_KEY),
        "inputs": {name: record.sha256 for name, record in sorted(digests.items())},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _from_cache(entry: Path, folder: Path) -> BuildRecord:
    # Not copytree: it gathers errors, and a full disk should be told as one.
    for path in sorted((entry / "files").rglob("*")):
        goal = folder / path.relative_to(entry / "files")
        goal.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            shutil.copyfile(path, goal)
    return BuildRecord.model_validate_json((entry / "record.json").read_text())


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _hint(backend: Backend) -> str:
    if is_foreign(backend):
        return f"ask the maker of {blamed(backend.name)}, or choose another target"
    return (
        f"install what the {backend.name} backend needs: pip install 'hal-compiler[{backend.name}]'"
    )
