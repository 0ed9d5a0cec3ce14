"""``hal.compile``: from any model to a bundle, in one direction and with no way back.

frontend → passes → bundle (graph, weights) → one build per target → verification. Everything is
written under a temporary name next to the output and renamed at the end: a whole bundle or none.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hal import frontends
from hal.bundle.build import build_target
from hal.bundle.bundle import Bundle, load_graph
from hal.bundle.files import BundleFiles, unpack
from hal.bundle.manifest import (
    GRAPH,
    FileRecord,
    Manifest,
    write_manifest,
)
from hal.bundle.output import bundle_writer
from hal.bundle.pieces import copy_assets, describe, not_neutral, write_graph, write_samples
from hal.errors import CheckFailed, HalError, InputError, TargetError
from hal.ir import Graph
from hal.ir.cache_plan import CachePlan
from hal.ir.step import Step, step_of
from hal.ir.verifier import verify as verify_graph
from hal.ir.weights import write_weights
from hal.passes import default_pipeline
from hal.passes.base import Pipeline
from hal.passes.cache_layout import CacheLayout
from hal.passes.fix_dims import fix_dims
from hal.passes.pick_positions import PickPositions
from hal.passes.static_step import StaticStep
from hal.quantization import Plan, beside, parse_request, quantize_graph, resumable
from hal.runtime import verification
from hal.runtime.arrays import check_inputs
from hal.runtime.cache_options import CacheOptions, parse_kv_cache
from hal.runtime.here import NOT_RUN, cannot_run
from hal.runtime.memory import give_back, given_back_when_freed
from hal.runtime.opening import find_build
from hal.runtime.saved_state import state_digest
from hal.runtime.session import Session
from hal.targets import ResolvedTarget, load_backend, require_usable, resolve
from hal.targets.backend import require_static

Progress = Callable[[str], None]
"""Called with a sentence when the compiler begins something that may take long."""

_Reference = verification.Reference | str
"""What builds are compared with, or a sentence saying why there is nothing."""


def compile(
    model: Any,
    inputs: Any = None,
    *,
    target: str | Sequence[str] = "host",
    output: str | Path | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    dims: Mapping[str, int] | None = None,
    quantize: str | Path | Plan | None = None,
    calibration: Any = None,
    accuracy_budget: str | None = None,
    size_budget: str | int | None = None,
    kv_cache: str = "auto",
    verify: bool = True,
    fallback: bool = True,
    progress: Progress | None = None,
) -> Bundle:
    """Compile a model for one or more targets.

    Args:
        model: a ``torch.nn.Module``, a ``torch.export.ExportedProgram``, or a path to an ``.onnx``
            file, a ``.pt2`` file or a Hugging Face directory; ``python:module:callable`` as text.
        inputs: example inputs of a module (a tensor, a tuple or a dictionary); also used to verify.
        target: target names such as ``host`` or ``host:tvm``.
        output: where the bundle goes: a name that ends in ``.hal`` makes one file, any other a
            directory; None keeps it in a temporary folder that goes with the returned object.
        dynamic: names for dynamic axes, ``{"x": {0: "batch"}}``.
        dims: extents for dynamic dims, ``{"batch": 1}``, for chips that take static shapes only. Of
            a model with carried state all of them: builds run steps of these extents, the neutral
            graph keeps its dims.
        quantize: how to store weights, as ``w4a16-g32:gptq, head=w8a16`` (see
            :func:`hal.passes.quantize.parse_recipe`), ``auto`` for what the first target prefers,
            or the path of a plan; None keeps the model's own. Builds are then verified against the
            quantized graph: what quantization changes is no error of a build.
        calibration: data that methods look at and budgets are measured on, a path or arrays (see
            :func:`hal.quantization.data.load_calibration`).
        accuracy_budget: bounds such as ``kl<=0.02`` or ``top1>=0.99``, which the fewest bytes are
            searched for.
        size_budget: bytes that all weights may take, ``300MB``.
        kv_cache: what a language model carries (``auto``, ``latent``, ``expanded``, or
            ``exported``: what its own code does) and how (``contiguous``, ``paged``, ``int8``,
            ``int4``); combined with commas. What to carry is priced for the first target.
        verify: run every build against the reference and fail beyond tolerance.
        fallback: give nodes that a target refuses to the host runtime.
        progress: called with a sentence before each long step.

    Returns:
        The bundle, opened.

    Raises:
        ModelError: the model cannot be read or exported.
        TargetError: a target is unknown or cannot be built here.
        UnsupportedError: an op that nothing covers.
        CheckFailed: a build is out of tolerance, or a budget is not met.
        InputError: an argument is wrong.
    """
    targets = check_options(target, None, kv_cache)
    request = parse_request(quantize, accuracy_budget, size_budget, calibration)
    options = parse_kv_cache(kv_cache)
    job = _Job(targets, verify, fallback, options, progress or (lambda _: None))
    with (
        given_back_when_freed(),
        bundle_writer(output) as (folder, finish),
        beside(folder) as waiting,
        resumable(model, calibration, request) as unfinished,
    ):
        job.say("reading the model")
        loaded = frontends.load(model, inputs, dynamic)
        source, assets, graph = loaded.source, loaded.assets, loaded.graph
        del loaded
        job = dataclasses.replace(job, step=step_of(graph, dims) if graph.state and dims else None)
        graph = graph if graph.state else fix_dims(graph, dims)
        _check_static(job, graph)
        verify_graph(graph)
        in_a_file = isinstance(model, (str, Path)) and not str(model).startswith("python:")
        samples = _user_samples(graph, inputs, strict=in_a_file)
        reference = None
        if request is None:
            reference = job.reference(lambda: _reference_for(graph, samples, job))
        job.say("running the passes")
        graph, reports = default_pipeline(targets[0].descriptor, options.carry).run(graph)
        _check_cache(graph, kv_cache, options)
        if request is not None:
            write_weights(graph, Path(waiting), keep_files=True)
            give_back()
            graph, more = quantize_graph(
                graph,
                request,
                targets[0].descriptor,
                targets=targets,
                tokenizer=assets.get("tokenizer.json"),
                folder=unfinished,
                say=job.say,
            )
            reports = [*reports, *more]
        job.say("writing the weights")
        graph, digests = write_graph(graph, folder)
        if request is not None:  # what was made of the weights lies in files by now
            give_back()
            reference = job.reference(lambda: _reference_for(graph, samples, job))
        manifest = describe(graph, {"model": source}, [r.to_json() for r in reports])
        if isinstance(reference, verification.Reference):
            manifest.samples = write_samples(folder, reference.inputs)
        copy_assets(assets, folder)
        if graph.state:
            manifest.state_digest = state_digest(graph)
        _build_all(job, folder, manifest, graph, digests, reference)
        return finish(folder)


def retarget(
    bundle: Bundle,
    target: str | Sequence[str],
    output: str | Path | None = None,
    *,
    dims: Mapping[str, int] | None = None,
    kv_cache: str | None = None,
    verify: bool = True,
    fallback: bool = True,
    progress: Progress | None = None,
) -> Bundle:
    """See :meth:`hal.Bundle.retarget`."""
    targets = check_options(target, None, "auto" if kv_cache is None else kv_cache)
    options = _layout_of(bundle) if kv_cache is None else parse_kv_cache(kv_cache)
    if options.carry != "auto":
        raise InputError(
            f"kv_cache={kv_cache!r}: what a bundle carries was decided when it was compiled",
            "give only how (contiguous, paged, int8, int4), or compile the model again",
        )
    job = _Job(targets, verify, fallback, options, progress or (lambda _: None))
    with bundle_writer(output) as (folder, finish):
        job.say("copying the neutral graph and weights")
        manifest = bundle.manifest.model_copy(deep=True)
        manifest.builds = {}
        unpack(bundle.files, folder, skip=not_neutral)
        known = {n: r for n, r in manifest.files.items() if not not_neutral(n)}
        graph = load_graph(BundleFiles.open(folder))
        if kv_cache is not None:
            _check_cache(graph, kv_cache, options)
        job = dataclasses.replace(job, step=_step_for(bundle, graph, targets, dims))
        _check_static(job, graph)
        reference = job.reference(lambda: _reference_of(bundle, graph, job.step))
        _build_all(job, folder, manifest, graph, known, reference)
        return finish(folder)


def verify(bundle: Bundle, target: str | None = None, *, against: Any = None) -> dict[str, Any]:
    """See :meth:`hal.Bundle.verify`."""
    names = list(bundle.targets)
    if target is not None:
        found = find_build(target, names)
        if found is None:
            raise TargetError(
                f"the bundle has no build for {target!r}",
                f"it has {', '.join(names) or 'no builds'}",
            )
        names = [found]
    graph, other = bundle.graph(), None
    if against is not None:
        other = frontends.load(against).graph
        _require_same_signature(graph, other)
    references: dict[Step | None, _Reference] = {}
    results: dict[str, Any] = {}
    for name in names:
        record = bundle.manifest.builds[name]
        if target is None and (why := cannot_run(record)):
            results[name] = {"passed": None, "reason": f"{NOT_RUN}: {why}"}
            continue
        step = Step(**record.step) if record.step else None
        if step not in references:
            references[step] = (
                _reference_of(bundle, graph, step)
                if other is None
                else verification.reference_for(other, step=step)
            )
        reference = references[step]
        if isinstance(reference, str):
            raise HalError(
                f"the bundle cannot be verified: {reference}", "verify with the original model"
            )
        try:
            results[name] = _verify_one(bundle, graph, reference, name)
        except CheckFailed as error:
            quantized = against is not None and "quantization" in graph.metadata
            raise (verification.quantized(error, against) if quantized else error) from None
    if results and not any(figures["passed"] for figures in results.values()):
        raise TargetError(
            f"nothing of the bundle runs here: {next(iter(results.values()))['reason']}",
            "retarget it: --target host; or run it where its chip is",
        )
    return results


# -- building ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Job:
    """What to build and how; the part that :func:`compile` and :func:`retarget` share."""

    targets: list[ResolvedTarget]
    verify: bool
    fallback: bool
    cache: CacheOptions
    say: Progress
    step: Step | None = None

    def reference(self, compute: Callable[[], _Reference]) -> _Reference | None:
        """What the builds are compared with; None if that was not asked for."""
        if not self.verify:
            return None
        self.say("computing the reference")
        return compute()


def _build_all(
    job: _Job,
    folder: Path,
    manifest: Manifest,
    graph: Graph,
    files: dict[str, FileRecord],
    reference: _Reference | None,
) -> None:
    """Build and verify every target, and write the manifest.

    ``files`` are the records of what is in ``folder`` already, ``graph.onnx`` and weights included.
    """
    digests = {n: r for n, r in files.items() if n == GRAPH or n.startswith("weights-")}
    lowered = _lowered(graph, job.cache, job.step)
    for target in job.targets:
        job.say(f"building for {target.name}")
        record = build_target(folder, lowered, target, fallback=job.fallback, digests=digests)
        manifest.builds[target.name] = record
    write_manifest(manifest, folder, files)
    if reference is not None:
        _verify_builds(job, folder, manifest, graph, reference)
        write_manifest(manifest, folder, manifest.files)


def _lowered(graph: Graph, options: CacheOptions, step: Step | None = None) -> Graph:
    """The graph as builds run it: growing state in pools, logits where they are asked for."""
    if not graph.state:
        return graph
    if step is not None:
        fixed = StaticStep(step, options.layout or "contiguous", options.bits or 0)
        return Pipeline("lowering", (fixed,)).run(graph)[0]
    layout = CacheLayout(options.layout or "contiguous", options.bits or 0)
    grows = any(state.growth_axis is not None for state in graph.state)
    passes = (PickPositions(), layout) if grows else (PickPositions(),)
    return Pipeline("lowering", passes).run(graph)[0]


def _check_static(job: _Job, graph: Graph) -> None:
    """Refuse dynamic dims that a target cannot have, before the long work.

    Raises:
        UnsupportedError: there are some; the text lists them.
    """
    for target in job.targets:
        for part in target.stages or (target,):
            if job.step is None and load_backend(part.backend).static_shapes(part.descriptor):
                require_static(graph, part.descriptor)


def _step_for(
    bundle: Bundle, graph: Graph, targets: Sequence[ResolvedTarget], dims: Mapping[str, int] | None
) -> Step | None:
    """The step of new builds: of the extents that are given, else as another build has it."""
    if dims:
        if not graph.state:
            raise InputError(
                "a model without carried state has its dims fixed when it is compiled",
                "compile it again with --dim",
            )
        return step_of(graph, dims)
    static = [t for t in targets if load_backend(t.backend).static_shapes(t.descriptor)]
    found = [b.step for b in bundle.manifest.builds.values() if b.step]
    return Step(**found[0]) if static and found else None


def _check_cache(graph: Graph, kv_cache: str, options: CacheOptions) -> None:
    """Refuse a layout or width for a cache that there is not.

    Raises:
        InputError: one is asked for, and no state of the graph grows.
    """
    asked = options.layout is not None or options.bits is not None
    if asked and all(state.growth_axis is None for state in graph.state):
        raise InputError(
            f"kv_cache={kv_cache!r}: the model carries no cache that grows with its text",
            "leave it out: it is for language models",
        )


def _layout_of(bundle: Bundle) -> CacheOptions:
    """How the first build of a bundle carries its state, for another one to do the same."""
    cache = next((b.cache for b in bundle.manifest.builds.values() if b.cache), None)
    if cache is None:
        return CacheOptions()
    plan = CachePlan.from_json(cache)
    return CacheOptions(layout=plan.layout, bits=plan.bits)


# -- verification -----------------------------------------------------------------------------


def _verify_builds(
    job: _Job, folder: Path, manifest: Manifest, graph: Graph, reference: _Reference
) -> None:
    bundle = Bundle(BundleFiles.open(folder), manifest)
    resolved = {target.name: target for target in job.targets}
    for name, record in manifest.builds.items():
        if isinstance(reference, str):
            record.verification = {"passed": None, "reason": reference}
        elif why := cannot_run(record):
            record.verification = {"passed": None, "reason": f"{NOT_RUN}: {why}"}
        else:
            job.say(f"verifying {name}")
            record.verification = _verify_one(bundle, graph, reference, resolved.get(name, name))


def _verify_one(
    bundle: Bundle, graph: Graph, reference: verification.Reference, target: str | ResolvedTarget
) -> dict[str, Any]:
    name = target if isinstance(target, str) else target.name
    with Session(bundle, name) as session:
        figures = verification.verify_session(session, reference, graph)

    def diverges() -> str:
        found = resolve(target) if isinstance(target, str) else target

        def run(part: Graph, step: verification.Sample) -> dict[str, Any]:
            return _run_once(part, found, step)

        narrowed = figures.get("narrowed", {})
        return verification.first_divergence(graph, reference.inputs[0], run, narrowed)

    verification.require(figures, name, diverges)
    return figures


def _run_once(graph: Graph, target: ResolvedTarget, step: verification.Sample) -> dict[str, Any]:
    """Build a graph for a target in a scratch bundle and run it once (used to bisect)."""
    with tempfile.TemporaryDirectory(prefix="hal-") as name:
        folder = Path(name)
        part, _ = write_graph(graph, folder)
        manifest = describe(part, {}, [])
        manifest.builds[target.name] = build_target(folder, part, target)
        write_manifest(manifest, folder)
        with Session(Bundle(BundleFiles.open(folder), manifest), target.name) as session:
            return session.executable.run(step)


def _reference_for(graph: Graph, samples: dict[str, Any] | None, job: _Job) -> _Reference:
    return verification.reference_for(graph, samples, step=job.step)


def _reference_of(bundle: Bundle, graph: Graph, step: Step | None = None) -> _Reference:
    samples = bundle.samples()
    if not samples or (step is not None and not step.takes(graph, samples)):
        return verification.reference_for(graph, step=step)
    outputs = tuple(verification.run_reference(graph, samples))
    return verification.checked(verification.Reference(tuple(samples), outputs))


def _require_same_signature(graph: Graph, other: Graph) -> None:
    mine, theirs = graph.signature(), other.signature()
    if [s.name for s in mine.inputs] != [s.name for s in theirs.inputs]:
        raise InputError(
            f"the models take different inputs: {[s.name for s in mine.inputs]} "
            f"and {[s.name for s in theirs.inputs]}",
            "verify against the model that the bundle was compiled from",
        )


# -- inputs ------------------------------------------------------------------------------------


def _user_samples(graph: Graph, inputs: Any, *, strict: bool) -> dict[str, Any] | None:
    """The caller's example inputs as arrays by name, if they match the signature one to one.

    Raises:
        InputError: they do not match, and ``strict`` is set (a file's signature is fixed).
    """
    if inputs is None:
        return None
    specs = graph.signature().inputs
    if isinstance(inputs, Mapping):
        named = dict(inputs)
    else:
        values = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
        if len(values) != len(specs) and not strict:
            return None
        if len(values) != len(specs):
            raise InputError(
                f"{len(values)} inputs given, the model takes {len(specs)}",
                "expected " + ", ".join(str(s) for s in specs),
            )
        named = {s.name: v for s, v in zip(specs, values, strict=True)}
    try:
        return check_inputs(named, specs)
    except InputError:
        if strict:
            raise
        return None  # nested or keyword inputs that the frontend flattened; random ones will do


def check_options(
    target: str | Sequence[str] = "host", quantize: Any = None, kv_cache: str = "auto"
) -> list[ResolvedTarget]:
    """What the options of :func:`compile` mean, before the long work.

    Raises:
        InputError: an option has a value that this version does not take.
        TargetError: a target is unknown, or its backend is absent.
    """
    parse_request(quantize)
    parse_kv_cache(kv_cache)
    names: Any = [target] if isinstance(target, str) else target
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InputError(f"target={target!r} is neither a name nor a list of names", "use 'host'")
    if not names:
        raise TargetError("no target is given", "use target='host'")
    targets = [resolve(name) for name in dict.fromkeys(names)]
    for item in targets:
        require_usable(item)
    return targets
