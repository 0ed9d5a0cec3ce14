"""Whether a build runs on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hal.descriptor import parse
from hal.targets import load_backend

if TYPE_CHECKING:
    from hal.bundle.manifest import BuildRecord

NOT_RUN = "built, not run"
"""How the reason begins for which a build was not compared: it does not run on this machine."""


def cannot_run(record: BuildRecord) -> str:
    """Why a build does not run here, in a phrase; empty if nothing speaks against it.

    Raises:
        TargetError: a backend that it needs is not installed.
    """
    probe = load_backend(record.backend).probe()
    if probe.status == "absent":
        return probe.reason
    for segment in record.segments:
        chip = parse(segment.get("descriptor") or record.descriptor, record.target)
        if why := load_backend(segment["backend"]).cannot_run(chip):
            return why
    return ""
