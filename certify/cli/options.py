"""Typed options: each field of a frozen dataclass is one option, and a command receives the filled dataclasses.

A command names the groups that it takes in its signature, and nowhere else::

    @command("Certify images.", main=("model", "sigma"))
    def run(model: ModelOptions, noise: NoiseOptions) -> None:
        load(model.model, model.weights)

``certify.cli.option_groups`` holds the groups that several commands share.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar, TypeVar, dataclass_transform, get_origin, get_type_hints

import click
import cloup

from certify.errors import UserError
from certify.smoothing.rounding import exact

T = TypeVar("T")
MAIN = "Main options"


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all option groups; subclasses are frozen dataclasses with keyword arguments.

    ``section``, an argument of the class, is the heading of its options in the help; by default that of its base.
    """

    section: ClassVar[str] = "Options"

    def __init_subclass__(cls, section: str | None = None) -> None:
        """Make the subclass a dataclass."""
        cls.section = section or cls.section
        dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)(cls)  # unused, and slow to import


def option(*flags: str, help: str, default: Any = dataclasses.MISSING, **settings: Any) -> Any:
    """Return a dataclass field that is filled from an option.

    Args:
        flags: spellings; by default that of the field's name. ``bool`` fields are flags, ``tuple`` fields of text are
            repeatable.
        help: one sentence with a capital and a full stop.
        default: value of the field, or its text on the command line; None where an option may be left out.
        settings: further arguments of :class:`click.Option`, such as ``required`` and ``type``.
    """
    if default is dataclasses.MISSING and not settings.get("required"):
        default = None
    metadata = {"flags": flags, "settings": {"help": help, **settings}}
    return dataclasses.field(default=default, metadata=metadata)


flag = functools.partial(option, default=False)
"""The same for an option without a value."""


def overridden(group: type[Options], name: str, *, default: Any = dataclasses.MISSING, **settings: Any) -> Any:
    """Return the field of a base group with another default, help text or type."""
    base = next(field for field in dataclasses.fields(group) if field.name == name)
    merged = {**base.metadata["settings"], **settings}
    kept = base.default if default is dataclasses.MISSING and not merged.get("required") else default
    return option(*base.metadata["flags"], default=kept, **merged)


def _click_options(
    group: type[Options], sections: dict[str, cloup.OptionGroup], main: Collection[str]
) -> Iterator[Any]:
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        settings = dict(field.metadata["settings"])
        if field.default is not dataclasses.MISSING:
            settings["default"] = field.default
        if hints[field.name] is bool:
            settings["is_flag"] = True
        elif get_origin(hints[field.name]) is tuple and "type" not in settings:
            settings["multiple"] = True
        heading = MAIN if field.name in main else group.section
        flags = field.metadata["flags"] or (f"--{field.name.replace('_', '-')}",)
        yield cloup.Option(
            [*flags, field.name], group=sections.setdefault(heading, cloup.OptionGroup(heading)), **settings
        )


def command(
    summary: str, *, name: str | None = None, main: Collection[str] = ()
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a command; arguments annotated with a group of options receive them, filled.

    Args:
        summary: one line for the list of commands.
        name: of the command, if not the function's.
        main: names of the options that most people need, in the order of the help.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        hints = get_type_hints(function)
        groups = {arg: hint for arg, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Options)}
        sections = {MAIN: cloup.OptionGroup(MAIN)} if main else {}
        params = [option for group in groups.values() for option in _click_options(group, sections, main)]
        order = {name: place for place, name in enumerate(main)}
        params.sort(key=lambda option: order.get(option.name, len(order)))

        @functools.wraps(function)
        def callback(**given: Any) -> None:
            filled = {arg: fill(group, given) for arg, group in groups.items()}
            used = {field.name for group in groups.values() for field in dataclasses.fields(group)}
            function(**filled, **{arg: value for arg, value in given.items() if arg not in used})

        arguments = list(reversed(getattr(function, "__click_params__", [])))
        callback.__dict__.pop("__click_params__", None)
        made: click.Command = cloup.command(name, short_help=summary, params=[*arguments, *params])(callback)
        return made

    return decorate


def fill(group: type[T], values: dict[str, Any]) -> T:
    """Build a group from the values that Click parsed."""
    return group(**{field.name: values[field.name] for field in dataclasses.fields(group)})  # type: ignore[arg-type]


def given_by_user(name: str) -> bool:
    """Return True if the option was given rather than left to its default."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, click.core.ParameterSource.DEFAULT)


def refuse_given(names: Collection[str], why: str) -> None:
    """Refuse options that were given and would have no effect.

    Args:
        names: fields of the options.
        why: rest of the message, after the option's spelling.

    Raises:
        UserError: one of them was given.
    """
    for parameter in click.get_current_context().command.params:
        if parameter.name in names and given_by_user(parameter.name):
            raise UserError(f"{parameter.opts[0]} {why}")


def check_radii(radii: list[float] | None) -> None:
    """Refuse negative and infinite radii."""
    if radii is not None and not all(0 <= r < float("inf") for r in radii):
        raise UserError(f"--radii {','.join(map(exact, radii))}: expected numbers from 0")


def command_line() -> str:
    """Return this command as it was typed, for the record, without passwords, queries and fragments of URLs."""
    from certify.blackbox.client.credentials import public

    return "certify " + " ".join(shlex.quote(public(word)) for word in sys.argv[1:])
