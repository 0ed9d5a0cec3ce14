"""Routes: through which software a chip is reached, and with which options."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
)
from pydantic_core import PydanticCustomError

from hal.descriptor._base import Model

Option = str | int | float | bool


class OnnxRuntimeRoute(Model):
    """Execution providers in order of preference."""

    backend: str = "onnxruntime"
    # Not strict: behind a validator written in Python, arrays arrive as lists.
    providers: tuple[str, ...] = Field(min_length=1, strict=False)
    provider_options: dict[str, dict[str, Option]] = Field(default_factory=dict)
    """Provider name to its options."""
    session_options: dict[str, Option] = Field(default_factory=dict)
    """Session configuration entries, e.g. ``"session.intra_op.allow_spinning" = "0"``."""
    library: str | None = None
    """Python module whose plug-in library registers the provider, where it is not built in."""
    package: str | None = None
    """Distribution to install when the provider is missing."""


class TvmRoute(Model):
    """A code generator's target as a table, as TVM's ``Target`` takes it."""

    backend: str = "tvm"
    target: dict[str, Any]
    """Must have ``kind``; everything else goes to TVM as it is."""
    cross_compiler: str | None = None
    """Linker driver for another machine."""
    package: str | None = None

    @field_validator("target")
    @classmethod
    def _has_kind(cls, target: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(target.get("kind"), str):
            # A "missing" error, because a file that extends another may leave the kind to it.
            raise PydanticCustomError(
                "missing_kind",
                'must have a string "kind", for example { kind = "llvm" }',
            )
        return target


class PluginRoute(Model):
    """A route of a backend that hal does not know; its options are not checked here."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    backend: str = Field(min_length=1)
    """Name in the entry-point group ``hal.backends``."""
    package: str | None = None
    """Distribution to install when the backend is missing."""

    @property
    def options(self) -> dict[str, Any]:
        """Everything the table says beyond ``backend`` and ``package``."""
        return dict(self.model_extra or {})


Route = OnnxRuntimeRoute | TvmRoute | PluginRoute


def _tag(table: Any) -> str | None:
    """Which model reads a route: chosen by its backend."""
    backend = table.get("backend") if isinstance(table, dict) else getattr(table, "backend", None)
    return backend if backend in ("onnxruntime", "tvm") else "plugin"


AnyRoute = Annotated[
    Annotated[OnnxRuntimeRoute, Tag("onnxruntime")]
    | Annotated[TvmRoute, Tag("tvm")]
    | Annotated[PluginRoute, Tag("plugin")],
    Discriminator(_tag),
]


def name_backends(routes: Any) -> Any:
    """Give each route table without ``backend`` its own name as its backend, where hal knows it."""
    if not isinstance(routes, dict):
        return routes
    return {
        name: {"backend": name, **table}
        if isinstance(table, dict) and name in ("onnxruntime", "tvm")
        else table
        for name, table in routes.items()
    }


Routes = Annotated[dict[str, AnyRoute], BeforeValidator(name_backends)]
"""The tables ``[routes.<name>]``."""
