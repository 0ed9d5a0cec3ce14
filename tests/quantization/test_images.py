from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hal import InputError
from hal.ir import Graph
from hal.quantization.data import load_calibration
from tests.passes.quantize.cnn import images, network
from tests.passes.toys import Toy

Image = pytest.importorskip("PIL.Image")


def picture(folder: Path, name: str, width: int = 16, height: int = 16, mode: str = "RGB") -> None:
    rng = np.random.default_rng(len(name))
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode).save(folder / name)


def takes(dims: list[int | str], dtype: str = "FLOAT") -> Graph:
    toy = Toy()
    toy.output(toy("Identity", toy.add_input("x", dims, dtype)), "y")
    return toy.graph()


def arrays(folder: Path, graph: Graph) -> list[np.ndarray]:
    return [np.asarray(sample["x"]) for sample in load_calibration(folder, graph, None).samples]


def test_values_are_zero_to_one_in_the_layout_of_the_input(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    right = np.asarray(Image.open(tmp_path / "a.png"), np.float32) / 255
    (first,) = arrays(tmp_path, takes(["n", 3, 16, 16]))
    np.testing.assert_allclose(first[0], np.moveaxis(right, 2, 0), atol=1e-6)
    (last,) = arrays(tmp_path, takes(["n", 16, 16, 3]))
    np.testing.assert_allclose(last[0], right, atol=1e-6)
    (whole,) = arrays(tmp_path, takes(["n", 16, 16, 3], "UINT8"))
    np.testing.assert_array_equal(whole[0], np.asarray(Image.open(tmp_path / "a.png")))


def test_images_take_the_size_and_the_channels_of_the_input(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    picture(tmp_path, "a.png", 40, 20)
    picture(tmp_path / "class", "b.JPG".lower(), 10, 30, "L")
    picture(tmp_path, "c.png", 9, 9, "RGBA")
    assert [a.shape for a in arrays(tmp_path, takes([1, 1, 12, 8]))] == [(1, 1, 12, 8)] * 3
    assert [a.shape for a in arrays(tmp_path, takes([2, 3, 12, 8]))] == [(2, 3, 12, 8)]
    shapes = [a.shape for a in arrays(tmp_path, takes(["n", 3, "h", "w"]))]
    assert shapes == [(1, 3, 20, 40), (1, 3, 9, 9), (1, 3, 30, 10)]


def test_a_configuration_gives_mean_and_deviation(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    (plain,) = arrays(tmp_path, takes(["n", 3, 16, 16]))
    config = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.25], "size": 16}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    (changed,) = arrays(tmp_path, takes(["n", 3, 16, 16]))
    mean, std = (np.asarray(config[k])[:, None, None] for k in ("image_mean", "image_std"))
    np.testing.assert_allclose(changed[0], (plain[0] - mean) / std, atol=1e-5)


@pytest.mark.parametrize("text", ["{", "[1]", '{"image_mean": [1, 2]}', '{"image_std": 0}'])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    picture(tmp_path, "a.png")
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        arrays(tmp_path, takes(["n", 3, 16, 16]))


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    graph = takes(["n", 3, 16, 16])
    with pytest.raises(InputError, match="holds no images"):
        arrays(tmp_path, graph)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(InputError, match=r"broken.png is no image"):
        arrays(tmp_path, graph)
    (tmp_path / "broken.png").unlink()
    picture(tmp_path, "a.png")
    with pytest.raises(InputError, match="takes 2 at a time"):
        arrays(tmp_path, takes([2, 3, 16, 16]))
    for other in (takes(["n", 5, 16, 16]), takes(["n", 16]), takes(["n", 3, 16, 16], "INT64")):
        with pytest.raises(InputError, match="which is no image"):
            arrays(tmp_path, other)
    toy = Toy(a=["n", 3, 8, 8], b=["n", 3, 8, 8])
    toy.output(toy("Add", toy.a, toy.b), "y")
    with pytest.raises(InputError, match="more than an image"):
        arrays(tmp_path, toy.graph())


def test_arrays_are_cut_into_calls() -> None:
    graph = network()
    (whole,) = load_calibration({"x": images(8)}, graph, None).samples
    assert len(whole["x"]) == 8
    many = np.zeros((2000, 3, 16, 16), np.float32)
    calls = load_calibration(many, graph, None).samples
    assert len(calls) == 2
    assert sum(len(call["x"]) for call in calls) == 2000
    fixed = load_calibration({"x": many[:7]}, takes([2, 3, 16, 16]), None).samples
    assert [call["x"].shape for call in fixed] == [(2, 3, 16, 16)] * 3


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 3, 8, 8), np.float32), r"float32\[4, 3, 8, 8\]"),
        (np.zeros((0, 3, 16, 16), np.float32), "empty"),
        (np.zeros((4, 3, 16, 16), np.float64), "float64"),
        (np.full((4, 3, 16, 16), np.nan, np.float32), "infinities or NaN"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_calibration({"x": array}, network(), None)
    assert caught.value.hint
