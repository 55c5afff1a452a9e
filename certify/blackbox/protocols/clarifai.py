"""Clarifai's models: the concepts that one finds in an image.

https://docs.clarifai.com/resources/api-overview/api-outputs
"""

from __future__ import annotations

import base64
import json

from certify.blackbox.encoding import encode, read_encoding
from certify.blackbox.protocols.parsing import at, in_path, ranked_entries, read_json, safe_text, versioned
from certify.blackbox.types import BadReply, Busy, Format, Picture, Ranked, Reply, Request

SUCCESS = 10000
_AGAIN = (11005, 21351, 21354, 25604)  # throttled, model being deployed, model busy, runner asks for a retry


def clarifai(
    *,
    model: str = "general-image-recognition",
    version: str = "",
    user: str = "clarifai",
    app: str = "main",
    encoding: str = "png",
) -> Format:
    """The format.

    Args:
        model: its id.
        version: of it; the newest where empty.
        user: whose model it is.
        app: that it belongs to.
        encoding: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: an option that cannot be used.
    """
    read_encoding(encoding)
    path = f"v2/users/{in_path(user)}/apps/{in_path(app)}/{versioned(model, version)}/outputs"

    def request(picture: Picture) -> Request:
        image = {"base64": base64.b64encode(encode(picture, encoding)).decode()}
        body = json.dumps({"inputs": [{"data": {"image": image}}]}).encode()
        return Request(body, path, headers={"Content-Type": "application/json"})

    about = {"model": model, "version": version, "user": user, "app": app, "encoding": encoding}
    return Format("clarifai", request, read_answer, about)


def read_answer(reply: Reply) -> Ranked:
    """The concepts of an answer.

    Raises:
        BadReply: there are none, or the service reports a failure, which it may do with HTTP status 200.
        Busy: one that passes.
    """
    body = read_json(reply)
    code = at(body, "status", "code")
    if code != SUCCESS:
        said = safe_text(json.dumps(body["status"]).encode())
        raise (Busy if code in _AGAIN else BadReply)(
            f"Clarifai status {code if isinstance(code, int) else 'unknown'}: {said}"
        )
    return ranked_entries(at(body, "outputs", 0, "data", "concepts"), "name", "value")
