"""A server in a thread of the test's own process, and clients for it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from hal.server import Model, ServerOptions, bind, create_app


class Running:
    """A server that accepts connections."""

    def __init__(self, model: Model, address: str, options: ServerOptions) -> None:
        self.model, self.address, self.options = model, address, options

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(**self._settings(settings))

    def async_client(self, **settings: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._settings(settings))

    def _settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        defaults = {"base_url": f"{self.address}/v1", "api_key": "none", "max_retries": 0}
        return {**defaults, **settings}

    def post(self, path: str, body: Any) -> httpx.Response:
        kind = {"content": body} if isinstance(body, (str, bytes)) else {"json": body}
        headers = {"content-type": "application/json"}
        return httpx.post(f"{self.address}{path}", headers=headers, timeout=60, **kind)

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"{self.address}/metrics").text
        return {
            ":".join([sample.name, *sample.labels.values()]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def idle(self) -> dict[str, float]:
        """Wait until nothing runs; the metrics then."""
        found: dict[str, float] = {}

        def nothing_runs() -> bool:
            found.update(self.metrics())
            return found["hal_requests_running"] == found["hal_requests_waiting"] == 0

        eventually(nothing_runs)
        return found


@contextlib.contextmanager
def serving(model: Model, **options: Any) -> Iterator[Running]:
    """Serve a model on a free port; it is closed at the end."""
    settings = ServerOptions(**{"name": "tiny", "drain_seconds": 5, **options})
    app = create_app(model, settings)
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield Running(model, f"http://127.0.0.1:{listening.getsockname()[1]}", settings)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something that comes to be so.

    Raises:
        AssertionError: it does not.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be so"
        time.sleep(0.02)
