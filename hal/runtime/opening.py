"""Which build of a bundle a session loads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hal.errors import TargetError
from hal.runtime.here import cannot_run
from hal.runtime.session import Session

if TYPE_CHECKING:
    from hal.bundle.bundle import Bundle


def open_session(
    bundle: Bundle,
    target: str | None = None,
    *,
    threads: int | None = None,
    kv_layout: str | None = None,
) -> Session:
    """Load a build; without ``target``, the best one in the bundle that can run here.

    ``kv_layout`` (``contiguous``, ``paged``) overrides how the build's cache is laid out.

    Raises:
        InputError: the build cannot use that layout.
        TargetError: no such build, or none that can run on this machine.
    """
    builds = bundle.manifest.builds
    if target is not None:
        name = find_build(target, builds)
        if name is None:
            raise TargetError(
                f"the bundle has no build for {target!r} (it has {', '.join(builds) or 'none'})",
                f"add one: hal retarget {bundle.path} --target {target} -o OUT.hal",
            )
        return Session(bundle, name, threads=threads, kv_layout=kv_layout)
    reasons = []
    for name, record in builds.items():
        if why := cannot_run(record):
            reasons.append(f"{name}: {why}")
            continue
        return Session(bundle, name, threads=threads, kv_layout=kv_layout)
    raise TargetError(
        "no build in the bundle can run here" + (f" ({'; '.join(reasons)})" if reasons else ""),
        f"add one for this machine: hal retarget {bundle.path} --target host -o OUT.hal",
    )


def find_build(target: str, builds: Iterable[str]) -> str | None:
    """The build that ``target`` means: its full name, or the target's first route."""
    if target in (names := list(builds)):
        return target
    chips = {n: "+".join(part.split(":")[0] for part in n.split("+")) for n in names}
    return next((n for n in names if chips[n] == target), None)
