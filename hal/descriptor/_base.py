"""The base of every model of the schema: immutable, and an unknown field is an error."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Model(BaseModel):
    """Frozen pydantic model that refuses fields it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


def _unknown_to_none(value: Any) -> Any:
    """TOML has no null; the word ``"unknown"`` says it, and overrides a parent's figure."""
    return None if value == "unknown" else value


UNKNOWN = BeforeValidator(_unknown_to_none, json_schema_input_type=Any)
"""Annotation that lets a figure be written as ``"unknown"``."""
