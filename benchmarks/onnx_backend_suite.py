"""Run ONNX's own backend test-suite (it ships in the ``onnx`` wheel) through ``hal.compile``.

::

    python benchmarks/onnx_backend_suite.py --target host:onnxruntime
    python benchmarks/onnx_backend_suite.py --target host:tvm --no-fallback --filter 'softmax|gelu'
    python benchmarks/onnx_backend_suite.py --kind light

Each case is compiled, loaded and run in a worker process with a time limit, so a crash or a hang
counts against that case only. The same case also runs on onnxruntime used directly: a case that hal
gets wrong and onnxruntime gets right is listed, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.runner import Runner

PASSED, WRONG, UNSUPPORTED, ERROR = "passed", "wrong", "unsupported", "error"
STATUSES = (PASSED, WRONG, UNSUPPORTED, ERROR)
TIME_LIMIT = 120.0


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and inputs with the outputs that it must give."""

    name: str
    model: onnx.ModelProto
    data: Callable[[], Iterable[tuple[Sequence[Any], Sequence[Any]]]]
    rtol: float
    atol: float

    @property
    def op(self) -> str:
        """What the case is about: its first node's op, or ``model``."""
        nodes = self.model.graph.node
        if not nodes or len({n.op_type for n in nodes}) > 8:
            return "model"
        return f"{nodes[0].domain}::{nodes[0].op_type}" if nodes[0].domain else nodes[0].op_type


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one case went through hal, and through onnxruntime alone."""

    name: str
    op: str
    status: str
    reason: str
    native: str
    seconds: float


# -- cases ------------------------------------------------------------------------------------


def node_cases(modules: Sequence[str] | None = None) -> list[Case]:
    """The cases of single operators.

    ``modules`` (file names in ``onnx.backend.test.case.node``) loads only those, which is quick;
    all of them take about 15 seconds to generate.
    """
    from onnx.backend.test.case import node

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if modules is None:
            found = node.collect_testcases(None)
        else:
            found = [case for name in modules for case in _cases_of(name)]
    return [_node_case(case) for case in found]


@functools.cache
def _cases_of(module: str) -> list[TestCase]:
    """A module adds its cases to one list, when it is imported for the first time."""
    from onnx.backend.test.case import node

    before = len(node._NodeTestCases)
    importlib.import_module(f"onnx.backend.test.case.node.{module}")
    return node._NodeTestCases[before:]


def _node_case(case: TestCase) -> Case:
    assert case.model is not None
    assert case.data_sets is not None
    sets = case.data_sets
    return Case(case.name, case.model, lambda: sets, case.rtol, case.atol)


def light_cases() -> list[Case]:
    """The well-known image classifiers, with constant weights generated inside the model."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    return [_light_case(path) for path in sorted(folder.glob("light_*.onnx"))]


def _light_case(path: Path) -> Case:
    model = onnx.load(path)

    def data() -> list[tuple[list[Any], list[Any]]]:
        weights = {t.name for t in model.graph.initializer}
        inputs = [Runner.generate_dummy_data(v) for v in model.graph.input if v.name not in weights]
        expected = onnx.load_tensor(path.with_name(f"{path.stem}_output_0.pb"))
        return [(inputs, [onnx.numpy_helper.to_array(expected)])]

    return Case(path.stem, model, data, 1e-3, 1e-7)


# -- one case ---------------------------------------------------------------------------------


def run_case(case: Case, target: str, fallback: bool, native: bool = True) -> Outcome:
    """Run one case through hal and, unless told otherwise, through onnxruntime alone."""
    start = time.perf_counter()
    status, reason = _judge(case, lambda: _hal_runner(case, target, fallback))
    seconds = time.perf_counter() - start
    alone = _judge(case, lambda: _native_runner(case))[0] if native else ""
    return Outcome(case.name, case.op, status, reason, alone, seconds)


Runnable = Callable[[list[Any]], list[Any]]


def _judge(case: Case, prepare: Callable[[], Runnable]) -> tuple[str, str]:
    from hal import HalError

    try:
        run = prepare()
        for inputs, expected in case.data():
            outputs = run([_array(item) for item in inputs])
            wanted = [_array(item) for item in expected]
            Runner.assert_similar_outputs(wanted, outputs, case.rtol, case.atol)
    except HalError as error:
        return UNSUPPORTED, f"{type(error).__name__}: {error.message}"
    except AssertionError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return WRONG, " ".join(lines[:4])
    except Exception as error:  # noqa: BLE001 - whatever a case raises is its outcome
        text = (str(error).strip().splitlines() or [""])[0]
        return ERROR, f"{type(error).__name__}: {text}"
    return PASSED, ""


