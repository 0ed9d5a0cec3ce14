"""Opening a bundle for a server: with a paged cache wherever that can be had."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from hal.errors import HalError, InputError
from hal.runtime.embedding import Embedder
from hal.runtime.engine import Engine, EngineOptions

if TYPE_CHECKING:
    from hal.bundle import Bundle
    from hal.runtime.session import Session

_LOG = logging.getLogger("hal.server")


@dataclasses.dataclass(frozen=True)
class Model:
    """What a server offers; one of the two, by the bundle's task."""

    engine: Engine | None = None
    embedder: Embedder | None = None

    @property
    def session(self) -> Session:
        """Where it runs."""
        user = self.engine or self.embedder
        assert user is not None
        return user.session

    def close(self, timeout: float | None) -> None:
        """Finish what was taken, for so many seconds at most."""
        if self.engine is not None:
            self.engine.close(timeout=timeout)
        self.session.close()


def open_model(
    bundle: Bundle,
    target: str | None = None,
    *,
    threads: int | None = None,
    options: EngineOptions | None = None,
) -> Model:
    """Open a language model or a text encoder.

    A build whose cache is contiguous and cannot be used with pages is built again for the same
    target in a temporary folder. Where that fails, sequences run one after the other.

    Raises:
        InputError: the bundle holds neither a language model nor a text encoder.
        TargetError: there is no such build, or it cannot run here.
    """
    options = options or EngineOptions()
    if bundle.manifest.task == "causal-lm":
        return Model(engine=Engine(_language_session(bundle, target, threads), options))
    session = bundle.session(target, threads=threads)
    return Model(embedder=Embedder(session, max_waiting=options.max_waiting))


def _language_session(bundle: Bundle, target: str | None, threads: int | None) -> Session:
    try:
        return bundle.session(target, threads=threads, kv_layout="paged")
    except InputError:
        session = bundle.session(target, threads=threads)
    if session.plan is None:
        return session
    words = "paged" + {0: "", 8: ",int8", 4: ",int4"}[session.plan.bits]
    try:
        paged = bundle.retarget(session.target, kv_cache=words, verify=False)
        return paged.session(session.target, threads=threads)
    except HalError as error:
        _LOG.warning(
            "the build for %s has a contiguous cache and cannot be built again here (%s): "
            "requests run one after the other",
            session.target,
            error.message,
        )
        return session
