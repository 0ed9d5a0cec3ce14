"""What backends have in common whose software lives in an environment of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hal.descriptor import Descriptor, PluginRoute, Route
from hal.errors import DescriptorError
from hal.targets.backend import Backend
from hal.targets.environments import Environment


class RouteOptions(BaseModel):
    """What every route of such a backend may say; a subclass adds its own fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )
    backend: ClassVar[str]
    """Name of the backend that reads the table."""

    packages: tuple[str, ...] = ()
    """What ``pip`` installs into the environment, versions pinned."""
    debian: tuple[str, ...] = ()
    """Debian packages whose files are unpacked there; nothing is installed."""
    seconds: float = Field(default=600.0, gt=0)
    """How long one request may take."""

    @property
    def environment(self) -> Environment:
        """Where the packages are, or will be."""
        return Environment(self.packages, self.debian)

    @classmethod
    def of_route(cls, route: Route) -> Self:
        """The options that a route states.

        Raises:
            DescriptorError: the table is wrong; says where.
        """
        table = route.options if isinstance(route, PluginRoute) else {}
        try:
            # Through JSON: strict validation of Python objects would want tuples for arrays.
            return cls.model_validate_json(json.dumps(table))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            needed = [f"`{n}`" for n, field in cls.model_fields.items() if field.is_required()]
            raise DescriptorError(
                f"route of the backend {cls.backend!r}: {place}: {first['msg']}",
                f"{' and '.join(needed)} are required; see docs/vendors.md",
            ) from error

    @classmethod
    def of(cls, descriptor: Descriptor) -> Self:
        """The options of the route through this backend: the one that was named, or the first.

        Raises:
            DescriptorError: there is none, or it is wrong.
        """
        if found := descriptor.route_through(cls.backend):
            return cls.of_route(found[1])
        raise DescriptorError(
            f"target {descriptor.name!r} has no route of the backend {cls.backend!r}",
            "add one, see docs/vendors.md",
        )

    def require(self, descriptor: Descriptor) -> Environment:
        """The environment, made.

        Raises:
            TargetError: it is not made yet; the hint says how.
        """
        found = descriptor.route_through(self.backend)
        return self.environment.require(":".join([descriptor.name, *(found or ())[:1]]))


class InOwnEnvironment(Backend):
    """A backend whose routes are tables of :attr:`options`."""

    options: ClassVar[type[RouteOptions]]

    def check_route(self, route: Route) -> str:
        """What the table of the route lacks."""
        try:
            self.options.of_route(route)
        except DescriptorError as error:
            return error.message
        return ""

    def setup(self, descriptor: Descriptor, say: Callable[[str], None]) -> Path:
        """Make the environment of the target's route."""
        return self.options.of(descriptor).environment.make(say)
