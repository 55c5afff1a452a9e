"""Open Inference Protocol v2, as KServe, MLServer, Triton and ``certify serve`` speak it: tensors in JSON or binary.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and its binary tensor extension;
the classification extension is Triton's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from certify.blackbox.protocols.parsing import (
    at,
    check_status,
    class_scores,
    flat,
    label,
    number,
    parse,
    ranked,
    read_json,
    versioned,
)
from certify.blackbox.protocols.tensors import DATATYPES, TensorInput, tensor_input
from certify.blackbox.types import BadReply, Format, Picture, Ranked, Reply, Request
from certify.errors import UserError

_LENGTH = "Inference-Header-Content-Length"
_FLOATS = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
_WHOLE = {
    f"{sign}INT{bits}": f"<{letter}{bits // 8}" for sign, letter in (("", "i"), ("U", "u")) for bits in (8, 16, 32, 64)
}


def v2(
    *,
    model: str,
    version: str = "",
    input: str = "input",
    output: str = "",
    datatype: str = "FP32",
    layout: str = "NCHW",
    mean: Any = 0.0,
    std: Any = 1.0,
    binary: bool = False,
    top: int = 0,
) -> Format:
    """The format; :func:`options_from` finds names, datatype and layout in the model's metadata.

    Args:
        model: its name on the server.
        version: of it; the server's choice where empty.
        input: name of the input tensor.
        output: name of the output tensor; where empty, the answer must have one only.
        datatype: ``FP32`` (pixels in [0, 1], less ``mean``, divided by ``std``) or ``UINT8``.
        layout: ``NCHW`` or ``NHWC``.
        mean: a number, or one a channel.
        std: likewise.
        binary: tensors as bytes after the JSON, both ways: smaller and faster where the server can.
        top: ask for so many best classes by Triton's classification extension, with their names; 0: for the tensor.

    Raises:
        UserError: an option that cannot be used.
    """
    tensor = tensor_input(datatype, layout, mean, std)
    if top < 0 or (top and not output):
        raise UserError(
            f"top {top}: expected 0, or more classes of an output that is named, as in output=probabilities"
        )
    about = {"model": model, "version": version, "input": input, "output": output, **tensor.about}
    return Format(
        "v2",
        lambda picture: _request(picture, f"v2/{versioned(model, version)}/infer", tensor, input, output, binary, top),
        lambda reply: read_answer(reply, output, bool(top)),
        {**about, "binary": binary, "top": top},
    )


DESCRIBED = ("input", "output", "datatype", "layout")
"""Options that a model's metadata gives where nobody else does."""


def metadata_request(model: str, version: str = "") -> Request:
    """Asks what the model takes and gives. It is no inference and holds no picture: no query."""
    return Request(b"", f"v2/{versioned(model, version)}", "GET")


