"""What ``--denoiser`` means, answered without importing torch: a name, a file, a library's model, or ``auto``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from certify.errors import UserError
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
    """

    kind: str
    name: str
    file: str | None = None


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
    if name in DENOISERS:
        return DenoiserSource("registered", name)
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
        return DenoiserSource("checkpoint", architecture, _existing(checkpoint))
    suffix = Path(name).suffix.lower()
    if suffix == ".safetensors" or suffix in _TORCHSCRIPT:
        return DenoiserSource("torchscript" if suffix in _TORCHSCRIPT else "card", "", _existing(name))
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name):
        return DenoiserSource("python", name)
    if name in ARCHITECTURES:
        raise UserError(
            f"denoiser {name!r} is an architecture without weights; train it (`certify train --denoiser {name} ...`), "
            f"write {name}=CHECKPOINT, or name trained ones: {', '.join(shipped_names()) or 'none in this package'}"
        )
    raise unknown_name("denoiser", name, [AUTO, *DENOISERS, *shipped_names(), *ARCHITECTURES], f"or {_FORMS}")


def _existing(file: str) -> str:
    if not Path(file).is_file():
        raise UserError(f"no denoiser file {file!r}; expected an existing file, or a name of `certify list denoisers`")
    return file
