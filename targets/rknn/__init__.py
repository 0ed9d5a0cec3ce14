"""NPUs of Rockchip, through rknn-toolkit2: its compiler and its simulator."""

from hal.targets.rknn.backend import RknnBackend
from hal.targets.rknn.options import RknnOptions

__all__ = ["RknnBackend", "RknnOptions"]
