"""Open Inference Protocol v2 as a client of KServe, MLServer, Triton or ``certify serve``.

The wire format is :mod:`certify.blackbox.protocols.v2_codec`; the classification extension is Triton's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from certify.blackbox.answers import ABSTENTION
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
from certify.blackbox.protocols.v2_codec import (
    FLOATS,
    INTEGERS,
    Tensor,
    WireError,
    binary_contents,
    parameter,
    split_message,
    unpack,
    write_message,
)
from certify.blackbox.types import BadReply, Format, Picture, Ranked, Reply, Request
from certify.errors import UserError


def v2(
    *,
    model: str = "",
    version: str = "",
    input: str = "input",
    output: str = "",
    datatype: str = "FP32",
    layout: str = "NCHW",
    mean: Any = 0.0,
    std: Any = 1.0,
    binary: bool = False,
    top: int = 0,
    abstention: str = "",
) -> Format:
    """Return the format of protocol v2; :func:`options_from` completes options from the model's metadata.

    Args:
        model: model name on the server; if empty, the only one that the server lists.
        version: model version; empty for the server's choice.
        input: name of the input tensor.
        output: name of the output tensor; if empty, the reply must have exactly one.
        datatype: ``FP32`` (pixels in [0, 1], minus ``mean``, divided by ``std``) or ``UINT8``.
        layout: ``NCHW`` or ``NHWC``.
        mean: one number, or one per channel.
        std: one number, or one per channel.
        binary: send and request tensors as bytes after the JSON: smaller and faster, if the server supports it.
        top: number of best classes, with their names, to request by Triton's classification extension; 0 requests the
            tensor.
        abstention: output value with which the service abstains; empty if it never does.

    Raises:
        UserError: an unusable option.
    """
    tensor = tensor_input(datatype, layout, mean, std)
    if top < 0 or (top and not output):
        raise UserError(
            f"top {top}: expected 0, or more classes of an output that is named, as in output=probabilities"
        )
    about = {"model": model, "version": version, "input": input, "output": output, **tensor.about}
    about |= {"abstention": abstention} if abstention else {}

    def read(reply: Reply) -> Ranked:
        answer = read_answer(reply, output, bool(top))
        return ranked([ABSTENTION]) if abstention and answer[0].label == abstention else answer

    return Format(
        "v2",
        lambda picture: _request(picture, f"v2/{versioned(model, version)}/infer", tensor, input, output, binary, top),
        read,
        {**about, "binary": binary, "top": top},
    )


DESCRIBED = ("model", "input", "output", "datatype", "layout")
"""Options read from the model's metadata unless given."""

RECORDED = (*DESCRIBED, "abstention")
"""Options that a ledger's header records for resuming."""


def index_request() -> Request:
    """Return the request for the list of models (Triton's repository extension). It is not a query."""
    return Request(b"{}", "v2/repository/index", headers={"Content-Type": "application/json"})


def only_model(reply: Reply) -> str:
    """Return the name of the only model of a server.

    Args:
        reply: reply to :func:`index_request`.

    Raises:
        UserError: no list of models, or not exactly one model.
    """
    try:
        models = read_json(reply)
        names = sorted({label(at(model, "name")) for model in models}) if isinstance(models, list) else []
    except BadReply as error:
        raise UserError(
            f"the server does not list its models as v2 servers do ({error}); give the protocol option model=NAME, or "
            "another protocol (`certify list protocols`)"
        ) from None
    if len(names) != 1:
        raise UserError(f"the server has the models {', '.join(names) or 'none'}: give the protocol option model=NAME")
    return names[0]


def metadata_request(model: str, version: str = "") -> Request:
    """Return the request for the model's metadata. It is not a query: it contains no picture."""
    return Request(b"", f"v2/{versioned(model, version)}", "GET")


