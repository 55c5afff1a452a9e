"""Load the denoiser that ``--denoiser`` names; choose among the shipped weights for ``auto``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from certify.errors import UserError
from certify.models.checkpoints import load_weights
from denoisers import ARCHITECTURES, DENOISERS, SHIPPED
from denoisers.names import AUTO, build_with, find_source, shipped_names
from denoisers.weights import Card, read_card, read_denoiser


def shipped() -> dict[str, Card]:
    """Return the cards of the trained denoisers in this package, by name."""
    return {name: read_card(SHIPPED / f"{name}.safetensors") for name in shipped_names()}


def find_denoiser(
    name: str,
    *,
    sigma: float | None = None,
    image: tuple[int, int, int] | None = None,
    classifier: str | None = None,
    trust_code: bool = False,
) -> nn.Module:
    """See :func:`denoisers.load_denoiser`."""
    from denoisers import adapters

    channels = image[0] if image else 3
    source = find_source(choose(shipped(), sigma, image, classifier) if name == AUTO else name)
    module: Any
    if source.kind == "card":
        assert source.file is not None
        module = read_denoiser(source.file, source.name or None)
        if image is not None and module.card.image[0] != image[0]:
            raise UserError(
                f"denoiser {module.name} is for images of {module.card.image[0]} channels, these have {image[0]}; "
                "name another, or convert the images"
            )
    elif source.kind == "checkpoint":
        module = ARCHITECTURES.get(source.name)(image_channels=channels)
        loaded = load_weights(module, source.file or "", source.name)
        module = adapters.Adapted(module, {"name": source.name, "weights": loaded}, [("noisy", True), ("sigma", False)])
    elif source.kind == "deepinv":
        module = adapters.load_deepinv(source.name, source.file, channels=channels)
    elif source.kind == "diffusers":
        from denoisers.diffusion import load_diffusers

        module = load_diffusers(source.name)
    elif source.kind == "torchscript":
        module = adapters.load_torchscript(source.file or "", trust_code=trust_code)
    elif source.kind == "python":
        module = adapters.load_callable(source.name)
    else:
        module = build_with("denoiser", name, DENOISERS.get(source.name), options=source.options)
    frozen: nn.Module = module.requires_grad_(False).eval()
    return frozen


def choose(
    cards: Mapping[str, Card], sigma: float | None, image: tuple[int, int, int] | None, classifier: str | None
) -> str:
    """Return the name of the best weights among those trained for these images and this noise level.

    Weights trained for exactly this classifier come first, then those trained through surrogates or queries, then those
    trained on images alone, and last those trained for another classifier.

    Args:
        cards: by name.
        sigma: noise level.
        image: (C, H, W).
        classifier: SHA-256 of the classifier behind the denoiser, or None.

    Raises:
        UserError: no such weights; the message lists those for images of this size.
    """
    if sigma is None or image is None:
        missing = "the noise level (--sigma)" if sigma is None else "the images' size (--input-size)"
        raise UserError(f"denoiser 'auto' needs {missing}; give it, or name a denoiser (`certify list denoisers`)")
    same_size = {n: card for n, card in cards.items() if tuple(card.image) == tuple(image) and not card.purifier}
    fitting = [name for name, card in same_size.items() if card.covers(sigma)]
    if not fitting:
        have = "; ".join(f"{name} for sigma {card.levels()}" for name, card in same_size.items())
        size = "x".join(map(str, image))
        raise UserError(
            f"--denoiser auto: no shipped denoiser for {size} images at sigma {sigma:g}"
            f" ({have or 'none of this size'}); train one: `certify train --denoiser unet --data D --sigma {sigma:g}`"
        )

    def preference(name: str) -> tuple[int, bool, str]:
        card = cards[name]
        own = classifier is not None and any(c.get("sha256") == classifier for c in card.classifiers)
        if card.access == "white-box" and not own:
            return 4, card.continuous, name
        rank = {"white-box": 0, "surrogates": 1, "queries": 0 if own else 2}.get(card.access, 3)
        return rank, card.continuous, name  # ties: weights for this level alone first

    return min(fitting, key=preference)
