"""Images to certify: [0, 1] tensors at the classifier's input size, with stable ids and the classifier's labels."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from certify.errors import CertifyError, UserError
from certify.images.items import Item, Source, Unread
from certify.images.preprocess import channels_of, preprocess
from certify.images.sources import open_source
from certify.models.labels import OR_NONE, ClassNames, UnclearLabels, class_index, map_names, match_labels, name_index
from certify.smoothing.numeric import as_int

if TYPE_CHECKING:
    from certify.models.classifier import InputSpec


class ImageConsumer(Protocol):
    """What loading images needs of a classifier: its class names and its input specification."""

    @property
    def class_names(self) -> ClassNames | None:
        """All names of each class, by class index, or None."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        ...

    @property
    def input(self) -> InputSpec:
        """Input size and transform."""
        ...


@dataclass(frozen=True)
class InputOnly:
    """Stand-in for a classifier: supplies the input size, and optionally classes."""

    input: InputSpec
    num_classes: int = 0
    class_names: ClassNames | None = None

    @classmethod
    def at(cls, size: tuple[int, int, int] | None) -> InputOnly:
        """Return a stand-in without classes; images are resized to ``size``, or kept as they are if it is None."""
        from certify.models.classifier import InputSpec, square_input

        return cls(InputSpec(None) if size is None else square_input(size))


@dataclass(frozen=True)
class ImageSet:
    """The selected images of a source, in the order in which they are certified.

    Attributes:
        name: source name, as written to the run file.
        items: the selected images.
        labels: class index of each item, or None.
        available: number of images in the source.
        rule: how labels were obtained, as written to the run file.
        selection: the options that selected the items.
        input: the classifier's input specification, with the transform from items to images.
        unread: content that was not read, such as ``"3 .heic files (a.heic, ...)"`` or label rows without an image.
    """

    name: str
    items: Sequence[Item]
    labels: Sequence[int | None]
    available: int
    rule: str
    selection: dict[str, Any]
    input: InputSpec
    unread: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    @property
    def omissions(self) -> str:
        """Suffix for a message about the data that lists content not read; empty if all was read."""
        return f"; not read: {', '.join(self.unread)}" if self.unread else ""

    @property
    def labelled(self) -> bool:
        """True if every image has a label."""
        return all(label is not None for label in self.labels)

    def load(self, index: int) -> Tensor:
        """Return the image ``(C, H, W)``, float32 in [0, 1], to which noise is added.

        Raises:
            ImageError: the image is unreadable or unsuitable.
        """
        return preprocess(self.items[index].read(), self.input)

    def first_usable(self) -> Tensor | None:
        """Return the first image that can be read; None if there is none."""
        for index in range(len(self)):
            with contextlib.suppress(CertifyError):
                return self.load(index)
        return None

    def first_shape(self) -> tuple[int, int, int] | None:
        """Return (C, H, W) of the first image that can be read; None if there is none."""
        first = self.first_usable()
        if first is None:
            return None
        channels, height, width = first.shape
        return channels, height, width

    def digest(self) -> str:
        """Return a hash of all ids, labels and contents; a resumed run must have the same."""
        total = hashlib.sha256()
        for item, label in zip(self.items, self.labels, strict=True):
            total.update(f"{item.id}\0{label}\0{item.stamp()}\n".encode("utf-8", "surrogatepass"))
        return total.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return the selection and the source of the labels, for the run file."""
        return {
            "source": self.name,
            "available": self.available,
            "selection": self.selection,
            "labels": self.rule,
            "sha256": self.digest(),
        }


def load_images(
    data: str,
    classifier: ImageConsumer,
    *,
    skip: int = 1,
    start: int = 0,
    max_images: int | None = None,
    ids: Sequence[str] | None = None,
    labels: str | Path | None = None,
    class_map: str | Path | None = None,
    root: str | Path | None = None,
    download: bool = False,
) -> ImageSet:
    """Open a dataset, folder or file of images at the input size of a classifier; no image is decoded yet.

    Args:
        data: a dataset's name (``certify list datasets``) or a path: an image, a folder, a zip, or an ``.npz`` with
            ``x`` and ``y``.
        classifier: as of :func:`load_classifier`; gives the transform and the classes of the labels.
        skip: take every K-th image, K from 1.
        start: index of the first image, from 0; different starts below ``skip`` give disjoint selections.
        max_images: maximum number of images, from 1; None takes all.
        ids: take only the images with these ids.
        labels: CSV of file and label for images without class folders, or ``"none"`` to ignore labels.
        class_map: CSV or JSON from the data's class names to the classifier's classes.
        root: folder of torchvision's datasets.
        download: True to download a missing dataset.

    Returns:
        The images: ``len(images)``, ``images.labels`` (class indices, or None), and ``images.load(i)``, a float32
        tensor ``(C, H, W)`` in [0, 1].

    Raises:
        UserError: no such data, labels that cannot be mapped, or an empty selection.
    """
    source = open_source(data, root=root, download=download)
    chosen = _select(source, skip, start, max_images, ids)
    _check_channels(source, classifier.input, data)
    names, number, unread = classifier.class_names, classifier.num_classes, source.unread
    if labels is None or str(labels) == "none":
        indices, rule = _labels(source, chosen, names, number, class_map, ignored=labels is not None)
    else:
        indices, rule, rows = _labels_from_file(source, chosen, names, number, Path(labels))
        unread += rows
    selection = {"skip": skip, "max": max_images, "ids": list(ids) if ids else None}
    selection |= {"start": start} if start else {}  # so that older run files can be resumed
    return ImageSet(source.name, chosen, indices, len(source.items), rule, selection, classifier.input, unread)


def _check_channels(source: Source, spec: InputSpec, data: str) -> None:
    """Check, before any image is read, that images can be converted to the classifier's number of channels."""
    if spec.size is None:
        return
    channels, height, width = spec.size
    if source.image_shape is None:
        fits, what = channels in (1, 3), "pictures in grey or colour"
    else:
        own, _ = channels_of(source.image_shape, channels)
        fits, what = own == channels or {own, channels} == {1, 3}, f"arrays of {own} channels"
    if not fits:
        raise UserError(
            f"the classifier takes {channels} channel{'s' * (channels > 1)} and {data} holds {what}; "
            f"pass arrays: --data FILE.npz, with x of shape (N, {channels}, {height}, {width})"
        )


