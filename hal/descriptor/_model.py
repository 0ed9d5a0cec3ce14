"""The descriptor itself, and the questions that passes, kernels and planners ask it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, model_validator

from hal.descriptor._base import Model
from hal.descriptor._behaviour import Behaviour, Layout
from hal.descriptor._compute import Instruction, Vector
from hal.descriptor._dtypes import DTypeName
from hal.descriptor._memory import MemoryLevel
from hal.descriptor._quantity import (
    Frequency,
    Money,
    MoneyPerHour,
    Quantity,
    Rate,
    Watts,
)
from hal.descriptor._routes import Route, Routes
from hal.errors import DescriptorError, did_you_mean

SCHEMA_VERSION = 1
"""The only value of ``schema`` that this version reads."""

_TYPE_NAMES = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f8": "float8",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "int8",
    "i4": "int4",
    "u4": "int4",
    "i2": "int2",
    "u2": "int2",
}
"""Short operand type of an instruction to the key of ``[peak]`` that it works for."""


class Power(Model):
    """Electrical power of the whole device."""

    idle: Watts = None
    typical: Watts = None
    maximum: Watts = None


class Price(Model):
    """What the device costs."""

    purchase: Money = None
    hourly: MoneyPerHour = None


class Match(Model):
    """When a machine that was found at run time is an instance of this descriptor."""

    machine: tuple[str, ...] = ()
    """What the operating system calls the architecture; empty: any."""
    features: tuple[str, ...] = ()
    """Features that must all be there."""


class Descriptor(Model):
    """A chip as data. Figures are None where nobody knows them."""

    schema_version: Literal[1] = Field(alias="schema")
    """Version of this schema."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """The word a user types after ``--target``."""
    vendor: str = ""
    family: str = ""
    kind: Literal["cpu", "gpu", "npu", "dsp", "mcu", "fpga"]
    extends: str | None = None
    """Name of the descriptor whose fields this one starts from."""
    description: str = ""
    notes: tuple[str, ...] = ()
    """Remarks for readers, such as open conflicts between sources."""

    cores: int | None = Field(default=None, gt=0)
    clock: Frequency = None
    memory: tuple[MemoryLevel, ...] = ()
    """Nearest level first."""
    peaks: dict[DTypeName, Rate] = Field(default_factory=dict, alias="peak")
    """Operations per cycle and core, or per second for the device; a multiply-add is two."""
    vector: Vector = Field(default_factory=Vector)
    features: tuple[str, ...] = ()
    """Names of optional features that this very chip has."""
    instructions: tuple[Instruction, ...] = ()
    power: Power = Field(default_factory=Power)
    price: Price = Field(default_factory=Price)
    behaviour: Behaviour = Field(default_factory=Behaviour)
    layout: Layout = Field(default_factory=Layout)
    match: Match | None = None
    routes: Routes = Field(default_factory=dict)
    default_route: str | None = None
    """Which of ``routes`` is meant when the user names none; absent: the first."""

    @model_validator(mode="after")
    def _consistent(self) -> Descriptor:
        if self.default_route is not None and self.default_route not in self.routes:
            hint = did_you_mean(self.default_route, self.routes)
            raise ValueError(f"default_route {self.default_route!r} is not in [routes]; {hint}")
        levels = [memory.level for memory in self.memory]
        for level in levels:
            if levels.count(level) > 1:
                raise ValueError(f"memory level {level!r} is listed twice")
        return self

    # -- memory ---------------------------------------------------------------------------

    def memory_level(self, level: str) -> MemoryLevel | None:
        """The level of that name."""
        return next((memory for memory in self.memory if memory.level == level), None)

    def main_memory(self) -> MemoryLevel | None:
        """The largest pool that programs use: the last level of kind ``main``."""
        return next((memory for memory in reversed(self.memory) if memory.kind == "main"), None)

    def memory_capacity(self) -> float | None:
        """Bytes of main memory, or None where unknown."""
        main = self.main_memory()
        return main.capacity.base if main and main.capacity else None

    def memory_bandwidth(self, level: str | None = None) -> float | None:
        """Sustained bytes per second of ``level`` (main memory by default), or None."""
        memory = self.main_memory() if level is None else self.memory_level(level)
        if memory is None or memory.bandwidth is None:
            return None
        if memory.bandwidth.dimension == "bytes per second":
            return memory.bandwidth.base
        cycles = self._cycles_per_second()
        return None if cycles is None else memory.bandwidth.base * cycles

    def cache_bytes(self, level: str) -> int | None:
        """Capacity in bytes of one instance of a cache or scratch level, or None."""
        memory = self.memory_level(level)
        return int(memory.capacity.base) if memory and memory.capacity else None

    def move_cost(self) -> float:
        """How many times slower the way from the host's memory is than this chip's memory.

        The way is the level ``host`` of kind ``link``; 1 where there is none, as on chips that
        share the host's memory, or where a bandwidth is unknown.
        """
        way, own = self.memory_level("host"), self.memory_bandwidth()
        there = self.memory_bandwidth("host") if way and way.kind == "link" else None
        return max(own / there, 1.0) if own and there else 1.0

    # -- arithmetic -----------------------------------------------------------------------

    def vector_lanes(self, dtype: str) -> int:
        """Elements of ``dtype`` in one vector register; 1 where there is no vector unit."""
        return self.vector.lanes_of(dtype)

    def offered(self) -> tuple[Instruction, ...]:
        """Instructions whose required features this chip lists, and whose results fit its vectors.

        So a descriptor that only narrows ``vector`` or empties ``features`` offers less.
        """
        features, bits = set(self.features), self.vector.bits
        return tuple(
            i
            for i in self.instructions
            if features.issuperset(i.requires)
            and (i.does == "matrix" or not bits or max(i.result_bits, i.vector_bits) <= bits)
        )

    def llvm_features(self) -> tuple[str, ...]:
        """Attributes that LLVM needs for the offered instructions, each once, in order."""
        return tuple(sorted({attribute for i in self.offered() for attribute in i.llvm_features}))

    def instruction(
        self, does: str, *, types: Iterable[str] | None = None, k: int | None = None
    ) -> Instruction | None:
        """The widest offered instruction that ``does`` this, or None.

        ``types`` (operands, result last) and ``k`` narrow the search.
        """
        wanted = None if types is None else tuple(types)
        found = [
            i
            for i in self.offered()
            if i.does == does and (wanted is None or i.types == wanted) and (k is None or i.k == k)
        ]
        return max(found, key=lambda i: i.lanes * i.k, default=None)

    def peak_per_cycle(self, dtype: str) -> float | None:
        """Operations per cycle and core on ``dtype``, or None.

        The larger of what ``[peak]`` says and what the offered instructions give.
        """
        figures = [
            i.operations * i.rate.base
            for i in self.offered()
            if i.rate is not None and i.types and _TYPE_NAMES.get(i.types[0]) == dtype
        ]
        stated = self.peaks.get(dtype)
        if stated is not None and stated.dimension == "operations per cycle and core":
            figures.append(stated.base)
        return max(figures, default=None)

    def peak(self, dtype: str) -> float | None:
        """Dense operations per second of the whole device on ``dtype``, or None.

        Sparse figures are halved (structured 2:4 sparsity).
        """
        stated = self.peaks.get(dtype)
        rates = []
        if stated is not None:
            dense = stated.base / (2 if stated.basis == "sparse" else 1)
            if stated.dimension == "operations per second":
                rates.append(dense)
            elif stated.dimension == "operations per cycle" and self.clock is not None:
                rates.append(dense * self.clock.base)
        per_cycle, cycles = self.peak_per_cycle(dtype), self._cycles_per_second()
        if per_cycle is not None and cycles is not None:
            rates.append(per_cycle * cycles)
        return max(rates, default=None)

    def seconds(self, bytes: float, operations: float, dtype: str) -> float | None:
        """Lower bound in seconds for moving ``bytes`` and doing ``operations`` (roofline).

        None where neither the bandwidth nor the peak is known; a bound that is not known is
        left out.
        """
        bandwidth, peak = self.memory_bandwidth(), self.peak(dtype)
        bounds = [bytes / bandwidth] if bandwidth else []
        if peak:
            bounds.append(operations / peak)
        return max(bounds, default=None)

    def _cycles_per_second(self) -> float | None:
        if self.clock is None or self.cores is None:
            return None
        return self.clock.base * self.cores

    # -- routes and identity --------------------------------------------------------------

    def route(self, name: str | None = None) -> tuple[str, Route]:
        """The route ``name`` (or the default one) as (name, route).

        Raises:
            DescriptorError: there is no such route.
        """
        chosen = name or self.default_route or next(iter(self.routes), None)
        if chosen is None:
            raise DescriptorError(
                f"target {self.name!r} has no route: nothing can compile for it yet",
                "add a [routes.<name>] table to its descriptor",
            )
        if chosen not in self.routes:
            raise DescriptorError(
                f"target {self.name!r} has no route {chosen!r}",
                did_you_mean(chosen, self.routes),
            )
        return chosen, self.routes[chosen]

    def with_route(self, name: str | None) -> Descriptor:
        """This chip with that route as its default, so that backends read that one.

        Raises:
            DescriptorError: there is no such route.
        """
        chosen, _ = self.route(name)
        return self.model_copy(update={"default_route": chosen}) if name else self

    def route_through(self, backend: str) -> tuple[str, Route] | None:
        """The default route if that backend takes it, else the first that it takes, or None."""
        default = self.default_route
        names = [*([default] if default else []), *self.routes]
        return next(((n, self.routes[n]) for n in names if self.routes[n].backend == backend), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :func:`hal.descriptor.parse` reads back to an equal descriptor."""
        data = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        for name, route in self.routes.items():
            data["routes"][name]["backend"] = route.backend  # a default that depends on the name
        return data

    def digest(self) -> str:
        """SHA-256 of everything that the descriptor says, in hexadecimal."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


__all__ = ["SCHEMA_VERSION", "Descriptor", "Match", "Power", "Price", "Quantity"]
