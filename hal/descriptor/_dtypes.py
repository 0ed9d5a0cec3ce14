"""Element types a descriptor may speak of, under the names the rest of hal uses."""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated

from pydantic import AfterValidator

from hal.errors import did_you_mean

DTYPES = MappingProxyType(
    {
        "float64": 64,
        "float32": 32,
        "tfloat32": 32,
        "float16": 16,
        "bfloat16": 16,
        "float8": 8,
        "float8e4m3": 8,
        "float8e5m2": 8,
        "float4": 4,
        "int64": 64,
        "int32": 32,
        "int16": 16,
        "int8": 8,
        "int4": 4,
        "int2": 2,
        "uint64": 64,
        "uint32": 32,
        "uint16": 16,
        "uint8": 8,
        "uint4": 4,
        "uint2": 2,
        "bool": 8,
        "complex64": 64,
        "complex128": 128,
        "string": 0,
    }
)
"""Name of an element type to its width in bits (0: no fixed width)."""


def _known(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; {did_you_mean(name, DTYPES)}")
    return name


DTypeName = Annotated[str, AfterValidator(_known)]
"""A key of :data:`DTYPES`."""


def dtype_bits(name: str) -> int:
    """Width of an element in bits.

    Raises:
        ValueError: ``name`` is not in :data:`DTYPES`.
    """
    return DTYPES[_known(name)]
