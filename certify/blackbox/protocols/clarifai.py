"""Clarifai: the concepts that a model finds in an image.

https://docs.clarifai.com/resources/api-overview/api-outputs
"""

from __future__ import annotations

import json

from certify.blackbox.encoding import encode_base64, read_encoding
from certify.blackbox.protocols.parsing import (
    at,
    in_path,
    json_request,
    ranked_entries,
    read_json,
    safe_text,
    versioned,
)
from certify.blackbox.types import BadReply, Busy, Format, Picture, Ranked, Reply, Request

SUCCESS = 10000
_BUSY = (11005, 21351, 21354, 25604)  # throttled, model being deployed, model busy, runner asks for a retry


def clarifai(
    *,
    model: str = "general-image-recognition",
    version: str = "",
    user: str = "clarifai",
    app: str = "main",
    encoding: str = "png",
) -> Format:
    """Return the format.

    Args:
        model: id of the model.
        version: of the model; empty for the newest.
        user: owner of the model.
        app: application of the model.
        encoding: of pictures: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: an invalid option.
    """
    read_encoding(encoding)
    path = f"v2/users/{in_path(user)}/apps/{in_path(app)}/{versioned(model, version)}/outputs"

    def request(picture: Picture) -> Request:
        image = {"base64": encode_base64(picture, encoding)}
        return json_request(path, {"inputs": [{"data": {"image": image}}]})

    about = {"model": model, "version": version, "user": user, "app": app, "encoding": encoding}
    return Format("clarifai", request, read_answer, about)


def read_answer(reply: Reply) -> Ranked:
    """Return the concepts of a reply.

    Raises:
        BadReply: it has none, or the service reports a failure, which it may do with HTTP status 200.
        Busy: a temporary failure.
    """
    body = read_json(reply)
    code = at(body, "status", "code")
    if code != SUCCESS:
        said = safe_text(json.dumps(body["status"]).encode())
        raise (Busy if code in _BUSY else BadReply)(
            f"Clarifai status {code if isinstance(code, int) else 'unknown'}: {said}"
        )
    return ranked_entries(at(body, "outputs", 0, "data", "concepts"), "name", "value")
