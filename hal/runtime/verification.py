"""Is a build right? Its outputs against the reference's, and where they first part if they do not.

The reference is computed from the graph as the frontend made it, before any pass, so a wrong pass,
a wrong kernel and a wrong conversion all show.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from hal.bundle.manifest import BuildRecord
from hal.descriptor import parse
from hal.errors import CheckFailed, HalError
from hal.ir import Graph
from hal.ir.evaluate import Evaluator, evaluate
from hal.ir.step import Step, sample_extents, tokens_dim
from hal.runtime.samples import DEFAULT_EXTENTS, sample_inputs
from hal.runtime.sensitivity import movement
from hal.runtime.session import Session
from hal.runtime.state import empty_state

logger = logging.getLogger(__name__)

RELATIVE_TOLERANCE = {"float64": 1e-5, "float32": 1e-3, "float16": 2e-2, "bfloat16": 8e-2}
"""Allowed max error as a share of the largest reference value, by dtype of the output."""

ABSOLUTE_TOLERANCE = {"float64": 1e-7, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Allowed max error near zero, added to the relative part."""

CACHE_TOLERANCE = {0: 0.0, 8: 0.05, 4: 0.5}
"""Allowed further error, as a share of the largest reference value, by bits of the KV cache."""

ROUNDING_TOLERANCE = 0.05
"""Further error, as a share of the largest reference value, where activations are rounded: a value
next to a tie goes up in one kernel and down in another."""

RANDOM_OPS = {
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
}
"""Ops whose results differ from run to run by definition."""

