"""Entry point: the list of commands, and how every failure is told.

=========================  =========  =====================================================
what happened              exit code  what is printed on stderr, and as JSON with ``--json``
=========================  =========  =====================================================
a ``HalError``             2          ``error: …`` and ``hint: …``
a check did not hold       1          the same
wrong usage                2          the same
interrupted                2          ``error: interrupted`` and that nothing half-written is left
anything unexpected        70         ``error: internal: …`` and where to report it
=========================  =========  =====================================================
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from types import FrameType

import typer

from hal.cli import _app
from hal.cli._output import json_alone, print_error
from hal.errors import HalError

_INTERNAL = 70  # EX_SOFTWARE of sysexits.h
_INTERRUPTED = 2
_TYPER_INTERRUPTED = 130
_TERMINATED = 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; only ``--debug`` lets an exception through."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    given, debug = _take_debug(given)
    if not debug:
        warnings.simplefilter("ignore")  # what other libraries deprecate is not the user's matter
        # Of a bad model it logs what comes as an exception, and is told in our words, as well.
        logging.getLogger("onnx_ir").setLevel(logging.CRITICAL + 1)
    told = given[: given.index("--")] if "--" in given else given
    documents = "--json" in told and not {"--help", "-h"} & set(told)
    try:
        with json_alone() if documents else contextlib.nullcontext():
            return _run(given or ["--help"], debug)
    except BrokenPipeError:
        # The reader went away (`hal … | head`); point stdout elsewhere so that exit stays quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(arguments: list[str], debug: bool) -> int:
    # Only the main thread may set signal handlers.
    main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _on_sigterm) if main_thread else None
    try:
        result = _app.create()(args=arguments, prog_name="hal", standalone_mode=False)
        sys.stdout.flush()
        code = result if isinstance(result, int) else 0
        if code == _TYPER_INTERRUPTED:  # typer itself turns Ctrl-C into this code
            return _interrupted()
        return code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            raise
        return _explain(error)
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, previous)


def _interrupted() -> int:
    print_error(
        "interrupted",
        "nothing half-written is left; run the command again: layers that were quantized by"
        " calibration are kept for it",
    )
    return _INTERRUPTED


def _explain(error: Exception) -> int:
    if isinstance(error, HalError):
        print_error(error.message, error.hint)
        return error.exit_code
    usage = getattr(error, "format_message", None)
    if callable(usage) and not usage():  # a group without a command, whose help was printed
        return 2
    if callable(usage):  # a usage error; its class lives in click or in typer, by version
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "hal"
        print_error(usage(), f"see {path} --help")
        return 2
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        print_error(f"{place}{error.strerror or error}", "check the path, and free space")
        return 2
    if isinstance(error, MemoryError):
        print_error("not enough memory", "use a machine with more, or a smaller model")
        return 2
    print_error(
        f"internal: {type(error).__name__}: {_first_line(error)}{_origin(error)}",
        "this is a bug in hal: run the command again with --debug and report what it prints",
    )
    return _INTERNAL


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def _origin(error: Exception) -> str:
    """`` (module.py:12)``: the deepest line of the traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    name = os.path.basename(trace.tb_frame.f_code.co_filename)  # noqa: PTH119 - may be "<string>"
    return f" ({name}:{trace.tb_lineno})"


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Remove ``--debug`` wherever it stands before ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [a for a in arguments[:end] if a != "--debug"]
    debug = len(kept) < end or os.environ.get("HAL_DEBUG", "") not in ("", "0")
    return kept + arguments[end:], debug


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    """Leave through the ``finally`` clauses, so that nothing half-written stays behind."""
    raise SystemExit(_TERMINATED)
