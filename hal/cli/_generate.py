"""``hal run`` on text: one prompt, or a chat over stdin."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal.cli._output import NOTE, format_bytes, format_seconds, print_facts, print_json, print_line
from hal.errors import InputError

if TYPE_CHECKING:
    from hal.runtime.chat import ChatTemplate
    from hal.runtime.generate import Generated
    from hal.runtime.session import Session


@dataclasses.dataclass(frozen=True)
class Task:
    """What to generate and how to show it.

    ``options`` are those of :func:`hal.runtime.generate.generate`; the states are files.
    """

    prompt: str | None
    chat: bool
    system: str | None
    load_state: Path | None
    save_state: Path | None
    options: dict[str, Any]
    stats: bool
    json: bool


def run_task(session: Session, task: Task) -> None:
    """Generate and print.

    Raises:
        InputError: see :func:`hal.runtime.generate.generate`.
    """
    if task.chat:
        _chat(session, task)
    else:
        _continue(session, task)


def _continue(session: Session, task: Task) -> None:
    if task.load_state is None:
        assert task.prompt is not None
        steps = session.generate(task.prompt, **task.options)
    else:
        steps = _resume(session, task.load_state, task)
    text = _stream(steps, quiet=task.json)
    stats = statistics(session, steps)
    if task.save_state is not None:
        _save(session, steps, task.save_state)
    if task.json:
        print_json(
            {
                "target": session.target,
                "prompt": task.prompt,
                "text": text,
                "token_ids": steps.token_ids,
                "finish_reason": steps.finish_reason,
                "seconds": steps.seconds,
                "seconds_to_first_token": steps.seconds_to_first_token,
                "tokens_per_second": stats["tokens_per_second"],
                "stats": stats,
            }
        )
        return
    print_line()
    _tell_if_full(session, steps, task)
    rate = stats["tokens_per_second"] or 0
    print_line(f"[{stats['new_tokens']} tokens on {session.target}, {rate:.1f} tokens/s]")
    if task.stats:
        _print_statistics(stats)


def _resume(session: Session, file: Path, task: Task) -> Generated:
    """Go on from a saved state, with the prompt as what comes next; without one, just go on.

    Raises:
        InputError: the state is of another model, damaged, of several rows or without token ids.
    """
    from hal.runtime.tokenizer import Tokenizer

    held = _imported(session, file)
    tokenizer = Tokenizer.from_bundle(session.bundle.files)
    more = tokenizer.encode(task.prompt or "", add_special_tokens=False)
    return session.generate([*held, *more], held=held, as_text=True, **task.options)


def _imported(session: Session, file: Path) -> list[int]:
    """Load a saved state; the token ids that it holds.

    Raises:
        InputError: the state is of another model, damaged, of several rows or without token ids.
    """
    state = session.import_state(file)
    if state.token_ids is None or len(state.token_ids) != 1:
        raise InputError(
            f"{file} does not hold one sequence with its token ids", "save it with hal run"
        )
    return list(state.token_ids[0])


def _save(session: Session, steps: Generated, file: Path) -> None:
    """Save the state after the whole text; a token that only ended it is left out."""
    import numpy as np

    ids = _said(steps)
    if len(ids) > len(steps.held_ids):
        session.run({session.inputs[0].name: np.array([ids[-1:]], np.int64)})
    session.export_state([ids]).save(file)


def _said(steps: Generated) -> list[int]:
    """The ids of prompt and text, without a token that only ended it."""
    if steps.finish_reason == "length":
        return [*steps.prompt_ids, *steps.token_ids]
    return steps.held_ids


def _chat(session: Session, task: Task) -> None:
    """Answer message by message. What the state holds of the conversation is not run again.

    A saved state holds tokens, not messages: a conversation that goes on from one is continued by
    what the template puts after an answer.

    Raises:
        InputError: the bundle has no chat template, the conversation outgrows the model, a state
            cannot be loaded, or no message came that a state could be saved of.
    """
    from hal.runtime.chat import ChatTemplate

    template = ChatTemplate.from_bundle(session.bundle.files)  # before anybody types a message
    messages: list[dict[str, str]] = []
    if task.system is not None:
        messages.append({"role": "system", "content": task.system})
    turns: list[dict[str, Any]] = []
    held = [] if task.load_state is None else _imported(session, task.load_state)
    said, steps = held, None
    for line in _messages(task):
        messages.append({"role": "user", "content": line})
        prompt: Any = messages
        if task.load_state is not None:
            prompt = [*said, *_next_message(session, template, line)]
        steps = session.generate(prompt, held=held, as_text=True, **task.options)
        text = _stream(steps, quiet=task.json)
        held, said = steps.held_ids, _said(steps)
        messages.append({"role": "assistant", "content": text})
        turns.append(statistics(session, steps))
        if not task.json:
            print_line()
            _tell_if_full(session, steps, task)
            if task.stats:
                _print_statistics(turns[-1])
    if task.save_state is not None:
        if steps is None:
            raise InputError("no message came, so there is no state to save", "type one")
        _save(session, steps, task.save_state)
    if task.json:
        print_json({"target": session.target, "messages": messages, "turns": turns})


def _next_message(session: Session, template: ChatTemplate, text: str) -> list[int]:
    """Token ids of what follows an answer: its end, the user's next message, the next opening.

    Raises:
        InputError: the template does not show the answer as it is, so its end cannot be found.
    """
    from hal.runtime.tokenizer import Tokenizer

    mark = "hal-answer-ends-here"
    turns = [("user", "x"), ("assistant", mark), ("user", text)]
    whole = template.render([{"role": role, "content": content} for role, content in turns])
    _, found, rest = whole.partition(mark)
    if not found:
        raise InputError(
            "the model's chat template hides earlier answers, so a saved state cannot go on",
            "leave out --chat or --load-state",
        )
    return Tokenizer.from_bundle(session.bundle.files).encode(rest, add_special_tokens=False)


def _messages(task: Task) -> Iterator[str]:
    """The user's messages: ``--prompt`` alone, else a line of stdin each, empty lines left out."""
    if task.prompt is not None:
        yield task.prompt
        return
    ask = sys.stdin.isatty() and not task.json
    while True:
        if ask:
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _stream(steps: Generated, quiet: bool) -> str:
    pieces = []
    for piece in steps:
        pieces.append(piece)
        if piece and not quiet:
            sys.stdout.write(piece)
            sys.stdout.flush()
    return "".join(pieces)


