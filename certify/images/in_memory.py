"""Images passed as Python objects: tensors, arrays, PIL images, datasets and data loaders."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from certify.errors import ImageError, UserError, first_line
from certify.images.dataset import ImageSet, check_selection
from certify.images.decode import to_array
from certify.images.items import Item
from certify.images.preprocess import preprocess
from certify.models.classifier import InputSpec

EXPECTED = (
    "a tensor or array of images (N, C, H, W), one image (C, H, W), a PIL image, a list of images, a Dataset, a "
    "DataLoader, an ImageSet, or the name or path of data"
)


@dataclass(frozen=True)
class Collection:
    """Images of a Python object.

    Attributes:
        items: images, read on access.
        labels: class index of each, or None.
        name: the object's type, for the run file.
    """

    items: Sequence[Item]
    labels: Sequence[int | None]
    name: str

    def without_labels(self) -> Collection:
        """Return the same images without labels."""
        return Collection(self.items, [None] * len(self.items), self.name)

    def choose(self, places: Sequence[int]) -> Collection:
        """Return the images at these places."""
        return Collection([self.items[i] for i in places], [self.labels[i] for i in places], self.name)

    def first_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of the first usable image.

        Raises:
            UserError: there is none.
        """
        reason = ""
        for item in self.items:
            try:
                channels, height, width = preprocess(item.read(), InputSpec(None)).shape
                return channels, height, width
            except ImageError as error:
                reason = reason or f"the first, {item.id}: {error}"
        raise UserError(f"none of the {len(self.items)} images can be used; {reason}")

    def image_set(
        self, spec: InputSpec, num_classes: int, *, skip: int = 1, start: int = 0, max_images: int | None = None
    ) -> ImageSet:
        """Return an image set at the input ``spec``: every ``skip``-th image from ``start``, at most ``max_images``.

        Raises:
            UserError: a label outside 0 to ``num_classes`` - 1, or an empty selection.
        """
        check_selection(skip, start, max_images, None)
        chosen = range(len(self.items))[start::skip][:max_images]
        if not chosen:
            raise UserError(f"start = {start}, skip = {skip}: selects none of the {len(self.items)} images")
        for i in chosen:
            label = self.labels[i]
            if label is not None and not 0 <= label < num_classes:
                at = f"label {label} of image {self.items[i].id}"
                raise UserError(f"{at}: expected 0 to {num_classes - 1}, or None for an image without a label")
        labels = [self.labels[i] for i in chosen]
        rule = "none" if all(label is None for label in labels) else "as given"
        selection = {"skip": skip, "max": max_images, "ids": None} | ({"start": start} if start else {})
        return ImageSet(self.name, [self.items[i] for i in chosen], labels, len(self.items), rule, selection, spec)


def collect(images: Any, labels: Any = None, ids: Sequence[str] | None = None) -> Collection:
    """Collect the images of a Python object; except for a ``DataLoader``, images are read on access.

    Args:
        images: a tensor or array ``(N, C, H, W)`` or ``(N, H, W, C)``, or of a single image; a PIL image; a list of
            images; a ``Dataset`` of images or of (image, label), which must return the same image at each read; a
            ``DataLoader``, whose batches are read once, in order; or the result of :func:`certify.load_images`.
        labels: N class indices that replace the dataset's own; None for an image without a label. Not allowed with a
            ``DataLoader`` that shuffles.
        ids: N unique ids, by default the positions. An image's id and the seed determine its noise.

    Raises:
        UserError: an unsupported object, no images, or labels or ids of another number or type.
    """
    check_selection(1, 0, None, ids)
    if isinstance(images, ImageSet):
        if labels is None and ids is None:
            return Collection(images.items, images.labels, images.name)
        reads: Reads = [item.read for item in images.items]
        own: list[int | None] | None = list(images.labels)
    elif isinstance(images, DataLoader):
        if (labels is not None or ids is not None) and not _in_order(images):
            raise UserError(
                f"{'ids' if labels is None else 'labels'} with a DataLoader that does not keep the order of its images "
                f"({type(images.sampler).__name__}); expected shuffle=False, or batches of (images, labels)"
            )
        reads, own = _batches(images)
    elif isinstance(images, Image):
        reads, own = [functools.partial(_same, images)], None
    elif isinstance(images, Tensor | np.ndarray):
        if images.ndim not in (3, 4):
            raise UserError(f"images of shape {tuple(images.shape)}; expected {EXPECTED}")
        several = images if images.ndim == 4 else images[None]
        reads, own = [functools.partial(several.__getitem__, i) for i in range(len(several))], None
    elif hasattr(images, "__getitem__") and hasattr(images, "__len__") and not isinstance(images, bytes | dict):
        reads, own = _elements(images)
    else:
        raise UserError(f"images of type {type(images).__name__}; expected {EXPECTED}")
    if not reads:
        raise UserError(f"no images in this {type(images).__name__}; expected at least one")
    classes = (own or [None] * len(reads)) if labels is None else _as_labels(labels, len(reads))
    names = [str(i) for i in range(len(reads))] if ids is None else [str(i) for i in ids]
    if len(names) != len(reads) or len(set(names)) != len(names):
        raise UserError(f"{len(names)} ids for {len(reads)} images; expected one for each image, no two equal")
    items = [Item(name, functools.partial(_read, read)) for name, read in zip(names, reads, strict=True)]
    return Collection(items, classes, type(images).__name__)


