"""Open Inference Protocol v2 as a server speaks it: bytes of a request -> images and wishes; answers -> bytes.

JSON tensors and the binary tensor extension; pure functions. Specification: the KServe project's
``specification/protocol/inference_rest.md`` and Triton's ``extension_binary_data.md``.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from certify import __version__
from certify.serve.limits import Limits, Refused, read_json
from certify.smoothing.rounding import exact, times

INPUT = "image"
VERSION = "1"
HEADER = "inference-header-content-length"
"""How many bytes of the body are JSON; the rest are binary tensors."""

EXTENSIONS = ("binary_tensor_data",)
ABSTAINED = "abstained"
"""The name in place of a class's name where the smoothed classifier abstains; its number is -1."""

_OUTPUTS: dict[str, tuple[str, str]] = {
    "label": ("INT64", "class, or -1 where it abstains"),
    "name": ("BYTES", f"the class's name, or {ABSTAINED}"),
    "radius": ("FP64", "certified radius in [0, 1] pixels; 0 where it abstains"),
    "p_lower": ("FP64", "lower bound of the class's probability under noise"),
    "outcome": ("BYTES", "certified or abstained; robust, not certifiable or undecided at a radius"),
    "samples": ("INT64", "noise samples that were labelled"),
    "failures": ("INT64", "samples that got no label"),
    "leading": ("INT64", "class with most votes, about which nothing is claimed"),
    "votes": ("INT64", "votes of each class; only where asked for"),
}
_TYPES = {"INT64": np.dtype("<i8"), "FP64": np.dtype("<f8")}
_INPUTS: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1")}
_WISHES = ("radius", "samples", "seed")
_LONGEST_ID = 1000  # characters: it is sent back
_CONVERTED = 2**16  # numbers that are converted at a time: no other thread runs meanwhile


@dataclass(frozen=True)
class Wishes:
    """What a request asks for in place of the server's own settings.

    Attributes:
        radius: decide at this one, in [0, 1] pixels.
        samples: estimation samples of each image; the most of them with a radius.
        seed: names another draw of the noise.
    """

    radius: float | None = None
    samples: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Asked:
    """A request as it was understood.

    Attributes:
        images: ``(B, C, H, W)``, float32 in [0, 1] or uint8.
        wishes: for each of them.
        id: to be sent back.
        outputs: names of those that are wanted, and whether in binary.
    """

    images: np.ndarray
    wishes: Wishes
    id: str | None
    outputs: Mapping[str, bool]


@dataclass(frozen=True)
class Answer:
    """What is known about one image; the fields are the outputs of this server."""

    label: int
    name: str
    radius: float
    p_lower: float
    outcome: str
    samples: int
    failures: int
    leading: int
    votes: tuple[int, ...] = field(repr=False)


def wishes_from(given: Mapping[str, Any]) -> Wishes:
    """The wishes among a request's parameters; numbers may come as text. Others are ignored, as the protocol has it.

    Raises:
        Refused: not a number of the right kind.
    """
    found: dict[str, Any] = {}
    for name in _WISHES:
        value = given.get(name)
        if value is None:
            continue
        least = {"radius": 0, "samples": 1, "seed": 0}[name]
        kind, what = (float, "a number") if name == "radius" else (int, "a whole number")
        try:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError
            number = kind(value)
            exact = isinstance(value, str) or number == value
            if not exact or not math.isfinite(number) or number < least or number >= 2**63:
                raise ValueError
        except (ValueError, OverflowError):
            raise Refused(400, f"parameter {name} {str(value)[:40]!r}: expected {what} from {least}") from None
        found[name] = number
    return Wishes(**found)


def read_request(body: bytes, header_length: str | None, size: tuple[int, int, int], limits: Limits) -> Asked:
    """The request of an inference.

    Args:
        body: all of it.
        header_length: the header ``HEADER``, if it came.
        size: (C, H, W) of every image.
        limits: on pixels and samples.

    Raises:
        Refused: anything that cannot be answered, with what was expected.
    """
    text, rest = _split(body, header_length)
    given = read_json(text, size, limits)
    if not isinstance(given, dict):
        raise Refused(400, f"the request is a JSON {_kind(given)}; expected an object with 'inputs'")
    inputs = given.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Refused(400, f"'inputs' must be a list of one tensor, {INPUT!r} of shape {_shape(size)}")
    identity = given.get("id")
    if identity is not None and not isinstance(identity, str):
        raise Refused(400, f"'id' is a {_kind(identity)}; expected a string")
    if identity is not None and len(identity) > _LONGEST_ID:
        raise Refused(400, f"'id' has {len(identity):,} characters; expected at most {_LONGEST_ID:,}")
    parameters = _parameters(given, "the request")
    images = _tensor(inputs[0], rest, size, limits)
    return Asked(images, wishes_from(parameters), identity, _outputs(given.get("outputs"), parameters))


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    if header_length is None:
        return body, b""
    if not re.fullmatch("[0-9]{1,18}", header_length) or int(header_length) > len(body):
        raise Refused(400, f"{HEADER} {header_length[:20]!r}: expected the JSON's length, at most that of the body")
    return body[: int(header_length)], body[int(header_length) :]


