"""Server side of the Open Inference Protocol v2: requests, responses and metadata.

The wire format is :mod:`certify.blackbox.protocols.v2_codec`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pydantic_core import from_json

from certify import __version__
from certify.blackbox.protocols.v2_codec import (
    LENGTH_HEADER,
    Tensor,
    WireError,
    binary_contents,
    pack,
    parameter,
    split_message,
    unpack,
    write_message,
)
from certify.serve.admission import Limits, Refused
from certify.smoothing.rounding import exact, times

INPUT, VERSION = "image", "1"
EXTENSIONS = ("binary_tensor_data",)
ABSTAINED = "abstained"
"""Class name in the response if the smoothed classifier abstains; the label is -1."""

ONE_COPY = "one noisy copy"
"""The outcome of a label that nothing is claimed about."""

STATEMENT = (
    "The label is that of one fresh noisy copy of the image, so another request may get another label. Nothing is "
    "guaranteed for a single answer. Over many images, `certify accuracy` bounds the expected accuracy under attack"
)
"""The statement of a server that answers from one noisy copy."""

_OUTPUTS: dict[str, tuple[str, str]] = {
    "label": ("INT64", "class, or -1 for an abstention"),
    "name": ("BYTES", f"name of the class, or {ABSTAINED}"),
    "radius": ("FP64", "certified radius in [0, 1] pixels; 0 for an abstention"),
    "p_lower": ("FP64", "lower bound of the probability of the class under noise"),
    "outcome": ("BYTES", "certified or abstained; robust, not certifiable or undecided at a radius; one noisy copy"),
    "samples": ("INT64", "noise samples that were labelled"),
    "failures": ("INT64", "samples without a label"),
    "leading": ("INT64", "class with most votes; nothing is claimed about it"),
    "votes": ("INT64", "votes of each class; only on request"),
}
_INPUTS = {"FP32": np.float32, "UINT8": np.uint8}
_MINIMA = {"radius": 0, "samples": 1, "seed": 0}
_MAX_ID = 1000  # characters; the id is returned in the response
_CHUNK = 2**16  # numbers converted at a time, which blocks all other threads
_OVERHEAD = 1000  # maximum number of lists, objects and members of a request outside its tensor


@dataclass(frozen=True)
class Stated:
    """Settings of the server, included in every response.

    Attributes:
        sigma: standard deviation of the noise, in [0, 1] pixels.
        noise: name of its distribution.
        norm: of the radii.
        alpha: failure probability of the answer for one image; None where nothing is claimed about one.
        denoiser: its name, or ``none``.
        input: size of the classifier's input, such as ``3x224x224``.
        statement: what is claimed instead; empty if each answer has its own certificate.
    """

    sigma: float
    noise: str
    norm: str
    alpha: float | None
    denoiser: str
    input: str
    statement: str = ""

    def parameters(self) -> dict[str, float | str]:
        """Return the settings that apply, as in metadata and responses."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


@dataclass(frozen=True)
class RequestOptions:
    """Options of a request that override the server's settings.

    Attributes:
        radius: radius at which to decide, in the scale of [0, 1] pixels.
        samples: estimation samples per image; the maximum with a radius.
        seed: selects another draw of the noise.
    """

    radius: float | None = None
    samples: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class InferenceRequest:
    """A parsed request.

    Attributes:
        images: ``(B, C, H, W)``, float32 in [0, 1] or uint8.
        options: options for all images.
        id: request id, returned in the response.
        outputs: maps names of requested outputs to True for binary.
    """

    images: np.ndarray
    options: RequestOptions
    id: str | None = None
    outputs: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The answer for one image; its fields are the server's outputs."""

    label: int
    name: str
    radius: float
    p_lower: float
    outcome: str
    samples: int
    failures: int
    leading: int
    votes: tuple[int, ...] = field(repr=False)


def parse_options(parameters: Mapping[str, Any]) -> RequestOptions:
    """Read the options among a request's parameters; numbers may be strings, other parameters are ignored.

    Raises:
        Refused: not a number of the right kind.
    """
    options: dict[str, Any] = {}
    for name, minimum in _MINIMA.items():
        value = parameters.get(name)
        if value is None:
            continue
        kind, expected = (float, "a number") if name == "radius" else (int, "a whole number")
        try:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError
            number = kind(value)
            lossless = isinstance(value, str) or number == value
            if not lossless or not math.isfinite(number) or not minimum <= number < 2**63:
                raise ValueError
        except (ValueError, OverflowError):
            raise Refused(400, f"parameter {name} {str(value)[:40]!r}: expected {expected} from {minimum}") from None
        options[name] = number
    return RequestOptions(**options)


def read_request(
    body: bytes, headers: Mapping[str, str], size: tuple[int, int, int], limits: Limits
) -> InferenceRequest:
    """Parse an inference request.

    Args:
        body: the whole body.
        headers: HTTP headers.
        size: (C, H, W) of every image.
        limits: limits on images and pixels.

    Raises:
        Refused: the request is invalid.
    """
    try:
        text, tail = split_message(body, headers)
        message = read_json(text, size, limits)
        return _parse(message, tail, size, limits)
    except WireError as error:
        raise Refused(400, str(error)) from None


