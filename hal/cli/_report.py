"""How passes, builds and signatures are shown, by several commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hal.cli._output import format_bytes, format_seconds, print_line, print_table

if TYPE_CHECKING:
    from hal.bundle.manifest import BuildRecord


def print_passes(passes: Sequence[Mapping[str, Any]]) -> None:
    """The table of ``--explain``."""
    rows = [
        (
            report["name"],
            report["matches"],
            f"{report['nodes_before']:,} → {report['nodes_after']:,}",
            f"{format_bytes(report['bytes_before'])} → {format_bytes(report['bytes_after'])}",
            format_seconds(report["seconds"]),
            ", ".join(f"{name} {value}" for name, value in report["details"].items()),
        )
        for report in passes
    ]
    total = sum(report["seconds"] for report in passes)
    print_table(
        f"passes ({len(passes)} run, {format_seconds(total)})",
        ("pass", "matches", "nodes", "weights", "time", "changed"),
        rows,
    )


def print_builds(
    builds: Mapping[str, BuildRecord], quantization: Mapping[str, Any] | None = None
) -> None:
    """Where each build's nodes run, what it gains, and how far it is from the reference."""
    for name, record in builds.items():
        print_line(f"{name}: {record.placement.get('summary', '')}")
        for refused in record.placement.get("refused", []):
            print_line(
                f"  host runtime runs {refused['count']} × {refused['op']}: {refused['reason']}"
            )
        if record.cache is not None:
            print_line(f"  {cache_text(record.cache)}")
        for segment in record.segments:
            for note in segment["record"].get("notes", []):
                print_line(f"  {note}")
        gain = gain_text(record, quantization)
        if gain:
            print_line(f"  {gain}")
        print_line(f"  {verification_text(record.verification)}")


def gain_text(record: BuildRecord, quantization: Mapping[str, Any] | None) -> str:
    """What a build reads of weights beside the float model; empty where it is not known."""
    from hal.quantization.outlook import reading_text

    read, facts = bytes_read(record), quantization or {}
    floats, expected = facts.get("float_bytes_read"), facts.get("outlook") or [{}]
    if read is None or not floats:
        return ""
    return reading_text(read, floats, expected[0].get("unit", "call"))


def bytes_read(record: BuildRecord) -> int | None:
    """Bytes of weights that a token or an example reads in a build, if its backends can tell."""
    found = [segment["record"].get("bytes_read") for segment in record.segments]
    return None if None in found else sum(found)


def print_quantization(facts: Mapping[str, Any] | None, *, each: bool) -> None:
    """Formats by kind of layer, or of each layer, and what they cost in accuracy."""
    if not facts:
        return
    layers = facts["layers"]
    if each:
        rows = [
            (x["name"], x["kind"], x["format"], x["method"], f"{x['bits']:.2f}", _snr([x]),
             x["reason"])
            for x in layers
        ]  # fmt: skip
        print_table("weights", ("layer", "kind", "format", "method", "bits", "SNR", "why"), rows)
    else:
        groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for x in layers:
            groups.setdefault((x["kind"], x["format"], x["method"]), []).append(x)
        print_table(
            "weights",
            ("layers", "kind", "format", "method", "weights", "bits", "SNR"),
            [
                (
                    len(found),
                    *key,
                    f"{sum(x['weights'] for x in found):,}",
                    f"{_bits(found):.2f}",
                    _snr(found),
                )
                for key, found in groups.items()
            ],
        )
        for reason, count in Counter(x["reason"] for x in layers if x["reason"]).items():
            print_line(f"{count} of {len(layers)} layers: {reason}")
    if "static" in facts:
        print_line(static_text(facts["static"]))
    if "rotated" in facts:
        print_line(f"residual streams turned: {facts['rotated']}")
    print_line(quantization_text(facts))


def static_text(static: Mapping[str, Any]) -> str:
    """One line about static activations."""
    ranges = ", ".join(f"{count} by {rule}" for rule, count in static["ranges"].items())
    text = f"{static['tensors']} activations in {static['dtype']}, ranges: {ranges}"
    for name, words in (
        ("integer_ops", "in integers besides"),
        ("float_ops", "between, in floats"),
    ):
        if static[name]:
            text += f"; {words}: " + ", ".join(f"{n} {op}" for op, n in static[name].items())
    return text


