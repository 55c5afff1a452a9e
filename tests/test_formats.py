"""Wire formats: pictures exactly as sent, documented replies both ways, broken replies, votes over loopback."""

from __future__ import annotations

import base64
import json
import math
import struct
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from vision_stubs import cloud_app, noisy_digits

from certify.blackbox.encoding import encode, from_bytes, media_type, round_trip, to_pictures, to_tensor
from certify.blackbox.protocols import ENDPOINTS, FORMATS, KEY_HEADERS
from certify.blackbox.protocols.parsing import safe_text
from certify.blackbox.protocols.v2 import metadata_request, options_from
from certify.blackbox.types import MAX_REPLY_BYTES, BadReply, Busy, Format, Picture, Ranked, Reply, Request, Scored
from certify.errors import ImageError, RunFault, UserError
from certify.models.classifier import Classifier

REQUIRED: dict[str, dict[str, Any]] = {
    "v2": {"model": "m"},
    "tf-serving": {"model": "m"},
    "json": {"labels": "labels[].name", "scores": "labels[].score"},
}


def built(name: str, **options: Any) -> Format:
    made: Format = FORMATS.get(name)(**{**REQUIRED.get(name, {}), **options})
    assert made.name == name
    return made


def reply(body: Any, status: int = 200, **headers: str) -> Reply:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Reply(status, content, {name.replace("_", "-"): value for name, value in headers.items()})


def pairs(ranked: Ranked) -> list[tuple[str, float | None]]:
    return [(one.label, one.score) for one in ranked]


@pytest.fixture(scope="module")
def noisy() -> torch.Tensor:
    return noisy_digits()


@pytest.fixture(scope="module")
def photo() -> Picture:
    return to_pictures(torch.rand(1, 3, 5, 4, generator=torch.Generator().manual_seed(1)))[0]


# Pictures


def test_pictures_are_clipped_and_rounded() -> None:
    values = torch.tensor([-0.3, 0.0, 0.4 / 255, 0.6 / 255, 1 / 255, 254.49 / 255, 1.0, 7.0]).reshape(1, 1, 2, 4)
    assert to_pictures(values)[0].pixels.flatten().tolist() == [0, 0, 0, 1, 1, 254, 255, 255]
    with pytest.raises(RunFault, match="not finite"):
        to_pictures(torch.full((1, 1, 2, 2), math.nan))


def test_a_picture_keeps_every_level_through_tensor_and_png() -> None:
    levels = torch.arange(256).reshape(1, 1, 16, 16).expand(1, 3, 16, 16).float() / 255
    levels = torch.cat([levels[:, :1], levels[:, 1:2].flip(2), levels[:, 2:].flip(3)], 1)
    picture = to_pictures(levels)[0]
    assert torch.equal(to_tensor(picture), levels[0])  # float32 pixels / 255, as torchvision gives them
    assert to_pictures(to_tensor(picture)[None])[0].sha256 == picture.sha256
    assert round_trip(picture).sha256 == picture.sha256
    assert from_bytes(encode(picture), 3).sha256 == picture.sha256
    assert (media_type("png"), media_type("jpeg80")) == ("image/png", "image/jpeg")


def test_jpeg_files_are_decoded_as_they_were_encoded(photo: Picture) -> None:
    sharp, coarse = round_trip(photo, "jpeg100"), round_trip(photo, "jpeg20")
    errors = [np.abs(p.pixels.astype(int) - photo.pixels).mean() for p in (sharp, coarse)]
    assert 0 < errors[0] < errors[1]
    assert encode(photo, "jpeg") == encode(photo, "jpeg95") != encode(photo, "jpeg94")
    for wrong in ("jpeg0", "jpeg101", "webp", "jpg", "png9", ""):
        with pytest.raises(UserError, match="expected png, jpeg"):
            encode(photo, wrong)
    with pytest.raises(ImageError):
        from_bytes(b"GIF89a nothing", 3)


def test_the_digest_depends_on_the_shape() -> None:
    pixels = np.arange(12, dtype=np.uint8)
    assert len({Picture(pixels.reshape(s)).sha256 for s in ((2, 6, 1), (6, 2, 1), (2, 2, 3))}) == 3


# Requests: what the documentation of each protocol asks for


