"""The target that TVM compiles for, with what the descriptor offers and nothing beyond it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hal.descriptor import Descriptor, TvmRoute
from hal.errors import TargetError

NARROWEST = 128
"""Bits of vectors where a descriptor states none: LLVM takes 512 on its own for some machines."""


def tvm_route(descriptor: Descriptor) -> TvmRoute:
    """The route through TVM: the one that was named, or the first.

    Raises:
        TargetError: there is none.
    """
    found = descriptor.route_through("tvm")
    if found and isinstance(found[1], TvmRoute):
        return found[1]
    raise TargetError(
        f"target {descriptor.name!r} has no route through tvm",
        "add a table [routes.tvm] with a target to its descriptor",
    )


def tvm_target(descriptor: Descriptor) -> dict[str, Any]:
    """The target of the route through TVM, completed."""
    return completed_target(descriptor, tvm_route(descriptor).target)


def completed_target(descriptor: Descriptor, stated: Mapping[str, Any]) -> dict[str, Any]:
    """A route's target, completed for LLVM by attributes and the width of vectors.

    Attributes of instructions that are offered are switched on, those of instructions that the
    descriptor knows and does not offer are switched off: a processor's name may imply them. What
    the route says itself stays as it is.
    """
    target = dict(stated)
    if target["kind"] != "llvm":
        return target
    given = list(target.get("mattr", ()))
    known = {attribute.lstrip("+-") for attribute in given}
    offered = {attribute.lstrip("+") for attribute in descriptor.llvm_features()}
    every = {a.lstrip("+") for i in descriptor.instructions for a in i.llvm_features}
    attributes = given + [
        ("+" if name in offered else "-") + name for name in sorted(every - known)
    ]
    if attributes:
        target["mattr"] = attributes
    if not descriptor.vector.scalable:
        target.setdefault("vector-width", max(NARROWEST, descriptor.vector.bits))
    return target


__all__ = ["completed_target", "tvm_route", "tvm_target"]
