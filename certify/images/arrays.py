"""Images stored in arrays, read lazily so that a small selection costs little time and memory."""

from __future__ import annotations

import functools
import math
import threading
import tokenize
import weakref
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from certify.errors import ImageError, UserError, first_line
from certify.images.items import Item, Source, Unread
from certify.models.signatures import describe_other_kind

MAX_UNPACKED = 16 * 2**30
"""Largest array, in bytes, that is unpacked from a compressed archive."""

_CHECKED = 256 * 2**20  # bytes up to which a stored array is read whole, which verifies its checksum
_PIECE = 2**24  # bytes unpacked at a time
_FAULTS = (OSError, ValueError, zipfile.BadZipFile, EOFError, MemoryError, RuntimeError, zlib.error)


class Items(Sequence[Item]):
    """Items of an array, created on access.

    Args:
        images: any sequence of N images.
        ids: N image ids.
        name: function from index to class name, or None if there are no classes.
        places: indices of the images to expose; all by default.
    """

    def __init__(
        self, images: Any, ids: Sequence[int], name: Callable[[int], str] | None, places: range | None = None
    ) -> None:
        self._images, self._ids, self._name = images, ids, name
        self._places = range(len(ids)) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> Items: ...

    def __getitem__(self, index: int | slice) -> Item | Items:
        """Return one item, or a view of several."""
        if isinstance(index, slice):
            return Items(self._images, self._ids, self._name, self._places[index])
        place = self._places[index]
        name = None if self._name is None else self._name(place)
        return Item(str(self._ids[place]), functools.partial(self._images.__getitem__, place), name)


@dataclass(frozen=True)
class ArraySource(Source):
    """A source with integer ids, which are looked up without a search."""

    ids: Sequence[int] = ()

    def by_id(self, ids: Sequence[str]) -> dict[str, Item]:
        """Return the items with these ids; unknown ids are left out."""
        numbers = {i: int(i) for i in ids if i.isascii() and i.isdecimal() and str(int(i)) == i}
        return {i: self.items[self.ids.index(number)] for i, number in numbers.items() if number in self.ids}

    def ids_with_comma(self) -> list[str]:
        """Return an empty list: ids are numbers."""
        return []


def indexed(
    name: str,
    images: Any,
    names: Sequence[str] | None,
    ids: Sequence[int] | None = None,
    classes: tuple[str, ...] | None = None,
) -> Source:
    """Return a source over images in memory.

    Args:
        name: source name.
        images: array of N images.
        names: class name of each image, or None.
        ids: image ids, 0 to N - 1 by default.
        classes: all class names in index order, if the dataset defines an order.
    """
    ids = range(len(images)) if ids is None else ids
    items = Items(images, ids, None if names is None else names.__getitem__)
    of_items = None if names is None else tuple(sorted(set(names)))
    return ArraySource(name, items, classes, of_items, image_shape=tuple(images.shape[1:]), ids=ids)


