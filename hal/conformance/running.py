"""Running cases in processes of their own: a crash or a hang counts against its case only.

A case passes if the target runs all of its nodes itself and gives the right values; what falls to
the host is no success of a target, unless that is asked for. The same case may also run on
onnxruntime used directly, which tells what hal gets wrong from what the suite itself gets wrong.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from onnx.backend.test.runner import Runner

from hal.conformance.cases import Case
from hal.conformance.models import ModelCase
from hal.errors import (
    BuildError,
    CheckFailed,
    HalError,
    InputError,
    TargetError,
    UnsupportedError,
)
from hal.runtime.here import NOT_RUN, cannot_run

PASSED, WRONG, WRONG_DTYPE, UNSUPPORTED, BUILT, ERROR = STATUSES = (
    "passed", "wrong", "wrong dtype", "unsupported", NOT_RUN, "error"
)  # fmt: skip
FAILURES = (WRONG, WRONG_DTYPE, ERROR)
"""What no target may do: a refusal with a reason is no failure, nor is a machine without it."""
TIME_LIMIT = 120.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one case went.

    Attributes:
        name, op: of the case.
        status: one of :data:`STATUSES`.
        reason: why it did not pass, or by which other type's tolerance it passed.
        native: how it went on onnxruntime alone, where that was asked for.
        seconds: to compile, load and run it.
        max_error: largest difference from the reference, of models and their ops.
        share: of the nodes, how many the target ran itself.
        about: where in a model the op of the case is, and its attributes.
    """

    name: str
    op: str
    status: str
    reason: str
    native: str
    seconds: float
    max_error: float | None = None
    share: float | None = None
    about: str = ""


def run_case(case: Case | ModelCase, target: str, fallback: bool, native: bool = True) -> Outcome:
    """Run one case through hal and, unless told otherwise, through onnxruntime alone."""
    if isinstance(case, ModelCase):
        return _run_model(case, target, fallback)
    start = time.perf_counter()
    built = _Built()
    status, reason = _judge(
        case, lambda: _hal_runner(case, target, fallback, built), built.narrowed
    )
    if status == PASSED and built.narrowed:
        reason = ", ".join(map(str, built.narrowed.values()))
    seconds = time.perf_counter() - start
    alone = _judge(case, lambda: _native_runner(case))[0] if native else ""
    return Outcome(case.name, case.op, status, reason, alone, seconds, share=built.share)


def _run_model(case: ModelCase, target: str, fallback: bool) -> Outcome:
    """Compile and verify a model. One of which the host runs every node is unsupported."""
    import hal

    start = time.perf_counter()
    status, reason, share = PASSED, "", None
    outputs: Mapping[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="model-") as folder:
            source = case.write(Path(folder))
            dims = case.dims if case.dims and _is_static(target) else None
            options = {"dims": dims, **case.options}
            bundle = hal.compile(source, target=target, fallback=fallback, **options)
            record = next(iter(bundle.manifest.builds.values()))
        share = _share(record)
        figures = record.verification or {}
        outputs = figures.get("outputs", {})
        reason = ", ".join(map(str, bundle.narrowed(record.target).values()))
        if share == 0:
            refused = record.placement["refused"]
            status, reason = UNSUPPORTED, f"takes none of its nodes: {refused[0]['reason']}"
        elif absent := cannot_run(record):
            status, reason = BUILT, absent
        elif not figures.get("passed"):
            status, reason = ERROR, f"not compared: {figures.get('reason')}"
        elif case.faults and (wrong := faults(bundle, record.target)):
            status, reason = ERROR, wrong
    except CheckFailed as failed:
        status, reason = WRONG, failed.message
        outputs = (failed.figures or {}).get("outputs", {})
        if any(o.get("dtype") != o.get("expected_dtype") for o in outputs.values()):
            status = WRONG_DTYPE
    except Exception as failed:  # noqa: BLE001 - whatever a model raises is its outcome
        status, reason = _failure(failed, UnsupportedError)
    seconds = time.perf_counter() - start
    errors = [o["max_error"] for o in outputs.values() if o["max_error"] is not None]
    error = max(errors, default=None)
    return Outcome(case.name, case.op, status, reason, "", seconds, error, share, case.about)


