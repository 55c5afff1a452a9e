"""Where images come from: each source lists items with stable ids and class names, and reads one item at a time.

Listing reads no pixels. An item's id does not depend on the machine, the order or the selection; it names the image's
noise stream.
"""

from __future__ import annotations

import functools
import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from certify.errors import ImageError, RunFault, UserError
from certify.images.decode import MAX_BYTES, SUFFIXES
from certify.models.resolve import is_file
from certify.registry import Registry, unknown_name

DATASETS = Registry("dataset")

MAX_ARRAY_BYTES = 16 * 2**30


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Attributes:
        id: stable name, unique in the source.
        read: gives the file's bytes, or an array (H, W), (H, W, C) or (C, H, W).
        name: the class as the data names it, or None.
        checksum: of the content, where the source knows one; else :meth:`stamp` hashes what ``read`` gives.
    """

    id: str
    read: Callable[[], Any]
    name: str | None = None
    checksum: str = ""

    def stamp(self) -> str:
        """What changes when the content changes: a resumed run must find the same."""
        if self.checksum:
            return self.checksum
        try:
            raw = self.read()
        except ImageError as error:
            return str(error)
        content = raw if isinstance(raw, bytes) else repr(np.shape(raw)).encode() + np.ascontiguousarray(raw).tobytes()
        return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Source:
    """A list of items.

    Attributes:
        name: what it is called in the record.
        items: in a stable order.
        classes: the order of its classes, where it has one of its own.
        wrapped: all items lie in one folder of an archive, which may be a class or only a wrapper.
    """

    name: str
    items: Sequence[Item]
    classes: tuple[str, ...] | None = None
    wrapped: bool = False


def open_source(data: str, *, root: str | Path | None = None, download: bool = False) -> Source:
    """The source that ``--data`` names.

    Args:
        data: a dataset's name, an image file, a folder, a zip, or an ``.npz`` with ``x`` and ``y``.
        root: folder of torchvision's datasets (default ``./data``).
        download: whether a missing dataset may be downloaded.

    Raises:
        UserError: unknown, absent, empty or mixed; the message says what to write instead.
    """
    if data in DATASETS:
        source: Source = DATASETS.get(data)(root=Path(root or "data"), download=download)
        return source
    path = Path(data)
    if len(path.name) < 256 and path.is_dir():
        return _from_folder(path)
    if not is_file(path):
        if path.suffix or len(path.parts) > 1 or data.endswith("/"):
            raise UserError(f"no data at {data!r}; expected an image, a folder, a .zip, a .npz or a dataset's name")
        raise unknown_name("dataset", data, DATASETS, "or the path of an image, a folder, a .zip or a .npz")
    if path.suffix.lower() == ".npz":
        return _from_npz(path)
    if path.suffix.lower() == ".zip":
        return _from_zip(path)
    if path.suffix.lower() in SUFFIXES:
        return Source(path.name, (Item(path.name, lambda: _read_file(path)),))
    raise UserError(
        f"{data!r} is not a kind of data that is read; expected {', '.join(SUFFIXES)}, .zip, .npz or a folder"
    )


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ImageError(f"is a file of {path.stat().st_size:,} bytes; the limit is {MAX_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from None


def _from_folder(root: Path) -> Source:
    try:
        found = [p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
    except OSError as error:
        raise UserError(f"cannot list {root}: {error.strerror}") from None
    files = {p.relative_to(root).as_posix(): p for p in found}

    def item(key: str, id: str, name: str | None) -> Item:
        path = files[key]
        return Item(id, lambda: _read_file(path), name)

    return Source(root.resolve().name, _arrange(files, str(root), item))


def _from_zip(path: Path) -> Source:
    try:
        archive = zipfile.ZipFile(path)  # stays open: members are read one at a time, nothing is extracted
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is not a readable zip file ({error})") from None
    members = {i.filename: i for i in archive.infolist() if PurePosixPath(i.filename).suffix.lower() in SUFFIXES}

    def read(info: zipfile.ZipInfo) -> bytes:
        if info.file_size > MAX_BYTES:
            raise ImageError(f"unpacks to {info.file_size:,} bytes; the limit is {MAX_BYTES:,}")
        try:
            with archive.open(info) as member:
                return member.read(MAX_BYTES + 1)
        except Exception as error:  # BadZipFile, zlib.error, lzma.LZMAError: each compression has its own
            raise ImageError(f"cannot be unpacked ({error})") from None

    def item(key: str, id: str, name: str | None) -> Item:
        info = members[key]
        return Item(id, lambda: read(info), name, f"{info.CRC:08x}-{info.file_size}")

    items = _arrange(members, str(path), item)
    return Source(path.name, items, wrapped=len({i.name for i in items}) == 1)


def _arrange(keys: Any, where: str, item: Callable[[str, str, str | None], Item]) -> list[Item]:
    """Items of a tree of files: flat, or one folder a class; folders around the classes are taken off."""
    paths = sorted(
        (PurePosixPath(k), k)
        for k in keys
        if not any(part.startswith(".") or part in ("__MACOSX", "..") for part in PurePosixPath(k).parts)
    )
    if not paths:
        raise UserError(f"no images in {where}; expected files ending in {', '.join(SUFFIXES)}")
    depth, shallowest = (choose(len(p.parts) for p, _ in paths) for choose in (max, min))
    strip = 0
    while depth - strip > 2 and len({p.parts[: strip + 1] for p, _ in paths}) == 1 and shallowest > strip + 1:
        strip += 1
    depths = {len(p.parts) - strip for p, _ in paths}
    if depths in ({1}, {2}):
        return [item(key, "/".join(p.parts[strip:]), p.parts[-2] if depths == {2} else None) for p, key in paths]
    tops = sorted({p.parts[strip] for p, _ in paths if len(p.parts) - strip > 1})
    raise UserError(
        f"images in {where} lie at several depths (under {', '.join(tops[:4])}{', ...' if len(tops) > 4 else ''}); "
        f"expected one flat folder or one folder a class: name one of them, such as {where.rstrip('/')}/{tops[0]}"
    )


def _from_npz(path: Path) -> Source:
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            if "x" not in archive:
                raise UserError(
                    f"{path} holds {', '.join(archive.files) or 'nothing'}; expected x (images) and y (labels)"
                )
            size = sum(member.file_size for member in archive.zip.infolist()) if archive.zip else 0
            if size > MAX_ARRAY_BYTES:
                raise UserError(f"{path} unpacks to {size:,} bytes; the limit is {MAX_ARRAY_BYTES:,}")
            x, y = archive["x"], archive.get("y")
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a readable .npz of plain arrays ({error})") from None
    if x.ndim not in (3, 4) or not x.size:
        raise UserError(f"{path}: x has shape {x.shape}; expected (N, H, W), (N, H, W, C) or (N, C, H, W)")
    if y is not None and (y.shape != x.shape[:1] or y.dtype.kind not in "iu"):
        raise UserError(f"{path}: y has shape {y.shape} and type {y.dtype}; expected {len(x)} integers")
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise UserError(f"{path}: x has type {x.dtype}; expected uint8, or floating point in [0, 1]")
    if x.dtype.kind == "f" and not (x.min() >= -1e-6 and x.max() <= 1 + 1e-6):
        raise UserError(f"{path}: x has values from {x.min():g} to {x.max():g}; expected [0, 1], or uint8")
    return _indexed(path.name, x, None if y is None else [str(int(v)) for v in y])


def _indexed(
    name: str,
    x: Any,
    names: Sequence[str] | None,
    ids: Sequence[int] | None = None,
    classes: tuple[str, ...] | None = None,
) -> Source:
    def item(i: int) -> Item:
        return Item(str(ids[i] if ids is not None else i), lambda: x[i], names[i] if names is not None else None)

    return Source(name, [item(i) for i in range(len(x))], classes)


def _digits(name: str, train: bool) -> Callable[..., Source]:
    def open_dataset(root: Path, download: bool) -> Source:
        from sklearn.datasets import load_digits

        from certify.models.digits import TRAIN_IMAGES

        found = load_digits()
        ids = range(TRAIN_IMAGES) if train else range(TRAIN_IMAGES, len(found.images))
        images = (found.images[ids.start : ids.stop] / 16.0).astype(np.float32)
        labels = [str(int(t)) for t in found.target[ids.start : ids.stop]]
        return _indexed(name, images, labels, ids)

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
        return _indexed(shown, images, [names[int(t)] for t in found.targets], classes=tuple(names))

    return open_dataset


def _imagenet(root: Path, download: bool) -> Source:
    folder = root / "val" if (root / "val").is_dir() else root
    if not folder.is_dir():
        raise UserError(
            f"no imagenet under {root}; ImageNet cannot be downloaded: pass --root DIR that holds val/<wnid>/*.JPEG"
        )
    return Source("imagenet", _from_folder(folder).items)


DATASETS.add("digits", _digits("digits", False), "scikit-learn's 8x8 digits: the 500 held out (in the package)")
DATASETS.add("digits-train", _digits("digits-train", True), "the 1,297 digits before them, for training")
DATASETS.add("photos", _photos, "two photographs without labels (in the package)")
for _name in ("cifar10", "cifar100", "mnist", "fashion_mnist"):
    DATASETS.add(_name, _torchvision(_name, False), "torchvision's test set, under --root")
    DATASETS.add(f"{_name}-train", _torchvision(_name, True), "torchvision's training set, under --root")
DATASETS.add("imagenet", _imagenet, "the validation set as val/<wnid>/ under --root")
