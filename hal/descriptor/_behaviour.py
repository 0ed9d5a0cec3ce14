"""Facts that decide whether results are right, and layouts a chip prefers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hal.descriptor._base import Model
from hal.descriptor._dtypes import DTypeName

Support = Literal["native", "emulated", "narrowed", "unsupported"]
"""``emulated``: right but slow; ``narrowed``: silently computed in a smaller type."""

_WIDEST_FIRST = ("float64", "float32", "float16", "bfloat16")


class Behaviour(Model):
    """What a compiler must know to stay correct."""

    dtypes: dict[DTypeName, Support] = Field(default_factory=dict)
    """Support of each element type; one that is not listed is unknown."""
    int64: Support = "native"
    dynamic_shapes: bool = True
    """Whether programs may have dims that are only known at run time."""
    alignment: int = Field(default=64, gt=0)
    """Bytes to which buffers should be aligned."""
    matmul_precision: DTypeName | None = None
    """Type in which a float32 matmul really multiplies, where it is not float32."""
    max_rank: int | None = Field(default=None, gt=0)
    max_grid: int | None = Field(default=None, gt=0)
    """Largest launch extent, where there is a limit."""
    offline_compile: bool = True
    """Whether programs can be built on a machine without the chip."""
    simulator: bool = False
    """Whether the vendor's software can run programs without the chip."""

    def support(self, dtype: str) -> Support | None:
        """How ``dtype`` is supported, or None where nobody says."""
        if dtype == "int64":
            return self.dtypes.get(dtype, self.int64)
        return self.dtypes.get(dtype)

    def computed_in(self, dtype: str) -> str:
        """The type in which floats of ``dtype`` are really computed: itself, unless it is narrowed.

        A narrowed float32 is computed in ``matmul_precision``; where that is not stated, and for
        other floats, in the widest narrower one that is native.
        """
        if self.support(dtype) != "narrowed" or dtype not in _WIDEST_FIRST:
            return dtype
        if dtype == "float32" and self.matmul_precision in _WIDEST_FIRST:
            return str(self.matmul_precision)
        narrower = _WIDEST_FIRST[_WIDEST_FIRST.index(dtype) + 1 :]
        return next((t for t in narrower if self.dtypes.get(t) == "native"), dtype)


class Layout(Model):
    """Preferences; each absent one is left to the backend."""

    convolution: Literal["NCHW", "NHWC", "NCHWc"] | None = None
    weights: Literal["row", "column", "blocked"] | None = None
    """How a matmul's constant operand is best stored."""
    kv_cache: Literal["contiguous", "paged"] | None = None
    kv_dtype: DTypeName | None = None
    """Preferred element type of cached keys and values."""
    kv_page: int | None = Field(default=None, gt=0)
    """Tokens in a page of a paged cache."""
