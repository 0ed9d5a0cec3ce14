"""The digits' network learns, and is written with the images to judge it on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import hal
from tests.examples.conftest import Load

pytest.importorskip("sklearn", reason="scikit-learn is in the extra [test]")


def test_the_network_learns_and_is_scored_by_its_own_files(load: Load, tmp_path: Path) -> None:
    load("train_digits").main(output=tmp_path, epochs=3, seed=0, threads=1)
    bundle = hal.compile(tmp_path / "digits.onnx", target="host:onnxruntime")
    found = hal.evaluate(bundle, inputs=tmp_path / "test.npz", labels=tmp_path / "labels.npy")
    assert found.examples == 600
    assert found.accuracy is not None
    assert found.accuracy.value > 0.9
    data = tmp_path / "calibration.npz"
    assert np.load(data)["images"].shape == (256, 1, 8, 8)
    codes = hal.compile(
        tmp_path / "digits.onnx", target="host:onnxruntime", quantize="w8a8", calibration=data
    )
    again = hal.evaluate(codes, inputs=tmp_path / "test.npz", labels=tmp_path / "labels.npy")
    assert again.accuracy is not None
    assert again.accuracy.value > found.accuracy.value - 0.005


def test_no_image_is_both_trained_on_and_tested(load: Load) -> None:
    train, train_labels, test, test_labels = load("train_digits").load_images(0)
    seen = {image.tobytes() for image in train}
    assert not any(image.tobytes() in seen for image in test)
    assert train.shape[1:] == test.shape[1:] == (1, 8, 8)
    assert len(train) == len(train_labels)
    assert np.bincount(test_labels).min() >= 55
