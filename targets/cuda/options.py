"""What a route of this backend says."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from hal.targets.own_environment import RouteOptions


class CudaOptions(RouteOptions):
    """The table ``[routes.<name>]`` with ``backend = "cuda"``."""

    backend: ClassVar[str] = "cuda"

    target: dict[str, Any]
    """TVM's target: of kind ``cuda`` with its ``arch``, ``max_threads_per_block``,
    ``max_shared_memory_per_block`` (bytes), and the ``host`` if it is another machine."""
    binary: Literal["cubin", "ptx"] = "cubin"
    """Machine code of that architecture, or text that the driver of it or a later one compiles."""
    link: tuple[str, ...] = ()
    """Linker for another host, as a command that takes objects and ``-o``; ``{python}`` is the
    environment's interpreter."""
    emulated: bool = False
    """Run the kernels' source on the processor at hand: slow, to check them without a GPU."""
    seconds: float = Field(default=1200.0, gt=0)
    """How long the compilation of a segment may take."""

    @field_validator("target")
    @classmethod
    def _for_cuda(cls, target: dict[str, Any]) -> dict[str, Any]:
        if target.get("kind") != "cuda":
            raise ValueError("the kind is not 'cuda'")
        for name in ("max_threads_per_block", "max_shared_memory_per_block"):
            if not isinstance(target.get(name), int):
                raise ValueError(f"{name} is not given")
        if not str(target.get("arch", "")).startswith("sm_"):
            raise ValueError('arch is not of the form "sm_80"')
        return target