def options_from(reply: Reply, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of :func:`v2`: those given, and what the metadata says about the others.

    Args:
        reply: to :func:`metadata_request`.
        given: by the user; they win.

    Raises:
        BadReply: not the metadata of a model.
        UserError: the model takes or gives what this format cannot, or it is not clear which.
    """
    body = read_json(reply)
    options = dict(given)
    inputs, outputs = (_named(at(body, key), key) for key in ("inputs", "outputs"))
    if "input" not in options:
        options["input"] = _only(inputs, "input", len(inputs) == 1)
    if "output" not in options and outputs:
        options["output"] = _only(outputs, "output", len(outputs) == 1)
    about = inputs.get(options["input"], {})
    if "datatype" not in options and "datatype" in about:
        if about["datatype"] not in DATATYPES:
            raise UserError(
                f"input {options['input']!r} of the model takes {about['datatype']}; expected one of "
                f"{', '.join(DATATYPES)}: give datatype to try one of these"
            )
        options["datatype"] = about["datatype"]
    shape = about.get("shape")
    if "layout" not in options and isinstance(shape, list) and len(shape) >= 3:
        first, last = (shape[-3] in (1, 3)), (shape[-1] in (1, 3))
        if first != last:  # else the shape does not tell
            options["layout"] = "NCHW" if first else "NHWC"
    return options


def _named(tensors: Any, key: str) -> dict[str, dict[str, Any]]:
    if not isinstance(tensors, list):
        raise BadReply(f"no list of {key} in the metadata")
    return {label(at(tensor, "name")): tensor for tensor in tensors}


def _only(tensors: Mapping[str, Any], what: str, clear: bool) -> str:
    if not clear:
        names = ", ".join(tensors) or "none"
        raise UserError(f"which {what} of the model is meant is not clear; it has {names}: give {what}=NAME")
    return next(iter(tensors))


def _request(
    picture: Picture, path: str, tensor: TensorInput, name: str, output: str, binary: bool, top: int
) -> Request:
    array = tensor.array(picture)
    head: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": tensor.datatype}
    wanted: dict[str, Any] = {"classification": top} if top else {}
    if binary:
        head["parameters"] = {"binary_data_size": array.nbytes}
        wanted["binary_data"] = True
    rest: dict[str, Any] = {}
    if output:
        rest["outputs"] = [{"name": output} | ({"parameters": wanted} if wanted else {})]
    elif binary:
        rest["parameters"] = {"binary_data_output": True}
    if binary:
        header = json.dumps({"inputs": [head], **rest}).encode()
        content = array.astype(array.dtype.newbyteorder("<")).tobytes()
        headers = {"Content-Type": "application/octet-stream", _LENGTH: str(len(header))}
        return Request(header + content, path, headers=headers)
    text = json.dumps(head)[:-1] + f', "data": {tensor.text(picture)}}}'
    tail = "".join(f', "{key}": {json.dumps(value)}' for key, value in rest.items())
    return Request(f'{{"inputs": [{text}]{tail}}}'.encode(), path, headers={"Content-Type": "application/json"})


def read_answer(reply: Reply, output: str = "", classified: bool = False) -> Ranked:
    """The label of an inference reply.

    A tensor of one whole number or one text is a label; floating scores ``(1, K)`` rank the K classes. Where the
    tensor or the reply has a parameter ``labels``, a list, class numbers become its names.

    Args:
        reply: of the server.
        output: name of the tensor; empty where there is one only.
        classified: whether elements are ``score:class:name`` of Triton's classification extension.

    Raises:
        BadReply: no such thing.
    """
    check_status(reply)
    body, tail = _split(reply)
    tensors = at(body, "outputs")
    if not isinstance(tensors, list) or not tensors:
        raise BadReply("no outputs in the reply")
    found, content = _chosen(tensors, tail, output)
    datatype = label(at(found, "datatype"))
    values = _values(found, datatype, content)
    if datatype == "BYTES":
        if classified:
            return _classified(values)
        if len(values) != 1:
            raise BadReply(f"{len(values)} texts; expected one label")
        return ranked(values)
    names = _parameter(found, "labels") or _parameter(body, "labels")
    if datatype in _FLOATS:
        return class_scores(values, names)
    if datatype not in _WHOLE or len(values) != 1:
        raise BadReply(f"{len(values)} values of {datatype[:20]!r}; expected one whole number, one text, or scores")
    number(values[0])
    return ranked([at(names, values[0]) if isinstance(names, list) and values[0] >= 0 else values[0]])


def _split(reply: Reply) -> tuple[Any, bytes]:
    """The JSON, and the bytes after it."""
    length = next((value for key, value in reply.headers.items() if key.lower() == _LENGTH.lower()), "")
    if not length:
        return parse(reply.body), b""
    if not length.isascii() or not length.isdigit() or len(length) > 12 or int(length) > len(reply.body):
        raise BadReply(f"{_LENGTH} is {length[:20]!r} and the reply has {len(reply.body)} bytes")
    return parse(reply.body[: int(length)]), reply.body[int(length) :]


def _chosen(tensors: list[Any], tail: bytes, output: str) -> tuple[dict[str, Any], bytes | None]:
    """The tensor that is meant, and its bytes: those of all tensors follow each other."""
    start, found = 0, []
    for tensor in tensors:
        name, size = label(at(tensor, "name")), _parameter(tensor, "binary_data_size")
        content = None
        if size is not None:
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(tail) - start:
                raise BadReply(f"output {name[:40]!r}: binary data is cut off")
            content = tail[start : start + size]
            start += size
        if name == output or not output:
            found.append((tensor, content))
    if len(found) != 1:
        names = ", ".join(repr(tensor["name"])[:40] for tensor in tensors[:8])
        raise BadReply(f"outputs {names} in the reply; expected {output or 'one, or output=NAME'}")
    return found[0]


def _parameter(holder: dict[str, Any], key: str) -> Any:
    parameters = holder.get("parameters")
    return parameters.get(key) if isinstance(parameters, dict) else None


def _values(tensor: dict[str, Any], datatype: str, content: bytes | None) -> list[Any]:
    """Its elements, as many as its shape says, of a batch of one."""
    shape = at(tensor, "shape")
    if not isinstance(shape, list) or not all(isinstance(s, int) and 0 <= s < 2**31 for s in shape):
        raise BadReply("a tensor without a shape")
    if len(shape) > 1 and shape[0] != 1:
        raise BadReply(f"a tensor of shape {shape[:8]}; expected a batch of one")
    if content is None:
        values = flat(at(tensor, "data"))
        if datatype in _WHOLE and not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise BadReply("a tensor of whole numbers that are none")
    elif datatype == "BYTES":
        values = _texts(content)
    else:
        kind = (_FLOATS | _WHOLE).get(datatype)
        if kind is None or len(content) % np.dtype(kind).itemsize:
            raise BadReply(f"{len(content)} bytes of {datatype[:20]!r} cannot be read")
        values = np.frombuffer(content, dtype=kind).tolist()
    if len(values) != math.prod(shape):
        raise BadReply(f"{len(values)} values in a tensor of shape {shape[:8]}")
    return values


def _texts(content: bytes) -> list[str]:
    """Elements of BYTES: four bytes of length, then the text."""
    found, start = [], 0
    while start < len(content):
        end = start + 4 + int.from_bytes(content[start : start + 4], "little")
        if end > len(content):
            raise BadReply("a text that is cut off")
        try:
            found.append(content[start + 4 : end].decode("utf-8"))
        except UnicodeDecodeError:
            raise BadReply("a label that is no Unicode text") from None
        start = end
    return found


def _classified(values: list[Any]) -> Ranked:
    labels: list[str] = []
    scores: list[float] = []
    for value in values:
        score, _, rest = str(value).partition(":")
        index, _, name = rest.partition(":")
        try:
            scores.append(float(score))
        except ValueError:
            raise BadReply("a text that is not score:class:name") from None
        labels.append(name or index)
    return ranked(labels, scores)