def _tell_if_full(session: Session, steps: Generated, task: Task) -> None:
    """Say on stderr that the text ends where it does for want of room."""
    if steps.finish_reason == "length" and len(steps.token_ids) < task.options["max_new_tokens"]:
        who = "this build (more: compile it with --dim)" if session.capacity else "the model"
        taken = len(steps.prompt_ids) + len(steps.token_ids)
        sys.stderr.write(f"{NOTE}stopped: all {taken} positions of {who} are taken\n")


def statistics(session: Session, steps: Generated) -> dict[str, Any]:
    """Figures of one generation: rates, and what the carried state takes."""
    seconds = steps.seconds
    return {
        **steps.stats(),
        "tokens_per_second": len(steps.token_ids) / seconds if seconds else None,
        "state_bytes_per_token": bytes_per_token(session),
        "state_bytes": session.state_bytes,
        "state_tokens": session.position,
    }


def bytes_per_token(session: Session) -> int:
    """Bytes that one more token adds to the carried state of one sequence."""
    import numpy as np

    total, pooled = 0, set()
    if session.plan is not None:
        total, pooled = session.plan.token_bytes(), {p.state for p in session.plan.pools}
    for record in session.bundle.manifest.state:
        if record["name"] in pooled or record["growth_axis"] is None:
            continue
        fixed = [d for d in record["dims"] if isinstance(d, int)]
        total += math.prod(fixed) * np.dtype(record["dtype"]).itemsize
    return total


def _print_statistics(stats: dict[str, Any]) -> None:
    def phase(tokens: int, kind: str) -> str:
        rate, seconds = stats[f"{kind}_tokens_per_second"], stats[f"{kind}_seconds"]
        if rate is None:
            return "-"
        return f"{tokens} tokens in {format_seconds(seconds)}, {rate:.1f} tokens/s"

    guessed, kept = stats["guessed_tokens"], stats["guessed_tokens_kept"]
    reused = stats["reused_tokens"]
    state = f"{format_bytes(stats['state_bytes'])} for {stats['state_tokens']} tokens"
    print_facts(
        "",
        [
            ("reused", f"{reused} tokens of the prompt" if reused else None),
            ("prefill", phase(stats["prompt_tokens"] - reused, "prefill")),
            ("decode", phase(stats["new_tokens"] - 1, "decode")),
            ("look-up", f"{kept} of {guessed} guessed tokens kept" if guessed else None),
            ("state", f"{state}, {stats['state_bytes_per_token']:,} bytes per token"),
            ("finished", stats["finish_reason"]),
        ],
    )