def read_json(text: bytes, size: Sequence[int], limits: Limits) -> Any:
    """Parse JSON, after checking that it has no more values than the largest valid request.

    The parser creates an object per value and blocks all other threads, so delimiters are counted first, including
    those inside strings.

    Args:
        text: JSON in UTF-8.
        size: (C, H, W) of the images.
        limits: limits on the number of images.

    Raises:
        Refused: not JSON, nested too deeply for the parser (about 200 levels), or more values than a request needs.
    """
    channels, height, width = size
    images = limits.most_images(size)
    lists = images * (1 + channels * (1 + height)) + _OVERHEAD
    for what, count, most in (
        ("lists and objects", text.count(b"[") + text.count(b"{"), lists),
        ("values", text.count(b","), images * channels * height * width + lists),
        ("members of objects", text.count(b":"), _OVERHEAD),
    ):
        if count > most:
            raise Refused(
                413, f"the JSON has more than {most:,} {what}, more than any valid request needs", "too large"
            )
    try:
        return from_json(text)
    except ValueError as error:
        raise Refused(400, f"the body is not JSON that can be read: {str(error)[:120]}") from None


def _parse(message: Any, tail: bytes, size: tuple[int, int, int], limits: Limits) -> InferenceRequest:
    if not isinstance(message, dict):
        raise Refused(400, f"the request is a JSON {_kind(message)}; expected an object with 'inputs'")
    inputs, identity = message.get("inputs"), message.get("id")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Refused(400, f"'inputs' must be a list of one tensor, {INPUT!r} of shape {_shape(size)}")
    if identity is not None and not isinstance(identity, str):
        raise Refused(400, f"'id' is a {_kind(identity)}; expected a string")
    if identity is not None and len(identity) > _MAX_ID:
        raise Refused(400, f"'id' has {len(identity):,} characters; expected at most {_MAX_ID:,}")
    for holder, whose in ((message, "the request"), (inputs[0], "the input")):
        _check_parameters(holder, whose)
    images = _images(inputs[0], tail, size, limits)
    return InferenceRequest(images, parse_options(message.get("parameters") or {}), identity, _requested(message))


def _kind(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), "null")


def _shape(size: Sequence[int]) -> str:
    return "[-1, " + ", ".join(map(str, size)) + "]"


def _check_parameters(holder: Mapping[str, Any], whose: str) -> None:
    if not isinstance(parameters := holder.get("parameters"), dict | None):
        raise Refused(400, f"'parameters' of {whose} is a {_kind(parameters)}; expected an object")


def _images(tensor: Mapping[str, Any], tail: bytes, size: tuple[int, int, int], limits: Limits) -> np.ndarray:
    """Return the input as ``(B, C, H, W)``: float32 in [0, 1], or uint8."""
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if not isinstance(datatype, str) or datatype not in _INPUTS:
        raise Refused(400, f"datatype {str(datatype)[:20]!r}: expected FP32 in [0, 1] or UINT8")
    valid = isinstance(shape, list) and len(shape) == 4 and all(type(n) is int and 0 < n < 2**31 for n in shape)
    if not isinstance(shape, list) or not valid or tuple(shape[1:]) != size:
        raise Refused(400, f"shape {str(shape)[:60]}: expected {_shape(size)}, at least one image")
    if shape[0] > (most := limits.most_images(size)):
        raise Refused(
            413, f"{shape[0]:,} images; a request may have {most:,} of {size[1]}x{size[2]} pixels", "too large"
        )
    if parameter(tensor, "binary_data_size") is not None:
        values = _binary_values(tensor, tail, datatype, math.prod(shape))
    elif tail:
        raise Refused(400, f"{len(tail):,} bytes follow the JSON, but the input has no 'binary_data_size'")
    else:
        values = _listed_values(tensor.get("data"), datatype, shape)
    if datatype == "FP32":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0.0 and high <= 1.0):  # rejects NaN, too
            raise Refused(400, f"values from {exact(low)} to {exact(high)}: expected [0, 1], before any normalisation")
    return values.reshape(shape)


def _binary_values(tensor: Mapping[str, Any], tail: bytes, datatype: str, count: int) -> np.ndarray:
    if "data" in tensor:
        raise Refused(400, "the input has both 'data' and 'binary_data_size'; expected one")
    expected = count * np.dtype(_INPUTS[datatype]).itemsize
    stated = parameter(tensor, "binary_data_size")
    if type(stated) is not int or stated != expected or len(tail) != expected:
        raise Refused(
            400,
            f"binary_data_size {str(stated)[:20]} with {len(tail):,} bytes after the JSON: the shape needs "
            f"{expected:,} bytes of {datatype} ({LENGTH_HEADER} says where they begin)",
        )
    (content,) = binary_contents([tensor], tail)
    return np.asarray(unpack(content or b"", datatype)).astype(_INPUTS[datatype])


