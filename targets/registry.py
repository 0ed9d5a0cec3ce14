"""Which targets there are, and what a name on the command line means.

Descriptors come from three places: the library of this package, the entry-point group
``hal.targets`` (a vendor's pip package) and ``HAL_TARGET_PATH`` (files and folders, separated
like ``PATH``). Backends come from the entry-point group ``hal.backends``::

    target = resolve("host:tvm")
    target.descriptor, target.route, target.backend

A package that is broken is reported in :func:`list_targets` and never hides the others.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hal import descriptor as schema
from hal.descriptor import Descriptor, Route
from hal.errors import DescriptorError, TargetError, did_you_mean
from hal.targets.detect import HOST, host_table

TARGETS_GROUP = "hal.targets"
TARGET_PATH = "HAL_TARGET_PATH"
_LIBRARY = Path(__file__).parent / "library"


@dataclasses.dataclass(frozen=True)
class ResolvedTarget:
    """What ``--target NAME[:ROUTE]`` means: one chip reached through one backend.

    ``NAME+NAME`` is several, one after the other: those are :attr:`stages`, and the other
    attributes are the first one's.
    """

    target: str
    descriptor: Descriptor
    route_name: str
    route: Route
    stages: tuple[ResolvedTarget, ...] = ()

    @property
    def name(self) -> str:
        """Target and route, as the user could have typed it: ``host:tvm``."""
        if self.stages:
            return "+".join(stage.name for stage in self.stages)
        return f"{self.target}:{self.route_name}"

    @property
    def backend(self) -> str:
        """Name of the backend in the entry-point group ``hal.backends``."""
        return self.route.backend


@dataclasses.dataclass(frozen=True)
class TargetInfo:
    """A line of ``hal targets list``. ``problem`` is empty for a target that can be used."""

    name: str
    kind: str
    vendor: str
    description: str
    routes: tuple[str, ...]
    origin: str
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An unresolved descriptor and where it was found."""

    table: Mapping[str, Any]
    source: str
    origin: str

    @property
    def name(self) -> str:
        return str(self.table.get("name", ""))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that was found and could not be used."""

    name: str
    origin: str
    error: TargetError


class Registry:
    """A snapshot of every descriptor that can be found now."""

    def __init__(self, entries: Iterable[_Entry], problems: Iterable[Problem] = ()) -> None:
        self._entries: dict[str, list[_Entry]] = {}
        for entry in entries:
            self._entries.setdefault(entry.name, []).append(entry)
        self.problems = tuple(problems)

    @classmethod
    def discover(cls, target_path: str | None = None) -> Registry:
        """Look in the library, the installed packages and ``target_path``.

        ``target_path`` defaults to the environment variable ``HAL_TARGET_PATH``.
        """
        problems: list[Problem] = []
        entries = list(_read_all(sorted(_LIBRARY.rglob("*.toml")), "built in", problems))
        entries += _from_plugins(problems)
        path = os.environ.get(TARGET_PATH, "") if target_path is None else target_path
        entries += _read_all(_files_of(path, problems), TARGET_PATH, problems)
        registry = cls(entries, problems)
        registry._add_host()
        return registry

    def names(self) -> list[str]:
        """Every name that :meth:`descriptor` may be asked for."""
        return sorted(self._entries)

    def descriptor(self, name: str) -> Descriptor:
        """The complete descriptor of a target, its parents merged in.

        Raises:
            TargetError: there is no such target, or two packages claim the name.
            DescriptorError: its file, or a parent's, is wrong.
        """
        return self._descriptor(self._entry(name))

    def from_file(self, path: str | Path) -> Descriptor:
        """The descriptor in a file that need not be registered; parents are looked up here.

        Raises:
            DescriptorError: the file is missing, no TOML or not a descriptor.
        """
        return self._descriptor(_Entry(schema.read_toml(path), str(path), "file"))

    def resolve(self, name: str) -> ResolvedTarget:
        """What ``NAME[:ROUTE]`` means; ``NAME`` may be a path that ends in ``.toml``.

        ``NAME+NAME`` is a model on several chips.

        Raises:
            TargetError: unknown target or route.
            DescriptorError: the descriptor is wrong.
        """
        if len(parts := _joined(name)) > 1:
            if not all(parts):
                raise TargetError(
                    f"target {name!r} names no chip on one side of a '+'",
                    "NAME+NAME is a model on several chips",
                )
            stages = tuple(self.resolve(part) for part in parts)
            return dataclasses.replace(stages[0], target=name, stages=stages)
        target, colon, route = name.partition(":")
        if not target.strip():
            raise TargetError(
                f"a target without a name: {name!r}",
                "NAME, NAME:ROUTE, or NAME+NAME for a model on several chips; hal targets list",
            )
        if "," in target:
            raise TargetError(
                f"unknown target {name!r}",
                "several targets: --target for each; a model on several chips: NAME+NAME",
            )
        if colon and not route:
            raise TargetError(f"target {name!r} names no route", f"use {target!r} for the default")
        if name.endswith(".toml") or target.endswith(".toml"):
            descriptor = self.from_file(target)
            target = descriptor.name
        else:
            descriptor = self.descriptor(target)
        route_name, chosen = descriptor.route(route or None)
        return ResolvedTarget(target, descriptor.with_route(route or None), route_name, chosen)

    def list(self) -> list[TargetInfo]:
        """Every target, ``host`` first, then everything that was found and cannot be used."""
        infos = [self._info(name) for name in self.names()]
        infos.sort(key=lambda info: (info.name != HOST, info.origin != "built in", info.name))
        broken = [
            TargetInfo(p.name, "", "", "", (), p.origin, p.error.message) for p in self.problems
        ]
        return infos + broken

    def _info(self, name: str) -> TargetInfo:
        origin = ", ".join(entry.origin for entry in self._entries[name])
        try:
            found = self.descriptor(name)
        except TargetError as error:
            return TargetInfo(name, "", "", "", (), origin, error.message)
        return TargetInfo(
            name,
            found.kind,
            found.vendor,
            found.description,
            tuple(found.routes),
            origin,
        )

    def _entry(self, name: str) -> _Entry:
        found = self._entries.get(name, [])
        if not found:
            for problem in self.problems:
                if problem.name == name:
                    raise problem.error
            raise TargetError(f"unknown target {name!r}", did_you_mean(name, self.names()))
        if len(found) > 1:
            sources = " and ".join(f"{entry.source} ({entry.origin})" for entry in found)
            raise TargetError(
                f"target {name!r} is described twice: {sources}",
                "uninstall one of them, or rename one descriptor",
            )
        return found[0]

    def _descriptor(self, entry: _Entry) -> Descriptor:
        return schema.parse(self._merged(entry), entry.source)

    def _merged(self, entry: _Entry, chain: tuple[str, ...] = ()) -> dict[str, Any]:
        schema.check_part(entry.table, entry.source)
        parent = entry.table.get("extends")
        if parent is None:
            return dict(entry.table)
        chain = (*chain, entry.name)
        if parent in chain:
            loop = " -> ".join((*chain, parent))
            raise DescriptorError(
                f"{entry.source}: extends goes in a circle: {loop}",
                "remove one 'extends' of the chain",
            )
        if parent not in self._entries:
            raise DescriptorError(
                f"{entry.source}: extends names the unknown target {parent!r}",
                did_you_mean(parent, self.names()),
            )
        return schema.merge(self._merged(self._entry(parent), chain), entry.table)

    def _add_host(self) -> None:
        """Describe this machine on top of the best matching library entry."""
        candidates = []
        for name in self.names():
            try:
                candidates.append(self.descriptor(name))
            except TargetError:
                continue
        table = host_table(candidates)
        self._entries[HOST] = [_Entry(table, "detection of this machine", "built in")]


def discover() -> Registry:
    """Everything that can be found now."""
    return Registry.discover()


def resolve(name: str) -> ResolvedTarget:
    """See :meth:`Registry.resolve`, on everything that can be found now."""
    return Registry.discover().resolve(name)


def list_targets() -> list[TargetInfo]:
    """See :meth:`Registry.list`, on everything that can be found now."""
    return Registry.discover().list()


# -- finding descriptors ----------------------------------------------------------------------


def _files_of(path: str, problems: list[Problem]) -> list[Path]:
    """TOML files named by a list of files and folders."""
    files: list[Path] = []
    for part in filter(None, path.split(os.pathsep)):
        place = Path(part)
        if place.is_dir():
            files += sorted(place.rglob("*.toml"))
        elif place.exists():
            files.append(place)
        else:
            error = TargetError(f"{TARGET_PATH} names {part!r}, which does not exist", "fix it")
            problems.append(Problem(part, TARGET_PATH, error))
    return files


def _read_all(files: Iterable[Path], origin: str, problems: list[Problem]) -> Iterator[_Entry]:
    for file in files:
        try:
            yield _entry_of(schema.read_toml(file), str(file), origin)
        except DescriptorError as error:
            problems.append(Problem(file.stem, origin, error))


def _entry_of(table: Mapping[str, Any], source: str, origin: str) -> _Entry:
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise DescriptorError(f"{source}: missing field 'name'", "give the target a name")
    if name == HOST:
        raise DescriptorError(
            f"{source}: the name {HOST!r} belongs to the machine that hal runs on",
            "choose another name",
        )
    return _Entry(table, source, origin)


def _from_plugins(problems: list[Problem]) -> list[_Entry]:
    entries: list[_Entry] = []
    for point in importlib.metadata.entry_points(group=TARGETS_GROUP):
        origin = _origin(point)
        try:
            items = list(_items_of(point.load()))
        except Exception as error:  # noqa: BLE001 - a vendor's code may raise anything
            reason = f"{type(error).__name__}: {error}"
            wrapped = TargetError(
                f"targets of {origin} cannot be loaded: {reason}",
                f"upgrade or uninstall {origin}",
            )
            problems.append(Problem(point.name, origin, wrapped))
            continue
        for item in items:
            entries += _plugin_entry(item, point.name, origin, problems)
    return entries


def _plugin_entry(
    item: object, label: str, origin: str, problems: list[Problem]
) -> Iterator[_Entry]:
    if isinstance(item, (str, os.PathLike)):
        yield from _read_all([Path(item)], origin, problems)
        return
    try:
        if not isinstance(item, Mapping):
            raise DescriptorError(
                f"{origin}: {label} gave a {type(item).__name__}, not a path or a dict",
                "yield paths of TOML files or dicts",
            )
        yield _entry_of(item, f"{origin}: {label}", origin)
    except DescriptorError as error:
        problems.append(Problem(label, origin, error))


def _items_of(value: Any) -> Iterable[object]:
    """What an entry point gives: a function's result, or a module's ``targets()`` or TOML files."""
    if isinstance(value, types.ModuleType):
        function: Callable[[], Iterable[object]] | None = getattr(value, "targets", None)
        if callable(function):
            return function()
        folders = list(getattr(value, "__path__", [])) or [str(Path(str(value.__file__)).parent)]
        return [file for folder in folders for file in sorted(Path(folder).rglob("*.toml"))]
    result = value() if callable(value) else value
    return [result] if isinstance(result, (str, os.PathLike, Mapping)) else list(result)


def _origin(point: importlib.metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _joined(name: str) -> list[str]:
    """The targets of ``A+B``; a plus within the path of a descriptor's file joins nothing."""
    pieces = name.split("+")
    for end in range(len(pieces), 1, -1):
        path, _, route = "+".join(pieces[:end]).partition(":")
        if "+" not in route and Path(path.strip()).is_file():
            break
    else:
        end = 1
    first, rest = "+".join(pieces[:end]).strip(), pieces[end:]
    return [first, *(_joined("+".join(rest)) if rest else [])]