def _kind(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), "null")


def _shape(size: Sequence[int]) -> str:
    return "[-1, " + ", ".join(map(str, size)) + "]"


def _parameters(given: Mapping[str, Any], whose: str) -> Mapping[str, Any]:
    found = given.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise Refused(400, f"'parameters' of {whose} is a {_kind(found)}; expected an object")
    return found


def _tensor(tensor: Mapping[str, Any], rest: bytes, size: tuple[int, int, int], limits: Limits) -> np.ndarray:
    """The one input as ``(B, C, H, W)``: float32 in [0, 1], or uint8."""
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if not isinstance(datatype, str) or datatype not in _INPUTS:
        raise Refused(400, f"datatype {str(datatype)[:20]!r}: expected FP32 in [0, 1] or UINT8")
    whole = isinstance(shape, list) and len(shape) == 4 and all(type(n) is int and 0 < n < 2**31 for n in shape)
    if not whole or tuple(shape[1:]) != size:  # type: ignore[index]
        raise Refused(400, f"shape {str(shape)[:60]}: expected {_shape(size)}, at least one image")
    assert isinstance(shape, list)
    if shape[0] > limits.max_images and shape[0] * size[1] * size[2] <= limits.max_pixels:
        raise Refused(413, f"{shape[0]:,} images; a request may have {limits.max_images:,}", "too large")
    if shape[0] * size[1] * size[2] > limits.max_pixels:
        raise Refused(413, f"{shape[0]:,} images have more than {limits.max_pixels:,} pixels, the limit", "too large")
    expected = math.prod(shape)
    binary = _parameters(tensor, "the input").get("binary_data_size")
    values = _binary(binary, rest, tensor, datatype, expected) if binary is not None else None
    if values is None:
        if rest:
            raise Refused(400, f"{len(rest):,} bytes follow the JSON, but the input has no 'binary_data_size'")
        values = _listed(tensor.get("data"), datatype, expected, shape)
    if datatype == "FP32":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0.0 and high <= 1.0):  # NaN is refused too
            raise Refused(400, f"values from {exact(low)} to {exact(high)}: expected [0, 1], before any normalisation")
    return values.reshape(shape)


def _binary(stated: Any, rest: bytes, tensor: Mapping[str, Any], datatype: str, expected: int) -> np.ndarray:
    length = expected * _INPUTS[datatype].itemsize
    if "data" in tensor:
        raise Refused(400, "the input has both 'data' and 'binary_data_size'; expected one")
    if type(stated) is not int or stated != length or len(rest) != length:
        raise Refused(
            400,
            f"binary_data_size {str(stated)[:20]} with {len(rest):,} bytes after the JSON: the shape needs "
            f"{length:,} bytes of {datatype} ({HEADER} says where they begin)",
        )
    return np.frombuffer(rest, dtype=_INPUTS[datatype]).astype(np.float32 if datatype == "FP32" else np.uint8)


def _listed(data: Any, datatype: str, expected: int, shape: Sequence[int]) -> np.ndarray:
    """The values of a JSON list, flat or nested as the shape.

    Looked at one by one: numpy would give every element the room of the longest string among them.
    """
    if not isinstance(data, list):
        raise Refused(400, f"'data' is a {_kind(data)}; expected a list of {expected:,} numbers")
    level, wanted = data, f"{expected:,} numbers of shape {list(shape)}"
    if data and isinstance(data[0], list):
        level = [data]
        for length in shape:
            if any(type(row) is not list or len(row) != length for row in level):
                raise Refused(400, f"'data' is not one tensor; expected the {wanted}, flat or nested")
            level = list(itertools.chain.from_iterable(level))
    if len(level) != expected or any(type(value) not in (int, float) for value in level):
        raise Refused(400, f"'data' is a list of {len(data):,} and holds other than the {wanted}")
    if datatype == "UINT8":
        if any(type(value) is not int or not 0 <= value <= 255 for value in level):
            raise Refused(400, "UINT8 values: expected whole numbers from 0 to 255")
        return np.array(level, dtype=np.uint8)
    values = np.empty(expected)
    try:
        for start in range(0, expected, _CONVERTED):
            values[start : start + _CONVERTED] = level[start : start + _CONVERTED]
        with np.errstate(over="ignore"):  # becomes infinite, which is refused
            return values.astype(np.float32)
    except OverflowError:  # a whole number of hundreds of digits
        raise Refused(400, "values beyond 1e308: expected [0, 1], before any normalisation") from None


