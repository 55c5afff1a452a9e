"""What a model's file holds, by its content: names mislead, and downloads fail."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import mmap
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from certify.errors import UserError
from certify.models.placeholders import mistaken_for

CHECKPOINT, SAFETENSORS, TORCHSCRIPT, ONNX, UNKNOWN = "checkpoint", "safetensors", "TorchScript", "ONNX", "unknown"
"""What can be used; :func:`file_kind` refuses everything else that it recognises."""

_WEIGHTS = (".pth", ".pt", ".th", ".safetensors", ".onnx", ".ckpt", ".bin", ".torchscript")
_HUB_NAMES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
_LISTED = 3  # members of an archive that a message names
_MEMBERS = 1000  # of an archive that are looked at
_HEADER = 100_000_000  # bytes of a safetensors header at most, as its library has it

_FIELD = 2**20  # bytes that the reader of a tar archive may ask for at once: a name, not a file's content
_MARK = slice(257, 262)  # where the first header of a tar archive says ustar

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_OTHERS = {b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive", b"Rar!": "a RAR archive", b"\x93NUMPY": "a NumPy array"}
_OPENERS: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_UNPACK = {"gzip": "gunzip -k", "bzip2": "bunzip2 -k", "xz": "unxz -k", "zstd": "unzstd"}
_OWN_CODE = "load it in a function of your own and name that: --model package.module:function"


def file_kind(path: str | Path) -> str:
    """Recognise a model or its weights.

    Returns:
        ``CHECKPOINT``, ``SAFETENSORS``, ``TORCHSCRIPT``, ``ONNX`` (by its content or its name), or ``UNKNOWN``.

    Raises:
        UserError: the file cannot be read, is empty, or holds something else that can be named, with the remedy.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not head:
        raise UserError(f"{path} is empty; expected a model or its weights (download it again)")
    if stand_in := mistaken_for(head, "a model"):
        raise UserError(f"{path} {stand_in}")
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if what := _foreign(path, head):
        raise UserError(f"{path} is {what}")
    if head[8:9] == b"{" and path.suffix.lower() != ".onnx":
        length = int.from_bytes(head[:8], "little")
        if length > min(_HEADER, path.stat().st_size):
            raise UserError(
                f"{path} is not a whole safetensors file: its header would have {length:,} bytes, the file has "
                f"{path.stat().st_size:,} (a header at most {_HEADER:,}); download it again"
            )
        return SAFETENSORS
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":  # a pickle, as torch wrote before 1.6
        return CHECKPOINT
    if path.suffix.lower() == ".safetensors":
        raise UserError(f"{path} is not a safetensors file: it begins with {head[:16]!r}; download it again")
    return ONNX if path.suffix.lower() == ".onnx" or _is_onnx(path, head) else UNKNOWN


def _is_onnx(path: Path, head: bytes) -> bool:
    """True for a protobuf message with an ONNX model's version and graph (fields 1 and 7)."""
    if head[:1] != b"\x08":
        return False
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return any(number == 7 for number, _ in protobuf_fields(content, range(len(content))))
    except (ValueError, IndexError, OSError):
        return False


