"""Open sources of images: a dataset name, an image, a folder, an archive or an array.

Listing reads no pixels. The id of an item does not depend on the machine, the order or the selection, because the noise
is keyed by it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from certify.errors import RunFault, UserError, shorten
from certify.images.arrays import indexed, open_npz
from certify.images.decode import SUFFIXES
from certify.images.files import open_folder, open_zip, read_file
from certify.images.items import Item, Source
from certify.models.resolve import is_file
from certify.models.signatures import describe_other_kind
from certify.registry import Registry, unknown_name

DATASETS = Registry("dataset")


def open_source(data: str, *, root: str | Path | None = None, download: bool = False) -> Source:
    """Open the source given as ``--data``.

    Args:
        data: a dataset's name, an image file, a folder, a zip or a folder in one (``photos.zip/test``), or an ``.npz``
            with ``x`` and ``y``.
        root: folder that holds torchvision's datasets (default ``./data``).
        download: whether a missing dataset may be downloaded.

    Raises:
        UserError: unknown, missing, empty or mixed data.
    """
    if data in DATASETS:
        source: Source = DATASETS.get(data)(root=Path(root or "data"), download=download)
        return source
    path = Path(data)
    if _is_folder(path):
        return open_folder(path)
    archive = next((p for p in (path, *path.parents) if p.suffix.lower() == ".zip" and is_file(p)), None)
    if archive is not None:
        return open_zip(archive, "/".join(path.relative_to(archive).parts))
    if not is_file(path):
        if path.suffix or len(path.parts) > 1 or data.endswith("/"):
            raise UserError(f"no data at {data!r}; expected an image, a folder, a .zip, a .npz or a dataset's name")
        raise unknown_name("dataset", data, DATASETS, "or the path of an image, a folder, a .zip or a .npz")
    if path.suffix.lower() == ".npz":
        return open_npz(path)
    if path.suffix.lower() in SUFFIXES:
        return Source(path.name, (Item(path.name, functools.partial(read_file, path)),))
    kinds = f"{', '.join(SUFFIXES)}, .zip, .npz or a folder"
    why = describe_other_kind(path, "an image, a zip file or an .npz file")
    raise UserError(f"{data} {why or f'is of an unsupported type; expected {kinds}'}")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except OSError:  # a name too long for the file system
        return False


def _digits(name: str, train: bool) -> Callable[..., Source]:
    def open_dataset(root: Path, download: bool) -> Source:
        from sklearn.datasets import load_digits

        from certify.models.builtin import TRAIN_IMAGES

        digits = load_digits()
        ids = range(TRAIN_IMAGES) if train else range(TRAIN_IMAGES, len(digits.images))
        images = (digits.images[ids.start : ids.stop] / 16.0).astype(np.float32)
        labels = [str(int(t)) for t in digits.target[ids.start : ids.stop]]
        return indexed(name, images, labels, ids)

    return open_dataset


def _photos(root: Path, download: bool) -> Source:
    from sklearn.datasets import load_sample_images

    photos = load_sample_images()
    items = [
        Item(Path(name).name, functools.partial(np.asarray, image))
        for name, image in zip(photos.filenames, photos.images, strict=True)
    ]
    return Source("photos", items)


def _torchvision(name: str, train: bool) -> Callable[..., Source]:
    def open_dataset(root: Path, download: bool) -> Source:
        import torchvision.datasets as library

        kind = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name]
        try:
            dataset = getattr(library, kind)(str(root), train=train, download=download)
        except (RuntimeError, OSError) as error:
            if download:
                raise RunFault(f"could not download {name} to {root}: {shorten(str(error), 160)}") from None
            raise UserError(f"no {name} under {root}; pass its folder with --root, or --download") from None
        names = [str(c) for c in dataset.classes]
        if name == "mnist":
            names = [c.partition(" ")[0] for c in names]
        images = dataset.data.numpy() if hasattr(dataset.data, "numpy") else dataset.data
        shown = f"{name}-train" if train else name
        return indexed(shown, images, [names[int(t)] for t in dataset.targets], classes=tuple(names))

    return open_dataset


def _imagenet(root: Path, download: bool) -> Source:
    folder = root / "val" if (root / "val").is_dir() else root
    if not folder.is_dir():
        raise UserError(
            f"no imagenet under {root}; ImageNet cannot be downloaded: pass --root DIR that contains val/<wnid>/*.JPEG"
        )
    return dataclasses.replace(open_folder(folder), name="imagenet")


DATASETS.add("digits", _digits("digits", False), "scikit-learn's 8x8 digits: the 500 held out (in the package)")
DATASETS.add("digits-train", _digits("digits-train", True), "the 1,297 digits before them, for training")
DATASETS.add("photos", _photos, "two photographs without labels (in the package)")
for _name in ("cifar10", "cifar100", "mnist", "fashion_mnist"):
    DATASETS.add(_name, _torchvision(_name, False), "torchvision's test set, under --root")
    DATASETS.add(f"{_name}-train", _torchvision(_name, True), "torchvision's training set, under --root")
DATASETS.add("imagenet", _imagenet, "the validation set as val/<wnid>/ under --root")
