"""Wire format of the Open Inference Protocol v2, both directions: JSON, with tensors in it or as bytes after it.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and its binary tensor extension.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LENGTH_HEADER = "Inference-Header-Content-Length"
"""HTTP header with the length of the JSON in bytes; the rest of the body is binary tensors."""

FLOATS = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
INTEGERS = {
    f"{sign}INT{bits}": f"<{letter}{bits // 8}" for sign, letter in (("", "i"), ("U", "u")) for bits in (8, 16, 32, 64)
}
NUMBERS = FLOATS | INTEGERS
"""NumPy dtype of each numeric datatype."""


class WireError(ValueError):
    """A message that violates the protocol; the reason is one line."""


@dataclass(frozen=True)
class Tensor:
    """A named tensor of a message.

    Attributes:
        name: name of the tensor.
        datatype: datatype of the protocol, such as ``FP32``.
        shape: shape of the tensor.
        content: its bytes (:func:`pack`), its elements, or their JSON text.
    """

    name: str
    datatype: str
    shape: Sequence[int]
    content: bytes | str | list[Any]

    def head(self) -> dict[str, Any]:
        """Return the tensor's JSON object, without ``data`` if the content is JSON text."""
        head: dict[str, Any] = {"name": self.name, "shape": list(self.shape), "datatype": self.datatype}
        if isinstance(self.content, bytes):
            head["parameters"] = {"binary_data_size": len(self.content)}
        elif isinstance(self.content, list):
            head["data"] = self.content
        return head


def write_message(
    key: str, tensors: Sequence[Tensor], *, before: Mapping[str, Any] = {}, after: Mapping[str, Any] = {}
) -> tuple[bytes, dict[str, str]]:
    """Return the body of a request or a response, and its headers.

    Args:
        key: ``inputs`` or ``outputs``.
        tensors: tensors of the message, in order.
        before: members of the message before the tensors.
        after: members after the tensors.
    """
    if any(isinstance(tensor.content, str) for tensor in tensors):
        heads = [
            json.dumps(tensor.head())[:-1]
            + (f', "data": {tensor.content}}}' if isinstance(tensor.content, str) else "}")
            for tensor in tensors
        ]
        members = (json.dumps(before)[1:-1], f'"{key}": [{", ".join(heads)}]', json.dumps(after)[1:-1])
        text = f"{{{', '.join(filter(None, members))}}}".encode()
    else:
        text = json.dumps({**before, key: [tensor.head() for tensor in tensors], **after}).encode()
    tail = [tensor.content for tensor in tensors if isinstance(tensor.content, bytes)]
    if not tail:
        return text, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(len(text))}
    return b"".join([text, *tail]), headers


def split_message(body: bytes, headers: Mapping[str, str]) -> tuple[bytes, bytes]:
    """Split a message into its JSON and the bytes after it.

    Raises:
        WireError: ``LENGTH_HEADER`` is not a length within the body.
    """
    length = next((value for name, value in headers.items() if name.lower() == LENGTH_HEADER.lower()), None)
    if length is None:
        return body, b""
    if not re.fullmatch("[0-9]{1,18}", length) or int(length) > len(body):
        raise WireError(f"{LENGTH_HEADER} {length[:20]!r}: expected the JSON's length, at most {len(body):,}")
    return body[: int(length)], body[int(length) :]


def parameter(holder: Any, name: str) -> Any:
    """Return a parameter of a message or tensor; None if absent."""
    parameters = holder.get("parameters") if isinstance(holder, dict) else None
    return parameters.get(name) if isinstance(parameters, dict) else None


def binary_contents(tensors: Sequence[Any], tail: bytes) -> list[bytes | None]:
    """Return the bytes of each tensor in the order of the message; None for a tensor in JSON.

    Raises:
        WireError: the tail is shorter than the tensors.
    """
    found, start = list[bytes | None](), 0
    for tensor in tensors:
        size = parameter(tensor, "binary_data_size")
        if size is None:
            found.append(None)
            continue
        if type(size) is not int or not 0 <= size <= len(tail) - start:
            left = len(tail) - start
            raise WireError(f"binary data is cut off: binary_data_size {str(size)[:20]} with {left:,} bytes left")
        found.append(tail[start : start + size])
        start += size
    return found


def pack(values: Sequence[Any], datatype: str) -> bytes:
    """Return elements as bytes: numbers in little-endian order, strings each after its length in four bytes."""
    if datatype == "BYTES":
        texts = [value.encode() for value in values]
        return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    return np.asarray(values, dtype=NUMBERS[datatype]).tobytes()


def unpack(content: bytes, datatype: str) -> np.ndarray | list[str]:
    """Return the elements of a binary tensor: an array of numbers, or a list of texts.

    Raises:
        WireError: an unknown datatype, truncated bytes, or strings that are not UTF-8.
    """
    if datatype == "BYTES":
        return _texts(content)
    kind = NUMBERS.get(datatype)
    if kind is None or len(content) % np.dtype(kind).itemsize:
        raise WireError(f"{len(content):,} bytes of {datatype[:20]!r} cannot be read")
    return np.frombuffer(content, dtype=kind)


def _texts(content: bytes) -> list[str]:
    found, start = [], 0
    while start < len(content):
        end = start + 4 + int.from_bytes(content[start : start + 4], "little")
        if end > len(content):
            raise WireError("a text that is cut off")
        try:
            found.append(content[start + 4 : end].decode("utf-8"))
        except UnicodeDecodeError:
            raise WireError("a string that is not UTF-8") from None
        start = end
    return found