def _hal_runner(case: Case, target: str, fallback: bool) -> Runnable:
    import hal

    with tempfile.TemporaryDirectory(prefix="suite-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(case.model.SerializeToString())
        bundle = hal.compile(path, target=target, verify=False, fallback=fallback)
    session = bundle.session(threads=1)

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


# -- many cases -------------------------------------------------------------------------------


class _Worker:
    """A process that runs cases by number; it inherits them, only results are pickled."""

    def __init__(self, cases: list[Case], arguments: tuple[str, bool, bool]) -> None:
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
    cases: list[Case],
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


def run_suite(
    cases: list[Case],
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


def _collect(worker: _Worker, cases: list[Case]) -> Outcome | None:
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


# -- report -----------------------------------------------------------------------------------


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts in total and per op, and the cases that hal gets wrong and onnxruntime right."""
    per_op: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for outcome in outcomes:
        per_op[outcome.op][outcome.status] += 1
    total = collections.Counter(o.status for o in outcomes)
    return {
        "cases": len(outcomes),
        **{status: total[status] for status in STATUSES},
        "onnxruntime_passed": sum(o.native == PASSED for o in outcomes),
        "regressions": [o.name for o in outcomes if o.status == WRONG and o.native == PASSED],
        "lost": [
            o.name for o in outcomes if o.status not in (PASSED, WRONG) and o.native == PASSED
        ],
        "per_op": {op: dict(counts) for op, counts in sorted(per_op.items())},
    }


def _print(outcomes: Sequence[Outcome], figures: dict[str, Any], target: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("op", *STATUSES, title=f"ONNX backend test-suite on {target}")
    for op, counts in figures["per_op"].items():
        table.add_row(op, *(str(counts.get(status, "") or "") for status in STATUSES))
    table.add_section()
    table.add_row("total", *(str(figures[status]) for status in STATUSES))
    console.print(table)
    reasons = collections.Counter(
        f"{o.status}: {o.reason[:150]}" for o in outcomes if o.status != PASSED
    )
    for reason, count in reasons.most_common(25):
        console.print(f"{count:5d}  {reason}", markup=False, highlight=False)
    console.print(
        f"{figures['passed']} of {figures['cases']} passed; "
        f"onnxruntime alone: {figures['onnxruntime_passed']}"
    )
    wrong = ", ".join(figures["regressions"]) or "none"
    console.print(f"wrong where onnxruntime alone is right: {wrong}")
    if figures["lost"]:
        console.print(f"not run where onnxruntime alone is right: {', '.join(figures['lost'])}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run the ONNX backend test-suite through hal.")
    parser.add_argument("--target", default="host:onnxruntime")
    parser.add_argument("--no-fallback", action="store_true")
    parser.add_argument("--kind", choices=("node", "light", "all"), default="node")
    parser.add_argument("--filter", default="", help="regular expression on case names")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help="seconds for each case")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    options = parser.parse_args(arguments)
    cases = [
        *(node_cases() if options.kind in ("node", "all") else []),
        *(light_cases() if options.kind in ("light", "all") else []),
    ]
    cases = [case for case in cases if re.search(options.filter, case.name)]
    if not cases:
        print("no case has such a name", file=sys.stderr)
        return 2
    from rich.progress import track

    cache = tempfile.TemporaryDirectory(prefix="suite-cache-")  # builds by other code are not ours
    os.environ["HAL_CACHE"] = cache.name
    running = run_suite(
        cases,
        options.target,
        fallback=not options.no_fallback,
        jobs=options.jobs,
        limit=options.limit,
    )
    bar = track(running, "running", total=len(cases), disable=not sys.stderr.isatty())
    outcomes = sorted(bar, key=lambda o: o.name)
    figures = summary(outcomes)
    _print(outcomes, figures, options.target + (" alone" if options.no_fallback else ""))
    if options.json:
        rows = [dataclasses.asdict(o) for o in outcomes]
        options.json.write_text(json.dumps({**figures, "outcomes": rows}, indent=1))
    return 1 if figures["regressions"] else 0


if __name__ == "__main__":
    sys.exit(main())
