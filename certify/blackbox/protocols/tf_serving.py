"""TensorFlow Serving's REST predict API, also used by KServe v1: one instance in, one prediction out.

https://www.tensorflow.org/tfx/serving/api_rest
"""

from __future__ import annotations

import json
from typing import Any

from certify.blackbox.encoding import encode_base64, read_encoding
from certify.blackbox.protocols.parsing import at, class_scores, flat, ranked, read_json, versioned
from certify.blackbox.protocols.tensors import tensor_input
from certify.blackbox.types import BadReply, Format, Picture, Ranked, Reply, Request


def tf_serving(
    *,
    model: str,
    version: str = "",
    signature: str = "",
    input: str = "",
    output: str = "",
    labels: str = "",
    datatype: str = "FP32",
    layout: str = "NHWC",
    mean: Any = 0.0,
    std: Any = 1.0,
    b64: bool = False,
    encoding: str = "png",
) -> Format:
    """Return the format of TensorFlow Serving.

    Args:
        model: model name on the server.
        version: model version; empty for the newest.
        signature: model signature; empty for the server's default.
        input: name of the input, if the signature has several.
        output: key of the label or the scores, if a prediction is an object with several keys.
        labels: key of the class names beside the scores, if a prediction has them.
        datatype: datatype of numbers: ``FP32`` (pixels in [0, 1], minus ``mean``, divided by ``std``) or ``UINT8``.
        layout: ``NHWC`` or ``NCHW``.
        mean: a number, or one per channel.
        std: a number, or one per channel.
        b64: send an image file in base64 instead of numbers, for models that decode it.
        encoding: encoding of that file: ``png``, ``jpeg`` or ``jpegQ``.

    Raises:
        UserError: an invalid option.
    """
    tensor = tensor_input(datatype, layout, mean, std)
    read_encoding(encoding)

    def request(picture: Picture) -> Request:
        if b64:
            instance = json.dumps({"b64": encode_base64(picture, encoding)})
        else:
            instance = tensor.text(picture, nested=True)[1:-1]  # without the batch
        if input:
            instance = f"{{{json.dumps(input)}: {instance}}}"
        head = f'"signature_name": {json.dumps(signature)}, ' if signature else ""
        body = f'{{{head}"instances": [{instance}]}}'.encode()
        return Request(body, f"v1/{versioned(model, version)}:predict", headers={"Content-Type": "application/json"})

    about: dict[str, Any] = {"encoding": encoding} if b64 else tensor.about
    about |= {"model": model, "version": version, "signature": signature, "input": input, "output": output}
    return Format("tf-serving", request, lambda reply: read_answer(reply, output, labels), {**about, "labels": labels})


def read_answer(reply: Reply, output: str = "", labels: str = "") -> Ranked:
    """Return the labels of a prediction: a string or integer is a label, a list of numbers are class scores.

    Args:
        reply: the server's reply.
        output: key of the label or list, if the prediction is an object.
        labels: key of the class names, if the prediction contains them.

    Raises:
        BadReply: neither a label nor scores.
    """
    predictions = at(read_json(reply), "predictions")
    if not isinstance(predictions, list) or len(predictions) != 1:
        raise BadReply("no single prediction for the single instance in the reply")
    prediction: Any = predictions[0]
    names = None
    if isinstance(prediction, dict):
        if labels:
            names = flat(at(prediction, labels))
        if not output and len(prediction) != 1:
            raise BadReply(
                f"a prediction of {', '.join(map(repr, list(prediction)[:8]))[:140]}; expected one, or output=KEY"
            )
        prediction = at(prediction, output) if output else next(iter(prediction.values()))
    values = flat(prediction)
    if len(values) == 1 and isinstance(values[0], str | int):
        return ranked(values)
    return class_scores(values, names)
