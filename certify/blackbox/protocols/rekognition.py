"""AWS Rekognition, DetectLabels. :mod:`certify.blackbox.client.aws` signs and sends the requests.

https://docs.aws.amazon.com/rekognition/latest/APIReference/API_DetectLabels.html
"""

from __future__ import annotations

import json

from certify.blackbox.encoding import encode_base64, read_encoding
from certify.blackbox.protocols.parsing import at, ranked_entries, read_json
from certify.blackbox.types import Format, Picture, Ranked, Reply, Request
from certify.errors import UserError

TARGET = "RekognitionService.DetectLabels"


def rekognition(*, max_labels: int = 10, min_confidence: float = 55.0, encoding: str = "png") -> Format:
    """Return the format.

    Args:
        max_labels: labels per reply at most, from 1.
        min_confidence: in percent; the default is the service's. A lower one makes fewer replies empty.
        encoding: of pictures: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: an invalid option.
    """
    read_encoding(encoding)
    if max_labels < 1 or not 0 <= min_confidence <= 100:
        raise UserError(
            f"max_labels {max_labels}, min_confidence {min_confidence}; expected at least 1, and 0 to 100 percent"
        )
    limits = {"MaxLabels": max_labels, "MinConfidence": min_confidence}

    def request(picture: Picture) -> Request:
        image = {"Bytes": encode_base64(picture, encoding)}
        headers = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": TARGET}
        return Request(json.dumps({"Image": image, **limits}).encode(), headers=headers)

    about = {"max_labels": max_labels, "min_confidence": min_confidence, "encoding": encoding}
    return Format("rekognition", request, read_answer, about)


def read_answer(reply: Reply) -> Ranked:
    """Return the labels of a reply, with confidences divided by 100.

    Raises:
        BadReply: it has none.
    """
    return ranked_entries(at(read_json(reply), "Labels"), "Name", "Confidence", percent=True)
