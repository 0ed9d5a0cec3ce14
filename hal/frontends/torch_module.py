"""PyTorch modules and exported programs.

>>> graph = from_module(module, (x,), dynamic={"x": {0: "batch"}})
>>> graph.signature().inputs[0].dims
('batch', 16)
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from hal.errors import ExportError, InputError, ModelError, did_you_mean
from hal.frontends import torch_translate
from hal.ir import Graph

Dynamic = Mapping[str, Any]
"""``{"input": {axis: "name"}}``; for nested inputs the same shape of nesting, or flat names
(``pair_0``). Axes of one name have one size at run time."""

_DYNAMIC_HINT = 'write {"input": {axis: "name"}}'


def from_module(
    module: torch.nn.Module,
    inputs: Any,
    dynamic: Dynamic | None = None,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Graph:
    """Export a module.

    Args:
        module: exported in eval mode; its weights are shared with the graph, not copied.
        inputs: example inputs: a tensor, a tuple of positional or a dict of keyword arguments;
            they may nest; numpy arrays count as tensors. Dynamic axes may have any example size,
            1 included.
        dynamic: names of the axes whose size may change at run time.
        input_names: names of the graph's inputs, in order; by default ``forward``'s own.
        output_names: names of the graph's outputs, in order.

    Raises:
        ExportError: control flow or shapes depend on data, a dynamic axis is fixed by the model,
            or an operator has no translation.
        InputError: ``dynamic`` names an input or axis that does not exist.
    """
    args, kwargs = pytree.tree_map(_as_tensor, _arguments(module, inputs))
    leaves = _named_leaves(module, args, kwargs)
    axes = _flat_dynamic(dynamic or {}, leaves)
    args, kwargs = _enlarged((args, kwargs), leaves, axes)
    program = _capture(module, args, kwargs, axes)
    names = torch_translate.program_input_names(program)
    _check_dynamic(program, module, axes)
    return torch_translate.graph_from_program(
        program,
        name=type(module).__name__,
        dims={name: axes[name] for name in names if name in axes},
        input_names=input_names,
        output_names=output_names,
    )


def from_exported_program(program: torch.export.ExportedProgram) -> Graph:
    """Translate an exported program; dynamic dims are named after the input and axis (``x_0``).

    Raises:
        ExportError: an operator has no translation.
    """
    return torch_translate.graph_from_program(program)


def from_file(path: str | Path) -> Graph:
    """Read a ``.pt2`` file as ``torch.export.save`` writes it.

    Raises:
        ModelError: the file is missing, or is not an exported program.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no such file: {path}", "check the path")
    hint = "write it with torch.export.save of the same torch version"
    if not zipfile.is_zipfile(path):
        raise ModelError(f"{path} is not a .pt2 archive, or is truncated", hint)
    try:
        with torch_translate.quiet():
            program = torch.export.load(path)
    except Exception as error:  # noqa: BLE001  anything can be in a file
        raise ModelError(
            f"{path} holds no readable exported program: {one_line(error)}", hint
        ) from None
    return from_exported_program(program)


