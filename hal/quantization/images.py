"""A folder of images as samples for a model that takes one.

What is done to them is neutral. The input says the layout (``[N, C, H, W]`` or ``[N, H, W, C]``)
and the size: images are scaled to cover it and cut in the middle, or kept where it is free. Values
are 0 to 1, or 0 to 255 for an input of uint8. A ``preprocessor_config.json`` in the folder, as
Hugging Face models have it, gives ``image_mean`` and ``image_std`` for each channel.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from hal.errors import InputError, MissingExtraError
from hal.ir import Graph, TensorSpec

MOST_IMAGES = 512
"""Images that are taken of a folder, spread over their names in order."""

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
_CONFIG = "preprocessor_config.json"
_SCALED_BY = 1 / 255


@dataclasses.dataclass(frozen=True)
class _Picture:
    """How the model takes an image.

    Attributes:
        name: the input.
        dtype: of its elements.
        batch: images in a call; None: as many as one likes.
        channels: 1 or 3.
        size: height and width; None: the image's own.
        last: channels are the last axis.
        mean: to subtract from each channel (values 0 to 1), and
        std: to divide by.
    """

    name: str
    dtype: np.dtype[Any]
    batch: int | None
    channels: int
    size: tuple[int, int] | None
    last: bool
    mean: np.ndarray
    std: np.ndarray


def read_images(folder: Path, graph: Graph) -> list[dict[str, np.ndarray]]:
    """Samples of the images in ``folder`` and the folders in it.

    Raises:
        InputError: the model takes no image; there are no images, one cannot be read, or the
            configuration is no such file.
        MissingExtraError: Pillow is not installed.
    """
    picture = _picture(graph, folder)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not paths:
        raise InputError(
            f"{folder} holds no images", f"files end in {', '.join(sorted(_SUFFIXES))}"
        )
    if len(paths) > MOST_IMAGES:
        places = np.linspace(0, len(paths) - 1, MOST_IMAGES).astype(int)
        paths = [paths[place] for place in places]
    images = [_read(path, picture) for path in paths]
    rows = picture.batch or 1
    if rows > len(images):
        raise InputError(
            f"{folder} holds {len(images)} image(s), the model takes {rows} at a time",
            "give more images",
        )
    return [
        {picture.name: np.stack(images[start : start + rows])}
        for start in range(0, len(images) - rows + 1, rows)
    ]


def _picture(graph: Graph, folder: Path) -> _Picture:
    inputs = graph.signature().inputs
    if len(inputs) != 1 or graph.state:
        raise InputError(
            "the model takes more than an image: " + ", ".join(str(spec) for spec in inputs),
            "give arrays by input name (.npz)",
        )
    spec = inputs[0]
    dims = spec.dims or ()
    dtype = np.dtype(spec.dtype)
    last = len(dims) == 4 and dims[1] not in (1, 3) and dims[3] in (1, 3)
    channels = dims[3 if last else 1] if len(dims) == 4 else None
    if channels not in (1, 3) or dtype.kind not in "fu":
        raise InputError(
            f"the model takes {spec}, which is no image",
            "images are [N, C, H, W] or [N, H, W, C] with 1 or 3 channels; give an .npz",
        )
    assert isinstance(channels, int)
    mean, std = _normalization(folder, channels)
    batch = dims[0] if isinstance(dims[0], int) else None
    return _Picture(spec.name, dtype, batch, channels, _size(spec, last), last, mean, std)


def _size(spec: TensorSpec, last: bool) -> tuple[int, int] | None:
    assert spec.dims is not None
    height, width = spec.dims[1:3] if last else spec.dims[2:4]
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    if isinstance(height, int) or isinstance(width, int):
        raise InputError(
            f"the model takes {spec}: one side of its images is free and the other is not",
            "give an .npz",
        )
    return None


def _normalization(folder: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel: those of the configuration, else 0 and 1."""
    found = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    path = folder / _CONFIG
    if not path.exists():
        return found
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        mean = np.asarray(config.get("image_mean", found[0]), np.float32)
        std = np.asarray(config.get("image_std", found[1]), np.float32)
    except (OSError, UnicodeDecodeError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} does not parse: {error}", "it is JSON") from error
    mean, std = np.atleast_1d(mean), np.atleast_1d(std)
    usable = all(x.shape in ((1,), (channels,)) and np.isfinite(x).all() for x in (mean, std))
    if not usable or not (std > 0).all():
        raise InputError(
            f"{path}: image_mean or image_std is not {channels} number(s), or no deviation",
            'as in {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}',
        )
    return np.broadcast_to(mean, channels), np.broadcast_to(std, channels)


def _read(path: Path, picture: _Picture) -> np.ndarray:
    """One image ``[C, H, W]`` or ``[H, W, C]`` in the input's dtype."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingExtraError("reading images", "images") from error
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB" if picture.channels == 3 else "L")
            if picture.size is not None:
                height, width = picture.size
                image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
            array = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no image that can be read: {error}", "leave it out") from error
    return _converted(array.reshape(*array.shape[:2], picture.channels), picture)


def _converted(array: np.ndarray, picture: _Picture) -> np.ndarray:
    """Bytes ``[H, W, C]`` as the model takes them."""
    if picture.dtype.kind == "f":
        scaled = array.astype(np.float32) * np.float32(_SCALED_BY)
        array = ((scaled - picture.mean) / picture.std).astype(picture.dtype)
    else:
        array = array.astype(picture.dtype)
    return np.ascontiguousarray(array if picture.last else np.moveaxis(array, 2, 0))


__all__ = ["MOST_IMAGES", "read_images"]
