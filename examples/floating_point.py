"""A certificate invalidated by floating-point rounding, and exact noise, which prevents this.

    python examples/floating_point.py

The classifier below returns class 0 if a pixel close to 0 is not a multiple of 2^-29, else class 1.
Almost no real number is a multiple, so under real noise both images below are class 0. Under noise in float32:

- Around the black image a small pixel is a small float32, which has bits far below 2^-29: class 0.
- Around the image whose pixels are all 7/255, a pixel close to 0 is the sum of 7/255 and of noise near -7/255. Both lie
  between 2^-6 and 2^-5 in absolute value, so both are multiples of 2^-29, and so is their sum: class 1, always.

The two images are closer than either radius, so at least one of the two certificates is wrong. Voracek and Hein ("Sound
Randomized Smoothing in Floating-Point Arithmetics", ICLR 2023) built classifiers like this one. With exact noise the
classifier sees the same numbers j/255 around both images, so the last bits carry no information.
"""

from __future__ import annotations

from typing import Any

import torch

from certify import Certificate, SmoothedClassifier
from certify.smoothing.noise import make_noise

SIGMA = 0.5
SHAPE = (1, 32, 32)
IMAGES = {"black": torch.zeros(SHAPE), "7/255": torch.full(SHAPE, 7.0) / 255}
DISTANCE = float((IMAGES["7/255"] - IMAGES["black"]).norm())


class LastBits:
    """Class 0 if some pixel below 0.0115 in absolute value is not a multiple of 2^-29 (7/255 - 2^-6 is 0.0118)."""

    num_classes = 2

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return labels (B,) of images (B, C, H, W)."""
        steps = images * 2.0**29
        off_grid = (images.abs() < 0.0115) & (steps != steps.round())
        return (~off_grid.flatten(1).any(dim=1)).long()

    def describe(self) -> dict[str, Any]:
        """Return the name, for the run file."""
        return {"name": "last bits"}


def certificates(noise: str, n: int = 10_000) -> dict[str, Certificate]:
    """Certify each image under this noise."""
    smoothed = SmoothedClassifier(LastBits(), noise=make_noise(noise, SIGMA), precision="float32", compile="off")
    return {name: smoothed.certify(image, n=n, image_id=name) for name, image in IMAGES.items()}


def contradict(pair: dict[str, Certificate]) -> bool:
    """Return True if each image lies in the other's ball and the classes differ: then a certificate is wrong."""
    first, second = pair.values()
    return first.prediction != second.prediction and min(first.radius, second.radius) > DISTANCE


def main() -> None:
    """Certify both images under both kinds of noise and print the results."""
    print(f"sigma = {SIGMA}, l2 distance of the two images {DISTANCE:.3f}\n")
    print(f"{'noise':<10}{'image':<8}{'class':>5}{'radius':>9}")
    verdicts = []
    for noise in ("gaussian", "exact"):
        pair = certificates(noise)
        for name, certificate in pair.items():
            print(f"{noise:<10}{name:<8}{certificate.prediction:>5}{certificate.radius:>9.3f}")
        wrong = "each image lies in the other's ball, which has another class: at least one certificate is wrong"
        verdicts.append(f"{noise}: {wrong if contradict(pair) else 'the two certificates agree'}.")
    print("", *verdicts, sep="\n")


if __name__ == "__main__":
    main()
