"""What a route of this backend says."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator

from hal.targets.own_environment import RouteOptions


class AotOptions(RouteOptions):
    """The table ``[routes.<name>]`` with ``backend = "aot"``.

    In the two commands ``{files}`` stands for where Debian packages are unpacked, ``{python}`` for
    the environment's interpreter, ``{here}`` for the folder of this backend, and in ``run``
    ``{program}`` for the program, after which the weights' file is given. If ``run`` has
    ``{page}``, it is given the folder of a page (``hal page``) with both instead.
    """

    backend: ClassVar[str] = "aot"

    target: dict[str, Any]
    """TVM's target for the kernels; of kind ``llvm``."""
    compile: tuple[str, ...] = Field(min_length=1)
    """C compiler and linker, as a command that takes sources, objects and ``-o``."""
    run: tuple[str, ...] = ("{program}",)
    """What runs the program on another machine: an emulator, an engine."""
    machine: str = ""
    """What the operating system calls the machine that needs no such help."""

    @property
    def in_page(self) -> bool:
        """Whether a browser runs the program."""
        return "{page}" in self.run

    @field_validator("target")
    @classmethod
    def _for_llvm(cls, target: dict[str, Any]) -> dict[str, Any]:
        if target.get("kind") != "llvm":
            raise ValueError("the kind is not 'llvm'")
        return target
