"""What a route of this backend says."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hal.targets.own_environment import RouteOptions


class RknnOptions(RouteOptions):
    """The table ``[routes.<name>]`` with ``backend = "rknn"``."""

    backend: ClassVar[str] = "rknn"

    platform: str = Field(min_length=1)
    """The toolkit's name of the chip."""
    packages: tuple[str, ...] = Field(min_length=1)
    """What ``pip`` installs into the environment, versions pinned."""
    opset: int = Field(default=19, gt=0)
    """Newest operator set of ONNX that the toolkit reads."""
