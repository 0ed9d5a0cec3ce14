"""From stored samples to figures, verdicts and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from speed import goals, report
from speed.cells import Group, Measure
from speed.figures import best, figure, times_faster
from speed.store import Store


def row(name: str, family: str, *values: float, spoiled: int = 0, **more: Any) -> dict[str, Any]:
    """A row whose first ``spoiled`` samples were disturbed."""
    samples = [
        {"value": v, "foreign": 0.5 if i < spoiled else 0.0, "spoiled": i < spoiled, **more}
        for i, v in enumerate(values)
    ]
    return {"name": name, "family": family, "samples": samples}


def cell(*rows: dict[str, Any], unit: str = "tok/s", **facts: Any) -> dict[str, Any]:
    return {
        "group": "a group", "title": "a measure", "unit": unit,
        "higher_is_better": unit == "tok/s", "facts": facts, "rows": list(rows),
    }  # fmt: skip


def verdicts(key: str, found: dict[str, Any], **more: dict[str, Any]) -> list[goals.Verdict]:
    return goals.judge({key: found, **more})


def test_disturbed_samples_do_not_count() -> None:
    found = figure(row("a", "hal", 1.0, 9.0, 10.0, 11.0, spoiled=1))
    assert found is not None
    assert (found.median, found.low, found.high, found.samples) == (10.0, 9.0, 11.0, 3)
    assert found.spoiled == 1
    assert not found.disturbed


def test_all_samples_count_and_are_marked_where_most_are_disturbed() -> None:
    found = figure(row("a", "hal", 1.0, 2.0, 10.0, spoiled=2))
    assert found is not None
    assert found.median == 2.0
    assert found.disturbed


def test_a_contender_that_failed_has_no_figure_and_does_not_compete() -> None:
    failed = {**row("a", "peer", 99.0), "error": "died"}
    assert figure(failed) is None
    found = best(cell(failed, row("b", "peer", 3.0)), "peer")
    assert found is not None
    assert found.name == "b"


@pytest.mark.parametrize(("unit", "ratio"), [("tok/s", 2.0), ("ms", 0.5)])
def test_the_ratio_is_above_one_where_hal_is_faster(unit: str, ratio: float) -> None:
    found = cell(row("h", "hal", 10.0), row("p", "peer", 5.0), unit=unit)
    assert times_faster(found) == ratio


def test_decoding_is_judged_beside_peers_and_beside_memory() -> None:
    found = cell(
        row("memory", "machine", 32.0), row("h", "hal", 120.0), row("p", "peer", 100.0),
        bytes_per_token=240e6,
    )  # fmt: skip
    first, second = verdicts("llm/llama/4-bit/decode", found)
    assert (first.word, first.number) == ("missed", 1)
    assert first.found.startswith("1.20 x")
    assert second.word == "met"
    assert second.found.startswith("90%")


def test_disturbed_samples_decide_nothing() -> None:
    found = cell(row("h", "hal", 10.0, spoiled=1), row("p", "peer", 5.0))
    (verdict,) = verdicts("llm/llama/8-bit/prefill-256", found)
    assert verdict.found.endswith(" †")
    assert verdict.word == "not measured"


def test_a_cell_without_peers_is_not_measured_and_not_met() -> None:
    (found,) = verdicts("llm/llama/8-bit/prefill-256", cell(row("h", "hal", 10.0)))
    assert found.word == "not measured"


def test_half_floats_of_peers_are_beaten_by_floats_only_if_they_are_faster() -> None:
    half = cell(row("p", "peer", 42.0))
    floats = cell(row("h", "hal", 21.0), row("p", "peer", 20.0))
    found = verdicts(
        "llm/llama/bfloat16/decode", half, **{"llm/llama/float32/decode": floats}
    )  # fmt: skip
    assert {v.cell: v.word for v in found} == {
        "llm/llama/bfloat16/decode": "missed",
        "llm/llama/float32/decode": "met",
    }


def test_two_of_four_networks_must_be_faster() -> None:
    def network(milliseconds: float) -> dict[str, Any]:
        return cell(row("h", "hal", milliseconds), row("p", "peer", 10.0), unit="ms")

    cells = {
        f"cnn/{n}/float32/batch-1": network(t)
        for n, t in {"a": 8, "b": 9, "c": 10, "d": 11}.items()
    }
    words = [(v.cell, v.word) for v in goals.judge(cells)]
    assert words[-1] == ("cnn", "met")
    assert [word for _, word in words] == ["met", "met", "met", "missed", "met"]


def test_peak_memory_is_judged_with_and_without_libraries() -> None:
    found = cell(
        row("h", "hal", 330.0, libraries=120.0, weights_bytes=200_000_000),
        unit="MB", cache_bytes=10_000_000,
    )  # fmt: skip
    whole, grown = verdicts("llm/llama/4-bit-cold/peak-memory", found)
    assert (whole.word, grown.word) == ("missed", "met")
    assert "240 MB" in whole.wanted


def test_the_page_has_every_contender_every_reason_and_the_profile_of_what_is_missed() -> None:
    failed = {**row("other", "peer"), "error": "no environment: pip found nothing"}
    found = cell(
        row("memory", "machine", 30.0), row("h", "hal", 50.0, 52.0), row("p", "peer", 100.0),
        failed, bytes_per_token=240e6,
    )  # fmt: skip
    shares = {"wall_seconds": 1.0, "kernels": {"matmul": 0.75}, "other_kernels": 0.05, "rest": 0.2}
    data = {
        "cells": {"llm/llama/4-bit/decode": found},
        "profiles": {"llm/llama/4-bit": {"h": {"decode": shares, "prefill-256": shares}}},
        "kernels": {"error": "no --json"},
    }
    text = "\n".join(report.page(data, "speed.json"))
    assert "| other | did not run |" in text
    assert "- other: no environment: pip found nothing" in text
    assert "| h | **51** (50–52) |" in text
    assert "0 met, 2 missed, 0 not measured" in text
    assert "`llm/llama/4-bit/decode`, h: matmul 75%, others 5%, rest 20%" in text
    assert "prefill-256`, h" not in text
    assert "Not measured: no --json" in text


def test_figures_of_an_earlier_run_say_on_what_they_were_measured(tmp_path: Path) -> None:
    facts = {"flags": [], "cores": 2, "threads": 2, "memory_gb": 8, "system": "Linux", "rounds": 3,
             "python": "3", "versions": {}, "quick": False}  # fmt: skip
    store = Store(tmp_path / "speed.json", resume=False)
    for date, cpu, title in (("Monday", "old", "first"), ("Tuesday", "new", "second")):
        store.fact("machine", {**facts, "date": date, "cpu": cpu})
        measure = Measure("calls", "one image", (), "ms")
        store.put(
            Group(f"cnn/{title}", "cnn", title, (), (measure,)), measure, [row("h", "hal", 1.0)]
        )
    text = "\n".join(report.page(store.data, "speed.json"))
    assert text.startswith("# Speed")
    assert "Tuesday, new, 2 cores" in text
    assert "### first\n\nMeasured Monday on old, 2 threads." in text
    assert "### second\n\n|" in text
