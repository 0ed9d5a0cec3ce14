"""The artifact: a neutral graph, its weights, and builds for any number of targets."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.numpy import load as load_arrays

from hal.bundle.files import BundleFiles, checked_path
from hal.bundle.manifest import GRAPH, Manifest, read_manifest
from hal.errors import BundleError

if TYPE_CHECKING:
    import onnx_ir as ir

    from hal.ir import Graph
    from hal.runtime.session import Session
    from hal.runtime.verification import Narrowed


class Bundle:
    """A compiled model. Made by :func:`hal.compile`, read by :func:`hal.load`."""

    def __init__(
        self,
        files: BundleFiles,
        manifest: Manifest,
        temporary: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self.files = files
        self.manifest = manifest
        self._temporary = temporary  # removed with the bundle when no output was asked for

    @property
    def path(self) -> Path:
        """Directory or file on disk."""
        return self.files.root

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets that the bundle has builds for."""
        return tuple(self.manifest.builds)

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, targets={list(self.targets)})"

    def graph(self) -> Graph:
        """The neutral graph; weights are mapped from the bundle, not read.

        Raises:
            BundleError: ``graph.onnx`` cannot be parsed, or refers to files outside the bundle.
        """
        return load_graph(self.files)

    def samples(self) -> list[dict[str, Any]]:
        """Inputs of the calls that the bundle was verified with; none where none are stored."""
        steps: list[dict[str, Any]] = []
        if self.manifest.samples is None:
            return steps
        arrays = load_arrays(self.files.read(self.manifest.samples))
        for key in sorted(arrays):
            index, _, name = key.partition("/")
            while len(steps) <= int(index):
                steps.append({})
            steps[int(index)][name] = arrays[key]
        return steps

    def session(
        self,
        target: str | None = None,
        *,
        threads: int | None = None,
        kv_layout: str | None = None,
    ) -> Session:
        """Load a build; without ``target``, the best one in the bundle for this machine.

        ``kv_layout`` (``contiguous`` or ``paged``) overrides the layout of the build's cache.

        Raises:
            InputError: the build cannot use that layout.
            TargetError: there is no such build, or it cannot run here.
        """
        from hal.runtime.opening import open_session

        return open_session(self, target, threads=threads, kv_layout=kv_layout)

    def retarget(
        self,
        target: str | Sequence[str],
        output: str | Path | None = None,
        *,
        dims: Mapping[str, int] | None = None,
        kv_cache: str | None = None,
        verify: bool = True,
        fallback: bool = True,
    ) -> Bundle:
        """A new bundle with a build for ``target``, from the neutral graph alone (no torch needed).

        ``dims`` gives a model with carried state the extents of its steps, for chips with static
        shapes; default: those of a build that has some. ``kv_cache`` chooses how its cache is
        carried (``contiguous``, ``paged``, ``int8``, ``int4``); default: as the bundle's first
        build does.

        Raises:
            TargetError, UnsupportedError, CheckFailed: as :func:`hal.compile`.
            InputError: ``kv_cache`` says what to carry, or the model carries no cache.
        """
        from hal.compiler import retarget

        return retarget(
            self, target, output, dims=dims, kv_cache=kv_cache, verify=verify, fallback=fallback
        )

    def verify(self, target: str | None = None, *, against: Any = None) -> dict[str, Any]:
        """Run builds against the reference and return the error figures by target.

        Args:
            target: one build; default: all of them, those that cannot run here with a ``reason``.
            against: a model (anything :func:`hal.compile` takes) to compare with; default: the
                bundle's own neutral graph.

        Raises:
            CheckFailed: a build is out of tolerance; names the first tensor that diverges.
        """
        from hal.compiler import verify

        return verify(self, target, against=against)

    def page(self, output: str | Path, target: str | None = None) -> dict[str, Any]:
        """Write a build as a static page for browsers: a folder that any HTTP server shows.

        Args:
            output: the folder; an earlier page is replaced.
            target: which build; default: the first that a browser can run.

        Returns:
            ``page`` (the folder), ``target``, ``files`` (bytes by name), ``bytes``.

        Raises:
            InputError: ``output`` is something else, or its folder does not exist.
            TargetError: there is no build for ``target``.
            UnsupportedError: no browser runs what the build is; a part of it runs on the host, and
                which nodes those are; or the model carries state.
        """
        from hal.bundle.page import write_page

        return write_page(self, output, target)

    def narrowed(self, target: str) -> dict[str, Narrowed]:
        """Float types that a build's target computes in a smaller one, with that one's tolerances.

        ``target`` is a name in ``manifest.builds``.
        """
        from hal.runtime.verification import Narrowed, narrowed_floats

        types = narrowed_floats(self.manifest.builds[target])
        return {wide: Narrowed(wide, small) for wide, small in types.items()}


def load(path: str | Path) -> Bundle:
    """Open a bundle and check every file's digest.

    Raises:
        InputError: ``path`` is no path.
        BundleError: not a bundle, damaged, incomplete, or of a newer format.
    """
    files = BundleFiles.open(checked_path(path, "path"))
    return Bundle(files, read_manifest(files))


def load_graph(files: BundleFiles) -> Graph:
    """Parse ``graph.onnx``; external tensors point at the real files behind the bundle's members.

    Raises:
        BundleError: it cannot be parsed, or a weight lies outside the bundle or past a file's end.
    """
    # Running a build needs no graph: the libraries for graphs are imported here.
    import onnx_ir as ir

    from hal.ir import Graph

    try:
        model = ir.serde.deserialize_model(_parse(files))
    except BundleError:
        raise
    except Exception as error:
        raise BundleError(
            f"{files.root}: {GRAPH} cannot be parsed: {error}", "rebuild the bundle"
        ) from error
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = _relocated(files, tensor)
    return Graph.from_model(model)


def _parse(files: BundleFiles) -> Any:
    import onnx

    return onnx.load_model_from_string(files.read(GRAPH))


def _relocated(files: BundleFiles, tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    import onnx_ir as ir

    path, start, size = files.locate(str(tensor.location))
    offset, length = tensor.offset or 0, tensor.length or tensor.nbytes
    if offset + length > size:
        raise BundleError(
            f"{files.root}: tensor {tensor.name!r} lies past the end of {tensor.location}",
            "rebuild the bundle",
        )
    inside = files.is_directory
    return ir.ExternalTensor(
        str(tensor.location) if inside else path.name,
        offset if inside else start + offset,
        length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name or "",
        base_dir=str(files.root if inside else path.parent),
    )
