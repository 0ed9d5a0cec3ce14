"""hal.runtime.arrays: what callers may pass, and what they are told otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from hal.errors import InputError
from hal.ir import TensorSpec
from hal.runtime.arrays import as_numpy, check_inputs

X = TensorSpec("x", "float32", ("batch", 4))
Y = TensorSpec("y", "float32", ("batch",))


def test_numpy_passes_through_without_a_copy() -> None:
    array = np.zeros((2, 4), np.float32)
    assert as_numpy(array, X) is array


def test_dlpack_producers_share_memory() -> None:
    torch = pytest.importorskip("torch", reason="torch is an optional dependency")
    tensor = torch.zeros(2, 4)
    as_numpy(tensor, X)[0, 0] = 7
    assert tensor[0, 0] == 7


def test_lists_take_the_dtype_of_the_signature() -> None:
    assert as_numpy([[1, 2, 3, 4]], X).dtype == np.float32


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "input 'x' is missing"),
        ({"x": np.zeros((2, 4), np.float32), "y": np.zeros(2, np.float32), "z": 1}, "no input 'z'"),
        ({"x": np.zeros((2, 4)), "y": np.zeros(2, np.float32)}, "'x' has dtype float64"),
        ({"x": np.zeros(4, np.float32), "y": np.zeros(2, np.float32)}, "'x' has rank 1"),
        ({"x": np.zeros((2, 5), np.float32), "y": np.zeros(2, np.float32)}, "extent 5 on axis 1"),
        (
            {"x": np.zeros((2, 4), np.float32), "y": np.zeros(3, np.float32)},
            "batch=3.*'x' has batch=2",
        ),
        ({"x": "hello", "y": np.zeros(3, np.float32)}, "'x' cannot be read as float32"),
    ],
)
def test_wrong_inputs_are_named(given: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        check_inputs(given, [X, Y])
