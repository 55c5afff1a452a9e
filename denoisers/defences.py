"""Build defences around a frozen classifier from texts such as ``gs:std=1:iterations=4``."""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor, nn

from certify.errors import UserError, first_line
from certify.models.classifier import Classifier
from certify.models.defence import Defence, Member
from certify.models.identity import record_module
from denoisers import DEFENCES, DENOISERS, SHIPPED, load_denoiser
from denoisers.classical import GaussianBlur, check_positive_int
from denoisers.find import find_denoiser, shipped
from denoisers.names import build_with, find_source, parse_options
from denoisers.randomness import Generators, normal
from denoisers.weights import Trained, read_denoiser


def build_defence(text: str, classifier: Classifier, *, trust_code: bool = False) -> Defence:
    """Build a defence from its name in ``DEFENCES`` or ``DENOISERS`` with options, or from any denoiser.

    Args:
        text: ``NAME:KEY=VALUE:...``, or anything ``--denoiser`` accepts.
        classifier: the frozen classifier.
        trust_code: run the program in a TorchScript file of the denoiser.

    Raises:
        UserError: no such defence or option, weights for other images, or a denoiser that needs a noise level.
    """
    head = text.partition(":")[0]
    if head in DEFENCES:
        name, options = parse_options(text)
        builder = DEFENCES.get(name)
        consent = {"trust_code": trust_code} if "trust_code" in inspect.signature(builder).parameters else {}
        built: Defence = build_with("defence", text, builder, classifier, options=options, **consent)
        return built
    if head.isidentifier() and head not in (*DENOISERS, "deepinv") and ":" in text and "=" in text.partition(":")[2]:
        DEFENCES.get(head)  # raises an error that lists the defences
    denoiser = find_denoiser(text, image=classifier.input.size, trust_code=trust_code)
    _check_without_noise(denoiser, text, classifier.input.size)
    return Defence(text, [Member(denoiser, classifier)])


def _check_without_noise(denoiser: nn.Module, text: str, size: tuple[int, ...] | None) -> None:
    """Refuse denoisers that need the noise level, since a plain defence adds no noise."""
    if isinstance(denoiser, GaussianBlur) and denoiser.width is None:
        raise UserError(
            f"defence {text}: its width follows the noise, and none is added here; write gaussian:width=0.5"
        )
    level = 0.25
    if isinstance(denoiser, Trained):
        if denoiser.card.purifier:
            purifier = denoiser.card.purifier
            raise UserError(f"defence {text}: it holds weights for {purifier}; write {purifier}:weights={text}")
        size, level = denoiser.card.image, (denoiser.card.sigmas or (level,))[0]
    if size is None:
        return
    try:
        with torch.no_grad():
            denoiser(torch.zeros(1, *size))
    except UserError as error:
        advice = f"no noise is added here: write denoised:denoiser={text}:sigma={level:g}"
        raise UserError(f"defence {text}: {first_line(error)}; {advice}") from None


def undefended(classifier: Classifier) -> Defence:
    """Build a defence of the classifier alone."""
    return Defence("none", [Member(None, classifier)])


class Noisy(nn.Module):
    """Gaussian noise, then a denoiser: one draw of denoised smoothing."""

    random = True

    def __init__(self, denoiser: nn.Module | None, sigma: float, shape: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.denoiser, self.sigma, self.shape = denoiser, sigma, shape

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Generators = None) -> Tensor:
        """Add noise to ``(B, C, H, W)``, and denoise."""
        noisy = images + self.sigma * normal(images, generator)
        denoised: Tensor = noisy if self.denoiser is None else self.denoiser(noisy, self.sigma)
        return denoised

    def describe(self) -> dict[str, object]:
        """Return noise level and denoiser, for the record."""
        denoiser = None if self.denoiser is None else record_module(self.denoiser, self.sigma, self.shape)
        return {"name": "noise, then denoiser", "noise": self.sigma, "denoiser": denoiser}


def smoothed(
    classifier: Classifier, sigma: float = 0.25, n: int = 100, denoiser: str = "auto", *, trust_code: bool = False
) -> Defence:
    """Build denoised smoothing as a plain classifier, without a certificate: the majority over ``n`` noisy copies.

    Args:
        classifier: frozen.
        sigma: standard deviation of the noise, in [0, 1] pixels.
        n: number of votes.
        denoiser: anything ``--denoiser`` accepts, or ``none``.
        trust_code: run the program in a TorchScript file of the denoiser.

    Raises:
        UserError: a value out of range, or no such denoiser.
    """
    if isinstance(sigma, bool | str) or not 0 < sigma < float("inf"):
        raise UserError(f"defence denoised: sigma={sigma}; expected a number above 0, such as 0.25")
    check_positive_int("denoised", "n", n)
    if not isinstance(denoiser, str):
        raise UserError(f"defence denoised: denoiser={denoiser}; expected a name or a file")
    size = classifier.input.size
    module = None
    if denoiser != "none":
        identity = classifier.identity()
        module = load_denoiser(denoiser, sigma=sigma, image=size, classifier=identity, trust_code=trust_code)
    noisy = Noisy(module, sigma, classifier.probe_size)
    return Defence("denoised", [Member(noisy, classifier)], draws=n, about={"denoiser": denoiser})


def trained(purifier: str, image: tuple[int, int, int] | None, weights: str | None = None) -> Trained:
    """Load the weights of a purifier: a file, or the shipped ones for the nearest image size.

    Args:
        purifier: name of the defence, as on the card.
        image: (C, H, W) of the classifier's input; shipped weights must be for as many channels.
        weights: a file written by ``certify train``, or a shipped name.

    Raises:
        UserError: none fits, or the file holds other weights.
    """
    if weights is not None:
        if not isinstance(weights, str):
            raise UserError(f"defence {purifier}: weights={weights}; expected a file of `certify train`, or a name")
        denoiser = None if find_source(weights).kind == "torchscript" else find_denoiser(weights, image=image)
        if not isinstance(denoiser, Trained) or denoiser.card.purifier != purifier:
            raise UserError(f"{weights} holds no weights for {purifier}; expected a file of `certify train` for it")
        return denoiser
    cards = {n: c for n, c in shipped().items() if c.purifier == purifier and image and c.image[0] == image[0]}
    if not cards:
        size = "x".join(map(str, image or ()))
        raise UserError(
            f"defence {purifier}: no shipped weights for {size or 'these'} images; train some (`certify train`), and "
            f"write {purifier}:weights=FILE"
        )
    area = math.prod(image[1:]) if image else 1
    name = min(cards, key=lambda n: (abs(math.log(math.prod(cards[n].image[1:]) / area)), n))
    return read_denoiser(SHIPPED / f"{name}.safetensors", name)
