"""CUDA kernels built ahead of time, on a machine without a GPU."""

from hal.targets.cuda.backend import CudaBackend
from hal.targets.cuda.options import CudaOptions

__all__ = ["CudaBackend", "CudaOptions"]
