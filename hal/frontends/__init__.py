"""Frontends: every source format becomes the same :class:`hal.ir.Graph`.

    >>> load("model.onnx").graph
    >>> load(module, (x,), dynamic={"x": {0: "batch"}}).graph

Importing this package needs neither torch nor transformers; the frontends that need them say so.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.errors import HalError, InputError, MissingExtraError, ModelError
from hal.frontends.source import Loaded

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Loaded", "load"]

_SUPPORTED = "a .onnx or .pt2 file, a Hugging Face directory, or python:module:callable"


def load(model: Any, inputs: Any = None, dynamic: Mapping[str, Any] | None = None) -> Loaded:
    """Bring a model from any supported source to the IR.

    Args:
        model: a ``torch.nn.Module``, a ``torch.export.ExportedProgram``, or a path or string: an
            ``.onnx`` or ``.pt2`` file, a Hugging Face directory, or ``python:module:callable``,
            where the callable returns a module or ``(module, inputs)`` or
            ``(module, inputs, dynamic)``.
        inputs: example inputs of a module: a tensor, a tuple or a dict. A transformers model may
            go without.
        dynamic: names of a module's dynamic axes: ``{"input": {axis: "name"}}``.

    Raises:
        ModelError: the source is missing, damaged or of no known kind.
        ExportError: a module cannot be expressed in the IR.
        MissingExtraError: torch or transformers is needed and not installed.
    """
    if isinstance(model, str) and model.startswith("python:"):
        return _load_callable(model, inputs, dynamic)
    if isinstance(model, (str, os.PathLike)):
        if dynamic:
            raise InputError(
                f"dynamic axes are given, but those of {os.fspath(model)!r} are fixed in the file",
                "leave dynamic out; it is for modules and their example inputs",
            )
        if not os.fspath(model):
            raise ModelError("the path of the model is empty", f"pass {_SUPPORTED}")
        return _load_path(Path(model))
    if "torch" in sys.modules:
        return _load_torch(model, inputs, dynamic)
    raise ModelError(f"cannot load a {type(model).__name__}", f"pass {_SUPPORTED}")


def _load_path(path: Path) -> Loaded:
    if path.is_dir() and path.suffix in (".onnx", ".pt2") and not (path / "config.json").exists():
        raise ModelError(
            f"{path} is a folder, not a {path.suffix} file",
            f"give the path of the {path.suffix} file",
        )
    if path.is_dir():
        _need("transformers", "a Hugging Face directory", "hf")
        from hal.frontends import huggingface

        return huggingface.from_directory(path)
    if not path.exists():
        raise ModelError(f"no such file or directory: {path}", "check the path")
    if path.suffix == ".pt2":
        _need("torch", "a .pt2 file", "torch")
        from hal.frontends import torch_module

        return Loaded(torch_module.from_file(path), source=str(path))
    if path.suffix == ".onnx":
        from hal.frontends import onnx_file

        return Loaded(onnx_file.from_file(path), source=str(path))
    raise ModelError(f"{path} is of no known kind of model", f"pass {_SUPPORTED}")


def _load_torch(model: Any, inputs: Any, dynamic: Mapping[str, Any] | None) -> Loaded:
    import torch

    from hal.frontends import torch_module

    source = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, torch.export.ExportedProgram):
        return Loaded(torch_module.from_exported_program(model), source=source)
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"cannot load a {type(model).__name__}", f"pass a module, {_SUPPORTED}")
    if inputs is None and _is_transformers_model(model):
        from hal.frontends import huggingface

        return Loaded(huggingface.from_pretrained_model(model), source=source)
    return Loaded(torch_module.from_module(model, inputs, dynamic), source=source)


def _is_transformers_model(model: Any) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _load_callable(text: str, inputs: Any, dynamic: Mapping[str, Any] | None) -> Loaded:
    parts = text.split(":")
    hint = "write python:package.module:callable; the module must be importable from here"
    if len(parts) != 3 or not all(parts):
        raise ModelError(f"{text!r} is not python:module:callable", hint)
    _need("torch", text, "torch")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(parts[1])
    except Exception as error:  # a user's module may raise anything
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise ModelError(
            f"cannot import module {parts[1]!r}: {kind}{_line(error)}", hint
        ) from error
    try:
        function = getattr(module, parts[2])
    except AttributeError:
        raise ModelError(f"module {parts[1]!r} has no {parts[2]!r}", hint) from None
    made, *examples = _called(function, text)
    inputs = examples[0] if inputs is None and examples else inputs
    dynamic = examples[1] if dynamic is None and len(examples) > 1 else dynamic
    loaded = load(made, inputs, dynamic)
    return Loaded(loaded.graph, loaded.assets, text)


def _called(function: Any, text: str) -> tuple[Any, ...]:
    """What a user's callable returns, as a tuple that starts with a module."""
    import torch

    hint = (
        "the callable takes no arguments and returns a torch.nn.Module, or (module, inputs),"
        " or (module, inputs, dynamic)"
    )
    if not callable(function):
        raise ModelError(f"{text} is a {type(function).__name__}, which cannot be called", hint)
    try:
        result = function()
    except HalError:
        raise
    except Exception as error:
        raise ModelError(f"{text} failed: {type(error).__name__}: {_line(error)}", hint) from error
    made = result if isinstance(result, tuple) else (result,)
    kinds = (torch.nn.Module, torch.export.ExportedProgram)
    if not 1 <= len(made) <= 3 or not isinstance(made[0], kinds):
        what = type(result).__name__
        if isinstance(result, tuple):
            what += f" ({', '.join(type(item).__name__ for item in result)})"
        raise ModelError(f"{text} returned a {what}", hint)
    return made


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def _need(module: str, purpose: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(purpose, extra)