def test_requests_carry_the_picture(photo: Picture) -> None:
    png, text = encode(photo), base64.b64encode(encode(photo)).decode()
    sent = built("rekognition", max_labels=3, min_confidence=0).request(photo)
    assert json.loads(sent.body) == {"Image": {"Bytes": text}, "MaxLabels": 3, "MinConfidence": 0}
    assert sent.headers == {
        "Content-Type": "application/x-amz-json-1.1",
        "X-Amz-Target": "RekognitionService.DetectLabels",
    }
    sent = built("google-vision", max_labels=7).request(photo)
    feature = {"type": "LABEL_DETECTION", "maxResults": 7}
    assert json.loads(sent.body) == {"requests": [{"image": {"content": text}, "features": [feature]}]}
    assert sent.path == "v1/images:annotate"
    sent = built("azure-vision").request(photo)
    assert (sent.body, sent.headers["Content-Type"]) == (png, "application/octet-stream")
    assert sent.path.startswith("computervision/imageanalysis:analyze?api-version=2023-10-01&features=tags&")
    sent = built("clarifai", version="v 1").request(photo)
    assert sent.path == "v2/users/clarifai/apps/main/models/general-image-recognition/versions/v%201/outputs"
    assert json.loads(sent.body) == {"inputs": [{"data": {"image": {"base64": text}}}]}
    sent = built("hugging-face", model="google/vit", encoding="jpeg").request(photo)
    assert (sent.path, sent.body, sent.headers["Content-Type"]) == (
        "models/google/vit",
        encode(photo, "jpeg"),
        "image/jpeg",
    )
    sent = built("json", send="raw", path="classify").request(photo)
    assert (sent.path, sent.body, sent.headers["Content-Type"]) == ("classify", png, "image/png")
    assert json.loads(built("json", key="img").request(photo).body) == {"img": text}
    sent = built("tf-serving", b64=True, input="image_bytes", signature="serving", version="3").request(photo)
    assert json.loads(sent.body) == {"signature_name": "serving", "instances": [{"image_bytes": {"b64": text}}]}
    assert sent.path == "v1/models/m/versions/3:predict"


def test_tensor_requests(photo: Picture) -> None:
    chw = to_tensor(photo)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normal = (chw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    body = json.loads(built("v2", mean=mean, std="0.229,0.224,0.225").request(photo).body)["inputs"][0]
    assert (body["name"], body["shape"], body["datatype"]) == ("input", [1, 3, 5, 4], "FP32")
    assert torch.equal(torch.tensor(body["data"], dtype=torch.float32).reshape(3, 5, 4), normal)
    body = json.loads(built("v2", datatype="UINT8", layout="NHWC", output="p").request(photo).body)
    assert body["inputs"][0]["data"] == photo.pixels.flatten().tolist()
    assert (body["inputs"][0]["shape"], body["outputs"]) == ([1, 5, 4, 3], [{"name": "p"}])
    instance = json.loads(built("tf-serving").request(photo).body)["instances"]
    assert torch.equal(torch.tensor(instance, dtype=torch.float32)[0].permute(2, 0, 1), chw)


def test_every_level_is_exact_in_json() -> None:
    every = Picture(np.arange(256, dtype=np.uint8).reshape(16, 16, 1))
    data = json.loads(built("v2").request(every).body)["inputs"][0]["data"]
    assert np.array_equal(np.array(data, dtype=np.float32), to_tensor(every).numpy().flatten())
    assert max(len(str(value)) for value in data) < 15


def test_binary_requests_name_their_length(photo: Picture) -> None:
    sent = built("v2", model="a/b", version=2, binary=True).request(photo)
    length = int(sent.headers["Inference-Header-Content-Length"])
    head = json.loads(sent.body[:length])
    assert sent.path == "v2/models/a/b/versions/2/infer"
    assert head["parameters"] == {"binary_data_output": True}
    assert (
        head["inputs"][0]["parameters"]
        == {"binary_data_size": 5 * 4 * 3 * 4}
        == {"binary_data_size": len(sent.body) - length}
    )
    assert np.array_equal(np.frombuffer(sent.body[length:], "<f4"), to_tensor(photo).numpy().flatten())
    named = built("v2", binary=True, output="p", top=3).request(photo)
    head = json.loads(named.body[: int(named.headers["Inference-Header-Content-Length"])])
    assert head["outputs"] == [{"name": "p", "parameters": {"classification": 3, "binary_data": True}}]


def test_forms_are_parsed_by_an_independent_parser(photo: Picture) -> None:
    from email import message_from_bytes

    sent = built("json", send="multipart", key="photo").request(photo)
    assert built("json", send="multipart", key="photo").request(photo) == sent  # the same picture, the same bytes
    parsed = message_from_bytes(b"Content-Type: " + sent.headers["Content-Type"].encode() + b"\r\n\r\n" + sent.body)
    (part,) = parsed.get_payload()  # type: ignore[misc]
    assert part.get_payload(decode=True) == encode(photo)  # type: ignore[union-attr]
    assert part.get_param("name", header="content-disposition") == "photo"  # type: ignore[union-attr]
    assert part.get_content_type() == "image/png"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("v2", {"datatype": "FP64"}, "expected one of FP32, UINT8"),
        ("v2", {"layout": "CHW"}, "expected one of NCHW, NHWC"),
        ("v2", {"std": 0}, "above 0"),
        ("v2", {"mean": "a,b"}, "expected a number"),
        ("v2", {"mean": 0.5, "datatype": "UINT8"}, "FP32"),
        ("v2", {"top": 3}, "output that is named"),
        ("json", {"labels": "a[", "scores": ""}, "not a JMESPath expression"),
        ("json", {"labels": "", "scores": ""}, "needs protocol_options labels=<JMESPath>"),
        ("json", {"send": "put"}, "raw, multipart, base64"),
        ("json", {"path": "x?size=5&api_token=abc"}, "query of path holds 'api_token'"),
        ("json", {"key": 'a"b'}, "without quotation marks"),
        ("rekognition", {"min_confidence": 101}, "0 to 100"),
        ("google-vision", {"max_labels": 0}, "at least 1"),
        ("clarifai", {"encoding": "tiff"}, "expected png"),
    ],
)
def test_invalid_options_are_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        built(name, **options)


