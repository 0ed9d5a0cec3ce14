"""``torch.export.ExportedProgram`` → :class:`hal.ir.Graph`.

Operators are translated by torch's own ONNX exporter with our additions (:mod:`.torch_ops`,
:mod:`.complex_pairs`); the result is brought to our opset. Weights stay torch's memory: an
initializer's ``const_value`` reads the parameter's storage when asked for bytes.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from onnxscript.rewriter.rules import common as rules
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from hal.errors import ExportError
from hal.frontends import complex_pairs, opset, recurrent_ops, torch_ops
from hal.ir import Graph
from hal.ir.ops import ensure_functions

# torch's exporter fuses RMSNormalization and RotaryEmbedding at exactly this version.
_EXPORTER_OPSET = 23
# onnxscript's own list without slice_split_rule: it looks at every pair of nodes.
_RULES = (
    rules.mul_by_1_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.dropout_zero_rule,
    rules.dropout_inference_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.min_min_rule,
    rules.max_max_rule,
    rules.min_max_rule,
    rules.max_min_rule,
    rules.successive_clip_relu_rule,
    rules.successive_relu_clip_rule,
    rules.successive_relu_rule,
    rules.successive_clip_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
    rules.fuse_batchnorm_into_conv_rule,
    rules.fuse_batchnorm_into_conv_transpose_rule,
    rules.fuse_batchnorm_into_gemm_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_conv_transpose_rule,
    rules.remove_optional_bias_from_gemm_rule,
)
_SYMBOL = re.compile(r"\b[su]\d+\b")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and log lines of torch's exporters; errors come as exceptions anyway."""
    loggers = [
        logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.export", "onnxscript")
    ]
    loggers += [
        logger
        for name, logger in logging.Logger.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and name.startswith(("torch.", "onnxscript."))
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def graph_from_program(
    program: torch.export.ExportedProgram,
    *,
    name: str = "model",
    dims: Mapping[str, Mapping[int, str]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Graph:
    """Translate an exported program.

    Args:
        program: what ``torch.export.export`` returned; not changed.
        name: the graph's name.
        dims: names of dynamic dims by (original) input name and axis; others are named after the
            input and axis they first appear in, as in ``x_0``.
        input_names: new names of the tensor inputs, in order.
        output_names: new names of the tensor outputs, in order.

    Raises:
        ExportError: an operator of the program has no translation.
    """
    with quiet():
        program = complex_pairs.as_real_pairs(program)
        model = _translate(program)
    _drop_constant_inputs(model)
    _share_tied_weights(model)
    _name_dims(model, dims or {})
    _rename(model.graph.inputs, input_names)
    _separate_outputs(model.graph)
    _rename(model.graph.outputs, output_names or _output_names(program))
    _clean_metadata(model)
    opset.to_current(model)
    recurrent_ops.as_standard_ops(model)
    ensure_functions(model)
    model.graph.name = name
    return Graph(model, (), {"task": "generic"})


def _translate(program: torch.export.ExportedProgram) -> ir.Model:
    onnx_program = _exported(program)
    _refuse_mutation(onnx_program.exported_program)
    model = onnx_program.model.clone()  # a graph remembers values that it no longer has
    weights = list(model.graph.initializers.values())
    _optimize(model)
    # The optimizer renames an input that is also an output.
    for value, name in zip(model.graph.inputs, program_input_names(program), strict=True):
        value.name = name
    return _released(model, weights)


class _AsCaptured(torch.export.ExportedProgram):
    """A program whose operators are translated as they were captured.

    The exporter decomposes what it cannot translate by tracing the whole program once more, which
    takes as long as the capture did, though for most models every operator has a translation.
    """

    @classmethod
    def of(cls, program: torch.export.ExportedProgram) -> _AsCaptured:
        """A copy.

        Raises:
            NotImplementedError: the program has operators that write into their inputs, which
                tracing makes functional, or graphs in it.
            torch._export.verifier.SpecViolationError: its signature is not its graph's.
        """
        for node in program.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if (schema is not None and schema.is_mutable) or node.op == "get_attr":
                raise NotImplementedError(f"{node} has to be traced")
        graph = copy.deepcopy(program.graph)
        for node, original in zip(graph.nodes, program.graph.nodes, strict=True):
            node.name = original.name  # the copy's differ where they are Python's own words
        _plain_casts(graph)
        return cls(
            root=program.graph_module,
            graph=graph,
            graph_signature=program.graph_signature,
            state_dict=program.state_dict,
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            example_inputs=program.example_inputs,
            constants=program.constants,
            verifiers=program.verifiers,
        )

    def run_decompositions(
        self, decomp_table: dict[Any, Any] | None = None, **_: Any
    ) -> torch.export.ExportedProgram:
        """This program.

        Raises:
            NotImplementedError: an operator of it is in ``decomp_table``.
        """
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target in (decomp_table or {}):
                raise NotImplementedError(f"{node.target} has to be decomposed")
        return self


def _plain_casts(graph: torch.fx.Graph) -> None:
    """Write ``Tensor.to`` in its many forms, which only tracing resolves, as one cast."""
    for node in graph.nodes:
        if getattr(node.target, "overloadpacket", None) is torch.ops.aten.to:
            node.target = torch.ops.aten._to_copy.default
            node.args, node.kwargs = node.args[:1], {"dtype": node.meta["val"].dtype}


def _exported(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    # What the first way cannot do, an operator without a translation above all, the second can or
    # explains.
    with contextlib.suppress(Exception):
        return _torch_onnx(_AsCaptured.of(program))
    try:
        return _torch_onnx(program)
    except Exception as error:  # noqa: BLE001  torch raises whatever a translation raises
        raise ExportError(*_explain(error)) from None


def _torch_onnx(program: torch.export.ExportedProgram) -> torch.onnx.ONNXProgram:
    onnx_program = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=_EXPORTER_OPSET,
        custom_translation_table=torch_ops.translation_table(),
        verbose=False,
        optimize=False,  # its fusion to RotaryEmbedding forgets that positions broadcast
    )
    assert onnx_program is not None  # None is for TorchScript only
    return onnx_program


def _optimize(model: ir.Model) -> None:
    """What ``onnxscript.optimizer.optimize`` does, in its order, with our rules."""
    common.InlinePass()(model)
    for _ in range(2):
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
        onnxscript.rewriter.rewrite(model, _RULES)
    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(model)


def _released(model: ir.Model, weights: list[ir.Value]) -> ir.Model:
    """A copy with the weights; the given one, which the optimizer's rules keep, loses them.

    ``weights`` are those that it had before the optimizer.
    """
    copy = model.clone()
    for value in [*weights, *model.graph.initializers.values()]:
        value.const_value = None
    return copy


def _refuse_mutation(program: torch.export.ExportedProgram | None) -> None:
    """A graph has no side effects; torch's exporter would drop them silently."""
    for spec in program.graph_signature.output_specs if program is not None else ():
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            what = "buffer" if spec.kind is OutputKind.BUFFER_MUTATION else "input"
            raise ExportError(
                f"the model changes its {what} {spec.target!r} while it runs",
                "take the old value as an input and return the new one",
            )


def _explain(error: BaseException) -> tuple[str, str]:
    """Message and hint for a failed translation: the innermost cause, one line of it."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    missing = re.search(
        r"No ONNX function found for <OpOverload\(op='([^']+)'.*?message: (.*)", str(cause)
    )
    if missing:
        return (
            f"the model uses the torch operator {missing[1]}, which has no translation"
            f" ({missing[2].strip().rstrip('.')})",
            "express the operation with other torch operators",
        )
    first = str(cause).strip().splitlines()[0][:200] if str(cause).strip() else ""
    return (
        f"translating the exported program failed: {type(cause).__name__}: {first}",
        "export with torch.onnx.export and pass the .onnx file, or simplify the operation",
    )


def _drop_constant_inputs(model: ir.Model) -> None:
    """Remove initializers that nothing reads (unused parameters)."""
    outputs = set(model.graph.outputs)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del model.graph.initializers[name]


def _share_tied_weights(model: ir.Model) -> None:
    """Merge initializers that are the same torch memory, such as tied embeddings."""
    seen: dict[tuple[Any, ...], ir.Value] = {}
    outputs = set(model.graph.outputs)
    for name, value in list(model.graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        if not isinstance(raw, torch.Tensor) or raw.numel() == 0 or value in outputs:
            continue
        key = (raw.data_ptr(), raw.dtype, tuple(raw.shape), raw.stride())
        first = seen.setdefault(key, value)
        if first is not value:
            value.replace_all_uses_with(first)
            del model.graph.initializers[name]


def _name_dims(model: ir.Model, dims: Mapping[str, Mapping[int, str]]) -> None:
    """Give torch's size symbols (``s0``) the user's names, everywhere in the model."""
    names: dict[str, str] = {}
    for ours in (True, False):  # the user's names win over made-up ones
        for value in model.graph.inputs:
            wanted = dims.get(value.name or "", {})
            for axis, dim in enumerate(value.shape or ()):
                text = str(getattr(dim, "value", dim))
                if _SYMBOL.fullmatch(text) and (axis in wanted) is ours:
                    names.setdefault(text, wanted.get(axis, f"{value.name}_{axis}"))
    for graph in _graphs(model):
        values = [*graph.inputs, *(out for node in graph.all_nodes() for out in node.outputs)]
        for value in values:
            if value.shape is not None:
                value.shape = ir.Shape([_named(d, names) for d in value.shape])


def _graphs(model: ir.Model) -> list[ir.Graph | ir.Function]:
    return [model.graph, *model.functions.values()]


def _named(dim: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | ir.SymbolicDim:
    if isinstance(dim, int) or dim.value is None:
        return dim
    text = _SYMBOL.sub(lambda match: names.get(match[0], match[0]), str(dim.value))
    if re.fullmatch(r"\w+( \+ \w+)+", text):  # a sum of names, in one order everywhere
        text = " + ".join(sorted(text.split(" + ")))
    return ir.SymbolicDim(text)


def _separate_outputs(graph: ir.Graph) -> None:
    """Put an Identity before outputs that are inputs, initializers or given twice."""
    seen: set[ir.Value] = set(graph.inputs) | set(graph.initializers.values())
    for index, value in enumerate(list(graph.outputs)):
        if value in seen:
            node = ir.Node("", "Identity", [value], name=f"node_output_{index}")
            node.outputs[0].name = f"{value.name}_output_{index}"
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[index] = node.outputs[0]
        seen.add(value)


def _rename(values: Sequence[ir.Value], names: Sequence[str] | None) -> None:
    if names is None:
        return
    if len(names) != len(values):
        raise ExportError(
            f"the exported program has {len(values)} tensors where {len(names)} names were given",
            "constant and None arguments are not graph inputs",
        )
    for value, name in zip(values, names, strict=True):
        value.name = name


def _output_names(program: torch.export.ExportedProgram) -> list[str]:
    """Names of tensor outputs from the structure of what ``forward`` returned.

    A mapping or model output gives its keys, a sequence ``output_0``, …, one tensor ``output``.
    """
    spec = program.call_spec.out_spec
    specs = [s for s in program.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    if spec is None:
        return [f"output_{i}" for i in range(len(specs))]
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths, _ = pytree.tree_flatten_with_path(tree)
    names = []
    for (path, _), output in zip(paths, specs, strict=True):
        if isinstance(output.arg, ConstantArgument):
            continue
        keys = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
        text = ".".join(keys)
        names.append(
            "output" + (f"_{text}" if text else "") if not text or text[0].isdigit() else text
        )
    return names


def program_input_names(program: torch.export.ExportedProgram) -> list[str]:
    """Names of the tensor inputs of a program, in the graph's order."""
    return [
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT and not isinstance(spec.arg, ConstantArgument)
    ]


def _clean_metadata(model: ir.Model) -> None:
    """Keep of torch's notes only which module a node came from, as ``hal.scope``."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for graph in _graphs(model):
        graph.metadata_props.clear()
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()
        for node in graph.all_nodes():
            scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
            found = re.findall(r"'([^']*)'", scopes)
            node.metadata_props.clear()
            if len(found) > 1:  # the last one is the node itself
                node.metadata_props["hal.scope"] = found[-2]
            for value in node.outputs:
                value.metadata_props.clear()
