"""Denoisers and purifiers with one interface, ``forward(noisy, sigma)``.

Output i depends on input i only and has the same shape, on the [0, 1] scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from certify.errors import warn
from certify.registry import Registry

if TYPE_CHECKING:
    from torch import nn

DENOISERS = Registry("denoiser", "certify.denoisers")
DENOISERS.add("gaussian", "denoisers.classical:GaussianBlur", "linear: convolution with a Gaussian kernel")
DENOISERS.add("median", "denoisers.classical:Median", "median filter per channel, 3x3 or of another size")
DENOISERS.add("gs", "denoisers.classical:GaussianSmoothing", "repeated smoothing with a small window; Cha et al. 2024")
DENOISERS.add("bits", "denoisers.classical:BitDepth", "round values to 2^bits levels; Xu et al. 2018")
DENOISERS.add("tv", "denoisers.classical:TotalVariation", "total variation; Rudin et al. 1992, Chambolle 2004")
DENOISERS.add("jpeg", "denoisers.jpeg:jpeg", "encode as JPEG and decode: rounding removes small perturbations")

ARCHITECTURES = Registry("architecture", "certify.architectures")
ARCHITECTURES.add("dncnn", "denoisers.dncnn:DnCNN", "17 convolutions of 64 channels; Zhang et al. 2017")
ARCHITECTURES.add("dncnn-wide", "denoisers.dncnn:wide", "the same with 128 channels")
ARCHITECTURES.add("memnet", "denoisers.memnet:MemNet", "3 memory blocks of 6 residual blocks; Tai et al. 2017")
ARCHITECTURES.add("unet", "denoisers.unet:UNet", "conditioned on the noise level: one set of weights for all levels")
ARCHITECTURES.add("pooled-unet", "denoisers.unet:PooledUNet", "the same with a small classifier as its encoder")
ARCHITECTURES.add("blind-spot", "denoisers.blind_spot:BlindSpot", "blind to the pixel it estimates; for defence ncis")
ARCHITECTURES.add("score", "denoisers.energy:ScoreNet", "the score of noisy images; for the defence ebm")
ARCHITECTURES.add("energy", "denoisers.energy:EnergyNet", "an energy whose gradient is the score; for the defence ebm")
ARCHITECTURES.add("masked-unet", "denoisers.masked:MaskedUNet", "completes masked images, for the defence atop")

DEFENCES = Registry("defence", "certify.defences")
DEFENCES.add("none", "denoisers.defences:undefended", "the classifier alone")
DEFENCES.add("denoised", "denoisers.defences:smoothed", "majority of denoised smoothing, as a plain classifier")
DEFENCES.add("ncis", "denoisers.blind_spot:ncis", "a blind-spot network, iterated; NCIS-style, Cha et al. 2024")
DEFENCES.add("ebm", "denoisers.purification:ebm", "noise, then score ascent, over several draws; Yoon et al. 2021")
DEFENCES.add("atop", "denoisers.masked:atop", "completes randomly masked images; AToP-style, Lin et al. 2024")
DEFENCES.add("jpeg-nn", "denoisers.jpeg_ensemble:frozen_codec", "JPEG with tables for networks; after Zhang, Gao 2021")
DEFENCES.add("jpeg-ensemble", "denoisers.jpeg_ensemble:ensemble", "the same at several qualities, with a vote")

SHIPPED = Path(__file__).parent / "data"
"""Folder of the trained denoisers of this package."""


def load_denoiser(
    name: str,
    *,
    sigma: float | None = None,
    image: tuple[int, int, int] | None = None,
    classifier: str | None = None,
    trust_code: bool = False,
) -> nn.Module:
    """Load a denoiser, frozen and in evaluation mode.

    Args:
        name: a registered or shipped denoiser, a file written by ``certify train``, ``ARCHITECTURE=CHECKPOINT``, a
            TorchScript file, ``deepinv:NAME[=FILE]``, ``diffusers:FOLDER``, ``package.module:callable``, or ``auto``.
        sigma: noise level of its use in [0, 1] pixels. ``auto`` needs it; for others a mismatch with their training is
            a warning.
        image: (C, H, W) of the images. ``auto`` needs it; others take the number of channels from it (default: 3).
        classifier: ``Classifier.identity()`` of the classifier behind it; ``auto`` prefers weights trained for it.
        trust_code: run the program in a TorchScript file, which can do anything that you can.

    Raises:
        UserError: no such denoiser (the nearest names are listed), or weights that take no noise level.
    """
    from denoisers.find import find_denoiser
    from denoisers.weights import Trained

    denoiser = find_denoiser(name, sigma=sigma, image=image, classifier=classifier, trust_code=trust_code)
    if isinstance(denoiser, Trained) and sigma is not None:
        denoiser.check_use(sigma)
        if not denoiser.card.covers(sigma):
            warn(denoiser.card.mismatch(sigma))
    return denoiser
