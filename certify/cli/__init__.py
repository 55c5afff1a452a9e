"""The ``certify`` command: one module a group of verbs, importing nothing heavy until a verb runs."""

from certify.cli.app import main

__all__ = ["main"]
