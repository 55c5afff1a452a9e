"""Where images come from: a dataset's name, an image, a folder, an archive, an array.

Listing reads no pixels. An item's id does not depend on the machine, the order or the selection; it names the image's
noise stream.
"""

from __future__ import annotations

import functools
from pathlib import Path

from certify.errors import UserError
from certify.images.arrays import open_npz
from certify.images.decode import SUFFIXES
from certify.images.files import open_folder, open_zip, read_file
from certify.images.items import Item, Source
from certify.images.named_datasets import DATASETS
from certify.models.placeholders import describe_other_kind
from certify.models.resolve import is_file
from certify.registry import unknown_name


def open_source(data: str, *, root: str | Path | None = None, download: bool = False) -> Source:
    """The source that ``--data`` names.

    Args:
        data: a dataset's name, an image file, a folder, a zip or a folder in one (``photos.zip/test``), or an ``.npz``
            with ``x`` and ``y``.
        root: folder of torchvision's datasets (default ``./data``).
        download: whether a missing dataset may be downloaded.

    Raises:
        UserError: unknown, absent, empty or mixed; the message says what to write instead.
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
    raise UserError(f"{data} {why or f'is not a kind of data that is read; expected {kinds}'}")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except OSError:  # a name too long for the file system
        return False