def test_numbers_must_fit_the_channels(photo: Picture) -> None:
    with pytest.raises(UserError, match="mean has 2 numbers"):
        built("v2", mean=(0.5, 0.5)).request(photo)


# Replies, as documented


V2_SCORES = {"name": "p", "datatype": "FP32", "shape": [1, 3], "data": [0.25, 0.5, 0.25]}
REKOGNITION = {
    "LabelModelVersion": "3.0",
    "Labels": [
        {"Name": "Person", "Confidence": 89.5, "Instances": [], "Parents": []},
        {
            "Name": "Mobile Phone",
            "Confidence": 99.75,
            "Aliases": [{"Name": "Cell Phone"}],
            "Parents": [{"Name": "Phone"}],
        },
    ],
}
GOOGLE = {
    "responses": [
        {
            "labelAnnotations": [
                {"mid": "/m/0bt9lr", "description": "Dog", "score": 0.97, "topicality": 0.1},
                {"mid": "/m/0kpmf", "description": "Dog breed", "score": 0.91, "topicality": 0.9},
            ]
        }
    ]
}
AZURE = {
    "modelVersion": "2023-10-01",
    "metadata": {"width": 300, "height": 200},
    "tagsResult": {"values": [{"name": "grass", "confidence": 0.996}, {"name": "outdoor", "confidence": 0.9957}]},
}
CLARIFAI = {
    "status": {"code": 10000, "description": "Ok", "req_id": "20ab"},
    "outputs": [
        {
            "id": "a03a",
            "status": {"code": 10000, "description": "Ok"},
            "data": {
                "concepts": [
                    {"id": "ai_HLmqFqBf", "name": "train", "value": 0.9996, "app_id": "main"},
                    {"id": "ai_fvlBqXZR", "name": "railway", "value": 0.9992, "app_id": "main"},
                ]
            },
        }
    ],
}
HUGGING = [{"score": 0.0011, "label": "lynx"}, {"score": 0.9946, "label": "Egyptian cat"}]


