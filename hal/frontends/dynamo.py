"""``torch.compile(model, backend="hal")``.

    >>> compiled = torch.compile(model, backend="hal", options={"target": "host:tvm"})
    >>> compiled(x)            # a torch tensor; the graph ran in a hal session

For inference: results carry no gradients. A graph that hal cannot take runs in torch, with a
warning that says why; options that hal does not take are an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hal.errors import HalError, InputError, UnsupportedError, did_you_mean

_OPTIONS = ("fallback", "kv_cache", "progress", "quantize", "target", "verify")
_STATIC = "_dynamo_static_input_type"  # torch marks parameters and buffers so


def backend(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile one captured graph, when it is first called and its weights are at hand.

    Args:
        gm: the graph; parameters and buffers are among its inputs.
        example_inputs: unused: they may be fake.
        options: arguments of :func:`hal.compile`, such as ``target`` and ``verify``.

    Returns:
        A callable with ``gm``'s arguments and results. Its first call raises InputError or
        TargetError if an option is wrong (torch wraps what is raised here in an error of its own).
    """
    del example_inputs
    return _CompiledGraph(gm, dict(options or {}))


class _CompiledGraph:
    """A captured graph and its session, made anew when a weight changes."""

    def __init__(self, gm: torch.fx.GraphModule, options: dict[str, Any]) -> None:
        self.gm = gm
        self.options = options
        self.placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self.static = [i for i, n in enumerate(self.placeholders) if _is_static(n)]
        self.results = _results(gm)
        self.session: Any = None
        self.versions: tuple[Any, ...] = ()
        self.in_torch = False

    def __call__(self, *args: Any) -> Any:
        if self.in_torch:
            return self.gm(*args)
        versions = tuple(_version(args[i]) for i in self.static)
        if self.session is None or versions != self.versions:
            _check_options(self.options)
            try:
                self.session = self._compile(args)
            except HalError as error:
                warnings.warn(
                    f"hal cannot compile this graph, it runs in torch: {error.message}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self.in_torch = True
                return self.gm(*args)
            self.versions = versions
        return self._run(args)

    def _tensor_indices(self) -> list[int]:
        return [
            i
            for i, node in enumerate(self.placeholders)
            if i not in self.static and isinstance(node.meta.get("example_value"), torch.Tensor)
        ]

    def _compile(self, args: tuple[Any, ...]) -> Any:
        import hal

        if not all(_is_tensor(r) or not isinstance(r, torch.fx.Node) for r in self.results):
            raise UnsupportedError(
                "a result is a number that depends on shapes", "return tensors only"
            )
        tensors = self._tensor_indices()
        if not tensors:
            raise UnsupportedError("the graph has no tensor inputs", "run it in torch")
        if any(isinstance(a, torch.Tensor) and a.device.type != "cpu" for a in args):
            raise UnsupportedError("a tensor is not in host memory", "move the model to the CPU")
        module = _Positional(self.gm, self.placeholders, tensors, args)
        dynamic = {f"tensors_{k}": axes for k, axes in enumerate(module.axes) if axes}
        inputs = tuple(args[i].detach() for i in tensors)
        bundle = hal.compile(module, inputs, dynamic=dynamic, **self.options)
        return bundle.session()

    def _run(self, args: tuple[Any, ...]) -> Any:
        wanted = {spec.name for spec in self.session.inputs}
        data = {f"tensors_{k}": args[i] for k, i in enumerate(self._tensor_indices())}
        arrays = {k: v.detach().contiguous() for k, v in data.items() if k in wanted}
        outputs = self.session.run(arrays)
        produced = iter(_to_torch(outputs[spec.name]) for spec in self.session.outputs)
        return [next(produced) if isinstance(r, torch.fx.Node) else r for r in self.results]


class _Positional(torch.nn.Module):
    """The graph as a function of its data tensors: weights bound, sizes read from shapes."""

    def __init__(
        self,
        gm: torch.fx.GraphModule,
        placeholders: Sequence[torch.fx.Node],
        tensors: Sequence[int],
        args: Sequence[Any],
    ) -> None:
        super().__init__()
        self.gm = gm
        self.tensors = list(tensors)
        self.axes: list[dict[int, str]] = []
        self.sizes: dict[int, tuple[int, int]] = {}  # argument → (tensor, axis) that tells it
        found: dict[str, tuple[int, int]] = {}
        for position, index in enumerate(tensors):
            shape = placeholders[index].meta["example_value"].shape
            names = {a: str(d) for a, d in enumerate(shape) if isinstance(d, torch.SymInt)}
            self.axes.append({a: n for a, n in names.items() if n.isidentifier()})
            for axis, name in names.items():
                found.setdefault(name, (position, axis))
        self.fixed: dict[int, Any] = {}
        for index, node in enumerate(placeholders):
            if index in self.tensors:
                continue
            value = node.meta.get("example_value")
            if isinstance(value, torch.SymInt) and str(value) in found:
                self.sizes[index] = found[str(value)]
            elif isinstance(args[index], torch.Tensor):
                name = f"weight_{index}"
                self.register_buffer(name, args[index].detach(), persistent=False)
                self.fixed[index] = name
            else:
                raise UnsupportedError(
                    f"input {node.name!r} is a number that no tensor's shape tells",
                    "pass it as a tensor, or mark it static",
                )
        self.count = len(placeholders)

    def forward(self, *tensors: torch.Tensor) -> Any:
        """``tensors`` in the order of the graph's data inputs."""
        values: list[Any] = [None] * self.count
        for index, tensor in zip(self.tensors, tensors, strict=True):
            values[index] = tensor
        for index, name in self.fixed.items():
            values[index] = getattr(self, name)
        for index, (position, axis) in self.sizes.items():
            values[index] = tensors[position].shape[axis]
        results = self.gm(*values)
        return tuple(r for r in results if isinstance(r, torch.Tensor))


def _check_options(options: Mapping[str, Any]) -> None:
    from hal.compiler import check_options

    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise InputError(
            f"the backend hal has no option {unknown[0]!r}", did_you_mean(unknown[0], _OPTIONS)
        )
    names = ("target", "quantize", "kv_cache")
    check_options(**{name: options[name] for name in names if name in options})


def _is_static(node: torch.fx.Node) -> bool:
    value = node.meta.get("example_value")
    marks = node.meta.get("tensor_dict") or {}
    return isinstance(value, torch.nn.Parameter) or _STATIC in marks


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.fx.Node) and isinstance(
        value.meta.get("example_value"), torch.Tensor
    )


def _results(gm: torch.fx.GraphModule) -> list[Any]:
    """What the graph returns: nodes and constants."""
    for node in gm.graph.nodes:
        if node.op == "output":
            return list(node.args[0])
    return []


def _version(tensor: torch.Tensor) -> tuple[int, int]:
    """Changes whenever the tensor's values may have changed."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _to_torch(array: Any) -> torch.Tensor:
    """A tensor on the same memory, where numpy lets it be written."""
    array = np.asarray(array)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()
    if array.dtype.kind == "V" or array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
