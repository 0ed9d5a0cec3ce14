"""What a chip may be described by: the schema, its value types and cost queries; no chip is here.

A descriptor is one TOML file. It is data only: nothing in it is executed::

    from hal import descriptor

    chip = descriptor.parse(descriptor.read_toml("my-chip.toml"), "my-chip.toml")
    chip.memory_bandwidth()                        # bytes per second, or None where nobody knows
    chip.peak("int8")                              # operations per second
    chip.instruction("dot", types=("u8", "i8", "i32"))

``extends`` is resolved by the registry (:mod:`hal.targets.registry`) with :func:`merge`.
"""

from hal.descriptor._behaviour import Behaviour, Layout, Support
from hal.descriptor._compute import Instruction, Vector
from hal.descriptor._dtypes import DTYPES, dtype_bits
from hal.descriptor._memory import MemoryLevel
from hal.descriptor._model import SCHEMA_VERSION, Descriptor, Match, Power, Price
from hal.descriptor._parse import check_part, json_schema, merge, parse, read_toml
from hal.descriptor._quantity import UNITS, Quantity
from hal.descriptor._routes import OnnxRuntimeRoute, PluginRoute, Route, TvmRoute

__all__ = [
    "DTYPES",
    "SCHEMA_VERSION",
    "UNITS",
    "Behaviour",
    "Descriptor",
    "Instruction",
    "Layout",
    "Match",
    "MemoryLevel",
    "OnnxRuntimeRoute",
    "PluginRoute",
    "Power",
    "Price",
    "Quantity",
    "Route",
    "Support",
    "TvmRoute",
    "Vector",
    "check_part",
    "dtype_bits",
    "json_schema",
    "merge",
    "parse",
    "read_toml",
]
