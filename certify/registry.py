"""Name -> builder. A duplicate raises, an unknown name lists its neighbours, targets load on first use."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from certify.errors import UserError


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """The error for a name that is not there, with the nearest names that are."""
    near = difflib.get_close_matches(name, list(known), n=4, cutoff=0.6)
    if not near:
        near = [k for k in known if name and (name in k or k in name)][:4]
    advice = f"nearest: {', '.join(near)}" if near else f"see `certify list {kind}s`"
    return UserError(f"unknown {kind} {name!r}; {advice}{'; ' + hint if hint else ''}")


class Registry:
    """Components of one kind by name.

    Targets are callables, or strings ``"module:attribute"`` that are imported on first use, so that a name can be
    listed without importing what it builds.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, tuple[str | Callable[..., Any], str]] = {}

    def add(self, name: str, target: str | Callable[..., Any], note: str = "") -> None:
        """Register ``target`` under ``name``; ``note`` is the line that ``certify list`` shows.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = (target, note)

    def get(self, name: str) -> Callable[..., Any]:
        """The builder registered under ``name``.

        Raises:
            UserError: no such name; the message lists the nearest ones.
        """
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        target, _ = self._entries[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
            return found
        return target

    def note(self, name: str) -> str:
        """The one-line description given at registration."""
        return self._entries[name][1]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
