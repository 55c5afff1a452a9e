"""Denoisers and purifiers: images in, cleaner images out, behind one call ``forward(noisy, sigma)``.

Image i out depends on image i in only; the shape stays; values are those of the [0, 1] scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from certify.registry import Registry

if TYPE_CHECKING:
    from torch import nn

DENOISERS = Registry("denoiser", "certify.denoisers")
DENOISERS.add("gaussian", "denoisers.classical:GaussianBlur", "linear: convolution with a Gaussian kernel")
DENOISERS.add("median", "denoisers.classical:Median", "median of each channel's 3x3, or of size")
DENOISERS.add("gs", "denoisers.classical:GaussianSmoothing", "a small Gaussian window, several times; Cha et al. 2024")
DENOISERS.add("bits", "denoisers.classical:BitDepth", "values rounded to 2^bits levels; Xu et al. 2018")
DENOISERS.add("tv", "denoisers.classical:TotalVariation", "total variation; Rudin et al. 1992, Chambolle 2004")
DENOISERS.add("jpeg", "denoisers.jpeg:jpeg", "coded as JPEG and decoded: its rounding takes small perturbations away")

ARCHITECTURES = Registry("architecture", "certify.architectures")
ARCHITECTURES.add("dncnn", "denoisers.dncnn:DnCNN", "17 convolutions of 64 channels; Zhang et al. 2017")
ARCHITECTURES.add("dncnn-wide", "denoisers.dncnn:wide", "the same with 128 channels")
ARCHITECTURES.add("memnet", "denoisers.memnet:MemNet", "3 memory blocks of 6 residual blocks; Tai et al. 2017")
ARCHITECTURES.add("unet", "denoisers.unet:UNet", "told the noise level: one set of weights for all of them")
ARCHITECTURES.add("pooled-unet", "denoisers.pooled:PooledUNet", "the same on top of a good small classifier")
ARCHITECTURES.add("blind-spot", "denoisers.blind_spot:BlindSpot", "never sees the pixel it makes; for the defence ncis")
ARCHITECTURES.add("score", "denoisers.energy:ScoreNet", "the score of noisy images; for the defence ebm")
ARCHITECTURES.add("energy", "denoisers.energy:EnergyNet", "an energy whose gradient is the score; for the defence ebm")
ARCHITECTURES.add("masked-unet", "denoisers.masked:MaskedUNet", "completes masked images, for the defence atop")

DEFENCES = Registry("defence", "certify.defences")
DEFENCES.add("none", "denoisers.defences:undefended", "the classifier alone")
DEFENCES.add("denoised", "denoisers.defences:smoothed", "denoised smoothing's votes, used as a plain classifier")
DEFENCES.add("ncis", "denoisers.blind_spot:ncis", "a blind-spot network, several times; NCIS-style, Cha et al. 2024")
DEFENCES.add("ebm", "denoisers.purification:ebm", "noise, then score ascent, several draws; Yoon et al. 2021")
DEFENCES.add("atop", "denoisers.masked:atop", "completes what a random transform left; AToP-style, Lin et al. 2024")
DEFENCES.add(
    "jpeg-nn",
    "denoisers.jpeg_ensemble:frozen_codec",
    "JPEG with tables for networks; our design, after Zhang, Gao 2021",
)
DEFENCES.add("jpeg-ensemble", "denoisers.jpeg_ensemble:ensemble", "the same at several levels, and a vote; our design")

SHIPPED = Path(__file__).parent / "data"
"""Folder of the trained denoisers in this package."""


def load_denoiser(
    name: str,
    *,
    sigma: float | None = None,
    image: tuple[int, int, int] | None = None,
    classifier: str | None = None,
    trust_code: bool = False,
) -> nn.Module:
    """The denoiser that ``name`` means, frozen, in evaluation mode.

    Args:
        name: a registered or shipped denoiser, a file that ``certify train`` wrote, ``ARCHITECTURE=CHECKPOINT``, a
            TorchScript file, ``deepinv:NAME[=FILE]``, ``diffusers:FOLDER``, ``package.module:callable``, or ``auto``.
        sigma: noise level it is going to be used at; ``auto`` needs it, others warn when they were trained for another.
        image: (C, H, W) of the images, likewise; others take the channels from it (default: 3).
        classifier: ``Classifier.identity()`` of what is behind it: ``auto`` prefers weights trained for exactly that.
        trust_code: run the program in a TorchScript file; it can do anything that you can.

    Raises:
        UserError: no such denoiser; the nearest names are listed. Weights that cannot be told a noise level.
    """
    import warnings

    from denoisers.find import find_denoiser
    from denoisers.weights import Trained

    found = find_denoiser(name, sigma=sigma, image=image, classifier=classifier, trust_code=trust_code)
    if isinstance(found, Trained) and sigma is not None:
        found.check_use(sigma)
        if not found.card.covers(sigma):
            warnings.warn(found.card.mismatch(sigma), stacklevel=2)
    return found
