"""A plug-in of pytest that makes the conformance of a target part of its vendor's tests.

``pytest --hal-target my-chip`` collects what ``hal conformance my-chip`` runs, one test for each
case, beside the other tests. What the target refuses is skipped with its reason; what is wrong,
fails, or is left to the host fails with the figures.

pytest imports this module wherever hal is installed, so it imports nothing of weight by itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from hal.errors import HalError

if TYPE_CHECKING:
    from hal.conformance import CaseRunner, Outcome, Selection
    from hal.targets import ResolvedTarget

MARKER = "hal_conformance"
_SELECTING = {"--hal-op", "--hal-models", "--hal-from-model", "--hal-dim", "--hal-fallback"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, which are those of ``hal conformance``."""
    group = parser.getgroup("hal", "conformance of targets of hal")
    group.addoption(
        "--hal-target",
        action="append",
        metavar="TARGET[:ROUTE]",
        help="collect the conformance of this target as tests; repeatable",
    )
    group.addoption("--hal-op", metavar="OP,...", help="only cases about these ops")
    group.addoption(
        "--hal-models", action="store_true", help="small models of each family, not single ops"
    )
    group.addoption(
        "--hal-from-model", metavar="MODEL", help="the ops of this bundle or model instead"
    )
    group.addoption(
        "--hal-dim",
        action="append",
        metavar="NAME=N",
        help="extent of a dynamic dim of that model; repeatable",
    )
    group.addoption(
        "--hal-fallback", action="store_true", help="let the host run what the target refuses"
    )
    group.addoption(
        "--hal-share",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of a case's nodes, what the target itself must run at least (default: 1, all)",
    )
    group.addoption(
        "--hal-limit",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="for each case (default: 120)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker, and refuse a target that there is not before anything is collected."""
    config.addinivalue_line("markers", f"{MARKER}: a case of pytest --hal-target")
    targets = config.getoption("--hal-target")
    if not targets:
        for name in sorted(_SELECTING):
            if config.getoption(name):
                raise pytest.UsageError(f"{name} is given without --hal-target")
        return
    from hal.targets import foreign, guarded, resolve

    for target in targets:
        with _told():
            found = resolve(target)
            blamed = " or ".join(foreign([found])) or found.name
            check = functools.partial(_check, found)
            guarded(check, blamed, config.getoption("--hal-limit"))


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose among the items
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add the cases of the targets to what was collected."""
    for target in config.getoption("--hal-target") or ():
        chosen = _select(config, target)
        collector = TargetCases.from_parent(
            session, name=target, nodeid=target, target=target, chosen=chosen
        )
        config.add_cleanup(collector.close)
        config.stash.setdefault(_COLLECTED, []).append(collector)
        report = config.hook.pytest_make_collect_report(collector=collector)
        config.hook.pytest_collectreport(report=report)
        items.extend(report.result)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Say what the cases are, and what the dims of a model were bound to."""
    lines = []
    for collector in config.stash.get(_COLLECTED, []):
        chosen = collector.chosen
        told = [chosen.title, f"{len(chosen.cases)} cases", *chosen.notes()]
        lines.append(f"hal: {collector.name}: {'; '.join(told)}")
    return lines


class TargetCases(pytest.Collector):
    """The cases of one target, and the process that runs them."""

    def __init__(self, *, target: str, chosen: Selection, **more: Any) -> None:
        super().__init__(**more)
        self.target, self.chosen = target, chosen
        self._runner: CaseRunner | None = None

    def collect(self) -> Iterator[CaseItem]:
        """One item for each case; ids are ``op[case]``."""
        for index, case in enumerate(self.chosen.cases):
            op = case.op.replace("::", ".")
            name = f"{op}[{case.name.removeprefix(f'{op}-')}]"
            yield CaseItem.from_parent(self, name=name, index=index)

    def run(self, index: int) -> Outcome:
        """Run a case in the target's process, which is started for the first one."""
        from hal.conformance import CaseRunner

        if self._runner is None:
            limit = self.config.getoption("--hal-limit")
            self._runner = CaseRunner(
                self.chosen.cases, self.target, fallback=self.chosen.fallback, limit=limit
            )
        return self._runner.run(index)

    def close(self) -> None:
        """End the process."""
        if self._runner is not None:
            self._runner.close()


_COLLECTED = pytest.StashKey[list[TargetCases]]()


class CaseFailure(Exception):  # noqa: N818  (reads as the sentence it is)
    """A case that did not pass; the text has the figures."""


class CaseItem(pytest.Item):
    """One case."""

    def __init__(self, *, index: int, **more: Any) -> None:
        super().__init__(**more)
        self.index = index
        self.add_marker(MARKER)

    def runtest(self) -> None:
        """Run the case.

        Raises:
            CaseFailure: it did not pass, or the host ran more of it than it may.
        """
        from hal.conformance import BUILT

        cases = self.parent
        assert isinstance(cases, TargetCases)
        outcome = cases.run(self.index)
        for name in ("status", "max_error", "share", "seconds"):
            self.user_properties.append((f"hal_{name}", getattr(outcome, name)))
        if outcome.status in ("unsupported", BUILT):
            pytest.skip(outcome.reason)
        problem = problem_of(outcome, self.config.getoption("--hal-share"))
        if problem:
            raise CaseFailure(f"{cases.target}: {outcome.name}: {problem}")

    def repr_failure(
        self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None
    ) -> str | Any:
        """The figures without a traceback: it would show this plug-in only."""
        if isinstance(excinfo.value, CaseFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Where a case is: in no file."""
        return self.path, None, self.nodeid


def problem_of(outcome: Outcome, least: float) -> str:
    """What is wrong with an outcome, with its figures, or nothing.

    ``least`` is the share of nodes that the target must run itself.
    """
    share = 1.0 if outcome.share is None else outcome.share
    if outcome.status == "passed":
        if share >= least:
            return ""
        parts = [f"delegated: the target ran {share:.0%} of its nodes, {least:.0%} are asked for"]
    else:
        parts = [f"{outcome.status}: {outcome.reason}"]
        if outcome.share is not None:
            parts.append(f"the target ran {share:.0%} of its nodes")
    if outcome.max_error is not None:
        parts.append(f"max error {outcome.max_error:.3g}")
    if outcome.about:
        parts.append(outcome.about)
    return "; ".join(parts)


def _select(config: pytest.Config, target: str) -> Selection:
    from hal.conformance import select

    ops = config.getoption("--hal-op")
    with _told():
        return select(
            target,
            ops=None if ops is None else ops.split(","),
            models=config.getoption("--hal-models"),
            from_model=config.getoption("--hal-from-model"),
            dims=_extents(config.getoption("--hal-dim") or ()),
            fallback=config.getoption("--hal-fallback"),
        )


def _extents(texts: Iterable[str]) -> dict[str, int]:
    extents = {}
    for text in texts:
        name, _, extent = text.partition("=")
        if not name or not extent.isdecimal() or int(extent) < 1:
            raise pytest.UsageError(f"--hal-dim {text!r} is not name=extent")
        extents[name] = int(extent)
    return extents


def _check(found: ResolvedTarget, _: object) -> None:
    from hal.targets import require_usable

    require_usable(found)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn an error of hal into one of pytest's, which is told in a line."""
    try:
        yield
    except HalError as error:
        hint = f" (hint: {error.hint})" if error.hint else ""
        raise pytest.UsageError(f"{error.message}{hint}") from error