@pytest.mark.parametrize(
    ("name", "options", "body", "expected"),
    [
        ("rekognition", {}, REKOGNITION, [("Mobile Phone", 0.9975), ("Person", 0.895)]),
        ("google-vision", {}, GOOGLE, [("Dog", 0.97), ("Dog breed", 0.91)]),
        ("azure-vision", {}, AZURE, [("grass", 0.996), ("outdoor", 0.9957)]),
        ("clarifai", {}, CLARIFAI, [("train", 0.9996), ("railway", 0.9992)]),
        ("hugging-face", {}, HUGGING, [("Egyptian cat", 0.9946), ("lynx", 0.0011)]),
        ("hugging-face", {}, [HUGGING], [("Egyptian cat", 0.9946), ("lynx", 0.0011)]),
        ("tf-serving", {}, {"predictions": [[0.1, 0.9]]}, [("1", 0.9), ("0", 0.1)]),
        ("tf-serving", {}, {"predictions": [3]}, [("3", None)]),
        ("tf-serving", {}, {"predictions": ["cat"]}, [("cat", None)]),
        ("tf-serving", {}, {"predictions": [{"label": "cat"}]}, [("cat", None)]),
        (
            "tf-serving",
            {"output": "probabilities", "labels": "classes"},
            {"predictions": [{"classes": ["cat", "dog"], "probabilities": [0.2, 0.8]}]},
            [("dog", 0.8), ("cat", 0.2)],
        ),
        ("v2", {}, {"outputs": [V2_SCORES]}, [("1", 0.5), ("0", 0.25), ("2", 0.25)]),  # equal: the lower class first
        ("v2", {}, {"outputs": [V2_SCORES | {"data": [[0.25, 0.5, 0.25]]}]}, [("1", 0.5), ("0", 0.25), ("2", 0.25)]),
        (
            "v2",
            {},
            {"outputs": [V2_SCORES | {"parameters": {"labels": ["a", "b", "c"]}}]},
            [("b", 0.5), ("a", 0.25), ("c", 0.25)],
        ),
        ("v2", {}, {"outputs": [{"name": "y", "datatype": "INT64", "shape": [1, 1], "data": [7]}]}, [("7", None)]),
        (
            "v2",
            {},
            {
                "outputs": [{"name": "y", "datatype": "INT64", "shape": [1], "data": [1]}],
                "parameters": {"labels": ["a", "b"]},
            },
            [("b", None)],
        ),
        ("v2", {}, {"outputs": [{"name": "y", "datatype": "BYTES", "shape": [1], "data": ["cat"]}]}, [("cat", None)]),
        (
            "v2",
            {"output": "p", "top": 2},
            {"outputs": [{"name": "p", "datatype": "BYTES", "shape": [1, 2], "data": ["0.7:2:cat", "0.2:0"]}]},
            [("cat", 0.7), ("0", 0.2)],
        ),
        (
            "v2",
            {"output": "p"},
            {"outputs": [{"name": "x", "datatype": "FP32", "shape": [0], "data": []}, V2_SCORES]},
            None,
        ),
        ("json", {}, {"labels": [{"name": "a", "score": 0.1}, {"name": "b", "score": 0.9}]}, [("b", 0.9), ("a", 0.1)]),
        ("json", {"labels": "y", "scores": ""}, {"y": 4}, [("4", None)]),
        ("json", {"labels": "y", "scores": "p", "percent": True}, {"y": "cat", "p": 25}, [("cat", 0.25)]),
        ("json", {"labels": "", "scores": "p"}, {"p": [0.1, 0.7, 0.2]}, [("1", 0.7), ("2", 0.2), ("0", 0.1)]),
        ("json", {"labels": "best[0:2]", "scores": ""}, {"best": ["a", "b", "a"]}, [("a", None), ("b", None)]),
        ("json", {}, {"labels": [{"name": "a", "score": 0.2}, {"name": "a", "score": 0.4}]}, [("a", 0.4)]),
    ],
)
def test_documented_replies(name: str, options: dict[str, Any], body: Any, expected: Any) -> None:
    found = built(name, **options).reply(reply(body))
    assert pairs(found) == (expected or [("1", 0.5), ("0", 0.25), ("2", 0.25)])


def binary_reply(tensors: list[tuple[dict[str, Any], bytes]], cut: int = 0, length: str = "") -> Reply:
    outputs = [{**tensor, "parameters": {"binary_data_size": len(content)}} for tensor, content in tensors]
    head = json.dumps({"model_name": "m", "outputs": outputs}).encode()
    body = head + b"".join(content for _, content in tensors)
    return Reply(200, body[: len(body) - cut], {"inference-header-content-length": length or str(len(head))})


