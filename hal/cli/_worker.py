"""A process that holds one session and measures it when told to: a half of ``hal bench``.

One process for each target, so that load time and peak memory are that target's own, and so that
targets can be measured in turns. It reads one JSON request a line on stdin and answers with one
JSON line on stdout; see :class:`hal.cli._bench.Worker` for the other side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hal.errors import HalError

if TYPE_CHECKING:
    from hal.bundle import Bundle
    from hal.runtime.session import Session


@dataclasses.dataclass
class Loaded:
    """A session, how much of its state is the context, and the memory there was before it.

    ``context`` counts the tokens of the context at the front of the state.
    """

    session: Session
    context: int = 0
    before: Resident | None = None


@dataclasses.dataclass(frozen=True)
class Resident:
    """Bytes of a process that are in memory: its own, and pages of files that it maps."""

    anonymous: int
    mapped: int


def main() -> int:
    """Serve requests until stdin ends."""
    # Libraries print to stdout as they like; answers go to a private copy of it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loaded: Loaded | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                loaded, answer = _load(request)
            else:
                assert loaded is not None
                answer = _measure(loaded, request)
        except HalError as error:
            answer = {"error": error.message, "hint": error.hint}
        except Exception as error:  # noqa: BLE001 - of a backend, mostly; the other side tells it
            lines = [x.strip() for x in str(error).splitlines() if x.strip()]
            answer = {
                "error": f"a build failed: {type(error).__name__}: {' '.join(lines)[:300]}",
                "hint": "run it alone to see why: hal --debug run BUNDLE --target NAME",
            }
        _send(answers, answer)
    return 0


def _send(stream: TextIO, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def _load(request: dict[str, Any]) -> tuple[Loaded, dict[str, Any]]:
    import hal
    import hal.runtime.session

    _bring_in_libraries(hal.load(request["bundle"]), request["target"])
    before = resident_memory()
    start = time.perf_counter()
    bundle = hal.load(request["bundle"])
    session = bundle.session(request["target"], threads=request["threads"])
    seconds = time.perf_counter() - start
    loaded = Loaded(session, before=before)
    facts = {"load_seconds": seconds, "target": session.target, "memory": peak_memory()}
    return loaded, {**facts, "resident": _grown(loaded)}


def _bring_in_libraries(bundle: Bundle, target: str) -> None:
    """Import what runs a build: that is no part of its load time, nor of its memory."""
    from hal.runtime.opening import find_build
    from hal.targets import load_backend, resolve

    name = find_build(target, bundle.targets)
    with contextlib.suppress(HalError):  # told when the build is loaded
        route = resolve(name or target).route
        load_backend(route.backend).check_route(route)


def _measure(loaded: Loaded, request: dict[str, Any]) -> dict[str, Any]:
    """One round: ``runs`` calls, or a prompt and as many decode steps."""
    if loaded.session.bundle.manifest.task == "causal-lm":
        answer = _measure_decoding(loaded, request)
    else:
        answer = _measure_calls(loaded.session, request)
    return {**answer, "memory": peak_memory(), "resident": _grown(loaded)}


def _measure_calls(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    from hal.runtime.samples import sample_inputs

    metadata = session.bundle.manifest.metadata
    inputs = sample_inputs(
        session.inputs, seed=request["seed"], extents=request["extents"], metadata=metadata
    )
    seconds = []
    for _ in range(request["runs"]):
        start = time.perf_counter()
        session.run(inputs)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}


def _measure_decoding(loaded: Loaded, request: dict[str, Any]) -> dict[str, Any]:
    """The prompt on top of the context, then ``runs`` steps; the context itself is not timed."""
    import numpy as np

    session = loaded.session
    vocabulary = int(session.bundle.manifest.metadata.get("vocab_size", 2))
    rng = np.random.default_rng(request["seed"])
    batch, context = request["extents"].get("batch", 1), request["context"]
    prompt = rng.integers(0, vocabulary, (batch, request["prompt_tokens"]))
    _hold_context(loaded, context, batch, vocabulary, request["seed"])
    start = time.perf_counter()
    logits = _run_chunks(session, prompt)
    prefill = time.perf_counter() - start
    seconds = []
    name = session.inputs[0].name
    token = logits[:, -1:].argmax(-1)
    for _ in range(request["runs"]):
        start = time.perf_counter()
        logits = session.run({name: token})["logits"]
        token = logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "prefill_seconds": prefill}


def _hold_context(loaded: Loaded, context: int, batch: int, vocabulary: int, seed: int) -> None:
    """Bring the state to ``context`` random tokens, from what it holds if it can go back."""
    import numpy as np

    session = loaded.session
    try:
        session.trim(min(loaded.context, context))
    except HalError:
        session.reset()
    if session.position == 0:
        session.reset()
    # The same sequence for every context, so that a longer one goes on where a shorter one ended.
    rng = np.random.default_rng([seed, 1])
    ids = rng.integers(0, vocabulary, (context, batch)).T
    if session.position < context:
        _run_chunks(session, ids[:, session.position :])
    loaded.context = context


def _run_chunks(session: Session, ids: Any) -> Any:
    """Logits [batch, 1, vocab] after the last of ``ids`` [batch, n]."""
    import numpy as np

    from hal.runtime.generate import PREFILL_CHUNK

    logits = None
    for at in range(0, ids.shape[1], PREFILL_CHUNK):
        chunk = np.ascontiguousarray(ids[:, at : at + PREFILL_CHUNK], np.int64)
        logits = session.run({session.inputs[0].name: chunk}, logits="last")["logits"]
    return logits


def resident_memory() -> Resident | None:
    """What of this process is in memory now; None where the system does not say."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        lines = dict(line.split(":", 1) for line in text.splitlines() if line.startswith("Rss"))
        return Resident(*(int(lines[k].split()[0]) * 1024 for k in ("RssAnon", "RssFile")))
    except (OSError, KeyError, ValueError):
        return None


def _grown(loaded: Loaded) -> dict[str, int] | None:
    """What the session has added to the process's memory so far."""
    now, before = resident_memory(), loaded.before
    if now is None or before is None:
        return None
    return {
        "anonymous_bytes": max(0, now.anonymous - before.anonymous),
        "mapped_bytes": max(0, now.mapped - before.mapped),
    }


def peak_memory() -> int | None:
    """Largest resident set of this process so far, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


if __name__ == "__main__":
    raise SystemExit(main())
