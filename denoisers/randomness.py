"""Random numbers for purifiers that draw them: from one generator, or from one generator an image.

With one generator an image, what an image gets does not depend on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the whole batch, one for each of its B images, or None where nothing may be drawn."""


def each(generator: Generators, batch: int) -> list[torch.Generator]:
    """One generator for each of ``batch`` images; the same object B times where there is only one.

    Raises:
        ValueError: none was given, or another number of them than there are images.
    """
    if generator is None:
        raise ValueError("this purifier draws random numbers; expected generator=, one for all images or one for each")
    if isinstance(generator, torch.Generator):
        return [generator] * batch
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} images; expected one for each")
    return list(generator)


def normal(images: Tensor, generator: Generators) -> Tensor:
    """Standard normal numbers of the images' shape ``(B, ...)``, type and device."""
    rows = [torch.randn(images.shape[1:], generator=g, device=g.device) for g in each(generator, len(images))]
    return torch.stack(rows).to(images)


def permutations(count: int, images: Tensor, generator: Generators) -> Tensor:
    """A random order of ``range(count)`` for each image, ``(B, count)``, on the images' device."""
    rows = [torch.randperm(count, generator=g, device=g.device) for g in each(generator, len(images))]
    return torch.stack(rows).to(images.device)