def test_binary_replies() -> None:
    names = {"name": "y", "datatype": "BYTES", "shape": [1]}, struct.pack("<I", 4) + "Öl!".encode()
    number = {"name": "n", "datatype": "INT32", "shape": [1, 1]}, struct.pack("<i", 258)
    for kind, code in (("FP16", "e"), ("FP32", "f"), ("FP64", "d")):
        scores = {"name": "p", "datatype": kind, "shape": [1, 2]}, struct.pack(f"<2{code}", 0.25, 0.75)
        every = binary_reply([names, scores, number])
        assert pairs(built("v2", output="p").reply(every)) == [("1", 0.75), ("0", 0.25)]
        assert pairs(built("v2", output="y").reply(every)) == [("Öl!", None)]
        assert pairs(built("v2", output="n").reply(every)) == [("258", None)]
    for broken, says in (
        (binary_reply([names, number], cut=1), "cut off"),
        (binary_reply([number], length="99999"), "Content-Length"),
        (binary_reply([number], length="-1"), "Content-Length"),
        (binary_reply([number], length="٣"), "Content-Length"),
        (binary_reply([number], length="4"), "not JSON"),
        (binary_reply([(names[0], struct.pack("<I", 2**31) + b"x")]), "text that is cut off"),
        (binary_reply([(names[0], struct.pack("<I", 1) + b"\xff")]), "not UTF-8"),
        (binary_reply([(number[0] | {"datatype": "INT64"}, number[1])]), "cannot be read"),
        (binary_reply([(number[0] | {"datatype": "FP32", "shape": [1, 2]}, struct.pack("<2f", math.nan, 1))]), "score"),
        (binary_reply([(number[0] | {"shape": [1, 2]}, number[1])]), "shape"),
    ):
        with pytest.raises(BadReply, match=says):
            built("v2").reply(broken)


METADATA = {
    "name": "m",
    "versions": ["1"],
    "platform": "onnxruntime_onnx",
    "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 224, 224, 3]}],
    "outputs": [{"name": "p", "datatype": "FP32", "shape": [-1, 1000]}],
}


def test_metadata_fills_in_what_was_not_given() -> None:
    asked = metadata_request("m", "1")
    assert (asked.method, asked.path, asked.body) == ("GET", "v2/models/m/versions/1", b"")
    found = options_from(reply(METADATA), {"model": "m"})
    assert found == {"model": "m", "input": "pixels", "output": "p", "datatype": "UINT8", "layout": "NHWC"}
    assert built("v2", **found).about["layout"] == "NHWC"
    given = {"input": "other", "output": "q", "datatype": "FP32", "layout": "NCHW"}
    assert options_from(reply(METADATA), given) == given
    assert "layout" not in options_from(
        reply(METADATA | {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 8, 3]}]}), {}
    )
    two = METADATA | {"outputs": [{"name": "p"}, {"name": "q"}]}
    with pytest.raises(UserError, match="has p, q: give output=NAME"):
        options_from(reply(two), {})
    with pytest.raises(UserError, match="takes INT64"):
        options_from(reply(METADATA | {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1]}]}), {})
    for broken in (reply([]), reply({"inputs": 3, "outputs": []}), reply({"error": "no"}, 404), reply(b"<html>")):
        with pytest.raises(BadReply):
            options_from(broken, {})


# Broken replies: BadReply, never anything else


