"""What ``--denoiser`` means, answered without importing torch: a name, a file, a library's model, or ``auto``."""

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
from denoisers import ARCHITECTURES, DENOISERS, SHIPPED

AUTO = "auto"
_TORCHSCRIPT = (".pt", ".ts", ".torchscript")
_FORMS = (
    "a file (.safetensors of `certify train`, TorchScript), ARCHITECTURE=CHECKPOINT, deepinv:NAME, diffusers:FOLDER, "
    "package.module:callable"
)


@dataclass(frozen=True)
class DenoiserSource:
    """Where a denoiser comes from.

    Attributes:
        kind: ``registered``, ``card`` (a file with one), ``auto``, ``checkpoint``, ``torchscript``, ``deepinv``,
            ``diffusers`` or ``python``.
        name: of the denoiser, architecture, model, callable or folder; empty where the file says it.
        file: of its weights, or None.
        options: of a registered denoiser.
    """

    kind: str
    name: str
    file: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_options(text: str) -> tuple[str, dict[str, Any]]:
    """``"gs:std=1:iterations=4"`` to ``("gs", {"std": 1, "iterations": 4})``.

    Raises:
        UserError: an option that is no KEY=VALUE.
    """
    # a value may hold a colon: denoiser=package.module:callable, denoiser=deepinv:NAME=FILE
    name, *parts = re.split(r"(?<!=deepinv):(?=[A-Za-z_]\w*=)", text)
    if ":" in name:
        got = name.partition(":")[2]
        raise UserError(f"{text!r}: expected NAME:KEY=VALUE:KEY=VALUE, such as gs:std=1:iterations=4; got {got!r}")
    return name, key_values(f"{text!r}, option", parts)


def key_values(spelled: str, given: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts, the values as JSON or words.

    Args:
        spelled: where they were given, for the message.
        given: the texts.

    Raises:
        UserError: one that is no KEY=VALUE.
    """
    found: dict[str, Any] = {}
    for item in given:
        key, _, text = item.partition("=")
        if not (key and text):
            raise UserError(f"{spelled} {item!r}: expected KEY=VALUE, such as channels=96")
        try:
            found[key] = json.loads(text)
        except ValueError:  # a word, such as transform=rt2
            found[key] = text
    return found


def build_with(
    kind: str, text: str, builder: Callable[..., Any], *given: Any, options: Mapping[str, Any], **fixed: Any
) -> Any:
    """What ``builder(*given, **fixed, **options)`` makes; options that do not fit are the user's mistake.

    Raises:
        UserError: an unknown option, one of those that are ``fixed``, or a value that does not fit; says what there is.
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
    """An option with its default as it would be typed, if it has one."""
    if option.default is option.empty:
        return option.name
    words = isinstance(option.default, str)
    default = option.default if words else json.dumps(option.default, separators=(",", ":"), default=str)
    return f"{option.name}={default}"


def shipped_names() -> list[str]:
    """The trained denoisers in this package."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def find_source(name: str) -> DenoiserSource:  # noqa: PLR0911 - one answer a form
    """What ``name`` means.

    Raises:
        UserError: an unknown name (with the nearest), or a file that is not there.
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
    """What a denoiser's file is, by its content.

    Raises:
        UserError: weights whose architecture is not known, or no denoiser.
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
    """Look a denoiser's name up before anything is loaded, and refuse TorchScript without consent.

    Raises:
        UserError: as :func:`find_source`; no consent.
    """
    source = find_source(name)
    if source.kind == "torchscript":
        require_consent(source.file or "", trust_code=trust_code)


def _existing(file: str) -> str:
    if not is_file(split_part(file)[0]):
        raise UserError(f"no denoiser file {file!r}; expected an existing file, or a name of `certify list denoisers`")
    return file
