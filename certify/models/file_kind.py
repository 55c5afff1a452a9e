"""Recognise model and weight files by content, since names mislead and downloads fail."""

from __future__ import annotations

import io
import mmap
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from certify.errors import UserError
from certify.models.signatures import COMPRESSED, HDF5, HEAD, PICKLE, TAR, TFLITE, ZIP, mistaken_for, name_content

CHECKPOINT, SAFETENSORS, TORCHSCRIPT, ONNX, UNKNOWN = "checkpoint", "safetensors", "TorchScript", "ONNX", "unknown"
"""Supported kinds of files; :func:`file_kind` raises an error for any other kind that it recognises."""

_WEIGHTS = (".pth", ".pt", ".th", ".safetensors", ".onnx", ".ckpt", ".bin", ".torchscript")
_HUB_NAMES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
_LISTED = 3  # members of an archive listed in a message
_MEMBERS = 1000  # members of an archive that are searched
_HEADER = 100_000_000  # largest safetensors header in bytes, as in its library
_FIELD = 2**20  # most bytes per read of a tar archive: a header or name, not a file's content
_UNPACK = {"gzip": "gunzip -k", "bzip2": "bunzip2 -k", "xz": "unxz -k", "zstd": "unzstd"}
_OWN_CODE = "load it in your own function and pass that: --model package.module:function"


def file_kind(path: str | Path) -> str:
    """Recognise a model or its weights.

    Returns:
        ``CHECKPOINT``, ``SAFETENSORS``, ``TORCHSCRIPT``, ``ONNX`` (by content or suffix), or ``UNKNOWN``.

    Raises:
        UserError: the file is unreadable, empty, or of another kind, which the message names with a fix.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not head:
        raise UserError(f"{path} is empty; expected a model or its weights (download it again)")
    if mistake := mistaken_for(head, "a model"):
        raise UserError(f"{path} {mistake}")
    named_onnx = path.suffix.lower() == ".onnx"
    header, size = int.from_bytes(head[:8], "little"), path.stat().st_size  # of safetensors: the header's length first
    safetensors = head[8:9] == b"{" and not named_onnx
    if safetensors and header <= min(_HEADER, size):
        return SAFETENSORS
    kind = name_content(head, path)
    if kind == ZIP:
        return _zip_kind(path)
    if kind not in ("", PICKLE):
        raise UserError(f"{path} is {kind}{_remedy(path, kind)}")
    if safetensors:
        raise UserError(
            f"{path} is not a complete safetensors file: its header would have {header:,} bytes, the file has "
            f"{size:,} (a header at most {_HEADER:,}); download it again"
        )
    if kind == PICKLE:  # as torch wrote checkpoints before 1.6
        return CHECKPOINT
    if path.suffix.lower() == ".safetensors":
        raise UserError(f"{path} is not a safetensors file: it begins with {head[:16]!r}; download it again")
    return ONNX if named_onnx or _is_onnx(path, head) else UNKNOWN


def _remedy(path: Path, kind: str) -> str:
    """Return the suffix of a message about a file of another kind: how to obtain the model."""
    if kind in (TFLITE, HDF5):
        return f"{', as Keras writes them' * (kind == HDF5)}; {_OWN_CODE}, or export it to ONNX"
    if kind == TAR:
        names = _tar_names(path)
        return f": unpack it (tar -xf {path}) and pass {_member(names) if names else 'the file in it'}"
    packer = kind.removeprefix(COMPRESSED)
    if packer in _UNPACK:
        return f": unpack it ({_UNPACK[packer]} {path}) and pass the resulting file"
    return "; expected weights written by torch.save or safetensors"


def _is_onnx(path: Path, head: bytes) -> bool:
    """True if a file is a protobuf message with an ONNX model's version and graph (fields 1 and 7)."""
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
        IndexError: the message is truncated.
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
    """Decode a varint of up to ten bytes; return its value and end position."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("no number")


def split_part(named: str | Path) -> tuple[Path, str]:
    """Split ``FILE::PART`` into file and part; for a folder in the model hub's layout, find its weights file.

    Raises:
        UserError: a folder without weights.
    """
    file, _, part = str(named).partition("::")
    path = Path(file)
    if not os.path.isdir(path):  # unlike pathlib, os.path accepts a name that is too long
        return path, part
    weights = next((path / name for name in _HUB_NAMES if (path / name).is_file()), None)
    if weights is None:
        if shards := sorted(entry.name for entry in path.glob("*-00001-of-*")):
            raise UserError(f"{path} keeps its weights in several files ({shards[0]}, ...); save them in one file")
        raise UserError(f"{path} is a folder without weights; expected a file, or one of {', '.join(_HUB_NAMES)} in it")
    return weights, part


def _zip_kind(path: Path) -> str:
    """Classify a zip archive as ``CHECKPOINT`` or ``TORCHSCRIPT``.

    Raises:
        UserError: the archive contains something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return CHECKPOINT  # damaged: its reader names the cause
    inside = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in inside and any(name.startswith("code/") for name in inside):
        return TORCHSCRIPT
    if "archive_format" in inside or "serialized_exported_program.json" in names:
        how = "(torch.export.load(FILE).module())"
        raise UserError(f"{path} is a program saved by torch.export, which runs code; {_OWN_CODE} {how}")
    if "data.pkl" in inside:
        return CHECKPOINT
    if "model.weights.h5" in names:
        raise UserError(f"{path} is a Keras model; {_OWN_CODE}, or export it to ONNX")
    if names and all(name.endswith(".npy") for name in names):
        raise UserError(f"{path} contains NumPy arrays; expected weights written by torch.save or safetensors")
    raise UserError(f"{path} is a zip archive: unpack it (unzip {path}) and pass {_member(names)}")


