"""Hugging Face image classification: an image file in, a list of labels and scores out.

https://huggingface.co/docs/inference-providers/tasks/image-classification; Inference Endpoints use the same format at
their own URLs.
"""

from __future__ import annotations

from certify.blackbox.encoding import encode, media_type
from certify.blackbox.protocols.parsing import in_path, ranked_entries, read_json
from certify.blackbox.types import Format, Picture, Ranked, Reply, Request


def hugging_face(*, model: str = "", encoding: str = "png") -> Format:
    """Return the format.

    Args:
        model: such as ``google/vit-base-patch16-224``; empty if the endpoint's URL is that of a model.
        encoding: of pictures: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: an invalid option.
    """
    kind = media_type(encoding)
    path = f"models/{in_path(model)}" if model else ""

    def request(picture: Picture) -> Request:
        return Request(encode(picture, encoding), path, headers={"Content-Type": kind})

    return Format("hugging-face", request, read_answer, {"model": model, "encoding": encoding})


def read_answer(reply: Reply) -> Ranked:
    """Return the labels of a reply.

    Raises:
        BadReply: it has none.
    """
    body = read_json(reply)
    if isinstance(body, list) and len(body) == 1 and isinstance(body[0], list):
        body = body[0]  # some servers return a list for each image
    return ranked_entries(body, "label", "score")