FEW = 16
"""Samples, or tokens, below which figures are chance."""


def quantization_text(facts: Mapping[str, Any]) -> str:
    """One line: bits per weight, and the figures against the float model if there was data."""
    text = f"{facts['bits_per_weight']:.2f} bits per weight"
    figures = facts.get("figures")
    if not figures:
        return f"{text}; no data was given to measure what it costs (--calibration)"
    names = {"kl": "KL {:.4g} nats", "top1": "top-1 agreement {:.2%}",
             "ppl": "perplexity {:.4f}x", "cosine": "cosine {:.5f}"}  # fmt: skip
    parts = [
        f"{names[name].split()[0]} not a number" if value is None else names[name].format(value)
        for name, value in figures.items()
    ]
    tokens = facts.get("tokens")
    seen = f"{facts['samples']:,} samples" if tokens is None else f"{tokens:,} tokens"
    few = (tokens or facts["samples"]) < FEW
    warning = f" ({seen} are too few to tell)" if few else ""
    return f"{text}; against the float model on {seen}: {', '.join(parts)}{warning}"


def _bits(layers: Sequence[Mapping[str, Any]]) -> float:
    total = sum(x["weights"] for x in layers)
    return float(sum(x["bits"] * x["weights"] for x in layers) / max(total, 1))


def _snr(layers: Sequence[Mapping[str, Any]]) -> str:
    known = [x["snr_db"] for x in layers if x["snr_db"] is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    return f"{low:.1f} dB" if low == high else f"{low:.1f} to {high:.1f} dB"


def build_json(record: BuildRecord) -> dict[str, Any]:
    """What ``--json`` says of a build."""
    return {
        "backend": record.backend,
        "route": record.route,
        "placement": record.placement,
        "cache": record.cache,
        "notes": [n for segment in record.segments for n in segment["record"].get("notes", [])],
        "bytes_read": bytes_read(record),
        "toolchain": record.toolchain,
        "verification": record.verification,
    }


def cache_text(cache: Mapping[str, Any]) -> str:
    """One line about how a build carries its cache."""
    from hal.ir.cache_plan import RECENT, CachePlan

    plan = CachePlan.from_json(cache)
    width = f"int{plan.bits}" if plan.bits else "float32"
    windows = sorted({g.window for g in plan.groups if g.window and g.name != "recent"})
    parts = [f"cache: {plan.layout}, {width}, {plan.token_bytes():,} bytes per token"]
    parts += [f"the last {w} positions only in layers with a window" for w in windows]
    if any(g.name == "recent" for g in plan.groups):
        parts.append(f"the newest {RECENT} positions in float32 too")
    return "; ".join(parts)


def verification_text(figures: Mapping[str, Any] | None) -> str:
    """One line about a build's verification."""
    if not figures or figures.get("passed") is None:
        reason = (figures or {}).get("reason", "not asked for")
        return f"not verified: {reason}"
    parts = [output_text(name, figure) for name, figure in figures["outputs"].items()]
    verdict = "verified" if figures["passed"] else "OUT OF TOLERANCE"
    from hal.runtime.verification import narrowed_text

    told = narrowed_text(figures.get("narrowed", {}))
    return f"{verdict}: {'; '.join(parts)}" + (f"; {told}" if told else "")


def output_text(name: str, figure: Mapping[str, Any]) -> str:
    """Error figures of one output."""
    if figure.get("max_error") is None:
        return f"{name} {figure.get('reason', 'differs')}"
    text = f"{name} max error {figure['max_error']:.3g}, mean {figure['mean_error']:.3g}"
    if "moves" in figure:
        text += (
            f" (the reference itself moves by {figure['moves']:.3g} when its first values change in"
            " their last bits: rounding or choices next to a tie)"
        )
    if "top1_agreement" in figure:
        text += f", top-1 agreement {100 * figure['top1_agreement']:.1f} %"
    return text


def print_signature(
    title: str, specs: Iterable[tuple[str, str, Sequence[int | str] | None]]
) -> None:
    """Names, dtypes and dims of inputs, outputs or state."""
    rows = [
        (name, dtype, "any rank" if dims is None else "[" + ", ".join(map(str, dims)) + "]")
        for name, dtype, dims in specs
    ]
    if rows:
        print_table(title, ("name", "dtype", "dims"), rows)