class _ShortReads(io.FileIO):
    """A file that rejects long reads, since a tar archive can declare a header large enough to exhaust memory."""

    def read(self, size: int | None = -1) -> bytes:
        """Read as :class:`io.FileIO` does, at most ``_FIELD`` bytes."""
        if size is None or not 0 <= size <= _FIELD:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _tar_names(path: Path) -> list[str]:
    """Return the names of the first members of an uncompressed tar archive, up to any damage."""
    names: list[str] = []
    try:
        with _ShortReads(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member, _ in zip(archive, range(_MEMBERS), strict=False):
                names.append(member.name)
    except (tarfile.TarError, OSError, EOFError, ValueError):
        pass
    return names


def _member(names: list[str]) -> str:
    """Describe the members of an archive that may be the model."""
    weights = [name for name in names if name.lower().endswith(_WEIGHTS)]
    more = ", ..." if len(weights) > _LISTED else ""
    if weights:
        return f"the file in it: {', '.join(weights[:_LISTED])}{more}"
    return "the model in it (none was found)" if names else "the model in it"


def weights_kind(path: str | Path, option: str = "--model") -> str:
    """Return the :func:`file_kind` of a file that should contain weights only.

    Args:
        path: the file.
        option: the option that takes a complete model, for the message.

    Raises:
        UserError: as :func:`file_kind`, and for a complete model.
    """
    path, _ = split_part(path)
    kind = file_kind(path)
    if kind in (TORCHSCRIPT, ONNX):
        consent = " --trust-code" if kind == TORCHSCRIPT else ""
        raise UserError(f"{path} is {kind}, a complete model, not weights alone: pass {option} {path}{consent}")
    return kind


def require_consent(path: str | Path, *, trust_code: bool) -> None:
    """Require ``--trust-code`` before a program is loaded.

    Raises:
        UserError: no consent.
    """
    if not trust_code:
        raise UserError(
            f"{path} is TorchScript, a program: loading and running it can do anything that you can, such as overwrite "
            "files; if you trust its source, add --trust-code"
        )
