"""A plan: which layer gets which setting, as a TOML file that can be edited and used again.

::

    recipe = "w4a16-g32:gptq,embedding=w8a16-g32:rtn,head=w8a16-g32:rtn"   # layers not named below

    [layers]
    "model.layers.0.mlp.down_proj" = "w8a16-g32:rtn"
    "model.layers.3.self_attn.o_proj" = "float"
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hal.errors import InputError, did_you_mean
from hal.passes.quantize import Recipe, Setting, parse_recipe, parse_setting


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe, and settings of single layers by name (None keeps a layer as it is)."""

    recipe: Recipe
    layers: Mapping[str, Setting | None] = dataclasses.field(default_factory=dict)

    def to_toml(self, comments: Mapping[str, str] | None = None) -> str:
        """The file's text; ``comments`` by layer stand behind its line."""
        lines = [f"recipe = {json.dumps(str(self.recipe))}", "", "[layers]"]
        for name, setting in self.layers.items():
            note = (comments or {}).get(name, "")
            tail = f"  # {note}" if note else ""
            lines.append(f"{json.dumps(name)} = {json.dumps(str(setting or 'float'))}{tail}")
        return "\n".join(lines) + "\n"


def plan_of(quantize: str | Path | Plan) -> Plan:
    """The plan that ``quantize`` is: one already, a recipe as text, or the path of a TOML file.

    Raises:
        InputError: there is no such file, it is not such a TOML, or a setting does not parse.
    """
    if isinstance(quantize, Plan):
        return quantize
    if isinstance(quantize, Path) or quantize.strip().endswith(".toml"):
        return read_plan(Path(quantize))
    return Plan(parse_recipe(quantize))


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        InputError: see :func:`plan_of`.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no TOML: {error}", "see docs/quantization.md") from error
    unknown = [key for key in data if key not in ("recipe", "layers")]
    if unknown:
        raise InputError(
            f"{path}: what is {unknown[0]!r}?", did_you_mean(unknown[0], ["recipe", "layers"])
        )
    recipe, layers = data.get("recipe"), data.get("layers", {})
    if not isinstance(recipe, str) or not isinstance(layers, dict):
        raise InputError(
            f"{path} has no recipe, or its layers are no table", "see docs/quantization.md"
        )
    try:
        whole = parse_recipe(recipe)
    except InputError as error:
        raise InputError(f"{path}: recipe: {error.message}", error.hint) from error
    return Plan(whole, {name: _setting(path, name, layers[name]) for name in layers})


def _setting(path: Path, name: str, text: Any) -> Setting | None:
    if not isinstance(text, str):
        raise InputError(f"{path}: {name!r} is {text!r}, not a format", 'as in "w8a16-g32:rtn"')
    try:
        return parse_setting(text)
    except InputError as error:
        raise InputError(f"{path}: {name!r}: {error.message}", error.hint) from error


def plan_of_report(facts: Mapping[str, Any]) -> Plan:
    """The plan that gives again what ``graph.metadata["quantization"]`` reports."""
    return Plan(
        parse_recipe(facts["recipe"]),
        {
            layer["name"]: parse_setting(
                layer["format"]
                if layer["format"] == "float"
                else f"{layer['format']}:{layer['method']}"
            )
            for layer in facts["layers"]
        },
    )
