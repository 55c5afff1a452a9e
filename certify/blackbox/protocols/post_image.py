"""POST an image (as body, form file or base64 in JSON) and extract labels from the JSON reply by JMESPath."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from certify.blackbox.client.credentials import secret_name
from certify.blackbox.encoding import encode, media_type
from certify.blackbox.protocols.parsing import class_scores, json_request, one_of, ranked, read_json
from certify.blackbox.types import BadReply, Format, Picture, Ranked, Reply, Request
from certify.errors import UserError, first_line

_ENCODINGS = ("raw", "multipart", "base64")


def post_image(
    *,
    labels: str = "",
    scores: str = "",
    send: str = "base64",
    key: str = "image",
    path: str = "",
    percent: bool = False,
    encoding: str = "png",
) -> Format:
    """Return the format of a service that takes an image by POST and returns JSON.

    Args:
        labels: JMESPath expression (jmespath.org) for the label, a string or integer, or a list of labels, best first;
            if empty, the labels are the indices of the scores.
        scores: expression for as many scores, which then determine the order.
        send: ``raw`` (the body is the image file), ``multipart`` (a form with one file) or ``base64`` (in JSON).
        key: name of the file in the form, or of the base64 string in the JSON object.
        path: path appended to the endpoint's URL; stored in the ledger.
        percent: True if scores are percentages.
        encoding: encoding of pictures: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: no expression, one that cannot be parsed, or another invalid option.
    """
    one_of("send", send, _ENCODINGS)
    if not labels and not scores:
        raise UserError("protocol json needs --protocol-option labels=<JMESPath>, such as labels=predictions[0].name")
    if not re.fullmatch(r"[^\"\\\r\n]+", key):
        raise UserError(f"key {key!r}; expected a name without quotation marks, such as image")
    if (named := secret_name(urlsplit(path).query)) is not None:
        raise UserError(
            f"the query of path holds {named!r}, which looks like a key; expected it by --api-key-env and --auth-query"
        )
    find_labels, find_scores = _finder("labels", labels), _finder("scores", scores)
    kind = media_type(encoding)

    def request(picture: Picture) -> Request:
        content = encode(picture, encoding)
        if send == "raw":
            return Request(content, path, headers={"Content-Type": kind})
        if send == "multipart":
            return _form(content, path, key, kind)
        return json_request(path, {key: base64.b64encode(content).decode()})

    def reply(reply: Reply) -> Ranked:
        body = read_json(reply)
        names, weights = find_labels(body), find_scores(body)
        return class_scores(weights or [], percent=percent) if names is None else ranked(names, weights, percent)

    about = {"labels": labels, "scores": scores, "send": send, "key": key, "path": path, "percent": percent}
    return Format("json", request, reply, {**about, "encoding": encoding})


def _finder(option: str, expression: str) -> Callable[[Any], list[Any] | None]:
    """Return a function that evaluates an expression to a list; it returns None if there is no expression."""
    if not expression:
        return lambda body: None
    try:
        import jmespath
        from jmespath.exceptions import JMESPathError
    except ImportError:
        raise UserError(
            "protocol json needs jmespath, which is not installed; pip install 'certify-toolkit[audit]'"
        ) from None
    try:
        compiled = jmespath.compile(expression)
    except JMESPathError as error:
        raise UserError(f"{option} {expression!r} is not a JMESPath expression: {first_line(error)}") from None

    def find(body: Any) -> list[Any] | None:
        try:
            result = compiled.search(body)
        except (JMESPathError, TypeError, ValueError, RecursionError, ArithmeticError) as error:
            # A function in the expression received a value of an unsupported type.
            raise BadReply(f"{option} {expression!r} does not fit the reply ({type(error).__name__})") from None
        if result is None:
            raise BadReply(f"{option} {expression!r} finds nothing in the reply")
        return result if isinstance(result, list) else [result]

    return find


def _form(content: bytes, path: str, key: str, kind: str) -> Request:
    """Return a form with one file (RFC 7578); its boundary depends only on the content, for reproducible requests."""
    boundary = hashlib.sha256(content).hexdigest()
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"; filename="image.{kind.partition("/")[2]}"\r\n'
        f"Content-Type: {kind}\r\n\r\n"
    )
    body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    return Request(body, path, headers={"Content-Type": f"multipart/form-data; boundary={boundary}"})
