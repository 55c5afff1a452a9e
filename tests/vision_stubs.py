"""Stand-ins for cloud services, on loopback, that really classify: the digits network behind each wire format."""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from servers import wait_for
from sklearn.datasets import load_digits

from certify.blackbox.encoding import from_bytes, to_tensor
from certify.models.classifier import Classifier

Log = list[dict[str, str]]


def noisy_digits(count: int = 50) -> torch.Tensor:
    """Noisy digits ``(count, 1, 8, 8)`` of the test part, many of them misread."""
    images = torch.from_numpy(load_digits().images[-count:]).float()[:, None] / 16
    return images + 0.4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(7))


def probabilities(classifier: Classifier, tensor: torch.Tensor) -> list[float]:
    """Of one image ``(C, H, W)``."""
    with torch.no_grad():
        return classifier.logits(tensor[None])[0].softmax(0).tolist()


def from_file(classifier: Classifier, content: bytes) -> list[tuple[str, float]]:
    """Names and probabilities of an image file, best first."""
    found = probabilities(classifier, to_tensor(from_bytes(content, 1)))
    return sorted(((f"digit {n}", p) for n, p in enumerate(found)), key=lambda pair: -pair[1])


def cloud_app(classifier: Classifier, log: Log) -> FastAPI:
    """Every REST service at its documented path; ``log`` gets the headers of each request."""
    app = FastAPI()

    @app.post("/")
    async def rekognition(request: Request) -> Response:
        body = json.loads(await request.body())
        log.append(dict(request.headers))
        found = from_file(classifier, base64.b64decode(body["Image"]["Bytes"]))[: body["MaxLabels"]]
        labels = [{"Name": n, "Confidence": 100 * p, "Instances": [], "Parents": []} for n, p in found]
        text = json.dumps({"LabelModelVersion": "3.0", "Labels": labels})
        return Response(text, media_type="application/x-amz-json-1.1")

    @app.post("/v1/images:annotate")
    async def google(request: Request) -> dict[str, Any]:
        log.append(dict(request.headers))
        one = (await request.json())["requests"][0]
        assert one["features"][0]["type"] == "LABEL_DETECTION"
        found = from_file(classifier, base64.b64decode(one["image"]["content"]))[: one["features"][0]["maxResults"]]
        return {"responses": [{"labelAnnotations": [{"mid": "/m", "description": n, "score": p} for n, p in found]}]}

    @app.post("/computervision/imageanalysis:analyze")
    async def azure(request: Request) -> dict[str, Any]:
        log.append(dict(request.headers))
        assert dict(request.query_params)["features"] == "tags"
        found = from_file(classifier, await request.body())
        values = [{"name": n, "confidence": p} for n, p in found]
        return {"modelVersion": "2023-10-01", "metadata": {"width": 8, "height": 8}, "tagsResult": {"values": values}}

    @app.post("/v2/users/{user}/apps/{name}/models/{model}/outputs")
    async def clarifai(request: Request) -> dict[str, Any]:
        log.append(dict(request.headers))
        image = (await request.json())["inputs"][0]["data"]["image"]
        found = from_file(classifier, base64.b64decode(image["base64"]))
        concepts = [{"id": f"ai_{n}", "name": n, "value": p, "app_id": "main"} for n, p in found]
        ok = {"code": 10000, "description": "Ok"}
        return {"status": ok, "outputs": [{"id": "1", "status": ok, "data": {"concepts": concepts}}]}

    @app.post("/models/digits")
    async def hugging_face(request: Request) -> list[dict[str, Any]]:
        found = from_file(classifier, await request.body())
        return [{"label": n, "score": p} for n, p in found[:5]]

    @app.post("/form")
    async def form(request: Request) -> dict[str, Any]:
        head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
        (file,) = message_from_bytes(head + await request.body(), policy=policy.HTTP).iter_parts()  # type: ignore[attr-defined]
        name, share = from_file(classifier, file.get_payload(decode=True))[0]
        return {"best": {"name": name, "percent": 100 * share}}

    @app.post("/v1/models/digits:predict")
    async def tf_serving(request: Request) -> dict[str, Any]:
        one = (await request.json())["instances"][0]
        if isinstance(one, dict):
            return {"predictions": [from_file(classifier, base64.b64decode(one["b64"]))[0][0]]}
        pixels = torch.tensor(one, dtype=torch.float32).permute(2, 0, 1)
        return {"predictions": [{"classes": list("0123456789"), "p": probabilities(classifier, pixels)}]}

    @app.post("/v2/models/digits/infer")
    async def v2(request: Request) -> Response:
        body, head = await request.body(), request.headers.get("inference-header-content-length")
        asked = json.loads(body[: int(head)] if head else body)
        one = asked["inputs"][0]
        data = np.frombuffer(body[int(head) :], "<f4") if head else np.array(one["data"], np.float32)
        scores = probabilities(classifier, torch.from_numpy(data.copy()).reshape(one["shape"])[0])
        out: dict[str, Any] = {"name": "scores", "datatype": "FP32", "shape": [1, 10]}
        if not head:
            return Response(json.dumps({"model_name": "digits", "outputs": [out | {"data": [scores]}]}))
        out["parameters"] = {"binary_data_size": 40}
        text = json.dumps({"model_name": "digits", "outputs": [out]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        return Response(text + struct.pack("<10f", *scores), headers=headers)

    return app


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """An ASGI application on a free port of loopback, as its URL; gone when the block ends."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=6))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield f"http://127.0.0.1:{door.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
