"""Parse ``--denoiser`` without importing torch: a name, a file, a library's model, or ``auto``."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from certify.errors import UserError, first_line
from certify.models.file_kind import (
    CHECKPOINT,
    SAFETENSORS,
    TORCHSCRIPT,
    file_kind,
    require_consent,
    split_part,
    weights_kind,
)
from certify.models.resolve import is_file
from certify.registry import unknown_name
from denoisers import ARCHITECTURES, DEFENCES, DENOISERS, SHIPPED

AUTO = "auto"
_TORCHSCRIPT = (".pt", ".ts", ".torchscript")
_FORMS = (
    "a file (.safetensors of `certify train`, TorchScript), ARCHITECTURE=CHECKPOINT, deepinv:NAME, diffusers:FOLDER, "
    "package.module:callable"
)


@dataclass(frozen=True)
class DenoiserSource:
    """The source of a denoiser.

    Attributes:
        kind: ``registered``, ``card`` (a file with a card), ``auto``, ``checkpoint``, ``torchscript``, ``deepinv``,
            ``diffusers`` or ``python``.
        name: of the denoiser, architecture, model, callable or folder; empty if the file defines it.
        file: of its weights, or None.
        options: of a registered denoiser.
    """

    kind: str
    name: str
    file: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def check_defence(text: str) -> None:
    """Refuse a defence that is neither in ``DEFENCES`` nor a denoiser, before anything is loaded.

    Raises:
        UserError: an unknown name.
    """
    if text.partition(":")[0] not in DEFENCES:
        find_source(text)


def parse_options(text: str) -> tuple[str, dict[str, Any]]:
    """Parse ``"gs:std=1:iterations=4"`` into ``("gs", {"std": 1, "iterations": 4})``.

    Raises:
        UserError: an option that is not KEY=VALUE.
    """
    # a value may hold a colon: denoiser=package.module:callable, denoiser=deepinv:NAME=FILE
    name, *parts = re.split(r"(?<!=deepinv):(?=[A-Za-z_]\w*=)", text)
    if ":" in name:
        got = name.partition(":")[2]
        raise UserError(f"{text!r}: expected NAME:KEY=VALUE:KEY=VALUE, such as gs:std=1:iterations=4; got {got!r}")
    return name, key_values(f"{text!r}, option", parts)


def key_values(spelled: str, given: Sequence[str]) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` texts; a value is JSON or a word.

    Args:
        spelled: the option they belong to, for the message.
        given: the texts.

    Raises:
        UserError: a text that is not KEY=VALUE.
    """
    values: dict[str, Any] = {}
    for item in given:
        key, _, text = item.partition("=")
        if not (key and text):
            raise UserError(f"{spelled} {item!r}: expected KEY=VALUE, such as channels=96")
        try:
            values[key] = json.loads(text)
        except ValueError:  # a word, such as transform=rt2
            values[key] = text
    return values


def build_with(
    kind: str, text: str, builder: Callable[..., Any], *given: Any, options: Mapping[str, Any], **fixed: Any
) -> Any:
    """Call ``builder(*given, **fixed, **options)``, with errors in the options as the user's.

    Raises:
        UserError: an unknown or ``fixed`` option, or an invalid value; the message lists the options.
    """
    parameters = list(inspect.signature(builder).parameters.values())[len(given) :]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in fixed}
    its = f"its options: {', '.join(map(_spelled, known.values())) or 'none'}"
    for key in options:
        if key in fixed or not (takes_any or key in known):
            raise UserError(f"{kind} {text!r} has no option {key!r}; {its}")
    try:
        return builder(*given, **fixed, **options)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{kind} {text!r}: {first_line(error)}; {its}") from None


def _spelled(option: inspect.Parameter) -> str:
    """Format an option, with its default if it has one."""
    if option.default is option.empty:
        return option.name
    words = isinstance(option.default, str)
    default = option.default if words else json.dumps(option.default, separators=(",", ":"), default=str)
    return f"{option.name}={default}"


def shipped_names() -> list[str]:
    """Return the names of the trained denoisers in this package."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def find_source(name: str) -> DenoiserSource:  # noqa: PLR0911 - one return per form
    """Return what ``name`` refers to.

    Raises:
        UserError: an unknown name (the nearest ones are listed), or a missing file.
    """
    if name == AUTO:
        return DenoiserSource("auto", name)
    if name.partition(":")[0] in DENOISERS:
        registered, given = parse_options(name)
        return DenoiserSource("registered", registered, options=given)
    if name in shipped_names():
        return DenoiserSource("card", name, str(SHIPPED / f"{name}.safetensors"))
    kind, _, rest = name.partition(":")
    if kind == "deepinv" and rest:
        model, _, file = rest.partition("=")
        return DenoiserSource("deepinv", model, _existing(file) if file else None)
    if kind == "diffusers" and rest:
        return DenoiserSource("diffusers", rest)
    architecture, _, checkpoint = name.partition("=")
    if checkpoint and not Path(name).is_file():
        ARCHITECTURES.get(architecture)
        weights_kind(_existing(checkpoint), "--denoiser")
        return DenoiserSource("checkpoint", architecture, checkpoint)
    if Path(name).suffix.lower() in (".safetensors", *_TORCHSCRIPT) or is_file(name):
        return _file_source(_existing(name))
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name):
        return DenoiserSource("python", name)
    if name in ARCHITECTURES:
        raise UserError(
            f"denoiser {name!r} is an architecture without weights; train it (`certify train --denoiser {name} ...`), "
            f"write {name}=CHECKPOINT, or name trained ones: {', '.join(shipped_names()) or 'none in this package'}"
        )
    raise unknown_name("denoiser", name, [AUTO, *DENOISERS, *shipped_names(), *ARCHITECTURES], f"or {_FORMS}")


def _file_source(file: str) -> DenoiserSource:
    """Determine the kind of a denoiser's file from its content.

    Raises:
        UserError: weights of an unknown architecture, or not a denoiser.
    """
    kind = file_kind(file)
    if kind == CHECKPOINT:
        raise UserError(f"{file} holds weights alone; write ARCHITECTURE={file}, such as dncnn={file}")
    if kind not in (SAFETENSORS, TORCHSCRIPT):
        raise UserError(
            f"{file} is not a denoiser's file ({kind}); expected .safetensors of `certify train`, or TorchScript"
        )
    return DenoiserSource("card" if kind == SAFETENSORS else "torchscript", "", file)


def require_trusted(name: str, *, trust_code: bool) -> None:
    """Check a denoiser's name before anything is loaded, and refuse TorchScript without consent.

    Raises:
        UserError: see :func:`find_source`; or no consent.
    """
    source = find_source(name)
    if source.kind == "torchscript":
        require_consent(source.file or "", trust_code=trust_code)


def _existing(file: str) -> str:
    if not is_file(split_part(file)[0]):
        raise UserError(f"no denoiser file {file!r}; expected an existing file, or a name of `certify list denoisers`")
    return file
