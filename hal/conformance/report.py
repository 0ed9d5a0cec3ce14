"""What many outcomes come to: counts per op, and the same as a page of HTML."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from hal.conformance.running import FAILURES, PASSED, STATUSES, WRONG, WRONG_DTYPE, Outcome

if TYPE_CHECKING:
    from hal.conformance.selection import Selection


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts in total and per op, and the cases that hal gets wrong and onnxruntime right."""
    per_op: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for outcome in outcomes:
        per_op[outcome.op][outcome.status] += 1
    total = collections.Counter(o.status for o in outcomes)
    return {
        "cases": len(outcomes),
        **{status: total[status] for status in STATUSES},
        "onnxruntime_passed": sum(o.native == PASSED for o in outcomes),
        "regressions": [
            o.name for o in outcomes if o.status in (WRONG, WRONG_DTYPE) and o.native == PASSED
        ],
        "lost": [
            o.name
            for o in outcomes
            if o.status not in (PASSED, WRONG, WRONG_DTYPE) and o.native == PASSED
        ],
        "per_op": {op: dict(counts) for op, counts in sorted(per_op.items())},
    }


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ target }}: conformance</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 60em; }
table { border-collapse: collapse; } td, th { padding: .2em .8em; text-align: left; }
tr:nth-child(even) { background: #f4f4f4; } .passed { color: #060; } .failed { color: #a00; }
</style>
<h1>Conformance of {{ target }}</h1>
<p>hal {{ version }}, {{ title }}. {{ figures.passed }} of {{ figures.cases }} cases passed,
{{ figures.wrong }} gave wrong values, {{ figures["wrong dtype"] }} a wrong dtype,
{{ figures.error }} failed, {{ figures.unsupported }} were refused with a reason.</p>
{% for note in notes %}<p>{{ note }}</p>
{% endfor %}<h2>By op</h2>
<table><tr><th>op{% for status in statuses %}<th>{{ status }}{% endfor %}</tr>
{% for op, counts in figures.per_op.items() %}<tr><td>{{ op }}
{%- for status in statuses %}<td class="{{ classes.get(status, "") }}">
{{- counts.get(status, "") }}{% endfor %}</tr>
{% endfor %}</table>
{% if compared %}<h2>Cases</h2>
<table><tr><th>case<th>status<th>max error<th>share<th>where<th>reason</tr>
{% for o in outcomes %}<tr><td>{{ o.name }}<td class="{{ classes.get(o.status, "") }}">
{{- o.status }}<td>{{ "" if o.max_error is none else "%.2g" % o.max_error }}
{{- "" }}<td>{{ "" if o.share is none else "%.0f %%" % (100 * o.share) }}
{{- "" }}<td>{{ o.about }}<td>{{ o.reason }}</tr>
{% endfor %}</table>
{% else %}<h2>What did not pass</h2>
<table><tr><th>case<th>status<th>reason</tr>
{% for o in outcomes if o.status != "passed" %}<tr><td>{{ o.name }}
{{- "" }}<td class="{{ classes.get(o.status, "") }}">{{ o.status }}<td>{{ o.reason }}</tr>
{% endfor %}</table>
{% endif %}</html>
"""


def page(
    target: str, version: str, outcomes: Sequence[Outcome], selection: Selection | None = None
) -> str:
    """The outcomes as a page of HTML that stands alone; ``selection`` says what the cases are."""
    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    return template.render(
        target=target,
        version=version,
        title=selection.title if selection else "ONNX's test-suite",
        notes=selection.notes() if selection else [],
        compared=bool(selection and selection.compared),
        statuses=STATUSES,
        classes={PASSED: "passed", **dict.fromkeys(FAILURES, "failed")},
        figures=summary(outcomes),
        outcomes=[dataclasses.asdict(o) for o in outcomes],
    )
