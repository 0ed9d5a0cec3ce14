"""The generated half of a program: tables in C, which ``runtime.c`` includes."""

from __future__ import annotations

from collections.abc import Iterable

from hal.targets.aot.plan import Plan, Tensor

_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}
"""Type codes of DLPack."""


def program_header(plan: Plan) -> str:
    """``program.h``: places of tensors, and calls of kernels in their order."""
    numbers: dict[Tensor, int] = {}
    for tensor in [
        *plan.inputs,
        *plan.outputs,
        *plan.kept,
        *(t for c in plan.calls for t in c.tensors),
    ]:
        numbers.setdefault(tensor, len(numbers))
    lines = [f"int __tvm_ffi_{k}(void *, any_t *, int32_t, any_t *);" for k in _kernels(plan)]
    for tensor, n in numbers.items():
        lines.append(f"static int64_t shape{n}[] = {_braces(tensor.shape or (1,))};")
    lines.append("static const place_t places[] = {")
    for tensor, n in numbers.items():
        memory = plan.memory[tensor.root]
        where = "ARENA" if memory.constant is None else "WEIGHTS"
        lines.append(
            f"  {{{where}, {memory.offset}u, {tensor.bytes}u, {len(tensor.shape)}, "
            f"{_dtype(tensor.dtype)}, shape{n}}},"
        )
    lines.append("};")
    for i, call in enumerate(plan.calls):
        lines.append(f"static const int call{i}[] = {_braces(numbers[t] for t in call.tensors)};")
    lines.append("static const call_t calls[] = {")
    for i, call in enumerate(plan.calls):
        lines.append(
            f'  {{__tvm_ffi_{call.kernel}, "{call.kernel}", {len(call.tensors)}, call{i}}},'
        )
    lines.append("};")
    for name, tensors in (
        ("inputs", plan.inputs), ("outputs", plan.outputs), ("kept", plan.kept),
    ):  # fmt: skip
        listed = [numbers[t] for t in tensors] or [0]
        lines.append(f"static const int {name}[] = {_braces(listed)};")
        lines.append(f"#define {name.upper()} {len(tensors)}")
    most = max((len(c.tensors) for c in plan.calls), default=1)
    lines += [
        f"#define CALLS {len(plan.calls)}", f"#define MOST_ARGUMENTS {most}",
        f"#define ARENA_BYTES {plan.arena_bytes}u", f"#define WEIGHT_BYTES {plan.weight_bytes}u",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _kernels(plan: Plan) -> list[str]:
    return list(dict.fromkeys(call.kernel for call in plan.calls))


def _braces(numbers: Iterable[int]) -> str:
    return "{" + ", ".join(str(n) for n in numbers) + "}"


def _dtype(name: str) -> str:
    if name == "bool":
        return "{6, 8, 1}"
    kind = name.rstrip("0123456789")
    return f"{{{_CODES[kind]}, {int(name[len(kind) :])}, 1}}"
