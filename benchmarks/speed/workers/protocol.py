"""The side of a contender that runs in its own process: one JSON line in, one out.

It runs in the environments of peers, so it needs NumPy and nothing else, and nothing of hal. The
process gets its options as JSON, loads once, says that it is ready, and then answers commands:

    {"do": "decode", "context": 64, "tokens": 64, "seed": 0}   -> {"seconds": [...], "foreign": …}
    {"do": "hold", "context": 8192, "seed": 0}                 the cache keeps a long context
    {"do": "decode", "tokens": 16}                             goes on from what the cache holds
    {"do": "prefill", "tokens": 256, "seed": 0}                -> {"seconds": [total]}
    {"do": "calls", "runs": 20}                                -> {"seconds": [...]}
    {"do": "memory"}

``foreign`` is the share of the machine's processor time that other processes took meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

Options = dict[str, Any]
Answer = dict[str, Any]
CHUNK = 512
"""Tokens in one run while a long context is read, for all contenders."""
_LOWEST, _HIGHEST = 4, 300
WARM = 3
"""Calls before those that count."""
_LONG = 4.0
"""Seconds after which calls are enough, however many were asked for."""


class Model(Protocol):
    """What answers commands; a language model derives from :class:`LanguageModel`."""

    def answer(self, request: Options) -> Answer:
        """Do what a command says.

        Raises:
            ValueError: there is no such command.
        """
        ...


class LanguageModel:
    """Commands of language models in terms of two steps that every runtime has."""

    def reset(self, room: int) -> None:
        """Forget all tokens; at most ``room`` will come."""
        raise NotImplementedError

    def feed(self, ids: list[int]) -> int:
        """Run new tokens on top of those that were seen; the likeliest next one."""
        raise NotImplementedError

    def answer(self, request: Options) -> Answer:
        """Do what a command says."""
        do = request["do"]
        if do == "hold":
            self._next = self._hold(request["context"], request["room"], request["seed"])
            return {}
        if do == "prefill":
            return self.prefill(request["tokens"], request["seed"])
        if do == "decode":
            return self.decode(request)
        raise ValueError(f"a language model has no command {do!r}")

    def prefill(self, tokens: int, seed: int) -> Answer:
        """Time of a prompt up to its first token, from nothing."""
        ids = prompt(tokens, seed)
        self.reset(tokens + 1)
        with Region() as region:
            found = self.feed(ids)
        return {"seconds": [region.wall], "foreign": region.foreign, "tokens": [found]}

    def decode(self, request: Options) -> Answer:
        """Times of single tokens, after a context or where the last command ended."""
        count = request["tokens"]
        if "context" in request:
            context = request["context"]
            self._next = self._hold(context, context + count + 1, request["seed"])
        seconds, tokens = [], []
        with Region() as region:
            for _ in range(count):
                start = time.perf_counter()
                self._next = self.feed([self._next])
                seconds.append(time.perf_counter() - start)
                tokens.append(self._next)
        return {"seconds": seconds, "foreign": region.foreign, "tokens": tokens}

    def _hold(self, context: int, room: int, seed: int) -> int:
        ids = prompt(context, seed)
        self.reset(room)
        found = 0
        for at in range(0, context, CHUNK):
            found = self.feed(ids[at : at + CHUNK])
        return found


class Caller:
    """Commands of models without state: the same call again and again."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call

    def answer(self, request: Options) -> Answer:
        """Time calls; a few before them are not counted."""
        if request["do"] != "calls":
            raise ValueError(f"a model without state has no command {request['do']!r}")
        for _ in range(WARM):
            self._call()
        seconds = []
        with Region() as region:
            for _ in range(request["runs"]):
                start = time.perf_counter()
                self._call()
                seconds.append(time.perf_counter() - start)
                if sum(seconds) > _LONG and len(seconds) >= WARM:
                    break
        return {"seconds": seconds, "foreign": region.foreign}


class Region:
    """Wall time of a block, and the share of processor time that others took meanwhile."""

    wall = 0.0
    foreign: float | None = None

    def __enter__(self) -> Self:
        self._all, self._own = machine_ticks(), own_seconds()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._start
        own = own_seconds() - self._own
        self.foreign = foreign_share(self._all, machine_ticks(), own)


def machine_ticks() -> tuple[int, int] | None:
    """All processors' clock ticks so far, in all and idle; None where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    ticks = [int(field) for field in fields]
    return sum(ticks), ticks[3] + ticks[4]


def foreign_share(
    before: tuple[int, int] | None, after: tuple[int, int] | None, own: float
) -> float | None:
    """Part of the processors' time between two readings that neither idled nor was ``own`` s."""
    if before is None or after is None:
        return None
    total = after[0] - before[0]
    busy = total - (after[1] - before[1])
    return max(0.0, busy - own * os.sysconf("SC_CLK_TCK")) / max(1, total)


def own_seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def prompt(tokens: int, seed: int) -> list[int]:
    """The same ids for every contender; the smallest vocabulary has them all."""
    found: list[int] = np.random.default_rng(seed).integers(_LOWEST, _HIGHEST, tokens).tolist()
    return found


def memory() -> dict[str, int]:
    """Bytes of this process: largest resident set so far, own and mapped pages that are in now."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return {}
    lines = dict(
        line.split(":", 1) for line in text.splitlines() if line.startswith(("VmH", "Rss"))
    )
    names = {"peak": "VmHWM", "own": "RssAnon", "mapped": "RssFile"}
    return {key: int(lines[name].split()[0]) * 1024 for key, name in names.items()}


def serve(bring_in: Callable[[Options], None], load: Callable[[Options], Model]) -> None:
    """Load what the command line says, and answer until stdin ends.

    ``bring_in`` imports libraries: told apart from loading, in time and memory.
    """
    # Libraries print to stdout as they like; answers go to a private copy of it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(answer: Answer) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        send(_ready(model := _Loading(bring_in, load)))
    except Exception as error:  # noqa: BLE001 - any runtime's error is told to the other side
        send({"error": f"{type(error).__name__}: {error}"[:4000]})
        return
    for line in sys.stdin:
        request = json.loads(line)
        try:
            done = {} if request["do"] == "memory" else model.loaded.answer(request)
            send({**done, "memory": memory(), "cpu_seconds": own_seconds()})
        except Exception as error:  # noqa: BLE001
            send({"error": f"{type(error).__name__}: {error}"[:4000]})


class _Loading:
    def __init__(
        self, bring_in: Callable[[Options], None], load: Callable[[Options], Model]
    ) -> None:
        options = json.loads(sys.argv[1])
        start = time.perf_counter()
        bring_in(options)
        self.import_seconds = time.perf_counter() - start
        self.before = memory()
        start = time.perf_counter()
        self.loaded = load(options)
        self.load_seconds = time.perf_counter() - start


def _ready(model: _Loading) -> Answer:
    return {
        "import_seconds": model.import_seconds,
        "load_seconds": model.load_seconds,
        "memory_before": model.before,
        "memory": memory(),
        **getattr(model.loaded, "facts", {}),
    }
