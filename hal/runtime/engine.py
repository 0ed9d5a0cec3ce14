"""Many requests on one session: continuous batching, with a bounded queue in front.

::

    with Engine(bundle.session(kv_layout="paged")) as engine:
        request = engine.submit("The for statement", GenerationOptions(max_new_tokens=32))
        for piece in request:
            print(piece.text, end="", flush=True)

One thread owns the session. Over and over it takes back what was cancelled, runs a chunk of
prompts (those that wait are taken up while rows and pages allow), and then one token of every
sequence whose prompt is done. A sequence gets the tokens that it would get alone: rows do not see
each other, and each draws from its own seed.
"""

from __future__ import annotations

import copy
import dataclasses
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Self

import numpy as np

from hal.errors import HalError, InputError
from hal.runtime.batching import Row, RowPool
from hal.runtime.decoding import Continuation, FinishReason
from hal.runtime.generate import Prompt, check_language_model, continuation
from hal.runtime.meters import Figures
from hal.runtime.options import GenerationOptions, whole_number
from hal.runtime.tokenizer import TOKENIZER_FILE, Tokenizer

if TYPE_CHECKING:
    from hal.runtime.session import Session


class EngineBusy(HalError):  # noqa: N818  (reads as the sentence it is)
    """The queue is full: the request was not taken, try again later."""


class EngineClosed(HalError):  # noqa: N818
    """The engine is being closed, or a request ended because it was."""


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How many requests an engine takes.

    Attributes:
        max_batch: most sequences that run together (1 for a contiguous build, see
            :class:`hal.runtime.batching.RowPool`).
        max_waiting: most requests that wait; more are refused with :class:`EngineBusy`.
        prefill_chunk: prompt tokens between two tokens of the sequences that run already.
        kept_rows: finished sequences that are kept for prompts that begin like them; 0: none.
        max_pages: pages of the cache that all may take together; None: as many as they ask for.

    Raises:
        InputError: a value is out of its range.
    """

    max_batch: int = 16
    max_waiting: int = 256
    prefill_chunk: int = 256
    kept_rows: int = 16
    max_pages: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_waiting", "prefill_chunk"):
            whole_number(name, getattr(self, name), 1)
        whole_number("kept_rows", self.kept_rows, 0)
        if self.max_pages is not None:
            whole_number("max_pages", self.max_pages, 1)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One step of a request.

    Attributes:
        token: the token's id; None if the request ended without one more.
        text: what became certain with it, often empty.
        finish_reason: set on the last piece of a text that came to its end.
        error: set on the last piece if there was one.
        cancelled: set on the last piece of a request that was taken back.
    """

    token: int | None = None
    text: str = ""
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    cancelled: bool = False

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None or self.error is not None or self.cancelled


Sink = Callable[[Piece], None]
"""Called from the engine's thread for each piece; returns at once and raises nothing."""


class Request:
    """A sequence that an engine works on. Iterate over it for its pieces.

    Attributes:
        prompt_ids: the prompt's tokens.
        token_ids: the tokens so far; complete after the last piece.
    """

    def __init__(self, engine: Engine, sequence: Continuation, sink: Sink | None) -> None:
        self.prompt_ids = sequence.prompt_ids
        self.token_ids = sequence.token_ids
        self._engine = engine
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self.sink = sink or self._pieces.put
        self.sequence = sequence
        self.submitted = self.latest = time.monotonic()
        self.row: Row | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """Take the request back; its row and pages go back before the next step."""
        self._engine.cancel(self)

    def __iter__(self) -> Iterator[Piece]:
        """Its pieces as they come, unless they go to a sink.

        Raises:
            HalError: the request ended with an error.
        """
        while True:
            piece = self._pieces.get()
            if piece.error is not None:
                raise piece.error
            yield piece
            if piece.last:
                return

    def text(self) -> str:
        """Wait for the end; the whole text.

        Raises:
            HalError: the request ended with an error.
        """
        return "".join(piece.text for piece in self)


