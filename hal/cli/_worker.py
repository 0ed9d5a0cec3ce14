"""A process that holds one session and measures it when told to: a half of ``hal bench``.

One process for each target, so that load time and peak memory are that target's own, and so that
targets can be measured in turns. It reads one JSON request a line on stdin and answers with one
JSON line on stdout; see :class:`hal.cli._bench.Worker` for the other side.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from hal.errors import HalError

if TYPE_CHECKING:
    from hal.runtime.session import Session


def main() -> int:
    """Serve requests until stdin ends."""
    # Libraries print to stdout as they like; answers go to a private copy of it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session: Session | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                session, answer = _load(request)
            else:
                assert session is not None
                answer = _measure(session, request)
        except HalError as error:
            answer = {"error": error.message, "hint": error.hint}
        _send(answers, answer)
    return 0


def _send(stream: TextIO, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def _load(request: dict[str, Any]) -> tuple[Session, dict[str, Any]]:
    import hal
    import hal.runtime.session  # imports are not part of the load time

    start = time.perf_counter()
    bundle = hal.load(request["bundle"])
    session = bundle.session(request["target"], threads=request["threads"])
    seconds = time.perf_counter() - start
    return session, {"load_seconds": seconds, "target": session.target, "memory": peak_memory()}


def _measure(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """One round: ``runs`` calls, or a prompt and ``new_tokens`` decode steps."""
    if session.bundle.manifest.task == "causal-lm":
        answer = _measure_decoding(session, request)
    else:
        answer = _measure_calls(session, request)
    return {**answer, "memory": peak_memory()}


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


def _measure_decoding(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    vocabulary = int(session.bundle.manifest.metadata.get("vocab_size", 2))
    rng = np.random.default_rng(request["seed"])
    batch = request["extents"].get("batch", 1)
    name = session.inputs[0].name
    session.reset()
    start = time.perf_counter()
    prompt = rng.integers(0, vocabulary, (batch, request["prompt_tokens"]))
    session.run({name: prompt.astype(np.int64)})
    prefill = time.perf_counter() - start
    seconds = []
    token = np.ones((batch, 1), np.int64)
    for _ in range(request["runs"]):
        start = time.perf_counter()
        logits = session.run({name: token})["logits"]
        token = logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "prefill_seconds": prefill}


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
