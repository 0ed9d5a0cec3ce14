"""``hal.compile``: from any model to a bundle, in one direction and with no way back.

frontend → passes → bundle (graph, weights) → one build per target → verification. Everything is
written under a temporary name next to the output and renamed at the end: a whole bundle or none.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

import hal
from hal import frontends
from hal.bundle.build import build_target
from hal.bundle.bundle import Bundle, load_graph
from hal.bundle.files import BundleFiles, unpack
from hal.bundle.manifest import (
    GRAPH,
    MANIFEST,
    MANIFEST_DIGEST,
    FileRecord,
    Manifest,
    TensorRecord,
    digest_path,
    write_manifest,
)
from hal.bundle.output import bundle_writer
from hal.errors import CheckFailed, HalError, InputError, TargetError
from hal.ir import Graph, TensorSpec
from hal.ir.cache_plan import CachePlan
from hal.ir.verify import verify as verify_graph
from hal.ir.weights import write_weights
from hal.passes import default_pipeline
from hal.passes.base import Pipeline
from hal.passes.cache_layout import CacheLayout
from hal.passes.fix_dims import fix_dims
from hal.passes.pick_positions import PickPositions
from hal.quantization import Plan, beside, parse_request, quantize_graph, resumable
from hal.runtime import verification
from hal.runtime.arrays import check_inputs
from hal.runtime.cache_options import CacheOptions, parse_kv_cache
from hal.runtime.here import NOT_RUN, cannot_run
from hal.runtime.memory import give_back, given_back_when_freed
from hal.runtime.saved_state import state_digest
from hal.runtime.session import Session, find_build
from hal.targets import ResolvedTarget, require_usable, resolve

SAMPLES = "samples.safetensors"
SAMPLE_BYTES = 16 << 20
"""Example inputs up to this size are kept in the bundle, for `hal verify` to use again."""

TOKENIZER_FOLDER = "tokenizer"
"""Where the source's tokenizer files and generation settings go in a bundle."""

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
        dims: extents for dynamic dims, ``{"batch": 1}``, for chips that take static shapes only.
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
        source, assets, graph = loaded.source, loaded.assets, fix_dims(loaded.graph, dims)
        del loaded
        verify_graph(graph)
        in_a_file = isinstance(model, (str, Path)) and not str(model).startswith("python:")
        samples = _user_samples(graph, inputs, strict=in_a_file)
        reference = None
        if request is None:
            reference = job.reference(lambda: verification.reference_for(graph, samples))
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
            reference = job.reference(lambda: verification.reference_for(graph, samples))
        job.say("writing the weights")
        manifest = _describe(graph, {"model": source}, [r.to_json() for r in reports])
        if isinstance(reference, verification.Reference):
            manifest.samples = _write_samples(folder, reference.inputs)
        _copy_assets(assets, folder)
        graph, digests = _write_graph(graph, folder)
        if graph.state:
            manifest.state_digest = state_digest(graph)
        _build_all(job, folder, manifest, graph, digests, reference)
        return finish(folder)


