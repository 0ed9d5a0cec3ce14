"""``hal bench BUNDLE --compare-float FLOAT``: whether one bundle is faster than another."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.cli._options import open_bundle
from hal.cli._output import format_bytes, print_line, print_table
from hal.errors import InputError

if TYPE_CHECKING:
    from hal.bundle import Bundle
    from hal.cli._bench import Case, Figures, Samples

_SAME = 0.05
"""Medians that differ by less are not called faster or slower."""


def second_bundle(bundle: Bundle, floats: Path | None, against: Path | None) -> Bundle | None:
    """The bundle to compare with, opened; None if there is none.

    Raises:
        InputError: two are given, they are for different tasks, or what should be floats is not.
    """
    if floats is not None and against is not None:
        raise InputError("--compare-float and --against are both given", "give one of them")
    path = floats or against
    if path is None:
        return None
    other = open_bundle(path)
    tasks = bundle.manifest.task, other.manifest.task
    if tasks[0] != tasks[1]:
        raise InputError(
            f"{bundle.path} is for {tasks[0]!r}, {path} for {tasks[1]!r}",
            "compare bundles of one model",
        )
    if floats is not None:
        for each, wanted in ((bundle, True), (other, False)):
            if bool(each.manifest.metadata.get("quantization")) is not wanted:
                state = "not quantized" if wanted else "quantized itself"
                raise InputError(
                    f"--compare-float: {each.path} is {state}",
                    "hal bench QUANTIZED --compare-float FLOAT; any two bundles: --against",
                )
    return other


def comparison(
    figures: Sequence[Figures], *, runs: int, words: tuple[str, str]
) -> list[dict[str, Any]]:
    """Ratios for figures that come in pairs (a bundle, the other one), one of each case.

    ``times_faster`` is the other's median over the bundle's own, ``by_round`` the smallest and
    largest of the same within a round of ``runs``; ``words`` name the two.
    """
    found = []
    for own, other in zip(figures[::2], figures[1::2], strict=True):
        for case, samples in own.cases.items():
            found.append(_compared(own.target, case, samples, other.cases[case], runs, words))
    return found


def _compared(
    target: str, case: Case, own: Samples, other: Samples, runs: int, words: tuple[str, str]
) -> dict[str, Any]:
    result: dict[str, Any] = {"target": target}
    calls = _ratio(own.seconds, other.seconds, runs)
    if not own.prefill_seconds:
        sentence = f"{target}: {words[0]} is {_verdict(calls, words[1])}"
        return {**result, **calls, "sentence": sentence}
    prompt = _ratio(own.prefill_seconds, other.prefill_seconds, 1)
    sentence = (
        f"{target}, context {case.context}, prompt {case.prompt_tokens}: {words[0]} is "
        f"{_verdict(calls, words[1])} in decoding, {_verdict(prompt, words[1])} on the prompt"
    )
    return {
        **result,
        "context": case.context,
        "prompt_tokens": case.prompt_tokens,
        **calls,
        "prefill": prompt,
        "sentence": sentence,
    }


def _ratio(own: Sequence[float], other: Sequence[float], runs: int) -> dict[str, Any]:
    """How many times faster ``own`` is, and in single rounds of ``runs`` at the least and most."""
    starts = range(0, len(own), runs)
    rounds = [_medians(own[i : i + runs], other[i : i + runs]) for i in starts]
    ratio, low, high = _medians(own, other), min(rounds), max(rounds)
    gains = abs(ratio - 1) >= _SAME and (len(rounds) == 1 or (low > 1) == (high > 1))
    verdict = "same" if not gains else "faster" if ratio > 1 else "slower"
    return {"times_faster": ratio, "by_round": [low, high], "verdict": verdict}


def _medians(own: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(other) / statistics.median(own)


def _verdict(ratio: dict[str, Any], than: str) -> str:
    low, high = ratio["by_round"]
    if ratio["verdict"] == "same":
        return f"as fast as {than} ({low:.2f} to {high:.2f} times by round)"
    slower = ratio["verdict"] == "slower"
    turn: Callable[[float], float] = (lambda x: 1 / x) if slower else (lambda x: x)
    low, high = sorted((turn(low), turn(high)))
    word = "slower" if slower else "faster"
    return f"{turn(ratio['times_faster']):.2f}x {word} than {than} ({low:.2f} to {high:.2f})"


def print_comparison(result: dict[str, Any]) -> None:
    """Memory of each build, its own and mapped, and the sentences."""
    rows = [
        [
            f"{item['target']}, {Path(item['bundle']).name}",
            *_resident(item["resident_at_load"]),
            *_resident(item["resident"]),
        ]
        for item in result["targets"]
    ]
    columns = ("own, loaded", "mapped, loaded", "own, after the calls", "mapped, after the calls")
    print_table("memory that the session added", ("build", *columns), rows)
    for item in result["comparison"]:
        print_line(item["sentence"])


def _resident(found: dict[str, int] | None) -> list[str]:
    if found is None:
        return ["?", "?"]
    return [format_bytes(found["anonymous_bytes"]), format_bytes(found["mapped_bytes"])]


__all__ = ["comparison", "print_comparison", "second_bundle"]
