"""Train a small convolutional network on scikit-learn's handwritten digits, in seconds.

    python examples/train_digits.py --output digits
    hal compile digits/digits.onnx -o digits.hal
    hal eval digits.hal --inputs digits/test.npz --labels digits/labels.npy
    hal compile digits/digits.onnx -o int8.hal --quantize w8a8 --calibration digits/calibration.npz
    hal eval int8.hal --inputs digits/test.npz --labels digits/labels.npy --against digits.hal

What is written:

    digits.onnx        float32, images [batch, 1, 8, 8] to scores [batch, 10]
    test.npz           images that training never saw, and
    labels.npy         their digits
    calibration.npz    some of the training images
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from hal.runtime.cache import cache_folder

TEST_IMAGES = 600
CALIBRATION_IMAGES = 256
BATCH = 64
PEAK_LEARNING_RATE = 5e-3


def load_images(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images float32 ``[n, 1, 8, 8]`` in 0..1 and digits int64 ``[n]``: training, then test."""
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    train, test, train_labels, test_labels = train_test_split(
        images,
        digits.target.astype(np.int64),
        test_size=TEST_IMAGES,
        stratify=digits.target,
        random_state=seed,
    )
    return train, train_labels, test, test_labels


def network() -> nn.Sequential:
    """Four convolutions with batch normalization; channels are multiples of 32."""

    def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        *block(64, 64, stride=2),
        *block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """Train ``model`` in place, images moved by up to a pixel."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=epochs * batches
    )
    model.train()
    for _ in range(epochs):
        for picked in torch.randperm(len(images))[: batches * BATCH].split(BATCH):
            shift = torch.randint(-1, 2, (2,)).tolist()
            scores = model(torch.roll(images[picked], shift, dims=(2, 3)))
            loss = nn.functional.cross_entropy(scores, labels[picked], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.train(False)


def save(model: nn.Module, output: Path) -> None:
    """Write ``digits.onnx`` with a free batch."""
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, 8, 8),),
        dynamo=True,
        opset_version=23,
        input_names=["images"],
        output_names=["scores"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    program.save(output / "digits.onnx")


def main(
    output: Annotated[
        Path | None, typer.Option(help="Directory to write to. [models/digits in hal's cache]")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 12,
    seed: Annotated[int, typer.Option(help="Seed of the split and of training.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train the network, and write it with images to test and to calibrate on."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    output = output or cache_folder("models") / "digits"
    output.mkdir(parents=True, exist_ok=True)

    images, labels, test, test_labels = load_images(seed)
    model = network()
    train(model, torch.from_numpy(images), torch.from_numpy(labels), epochs)
    with torch.no_grad():
        right = model(torch.from_numpy(test)).argmax(-1).numpy() == test_labels
    save(model, output)
    np.savez(output / "test.npz", images=test)
    np.save(output / "labels.npy", test_labels)
    np.savez(output / "calibration.npz", images=images[:CALIBRATION_IMAGES])
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{output}: {parameters:,} parameters, {right.sum()} of {len(right)} digits right")


if __name__ == "__main__":
    typer.run(main)