def retarget(
    bundle: Bundle,
    target: str | Sequence[str],
    output: str | Path | None = None,
    *,
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
        unpack(bundle.files, folder, skip=_not_neutral)
        known = {n: r for n, r in manifest.files.items() if not _not_neutral(n)}
        graph = load_graph(BundleFiles.open(folder))
        if kv_cache is not None:
            _check_cache(graph, kv_cache, options)
        reference = job.reference(lambda: _reference_of(bundle, graph))
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
    graph = bundle.graph()
    if against is None:
        reference = _reference_of(bundle, graph)
    else:
        other = frontends.load(against).graph
        _require_same_signature(graph, other)
        reference = verification.reference_for(other)
    if isinstance(reference, str):
        raise HalError(
            f"the bundle cannot be verified: {reference}", "verify with the original model"
        )
    results = {}
    for name in names:
        try:
            results[name] = _verify_one(bundle, graph, reference, name)
        except CheckFailed as error:
            quantized = against is not None and "quantization" in graph.metadata
            raise (verification.quantized(error, against) if quantized else error) from None
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
    lowered = _lowered(graph, job.cache)
    for target in job.targets:
        job.say(f"building for {target.name}")
        record = build_target(folder, lowered, target, fallback=job.fallback, digests=digests)
        manifest.builds[target.name] = record
    write_manifest(manifest, folder, files)
    if reference is not None:
        _verify_builds(job, folder, manifest, graph, reference)
        write_manifest(manifest, folder, manifest.files)


def _lowered(graph: Graph, options: CacheOptions) -> Graph:
    """The graph as builds run it: growing state in pools, logits where they are asked for."""
    if not graph.state:
        return graph
    layout = CacheLayout(options.layout or "contiguous", options.bits or 0)
    grows = any(state.growth_axis is not None for state in graph.state)
    passes = (PickPositions(), layout) if grows else (PickPositions(),)
    return Pipeline("lowering", passes).run(graph)[0]


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
        figures = verification.verify_session(session, reference)

    def diverges() -> str:
        found = resolve(target) if isinstance(target, str) else target

        def run(part: Graph, step: verification.Step) -> dict[str, Any]:
            return _run_once(part, found, step)

        narrowed = figures.get("narrowed", {})
        return verification.first_divergence(graph, reference.inputs[0], run, narrowed)

    verification.require(figures, name, diverges)
    return figures


def _run_once(graph: Graph, target: ResolvedTarget, step: verification.Step) -> dict[str, Any]:
    """Build a graph for a target in a scratch bundle and run it once (used to bisect)."""
    with tempfile.TemporaryDirectory(prefix="hal-") as name:
        folder = Path(name)
        part, _ = _write_graph(graph, folder)
        manifest = _describe(part, {}, [])
        manifest.builds[target.name] = build_target(folder, part, target)
        write_manifest(manifest, folder)
        with Session(Bundle(BundleFiles.open(folder), manifest), target.name) as session:
            return session.executable.run(step)


def _reference_of(bundle: Bundle, graph: Graph) -> _Reference:
    if bundle.manifest.samples is None:
        return verification.reference_for(graph)
    steps = bundle.samples()
    return verification.Reference(tuple(steps), tuple(verification.run_reference(graph, steps)))


def _require_same_signature(graph: Graph, other: Graph) -> None:
    mine, theirs = graph.signature(), other.signature()
    if [s.name for s in mine.inputs] != [s.name for s in theirs.inputs]:
        raise InputError(
            f"the models take different inputs: {[s.name for s in mine.inputs]} "
            f"and {[s.name for s in theirs.inputs]}",
            "verify against the model that the bundle was compiled from",
        )


# -- pieces of a bundle -----------------------------------------------------------------------


def _describe(graph: Graph, source: Mapping[str, Any], passes: list[dict[str, Any]]) -> Manifest:
    signature = graph.signature()
    specs = graph.input_specs()
    tensors = [v.const_value for v in graph.graph.initializers.values() if v.const_value]
    return Manifest(
        name=graph.name,
        task=str(graph.metadata.get("task", "generic")),
        producer={"hal": hal.__version__},
        source=dict(source),
        inputs=[_tensor_record(s) for s in signature.inputs],
        outputs=[_tensor_record(s) for s in signature.outputs],
        state=[
            {**s.to_json(), "dtype": specs[s.input].dtype, "dims": list(specs[s.input].dims or ())}
            for s in graph.state
        ],
        metadata=graph.metadata,
        weights={"bytes": graph.weight_bytes(), "tensors": len(tensors)},
        passes=passes,
    )


def _tensor_record(spec: TensorSpec) -> TensorRecord:
    return TensorRecord(
        **{**dataclasses.asdict(spec), "dims": None if spec.dims is None else list(spec.dims)}
    )


def _write_graph(graph: Graph, folder: Path) -> tuple[Graph, dict[str, FileRecord]]:
    """Write weights and ``graph.onnx``; return the graph on the written weights, and digests."""
    files = write_weights(graph, folder)
    path = folder / GRAPH
    model = graph.stamp()
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    names = [path, *files]
    digests = {p.name: digest_path(p) for p in names}
    return graph, digests


def _write_samples(folder: Path, steps: Sequence[Mapping[str, Any]]) -> str | None:
    arrays = {f"{i}/{name}": array for i, step in enumerate(steps) for name, array in step.items()}
    plain = all(isinstance(a, np.ndarray) and a.dtype.kind in "fiub" for a in arrays.values())
    if not arrays or not plain or sum(a.nbytes for a in arrays.values()) > SAMPLE_BYTES:
        return None
    save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, folder / SAMPLES)
    return SAMPLES


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


def _copy_assets(assets: Mapping[str, Path], folder: Path) -> None:
    for name, path in assets.items():
        goal = folder / TOKENIZER_FOLDER / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, goal)


def _not_neutral(name: str) -> bool:
    return name.startswith("builds/") or name in (MANIFEST, MANIFEST_DIGEST)


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