def open_npz(path: Path) -> Source:
    """Open the images ``x`` and class indices ``y`` of an ``.npz`` file.

    Compressed images are unpacked up to the last one needed. An uncompressed array of more than 256 MiB is
    memory-mapped, without verifying the archive's checksum.

    Raises:
        UserError: not an ``.npz`` file, damaged, or arrays of unsupported types or shapes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            keys = [name.removesuffix(".npy") for name in members if name.endswith(".npy")]
            if "x" not in keys:
                held = ", ".join(keys or members) or "nothing"
                raise UserError(f"{path} holds {held}; expected x (images) and y (labels)")
            if double := next((key for key in ("x", "y") if keys.count(key) > 1), None):
                raise UserError(f"{path} holds {double} {keys.count(double)} times; save each array once")
            x = _array(archive, path, "x")
            y = _array(archive, path, "y", at_once=True) if "y" in keys else None
            _check(path, x, y)
    except _FAULTS as error:
        if isinstance(error, UserError) and not isinstance(error, ImageError):
            raise
        why = f"is not a readable .npz of plain arrays ({error})"
        raise UserError(f"{path} {describe_other_kind(path, 'an .npz file') or why}") from None
    others = [key for key in keys if key not in ("x", "y")]
    unread = Unread({"other array{s}": others} if others else {}).summary()
    ids, shape = range(x.shape[0]), x.shape[1:]
    if y is None:
        return ArraySource(path.name, Items(x, ids, None), unread=unread, image_shape=shape, ids=ids)
    names = tuple(sorted(str(int(v)) for v in np.unique(y)))
    items = Items(x, ids, lambda i: str(int(y[i])))
    return ArraySource(path.name, items, names=names, unread=unread, image_shape=shape, ids=ids)


def _check(path: Path, x: Any, y: np.ndarray | None) -> None:
    """Check that x and y can be images and labels; the values of lazily read images are checked when loaded."""
    if len(x.shape) not in (3, 4) or 0 in x.shape:
        raise UserError(f"{path}: x has shape {x.shape}; expected (N, H, W), (N, H, W, C) or (N, C, H, W)")
    if y is not None and (y.shape != x.shape[:1] or y.dtype.kind not in "iu"):
        raise UserError(f"{path}: y has shape {y.shape} and type {y.dtype}; expected {x.shape[0]} integers")
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise UserError(f"{path}: x has type {x.dtype}; expected uint8, or floating point in [0, 1]")
    if x.dtype == np.uint8:
        return
    values = x if type(x) is np.ndarray else np.asarray(x[0])
    if not (values.min() >= -1e-6 and values.max() <= 1 + 1e-6):
        extremes = f"{values.min():g} to {values.max():g}"
        raise UserError(f"{path}: x has values from {extremes}; expected [0, 1], or uint8")


def _array(archive: zipfile.ZipFile, path: Path, key: str, *, at_once: bool = False) -> Any:
    """Open an array of an archive: in memory, memory-mapped, or unpacked as it is read."""
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{key} has a header of version {version}")
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, fortran, dtype = reader(member)
        except (tokenize.TokenError, SyntaxError, RecursionError, TypeError, AttributeError) as error:
            raise ValueError(f"{key} has a damaged header: {first_line(error)}") from None
        start = member.tell()
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError(f"{key} holds Python objects")
    if info.file_size - start != size:
        raise ValueError(f"{key} of shape {shape} takes {size:,} bytes and has {info.file_size - start:,}")
    stored = info.compress_type == zipfile.ZIP_STORED
    if stored and size > _CHECKED and not at_once:
        with path.open("rb") as file:
            file.seek(info.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
        offset = info.header_offset + 30 + name + extra + start
        return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
    if not stored and size > MAX_UNPACKED:
        raise ValueError(f"{key} unpacks to {size:,} bytes; the limit is {MAX_UNPACKED:,}")
    if stored or fortran or not shape or at_once:
        with archive.open(info) as member:
            return np.lib.format.read_array(member, allow_pickle=False)
    return _Unpacked(path, info, start, shape, dtype)


class _Unpacked:
    """A compressed array, unpacked up to the last image that was read."""

    def __init__(
        self, path: Path, info: zipfile.ZipInfo, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._array: np.ndarray[Any, Any] = np.empty(shape, dtype)  # the OS commits memory as it is filled
        self._bytes = self._array.reshape(-1).view(np.uint8)
        self._filled = 0
        archive = zipfile.ZipFile(path)  # stays open; its checksum is verified once all is read
        self._member = archive.open(info)
        self._member.read(start)
        weakref.finalize(self, self._member.close)
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> np.ndarray:
        end = (index + 1) * (self._array.nbytes // self.shape[0])
        try:
            with self._lock:
                while self._filled < end:
                    got = self._member.read(min(end - self._filled, _PIECE))
                    if not got:
                        raise EOFError("the archive ends too early")
                    self._bytes[self._filled : self._filled + len(got)] = np.frombuffer(got, np.uint8)
                    self._filled += len(got)
        except _FAULTS as error:
            raise ImageError(f"cannot be unpacked ({error})") from None
        return np.asarray(self._array[index])
