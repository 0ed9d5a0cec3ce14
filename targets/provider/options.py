"""What a route of this backend says."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field

from hal.targets.environments import Environment
from hal.targets.own_environment import RouteOptions

Option = str | int | float | bool


class Left(BaseModel):
    """Nodes that the provider must not be given, because it takes them and fails."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    op: str = Field(min_length=1)
    """Op of ONNX."""
    input: int | None = Field(default=None, ge=0)
    """Only nodes that have this input."""
    computed: bool | None = None
    """Only nodes whose ``input`` is no constant; false: only those whose is one."""
    rank: int | None = Field(default=None, ge=0)
    """Only nodes whose ``input`` has so many axes."""
    reason: str = Field(min_length=1)
    """What is wrong with them; users read it."""

    def applies(self, node: ir.Node) -> bool:
        """Whether the node is one of them."""
        if node.domain or node.op_type != self.op:
            return False
        if self.input is None:
            return True
        value = node.inputs[self.input] if self.input < len(node.inputs) else None
        if value is None:
            return False
        if self.rank is not None and (value.shape is None or len(value.shape) != self.rank):
            return False
        constant = ir.convenience.get_const_tensor(value) is not None
        return self.computed is None or self.computed != constant


class ProviderOptions(RouteOptions):
    """The table ``[routes.<name>]`` with ``backend = "provider"``."""

    backend: ClassVar[str] = "provider"

    provider: str = Field(min_length=1)
    """Name of the execution provider."""
    packages: tuple[str, ...] = Field(min_length=1)
    """What ``pip`` installs into the environment, versions pinned."""
    library: str | None = None
    """Module of ``packages`` that knows the provider's plug-in library, if it is not built in."""
    options: dict[str, Option] = Field(default_factory=dict)
    """Of the provider; ``{library}`` stands for the folder of the plug-in's library."""
    session_options: dict[str, Option] = Field(default_factory=dict)
    variables: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the worker; ``{files}`` stands for where they are unpacked."""
    opset: int | None = Field(default=None, gt=0)
    """Newest operator set of ONNX that the provider has kernels for; absent: all that its runtime
    reads."""
    leaves: tuple[Left, ...] = ()
    """What goes to the host without the provider being asked."""
    offline: bool = False
    """Whether the provider's programs are made when a bundle is compiled, and stored in it."""

    @property
    def environment(self) -> Environment:
        """With NumPy, which the worker itself needs."""
        return Environment(("numpy", *self.packages), self.debian, self.alone)