def faults(bundle: Any, target: str) -> str:
    """What a build does wrong about wrong inputs, in a sentence, or nothing.

    Inputs that are missing, unknown, of another dtype or shape have to be refused as such, and
    right inputs give what they gave before all that.
    """
    with bundle.session(target) as session:
        spec = session.inputs[0]
        shape = [d if isinstance(d, int) else 2 for d in spec.dims or ()]
        right = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
        before = session.run({spec.name: right})
        for what, inputs in (
            ("a missing input", {}),
            ("an unknown input", {spec.name: right, "no such input": right}),
            ("another dtype", {spec.name: right.astype(np.int64)}),
            ("another shape", {spec.name: right[..., :-1]}),
        ):
            try:
                session.run(inputs)
            except InputError:
                continue
            except Exception as error:  # noqa: BLE001 - whatever it raises is what it does wrong
                return f"{what} raises {type(error).__name__}: {error}"
            return f"{what} is not refused"
        after = session.run({spec.name: right})
        same = all(np.array_equal(after[name], before[name]) for name in before)
        return "" if same else "right inputs give other results after wrong ones"


def _is_static(name: str) -> bool:
    """Whether a target's programs have static shapes."""
    from hal.targets import load_backend, resolve

    target = resolve(name)
    return any(
        load_backend(part.backend).static_shapes(part.descriptor)
        for part in target.stages or (target,)
    )


def _share(record: Any) -> float:
    """Of the nodes of a build, how many its own backend has; all if there are none."""
    nodes = record.placement["nodes"]
    return record.placement["assigned"].get(record.backend, 0) / nodes if nodes else 1.0


def _failure(error: Exception, refusals: type[Exception] | None = None) -> tuple[str, str]:
    """A refusal before anything ran is told from what was claimed and then failed.

    ``refusals`` are the errors that count as such: by default all that say what a model has and
    hal or the target has not.
    """
    kind = type(error).__name__
    if isinstance(error, HalError):
        refused = isinstance(error, refusals or HalError)
        failed = isinstance(error, (BuildError, TargetError)) or not refused
        return ERROR if failed else UNSUPPORTED, f"{kind}: {error.message}"
    return ERROR, f"{kind}: {(str(error).strip().splitlines() or [''])[0]}"


Runnable = Callable[[list[Any]], list[Any]]


def _judge(
    case: Case, prepare: Callable[[], Runnable], narrowed: Mapping[str, Any] = MappingProxyType({})
) -> tuple[str, str]:
    """``narrowed`` may be filled by ``prepare``: those floats have the other type's tolerance."""
    outputs: list[Any] = []
    wanted: list[Any] = []
    try:
        run = prepare()
        for inputs, expected in case.data():
            outputs = run([_array(item) for item in inputs])
            wanted = [_array(item) for item in expected]
            _assert_similar(case, wanted, outputs, narrowed)
    except AssertionError as error:
        if (dtypes := _other_dtypes(outputs, wanted)) != "":
            return WRONG_DTYPE, dtypes
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return WRONG, " ".join(lines[:4])
    except _NotRunError as absent:
        return BUILT, str(absent)
    except Exception as error:  # noqa: BLE001 - whatever a case raises is its outcome
        return _failure(error)
    return PASSED, ""


class _NotRunError(Exception):
    """Why what was built does not run on this machine."""


