"""Which cases a target is tried with: the choice that the command and the pytest plug-in share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from hal.conformance.cases import Case, node_cases
from hal.conformance.model_ops import BoundDim, model_ops
from hal.conformance.models import ModelCase, further_cases, model_cases
from hal.errors import InputError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Selection:
    """Cases, and what a report says about them.

    Attributes:
        title: what they are, for a heading.
        cases: in the order in which they are found.
        fallback: whether the host may run what the target refuses.
        compared: whether each case has figures of its own (an error, a share).
        dims: what the dynamic dims of a model were bound to.
        left_out: ops of a model without a case, and why.
    """

    title: str
    cases: tuple[Case | ModelCase, ...]
    fallback: bool
    compared: bool = False
    dims: tuple[BoundDim, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def notes(self) -> list[str]:
        """Sentences about how the cases were made."""
        notes = []
        if self.dims:
            bound = ", ".join(f"{d.name} = {d.extent} ({d.origin})" for d in self.dims)
            notes.append(f"dims: {bound}")
        notes += [f"no case for {op}: {reason}" for op, reason in self.left_out.items()]
        return notes


def select(
    target: str,
    *,
    ops: Iterable[str] | None = None,
    models: bool = False,
    from_model: str | Path | None = None,
    dims: Mapping[str, int] | None = None,
    fallback: bool = False,
) -> Selection:
    """The cases for a target: ONNX's test-suite, small models, or the ops of one model.

    Args:
        target: what will run them.
        ops: only cases about these.
        models: small models of each family instead of single ops.
        from_model: a bundle or a model whose ops are the cases.
        dims: extents for the dynamic dims of that model.
        fallback: let the host run what the target refuses; small models always may.

    Raises:
        InputError: the options do not go together, or no case is about an op.
        HalError: the model cannot be read or run.
    """
    wanted = None if ops is None else [name.strip() for name in ops if name.strip()]
    if models and from_model is not None:
        raise InputError("small models and the ops of a model are both asked for", "choose one")
    if models and wanted is not None:
        raise InputError("--op picks cases of single ops, and --models has none", "give one")
    if dims and from_model is None:
        raise InputError("--dim binds the dims of a model, and there is none", "add --from-model")
    if models:
        cases = (*model_cases(), *further_cases())
        return Selection("small models", cases, True, compared=True)
    if from_model is None:
        return Selection("ONNX's test-suite", tuple(_about(node_cases(), wanted)), fallback)
    found = model_ops(from_model, target, dims)
    return Selection(
        f"the ops of {Path(from_model).name}",
        tuple(_about(found.cases, wanted)),
        fallback,
        compared=True,
        dims=found.dims,
        left_out=found.left_out,
    )


_C = TypeVar("_C", Case, ModelCase)


def _about(cases: Iterable[_C], wanted: list[str] | None) -> list[_C]:
    """The cases that are about these ops; all of them for None."""
    found = list(cases)
    if wanted is None:
        return found
    known = {case.op for case in found}
    for name in wanted:
        if name not in known:
            raise InputError(f"no case is about the op {name!r}", did_you_mean(name, known))
    return [case for case in found if case.op in wanted]
