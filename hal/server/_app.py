"""The calls of the server."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse

import hal.server._metrics as metrics
from hal.runtime.embedding import Embedder
from hal.runtime.engine import Engine
from hal.runtime.generate import Prompt
from hal.server._answers import Form, answer
from hal.server._errors import ApiError, add_handlers
from hal.server._gate import Gate
from hal.server._model import Model
from hal.server._options import ServerOptions
from hal.server._schema import ChatBody, CompletionBody, EmbeddingBody, Sampled

_COMPLETION_TOKENS = 16
"""Tokens of a plain completion whose length is not given; OpenAI's own number."""


def create_app(model: Model, options: ServerOptions | None = None) -> FastAPI:
    """An ASGI application for a model, which is closed when the application is shut down."""
    server = options or ServerOptions()
    started = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(model.close, server.drain_seconds)

    app = FastAPI(title="hal", lifespan=lifespan, redirect_slashes=False)
    app.add_middleware(Gate, options=server)
    add_handlers(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "model": server.name, "target": model.session.target}

    @app.get("/metrics")
    async def figures() -> PlainTextResponse:
        return PlainTextResponse(metrics.render(model), media_type=metrics.CONTENT_TYPE)

    card = {"id": server.name, "object": "model", "created": started, "owned_by": "hal"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != server.name:
            raise ApiError(404, f"there is no model {name!r}", code="model_not_found")
        return card

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, call: Request) -> Any:
        body.check(server)
        messages: Prompt = [message.plain() for message in body.messages]
        default = server.max_tokens
        return await _generate(model, server, call, body, [messages], default, chat=True)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, call: Request) -> Any:
        body.check(server)
        prompts: list[Prompt] = list(body.prompts())
        return await _generate(model, server, call, body, prompts, _COMPLETION_TOKENS, chat=False)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody) -> Any:
        body.check(server)
        return await _embed(_embedder(model, server), server, body)

    return app


async def _generate(
    model: Model,
    server: ServerOptions,
    call: Request,
    body: Sampled,
    prompts: list[Prompt],
    default: int,
    *,
    chat: bool,
) -> Any:
    engine = _engine(model, server)
    count = body.n or 1
    if len(prompts) * count > server.max_choices:
        raise ApiError(
            400,
            f"{len(prompts) * count} answers are asked for, this server gives at most "
            f"{server.max_choices} in one call",
            param="n" if count > 1 else "prompt",
        )
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream", param="stream_options")
    return await answer(
        engine,
        call,
        prompts,
        body.generation(server, default),
        Form(server.name, chat=chat),
        count=count,
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
    )


async def _embed(embedder: Embedder, server: ServerOptions, body: EmbeddingBody) -> Any:
    vectors, tokens = await run_in_threadpool(embedder.embed, _some(body.texts()))
    width = vectors.shape[1]
    if body.dimensions is not None and body.dimensions != width:
        raise ApiError(400, f"the model has {width} dimensions", param="dimensions")

    def encoded(vector: np.ndarray) -> Any:
        if body.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return vector.tolist()

    data = [
        {"object": "embedding", "index": index, "embedding": encoded(vector)}
        for index, vector in enumerate(vectors)
    ]
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": server.name, "usage": used}


def _some(texts: list[str | list[int]]) -> list[str | list[int]]:
    if not texts:
        raise ApiError(400, "input is empty", param="input")
    return texts


def _engine(model: Model, server: ServerOptions) -> Engine:
    if model.engine is None:
        raise ApiError(
            400, f"{server.name!r} generates no text: it is for /v1/embeddings", param="model"
        )
    return model.engine


def _embedder(model: Model, server: ServerOptions) -> Embedder:
    if model.embedder is None:
        raise ApiError(
            400,
            f"{server.name!r} gives no embeddings: it is for /v1/chat/completions and "
            "/v1/completions",
            param="model",
        )
    return model.embedder