def _other_dtypes(outputs: Sequence[Any], wanted: Sequence[Any]) -> str:
    """Which outputs have another dtype than they should, in a sentence, or nothing."""
    found = [
        f"output {index} is {np.asarray(output).dtype}, expected {np.asarray(right).dtype}"
        for index, (output, right) in enumerate(zip(outputs, wanted, strict=False))
        if isinstance(right, np.ndarray) and np.asarray(output).dtype != right.dtype
    ]
    return "; ".join(found)


def _assert_similar(
    case: Case, wanted: list[Any], outputs: list[Any], narrowed: Mapping[str, Any]
) -> None:
    if len(wanted) != len(outputs):
        raise AssertionError(f"{len(outputs)} outputs, expected {len(wanted)}")
    for right, found in zip(wanted, outputs, strict=True):
        relative, absolute = case.rtol, case.atol
        if isinstance(right, np.ndarray) and (other := narrowed.get(right.dtype.name)):
            relative = max(relative, other.relative)
            absolute = max(absolute, other.absolute)
        Runner.assert_similar_outputs([right], [found], relative, absolute)


@dataclasses.dataclass
class _Built:
    """What is known of a case's build: the share of nodes that the target took, narrowed floats."""

    share: float | None = None
    narrowed: dict[str, Any] = dataclasses.field(default_factory=dict)


def _hal_runner(case: Case, target: str, fallback: bool, built: _Built) -> Runnable:
    """A session of the case; ``built`` is filled."""
    import hal

    with tempfile.TemporaryDirectory(prefix="suite-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(case.model.SerializeToString())
        bundle = hal.compile(path, target=target, verify=False, fallback=fallback)
    record = next(iter(bundle.manifest.builds.values()))
    built.share = _share(record)
    try:
        session = bundle.session(threads=1)
    except HalError as error:
        if absent := cannot_run(record):
            raise _NotRunError(absent) from error
        raise
    built.narrowed.update(bundle.narrowed(session.target))

    def run(inputs: list[Any]) -> list[Any]:
        names = _input_names(case.model)
        given = {n: v for n, v in zip(names, inputs, strict=False) if v is not None}
        results = session.run(given)
        return [results[value.name] for value in case.model.graph.output]

    return run


def _native_runner(case: Case) -> Runnable:
    import onnxruntime as ort

    from hal.ir.ortvalue import from_ort, to_ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        case.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in case.model.graph.output]
    plain = all(
        v.type.startswith("tensor(") and "string" not in v.type
        for v in [*session.get_inputs(), *session.get_outputs()]
    )

    def run(inputs: list[Any]) -> list[Any]:
        given = dict(zip(_input_names(case.model), inputs, strict=False))
        if not plain:
            return list(session.run(names, given))
        values = {name: to_ort(value) for name, value in given.items()}
        return [from_ort(value) for value in session.run_with_ort_values(names, values)]

    return run


def _input_names(model: onnx.ModelProto) -> list[str]:
    weights = {t.name for t in model.graph.initializer}
    return [value.name for value in model.graph.input if value.name not in weights]


def _array(item: Any) -> Any:
    """Data of a case as arrays: some come as protocol buffers, in spite of their annotations."""
    if isinstance(item, onnx.TensorProto):
        return onnx.numpy_helper.to_array(item)
    if isinstance(item, onnx.SequenceProto):
        return onnx.numpy_helper.to_list(item)
    if isinstance(item, onnx.OptionalProto):
        return onnx.numpy_helper.to_optional(item)
    if isinstance(item, np.generic):
        return np.asarray(item)
    return item


@contextlib.contextmanager
def fresh_cache() -> Iterator[None]:
    """A cache of its own for the block: builds by other code are not ours."""
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder, _cache_in(folder):
        yield


@contextlib.contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    before = os.environ.get("HAL_CACHE")
    os.environ["HAL_CACHE"] = folder
    try:
        yield
    finally:
        del os.environ["HAL_CACHE"]
        if before is not None:
            os.environ["HAL_CACHE"] = before


# -- many cases -------------------------------------------------------------------------------


