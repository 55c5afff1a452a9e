"""A trained denoiser's file: safetensors with a card inside that says what it is, checked when it is read."""

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
"""What training used of a classifier, from nothing to its gradients."""

UNNAMED = "denoiser"
"""What training calls every file of weights, without its ending: the folder tells them apart."""

_KEY = "card"
_STORED = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Card:
    """What a denoiser's weights are and how they came about.

    Attributes:
        architecture: its name in ``ARCHITECTURES``.
        options: of the architecture.
        image: (C, H, W) of the images it was trained on.
        sigmas: noise levels it was trained for, in [0, 1] pixels; none where its training adds no noise.
        continuous: whether every level between the smallest and the largest was trained for.
        objective: ``mse``, ``stability``, ...
        access: ``white-box``, ``surrogates``, ``queries``, or ``none`` where no classifier was involved.
        classifiers: name and SHA-256 of every classifier that gave gradients or answers.
        data: name, size and SHA-256 of the training images.
        training: steps, batch size, optimizer, rates, seed and whatever else shaped the weights.
        validation: figures on held-out training images.
        started_from: the card of the weights that training began with, or None.
        command: what made it.
        versions: of the libraries.
        licence: of the weights.
        sha256: over the stored tensors.
        stored: type in which floating-point tensors are stored.
        format: of the card.
        purifier: the defence that these weights are made for, or empty: a denoiser for smoothing.
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
        """Whether it was trained for this noise level, to a hundredth of it."""
        if not self.sigmas:
            return False
        if self.continuous:
            return min(self.sigmas) * 0.99 <= sigma <= max(self.sigmas) * 1.01
        return any(abs(sigma - own) <= 0.01 * own for own in self.sigmas)

    def mismatch(self, sigma: float) -> str:
        """The warning that goes with another noise level than it was trained for."""
        if not self.sigmas:
            purpose = f"for the defence {self.purifier}, without noise," if self.purifier else "without noise"
            return f"these weights were trained {purpose} and are used at sigma {sigma:g}: expect low accuracy"
        return f"the denoiser was trained for sigma {self.levels()} and is used at {sigma:g}: expect lower accuracy"

    def levels(self) -> str:
        """The noise levels in words."""
        numbers = [f"{s:g}" for s in self.sigmas]
        return f"{numbers[0]} to {numbers[-1]}" if self.continuous else ", ".join(numbers)


class Trained(nn.Module):
    """A denoiser out of a file, with the card that came with it."""

    def __init__(self, net: nn.Module, card: Card, name: str) -> None:
        super().__init__()
        self.net, self.card, self.name = net, card, name

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        cleaned: Tensor = self.net(noisy, sigma)
        return cleaned

    def check_use(self, sigma: float) -> None:
        """Refuse weights that cannot denoise: those of a network that takes a mask in place of the level.

        Raises:
            UserError: they are for the defence ``atop``.
        """
        if self.card.purifier == "atop":
            raise UserError(
                f"denoiser {self.name} holds weights for atop, which completes masked images and takes no noise level "
                f"({sigma:g}); expected a denoiser, or the defence atop:weights=FILE of `certify compare`"
            )

    def describe(self) -> dict[str, Any]:
        """The card in short, for the record."""
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
    """Write a network's weights and their card, beside and then over ``path``.

    Args:
        path: of the file.
        net: the network.
        card: what is known of the weights, as JSON.
        kind: type in which floating-point tensors are stored; None: their own.

    Returns:
        The card as written, with the tensors' hash.
    """
    from safetensors.torch import save

    tensors = {
        key: (value.to(kind) if kind and value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in net.state_dict().items()
    }
    written = {**card, "sha256": tensors_digest(tensors)}
    with replacing(path) as beside:
        beside.write_bytes(save(tensors, metadata={_KEY: json.dumps(written, sort_keys=True)}))
    return written


def stored_card(path: str | Path) -> str:
    """The text of the card in a safetensors file, without reading its tensors; empty where there is none.

    Raises:
        UserError: no such file, or no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return str((file.metadata() or {}).get(_KEY, ""))
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read weights {path}: {first_line(error)}; expected a .safetensors file") from None


def save_denoiser(path: str | Path, net: nn.Module, card: Card) -> Card:
    """Write a denoiser's weights and card; floating-point tensors as the card's ``stored`` says.

    Returns:
        The card as written, with the tensors' hash.
    """
    return replace(card, sha256=write_weights(path, net, asdict(card), _STORED[card.stored])["sha256"])


def read_card(path: str | Path) -> Card:
    """The card of a denoiser, without reading its tensors.

    Raises:
        UserError: no such file, no safetensors, no card, or a card of another format.
    """
    found = stored_card(path)
    if not found:
        raise UserError(
            f"{path} has no card, so its architecture is not known; write ARCHITECTURE={path}, such as dncnn={path}"
        )
    return _parse(found, path)


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
    """The denoiser of a file that has a card, in evaluation mode.

    Raises:
        UserError: an unknown architecture, or tensors that are not those the card describes.
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
    """A file's name; with its folder's where training gave it the name that it gives to all."""
    return path.stem if path.stem != UNNAMED else f"{path.resolve().parent.name}/{path.stem}"
