"""What is not measured in turns: where hal's time goes, and the other benchmarks' own results."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed.artifacts import Artifacts
from speed.cells import Contender, Group, Measure
from speed.failures import Unavailable, reason
from speed.goals import judge, missed
from speed.measure import Say
from speed.store import Store

BENCHMARKS = Path(__file__).resolve().parents[1]
_LIMIT = 3600
_FEW_KERNELS = ("--sizes", "256", "--rows", "1", "8", "--turns", "1", "--bits", "256")


def profiles(
    store: Store, groups: Sequence[Group], artifacts: Artifacts, threads: int, say: Say
) -> None:
    """Time by kernel of hal's contenders in cells of which a line is missed."""
    cells = missed(judge(store.data["cells"]))
    found: dict[str, Any] = dict(store.data.get("profiles", {}))
    for group in groups:
        measures = [m for m in group.measures if group.cell(m) in cells and not group.cold]
        for contender in group.contenders if measures else ():
            known = found.setdefault(group.key, {})
            if contender.family == "hal" and not store.done_profile(group.key, contender.name):
                say(f"{group.title}: profile of {contender.name}")
                try:
                    known[contender.name] = _profile(contender, measures, artifacts, threads)
                except Unavailable as error:
                    known[contender.name] = {"error": str(error)}
                store.fact("profiles", found)


def _profile(
    contender: Contender, measures: Sequence[Measure], artifacts: Artifacts, threads: int
) -> dict[str, Any]:
    """Shares of time by measure and kernel.

    Raises:
        Unavailable: the bundle or the profile cannot be made.
    """
    if contender.artifact is None:
        raise Unavailable(contender.lacking)
    arguments = {
        "target": dict(contender.options)["target"], "threads": threads,
        "requests": {m.key: dict(m.request) for m in measures}, "first": dict(measures[0].first),
        "artifact": str(artifacts.path(contender.artifact)),
        **{name: str(artifacts.path(artifact)) for name, artifact in contender.files},
    }  # fmt: skip
    told = _run([str(BENCHMARKS / "speed" / "hal_profile.py"), json.dumps(arguments)])
    found: dict[str, Any] = json.loads(told.strip().splitlines()[-1])
    return found


def script(store: Store, kind: str, *, quick: bool, threads: int, say: Say) -> None:
    """Run ``kernels.py`` or ``compile_time.py`` and keep what it writes as JSON."""
    if store.has(kind):
        return
    say(f"{kind}: running its own script")
    arguments = {
        "kernels": ["kernels.py", "--threads", str(threads), *(_FEW_KERNELS if quick else ())],
        "compile": ["compile_time.py", *(("--layers", "2", "--rounds", "1") if quick else ())],
    }[kind]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        try:
            _run([str(BENCHMARKS / arguments[0]), *arguments[1:], "--json", str(output)])
            store.fact(kind, {"result": json.loads(output.read_text())})
        except (Unavailable, OSError, ValueError) as error:
            store.fact(kind, {"error": str(error)})


def _run(arguments: list[str]) -> str:
    """What a script of ours prints.

    Raises:
        Unavailable: it fails or takes too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=_LIMIT
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{Path(arguments[0]).name} took more than {_LIMIT} s") from error
    if done.returncode:
        raise Unavailable(reason(done.stderr))
    return done.stdout