BROKEN: dict[str, Reply] = {
    "nothing": reply(b""),
    "truncated": reply(json.dumps(CLARIFAI).encode()[:-20]),
    "page": reply(b"<!doctype html><html><title>Sign in</title><body>please</body></html>"),
    "null": reply(None),
    "number": reply(5),
    "text": reply("cat"),
    "empty list": reply([]),
    "empty object": reply({}),
    "deep lists": reply(b"[" * 200_000 + b"]" * 200_000),
    "deep objects": reply(b'{"a":' * 200_000),
    "huge": Reply(200, b" " * (MAX_REPLY_BYTES + 1)),
    "bytes": reply(bytes(range(256))),
    "latin": reply('{"labels": "é"}'.encode("latin-1")),
    "utf-16": reply('{"labels": "e"}'.encode("utf-16")),
    "long number": reply(b"9" * 10_000),
    "NaN": reply(b'{"labels": [{"name": "a", "score": NaN}], "predictions": [[NaN, 1.0]]}'),
    "moved": reply({"labels": []}, 302, Location="https://elsewhere"),
    "error in words": reply({"error": {"code": 400, "message": "bad image"}}, 400),
    "unavailable": reply(b"upstream is down", 503),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_broken_replies_are_bad_replies(name: str, broken: str) -> None:
    with pytest.raises(BadReply) as found:
        built(name).reply(BROKEN[broken])
    assert 0 < len(str(found.value)) < 300
    assert "\n" not in str(found.value)
    if BROKEN[broken].status >= 300:
        assert f"HTTP {BROKEN[broken].status}" in str(found.value)


WHERE: dict[str, tuple[Any, str, str]] = {
    "rekognition": (
        {"Labels": [{"Name": "a", "Confidence": 50}, {"Name": "b", "Confidence": 60}]},
        "Name",
        "Confidence",
    ),
    "google-vision": (GOOGLE, "description", "score"),
    "azure-vision": (AZURE, "name", "confidence"),
    "clarifai": (CLARIFAI, "name", "value"),
    "hugging-face": (HUGGING, "label", "score"),
    "json": ({"labels": [{"name": "a", "score": 0.1}, {"name": "b", "score": 0.9}]}, "name", "score"),
}
HOSTILE = [None, True, [], {}, [[]], "", " ", "nan", 1e400, -(10**400), 2.5, "x" * 2000, "\ud800", {"a": 1}, [1, "a"]]


def changed(value: Any, key: str | None, new: Any) -> Iterator[Any]:
    """``value`` with one thing in it replaced by ``new``: what stands under ``key``, or anything."""
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in list(steps):
        copy = dict(value) if isinstance(value, dict) else list(value)
        if key is None or step == key:
            copy[step] = new
            yield copy
        for other in changed(inner, key, new):
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[step] = other
            yield copy


@pytest.mark.parametrize("name", sorted(WHERE))
def test_wrong_labels_and_scores(name: str) -> None:
    body, label, score = WHERE[name]
    made = built(name)
    for new in (None, True, [], {}, "", " ", 2.5, "x" * 2000, "\ud800"):
        for wrong in changed(body, label, new):
            with pytest.raises(BadReply):
                made.reply(reply(wrong))
    for new in (None, True, [], {}, "0.5", -(10**400)):
        for wrong in changed(body, score, new):
            with pytest.raises(BadReply):
                made.reply(reply(wrong))


@pytest.mark.parametrize("name", [*sorted(WHERE), "v2", "tf-serving"])
def test_a_mutated_reply_is_an_answer_or_a_bad_reply(name: str) -> None:
    made = built(name)
    tensors = {"outputs": [V2_SCORES | {"parameters": {"labels": ["a", "b", "c"], "binary_data_size": None}}]}
    predictions = {"predictions": [{"p": [0.1, 0.9]}]}
    body = WHERE[name][0] if name in WHERE else tensors if name == "v2" else predictions
    tried = 0
    for new in HOSTILE:
        for wrong in changed(body, None, new):
            tried += 1
            try:
                found = made.reply(reply(json.dumps(wrong).replace("Infinity", "1e400").encode()))
            except BadReply:
                continue
            assert found
            assert all(isinstance(one, Scored) and one.label for one in found)
            assert all(one.score is None or math.isfinite(one.score) for one in found)
    assert tried > 30


def test_type_errors_of_expressions_are_bad_replies() -> None:
    for expression in ("max_by(labels, &score).name", "labels[?score > `0.5`].name | [0]", "length(labels)"):
        made = built("json", labels=expression, scores="")
        for body in ({"labels": None}, {"labels": 5}, {"labels": [{"name": None, "score": "x"}, {"score": 1}]}, {}):
            try:
                found = made.reply(reply(body))
            except BadReply:
                continue
            assert expression == "length(labels)"
            assert found == (Scored("2"),)


def test_services_that_fail_with_status_200() -> None:
    with pytest.raises(BadReply, match="Bad image data"):
        built("google-vision").reply(reply({"responses": [{"error": {"code": 3, "message": "Bad image data."}}]}))
    with pytest.raises(BadReply, match="no labelAnnotations in the reply"):
        built("google-vision").reply(reply({"responses": [{}]}))
    with pytest.raises(BadReply, match="Clarifai status 10020: Failure"):
        built("clarifai").reply(reply({"status": {"code": 10020, "description": "Failure"}, "outputs": []}))
    quota = {"responses": [{"error": {"code": 8, "message": "Quota exceeded."}}]}
    throttled = {"status": {"code": 11005, "description": "Throttled"}, "outputs": []}
    for name, body, busy in (
        ("google-vision", quota, True),
        ("google-vision", {"responses": [{"error": {"code": 3, "message": "Bad image data."}}]}, False),
        ("clarifai", throttled, True),
        ("clarifai", {"status": {"code": 10020, "description": "Failure"}, "outputs": []}, False),
    ):
        with pytest.raises(BadReply) as caught:
            built(name).reply(reply(body))
        assert isinstance(caught.value, Busy) == busy  # such a query is sent again
    for name, body in (
        ("rekognition", {"Labels": []}),
        ("azure-vision", {"tagsResult": {"values": []}}),
        ("hugging-face", []),
        ("json", {"labels": []}),
    ):
        with pytest.raises(BadReply, match="without labels"):
            built(name).reply(reply(body))


def test_errors_quote_the_service_without_secrets() -> None:
    secret = "sk-live-51H8x" + "A9b8C7d6E5f4" * 3
    texts = {
        json.dumps({"error": {"code": 403, "message": f"API key {secret} is not valid"}}): "API key [...] is not valid",
        json.dumps({"__type": "InvalidImageFormatException", "message": "no image"}): "no image",
        json.dumps({"status": {"code": 11102, "description": "Invalid request", "details": "x"}}): "Invalid request",
        json.dumps({"detail": [{"loc": ["body"], "msg": "Field required"}, 3]}): "Field required",
        f"<html><head><title>502 Bad Gateway</title></head>{secret}": "502 Bad Gateway",
        f"<p>denied\n\x1b[31mfor</p> '{secret}'": "denied [31mfor '[...]'",
        json.dumps({"__type": "ProvisionedThroughputExceededException"}): "ProvisionedThroughputExceededException",
        "": "",
    }
    assert {text: safe_text(text.encode()) for text in texts} == texts
    started = time.process_time()
    assert len({safe_text(c * 30_000) for c in (b"a", b"Ab", b"<", b"<a", b"\x00", b'["', b"[", b"{")}) <= 8
    assert time.process_time() - started < 2  # no text makes reading slow
    with pytest.raises(BadReply) as found:
        built("hugging-face").reply(reply({"error": f"Invalid token {secret}"}, 401))
    assert str(found.value) == "HTTP 401: Invalid token [...]"
    with pytest.raises(BadReply) as found:
        built("hugging-face").reply(reply([{"label": 0.5, "score": secret}]))
    assert secret not in str(found.value)


# The registry


def test_formats_record_the_options_that_affect_votes(photo: Picture) -> None:
    for name in FORMATS:
        about = built(name).about
        assert json.loads(json.dumps(about)) == about
        assert FORMATS.note(name)
    assert set(ENDPOINTS) | set(KEY_HEADERS) <= set(FORMATS)
    with pytest.raises(UserError, match="unknown protocol 'v3'"):
        FORMATS.get("v3")


# Votes over the wire


@pytest.fixture(scope="module")
def services(digits: Classifier) -> Iterator[TestClient]:
    with TestClient(cloud_app(digits, [])) as client:  # as a context it keeps one event loop, which is faster
        yield client


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v2", {"model": "digits"}),
        ("v2", {"model": "digits", "binary": True}),
        ("tf-serving", {"model": "digits", "output": "p", "labels": "classes"}),
        ("tf-serving", {"model": "digits", "b64": True}),
        (
            "json",
            {
                "send": "multipart",
                "key": "photo",
                "path": "form",
                "labels": "best.name",
                "scores": "best.percent",
                "percent": True,
            },
        ),
        ("hugging-face", {"model": "digits"}),
        ("rekognition", {"min_confidence": 0}),
        ("google-vision", {}),
        ("azure-vision", {}),
        ("clarifai", {}),
    ],
)
def test_votes_equal_the_local_ones(
    services: TestClient, digits: Classifier, noisy: torch.Tensor, name: str, options: dict[str, Any]
) -> None:
    made = built(name, **options)
    pictures = to_pictures(noisy)

    def send(request: Request) -> Reply:
        found = services.request(
            request.method, f"/{request.path}", content=request.body, headers=dict(request.headers)
        )
        return Reply(found.status_code, found.content, dict(found.headers))

    answers = [made.reply(send(made.request(picture)))[0] for picture in pictures]
    local = digits.logits(torch.stack([to_tensor(picture) for picture in pictures])).softmax(1)
    assert [int(one.label.split()[-1]) for one in answers] == local.argmax(1).tolist()
    assert len(set(local.argmax(1).tolist())) == 10
    if answers[0].score is not None:
        assert np.allclose([one.score for one in answers], local.max(1).values, atol=1e-6)
