"""Denoisers: noisy images in, images out, behind one call ``forward(noisy, sigma)``.

Image i out depends on image i in only; the shape stays; values are those of the [0, 1] scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from certify.registry import Registry

if TYPE_CHECKING:
    from torch import nn

DENOISERS = Registry("denoiser")
DENOISERS.add("gaussian", "denoisers.classical:GaussianBlur", "linear: convolution with a Gaussian kernel")
DENOISERS.add("median", "denoisers.classical:Median", "3x3 median of each channel")


def load_denoiser(name: str) -> nn.Module:
    """The denoiser registered under ``name``.

    Raises:
        UserError: no such denoiser; the nearest names are listed.
    """
    module: nn.Module = DENOISERS.get(name)()
    return module
