"""Finding backends in the entry-point group ``hal.backends``, and checking their contract."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hal.errors import DescriptorError, TargetError, did_you_mean

if TYPE_CHECKING:
    from hal.descriptor import Descriptor
    from hal.targets.backend import Backend

BACKENDS_GROUP = "hal.backends"


@dataclasses.dataclass(frozen=True)
class BackendInfo:
    """Whether a backend can run here: ``present``, ``simulator``, ``absent`` or ``broken``."""

    name: str
    origin: str
    status: str
    reason: str = ""


def load_backend(name: str) -> Backend:
    """An instance of the backend ``name``.

    Raises:
        TargetError: no package provides it, two do, it cannot be imported, or it was written
            for another version of the contract (``hal_api``).
    """
    points = importlib.metadata.entry_points(group=BACKENDS_GROUP)
    found = {(point.value, _origin(point)): point for point in points if point.name == name}
    if not found:
        raise TargetError(
            f"no installed package provides the backend {name!r}",
            did_you_mean(name, points.names),
        )
    if len(found) > 1:
        origins = " and ".join(sorted(origin for _, origin in found))
        raise TargetError(f"backend {name!r} is provided twice: {origins}", "uninstall one of them")
    ((_, origin), point) = next(iter(found.items()))
    try:
        backend_class = point.load()
    except Exception as error:  # a vendor's code may raise anything
        raise TargetError(
            f"backend {name!r} of {origin} cannot be imported: {type(error).__name__}: {error}",
            f"check the installation of {origin}",
        ) from error
    return _instance(backend_class, name, origin)


def check_routes(descriptor: Descriptor, source: str) -> None:
    """Check the routes of a descriptor with the backends that they name.

    Raises:
        DescriptorError: a backend is not there, or finds its route wrong.
    """
    for name, route in descriptor.routes.items():
        place = f"{source}: routes.{name}"
        try:
            problem = load_backend(route.backend).check_route(route)
        except TargetError as error:
            hint = f"pip install {route.package}" if route.package else error.hint
            raise DescriptorError(f"{place}: {error.message}", hint) from error
        if problem:
            raise DescriptorError(f"{place}: {problem}", f"correct the table [routes.{name}]")


@functools.cache
def code_digest() -> str:
    """Digest of the code that makes builds, so that a development tree never gets a stale one."""
    digest = hashlib.sha256()
    # hal.passes too: how a build carries its state is lowered there.
    for name in ("hal.passes", "hal.targets", "hal.kernels"):
        for folder in importlib.import_module(name).__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def backend_digest(backend: Backend) -> str:
    """Digest of the code of a backend's own package; nothing for those that come with hal."""
    package = type(backend).__module__.rpartition(".")[0]
    if package == "hal" or package.startswith("hal."):
        return ""
    folders = list(getattr(sys.modules.get(package), "__path__", []))
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16] if folders else ""


def list_backends() -> list[BackendInfo]:
    """Every backend that a package provides, and whether it can run here. Never raises."""
    infos = []
    for point in importlib.metadata.entry_points(group=BACKENDS_GROUP):
        try:
            probe = load_backend(point.name).probe()
            info = BackendInfo(point.name, _origin(point), probe.status, probe.reason)
        except Exception as error:  # noqa: BLE001 - reported; the others still count
            info = BackendInfo(point.name, _origin(point), "broken", str(error))
        infos.append(info)
    return sorted(set(infos), key=lambda info: info.name)


def _instance(backend_class: object, name: str, origin: str) -> Backend:
    from hal.targets.backend import HAL_API, Backend

    api = getattr(backend_class, "hal_api", None)
    if api != HAL_API:
        raise TargetError(
            f"backend {name!r} of {origin} was written for hal_api {api!r}, "
            f"this hal speaks {HAL_API!r}",
            f"install a version of {origin.split()[0]} made for this hal-compiler",
        )
    if not (isinstance(backend_class, type) and issubclass(backend_class, Backend)):
        raise TargetError(
            f"backend {name!r} of {origin} is not a subclass of hal.targets.Backend",
            "derive the class from hal.targets.Backend",
        )
    if getattr(backend_class, "name", name) != name:
        raise TargetError(
            f"backend {name!r} of {origin} calls itself {backend_class.name!r}",
            "give the entry point and the class the same name",
        )
    try:
        return backend_class()
    except Exception as error:  # a vendor's code may raise anything
        raise TargetError(
            f"backend {name!r} of {origin} cannot be started: {type(error).__name__}: {error}",
            f"check the installation of {origin}",
        ) from error


def _origin(point: importlib.metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
