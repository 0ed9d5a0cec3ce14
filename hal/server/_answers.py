"""From an engine's thread to one HTTP call: pieces of several requests, gathered or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request as Call
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hal.runtime.engine import Engine, Piece, Request, Sink
from hal.runtime.generate import Prompt
from hal.runtime.options import GenerationOptions
from hal.server._errors import failure


class Answers:
    """The requests of one call. Whatever happens to the call, they are taken back at its end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.requests: list[Request] = []
        self._count = 1

    async def submit(
        self, prompts: Sequence[Prompt], options: GenerationOptions, count: int
    ) -> None:
        """Give the engine ``count`` requests for each prompt.

        Raises:
            EngineBusy, EngineClosed, InputError: see :meth:`hal.runtime.engine.Engine.submit`.
        """
        self._count = count

        def submit_all() -> None:
            for prompt in prompts:
                for index in range(count):
                    sink = self._sink(len(self.requests))
                    request = self._engine.submit(prompt, options, index=index, sink=sink)
                    self.requests.append(request)

        try:
            await run_in_threadpool(submit_all)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Take back what has not ended."""
        for request in self.requests:
            request.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Index of the request and piece, until all requests have ended."""
        left = len(self.requests)
        while left:
            index, piece = await self._pieces.get()
            left -= piece.last
            yield index, piece

    @contextlib.asynccontextmanager
    async def while_connected(self, receive: Receive) -> AsyncIterator[None]:
        """Take the requests back when the client leaves, and at the end."""
        watcher = asyncio.create_task(self._watch(receive))
        try:
            yield
        finally:
            watcher.cancel()
            self.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    def _sink(self, index: int) -> Sink:
        def put(piece: Piece) -> None:
            # The loop is closed if the server was stopped before its requests ended.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

        return put

    def usage(self) -> dict[str, Any]:
        """Tokens of all requests; each prompt counts once."""
        prompt = sum(len(r.prompt_ids) for r in self.requests[:: self._count])
        completion = sum(len(r.token_ids) for r in self.requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


class Form:
    """How the answers of a call look: of a chat, or plain completions."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self.chat = chat
        kind = "chatcmpl" if chat else "cmpl"
        self._head = {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Sequence[str], reasons: Sequence[str], used: dict[str, Any]) -> Any:
        """All choices at once."""
        choices = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            content: dict[str, Any] = {"text": text}
            if self.chat:
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._choice(index, content, reason))
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": used}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before a choice's first text, if there is one."""
        delta = {"role": "assistant", "content": ""}
        return self.chunk([self._choice(index, {"delta": delta}, None)]) if self.chat else None

    def part(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """The chunk for a piece."""
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"delta": {"content": text} if text else {}}
        return self.chunk([self._choice(index, content, reason)])

    def chunk(self, choices: list[Any], **more: Any) -> dict[str, Any]:
        """A chunk of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, **more}

    def _choice(self, index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}


async def gather(answers: Answers, form: Form, call: Call) -> Any:
    """The body of an answer in one.

    Raises:
        ApiError: a request failed.
    """
    texts = [""] * len(answers.requests)
    reasons = [""] * len(answers.requests)
    async with answers.while_connected(call.receive):
        async for index, piece in answers:
            if piece.error is not None:
                raise failure(piece.error)
            texts[index] += piece.text
            reasons[index] = piece.finish_reason or reasons[index]
    return form.whole(texts, reasons, answers.usage())


class EventStream(Response):
    """An answer as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, form: Form, *, include_usage: bool) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._answers, self._form, self._include_usage = answers, form, include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until all requests have ended or the client leaves."""

        async def event(data: Any) -> None:
            text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
            body = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        async with self._answers.while_connected(receive):
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await self._events(event)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, event: Callable[[Any], Any]) -> None:
        more = {"usage": None} if self._include_usage else {}
        for index in range(len(self._answers.requests)):
            opening = self._form.opening(index)
            if opening is not None:
                await event({**opening, **more})
        async for index, piece in self._answers:
            if piece.error is not None:
                await event(failure(piece.error).body())
                return
            if piece.text and piece.finish_reason is not None and self._form.chat:
                await event({**self._form.part(index, piece.text, None), **more})
                await event({**self._form.part(index, "", piece.finish_reason), **more})
            elif piece.text or piece.finish_reason is not None:
                await event({**self._form.part(index, piece.text, piece.finish_reason), **more})
        if self._include_usage:
            await event(self._form.chunk([], usage=self._answers.usage()))
        await event("[DONE]")


async def answer(
    engine: Engine,
    call: Call,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    form: Form,
    *,
    count: int,
    stream: bool,
    include_usage: bool,
) -> Any:
    """Run the requests of a call and answer it.

    Raises:
        ApiError, HalError: it was not taken, or failed.
    """
    answers = Answers(engine)
    await answers.submit(prompts, options, count)
    if stream:
        return EventStream(answers, form, include_usage=include_usage)
    return await gather(answers, form, call)
