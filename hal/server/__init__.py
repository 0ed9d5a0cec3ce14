"""An HTTP server with OpenAI's interface over one bundle (extra ``[serve]``).

::

    from hal.server import ServerOptions, create_app, open_model

    app = create_app(open_model(hal.load("model.hal")), ServerOptions(name="model"))

``hal serve`` does the same and runs it.
"""

from __future__ import annotations

from hal.errors import MissingExtraError

try:
    import fastapi  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise MissingExtraError("the server", "serve") from error

from hal.server._app import create_app
from hal.server._model import Model, open_model
from hal.server._options import ServerOptions
from hal.server._run import bind, run

__all__ = ["Model", "ServerOptions", "bind", "create_app", "open_model", "run"]