class _Worker:
    """A process that runs cases by number; it inherits them, only results are pickled."""

    def __init__(
        self, cases: Sequence[Case | ModelCase], arguments: tuple[str, bool, bool]
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, cases, arguments), daemon=True)
        self.process.start()
        other.close()
        self.index: int | None = None
        self.deadline = 0.0

    def give(self, index: int, limit: float) -> None:
        self.index, self.deadline = index, time.monotonic() + limit
        self.pipe.send(index)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(
    pipe: multiprocessing.connection.Connection,
    cases: Sequence[Case | ModelCase],
    arguments: tuple[str, bool, bool],
) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    warnings.simplefilter("ignore")
    while True:
        try:
            index = pipe.recv()
        except EOFError:
            return
        pipe.send(run_case(cases[index], *arguments))


class CaseRunner:
    """Runs cases one at a time, when they are asked for, in a process that is replaced if it dies.

    Builds go to a cache of its own until :meth:`close`.
    """

    def __init__(
        self,
        cases: Sequence[Case | ModelCase],
        target: str,
        *,
        fallback: bool = False,
        limit: float = TIME_LIMIT,
    ) -> None:
        self._cases, self._limit = cases, limit
        self._arguments = (target, fallback, False)
        self._cache = tempfile.TemporaryDirectory(prefix="conformance-")
        self._worker: _Worker | None = None

    def run(self, index: int) -> Outcome:
        """How the case of that number goes."""
        if self._worker is None:
            with _cache_in(self._cache.name):
                self._worker = _Worker(self._cases, self._arguments)
        worker = self._worker
        worker.give(index, self._limit)
        while (outcome := _collect(worker, self._cases)) is None:
            left = worker.deadline - time.monotonic()
            multiprocessing.connection.wait([worker.pipe], timeout=max(0.0, left))
        if not worker.process.is_alive():
            worker.kill()
            self._worker = None
        return outcome

    def close(self) -> None:
        """End the process, and remove what was built."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None
        self._cache.cleanup()


def run_suite(
    cases: Sequence[Case | ModelCase],
    target: str,
    *,
    fallback: bool = True,
    native: bool = True,
    jobs: int = 1,
    limit: float = TIME_LIMIT,
) -> Iterator[Outcome]:
    """Run cases in worker processes; yields outcomes as they come.

    A worker that dies or runs past ``limit`` seconds is replaced; its case counts as an error.
    """
    arguments = (target, fallback, native)
    todo = collections.deque(range(len(cases)))
    workers = [_Worker(cases, arguments) for _ in range(min(jobs, len(cases)))]
    try:
        while todo or any(w.index is not None for w in workers):
            for worker in workers:
                if worker.index is None and todo:
                    worker.give(todo.popleft(), limit)
            busy = [w for w in workers if w.index is not None]
            multiprocessing.connection.wait([w.pipe for w in busy], timeout=1.0)
            for worker in busy:
                outcome = _collect(worker, cases)
                if outcome is None:
                    continue
                if not worker.process.is_alive():
                    worker.kill()
                    workers[workers.index(worker)] = _Worker(cases, arguments)
                worker.index = None
                yield outcome
    finally:
        for worker in workers:
            worker.kill()


def _collect(worker: _Worker, cases: Sequence[Case | ModelCase]) -> Outcome | None:
    assert worker.index is not None
    case = cases[worker.index]
    try:
        if worker.pipe.poll():
            result: Outcome = worker.pipe.recv()
            return result
    except (EOFError, ConnectionError):
        worker.process.join()
        reason = f"the process died with exit code {worker.process.exitcode}"
        return Outcome(case.name, case.op, ERROR, reason, "", 0.0)
    if time.monotonic() > worker.deadline:
        worker.process.kill()
        worker.process.join()
        return Outcome(case.name, case.op, ERROR, "ran past the time limit", "", TIME_LIMIT)
    return None
