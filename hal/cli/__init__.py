"""The command line: ``hal compile``, ``run``, ``verify``, ``inspect`` and the others.

Every command is thin over the public API. Nothing heavy is imported before a command runs, so
``hal --help`` answers at once.
"""

from hal.cli._main import main

__all__ = ["main"]