def _outputs(wanted: Any, parameters: Mapping[str, Any]) -> dict[str, bool]:
    """The outputs that are wanted, and whether in binary."""
    everywhere = parameters.get("binary_data_output") is True
    if wanted is None or wanted == []:
        return {name: everywhere for name in _OUTPUTS if name != "votes"}
    found: dict[str, bool] = {}
    if not isinstance(wanted, list) or len(wanted) > len(_OUTPUTS):
        raise Refused(400, f"'outputs': expected a list of some of {', '.join(_OUTPUTS)}")
    for output in wanted:
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str) or name not in _OUTPUTS:
            raise Refused(400, f"output {str(name)[:40]!r}: expected one of {', '.join(_OUTPUTS)}")
        binary = _parameters(output, f"output {name}").get("binary_data")
        found[name] = everywhere if binary is None else binary is True
    return found


def write_response(
    model: str, asked: Asked, answers: Sequence[Answer], about: Mapping[str, Any]
) -> tuple[bytes, dict[str, str]]:
    """Return the body of a response and its headers.

    Its parameters give the totals of samples, failures and abstentions, the failure probability ``alpha`` of each
    image's statement, and ``alpha_all``, that of all statements of this response together: at most ``alpha`` times the
    number of images. Radius and p_lower stand there only where they are about the one image of the request; a number
    about several images beside ``alpha`` would read as a joint statement at that level.
    """
    outputs, tail = list[str](), bytearray()
    for name, binary in asked.outputs.items():
        datatype = _OUTPUTS[name][0]
        values = [getattr(answer, name) for answer in answers]
        shape = [len(answers), len(answers[0].votes)] if name == "votes" else [len(answers)]
        rows = values if name == "votes" else [values]
        head = json.dumps({"name": name, "datatype": datatype, "shape": shape})[:-1]
        if binary:
            raw = b"".join(_raw(row, datatype) for row in rows)
            outputs.append(f'{head}, "parameters": {{"binary_data_size": {len(raw)}}}}}')
            tail += raw
        else:  # row by row, so that other threads run in between
            outputs.append(f'{head}, "data": [{", ".join(json.dumps(row)[1:-1] for row in rows)}]}}')
    claimed = {
        **({"radius": answers[0].radius, "p_lower": answers[0].p_lower} if len(answers) == 1 else {}),
        "samples": sum(answer.samples for answer in answers),
        "failures": sum(answer.failures for answer in answers),
        "abstentions": sum(answer.label < 0 for answer in answers),
    }
    response: dict[str, Any] = {"model_name": model, "model_version": VERSION}
    response |= {"id": asked.id} if asked.id is not None else {}
    together = {"alpha_all": min(1.0, times(about["alpha"], len(answers)))}
    response |= {"parameters": {**claimed, **about, **together}}
    text = f'{json.dumps(response)[:-1]}, "outputs": [{", ".join(outputs)}]}}'.encode()
    if not tail:
        return text, {"content-type": "application/json"}
    return text + bytes(tail), {"content-type": "application/octet-stream", HEADER: str(len(text))}


def _raw(values: Sequence[Any], datatype: str) -> bytes:
    if datatype == "BYTES":
        texts = [value.encode() for value in values]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return np.asarray(values, dtype=_TYPES[datatype]).tobytes()


def server_metadata() -> dict[str, Any]:
    """What ``GET /v2`` says."""
    return {"name": "certify", "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(model: str, size: Sequence[int], num_classes: int, about: Mapping[str, Any]) -> dict[str, Any]:
    """What ``GET /v2/models/NAME`` says."""
    return {
        "name": model,
        "versions": [VERSION],
        "platform": "certify",
        "inputs": [
            {
                "name": INPUT,
                "datatype": "FP32",
                "shape": [-1, *size],
                "parameters": {"content": "pixels in [0, 1] before normalisation; UINT8 from 0 to 255 is taken too"},
            }
        ],
        "outputs": [
            {
                "name": name,
                "datatype": datatype,
                "shape": [-1, num_classes] if name == "votes" else [-1],
                "parameters": {"content": content},
            }
            for name, (datatype, content) in _OUTPUTS.items()
        ],
        "parameters": dict(about),
    }
