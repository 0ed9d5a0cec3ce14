"""TOML text to descriptors: reading, merging along ``extends``, errors that name file and field."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hal.descriptor._base import Model
from hal.descriptor._behaviour import Behaviour, Layout
from hal.descriptor._compute import Instruction, Vector
from hal.descriptor._memory import MemoryLevel
from hal.descriptor._model import SCHEMA_VERSION, Descriptor, Match, Power, Price
from hal.descriptor._quantity import Quantity
from hal.descriptor._routes import OnnxRuntimeRoute, TvmRoute
from hal.errors import DescriptorError, did_you_mean

_KEYS = {"memory": ("level",), "instructions": ("does", "types", "lanes", "scalable")}
"""Arrays of tables that are merged entry by entry, and what identifies an entry."""


def read_toml(path: str | Path) -> dict[str, Any]:
    """The file's tables.

    Raises:
        DescriptorError: the file cannot be read or is not TOML; names the file (and the line).
    """
    try:
        return tomllib.loads(Path(path).read_bytes().decode())
    except tomllib.TOMLDecodeError as error:
        raise DescriptorError(f"{path}: not valid TOML: {error}", "fix the syntax") from None
    except UnicodeDecodeError:
        raise DescriptorError(f"{path}: not UTF-8 text", "a descriptor is a TOML file") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise DescriptorError(f"{path}: cannot be read: {reason}", "check the path") from None


def parse(data: Mapping[str, Any], source: str = "<descriptor>") -> Descriptor:
    """Check ``data`` against the schema and return the descriptor.

    ``source`` is the file that errors name. ``extends`` must have been resolved before.

    Raises:
        DescriptorError: a field is missing, unknown or wrong; names file and field.
    """
    _check_version(data, source)
    try:
        return _validate(data)
    except ValidationError as error:
        raise _to_descriptor_error(error.errors(include_url=False), source) from None


def check_part(data: Mapping[str, Any], source: str) -> None:
    """Check one file of an ``extends`` chain: fields may be missing, what is there must be right.

    Raises:
        DescriptorError: a field is unknown or wrong; names file and field.
    """
    _check_version(data, source)
    alone = {key: value for key, value in data.items() if key != "default_route"}
    try:
        _validate(alone)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = [p for p in found if not p["type"].startswith("missing")]
        if problems:
            raise _to_descriptor_error(problems, source) from None


def merge(parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """What ``child`` says on top of ``parent``.

    Tables merge deeply; ``[[memory]]`` entries by ``level`` and ``[[instructions]]`` entries by
    ``does``, ``types``, ``lanes`` and ``scalable``; a figure (a table with a ``value``) and every
    other array is replaced as a whole. ``match``, ``notes`` and ``description`` are not inherited.
    """
    inherited = {
        key: value
        for key, value in parent.items()
        if key not in ("match", "notes", "description", "extends", "name")
    }
    return _merge_tables(inherited, child)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a complete descriptor, for editors and other tools."""
    schema = Descriptor.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "hal target descriptor"
    return schema


def _check_version(data: Mapping[str, Any], source: str) -> None:
    version = data.get("schema")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise DescriptorError(
            f"{source}: schema = {version} is newer than this hal reads ({SCHEMA_VERSION})",
            "upgrade hal-compiler, or write the descriptor for the older schema",
        )


def _validate(data: Mapping[str, Any]) -> Descriptor:
    # Through JSON, because strict validation of Python objects would want tuples for arrays.
    return Descriptor.model_validate_json(json.dumps(data, default=str))


def _merge_tables(parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(parent))
    for key, value in child.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping) and "value" not in value:
            merged[key] = _merge_tables(old, value)
        elif key in _KEYS and isinstance(old, list) and isinstance(value, (list, tuple)):
            merged[key] = _merge_entries(old, value, _KEYS[key])
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _merge_entries(old: list[Any], new: list[Any] | tuple[Any, ...], keys: tuple[str, ...]) -> Any:
    def identity(entry: Any) -> str:
        return repr([entry.get(key) for key in keys]) if isinstance(entry, Mapping) else repr(entry)

    merged = {identity(entry): entry for entry in old}
    for entry in new:
        before = merged.get(identity(entry))
        both = isinstance(before, Mapping) and isinstance(entry, Mapping)
        merged[identity(entry)] = _merge_tables(before, entry) if both else copy.deepcopy(entry)  # type: ignore[arg-type]
    return list(merged.values())


def _to_descriptor_error(problems: list[Any], source: str) -> DescriptorError:
    """One sentence for the first problem; the hint counts the others."""
    # An unknown field explains a missing one (a typo), so it is told first.
    first = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    field = _field_name(first["loc"])
    hint = "run 'hal targets schema' for every field and its type"
    if first["type"] == "extra_forbidden":
        message = f"{source}: unknown field {field!r}"
        hint = did_you_mean(str(first["loc"][-1]), _fields_at(first["loc"][:-1]))
    elif first["type"] == "missing":
        message = f"{source}: missing field {field!r}"
    else:
        detail = str(first["msg"]).removeprefix("Value error, ")
        message = (
            f"{source}: {field}: {detail[:1].lower()}{detail[1:]}"
            if field
            else (f"{source}: {detail}")
        )
        if "input" in first and isinstance(first["input"], (str, int, float, bool)):
            shown = repr(first["input"])
            message += "" if shown in detail else f" (got {shown})"
    if len(problems) > 1:
        hint += f"; {len(problems) - 1} more problem(s) after this one"
    return DescriptorError(message, hint)


def _field_name(location: tuple[int | str, ...]) -> str:
    """``("memory", 0, "bandwidth")`` as ``memory[0].bandwidth``."""
    if location[:1] == ("routes",):
        location = location[:2] + location[3:]  # the third part names a model, not a field
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part != "[key]":
            text += f".{part}" if text else part
    return text


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Names that the schema knows at ``location``."""
    named: dict[str, type[Model]] = {
        "memory": MemoryLevel,
        "instructions": Instruction,
        "vector": Vector,
        "behaviour": Behaviour,
        "layout": Layout,
        "power": Power,
        "price": Price,
        "match": Match,
        "onnxruntime": OnnxRuntimeRoute,
        "tvm": TvmRoute,
    }
    names = [part for part in location if isinstance(part, str)]
    if not names:
        return [field.alias or name for name, field in Descriptor.model_fields.items()]
    if names[0] == "routes":
        names = names[2:3]
    model = named.get(names[0]) if len(names) == 1 else Quantity
    return list((model or Quantity).model_fields)
