"""Finding backends in the entry-point group ``hal.backends``, and checking their contract."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hal.errors import DescriptorError, HalError, TargetError, did_you_mean

if TYPE_CHECKING:
    from hal.descriptor import Descriptor
    from hal.targets.backend import Backend, Probe
    from hal.targets.registry import ResolvedTarget

BACKENDS_GROUP = "hal.backends"


@dataclasses.dataclass(frozen=True)
class BackendInfo:
    """Whether a backend can run here: ``present``, ``simulator``, ``absent`` or ``broken``."""

    name: str
    origin: str
    status: str
    reason: str = ""


Around = Callable[[Callable[[], BackendInfo], str], BackendInfo]
"""Runs a question to a backend, whose name for errors comes second, where it can do no harm."""


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


def list_backends(around: Around | None = None) -> list[BackendInfo]:
    """Every backend that a package provides, and whether it can run here. Never raises.

    ``around`` is called with those of other packages, and may ask them in another process.
    """
    infos = []
    for point in importlib.metadata.entry_points(group=BACKENDS_GROUP):
        origin = _origin(point)

        def ask(name: str = point.name, origin: str = origin) -> BackendInfo:
            probe = probed(name)
            return BackendInfo(name, origin, probe.status, probe.reason)

        try:
            own = around is None or _is_own(point)
            info = ask() if own or around is None else around(ask, blamed(point.name))
        except Exception as error:  # noqa: BLE001 - reported; the others still count
            info = BackendInfo(point.name, origin, "broken", _line(error))
        infos.append(info)
    return sorted(set(infos), key=lambda info: info.name)


def probed(name: str) -> Probe:
    """What the backend ``name`` says about this machine.

    Raises:
        TargetError: it cannot be loaded, or its probe fails.
    """
    backend = load_backend(name)
    with blaming(backend, "asked whether it can run here"):
        return backend.probe()


def require_usable(target: ResolvedTarget) -> None:
    """Ask the backend of a target, or those of its stages, whether they can run here.

    Raises:
        TargetError: one cannot.
    """
    for item in target.stages or (target,):
        probe = probed(item.backend)
        if probe.status == "absent":
            raise TargetError(
                f"target {item.name!r} cannot be built here: {probe.reason}",
                f"pip install 'hal-compiler[{item.backend}]', or choose another route",
            )


def foreign(targets: Iterable[ResolvedTarget]) -> list[str]:
    """The backends of these targets that come from other packages, as errors name them."""
    parts = [part for target in targets for part in target.stages or (target,)]
    return foreign_names(part.backend for part in parts)


def foreign_names(backends: Iterable[str]) -> list[str]:
    """Those of these backends that come from other packages, as errors name them."""
    points = importlib.metadata.entry_points(group=BACKENDS_GROUP)
    others = {point.name for point in points if not _is_own(point)}
    return [blamed(name) for name in dict.fromkeys(backends) if name in others]


def blamed(name: str) -> str:
    """``backend 'npu' of npu-kit 1.0``: a backend and the package that it comes from."""
    points = importlib.metadata.entry_points(group=BACKENDS_GROUP)
    origins = dict.fromkeys(_origin(point) for point in points if point.name == name)
    return f"backend {name!r}" + (f" of {' and '.join(origins)}" if origins else "")


@contextlib.contextmanager
def blaming(backend: Backend, doing: str) -> Iterator[None]:
    """Let errors of another package's backend be told as its own, not as errors of hal.

    Raises:
        TargetError: the code within the block raised something else than an error of hal.
    """
    try:
        yield
    except HalError:
        raise
    except Exception as error:
        if not is_foreign(backend):
            raise
        raise TargetError(
            f"{blamed(backend.name)} failed when {doing}: {type(error).__name__}: {_line(error)}",
            "this is a fault of that software: report it to its maker",
        ) from error


def is_foreign(backend: Backend) -> bool:
    """Whether a backend is another package's."""
    return type(backend).__module__.partition(".")[0] != "hal"


def _is_own(point: importlib.metadata.EntryPoint) -> bool:
    return point.value.startswith("hal.")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


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
