"""The bodies of requests: what is read, what may be there without effect, and what is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from hal.errors import did_you_mean
from hal.runtime.options import GenerationOptions
from hal.server._errors import ApiError
from hal.server._options import ServerOptions

_IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "verbosity",
    "reasoning_effort",
    "parallel_tool_calls",
}
"""Parameters that change nothing here."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Parameters that are not supported, with the values (beside null) that ask for nothing."""


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    model: str

    def check(self, options: ServerOptions) -> None:
        """Refuse another model, and parameters that would be ignored against the client's will.

        Raises:
            ApiError: the model or a parameter is unknown or not supported.
        """
        if self.model != options.name:
            raise ApiError(
                404,
                f"there is no model {self.model!r}: this server has {options.name!r}",
                param="model",
                code="model_not_found",
            )
        for name, value in (self.model_extra or {}).items():
            if name in _IGNORED or value is None:
                continue
            if name not in _NEUTRAL:
                hint = did_you_mean(name, [*type(self).model_fields, *_NEUTRAL])
                raise ApiError(
                    400,
                    f"unknown parameter {name!r}: {hint}",
                    param=name,
                    code="unknown_parameter",
                )
            # By type as well: 0 is not False, which asks for nothing.
            if not any(value == v and type(value) is type(v) for v in _NEUTRAL[name]):
                raise ApiError(
                    400, f"{name} is not supported", param=name, code="unsupported_parameter"
                )


class StreamOptions(pydantic.BaseModel):
    """What a stream has beside the text."""

    include_usage: bool = False
    include_obfuscation: bool = False


Number = Annotated[float, pydantic.Field(allow_inf_nan=False)]


class Sampled(_Body):
    """What both calls that generate have in common."""

    max_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    n: Annotated[int, pydantic.Field(ge=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None

    @property
    def most(self) -> int | None:
        """Most tokens asked for."""
        return self.max_tokens

    def generation(self, server: ServerOptions, default: int) -> GenerationOptions:
        """The options of generation.

        Raises:
            ApiError: more tokens than the server gives.
            InputError: a value is out of its range.
        """
        if self.most is not None and self.most > server.max_tokens:
            raise ApiError(
                400,
                f"max_tokens is {self.most}, this server gives at most {server.max_tokens}",
                param="max_tokens",
            )
        return GenerationOptions(
            max_new_tokens=self.most or default,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            stop=self.stop or None,
            seed=self.seed,
            response_format=self.response_format,
            as_text=True,
        )


class ContentPart(pydantic.BaseModel):
    """A part of a message; text is all that is understood."""

    model_config = pydantic.ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(pydantic.BaseModel):
    """A message; further fields go to the model's chat template."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates know it: one text, and no role that only one vendor has."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {**(self.model_extra or {}), "role": role, "content": content}


class ChatBody(Sampled):
    """``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], pydantic.Field(min_length=1)]
    max_completion_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None

    @property
    def most(self) -> int | None:
        """Most tokens asked for, by either name."""
        return self.max_completion_tokens or self.max_tokens


class CompletionBody(Sampled):
    """``/v1/completions``."""

    prompt: str | list[int] | list[str] | list[list[int]]

    def prompts(self) -> list[str | list[int]]:
        """One or several prompts."""
        several = isinstance(self.prompt, list) and not all(isinstance(i, int) for i in self.prompt)
        listed: list[Any] = list(self.prompt) if several else [self.prompt]
        return listed


class EmbeddingBody(_Body):
    """``/v1/embeddings``."""

    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None

    def texts(self) -> list[str | list[int]]:
        """One or several texts."""
        several = isinstance(self.input, list) and not all(isinstance(i, int) for i in self.input)
        listed: list[Any] = list(self.input) if several or self.input == [] else [self.input]
        return listed