def _listed_values(data: Any, datatype: str, shape: Sequence[int]) -> np.ndarray:
    """Return the values of a JSON list, flat or nested like the shape.

    Elements are checked one by one, since NumPy would allocate the length of the longest string for each of them.
    """
    count = math.prod(shape)
    if not isinstance(data, list):
        raise Refused(400, f"'data' is a {_kind(data)}; expected a list of {count:,} numbers")
    level, expected = data, f"{count:,} numbers of shape {list(shape)}"
    if data and isinstance(data[0], list):
        level = [data]
        for length in shape:
            if any(type(row) is not list or len(row) != length for row in level):
                raise Refused(400, f"'data' is not one tensor; expected {expected}, flat or nested")
            level = list(itertools.chain.from_iterable(level))
    if len(level) != count or any(type(value) not in (int, float) for value in level):
        raise Refused(400, f"'data' is a list of {len(data):,} elements; expected {expected}")
    if datatype == "UINT8":
        if any(type(value) is not int or not 0 <= value <= 255 for value in level):
            raise Refused(400, "UINT8 values: expected whole numbers from 0 to 255")
        return np.array(level, dtype=np.uint8)
    values = np.empty(count)
    try:
        for start in range(0, count, _CHUNK):
            values[start : start + _CHUNK] = level[start : start + _CHUNK]
        with np.errstate(over="ignore"):  # becomes infinite, which is rejected
            return values.astype(np.float32)
    except OverflowError:  # a whole number with hundreds of digits
        raise Refused(400, "values beyond 1e308: expected [0, 1], before any normalisation") from None


def _requested(message: Mapping[str, Any]) -> dict[str, bool]:
    """Return a mapping from the names of requested outputs to True for binary."""
    everywhere, outputs = parameter(message, "binary_data_output") is True, message.get("outputs")
    if outputs is None or outputs == []:
        return {name: everywhere for name in _OUTPUTS if name != "votes"}
    if not isinstance(outputs, list) or len(outputs) > len(_OUTPUTS):
        raise Refused(400, f"'outputs': expected a list of some of {', '.join(_OUTPUTS)}")
    requested: dict[str, bool] = {}
    for output in outputs:
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str) or name not in _OUTPUTS:
            raise Refused(400, f"output {str(name)[:40]!r}: expected one of {', '.join(_OUTPUTS)}")
        _check_parameters(output, f"output {name}")
        binary = parameter(output, "binary_data")
        requested[name] = everywhere if binary is None else binary is True
    return requested


def write_response(
    model: str, request: InferenceRequest, answers: Sequence[Answer], about: Stated
) -> tuple[bytes, dict[str, str]]:
    """Return the body of a response and its headers.

    Its parameters are the totals of samples, failures and abstentions, the failure probability ``alpha`` per image, and
    ``alpha_all``, a bound on that of all statements in the response jointly: ``alpha`` times the number of images.
    Radius and p_lower are included only for a single image; for several they would read as a joint statement at
    ``alpha``.
    """
    alone = len(answers) == 1 and about.alpha is not None
    claimed = {
        **({"radius": answers[0].radius, "p_lower": answers[0].p_lower} if alone else {}),
        "samples": sum(answer.samples for answer in answers),
        "failures": sum(answer.failures for answer in answers),
        "abstentions": sum(answer.label < 0 for answer in answers),
    }
    together = {} if about.alpha is None else {"alpha_all": min(1.0, times(about.alpha, len(answers)))}
    head: dict[str, Any] = {"model_name": model, "model_version": VERSION}
    head |= {"id": request.id} if request.id is not None else {}
    head |= {"parameters": {**claimed, **about.parameters(), **together}}
    return write_message("outputs", [*_output_tensors(request.outputs, answers)], before=head)


def _output_tensors(outputs: Mapping[str, bool], answers: Sequence[Answer]) -> Iterator[Tensor]:
    for name, binary in outputs.items():
        datatype = _OUTPUTS[name][0]
        values = [getattr(answer, name) for answer in answers]
        rows, shape = ([values], [len(values)]) if name != "votes" else (values, [len(values), len(values[0])])
        if binary:
            yield Tensor(name, datatype, shape, b"".join(pack(row, datatype) for row in rows))
        elif name != "votes":
            yield Tensor(name, datatype, shape, values)
        else:  # row by row, so that other threads can run in between
            yield Tensor(name, datatype, shape, f"[{', '.join(json.dumps(row)[1:-1] for row in rows)}]")


def server_metadata() -> dict[str, Any]:
    """Return the response to ``GET /v2``."""
    return {"name": "certify", "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(model: str, size: Sequence[int], num_classes: int, about: Stated) -> dict[str, Any]:
    """Return the response to ``GET /v2/models/NAME``."""
    content = "pixels in [0, 1] before normalisation; UINT8 from 0 to 255 is accepted, too"
    outputs = [
        {
            "name": name,
            "datatype": datatype,
            "shape": [-1, num_classes] if name == "votes" else [-1],
            "parameters": {"content": described} | ({"abstention": ABSTAINED} if name == "name" else {}),
        }
        for name, (datatype, described) in _OUTPUTS.items()
    ]
    return {
        "name": model,
        "versions": [VERSION],
        "platform": "certify",
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *size], "parameters": {"content": content}}],
        "outputs": outputs,
        "parameters": about.parameters(),
    }