Sample = dict[str, Any]
"""Inputs or outputs of a call by name."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """Inputs of one or more calls in a row, and what the reference gives for each."""

    inputs: tuple[Sample, ...]
    outputs: tuple[Sample, ...]


def reference_for(
    graph: Graph, samples: Sample | None = None, *, seed: int = 0, step: Step | None = None
) -> Reference | str:
    """Run the reference on sample inputs: one call, or a prefill and two decode steps with state.

    ``step``: extents of the builds that are compared with it, if they are static.

    Returns:
        The reference, or a sentence saying why there is none (random ops; inputs that cannot be
        sampled, or on which the reference itself cannot run or gives NaN).
    """
    random = sorted({n.op_type for n in graph.nodes()} & RANDOM_OPS)
    if random:
        return f"results are random by definition ({', '.join(random)})"
    specs, facts = graph.signature().inputs, graph.metadata
    tokens = DEFAULT_EXTENTS["sequence"]
    fixed = sample_extents(graph, step, tokens) if step is not None else {}
    try:
        steps = [samples or sample_inputs(specs, seed=seed, metadata=facts, extents=fixed)]
        if graph.state and samples is None:
            one = {**fixed, tokens_dim(graph): 1}
            steps += [
                sample_inputs(specs, seed=seed + i, metadata=facts, extents=one) for i in (1, 2)
            ]
        if step is not None and step.capacity:
            steps = steps[: step.capacity]
        outputs = run_reference(graph, steps)
    except HalError as error:
        return error.message
    return checked(Reference(tuple(steps), tuple(outputs)))


def checked(reference: Reference) -> Reference | str:
    """The reference, or why nothing can be compared with it: it is no number itself."""
    for outputs in reference.outputs:
        for name, value in outputs.items():
            floats = isinstance(value, np.ndarray) and value.dtype.kind in "fV" and value.size
            if floats and (np.isnan(value).any() or not np.isfinite(value).any()):
                return f"the model itself gives {name!r} as NaN or infinities on the sample inputs"
    return reference


def run_reference(graph: Graph, steps: Sequence[Sample]) -> list[Sample]:
    """Reference outputs (without state) of calls in a row, the state carried between them."""
    specs = graph.input_specs()
    first = graph.signature().inputs[0].name if graph.state else ""
    batch = len(steps[0][first]) if graph.state else 1
    carried = {s.input: empty_state(s, specs[s.input], batch) for s in graph.state}
    results = []
    evaluator = Evaluator(graph)
    for step in steps:
        outputs = evaluator({**step, **carried})
        carried = {s.input: outputs.pop(s.output) for s in graph.state}
        results.append(outputs)
    return results


def verify_session(
    session: Session, reference: Reference, graph: Graph | None = None
) -> dict[str, Any]:
    """Compare a session with the reference.

    Where an output is out of tolerance, ``graph``, from which the build was made, says how far the
    reference evaluator's own result moves (:mod:`hal.runtime.sensitivity`); twice that is added.

    Returns:
        JSON-ready figures: ``passed``, per output ``max_error``, ``mean_error`` and ``tolerance``,
        ``top1_agreement`` where an output is named ``logits``, and the number of calls.
    """
    session.reset()
    slack = CACHE_TOLERANCE[session.plan.bits if session.plan else 0]
    if session.bundle.manifest.metadata.get("quantization", {}).get("activations", 16) < 16:
        slack += ROUNDING_TOLERANCE
    narrowed = narrowed_floats(session.bundle.manifest.builds[session.target])
    figures: dict[str, dict[str, Any]] = {}
    for inputs, expected in zip(reference.inputs, reference.outputs, strict=True):
        actual = session.run(inputs)
        for name, right in expected.items():
            worst = compare(name, actual[name], right, slack, narrowed)
            figures[name] = worst if name not in figures else _worse(figures[name], worst)
    session.reset()
    if graph is not None and not all(f["passed"] for f in figures.values()):
        allow_movement(figures, graph, reference)
    result = {
        "passed": all(f["passed"] for f in figures.values()),
        "calls": len(reference.inputs),
        "outputs": figures,
    }
    return {**result, "narrowed": narrowed} if narrowed else result


def allow_movement(figures: dict[str, dict[str, Any]], graph: Graph, reference: Reference) -> None:
    """Add to tolerances what the reference itself is off by when its first values have noise."""

    def run(other: Graph) -> list[Sample]:
        return run_reference(other, reference.inputs)

    for name, far in movement(graph, run).items():
        figure = figures.get(name)
        if figure is None or figure["passed"] or "reason" in figure:
            continue
        figure["moves"] = far
        figure["tolerance"] += 2 * far
        figure["passed"] = figure["max_error"] <= figure["tolerance"]


def narrowed_floats(build: BuildRecord) -> dict[str, str]:
    """Float types that what ran the build's segments narrows, and what each is computed in.

    Segments that fell to the host count for nothing: a build of them alone narrows nothing.
    """
    chips = []
    for segment in build.segments:
        chip = parse(segment.get("descriptor") or build.descriptor, "the build")
        route = segment.get("target", build.route).rpartition(":")[2]
        if route in chip.routes and chip.routes[route].backend == segment["backend"]:
            chips.append(chip.behaviour)
    found: dict[str, str] = {}
    for dtype in RELATIVE_TOLERANCE:
        types = [dtype, *(chip.computed_in(dtype) for chip in chips)]
        loosest = max(types, key=lambda t: RELATIVE_TOLERANCE[t])
        if loosest != dtype:
            found[dtype] = loosest
    return found


@dataclasses.dataclass(frozen=True)
class Narrowed:
    """A float type, and the smaller one in which a target computes it."""

    dtype: str
    computed_in: str

    @property
    def relative(self) -> float:
        """Allowed error as a share of the reference."""
        return RELATIVE_TOLERANCE[self.computed_in]

    @property
    def absolute(self) -> float:
        """Allowed error near zero."""
        return ABSOLUTE_TOLERANCE[self.computed_in]

    def __str__(self) -> str:
        return narrowed_text({self.dtype: self.computed_in})


def narrowed_text(narrowed: Mapping[str, str]) -> str:
    """Why the tolerance is that of another type, or nothing."""
    return ", ".join(
        f"tolerance of {small}, in which the target computes {wide}"
        for wide, small in narrowed.items()
    )


def compare(
    name: str,
    actual: Any,
    expected: Any,
    slack: float = 0.0,
    narrowed: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Error figures of one output; sequences are compared item by item.

    ``slack`` is added to the relative tolerance of floats. A dtype that ``narrowed`` names has the
    tolerance of the type that it is computed in.
    """
    if isinstance(expected, (list, tuple)):
        if not isinstance(actual, (list, tuple)) or len(actual) != len(expected):
            return {
                "passed": False,
                "max_error": None,
                "mean_error": None,
                "reason": "other length",
            }
        items = [compare(name, a, e, 0.0, narrowed) for a, e in zip(actual, expected, strict=True)]
        result = {"passed": True, "max_error": 0.0, "mean_error": 0.0, "tolerance": 0.0}
        for item in items:
            result = _worse(result, item)
        return result
    if expected is None:
        return {"passed": actual is None, "max_error": 0.0, "mean_error": 0.0, "tolerance": 0.0}
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return {
            "passed": False,
            "max_error": None,
            "mean_error": None,
            "dtype": str(actual.dtype),
            "expected_dtype": str(expected.dtype),
            "reason": f"{actual.dtype}{list(actual.shape)}, "
            f"expected {expected.dtype}{list(expected.shape)}",
        }
    kind = np.dtype(expected.dtype)
    if kind.kind not in "fcV" and kind.name not in RELATIVE_TOLERANCE:
        wrong = int(np.count_nonzero(actual != expected))
        return {
            "passed": wrong == 0,
            "max_error": float(wrong),
            "mean_error": 0.0,
            "tolerance": 0.0,
        }
    return _compare_floats(name, actual, expected, slack, narrowed)


