"""What a server is told beside its model."""

from __future__ import annotations

import dataclasses

from hal.runtime.options import whole_number


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """How a model is offered.

    Attributes:
        name: what clients call the model.
        api_key: what clients have to send as bearer token; None: nothing.
        max_tokens: most tokens that one request may ask for.
        max_choices: most answers that one request may ask for, prompts times ``n``.
        max_body_bytes: largest body of a request.
        drain_seconds: how long requests may go on after the server was told to stop.

    Raises:
        InputError: a value is out of its range.
    """

    name: str = "model"
    api_key: str | None = None
    max_tokens: int = 4096
    max_choices: int = 16
    max_body_bytes: int = 4 << 20
    drain_seconds: int = 30

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_choices", "max_body_bytes"):
            whole_number(name, getattr(self, name), 1)
        whole_number("drain_seconds", self.drain_seconds, 0)
