"""Formats, caches and wrong inputs as cases of a target's conformance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

import hal
import hal.conformance.running
from hal.conformance import further_cases, model_cases, node_cases, run_case, select
from hal.conformance.running import faults
from hal.errors import InputError, TargetError
from hal.ir import TensorSpec

CASES = {case.name: case for case in further_cases()}


@pytest.mark.parametrize("name", ["mlp-w2a16", "mlp-w8a8", "mlp-mxfp4", "mlp-faults"])
def test_a_runtime_that_is_right_passes(name: str) -> None:
    outcome = run_case(CASES[name], "host:onnxruntime", False, False)
    assert (outcome.status, outcome.reason) == ("passed", "")


def test_a_cache_of_codes_is_compared_with_itself() -> None:
    outcome = run_case(CASES["language-model-int8"], "host:onnxruntime", False, False)
    assert outcome.status == "passed"


def test_small_models_are_tried_with_all_of_them() -> None:
    names = [case.name for case in select("host", models=True).cases]
    assert names == [*(case.name for case in model_cases()), *CASES]


class _Session:
    """Answers with what ``run`` gives."""

    def __init__(self, run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.run = run
        self.inputs = [TensorSpec("x", "FLOAT", (1, 4))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


def _checked(inputs: dict[str, Any]) -> dict[str, Any]:
    if set(inputs) != {"x"} or inputs["x"].dtype != np.float32 or inputs["x"].shape != (1, 4):
        raise InputError("wrong", "right")
    return {"y": inputs["x"]}


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (_checked, ""),
        (lambda inputs: {"y": inputs.get("x")}, "a missing input is not refused"),
        (lambda inputs: {"y": inputs["x"]}, "a missing input raises KeyError: 'x'"),
    ],
)
def test_what_is_done_wrong_is_said(run: Any, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hal.Bundle, "session", lambda *_: _Session(run))
    assert faults(hal.Bundle.__new__(hal.Bundle), "any") == told


def test_a_session_that_remembers_a_wrong_call_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        calls.append(inputs)
        return {name: value + len(calls) for name, value in _checked(inputs).items()}

    monkeypatch.setattr(hal.Bundle, "session", lambda *_: _Session(run))
    told = faults(hal.Bundle.__new__(hal.Bundle), "any")
    assert told == "right inputs give other results after wrong ones"


def test_the_models_are_written_where_they_are_asked_for(tmp_path: Path) -> None:
    assert CASES["mlp-faults"].write(tmp_path).parent == tmp_path


def test_what_this_machine_cannot_run_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> Any:
        raise TargetError("no driver")

    monkeypatch.setattr(hal.conformance.running, "cannot_run", lambda _: "no driver")
    monkeypatch.setattr(hal.Bundle, "session", absent)
    (relu,) = (case for case in node_cases() if case.name == "test_relu")
    for case in (relu, CASES["mlp-faults"]):
        outcome = run_case(case, "host:onnxruntime", False, False)
        assert (outcome.status, outcome.reason) == ("built, not run", "no driver")