class Engine:
    """Runs requests on a session, which nobody else may use until the engine is closed.

    Args:
        session: of a language model, best with a paged cache.
        options: how many requests it takes.

    Raises:
        InputError: the model is no language model.
    """

    def __init__(self, session: Session, options: EngineOptions | None = None) -> None:
        check_language_model(session)
        self.session, self.options = session, options or EngineOptions()
        files = session.bundle.files
        self._tokenizer = Tokenizer.from_bundle(files) if TOKENIZER_FILE in files else None
        self._rows = RowPool(
            session,
            self.options.max_batch,
            self.options.kept_rows,
            self.options.max_pages,
            self.options.prefill_chunk,
        )
        self._figures = Figures()
        self._wake = threading.Condition()
        # Guarded by the condition; everything else belongs to the thread.
        self._waiting: deque[Request] = deque()
        self._cancelled: list[Request] = []
        self._closing = self._stopping = self._dropping = False
        self._running: list[Request] = []
        self._thread = threading.Thread(target=self._loop, name="hal-engine", daemon=True)
        self._thread.start()

    # -- from any thread ------------------------------------------------------------------------

    @property
    def max_batch(self) -> int:
        """Most sequences that run together in this build."""
        return self._rows.largest

    def submit(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        index: int = 0,
        sink: Sink | None = None,
    ) -> Request:
        """Take a request up, or into the queue.

        Args:
            prompt: text, messages of a chat, or token ids.
            options: of generation; ``prefill_chunk`` and ``prompt_lookup`` have no effect.
            index: which of several requests with the same seed this is: each draws for itself.
            sink: where the pieces go; default: to whoever iterates over the request.

        Raises:
            EngineBusy: the queue is full.
            EngineClosed: the engine takes no more.
            InputError: as :func:`hal.runtime.generate.generate`; or the request could never have
                the pages that it needs.
        """
        self._check_open()
        sequence = self._sequence(prompt, options or GenerationOptions(), index)
        request = Request(self, sequence, sink)
        with self._wake:
            self._check_open()
            if len(self._waiting) >= self.options.max_waiting:
                self._figures.rejected += 1
                raise EngineBusy(
                    f"{len(self._waiting)} requests are waiting already", "try again in a second"
                )
            self._waiting.append(request)
            self._wake.notify()
        return request

    def cancel(self, request: Request) -> None:
        """See :meth:`Request.cancel`."""
        with self._wake:
            self._cancelled.append(request)
            self._wake.notify()

    def figures(self) -> Figures:
        """What the engine has done and is doing, as of its latest step."""
        with self._wake:
            figures = copy.deepcopy(self._figures)
            figures.waiting, figures.running = len(self._waiting), len(self._running)
            return figures

    def drop_kept(self) -> None:
        """Forget the finished sequences that are kept for prompts that begin like them."""
        with self._wake:
            self._dropping = True
            self._wake.notify()
            self._wake.wait_for(lambda: not self._dropping or not self._thread.is_alive())

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and stop.

        Args:
            drain: finish those that were taken; else they end with :class:`EngineClosed`.
            timeout: seconds to wait for that, then the rest ends; None: for as long as it takes.
        """
        with self._wake:
            self._closing = True
            self._stopping = self._stopping or not drain
            self._wake.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._wake:
                self._stopping = True
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    def _check_open(self) -> None:
        if self._closing or not self._thread.is_alive():
            raise EngineClosed("the engine is closed", "start another one")

    def _sequence(self, prompt: Prompt, options: GenerationOptions, index: int) -> Continuation:
        if self._tokenizer is None:  # for an error that says so, if the request needs one
            needed = options.stop or options.constrained or options.gives_text(prompt)
            tokenizer = Tokenizer.from_bundle(self.session.bundle.files) if needed else None
        else:
            tokenizer = self._tokenizer
        sequence = continuation(self.session, prompt, options, tokenizer, index)
        tokens = len(sequence.prompt_ids) + sequence.room
        if not self._rows.ever_fits(tokens):
            raise InputError(
                f"the request may take {self._rows.pages_for(tokens)} pages of the cache, "
                f"there are {self.options.max_pages}",
                "ask for fewer tokens, or shorten the prompt",
            )
        return sequence

    # -- the thread -----------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while self._take_commands():
                self._run_prompts()
                self._run_tokens()
                with self._wake:
                    self._count_pages()
        finally:
            self._end_all()

    def _take_commands(self) -> bool:
        """Wait for something to do and take what was asked for; False at the end."""
        with self._wake:
            self._wake.wait_for(
                lambda: (
                    self._running
                    or self._waiting
                    or self._cancelled
                    or self._closing
                    or self._dropping
                )
            )
            cancelled, self._cancelled = self._cancelled, []
            for request in cancelled:
                self._take_back(request)
            if self._dropping:
                self._rows.drop_kept()
                self._dropping = False
                self._wake.notify_all()
            self._count_pages()
            busy = bool(self._running or self._waiting)
            return not self._stopping and (busy or not self._closing)

    def _take_back(self, request: Request) -> None:
        if request in self._running:
            self._running.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)
        else:
            return  # it has ended by itself
        if request.row is not None:
            self._rows.release(request.row)
        self._figures.cancelled += 1
        request.sink(Piece(cancelled=True))

    def _run_prompts(self) -> None:
        """Run prompts, those that were taken up first, until the chunk is used up."""
        left = self.options.prefill_chunk
        while left > 0:
            request = next((r for r in self._running if not r.token_ids), None) or self._admit()
            if request is None:
                return
            row = request.row
            assert row is not None
            before = self._rows.held(row)
            try:
                logits = self._rows.run_prompt(row, left)
                self._figures.steps += 1
                left -= self._rows.held(row) - before
                if logits is not None:
                    self._accept(request, logits)
            except Exception as error:  # noqa: BLE001  (it is the request's, not the engine's)
                left -= 1
                self._fail(request, error)

    def _admit(self) -> Request | None:
        """Give the request that has waited longest a row, if there is room."""
        with self._wake:
            if not self._waiting:
                return None
            request = self._waiting[0]
            ids = np.array(request.prompt_ids, np.int64)
            request.row = self._rows.admit(ids, len(ids) + request.sequence.room)
            if request.row is None:
                return None
            self._waiting.popleft()
            self._running.append(request)
            self._figures.prompt_tokens += len(ids)
            self._figures.reused_tokens += request.row.reused
        return request

    def _run_tokens(self) -> None:
        """Run the latest token of every sequence whose prompt is done."""
        ready = [r for r in self._running if r.token_ids]
        if not ready:
            return
        rows = [r.row for r in ready if r.row is not None]
        try:
            logits = self._rows.run_tokens(rows, [r.token_ids[-1] for r in ready])
            self._figures.steps += 1
        except Exception as error:  # noqa: BLE001  (told to everybody who is concerned)
            for request in ready:
                self._fail(request, error)
            return
        for request, line in zip(ready, logits, strict=True):
            try:
                self._accept(request, line)
            except Exception as error:  # noqa: BLE001
                self._fail(request, error)

    def _accept(self, request: Request, logits: np.ndarray) -> None:
        token, text = request.sequence.accept(logits)
        now, first = time.monotonic(), len(request.token_ids) == 1
        with self._wake:
            self._figures.new_tokens += 1
            if first:
                self._figures.first_token.add(now - request.submitted)
            else:
                self._figures.next_token.add(now - request.latest)
            request.latest = now
            reason = request.sequence.finish_reason
            if reason is not None:
                assert request.row is not None
                self._running.remove(request)
                # The last token was chosen and never run.
                self._rows.finish(request.row, [*request.prompt_ids, *request.token_ids[:-1]])
                self._figures.finished += 1
                self._count_pages()
        request.sink(Piece(token, text, reason))

    def _fail(self, request: Request, error: Exception) -> None:
        with self._wake:
            if request in self._running:
                self._running.remove(request)
            if request.row is not None:
                self._rows.release(request.row)
            self._figures.failed += 1
            self._count_pages()
        request.sink(Piece(error=error))

    def _count_pages(self) -> None:
        self._figures.pages = self._rows.pages
        self._figures.kept_pages = self._rows.kept_pages
        self._figures.kept_rows = self._rows.kept_rows

    def _end_all(self) -> None:
        """Tell every request that is left that nothing comes, and give everything back."""
        with self._wake:
            self._closing = True
            left = [*self._running, *self._waiting]
            for request in self._running:
                if request.row is not None:
                    self._rows.release(request.row)
            self._running.clear()
            self._waiting.clear()
            self._rows.drop_kept()
            self._dropping = False
            self._figures.failed += len(left)
            self._count_pages()
            self._wake.notify_all()
        for request in left:
            request.sink(Piece(error=EngineClosed("the server is shutting down", "try another")))
