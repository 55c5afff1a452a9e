"""Training images: kept in memory as bytes if they fit, split for validation, augmented, with noise levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from certify.errors import ImageError, UserError
from certify.images.dataset import ImageConsumer, ImageSet, InputOnly, load_images
from certify.images.in_memory import Collection
from certify.images.sources import DATASETS, open_source
from certify.models.classifier import InputSpec, square_input
from certify.models.labels import UnclearLabels

SPLIT_SEED = 0
"""Seed of the split into training and held-out images."""

IN_MEMORY = 8 * 2**30
"""Maximum size in bytes of images kept in memory; larger data is decoded for every batch."""


@dataclass(frozen=True)
class TrainingData:
    """Training images, and held-out images for selecting weights.

    Attributes:
        take: maps indices ``(B,)`` to images ``(B, C, H, W)``, uint8.
        labels: class indices ``(N,)``, or None.
        image: (C, H, W).
        train: indices of training images.
        held_out: indices of held-out images, in random order. They are the same in every training on the same data,
            whatever its seed, so that fine-tuning never validates on images that its initial weights were trained on.
        about: name, sizes and hash, for the card.
        omissions: ignored parts of the data, see :attr:`certify.images.dataset.ImageSet.omissions`.
    """

    take: Callable[[Tensor], Tensor]
    labels: Tensor | None
    image: tuple[int, int, int]
    train: Tensor
    held_out: Tensor
    about: dict[str, Any]
    omissions: str = ""


def load_training_data(
    data: str | Collection,
    viewer: ImageConsumer | None = None,
    *,
    size: tuple[int, int, int] | None = None,
    labelled: bool = False,
    held_out: int | None = None,
    max_images: int | None = None,
    root: str | None = None,
    download: bool = False,
) -> TrainingData:
    """Load training images, in the format that a classifier takes.

    Args:
        data: a dataset's name or a path, as for certifying, or images as Python objects.
        viewer: a classifier, which defines size, transform and classes; None: those of the data.
        size: (C, H, W), if there is no viewer and the images differ in size.
        labelled: True if labels are required; otherwise class folders need not match the viewer's classes.
        held_out: number of held-out images; None: a tenth, at most 1,000.
        max_images: use at most this many, spread over the data.
        root: folder of torchvision's datasets.
        download: download a missing dataset.

    Raises:
        UserError: no such data, images of different sizes, too few images.
    """
    view = viewer or _own_view(data, size, root, download)
    images = _open(data, view, root, download, labelled=labelled)
    if max_images is not None and max_images < len(images):
        spread = [i * len(images) // max_images for i in range(max_images)]  # the first of class folders are one class
        chosen = data.choose(spread) if isinstance(data, Collection) else data
        ids = None if isinstance(data, Collection) else [images.items[i].id for i in spread]
        images = _open(chosen, view, root, download, labelled=labelled, ids=ids)
    image = tuple(_load(images, 0).shape)
    assert len(image) == 3
    n = len(images)
    if n < 2:
        raise UserError(f"{images.name} holds {n} image; expected at least 2, one of them held out")
    keep = min(1000, max(1, n // 10)) if held_out is None else held_out
    if not 1 <= keep < n:
        raise UserError(f"--held-out {keep} of {n} images; expected at least 1, and fewer than there are")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))
    take = _reader(images, image)
    labels = torch.tensor([int(v) for v in images.labels if v is not None]) if images.labelled else None
    about = {"name": images.name, "images": n, "held_out": keep, "sha256": images.digest()}
    return TrainingData(take, labels, image, order[keep:], order[:keep], about, images.omissions)


def _open(
    data: str | Collection,
    view: ImageConsumer,
    root: str | None,
    download: bool,
    *,
    labelled: bool,
    ids: Sequence[str] | None = None,
) -> ImageSet:
    """Open the images, with labels if they are required or available."""
    if isinstance(data, Collection):
        return data.image_set(view.input, view.num_classes)
    if data in DATASETS and (f"{data}-train" in DATASETS or data == "imagenet"):
        other = f"--data {data}-train" if f"{data}-train" in DATASETS else "the folder of the training images"
        raise UserError(f"--data {data} are the images for certification, not for training; expected {other}")
    try:
        return load_images(data, view, ids=ids, root=root, download=download)
    except UnclearLabels as error:
        if labelled:
            expected = "only class folders, named like the classifier's classes or 0 to K - 1"
            raise UserError(f"{error.cause}; expected {expected}") from None
        return load_images(data, view, ids=ids, root=root, download=download, labels="none")


def count_classes(data: str | Collection, root: str | None = None, download: bool = False) -> int:
    """Count the classes that the images' folders or labels name; 0 without labels.

    Raises:
        UserError: no such data, or images beside the class folders.
    """
    if isinstance(data, Collection):
        return 1 + max((label for label in data.labels if label is not None), default=-1)
    source = open_source(data, root=root, download=download)
    if source.strays:
        raise UserError(f"{source.strays}; take them out")
    return len(source.names or ())


def _own_view(data: str | Collection, size: tuple[int, int, int] | None, root: str | None, download: bool) -> InputOnly:
    """Take the classes from the data, and the size from the first image unless it is given."""
    if size is not None:
        spec = square_input(size, resize=size[1])
    elif isinstance(data, Collection):
        spec = InputSpec(data.first_shape())
    if isinstance(data, Collection):
        return InputOnly(spec, count_classes(data))
    source = open_source(data, root=root, download=download)
    if size is None:
        shape = tuple(_load(ImageSet(source.name, source.items[:1], [None], 1, "", {}, InputSpec(None)), 0).shape)
        spec = InputSpec((shape[0], shape[1], shape[2]))
    return InputOnly(spec, len(source.names or ()))


def _load(images: ImageSet, index: int) -> Tensor:
    try:
        return images.load(index)
    except ImageError as error:
        raise UserError(f"image {images.items[index].id} {error}; mend it or take it out") from None


def _reader(images: ImageSet, image: tuple[int, int, int]) -> Callable[[Tensor], Tensor]:
    """Return a function that looks images up in memory, or decodes them if they do not fit."""

    def read(index: int) -> Tensor:
        loaded = _load(images, index)
        if tuple(loaded.shape) != image:
            raise UserError(
                f"{images.items[index].id} is {_size(loaded.shape)} and the first image {_size(image)}; "
                "expected one size: --input-size CxHxW"
            )
        return (loaded * 255).round().to(torch.uint8)

    channels, height, width = image
    if len(images) * channels * height * width <= IN_MEMORY:
        stack = torch.empty((len(images), *image), dtype=torch.uint8)
        for i in range(len(images)):
            stack[i] = read(i)
        return lambda indices: stack[indices]
    pool = ThreadPoolExecutor()
    return lambda indices: torch.stack(list(pool.map(read, indices.tolist())))


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its size (edges reflected), and mirror it with probability 1/2.

    This is the usual 4 pixels for CIFAR's 32. Images of one channel, such as digits, are not mirrored.

    Args:
        images: ``(B, C, H, W)``.
        generator: on the CPU.
    """
    batch, channels, height, width = images.shape
    by_y, by_x = height // 8, width // 8
    padded = pad(images.float(), (by_x, by_x, by_y, by_y), mode="reflect")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    dy = torch.randint(2 * by_y + 1, (batch,), generator=generator).to(images.device)
    dx = torch.randint(2 * by_x + 1, (batch,), generator=generator).to(images.device)
    moved = windows[torch.arange(batch, device=images.device), :, dy, dx]
    if channels == 1:
        return moved
    mirrored = (torch.rand(batch, generator=generator) < 0.5).to(images.device)
    return torch.where(mirrored[:, None, None, None], moved.flip(3), moved)


@dataclass(frozen=True)
class Levels:
    """Distribution of the noise level per image: uniform over a list, or log-uniform over a range."""

    sigmas: tuple[float, ...]
    continuous: bool = False

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` levels."""
        if not self.sigmas:
            return torch.zeros(count)
        values = torch.tensor(self.sigmas)
        if self.continuous:
            low, high = values.min().log(), values.max().log()
            return (low + (high - low) * torch.rand(count, generator=generator)).exp()
        return values[torch.randint(len(values), (count,), generator=generator)]

    def checked(self) -> tuple[float, ...]:
        """Return the levels of the validation: all listed ones, or the usual ones within the range."""
        if not self.continuous:
            return tuple(sorted(set(self.sigmas)))
        low, high = min(self.sigmas), max(self.sigmas)
        return tuple(s for s in (0.12, 0.25, 0.5, 1.0) if low <= s <= high) or (low, high)
