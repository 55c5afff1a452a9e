"""Recognise models and weights by their content: names mislead, and downloads fail."""

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
"""Kinds of files that can be used; :func:`file_kind` refuses everything else that it recognises."""

_WEIGHTS = (".pth", ".pt", ".th", ".safetensors", ".onnx", ".ckpt", ".bin", ".torchscript")
_HUB_NAMES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
_LISTED = 3  # members of an archive that a message names
_MEMBERS = 1000  # members of an archive that are searched
_HEADER = 100_000_000  # most bytes of a safetensors header, as in its library
_FIELD = 2**20  # most bytes that the reader of a tar archive may read at once: a name, not a file's content
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
            f"{path} is not a whole safetensors file: its header would have {header:,} bytes, the file has "
            f"{size:,} (a header at most {_HEADER:,}); download it again"
        )
    if kind == PICKLE:  # as torch wrote checkpoints before 1.6
        return CHECKPOINT
    if path.suffix.lower() == ".safetensors":
        raise UserError(f"{path} is not a safetensors file: it begins with {head[:16]!r}; download it again")
    return ONNX if named_onnx or _is_onnx(path, head) else UNKNOWN


def _remedy(path: Path, kind: str) -> str:
    """Return the end of a message about a file of another kind: how to get at the model."""
    if kind in (TFLITE, HDF5):
        return f"{', as Keras writes them' * (kind == HDF5)}; {_OWN_CODE}, or export it to ONNX"
    if kind == TAR:
        names = _tar_names(path)
        return f": unpack it (tar -xf {path}) and name {_member(names) if names else 'the file in it'}"
    packer = kind.removeprefix(COMPRESSED)
    if packer in _UNPACK:
        return f": unpack it ({_UNPACK[packer]} {path}) and name the file that comes out"
    return "; expected weights as torch.save or safetensors writes them"


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
    """Split ``FILE::PART`` into a file and a part of its content; find the weights in a folder of the model hub.

    Raises:
        UserError: a folder that holds no weights.
    """
    file, _, part = str(named).partition("::")
    path = Path(file)
    if not os.path.isdir(path):  # of a name that is too long, pathlib complains
        return path, part
    weights = next((path / name for name in _HUB_NAMES if (path / name).is_file()), None)
    if weights is None:
        if shards := sorted(entry.name for entry in path.glob("*-00001-of-*")):
            raise UserError(f"{path} keeps its weights in several files ({shards[0]}, ...); save them in one file")
        raise UserError(f"{path} is a folder without weights; expected a file, or one of {', '.join(_HUB_NAMES)} in it")
    return weights, part


def _zip_kind(path: Path) -> str:
    """Return ``CHECKPOINT`` or ``TORCHSCRIPT``, which are zip archives.

    Raises:
        UserError: an archive of something else.
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
        raise UserError(f"{path} is a program that torch.export saved, which runs code; {_OWN_CODE} {how}")
    if "data.pkl" in inside:
        return CHECKPOINT
    if "model.weights.h5" in names:
        raise UserError(f"{path} is a Keras model; {_OWN_CODE}, or export it to ONNX")
    if names and all(name.endswith(".npy") for name in names):
        raise UserError(f"{path} holds NumPy arrays; expected weights as torch.save or safetensors writes them")
    raise UserError(f"{path} is a zip archive: unpack it (unzip {path}) and name {_member(names)}")


class _ShortReads(io.FileIO):
    """A file that refuses long reads: a tar archive may call a header what would fill the memory."""

    def read(self, size: int | None = -1) -> bytes:
        """Read as :class:`io.FileIO` does, at most ``_FIELD`` bytes."""
        if size is None or not 0 <= size <= _FIELD:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _tar_names(path: Path) -> list[str]:
    """Return the names of the first members of a tar archive that is not compressed, up to where it is damaged."""
    names: list[str] = []
    try:
        with _ShortReads(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member, _ in zip(archive, range(_MEMBERS), strict=False):
                names.append(member.name)
    except (tarfile.TarError, OSError, EOFError, ValueError):
        pass
    return names


def _member(names: list[str]) -> str:
    """Name the files of an archive that may hold the model."""
    weights = [name for name in names if name.lower().endswith(_WEIGHTS)]
    more = ", ..." if len(weights) > _LISTED else ""
    if weights:
        return f"the file in it: {', '.join(weights[:_LISTED])}{more}"
    return "the model in it (it holds none)" if names else "the model in it"


def weights_kind(path: str | Path, option: str = "--model") -> str:
    """Return :func:`file_kind` of a file that should hold weights alone.

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
        UserError: no consent; the message has the reason and the option.
    """
    if not trust_code:
        raise UserError(
            f"{path} is TorchScript, a program: loading and running it can do anything that you can, such as overwrite "
            "files; if you trust where it comes from, add --trust-code"
        )