Reads = list[Callable[[], Any]]


def _in_order(loader: DataLoader[Any]) -> bool:
    """True if batches come in the order of the dataset."""
    if isinstance(loader.dataset, IterableDataset):
        return True
    batches = loader.batch_sampler
    if batches is None:
        return isinstance(loader.sampler, SequentialSampler)
    return type(batches) is BatchSampler and isinstance(batches.sampler, SequentialSampler)


def _batches(loader: DataLoader[Any]) -> tuple[Reads, list[int | None] | None]:
    """Return the images and labels of all batches; a batch is images or (images, labels)."""
    images: list[Any] = []
    labels: list[Any] = []
    for batch in loader:
        several, classes = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, None)
        if not isinstance(several, Tensor | np.ndarray) or several.ndim != 4:
            raise UserError(
                "a batch of the DataLoader is not supported; expected images (N, C, H, W), or (images, labels)"
            )
        images.extend(several)
        labels.extend([None] * len(several) if classes is None else _as_labels(classes, len(several)))
    own = labels if any(label is not None for label in labels) else None
    return [functools.partial(_same, image) for image in images], own


def _elements(images: Any) -> tuple[Reads, list[int | None] | None]:
    """Return the elements of a sequence or map-style dataset; labels are read now, images on access."""
    count = len(images)
    if not count:
        return [], None
    if not _is_pair(images[0]):
        return [_Element(images, i) for i in range(count)], None
    targets = getattr(images, "targets", None)
    if targets is None or len(targets) != count or getattr(images, "target_transform", None) is not None:
        targets = [images[i][1] for i in range(count)]
    labels = _as_labels(targets, count)
    return [_Element(images, i, label=label, pair=True) for i, label in enumerate(labels)], labels


@dataclass
class _Element:
    """One element of a dataset; verifies that image and label are the same at each read."""

    images: Any
    index: int
    label: int | None = None
    pair: bool = False
    digest: bytes = b""

    def __call__(self) -> Any:
        element = self.images[self.index]
        image = element[0] if self.pair else element
        if self.pair and _as_labels([element[1]], 1) != [self.label]:
            raise UserError(
                f"image {self.index}: the {type(self.images).__name__} returns label {element[1]} but its targets say "
                f"{self.label}; pass the correct ones as labels="
            )
        array = np.ascontiguousarray(image.detach().cpu() if isinstance(image, Tensor) else image)
        digest = hashlib.sha256(array.tobytes()).digest()
        if self.digest and digest != self.digest:
            raise UserError(
                f"image {self.index} of the {type(self.images).__name__} differs between two reads (random "
                "augmentation?); expected a dataset that returns the same image each time"
            )
        self.digest = digest
        return image


def _is_pair(element: Any) -> bool:
    return isinstance(element, tuple | list) and len(element) == 2 and np.ndim(element[1]) == 0


def _same(image: Any) -> Any:
    return image


def _as_labels(labels: Any, count: int) -> list[int | None]:
    """Return class indices as Python integers; None where there is no label."""
    given: Iterable[Any] = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else labels
    try:
        indices = [None if label is None else operator.index(label) for label in given]
    except TypeError:
        raise UserError("labels are not whole numbers; expected one class index per image") from None
    if len(indices) != count:
        raise UserError(f"{len(indices)} labels for {count} images; expected one class index per image")
    return indices


def _read(read: Callable[[], Any]) -> np.ndarray:
    """Return one element as an array.

    Raises:
        ImageError: the dataset fails to read it.
        UserError: it differs from an earlier read.
    """
    try:
        image = read()
        return image.detach().cpu().numpy() if isinstance(image, Tensor) else to_array(image)
    except (UserError, ImageError):
        raise
    except Exception as error:  # the user's own dataset
        raise ImageError(f"cannot be read: {type(error).__name__}: {first_line(error)}") from error
