"""Random numbers for purifiers, from one generator for the batch or from one per image.

With one generator per image, an image's random numbers do not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the batch, one per image, or None where no random numbers are needed."""


def per_image(generator: Generators, batch: int) -> list[torch.Generator]:
    """Return a generator for each of ``batch`` images; the same one repeated if there is only one.

    Raises:
        ValueError: no generator, or not one per image.
    """
    if generator is None:
        raise ValueError("this purifier draws random numbers; expected generator=, one for all images or one per image")
    if isinstance(generator, torch.Generator):
        return [generator] * batch
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} images; expected one per image")
    return list(generator)


def normal(images: Tensor, generator: Generators) -> Tensor:
    """Draw standard normal numbers with the shape ``(B, ...)``, type and device of the images."""
    rows = [torch.randn(images.shape[1:], generator=g, device=g.device) for g in per_image(generator, len(images))]
    return torch.stack(rows).to(images)


def permutations(count: int, images: Tensor, generator: Generators) -> Tensor:
    """Draw a random permutation of ``range(count)`` for each image: ``(B, count)``, on the images' device."""
    rows = [torch.randperm(count, generator=g, device=g.device) for g in per_image(generator, len(images))]
    return torch.stack(rows).to(images.device)
