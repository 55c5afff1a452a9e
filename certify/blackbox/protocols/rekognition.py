"""AWS Rekognition's DetectLabels. Requests need AWS's signature, so they go through boto3.

See :mod:`certify.blackbox.client.aws`.

https://docs.aws.amazon.com/rekognition/latest/APIReference/API_DetectLabels.html
"""

from __future__ import annotations

import base64
import json

from certify.blackbox.encoding import encode, read_encoding
from certify.blackbox.protocols.parsing import at, ranked_entries, read_json
from certify.blackbox.types import Format, Picture, Ranked, Reply, Request
from certify.errors import UserError

TARGET = "RekognitionService.DetectLabels"


def rekognition(*, max_labels: int = 10, min_confidence: float = 55.0, encoding: str = "png") -> Format:
    """The format.

    Args:
        max_labels: at most so many labels.
        min_confidence: percent; the service's own default. With a lower one fewer answers are empty.
        encoding: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: an option that cannot be used.
    """
    read_encoding(encoding)
    if max_labels < 1 or not 0 <= min_confidence <= 100:
        raise UserError(
            f"max_labels {max_labels}, min_confidence {min_confidence}; expected at least 1, and 0 to 100 percent"
        )
    wanted = {"MaxLabels": max_labels, "MinConfidence": min_confidence}

    def request(picture: Picture) -> Request:
        image = {"Bytes": base64.b64encode(encode(picture, encoding)).decode()}
        headers = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": TARGET}
        return Request(json.dumps({"Image": image, **wanted}).encode(), headers=headers)

    about = {"max_labels": max_labels, "min_confidence": min_confidence, "encoding": encoding}
    return Format("rekognition", request, read_answer, about)


def read_answer(reply: Reply) -> Ranked:
    """The labels of an answer, confidences divided by 100.

    Raises:
        BadReply: there are none.
    """
    return ranked_entries(at(read_json(reply), "Labels"), "Name", "Confidence", percent=True)
