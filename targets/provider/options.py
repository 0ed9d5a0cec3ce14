"""What a route of this backend says."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hal.descriptor import PluginRoute, Route
from hal.errors import DescriptorError

Option = str | int | float | bool


class ProviderOptions(BaseModel):
    """The table ``[routes.<name>]`` with ``backend = "provider"``."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    provider: str = Field(min_length=1)
    """Name of the execution provider."""
    packages: tuple[str, ...] = Field(min_length=1)
    """What ``pip`` installs into the environment, versions pinned."""
    library: str | None = None
    """Module of ``packages`` that knows the provider's plug-in library, if it is not built in."""
    options: dict[str, Option] = Field(default_factory=dict)
    """Of the provider; ``{library}`` stands for the folder of the plug-in's library."""
    session_options: dict[str, Option] = Field(default_factory=dict)
    debian: tuple[str, ...] = ()
    """Debian packages whose files are unpacked beside the environment; nothing is installed."""
    variables: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the worker; ``{files}`` stands for where they are unpacked."""
    opset: int | None = Field(default=None, gt=0)
    """Newest operator set of ONNX that the provider has kernels for; absent: all that its runtime
    reads."""
    offline: bool = False
    """Whether the provider's programs are made when a bundle is compiled, and stored in it."""
    seconds: float = Field(default=600.0, gt=0)
    """How long one request to the worker may take."""


def options_of(route: Route) -> ProviderOptions:
    """The options of a descriptor's route.

    Raises:
        DescriptorError: the table is wrong; says where.
    """
    table = route.options if isinstance(route, PluginRoute) else {}
    try:
        # Through JSON, because strict validation of Python objects would want tuples for arrays.
        return ProviderOptions.model_validate_json(json.dumps(table))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DescriptorError(
            f"route of the backend 'provider': {place}: {first['msg']}",
            "`provider` and `packages` are required; see docs/vendors.md",
        ) from error
