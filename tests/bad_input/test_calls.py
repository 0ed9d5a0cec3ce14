"""Arguments of functions and of sessions."""

from __future__ import annotations

import dataclasses
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "w5a16"}, "no weight format 'w5a16'"),
        ({"kv_cache": "pagde"}, "kv_cache='pagde': unknown value 'pagde'"),
        ({"kv_cache": "latent,expanded"}, "asks for both 'latent' and 'expanded'"),
        ({"kv_cache": None}, "kv_cache=None is not text"),
        ({"target": []}, "no target is given"),
        ({"target": 5}, "target=5 is neither a name nor a list of names"),
        ({"target": ["host", None]}, "is neither a name nor a list of names"),
        ({"output": 5}, "output=5 is not a path"),
        ({"output": b"x"}, "output=b'x' is not a path"),
        ({"output": ""}, "output='' cannot be the name of a file"),
        ({"output": "a\0b"}, r"output='a\\x00b' cannot be the name of a file"),
    ],
    ids=str,
)
def test_bad_arguments_of_compile_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")
    with pytest.raises(hal.HalError, match=message) as caught:
        hal.compile(model, **options)
    assert caught.value.hint


@pytest.mark.parametrize("dynamic", [5, {"input": 0}, {"input": {0: 7}}], ids=str)
def test_bad_dynamic_axes_of_a_module_are_refused(dynamic: Any) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(hal.InputError, match="dynamic") as caught:
        hal.compile(torch.nn.ReLU(), (torch.ones(2, 3),), dynamic=dynamic)
    assert caught.value.hint


@pytest.mark.parametrize("path", [None, 5, "", "a\0b"], ids=repr)
def test_something_that_is_no_path_is_no_bundle(path: Any) -> None:
    with pytest.raises(hal.InputError, match="path=") as caught:
        hal.load(path)
    assert caught.value.hint


@pytest.mark.parametrize("command", ["run", "verify", "bench"])
def test_an_empty_path_on_the_command_line_is_not_this_folder(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case("", hal.InputError, lambda f: f, ("the path is empty",), f"see hal {command}")
    check_cli(case, [command, ""], capsys)
    case = dataclasses.replace(case, hint="see hal compile")
    check_cli(case, ["compile", "m.onnx", "-o", ""], capsys)


def test_things_that_are_no_models_are_refused() -> None:
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
