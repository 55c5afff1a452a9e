"""Wire formats of five hosted image classification services: Hugging Face, Google, Azure, Clarifai and AWS."""

from __future__ import annotations

import json
from urllib.parse import urlencode

from certify.blackbox.encoding import encode, encode_base64, media_type, read_encoding
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
from certify.errors import UserError

_AZURE_API = "2023-10-01"
_GOOGLE_BUSY = (4, 8, 13, 14)  # google.rpc.Code: DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE
_CLARIFAI_OK = 10000
_CLARIFAI_BUSY = (11005, 21351, 21354, 25604)  # throttled, being deployed, busy, runner asks for a retry
_REKOGNITION = "RekognitionService.DetectLabels"


def hugging_face(*, model: str = "", encoding: str = "png") -> Format:
    """Return the format of Hugging Face image classification, also used by Inference Endpoints at their own URLs.

    https://huggingface.co/docs/inference-providers/tasks/image-classification

    Args:
        model: such as ``google/vit-base-patch16-224``; empty if the endpoint's URL is that of a model.
        encoding: encoding of pictures: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: an invalid option.
    """
    kind = media_type(encoding)
    path = f"models/{in_path(model)}" if model else ""

    def request(picture: Picture) -> Request:
        return Request(encode(picture, encoding), path, headers={"Content-Type": kind})

    def read(reply: Reply) -> Ranked:
        body = read_json(reply)
        if isinstance(body, list) and len(body) == 1 and isinstance(body[0], list):
            body = body[0]  # some servers return a list for each image
        return ranked_entries(body, "label", "score")

    return Format("hugging-face", request, read, {"model": model, "encoding": encoding})


def google_vision(*, max_labels: int = 10, encoding: str = "png") -> Format:
    """Return the format of Google Cloud Vision's label detection.

    https://docs.cloud.google.com/vision/docs/reference/rest/v1/images/annotate

    Args:
        max_labels: maximum number of labels per reply, from 1.
        encoding: encoding of pictures: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: an invalid option.
    """
    read_encoding(encoding)
    if max_labels < 1:
        raise UserError(f"max_labels {max_labels}; expected at least 1")

    def request(picture: Picture) -> Request:
        image = {"content": encode_base64(picture, encoding)}
        features = [{"type": "LABEL_DETECTION", "maxResults": max_labels}]
        return json_request("v1/images:annotate", {"requests": [{"image": image, "features": features}]})

    def read(reply: Reply) -> Ranked:
        one = at(read_json(reply), "responses", 0)
        if isinstance(one, dict) and "error" in one:  # with status 200
            error = one["error"]
            said = safe_text(json.dumps(error).encode())
            if isinstance(error, dict) and error.get("code") in _GOOGLE_BUSY:
                raise Busy(f"the service is busy: {said}")
            raise BadReply(f"the service could not use the image: {said}")
        return ranked_entries(at(one, "labelAnnotations"), "description", "score")

    return Format("google-vision", request, read, {"max_labels": max_labels, "encoding": encoding})


def azure_vision(*, language: str = "en", model_version: str = "latest", encoding: str = "png") -> Format:
    """Return the format of Azure AI Vision, Image Analysis 4.0: tags of images of at least 50 x 50 pixels.

    https://learn.microsoft.com/azure/ai-services/computer-vision/how-to/call-analyze-image-40

    Args:
        language: language of the tags.
        model_version: ``latest``, or a date, which fixes the model during an audit.
        encoding: encoding of pictures: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: an invalid option.
    """
    read_encoding(encoding)
    options = {"api-version": _AZURE_API, "features": "tags", "language": language, "model-version": model_version}
    path = f"computervision/imageanalysis:analyze?{urlencode(options)}"

    def request(picture: Picture) -> Request:
        return Request(encode(picture, encoding), path, headers={"Content-Type": "application/octet-stream"})

    def read(reply: Reply) -> Ranked:
        return ranked_entries(at(read_json(reply), "tagsResult", "values"), "name", "confidence")

    about = {"language": language, "model_version": model_version, "encoding": encoding}
    return Format("azure-vision", request, read, about)


def clarifai(
    *,
    model: str = "general-image-recognition",
    version: str = "",
    user: str = "clarifai",
    app: str = "main",
    encoding: str = "png",
) -> Format:
    """Return the format of Clarifai: the concepts that a model predicts for an image.

    https://docs.clarifai.com/resources/api-overview/api-outputs

    Args:
        model: id of the model.
        version: model version; empty for the newest.
        user: owner of the model.
        app: application of the model.
        encoding: encoding of pictures: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: an invalid option.
    """
    read_encoding(encoding)
    path = f"v2/users/{in_path(user)}/apps/{in_path(app)}/{versioned(model, version)}/outputs"

    def request(picture: Picture) -> Request:
        image = {"base64": encode_base64(picture, encoding)}
        return json_request(path, {"inputs": [{"data": {"image": image}}]})

    def read(reply: Reply) -> Ranked:
        body = read_json(reply)
        code = at(body, "status", "code")
        if code != _CLARIFAI_OK:  # also with status 200
            said = safe_text(json.dumps(body["status"]).encode())
            raise (Busy if code in _CLARIFAI_BUSY else BadReply)(
                f"Clarifai status {code if isinstance(code, int) else 'unknown'}: {said}"
            )
        return ranked_entries(at(body, "outputs", 0, "data", "concepts"), "name", "value")

    about = {"model": model, "version": version, "user": user, "app": app, "encoding": encoding}
    return Format("clarifai", request, read, about)


def rekognition(*, max_labels: int = 10, min_confidence: float = 55.0, encoding: str = "png") -> Format:
    """Return the format of AWS Rekognition's DetectLabels; :mod:`certify.blackbox.client.aws` signs the requests.

    https://docs.aws.amazon.com/rekognition/latest/APIReference/API_DetectLabels.html

    Args:
        max_labels: maximum number of labels per reply, from 1.
        min_confidence: minimum confidence in percent; the default is the service's. Lower values yield fewer empty
            replies.
        encoding: encoding of pictures: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: an invalid option.
    """
    read_encoding(encoding)
    if max_labels < 1 or not 0 <= min_confidence <= 100:
        raise UserError(
            f"max_labels {max_labels}, min_confidence {min_confidence}; expected at least 1, and 0 to 100 percent"
        )

    def request(picture: Picture) -> Request:
        image = {"Bytes": encode_base64(picture, encoding)}
        body = {"Image": image, "MaxLabels": max_labels, "MinConfidence": min_confidence}
        headers = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": _REKOGNITION}
        return Request(json.dumps(body).encode(), headers=headers)

    def read(reply: Reply) -> Ranked:
        return ranked_entries(at(read_json(reply), "Labels"), "Name", "Confidence", percent=True)

    about = {"max_labels": max_labels, "min_confidence": min_confidence, "encoding": encoding}
    return Format("rekognition", request, read, about)
