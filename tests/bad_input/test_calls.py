"""Arguments of functions and of sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hal
from tests import files
from tests.bad_input.cases import ROUTE, Case, check_cli


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> hal.Bundle:
    """``total = a + b``, ``difference = a - b``, int64 [n, 2]."""
    folder = tmp_path_factory.mktemp("pair")
    return hal.compile(
        files.two_in_two_out(folder / "pair.onnx"), target=ROUTE, output=folder / "pair.hal"
    )


GOOD_PAIR = {"a": np.array([[1, 2]]), "b": np.array([[3, 4]])}
CALLS = [
    ("wrong name", {"aa": GOOD_PAIR["a"], "b": GOOD_PAIR["b"]}, "there is no input 'aa'", "mean"),
    ("missing", {"a": GOOD_PAIR["a"]}, "input 'b' is missing", "expected"),
    (
        "wrong dtype",
        {**GOOD_PAIR, "b": np.array([[3.0, 4.0]])},
        "input 'b' has dtype float64, expected int64",
        "astype",
    ),
    (
        "wrong rank",
        {**GOOD_PAIR, "b": np.array([3, 4])},
        "input 'b' has rank 1 ([2]), expected",
        "axes",
    ),
    (
        "wrong static extent",
        {**GOOD_PAIR, "b": np.array([[3, 4, 5]])},
        "input 'b' has extent 3 on axis 1, expected 2",
        "static",
    ),
    (
        "extents that disagree",
        {**GOOD_PAIR, "b": np.array([[3, 4], [5, 6]])},
        "input 'b' has n=2 on axis 0, but input 'a' has n=1",
        "agree",
    ),
]
calls = pytest.mark.parametrize(
    ("given", "message", "hint"), [pytest.param(*c[1:], id=c[0]) for c in CALLS]
)


@calls
def test_a_bad_call_is_refused(
    pair: hal.Bundle, given: dict[str, np.ndarray], message: str, hint: str
) -> None:
    with pair.session() as session:
        with pytest.raises(hal.InputError) as caught:
            session.run(given)
        assert message in caught.value.message
        assert hint in caught.value.hint
        assert session(**GOOD_PAIR)[0].tolist() == [[4, 6]]  # the session still works


@calls
def test_a_bad_call_is_refused_on_the_command_line(
    pair: hal.Bundle,
    given: dict[str, np.ndarray],
    message: str,
    hint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: list[str] = []
    for name, array in given.items():
        np.save(tmp_path / f"{name}.npy", array)
        options += ["--input", f"{name}={tmp_path / name}.npy"]
    case = Case("", hal.InputError, lambda folder: folder, (message,), hint)
    output = tmp_path / "out.npz"
    check_cli(case, ["run", str(pair.path), *options, "-o", str(output)], capsys)
    assert not output.exists()


@pytest.mark.parametrize("value", [object(), "text", [[1, 2], [3]], None])
def test_something_that_is_no_array_is_refused(pair: hal.Bundle, value: Any) -> None:
    with pair.session() as session, pytest.raises(hal.InputError, match="input 'b'") as caught:
        session(GOOD_PAIR["a"], value)
    assert caught.value.hint


def test_bad_arguments_of_compile_are_refused(pair: hal.Bundle, tmp_path: Path) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")
    for options, message in (
        ({"quantize": "w4a16"}, "quantize='w4a16' is not available in this version"),
        ({"kv_cache": "paged"}, "kv_cache='paged' is not available in this version"),
        ({"target": []}, "no target is given"),
    ):
        with pytest.raises(hal.HalError, match=message) as caught:
            hal.compile(model, **options)
        assert caught.value.hint
    for thing in (3, None, {"a": 1}, np.zeros(3)):
        with pytest.raises(hal.ModelError, match="cannot load a") as caught:
            hal.compile(thing)
        assert caught.value.hint


def test_dynamic_axes_of_a_file_are_refused(tmp_path: Path) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")
    with pytest.raises(hal.InputError, match="fixed in the file"):
        hal.compile(model, dynamic={"x": {0: "batch"}})
    with pytest.raises(hal.InputError, match="no input 'q'"):
        hal.compile(model, inputs={"q": np.ones((2, 24), np.float32)})
