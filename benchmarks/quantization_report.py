"""The results of :mod:`quantization` in Markdown: ``quantization_report.py RESULTS.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]
_ROOM = 0.002  # bits that count as none: a few scales more for the whole model


def markdown(result: dict[str, Any]) -> str:
    """Everything that was measured, as a page."""
    rows = [r for r in result["language"]["rows"] if not r["note"] and r["format"] != "float32"]
    ours = [r for r in rows if r["who"] == "hal"]
    peers = [r for r in rows if r["who"] != "hal"]
    failed = [r for r in result["language"]["rows"] if r["note"]]
    parts = [_facts(result), *([result["note"]] if result.get("note") else [])]
    if ours and peers:
        parts += ["## Goals", _goals(ours, peers), "## At equal size", _EQUAL, _equal(ours, peers)]
    parts += ["## hal: every format and method", _METHODS, _grid(ours)]
    if peers:
        parts += ["## Others: every format and method", _list(peers)]
    if failed:
        parts.append(
            "Could not be made: "
            + "; ".join(f"{r['who']} `{r['format']}` {r['method']} ({r['note']})" for r in failed)
        )
    if result["encoder"]:
        parts += ["## Sentence encoder", _ENCODER, _encoder(result["encoder"])]
    if result["digits"]:
        parts += ["## Digits", _DIGITS, _digits(result["digits"])]
    return "\n\n".join(parts) + "\n"


_EQUAL = (
    "For each size at which others get better: the best of them, and the best of hal in no more "
    "bits; KL in nats with its 95 % interval. Where the intervals overlap, the ratio has a ~."
)
_METHODS = "KL in nats / top-1 agreement / perplexity ratio. Bold: the lowest KL of a row."
_ENCODER = (
    "MiniLM-L6 (22 M parameters), 200 sentences in 20 topics: cosine of a sentence's embedding to "
    "the float model's, rank correlation of the orders in which it finds the other sentences, "
    "same nearest, overlap of the ten nearest, and how often the nearest has its topic. Bold: "
    "nothing in as few bits is closer to float."
)
_DIGITS = "A network of four convolutions (`examples/train_digits.py`), 600 test images."


def _facts(result: dict[str, Any]) -> str:
    language, machine = result["language"], result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        "# Quantization: accuracy\n\n"
        "Made by `benchmarks/quantization.py`; all figures are in `quantization.json`.\n\n"
        f"A Llama of 13 M parameters (`examples/train_reference_model.py`), perplexity "
        f"{language['perplexity']:.1f} on its held-out text; {language['tokens']:,} tokens of it "
        f"are scored in windows of {language['window']}, {language['calibration']:,} others "
        f"calibrate. Its {language['parameters']:,} weights of linear layers are quantized; "
        "embedding and head, which are one, stay floats for all. Bits include scales and zero "
        "points. ONNX Runtime runs its own results; NNCF's are run by OpenVINO with float32 "
        "activations (its float model differs from ours by a KL of less than 1e-11); llama.cpp's "
        "matrices go through its quantizer and back into our float graph, `imatrix` with "
        "importances from the calibration tokens.\n\n"
        f"{machine['processor']}, {machine['cores']} cores; {versions}; {result['date']}."
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)]
    return "\n".join(rows)


def _kl(value: float) -> str:
    return f"{value:.3g}"


def _name(row: dict[str, Any]) -> str:
    return f"{row['who']} `{row['format']}` {row['method']}"


def _best(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return min(rows, key=lambda r: r["kl"])


def _goals(ours: Rows, peers: Rows) -> str:
    def of(*formats: str) -> list[dict[str, Any]]:
        return [r for r in ours if r["format"] in formats]

    lines = []

    def goal(text: str, met: bool, figures: str) -> None:
        lines.append([text, "met" if met else "**missed**", figures])

    four = _best(of("w4a16"))
    plain = [r for r in peers if r["who"] == "onnxruntime" and r["method"] == "rtn"]
    equal = _best(r for r in plain if 4.4 < r["bits"] <= 4.6)
    same_block = next(r for r in plain if r["format"] == "4 bits-g32-sym")
    goal(
        "W4A16-g32: at most half the KL of ONNX Runtime's rounding to nearest",
        four["kl"] <= 0.5 * min(equal["kl"], same_block["kl"]),
        f"{_kl(four['kl'])} ({four['method']}, {four['bits']:.2f} bits); "
        f"{_kl(equal['kl'])} in {equal['bits']:.2f} bits, {_kl(same_block['kl'])} in "
        f"{same_block['bits']:.2f}",
    )
    eight = [_best(of(x, f"{x}-channel")) for x in ("w8a8", "w8a16")]
    worst = [min(r["top1"] for r in of(x)) for x in ("w8a8", "w8a16", "w8a8-channel")]
    goal(
        "W8A8 and W8A16: top-1 agreement of 99 % or more",
        min(r["top1"] for r in eight) >= 0.99,
        f"{eight[0]['top1']:.2%} ({eight[0]['format']}:{eight[0]['method']}), "
        f"{eight[1]['top1']:.2%}; worst method {worst[0]:.2%}, {worst[1]:.2%}; "
        f"`w8a8-channel` {worst[2]:.2%}",
    )
    three, two = _best(of("w3a16")), _best(of("w2a16"))
    for row, limit in ((four, 1.01), (three, 1.05), (two, 1.35)):
        goal(
            f"{row['format'][:2].upper()}-g32: perplexity within {limit} x",
            row["perplexity"] <= limit,
            f"{row['perplexity']:.4f} x ({row['method']})",
        )
    low = [r for r in peers if "2" in r["format"].split("-")[0] and r["bits"] < 4.1]
    low = [r for r in low if r["format"].startswith(("2 bits", "int2", "q2", "iq2", "tq2"))]
    rival = _best(low)
    goal(
        "W2-g32: below every other 2-bit KL",
        two["kl"] < rival["kl"],
        f"{_kl(two['kl'])} in {two['bits']:.2f} bits; the best other is {_name(rival)}, "
        f"{_kl(rival['kl'])} in {rival['bits']:.2f}",
    )
    lost = [(p, o) for p, o in _pairs(ours, peers) if o is None or o["kl"] > p["kl"]]
    goal(
        "The lowest KL at every size",
        not lost,
        "all rows below" if not lost else f"lost: {', '.join(_name(p) for p, _ in lost)}",
    )
    return _table(("goal", "", "figures"), lines)


def _pairs(ours: Rows, peers: Rows) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """The best of others at each size where they get better, and of hal in no more bits."""
    pairs: list[tuple[dict[str, Any], dict[str, Any] | None]] = []
    for row in sorted(peers, key=lambda r: (r["bits"], r["kl"])):
        if pairs and row["kl"] >= pairs[-1][0]["kl"]:
            continue
        rivals = [r for r in ours if r["bits"] <= row["bits"] + _ROOM]
        pairs.append((row, _best(rivals) if rivals else None))
    return pairs


def _equal(ours: Rows, peers: Rows) -> str:
    lines = []
    for peer, own in reversed(_pairs(ours, peers)):
        left, right = _interval(peer), _interval(own) if own else "none"
        if own and own["kl"] <= peer["kl"]:
            right = f"**{right}**"
        else:
            left = f"**{left}**"
        lines.append(
            [
                f"{peer['bits']:.2f}", _name(peer), left,
                f"`{own['format']}:{own['method']}` ({own['bits']:.2f})" if own else "", right,
                ("" if _apart(own, peer) else "~") + f"{own['kl'] / peer['kl']:.2f}" if own else "",
            ]
        )  # fmt: skip
    head = (
        "bits",
        "best of the others",
        "KL / top-1 / perplexity",
        "hal (bits)",
        "the same",
        "KL ratio",
    )
    return _table(head, lines)


def _interval(row: dict[str, Any]) -> str:
    around = f" ({_kl(row['kl_low'])} to {_kl(row['kl_high'])})" if row["kl_low"] else ""
    return f"{_kl(row['kl'])}{around} / {row['top1']:.2%} / {row['perplexity']:.4f}"


def _apart(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """The intervals do not overlap."""
    first, second = sorted((a, b), key=lambda r: r["kl"])
    return (first["kl_high"] or first["kl"]) < (second["kl_low"] or second["kl"])


def _figures(row: dict[str, Any]) -> str:
    return f"{_kl(row['kl'])} / {row['top1']:.2%} / {row['perplexity']:.4f}"


def _grid(rows: Rows) -> str:
    """Formats by methods."""
    methods = sorted({r["method"] for r in rows}, key=lambda m: ("rotate" in m, "rtn" not in m, m))
    lines = []
    for name in dict.fromkeys(r["format"] for r in rows):
        found = {r["method"]: r for r in rows if r["format"] == name}
        best = _best(found.values())
        cells = [_figures(found[m]) if m in found else "" for m in methods]
        at = methods.index(best["method"])
        cells[at] = f"**{cells[at]}**"
        lines.append((best["bits"], [f"`{name}`", f"{best['bits']:.2f}", *cells]))
    lines.sort(key=lambda x: -x[0])
    return _table(("format", "bits", *methods), [line for _, line in lines])


def _list(rows: Rows) -> str:
    """One line for each row, by size."""
    lines = [
        [f"{r['bits']:.2f}", f"{r['who']} `{r['format']}`", r["method"], _figures(r)]
        for r in sorted(rows, key=lambda r: (-r["bits"], r["kl"]))
    ]
    return _table(("bits", "format", "method", "KL / top-1 / perplexity"), lines)


def _encoder(rows: Rows) -> str:
    columns: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("cosine", "cosine", "{:.5f}".format),
        ("worst", "cosine_min", "{:.4f}".format),
        ("order", "order", "{:.5f}".format),
        ("same nearest", "same_nearest", "{:.1%}".format),
        ("ten nearest", "overlap", "{:.1%}".format),
        ("topic", "topic", "{:.1%}".format),
    )
    lines = []
    for row in sorted(rows, key=lambda r: (-r["bits"], -r["cosine"])):
        rivals = [r for r in rows if r["bits"] <= row["bits"] + _ROOM]
        mark = "**" * (row["cosine"] >= max(r["cosine"] for r in rivals))
        cells = [form(row[key]) for _, key, form in columns]
        lines.append([f"{row['bits']:.2f}", f"{mark}{_name(row)}{mark}", *cells])
    float_ = f"Float: the nearest has its topic for {rows[0]['reference_topic']:.1%}."
    return _table(("bits", "by", *(c[0] for c in columns)), lines) + "\n\n" + float_


def _digits(rows: Rows) -> str:
    return _table(
        ("", "right", "accuracy", "bits"),
        [
            [
                r["who"] if " " in r["who"] or r["who"] == "float32" else f"hal `{r['who']}`",
                str(r["right"]), f"{r['accuracy']:.2%}", f"{r['bits']:.2f}" if "bits" in r else "",
            ]
            for r in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
