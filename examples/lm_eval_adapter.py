"""Score and evaluate a bundle: python examples/lm_eval_adapter.py BUNDLE [TASK …]

``HalLM`` gives lm-evaluation-harness (``pip install lm-eval``) a bundle as a model. With names of
tasks, the harness runs them. Without, a few sentences are scored, which needs no harness.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

import hal
from hal.runtime.tokenizer import Tokenizer

try:
    from lm_eval.api.model import LM
except ImportError:  # the harness is optional: the methods need nothing of it
    LM = object

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_MAX_NEW_TOKENS = 256


class HalLM(LM):  # type: ignore[misc,valid-type]
    """A session as the harness's model: three ways to be asked, one list of answers each.

    Args:
        session: of a language model with a tokenizer in its bundle.
        max_length: longest text that is run at once; default: the model's positions, or 2048.
    """

    def __init__(self, session: hal.Session, max_length: int | None = None) -> None:
        super().__init__()
        self.session = session
        self.tokenizer = Tokenizer.from_bundle(session.bundle.files)
        facts = session.bundle.manifest.metadata
        self.max_length = max_length or facts.get("max_positions") or 2048
        ends = facts.get("eos_token_ids") or [0]
        begin = facts.get("bos_token_id")
        self.prefix = int(ends[0] if begin is None else begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.session.bundle.path)

    def loglikelihood(self, requests: Iterable[Any], **_: Any) -> list[tuple[float, bool]]:
        """For each (context, continuation): log-probability, and whether greedy would say it."""
        return [self._score(*self._pair(*request.args)) for request in requests]

    def loglikelihood_rolling(self, requests: Iterable[Any], **_: Any) -> list[float]:
        """For each (text,): its log-probability, in windows if it is long."""
        totals = []
        for request in requests:
            ids = self.tokenizer.encode(request.args[0], add_special_tokens=False)
            windows = rolling_windows(ids, self.prefix, self.max_length)
            totals.append(sum(self._score(*window)[0] for window in windows))
        return totals

    def generate_until(self, requests: Iterable[Any], **_: Any) -> list[str]:
        """For each (context, options): what the model goes on with, up to one of ``until``."""
        texts = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or None
            limit = int(options.get("max_gen_toks") or _MAX_NEW_TOKENS)
            ids = self.tokenizer.encode(context) or [self.prefix]
            keep = max(1, self.max_length - limit)
            sampling = {k: options[k] for k in _SAMPLING if options.get(k) is not None}
            steps = self.session.generate(
                ids[-keep:],
                max_new_tokens=limit,
                stop=until,
                as_text=True,
                **(sampling if options.get("do_sample") else {}),
            )
            texts.append(steps.text())
        return texts

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both; spaces between them belong to the continuation."""
        if not context:
            return [self.prefix], self.tokenizer.encode(continuation, add_special_tokens=False)
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        before = self.tokenizer.encode(context)
        return before, self.tokenizer.encode(context + continuation)[len(before) :]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-probability of the continuation, and whether each of its tokens is the likeliest."""
        if not continuation:
            return 0.0, True
        ids = [*context, *continuation][-(self.max_length + 1) :]
        goal = np.array(ids[1:][-len(continuation) :])
        logits = self.session.logits(ids[:-1])[-len(goal) :].astype(np.float64)
        top = logits.max(-1)
        total = np.log(np.exp(logits - top[:, None]).sum(-1)) + top
        chosen = logits[np.arange(len(goal)), goal]
        return float((chosen - total).sum()), bool((logits.argmax(-1) == goal).all())


def rolling_windows(
    ids: list[int], prefix: int, max_length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a text so that each token is predicted once, with the token before it as context.

    >>> list(rolling_windows([1, 2, 3, 4, 5], 0, 2))
    [([0], [1, 2]), ([2], [3, 4]), ([3, 4], [5])]
    """
    for start in range(0, len(ids), max_length):
        part = ids[start : start + max_length]
        if start == 0:
            yield [prefix], part
        else:
            # The last part may be short: then more of what comes before it is context.
            missing = max_length - len(part)
            yield ids[start - 1 - missing : start], part


@dataclasses.dataclass(frozen=True)
class Request:
    """What the harness calls an Instance, as far as it is needed here."""

    args: tuple[Any, ...]


def main() -> None:
    bundle, *tasks = sys.argv[1:]
    with hal.load(bundle).session() as session:
        model = HalLM(session)
        if tasks:
            import lm_eval

            results = lm_eval.simple_evaluate(model=model, tasks=tasks)
            print(json.dumps(results["results"], indent=1, default=str))
            return
        sentences = [
            "The for statement is used to iterate over a sequence.",
            "Sequence for the of.",
        ]
        scores = model.loglikelihood_rolling([Request((text,)) for text in sentences])
        for text, score in zip(sentences, scores, strict=True):
            print(f"{-score / len(text.encode()) / np.log(2):.2f} bits per byte: {text}")
        answer = Request(("The for statement", {"until": ["\n\n"], "max_gen_toks": 16}))
        print(repr(model.generate_until([answer])[0]))


if __name__ == "__main__":
    main()