def options_from(reply: Reply, given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete options of :func:`v2` with the model's metadata.

    Args:
        reply: reply to :func:`metadata_request`.
        given: options given by the user, which take precedence.

    Raises:
        BadReply: not the metadata of a model.
        UserError: an input or output that this format does not support, or several to choose from.
    """
    body = read_json(reply)
    options = dict(given)
    inputs, outputs = (_named(at(body, key), key) for key in ("inputs", "outputs"))
    if "input" not in options:
        options["input"] = _only(inputs, "input", len(inputs) == 1)
    abstaining = {name: text for name, tensor in outputs.items() if (text := parameter(tensor, "abstention"))}
    if "output" not in options and outputs:
        best = abstaining or outputs  # a smoothed classifier has other outputs beside its label
        options["output"] = _only(best, "output", len(best) == 1)
    if options.get("output") in abstaining:
        options["abstention"] = label(abstaining[options["output"]])
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
        if first != last:  # otherwise the shape is ambiguous
            options["layout"] = "NCHW" if first else "NHWC"
    return options


def _named(tensors: Any, key: str) -> dict[str, dict[str, Any]]:
    if not isinstance(tensors, list):
        raise BadReply(f"no list of {key} in the metadata")
    return {label(at(tensor, "name")): tensor for tensor in tensors}


def _only(tensors: Mapping[str, Any], what: str, clear: bool) -> str:
    if not clear:
        names = ", ".join(tensors) or "none"
        raise UserError(f"the model has no single {what}; it has {names}: give {what}=NAME")
    return next(iter(tensors))


def _request(
    picture: Picture, path: str, tensor: TensorInput, name: str, output: str, binary: bool, top: int
) -> Request:
    array = tensor.array(picture)
    content = array.astype(array.dtype.newbyteorder("<")).tobytes() if binary else tensor.text(picture)
    wanted = ({"classification": top} if top else {}) | ({"binary_data": True} if binary else {})
    rest: dict[str, Any] = {}
    if output:
        rest["outputs"] = [{"name": output} | ({"parameters": wanted} if wanted else {})]
    elif binary:
        rest["parameters"] = {"binary_data_output": True}
    body, headers = write_message("inputs", [Tensor(name, tensor.datatype, array.shape, content)], after=rest)
    return Request(body, path, headers=headers)


def read_answer(reply: Reply, output: str = "", classified: bool = False) -> Ranked:
    """Return the labels of an inference reply, best first.

    A tensor of one integer or one string is a label, a negative integer an abstention; floating-point scores ``(1, K)``
    rank the K classes. A parameter ``labels`` of the tensor or the reply, a list, names the classes.

    Args:
        reply: the server's reply.
        output: name of the tensor; empty if there is exactly one.
        classified: True if elements are ``score:class:name`` of Triton's classification extension.

    Raises:
        BadReply: no such tensor, or not a message of the protocol.
    """
    check_status(reply)
    try:
        found, content, names = _chosen(reply, output)
        datatype = label(at(found, "datatype"))
        values = _values(found, datatype, content)
    except WireError as error:
        raise BadReply(str(error)) from None
    if datatype == "BYTES":
        if classified:
            return _classified(values)
        if len(values) != 1:
            raise BadReply(f"{len(values)} texts; expected one label")
        return ranked(values)
    if datatype in FLOATS:
        return class_scores(values, names)
    if datatype not in INTEGERS or len(values) != 1:
        raise BadReply(f"{len(values)} values of {datatype[:20]!r}; expected one whole number, one text, or scores")
    number(values[0])
    if values[0] < 0:  # `certify serve` abstains with -1
        return ranked([ABSTENTION])
    return ranked([at(names, values[0]) if isinstance(names, list) else values[0]])


def _chosen(reply: Reply, output: str) -> tuple[dict[str, Any], bytes | None, Any]:
    """Return the requested tensor of a reply, its bytes (None if it is in JSON), and the class names, if any.

    Raises:
        BadReply: no such tensor.
        WireError: not a message of the protocol.
    """
    text, tail = split_message(reply.body, reply.headers)
    body = parse(text)
    tensors = at(body, "outputs")
    if not isinstance(tensors, list) or not tensors:
        raise BadReply("no outputs in the reply")
    names = [label(at(tensor, "name")) for tensor in tensors]
    contents = binary_contents(tensors, tail)
    found = [i for i, name in enumerate(names) if name == output or not output]
    if len(found) != 1:
        there = ", ".join(repr(name)[:40] for name in names[:8])
        raise BadReply(f"outputs {there} in the reply; expected {output or 'one, or output=NAME'}")
    tensor = tensors[found[0]]
    return tensor, contents[found[0]], parameter(tensor, "labels") or parameter(body, "labels")


def _values(tensor: dict[str, Any], datatype: str, content: bytes | None) -> list[Any]:
    """Return the elements of a tensor with a batch of one, checked against its shape."""
    shape = at(tensor, "shape")
    if not isinstance(shape, list) or not all(isinstance(s, int) and 0 <= s < 2**31 for s in shape):
        raise BadReply("a tensor without a shape")
    if len(shape) > 1 and shape[0] != 1:
        raise BadReply(f"a tensor of shape {shape[:8]}; expected a batch of one")
    if content is None:
        values = flat(at(tensor, "data"))
        if datatype in INTEGERS and not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise BadReply("a tensor of whole numbers that are none")
    else:
        unpacked = unpack(content, datatype)
        values = unpacked if isinstance(unpacked, list) else unpacked.tolist()
    if len(values) != math.prod(shape):
        raise BadReply(f"{len(values)} values in a tensor of shape {shape[:8]}")
    return values


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
