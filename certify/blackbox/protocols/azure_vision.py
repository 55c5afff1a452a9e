"""Azure AI Vision, Image Analysis 4.0: tags of images of at least 50 x 50 pixels.

https://learn.microsoft.com/azure/ai-services/computer-vision/how-to/call-analyze-image-40
"""

from __future__ import annotations

from urllib.parse import urlencode

from certify.blackbox.encoding import encode, read_encoding
from certify.blackbox.protocols.parsing import at, ranked_entries, read_json
from certify.blackbox.types import Format, Picture, Ranked, Reply, Request

API_VERSION = "2023-10-01"


def azure_vision(*, language: str = "en", model_version: str = "latest", encoding: str = "png") -> Format:
    """Return the format.

    Args:
        language: of the tags.
        model_version: ``latest``, or a date; a date keeps the service from changing during an audit.
        encoding: of pictures: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: an invalid option.
    """
    read_encoding(encoding)
    query = urlencode(
        {"api-version": API_VERSION, "features": "tags", "language": language, "model-version": model_version}
    )

    def request(picture: Picture) -> Request:
        path = f"computervision/imageanalysis:analyze?{query}"
        return Request(encode(picture, encoding), path, headers={"Content-Type": "application/octet-stream"})

    about = {"language": language, "model_version": model_version, "encoding": encoding}
    return Format("azure-vision", request, read_answer, about)


def read_answer(reply: Reply) -> Ranked:
    """Return the tags of a reply.

    Raises:
        BadReply: it has none.
    """
    return ranked_entries(at(read_json(reply), "tagsResult", "values"), "name", "confidence")