def check_selection(skip: int, start: int, max_images: int | None, ids: Sequence[str] | None) -> None:
    """Validate the options that select images.

    Raises:
        UserError: a number out of range, or ids that are not a list.
    """
    for name, number, least in (("skip", skip, 1), ("start", start, 0), ("max_images", max_images, 1)):
        expected = f"a whole number from {least}"
        if number is not None and as_int(number, name, expected) < least:
            raise UserError(f"{name} = {number}: expected {expected}")
    if ids is not None and (isinstance(ids, str) or not isinstance(ids, Iterable)):
        raise UserError(f"ids = {ids!r}: expected a list of ids, such as ['{ids}']")


def _select(source: Source, skip: int, start: int, max_images: int | None, ids: Sequence[str] | None) -> Sequence[Item]:
    check_selection(skip, start, max_images, ids)
    items: Sequence[Item] = source.items
    if ids:
        by_id = source.by_id(ids)
        absent = [i for i in ids if i not in by_id]
        if absent:
            alike = ", ".join(item.id for item in items[:3])
            raise UserError(f"no image {absent[0]!r} in {source.name}; ids look like {alike}{_quoted(source, absent)}")
        items = [by_id[i] for i in dict.fromkeys(ids)]
    if not 0 <= start < max(1, len(items)):
        raise UserError(
            f"--start {start}: expected a whole number from 0 to {len(items) - 1}, the last of these images"
        )
    return items[start::skip][:max_images]


def _quoted(source: Source, absent: Sequence[str]) -> str:
    """Return advice on quoting an id with a comma, if one was split."""
    whole = next((i for i in source.ids_with_comma() if absent[0] in i.split(",")), None)
    if whole is None:
        return ""
    quoted = '"' + whole.replace('"', '""') + '"'
    return f"; quote an id that contains a comma: --ids {shlex.quote(quoted)}"


def _labels(
    source: Source,
    chosen: Sequence[Item],
    class_names: ClassNames | None,
    num_classes: int,
    class_map: str | Path | None,
    *,
    ignored: bool,
) -> tuple[list[int | None], str]:
    """Return the class index of every chosen image, and a description of the rule."""
    if ignored:
        return [None] * len(chosen), "none"
    if source.strays:
        raise UnclearLabels(source.strays, f"take them out, pass --labels FILE.csv, {OR_NONE}")
    if source.names is None:
        if class_map is not None:
            raise UserError(f"--class-map needs folders of classes, and {source.name} has none; pass --labels FILE.csv")
        return [None] * len(chosen), "none"
    try:
        mapping, rule = map_names(source.names, class_names, num_classes, class_map, source.classes)
    except UnclearLabels:
        if source.wrapped and class_map is None:  # photos.zip that holds photos/: a folder, but no class
            return [None] * len(chosen), "none"
        raise
    return [mapping[item.name] for item in chosen if item.name is not None], rule


def _labels_from_file(
    source: Source, chosen: Sequence[Item], class_names: ClassNames | None, num_classes: int, path: Path
) -> tuple[list[int | None], str, tuple[str, ...]]:
    """Return the class index of every chosen image, a description of the rule, and the number of unused rows."""
    given, others = match_labels(path, [item.id for item in chosen], (item.id for item in source.items))
    index = name_index(class_names)
    indices: list[int | None] = [class_index(given[i.id], index, num_classes, f"--labels {path}") for i in chosen]
    unread = Unread({f"row{{s}} of {path.name} without an image": others} if others else {})
    return indices, f"from {path.name}", unread.summary()
