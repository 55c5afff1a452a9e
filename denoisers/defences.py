"""From a name such as ``gs:std=1:iterations=4`` to a defence around a frozen classifier."""

from __future__ import annotations

from torch import Tensor, nn

from certify.classifiers import Classifier
from certify.defence import Defence, Member
from certify.errors import UserError
from denoisers import DEFENCES, DENOISERS, SHIPPED
from denoisers.find import find_denoiser, shipped
from denoisers.names import build_with, parse_options
from denoisers.randomness import Generators, normal
from denoisers.weights import Trained, read_denoiser


def build_defence(text: str, classifier: Classifier) -> Defence:
    """The defence that ``text`` means: a name of ``DEFENCES`` or ``DENOISERS`` with options, or any denoiser.

    Args:
        text: ``NAME:KEY=VALUE:...``, or whatever ``--denoiser`` takes.
        classifier: the frozen classifier behind it.

    Raises:
        UserError: no such defence, options it does not have, weights for other images.
    """
    head = text.partition(":")[0]
    if head in DEFENCES:
        name, options = parse_options(text)
        built: Defence = build_with("defence", text, DEFENCES.get(name), classifier, options=options)
        return built
    if head.isidentifier() and head not in DENOISERS and ":" in text and "=" in text.partition(":")[2]:
        DEFENCES.get(head)  # says what there is
    return Defence(text, [Member(find_denoiser(text, image=classifier.input.size), classifier)])


def undefended(classifier: Classifier) -> Defence:
    """The classifier alone."""
    return Defence("none", [Member(None, classifier)])


class Noisy(nn.Module):
    """Gaussian noise and then a denoiser: one of the draws that denoised smoothing votes over."""

    random = True

    def __init__(self, denoiser: nn.Module | None, sigma: float) -> None:
        super().__init__()
        self.denoiser, self.sigma = denoiser, sigma

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Generators = None) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        noisy = images + self.sigma * normal(images, generator)
        found: Tensor = noisy if self.denoiser is None else self.denoiser(noisy, self.sigma)
        return found

    def describe(self) -> dict[str, object]:
        """Noise level and denoiser, for the record."""
        own = getattr(self.denoiser, "describe", None)
        return {"name": "noise, then denoiser", "noise": self.sigma, "denoiser": own() if callable(own) else None}


def smoothed(classifier: Classifier, sigma: float = 0.25, n: int = 100, denoiser: str = "auto") -> Defence:
    """Denoised smoothing as a plain classifier: the class most of ``n`` noisy, denoised copies get (no certificate).

    Args:
        classifier: frozen.
        sigma: of the noise, in [0, 1] pixels.
        n: votes.
        denoiser: any of ``--denoiser``, or ``none``.
    """
    if not 0 < sigma < float("inf"):
        raise UserError(f"defence denoised: sigma={sigma}; expected a number above 0, such as 0.25")
    size = classifier.input.size
    found = (
        None
        if denoiser == "none"
        else find_denoiser(denoiser, sigma=sigma, image=size, classifier=classifier.identity())
    )
    return Defence("denoised", [Member(Noisy(found, sigma), classifier)], draws=n, about={"denoiser": denoiser})


def trained(purifier: str, image: tuple[int, int, int] | None, weights: str | None = None) -> Trained:
    """A purifier's weights: the file that is named, or the shipped ones for images of this size.

    Args:
        purifier: name of the defence, as on the card.
        image: (C, H, W) of what the classifier takes; weights for the same channels and size come first, then those
            for the same channels.
        weights: a file of ``certify train``, or a shipped name.

    Raises:
        UserError: none fits, or the file holds weights of something else.
    """
    if weights is not None:
        found = find_denoiser(weights, image=image)
        if not isinstance(found, Trained) or found.card.purifier != purifier:
            raise UserError(f"{weights} holds no weights for {purifier}; expected a file of `certify train` for it")
        return found
    cards = {n: c for n, c in shipped().items() if c.purifier == purifier and image and c.image[0] == image[0]}
    if not cards:
        size = "x".join(map(str, image or ()))
        raise UserError(
            f"defence {purifier}: no shipped weights for {size or 'these'} images; train some (`certify train`), and "
            f"write {purifier}:weights=FILE"
        )
    name = min(cards, key=lambda n: (tuple(cards[n].image) != image, n))
    return read_denoiser(SHIPPED / f"{name}.safetensors", name)