def protobuf_fields(content: mmap.mmap, message: range) -> Iterator[tuple[int, range]]:
    """Yield the number and the byte range of each length-delimited field of a protobuf message.

    Raises:
        ValueError: not a protobuf message.
        IndexError: cut off.
    """
    at = message.start
    while at < message.stop:
        tag, at = _varint(content, at)
        number, wire = tag >> 3, tag & 7
        if wire == 2:
            length, at = _varint(content, at)
            if length > message.stop - at:
                raise ValueError("cut off")
            yield number, range(at, at + length)
            at += length
        elif wire == 0:
            _, at = _varint(content, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
    if at > message.stop:
        raise ValueError("cut off")


def _varint(content: mmap.mmap, at: int) -> tuple[int, int]:
    """Return a number of up to ten bytes, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("no number")


def split_part(named: str | Path) -> tuple[Path, str]:
    """``FILE::PART`` as a file and a part of what it holds; for a folder of the model hub the weights in it.

    Raises:
        UserError: a folder that holds no weights.
    """
    file, _, part = str(named).partition("::")
    path = Path(file)
    if not os.path.isdir(path):  # of a name that is too long, pathlib complains
        return path, part
    found = next((path / name for name in _HUB_NAMES if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"{path} is a folder without weights; expected a file, or one of {', '.join(_HUB_NAMES)} in it")
    return found, part


def _zip_kind(path: Path) -> str:
    """A checkpoint and a TorchScript program are zip archives; what else there is in one is no model."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return CHECKPOINT  # damaged: its reader says how
    inside = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in inside and any(name.startswith("code/") for name in inside):
        return TORCHSCRIPT
    if "archive_format" in inside or "serialized_exported_program.json" in names:
        how = "(torch.export.load(FILE).module())"
        raise UserError(f"{path} is a program that torch.export saved, which runs code; {_OWN_CODE} {how}")
    if "data.pkl" in inside:
        return CHECKPOINT
    if "model.weights.h5" in names:
        raise UserError(f"{path} is a Keras model; {_OWN_CODE}, or export it to ONNX")
    if names and all(name.endswith(".npy") for name in names):
        raise UserError(f"{path} holds NumPy arrays; expected weights as torch.save or safetensors writes them")
    raise UserError(f"{path} is a zip archive: unpack it (unzip {path}) and name {_member(names)}")


def _foreign(path: Path, head: bytes) -> str:
    """Other formats that are often taken for weights, with the remedy."""
    if head.startswith(b"\x89HDF") or head[4:8] == b"TFL3":
        what = "a TensorFlow Lite model" if head[4:8] == b"TFL3" else "an HDF5 file, as Keras writes them"
        return f"{what}; {_OWN_CODE}, or export it to ONNX"
    if what := next((what for mark, what in _OTHERS.items() if head.startswith(mark)), ""):
        return f"{what}; expected weights as torch.save or safetensors writes them"
    if packed := next((name for mark, name in _COMPRESSED.items() if head.startswith(mark)), ""):
        if _is_compressed_tar(path, packed):
            return f"a tar archive: unpack it (tar -xf {path}) and name the file in it"
        return f"compressed by {packed}: unpack it ({_UNPACK[packed]} {path}) and name the file that comes out"
    if head[_MARK] == b"ustar":
        return f"a tar archive: unpack it (tar -xf {path}) and name {_member(_tar_names(path))}"
    return ""


def _is_compressed_tar(path: Path, packed: str) -> bool:
    """True if the first block of a compressed file is the header of a tar archive; unpacks that block alone."""
    if packed not in _OPENERS:
        return False
    try:
        with _OPENERS[packed](path, "rb") as file:
            return bytes(file.read(512))[_MARK] == b"ustar"
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        return False


class _ShortReads(io.FileIO):
    """A file that refuses long reads: a tar archive may call a header what would fill the memory."""

    def read(self, size: int | None = -1) -> bytes:
        """Read as :class:`io.FileIO` does, at most ``_FIELD`` bytes."""
        if size is None or not 0 <= size <= _FIELD:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _tar_names(path: Path) -> list[str]:
    """Return the names of the first members of a tar archive, up to where it is damaged."""
    names: list[str] = []
    try:
        with _ShortReads(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member, _ in zip(archive, range(_MEMBERS), strict=False):
                names.append(member.name)
    except (tarfile.TarError, OSError, EOFError, ValueError):
        pass
    return names


def _member(names: list[str]) -> str:
    """The files of an archive that may hold the model, in words."""
    weights = [name for name in names if name.lower().endswith(_WEIGHTS)]
    more = ", ..." if len(weights) > _LISTED else ""
    if weights:
        return f"the file in it: {', '.join(weights[:_LISTED])}{more}"
    return "the model in it (it holds none)" if names else "the model in it"


def weights_kind(path: str | Path, option: str = "--model") -> str:
    """:func:`file_kind` of a file that should hold weights alone.

    Args:
        path: of the file.
        option: that takes a whole model in such a file's place, for the message.

    Raises:
        UserError: as :func:`file_kind`, and for a whole model.
    """
    path, _ = split_part(path)
    kind = file_kind(path)
    if kind in (TORCHSCRIPT, ONNX):
        consent = " --trust-code" if kind == TORCHSCRIPT else ""
        raise UserError(f"{path} is {kind}, a whole model, not weights alone: write {option} {path}{consent}")
    return kind


def require_consent(path: str | Path, *, trust_code: bool) -> None:
    """Refuse to load a program before the user has vouched for it.

    Raises:
        UserError: no consent; says why it is needed and how to give it.
    """
    if not trust_code:
        raise UserError(
            f"{path} is TorchScript, a program: loading and running it can do anything that you can, such as overwrite "
            "files; if you trust where it comes from, add --trust-code (from Python: trust_code=True)"
        )