def _arguments(module: torch.nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if inputs is None:
        parameters = inspect.signature(module.forward).parameters.values()
        if any(
            p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            for p in parameters
        ):
            raise ExportError(
                f"module {type(module).__name__} needs example inputs",
                "pass inputs: a tensor, a tuple of positional or a dict of keyword arguments",
            )
        return (), {}
    return (inputs,), {}


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _bound(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by parameter name, those of ``**kwargs`` under their own names."""
    signature = inspect.signature(module.forward)
    try:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise ExportError(
            f"example inputs do not fit {type(module).__name__}.forward: {error}",
            f"its signature is forward{signature}",
        ) from None
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments


def _named_leaves(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Leaves of the arguments by the names that torch.export gives them (``pair_0``)."""
    leaves: dict[str, Any] = {}
    for name, value in _bound(module, args, kwargs).items():
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            leaves["_".join([name, *_keys(path)])] = leaf
    return leaves


def _keys(path: Any) -> list[str]:
    """A pytree path as text: dict keys, sequence indices, attribute names."""
    return [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]


def _flat_dynamic(dynamic: Dynamic, leaves: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """Dynamic axes by leaf name, checked and with non-negative axes."""
    flat = _by_leaf(dynamic)
    for name, axes in flat.items():
        leaf = leaves.get(name)
        if not isinstance(leaf, torch.Tensor):
            tensors = [n for n, v in leaves.items() if isinstance(v, torch.Tensor)]
            raise InputError(
                f"dynamic names {name!r}, which is no tensor input", did_you_mean(name, tensors)
            )
        for axis, symbol in axes.items():
            if not isinstance(symbol, str):
                raise InputError(f"dynamic names axis {axis} of {name!r} {symbol!r}", _DYNAMIC_HINT)
            if not -leaf.ndim <= axis < leaf.ndim:
                raise InputError(
                    f"dynamic axis {axis} of {name!r} does not exist: it has {leaf.ndim} dims",
                    f"its example has the shape {tuple(leaf.shape)}",
                )
        flat[name] = {axis % leaf.ndim: symbol for axis, symbol in axes.items()}
    return flat


def _by_leaf(dynamic: Dynamic) -> dict[str, dict[int, str]]:
    """Dynamic axes by leaf name, as they were given."""
    flat: dict[str, dict[int, str]] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, Mapping) and all(isinstance(k, int) for k in value):
            flat[name] = dict(value)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                visit(f"{name}_{key}", item)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                visit(f"{name}_{index}", item)
        elif value is not None:
            raise InputError(f"dynamic gives {name!r} the value {value!r}", _DYNAMIC_HINT)

    if not isinstance(dynamic, Mapping):
        raise InputError(f"dynamic={dynamic!r} is no dictionary", _DYNAMIC_HINT)
    for name, value in dynamic.items():
        visit(name, value)
    return flat


def _enlarged(tree: Any, leaves: Mapping[str, Any], axes: Mapping[str, Mapping[int, str]]) -> Any:
    """Repeat examples along dynamic axes of size 0 or 1, which torch.export would fix."""
    sizes: dict[str, int] = {}
    for name, dims in axes.items():
        for axis, symbol in dims.items():
            size = leaves[name].shape[axis]
            if sizes.setdefault(symbol, size) != size:
                raise InputError(
                    f"dynamic dim {symbol!r} has the sizes {sizes[symbol]} and {size} in the"
                    f" examples (axis {axis} of {name!r})",
                    "axes of one name must have one size; use another name",
                )
    small = {
        symbol
        for name, dims in axes.items()
        for axis, symbol in dims.items()
        if leaves[name].shape[axis] < 2
    }
    if not small:
        return tree  # torch.export fixes only sizes 0 and 1
    replaced: dict[int, torch.Tensor] = {}
    for name, dims in axes.items():
        tensor = leaves[name]
        for axis, symbol in dims.items():
            if symbol in small:
                shape = list(tensor.shape)
                shape[axis] = 2
                if tensor.shape[axis] == 0:
                    tensor = tensor.new_zeros(shape)
                else:
                    tensor = tensor.narrow(axis, 0, 1).expand(shape).contiguous()
        replaced[id(leaves[name])] = tensor
    return pytree.tree_map(lambda leaf: replaced.get(id(leaf), leaf), tree)


def _capture(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axes: Mapping[str, Mapping[int, str]],
) -> torch.export.ExportedProgram:
    """Run torch.export with named dims; where their rules are too strict, with inferred ones."""
    symbols = sorted({symbol for dims in axes.values() for symbol in dims.values()})
    named = {s: torch.export.Dim(f"dim_{i}", min=0) for i, s in enumerate(symbols)}
    bound = _bound(module, args, kwargs)

    def export(dims: Mapping[str, Any]) -> torch.export.ExportedProgram:
        def leaf_dims(name: str, path: Any) -> dict[int, Any] | None:
            leaf_axes = axes.get("_".join([name, *_keys(path)]), {})
            return {axis: dims[symbol] for axis, symbol in leaf_axes.items()} or None

        shapes = {
            name: pytree.tree_map_with_path(lambda path, _, n=name: leaf_dims(n, path), value)
            for name, value in bound.items()
        }
        with torch.no_grad(), torch_translate.quiet(), _no_graph_dump():
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)

    training = module.training
    try:
        module.eval()
        try:
            return export(named)
        except torch._dynamo.exc.UserError as error:
            if not symbols or "onstraint" not in str(error):
                raise
            _refuse_fixed(module, axes, symbols, str(error))
            return export(dict.fromkeys(symbols, torch.export.Dim.AUTO))
    except ExportError:
        raise
    except Exception as error:  # noqa: BLE001  anything can go wrong inside a user's module
        raise ExportError(*_explain(module, error)) from None
    finally:
        module.train(training)


@contextlib.contextmanager
def _no_graph_dump() -> Iterator[None]:
    """Keep from stderr the graph that torch prints when an export fails; nothing else is lost."""
    said, graph = io.StringIO(), ""
    try:
        with contextlib.redirect_stderr(said):
            yield
    except Exception as error:
        graph = f"{getattr(error, 'partial_fx_graph', '')}\n"
        raise
    finally:
        sys.stderr.write(said.getvalue().replace(graph, "") if graph.strip() else said.getvalue())


def _refuse_fixed(
    module: torch.nn.Module,
    axes: Mapping[str, Mapping[int, str]],
    symbols: Sequence[str],
    text: str,
) -> None:
    """Raise if torch says that a named dim has only one possible size."""
    fixed = re.search(r"marked dim_(\d+) as dynamic but .* specialized it .* \((\d+)\)", text)
    if fixed:
        symbol = symbols[int(fixed[1])]
        name, axis = next(
            (name, axis) for name, dims in axes.items() for axis, s in dims.items() if s == symbol
        )
        raise _fixed_error(module, name, axis, symbol, int(fixed[2]))


def _check_dynamic(
    program: torch.export.ExportedProgram,
    module: torch.nn.Module,
    axes: Mapping[str, Mapping[int, str]],
) -> None:
    """Raise if an axis that should be dynamic came out with one size."""
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    for name, dims in axes.items():
        for axis, symbol in dims.items():
            value = values.get(name)
            if isinstance(value, torch.Tensor) and is_concrete_int(value.shape[axis]):
                raise _fixed_error(module, name, axis, symbol, int(value.shape[axis]))


def _fixed_error(
    module: torch.nn.Module, name: str, axis: int, symbol: str, size: int
) -> ExportError:
    return ExportError(
        f"axis {axis} ({symbol!r}) of input {name!r} cannot be dynamic: module"
        f" {type(module).__name__} fixes it to {size}",
        "leave it out of dynamic, or remove what ties the module to that size",
    )


def _explain(module: torch.nn.Module, error: BaseException) -> tuple[str, str]:
    """Message and hint for a failed capture; never torch's graph dump."""
    name = type(module).__name__
    where = _user_frame(error)
    text = str(error)
    kind = type(error).__name__
    if "DataDependent" in kind or "data-dependent" in text:
        expression = re.search(r"data-dependent expression ([^(\n]+?)(?: \(|\n|$)", text)
        detail = f" ({expression[1].strip()})" if expression else ""
        return (
            f"module {name} cannot be exported: control flow or a shape depends on the values of a"
            f" tensor{detail}{where}",
            "replace it with torch.where, torch.cond or masking, so that shapes follow from shapes",
        )
    if "Constraints violated" in text or "ConstraintViolation" in kind:
        return (
            f"module {name} cannot be exported with these dynamic axes: {one_line(error)}{where}",
            "make fewer axes dynamic, or give axes that must be equal the same name",
        )
    return (
        f"module {name} cannot be exported: {kind}: {one_line(error)}{where}",
        "check that the module runs on the example inputs, and torch.export.export on the module",
    )


def one_line(error: BaseException) -> str:
    """The first line of an error's text (two, if it ends in a colon), 200 characters at most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):
        lines[0] = " ".join(lines[:2])
    return lines[0][:200] if lines else type(error).__name__


def _user_frame(error: BaseException) -> str:
    """`` at file.py:12`` for the last frame of the traceback outside torch, or nothing."""
    found = ""
    traceback = error.__traceback__
    torch_root, here = str(Path(torch.__file__).parent), str(Path(__file__).parent)
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith((torch_root, here, "<")):
            found = f" at {Path(file).name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found
