"""Data sets by name: those in the package, torchvision's, ImageNet's validation set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from certify.errors import RunFault, UserError
from certify.images.arrays import indexed
from certify.images.files import open_folder
from certify.images.items import Item, Source
from certify.registry import Registry

DATASETS = Registry("dataset")


def _digits(name: str, train: bool) -> Callable[..., Source]:
    def open_dataset(root: Path, download: bool) -> Source:
        from sklearn.datasets import load_digits

        from certify.models.digits import TRAIN_IMAGES

        found = load_digits()
        ids = range(TRAIN_IMAGES) if train else range(TRAIN_IMAGES, len(found.images))
        images = (found.images[ids.start : ids.stop] / 16.0).astype(np.float32)
        labels = [str(int(t)) for t in found.target[ids.start : ids.stop]]
        return indexed(name, images, labels, ids)

    return open_dataset


def _photos(root: Path, download: bool) -> Source:
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    items = [
        Item(Path(name).name, functools.partial(np.asarray, image))
        for name, image in zip(found.filenames, found.images, strict=True)
    ]
    return Source("photos", items)


def _torchvision(name: str, train: bool) -> Callable[..., Source]:
    def open_dataset(root: Path, download: bool) -> Source:
        import torchvision.datasets as library

        kind = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name]
        try:
            found = getattr(library, kind)(str(root), train=train, download=download)
        except (RuntimeError, OSError) as error:
            if download:
                raise RunFault(f"could not download {name} to {root}: {str(error)[:160]}") from None
            raise UserError(f"no {name} under {root}; pass its folder with --root, or --download") from None
        names = [str(c) for c in found.classes]
        if name == "mnist":
            names = [c.partition(" ")[0] for c in names]
        images = found.data.numpy() if hasattr(found.data, "numpy") else found.data
        shown = f"{name}-train" if train else name
        return indexed(shown, images, [names[int(t)] for t in found.targets], classes=tuple(names))

    return open_dataset


def _imagenet(root: Path, download: bool) -> Source:
    folder = root / "val" if (root / "val").is_dir() else root
    if not folder.is_dir():
        raise UserError(
            f"no imagenet under {root}; ImageNet cannot be downloaded: pass --root DIR that holds val/<wnid>/*.JPEG"
        )
    return dataclasses.replace(open_folder(folder), name="imagenet")


DATASETS.add("digits", _digits("digits", False), "scikit-learn's 8x8 digits: the 500 held out (in the package)")
DATASETS.add("digits-train", _digits("digits-train", True), "the 1,297 digits before them, for training")
DATASETS.add("photos", _photos, "two photographs without labels (in the package)")
for _name in ("cifar10", "cifar100", "mnist", "fashion_mnist"):
    DATASETS.add(_name, _torchvision(_name, False), "torchvision's test set, under --root")
    DATASETS.add(f"{_name}-train", _torchvision(_name, True), "torchvision's training set, under --root")
DATASETS.add("imagenet", _imagenet, "the validation set as val/<wnid>/ under --root")
