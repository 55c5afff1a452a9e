"""Google Cloud Vision, label detection.

https://docs.cloud.google.com/vision/docs/reference/rest/v1/images/annotate
"""

from __future__ import annotations

import json

from certify.blackbox.encoding import encode_base64, read_encoding
from certify.blackbox.protocols.parsing import at, json_request, ranked_entries, read_json, safe_text
from certify.blackbox.types import BadReply, Busy, Format, Picture, Ranked, Reply, Request
from certify.errors import UserError

_AGAIN = (4, 8, 13, 14)  # google.rpc.Code: DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE


def google_vision(*, max_labels: int = 10, encoding: str = "png") -> Format:
    """Return the format.

    Args:
        max_labels: labels per reply at most, from 1.
        encoding: of pictures: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: an invalid option.
    """
    read_encoding(encoding)
    if max_labels < 1:
        raise UserError(f"max_labels {max_labels}; expected at least 1")

    def request(picture: Picture) -> Request:
        one = {
            "image": {"content": encode_base64(picture, encoding)},
            "features": [{"type": "LABEL_DETECTION", "maxResults": max_labels}],
        }
        return json_request("v1/images:annotate", {"requests": [one]})

    return Format("google-vision", request, read_answer, {"max_labels": max_labels, "encoding": encoding})


def read_answer(reply: Reply) -> Ranked:
    """Return the labels of a reply.

    Raises:
        BadReply: it has none; a picture that the service could not use also gives a reply of status 200.
        Busy: the service is temporarily unavailable.
    """
    one = at(read_json(reply), "responses", 0)
    if isinstance(one, dict) and "error" in one:
        error = one["error"]
        said = safe_text(json.dumps(error).encode())
        if isinstance(error, dict) and error.get("code") in _AGAIN:
            raise Busy(f"the service is busy: {said}")
        raise BadReply(f"the service could not use the image: {said}")
    return ranked_entries(at(one, "labelAnnotations"), "description", "score")
