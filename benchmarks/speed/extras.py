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
from speed.cells import Group
from speed.failures import Unavailable, reason
from speed.measure import Say
from speed.store import Store

BENCHMARKS = Path(__file__).resolve().parents[1]
_LIMIT = 3600


def profiles(
    store: Store, groups: Sequence[Group], artifacts: Artifacts, threads: int, say: Say
) -> None:
    """Time by kernel of hal's contenders, for each group of language models."""
    if store.has("profiles"):
        return
    found: dict[str, Any] = dict(store.data.get("profiles", {}))
    for group in groups:
        if group.cold:
            continue
        requests = [dict(m.request) for m in group.measures]
        for contender in group.contenders:
            if contender.family != "hal" or contender.artifact is None:
                continue
            say(f"{group.title}: profile of {contender.name}")
            arguments = {
                "target": dict(contender.options)["target"], "threads": threads,
                "requests": {m.key: r for m, r in zip(group.measures, requests, strict=True)},
                "first": dict(group.measures[0].first),
            }  # fmt: skip
            try:
                arguments["artifact"] = str(artifacts.path(contender.artifact))
                told = _run([str(BENCHMARKS / "speed" / "hal_profile.py"), json.dumps(arguments)])
                found.setdefault(group.key, {})[contender.name] = json.loads(
                    told.strip().splitlines()[-1]
                )
            except Unavailable as error:
                found.setdefault(group.key, {})[contender.name] = {"error": str(error)}
    store.fact("profiles", found)


def script(store: Store, kind: str, *, quick: bool, threads: int, say: Say) -> None:
    """Run ``kernels.py`` or ``compile_time.py`` and keep what it writes as JSON."""
    if store.has(kind):
        return
    say(f"{kind}: running its own script")
    arguments = {
        "kernels": ["kernels.py", "--threads", str(threads)],
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
