"""Bring a model of an older operator set to :data:`hal.ir.OPSET`.

From 13 on, few operators changed in a way that a node can see; each has a rule here. From the
others only the version number moves: later versions added types, attributes and inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from hal.errors import ModelError
from hal.ir import IR_VERSION, OPSET

OLDEST = 13
"""Oldest operator set that :func:`to_current` takes."""

_REDUCTIONS = (
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
)


def to_current(model: ir.Model) -> None:
    """Convert ``model`` (functions included) to the current opset, in place.

    Raises:
        ModelError: the opset is newer than ours, older than :data:`OLDEST`, or a node has no
            equivalent.
    """
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        imports = graph.opset_imports
        version = imports.pop("ai.onnx", None) or imports.get("", None)
        if version is None:
            continue
        if not OLDEST <= version <= OPSET:
            raise ModelError(
                f"the model uses opset {version}; opsets {OLDEST} to {OPSET} are supported",
                "re-export it with a supported opset_version",
            )
        for node in list(_nodes(graph)):
            node.version = None
            for introduced, op_type, rule in _RULES:
                if version < introduced and node.op_type == op_type:
                    rule(node)
        imports[""] = OPSET
    model.ir_version = IR_VERSION


def _nodes(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    return (n for n in graph.all_nodes() if n.domain in ("", "ai.onnx"))


def _constant_before(node: ir.Node, array: np.ndarray, name: str) -> ir.Value:
    """Insert a Constant before ``node`` and return its value."""
    value = ir.tensor(array, name=f"{node.outputs[0].name}_{name}")
    constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", value)])
    constant.outputs[0].name = value.name
    constant.outputs[0].type = ir.TensorType(value.dtype)
    constant.outputs[0].shape = ir.Shape(array.shape)
    assert node.graph is not None
    node.graph.insert_before(node, constant)
    return constant.outputs[0]


def _attribute_to_input(node: ir.Node, name: str, index: int, scalar: bool = False) -> None:
    attribute = node.attributes.pop(name, None)
    if attribute is None:
        return
    data = attribute.as_int() if scalar else attribute.as_ints()
    value = _constant_before(node, np.array(data, np.int64), name)
    node.resize_inputs(max(len(node.inputs), index + 1))
    node.replace_input_with(index, value)


def _reduce_axes(node: ir.Node) -> None:  # 18: axes became an input
    _attribute_to_input(node, "axes", 1)


def _split_outputs(node: ir.Node) -> None:  # 18: equal parts must say how many
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _roi_align_mode(node: ir.Node) -> None:  # 16: the default became half_pixel
    mode = "output_half_pixel"
    node.attributes["coordinate_transformation_mode"] = ir.AttrString(
        "coordinate_transformation_mode", mode
    )


def _batch_norm_outputs(node: ir.Node) -> None:  # 14: training is an attribute
    if len(node.outputs) > 1 and any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        raise ModelError(
            f"node {node.name!r} is a BatchNormalization in training mode",
            "export the model in eval mode",
        )
    node.resize_outputs(1)


def _grid_sample_mode(node: ir.Node) -> None:  # 20: modes were renamed
    renamed = {"bilinear": "linear", "bicubic": "cubic"}
    mode = node.attributes.get("mode")
    if mode is not None:
        text = mode.as_string()
        node.attributes["mode"] = ir.AttrString("mode", renamed.get(text, text))


def _dft_axis(node: ir.Node) -> None:  # 20: axis became an input whose default is -2, not 1
    if "axis" not in node.attributes:
        node.attributes["axis"] = ir.AttrInt64("axis", 1)
    _attribute_to_input(node, "axis", 2, scalar=True)


def _group_norm_per_channel(node: ir.Node) -> None:  # 21: scale and bias became per channel
    data = node.inputs[0]
    channels = data.shape[1] if data is not None and data.shape is not None else None
    groups = node.attributes["num_groups"].as_int()
    if not isinstance(channels, int):
        raise ModelError(
            f"node {node.name!r} is a GroupNormalization of an unknown number of channels",
            "run shape inference on the model, or re-export it at opset 21 or newer",
        )
    assert node.graph is not None
    for index in (1, 2):
        column = _constant_before(node, np.array([-1, 1], np.int64), f"column_{index}")
        repeat = _constant_before(node, np.array([1, channels // groups], np.int64), f"rep_{index}")
        flat = _constant_before(node, np.array([-1], np.int64), f"flat_{index}")
        value = node.inputs[index]
        for op_type, argument in (("Reshape", column), ("Expand", repeat), ("Reshape", flat)):
            step = ir.Node("", op_type, [value, argument])
            step.outputs[0].name = f"{node.outputs[0].name}_{op_type}_{index}_{argument.name}"
            node.graph.insert_before(node, step)
            value = step.outputs[0]
        node.replace_input_with(index, value)


_RULES: tuple[tuple[int, str, Callable[[ir.Node], None]], ...] = (
    *((18, op_type, _reduce_axes) for op_type in _REDUCTIONS),
    (18, "Split", _split_outputs),
    (16, "RoiAlign", _roi_align_mode),
    (14, "BatchNormalization", _batch_norm_outputs),
    (20, "GridSample", _grid_sample_mode),
    (20, "DFT", _dft_axis),
    (21, "GroupNormalization", _group_norm_per_channel),
)
