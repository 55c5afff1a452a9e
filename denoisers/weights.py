"""Files of trained denoisers: safetensors with a card in the metadata, verified when read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify.errors import UserError, first_line
from certify.models.identity import tensors_digest
from certify.runs.files import replacing

FORMAT = 1
ACCESS = ("none", "surrogates", "queries", "white-box")
"""Access to a classifier during training, in ascending order."""

UNNAMED = "denoiser"
"""Stem of every file that training writes; the folder distinguishes them."""

_KEY = "card"
_STORED = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Card:
    """Description and provenance of a denoiser's weights.

    Attributes:
        architecture: name in ``ARCHITECTURES``.
        options: of the architecture.
        image: (C, H, W) of the images it was trained on.
        sigmas: noise levels of the training, in [0, 1] pixels; empty if it added no noise.
        continuous: True if all levels between the smallest and the largest were trained.
        objective: ``mse``, ``stability``, ...
        access: ``white-box``, ``surrogates``, ``queries``, or ``none`` without a classifier.
        classifiers: name and SHA-256 of every classifier used for gradients or answers.
        data: name, size and SHA-256 of the training images.
        training: steps, batch size, optimizer, rates, seed and all other hyperparameters.
        validation: scores on held-out training images.
        started_from: the card of the initial weights, or None.
        command: command line of the training.
        versions: of the libraries.
        licence: of the weights.
        sha256: hash of the stored tensors.
        stored: type in which floating-point tensors are stored.
        format: version of the card.
        purifier: the defence these weights are for; empty for a denoiser.
    """

    architecture: str
    options: dict[str, Any]
    image: tuple[int, ...]
    sigmas: tuple[float, ...]
    continuous: bool
    objective: str
    access: str
    classifiers: tuple[dict[str, Any], ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    started_from: dict[str, Any] | None = None
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    licence: str = ""
    sha256: str = ""
    stored: str = "float32"
    format: int = FORMAT
    purifier: str = ""

    def covers(self, sigma: float) -> bool:
        """True if the weights were trained for this noise level, within 1 %."""
        if not self.sigmas:
            return False
        if self.continuous:
            return min(self.sigmas) * 0.99 <= sigma <= max(self.sigmas) * 1.01
        return any(abs(sigma - own) <= 0.01 * own for own in self.sigmas)

    def mismatch(self, sigma: float) -> str:
        """Return the warning for a noise level the weights were not trained for."""
        if not self.sigmas:
            purpose = f"for the defence {self.purifier}, without noise," if self.purifier else "without noise"
            return f"these weights were trained {purpose} and are used at sigma {sigma:g}: expect low accuracy"
        return f"the denoiser was trained for sigma {self.levels()} and is used at {sigma:g}: expect lower accuracy"

    def levels(self) -> str:
        """Return the noise levels as text."""
        numbers = [f"{s:g}" for s in self.sigmas]
        return f"{numbers[0]} to {numbers[-1]}" if self.continuous else ", ".join(numbers)


class Trained(nn.Module):
    """A denoiser from a file, with its card."""

    def __init__(self, net: nn.Module, card: Card, name: str) -> None:
        super().__init__()
        self.net, self.card, self.name = net, card, name

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Denoise ``(B, C, H, W)``."""
        cleaned: Tensor = self.net(noisy, sigma)
        return cleaned

    def check_use(self, sigma: float) -> None:
        """Refuse weights that cannot denoise, because their network takes a mask in place of the noise level.

        Raises:
            UserError: weights for the defence ``atop``.
        """
        if self.card.purifier == "atop":
            raise UserError(
                f"denoiser {self.name} holds weights for atop, which completes masked images and takes no noise level "
                f"({sigma:g}); expected a denoiser, or the defence atop:weights=FILE of `certify compare`"
            )

    def describe(self) -> dict[str, Any]:
        """Return the most important parts of the card, for the record."""
        card = self.card
        return {
            "name": self.name,
            "architecture": card.architecture,
            "objective": card.objective,
            "access": card.access,
            "trained_for": card.levels(),
            "sha256": card.sha256,
            **({"purifier": card.purifier} if card.purifier else {}),
        }


def write_weights(
    path: str | Path, net: nn.Module, card: Mapping[str, Any], kind: torch.dtype | None = None
) -> dict[str, Any]:
    """Write a network's weights and card to a file, atomically.

    Args:
        path: of the file.
        net: the network.
        card: content of the card, as JSON.
        kind: type in which floating-point tensors are stored; None: unchanged.

    Returns:
        The card as written, with the hash of the tensors.
    """
    from safetensors.torch import save

    tensors = {
        key: (value.to(kind) if kind and value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in net.state_dict().items()
    }
    written = {**card, "sha256": tensors_digest(tensors)}
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={_KEY: json.dumps(written, sort_keys=True)}))
    return written


def stored_card(path: str | Path) -> str:
    """Return the text of the card in a safetensors file, without reading tensors; empty if it has no card.

    Raises:
        UserError: no such file, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return str((file.metadata() or {}).get(_KEY, ""))
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read weights {path}: {first_line(error)}; expected a .safetensors file") from None


def save_denoiser(path: str | Path, net: nn.Module, card: Card) -> Card:
    """Write a denoiser's weights and card, in the floating-point type that the card names.

    Returns:
        The card as written, with the hash of the tensors.
    """
    return replace(card, sha256=write_weights(path, net, asdict(card), _STORED[card.stored])["sha256"])


def read_card(path: str | Path) -> Card:
    """Read a denoiser's card, without its tensors.

    Raises:
        UserError: no such file, not safetensors, no card, or a card of another format.
    """
    text = stored_card(path)
    if not text:
        raise UserError(
            f"{path} has no card, so its architecture is not known; write ARCHITECTURE={path}, such as dncnn={path}"
        )
    return _parse(text, path)


def _parse(text: str, path: str | Path) -> Card:
    try:
        raw = json.loads(text)
        if not isinstance(raw, Mapping) or raw.get("format") != FORMAT:
            raise ValueError(f"format {raw.get('format')!r}" if isinstance(raw, Mapping) else "no object")
        known = {f.name for f in fields(Card)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in known}
        card = Card(**values)
        if not all(0 < s < float("inf") for s in card.sigmas) or len(card.image) != 3:
            raise ValueError("impossible noise levels, or no image size")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"the card of {path} cannot be used ({first_line(error)}); expected format {FORMAT} of `certify train`"
        ) from None
    return card


def read_denoiser(path: str | Path, name: str | None = None) -> Trained:
    """Read a denoiser from a file with a card, in evaluation mode.

    Raises:
        UserError: an unknown architecture, or tensors that do not match the card.
    """
    from certify.models.checkpoints import read_state_dict
    from denoisers import ARCHITECTURES

    card = read_card(path)
    tensors = read_state_dict(path)
    if tensors_digest(tensors) != card.sha256:
        raise UserError(f"the card of {path} does not match its tensors (another SHA-256): do not use it; get it again")
    try:
        net: nn.Module = ARCHITECTURES.get(card.architecture)(image_channels=card.image[0], **card.options)
        net.load_state_dict(tensors)
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        raise UserError(
            f"the card of {path} does not match its tensors: {card.architecture} {card.options}: {first_line(error)}; "
            "expected a file as `certify train` wrote it: get it again"
        ) from None
    return Trained(net.requires_grad_(False).eval(), card, name or _name(Path(path)))


def _name(path: Path) -> str:
    """Return the stem of a file, with the folder's name if training wrote it."""
    return path.stem if path.stem != UNNAMED else f"{path.resolve().parent.name}/{path.stem}"
