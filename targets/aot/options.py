"""What a route of this backend says."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hal.descriptor import PluginRoute, Route
from hal.errors import DescriptorError


class AotOptions(BaseModel):
    """The table ``[routes.<name>]`` with ``backend = "aot"``.

    In the two commands ``{files}`` stands for where Debian packages are unpacked, ``{python}`` for
    the environment's interpreter, ``{here}`` for the folder of this backend, and in ``run``
    ``{program}`` for the program.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    target: dict[str, Any]
    """TVM's target for the kernels; of kind ``llvm``."""
    compile: tuple[str, ...] = Field(min_length=1)
    """C compiler and linker, as a command that takes sources, objects and ``-o``."""
    run: tuple[str, ...] = ("{program}",)
    """What runs the program on another machine: an emulator, an engine."""
    machine: str = ""
    """What the operating system calls the machine that needs no such help."""
    packages: tuple[str, ...] = ()
    """What ``pip`` installs into the environment, versions pinned."""
    debian: tuple[str, ...] = ()
    """Debian packages whose files are unpacked there; nothing is installed."""
    seconds: float = Field(default=120.0, gt=0)
    """How long one run may take."""


def options_of(route: Route | None, name: str) -> AotOptions:
    """The options of the route of the descriptor ``name``.

    Raises:
        DescriptorError: the table is wrong; says where.
    """
    table = route.options if isinstance(route, PluginRoute) else {}
    try:
        # Through JSON, because strict validation of Python objects would want tuples for arrays.
        options = AotOptions.model_validate_json(json.dumps(table))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DescriptorError(
            f"route of the backend 'aot' of {name!r}: {place}: {first['msg']}",
            "`target` and `compile` are required; see docs/vendors.md",
        ) from error
    if options.target.get("kind") != "llvm":
        raise DescriptorError(
            f"route of the backend 'aot' of {name!r}: target.kind is not 'llvm'",
            'write target = { kind = "llvm", mtriple = "…" }',
        )
    return options