def _compare_floats(
    name: str,
    actual: np.ndarray,
    expected: np.ndarray,
    slack: float,
    narrowed: Mapping[str, str],
) -> dict[str, Any]:
    dtype = narrowed.get(expected.dtype.name, expected.dtype.name)
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    left, right = actual.astype(wide), expected.astype(wide)
    finite = np.isfinite(left) & np.isfinite(right)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    error = np.abs(np.where(finite, left - right, 0))
    scale = float(np.abs(right[finite]).max()) if finite.any() else 0.0
    fallback_r, fallback_a = RELATIVE_TOLERANCE["bfloat16"], ABSOLUTE_TOLERANCE["bfloat16"]
    relative = RELATIVE_TOLERANCE.get(dtype, fallback_r) + slack
    tolerance = ABSOLUTE_TOLERANCE.get(dtype, fallback_a) + scale * relative
    largest = float(error.max()) if error.size else 0.0
    result: dict[str, Any] = {
        "passed": bool((finite | same).all()) and largest <= tolerance,
        "max_error": largest,
        "mean_error": float(error.mean()) if error.size else 0.0,
        "tolerance": tolerance,
    }
    if not (finite | same).all():
        result["reason"] = "infinities or NaN on one side only"
    if name == "logits" and expected.ndim >= 2 and expected.size:
        agree = left.real.argmax(-1) == right.real.argmax(-1)
        result["top1_agreement"] = float(agree.mean())
    return result


def _worse(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    worse = dict(max(a, b, key=lambda f: np.inf if f["max_error"] is None else f["max_error"]))
    worse["passed"] = a["passed"] and b["passed"]
    if "top1_agreement" in a and "top1_agreement" in b:
        worse["top1_agreement"] = min(a["top1_agreement"], b["top1_agreement"])
    return worse


def require(figures: Mapping[str, Any], target: str, diverges: Callable[[], str]) -> None:
    """Make failed figures an error that names the first tensor that diverges.

    Raises:
        CheckFailed: the figures did not pass.
    """
    if figures["passed"]:
        return
    name, worst = next((n, f) for n, f in figures["outputs"].items() if not f["passed"])
    detail = worst.get("reason") or f"max error {worst['max_error']:.3g} > {worst['tolerance']:.3g}"
    error = CheckFailed(
        f"verification failed on {target}: output {name!r}: {detail}; {diverges()}",
        "the build is wrong here; use another route, or compile with verify=False (--no-verify)",
    )
    error.figures = figures
    raise error


def quantized(error: CheckFailed, against: object) -> CheckFailed:
    """The same failure of a quantized bundle beside a model of floats, where it is none."""
    return CheckFailed(
        f"the bundle is quantized, so it differs from {against}: {error.message}",
        "hal verify without --against checks the builds; hal eval --against says what"
        " quantization costs",
    )


def first_divergence(
    graph: Graph,
    step: Sample,
    run_on_target: Callable[[Graph, Sample], dict[str, Any]],
    narrowed: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Find by bisection the first value of ``graph`` that a target computes wrongly.

    Args:
        graph: the neutral graph.
        step: inputs of one call (for graphs with state: the first call, on empty state).
        run_on_target: builds a graph for the target and runs it once.
        narrowed: as for :func:`compare`.

    Returns:
        A sentence naming the value, its node and op, or saying that nothing was found.
    """
    specs = graph.input_specs()
    batch = len(next(iter(step.values()))) if step else 1
    inputs = {**step, **{s.input: empty_state(s, specs[s.input], batch) for s in graph.state}}
    values = [n.outputs[0] for n in graph.graph if n.op_type != "Constant" and n.outputs]
    low, high = 0, len(values) - 1
    found: ir.Value | None = None
    while low <= high:
        middle = (low + high) // 2
        if _wrong(graph, values[middle], inputs, run_on_target, narrowed):
            found, high = values[middle], middle - 1
        else:
            low = middle + 1
    if found is None:
        return "no single tensor diverges on the first call"
    node = found.producer()
    assert node is not None
    return f"first diverging tensor is {found.name!r} ({node.op_type}, node {node.name!r})"


def _wrong(
    graph: Graph,
    value: ir.Value,
    inputs: Sample,
    run_on_target: Callable[[Graph, Sample], dict[str, Any]],
    narrowed: Mapping[str, str],
) -> bool:
    name = value.name or ""
    part = truncate(graph, name)
    needed = {n: inputs[n] for n in part.input_specs()}
    try:
        expected = evaluate(part, needed)[name]
        actual = run_on_target(part, needed)[name]
        return not compare(name, actual, expected, 0.0, narrowed)["passed"]
    except HalError as error:
        logger.info("bisection skips %s: %s", name, error)
        return False


def truncate(graph: Graph, output: str) -> Graph:
    """The part of ``graph`` that computes one value, as a graph without state."""
    part = Graph(graph.model.clone(), (), dict(graph.metadata))
    body = part.graph
    value = next(v for n in body for v in n.outputs if v.name == output)
    body.outputs.clear()
    body.outputs.append(value)
    needed: set[ir.Node] = set()
    todo = [value.producer()]
    while todo:
        node = todo.pop()
        if node is None or node in needed or node.graph is not body:
            continue
        needed.add(node)
        from hal.ir import used_values

        todo.extend(v.producer() for v in used_values(node))
    body.remove([n for n in body if n not in needed], safe=True)
    used = {v for n in body.all_nodes() for v in n.inputs if v is not None} | {value}
    for item in [v for v in body.inputs if v not in used]:
        body.inputs.remove(item)
    for initializer in [n for n, v in body.initializers.items() if v not in used]:
        del body.initializers[initializer]
    return part
