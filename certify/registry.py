"""Name -> builder. A duplicate raises, an unknown name lists its neighbours, targets load on first use.

Other packages add to a registry that has a group of entry points, without a change to this one: see docs/extending.
"""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from certify.errors import UserError, first_line

PLUGINS: dict[str, str] = {}
"""Versions of the other packages whose components were used, by package: they go into the run file."""


_FEW = 12  # names that a message shows


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """The error for a name that is not there, with the nearest names that are."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.6)
    if not near:
        near = [k for k in names if name and (name in k or k in name)][:4]
    if near:
        advice = f"nearest: {', '.join(near)}"
    else:  # what has many names has a list
        advice = f"expected one of {', '.join(names)}" if len(names) <= _FEW else f"see `certify list {kind}s`"
    return UserError(f"unknown {kind} {name!r}; {advice}{'; ' + hint if hint else ''}")


def check_options(group: type, options: Iterable[str], function: Callable[..., Any]) -> None:
    """Refuse options that a ``TypedDict`` does not have.

    Args:
        group: the ``TypedDict``.
        options: names that were given.
        function: they were given to; its own parameters are suggested too.

    Raises:
        UserError: an unknown option, with the nearest names.
    """
    if unknown := min(set(options) - group.__annotations__.keys(), default=None):
        near = difflib.get_close_matches(
            unknown, {*group.__annotations__, *inspect.signature(function).parameters}, n=4
        )
        advice = f"nearest: {', '.join(near)}" if near else f"see help({function.__qualname__})"
        raise UserError(f"unknown option {unknown!r}; {advice}")


def chosen_options(group: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a ``TypedDict`` that are given."""
    return {name: options[name] for name in group.__annotations__ if name in options}


class Registry:
    """Components of one kind by name.

    Targets are callables, or strings ``"module:attribute"`` that are imported on first use, so that a name can be
    listed without importing what it builds.

    Args:
        kind: what they are, in messages.
        group: of entry points by which installed packages add to it. They are looked up once, when a name is not one of
            the house's or all names are wanted: that reads every installed package's metadata.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind, self._group = kind, group
        self._entries: dict[str, tuple[str | Callable[..., Any], str]] = {}
        self._packages: dict[str, tuple[str, str]] = {}

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
        if name not in self:
            raise unknown_name(self.kind, name, self._entries)
        target, _ = self._entries[name]
        if not isinstance(target, str):
            return target
        try:
            found: Callable[..., Any] = pkgutil.resolve_name(target)
        except Exception as error:
            if name not in self._packages:
                raise
            package = " ".join(self._packages[name])
            raise UserError(f"{self.kind} {name!r} of package {package} fails: {first_line(error)}") from error
        PLUGINS.update([self._packages[name]] if name in self._packages else [])
        return found

    def note(self, name: str) -> str:
        """The one-line description given at registration."""
        return self._entries[name][1]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def _all(self) -> Collection[str]:
        """All entries, those of other packages included; a name that is there already is an error, never replaced."""
        if self._group is not None:
            from importlib.metadata import entry_points

            for point in entry_points(group=self._group):
                assert point.dist is not None
                package = point.dist.name, point.dist.version
                if point.name not in self._entries:
                    self._packages[point.name] = package
                    self.add(point.name, point.value, f"from {' '.join(package)}")
                elif self._packages.get(point.name) != package:
                    raise UserError(
                        f"package {' '.join(package)} adds the {self.kind} {point.name!r}, a name that is taken; "
                        "rename it there, or uninstall that package"
                    )
            self._group = None
        return self._entries
