"""Hugging Face's image classification: the bytes of an image in, a list of label and score out.

https://huggingface.co/docs/inference-providers/tasks/image-classification; Inference Endpoints answer the same at their
own URL.
"""

from __future__ import annotations

from certify.blackbox.encoding import encode, media_type
from certify.blackbox.protocols.parsing import in_path, ranked_entries, read_json
from certify.blackbox.types import Format, Picture, Ranked, Reply, Request


def hugging_face(*, model: str = "", encoding: str = "png") -> Format:
    """The format.

    Args:
        model: such as ``google/vit-base-patch16-224``; empty where the endpoint's URL is the model's.
        encoding: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: an option that cannot be used.
    """
    kind = media_type(encoding)
    path = f"models/{in_path(model)}" if model else ""

    def request(picture: Picture) -> Request:
        return Request(encode(picture, encoding), path, headers={"Content-Type": kind})

    return Format("hugging-face", request, read_answer, {"model": model, "encoding": encoding})


def read_answer(reply: Reply) -> Ranked:
    """The labels of an answer.

    Raises:
        BadReply: there are none.
    """
    body = read_json(reply)
    if isinstance(body, list) and len(body) == 1 and isinstance(body[0], list):
        body = body[0]  # some servers answer a list for each image
    return ranked_entries(body, "label", "score")
