"""The server: answers equal the smoothed classifier's, invalid requests are refused, accepted ones are answered."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import math
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import tracemalloc
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from browser import browser
from command import run
from fastapi.testclient import TestClient
from PIL import Image
from raw_png import raw_png
from servers import wait_for
from serving import ALPHA, INFER, LIMITS, N0, SEED, SIZE, Held, N, outputs, process, request, send, serving
from starlette.requests import Request as HttpRequest

import certify
from certify import SmoothedClassifier, load_images, read_run
from certify.blackbox.answers import ABSTENTION, OUTSIDE, LabelIndex
from certify.blackbox.client.query_client import QueryClient
from certify.blackbox.client.rate_limit import QueryLimits
from certify.blackbox.encoding import AsSent, to_pictures, to_tensor
from certify.blackbox.ledger import InMemoryLog
from certify.blackbox.protocols.v2 import metadata_request, only_model, options_from, v2
from certify.blackbox.protocols.v2_codec import LENGTH_HEADER
from certify.blackbox.service_spec import ServiceSpec
from certify.blackbox.types import Answer, Picture, Query, Reply, Request, Scored
from certify.engine.contract import QUERIES
from certify.engine.noisy_classifier import noise_name
from certify.errors import BudgetSpent, UserError
from certify.models.classifier import Classifier
from certify.serve.admission import Admission, Limits, Refused
from certify.serve.app import site_check
from certify.serve.batching import Service, class_names, stream_name
from certify.serve.endpoint import Endpoint
from certify.serve.protocol import RequestOptions, read_request
from certify.smoothing.procedures import Certify, Decide


@pytest.fixture(scope="module")
def client(digits: Classifier) -> Iterator[TestClient]:
    with serving(digits) as (found, *_):
        yield found


@pytest.fixture(scope="module")
def images(digits: Classifier) -> np.ndarray:
    found = load_images("digits", digits, skip=100)
    grey = torch.full(SIZE, 0.5)  # looks like no digit
    return torch.stack([*(found.load(i) for i in range(4)), grey]).numpy()


def binary(images: np.ndarray, **more: Any) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of a request with a binary tensor."""
    datatype = "UINT8" if images.dtype == np.uint8 else "FP32"
    raw = images.tobytes()
    tensor = {"name": "image", "datatype": datatype, "shape": list(images.shape)}
    text = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}], **more}).encode()
    return text + raw, {LENGTH_HEADER: str(len(text)), "content-type": "application/octet-stream"}


# Answers


def test_labels_and_radii_are_those_of_the_smoothed_classifier(
    client: TestClient, digits: Classifier, images: np.ndarray
) -> None:
    reply = client.post(INFER, json=request(images, id="five"))
    found = outputs(reply)
    smoothed = SmoothedClassifier(digits, 0.25)
    wanted = [smoothed.certify(image, n0=N0, n=N, alpha=ALPHA, seed=SEED) for image in images]
    assert found["label"] == [c.prediction for c in wanted]
    assert found["radius"] == [c.radius for c in wanted]
    assert found["p_lower"] == [c.p_lower for c in wanted]
    assert found["samples"] == [N0 + N] * 5
    assert found["name"] == ["abstained" if c.abstained else str(c.prediction) for c in wanted]
    assert {c.abstained for c in wanted} == {True, False}  # both kinds were compared
    said = reply.json()
    assert (said["model_name"], said["model_version"], said["id"]) == ("digits", "1", "five")
    assert said["parameters"] == {
        "samples": 5 * (N0 + N),
        "failures": 0,
        "abstentions": sum(c.abstained for c in wanted),
        "sigma": 0.25,
        "noise": "gaussian",
        "norm": "l2",
        "alpha": ALPHA,
        "denoiser": "none",
        "input": "1x8x8",
        "alpha_all": 0.05,
    }


@pytest.mark.parametrize("parameters", [{"samples": 100}, {"radius": 0.1, "samples": 400}])
def test_radii_of_several_images_are_not_among_the_parameters(
    client: TestClient, images: np.ndarray, parameters: dict[str, Any]
) -> None:
    """Each of m statements fails with probability alpha, one or more of them with up to m alpha."""
    said = client.post(INFER, json=request(images[1:2], parameters=parameters)).json()
    found = {output["name"]: output["data"] for output in said["outputs"]}
    claim = {name: said["parameters"][name] for name in ("radius", "p_lower", "alpha", "alpha_all")}
    assert claim == {"radius": found["radius"][0], "p_lower": found["p_lower"][0], "alpha": 0.01, "alpha_all": 0.01}
    assert claim["radius"] > 0
    for many, together in ((3, 0.03), (20, 0.2)):
        said = client.post(INFER, json=request(images[[1] * many], parameters=parameters)).json()
        assert not said["parameters"].keys() & {"radius", "p_lower"}
        assert (said["parameters"]["alpha"], said["parameters"]["alpha_all"]) == (0.01, together)


def test_radius_decisions_equal_the_smoothed_classifiers(
    client: TestClient, digits: Classifier, images: np.ndarray
) -> None:
    body = request(images, parameters={"radius": 0.1, "samples": 1500})
    found = outputs(client.post(INFER, json=body))
    smoothed = SmoothedClassifier(digits, 0.25)
    wanted = [smoothed.decide(image, radius=0.1, n=1500, alpha=ALPHA, seed=SEED) for image in images]
    assert found["label"] == [d.prediction for d in wanted]
    assert found["outcome"] == [d.outcomes[0] for d in wanted]
    assert found["radius"] == [0.1 if d.robust else 0.0 for d in wanted]
    assert found["samples"] == [d.drawn for d in wanted]
    assert {d.robust for d in wanted} >= {True, False}
    p0 = smoothed.noise.probability(0.1)
    assert found["p_lower"] == [p0 if d.robust else 0.0 for d in wanted]


def test_samples_and_seed_parameters(client: TestClient, digits: Classifier, images: np.ndarray) -> None:
    smoothed, image = SmoothedClassifier(digits, 0.25), torch.from_numpy(images[1])
    body = request(images[1:2], parameters={"samples": 900, "seed": "5"}, outputs=[{"name": "votes"}])
    name = stream_name(noise_name(image), 5)
    wanted = smoothed.certify(image, n0=N0, n=900, alpha=ALPHA, seed=SEED, image_id=name)
    assert outputs(client.post(INFER, json=body)) == {"votes": list(wanted.counts)}
    again = outputs(client.post(INFER, json={**body, "parameters": {"samples": 900}}))
    assert again == {"votes": list(smoothed.certify(image, n0=N0, n=900, alpha=ALPHA, seed=SEED).counts)}
    assert again != {"votes": list(wanted.counts)}


def test_each_server_draws_a_secret_seed() -> None:
    smoothed = SmoothedClassifier(Held(), 0.25, batch_size=50)
    first, second = (Service(smoothed, SIZE, Certify(n=100), Limits(), class_names(None))._seed for _ in range(2))
    assert first != second
    assert max(first, second) > 2**100  # nobody can try them all


def test_encodings_of_the_same_tensor_agree(client: TestClient, images: np.ndarray) -> None:
    eight = (images * 255).round().astype(np.uint8)
    exact = eight.astype(np.float32) / 255
    wanted = outputs(client.post(INFER, json=request(exact)))
    nested = request(exact)
    nested["inputs"][0]["data"] = exact.tolist()
    negative = np.where(exact == 0, np.float32(-0.0), exact)
    assert negative.tobytes() != exact.tobytes()
    for reply in (
        client.post(INFER, json=request(negative)),
        client.post(INFER, content=binary(negative)[0], headers=binary(negative)[1]),
        client.post(INFER, json=nested),
        client.post(INFER, json=request(eight)),
        client.post("/v2/models/digits/versions/1/infer", content=binary(exact)[0], headers=binary(exact)[1]),
        client.post(INFER, content=binary(eight)[0], headers=binary(eight)[1]),
        client.post(INFER, content=json.dumps(request(exact)), headers={"content-type": ""}),
    ):
        assert outputs(reply) == wanted


def test_binary_outputs_equal_json_outputs(client: TestClient, images: np.ndarray) -> None:
    wanted = outputs(client.post(INFER, json=request(images)))
    body, headers = binary(images, parameters={"binary_data_output": True})
    reply = client.post(INFER, content=body, headers=headers)
    assert reply.headers["content-type"] == "application/octet-stream"
    length = int(reply.headers[LENGTH_HEADER])
    said, rest = json.loads(reply.content[:length]), reply.content[length:]
    assert [o["name"] for o in said["outputs"]] == list(wanted)
    for output in said["outputs"]:
        raw, rest = rest[: output["parameters"]["binary_data_size"]], rest[output["parameters"]["binary_data_size"] :]
        if output["datatype"] == "BYTES":
            values = []
            while raw:
                (size,) = struct.unpack("<I", raw[:4])
                values.append(raw[4 : 4 + size].decode())
                raw = raw[4 + size :]
        else:
            values = np.frombuffer(raw, {"INT64": "<i8", "FP64": "<f8"}[output["datatype"]]).tolist()
        assert values == wanted[output["name"]]
        assert "data" not in output
    assert rest == b""


@pytest.mark.parametrize("form", [True, False])
def test_votes_of_several_images(client: TestClient, digits: Classifier, images: np.ndarray, form: bool) -> None:
    smoothed = SmoothedClassifier(digits, 0.25)
    wanted = [smoothed.certify(image, n0=N0, n=N, alpha=ALPHA, seed=SEED).counts for image in images]
    asked = [{"name": "votes", "parameters": {"binary_data": form}}]
    reply = client.post(INFER, json=request(images, outputs=asked))
    if form:
        length = int(reply.headers[LENGTH_HEADER])
        (output,) = json.loads(reply.content[:length])["outputs"]
        found = np.frombuffer(reply.content[length:], "<i8").reshape(output["shape"])
    else:
        (output,) = reply.json()["outputs"]
        found = np.reshape(output["data"], output["shape"])
    assert found.tolist() == [list(votes) for votes in wanted]


def test_concurrent_requests_get_the_same_answers(digits: Classifier, images: np.ndarray) -> None:
    kinds = [{}, {"samples": 1000}, {"radius": 0.1}, {"radius": 0.2, "samples": 3000}, {"samples": 40, "seed": 3}]
    bodies = [request(images[i : i + 1], parameters=kind) for kind in kinds for i in range(4)]
    with serving(digits, Limits(concurrency=100), batch_size=64) as (client, *_):
        alone = [outputs(client.post(INFER, json=body)) for body in bodies]
        with ThreadPoolExecutor(10) as pool:
            together = list(pool.map(lambda body: outputs(client.post(INFER, json=body)), bodies))
    assert together == alone


def test_a_small_request_does_not_wait_for_a_large_one(images: np.ndarray) -> None:
    """The images of all requests are sampled together."""
    held, order = Held(held=True), list[str]()
    smoothed = SmoothedClassifier(held, 0.25, batch_size=50)
    with Service(smoothed, SIZE, Certify(n0=N0, n=N), LIMITS, class_names(None)) as service:
        (large,) = service.submit(images[:1], RequestOptions(samples=3000))
        assert held.called.wait(60)
        (small,) = service.submit(images[1:2], RequestOptions(samples=50))
        for name, future in (("large", large), ("small", small)):
            future.add_done_callback(lambda _, name=name: order.append(name))
        held.let.set()
        assert (small.result(60).samples, large.result(60).samples) == (N0 + 50, N0 + 3000)
    assert order == ["small", "large"]


def test_the_v2_client_of_this_package_reads_responses(
    client: TestClient, digits: Classifier, images: np.ndarray
) -> None:
    (picture,) = to_pictures(torch.from_numpy(images[1:2]))
    wanted = SmoothedClassifier(digits, 0.25).certify(to_tensor(picture), n0=N0, n=N, alpha=ALPHA, seed=SEED)
    assert not wanted.abstained
    asks = metadata_request("digits")
    about = client.get(asks.path)
    metadata = Reply(about.status_code, about.content, about.headers)
    for output in ("label", "name"):
        for form in (False, True):
            way = v2(**options_from(metadata, {"model": "digits", "output": output, "binary": form}))
            asks = way.request(picture)
            reply = client.post(asks.path, content=asks.body, headers=dict(asks.headers))
            (found,) = way.reply(Reply(reply.status_code, reply.content, reply.headers))
            assert found.label == str(wanted.prediction)


def test_a_client_of_this_package_needs_the_address_alone(client: TestClient) -> None:
    """The server names its model, which of its outputs is the label, and how an abstention reads."""

    async def sender(asked: Request) -> Reply:
        reply = client.request(asked.method, asked.path, content=asked.body, headers=dict(asked.headers))
        return Reply(reply.status_code, reply.content, reply.headers)

    found = ServiceSpec("http://here", "v2", {}).with_metadata(sender)
    assert found.options["model"] == "digits"
    assert found.options["output"] == "name"
    recorded = {"format": dict(found.format.about)}
    again = ServiceSpec("http://here", "v2", {}).as_recorded(recorded)
    assert not again.needs_metadata
    assert again.format.about == found.format.about
    output = {"name": "name", "datatype": "BYTES", "shape": [1], "data": ["abstained"]}
    (answer,) = found.format.reply(Reply(200, json.dumps({"outputs": [output]}).encode(), {}))
    assert answer.label == ABSTENTION
    assert LabelIndex().vote((answer,)) == OUTSIDE


@pytest.mark.parametrize("names", [None, ["zero", "one"]])
def test_a_negative_label_is_an_abstention(names: list[str] | None) -> None:
    """Without metadata, too: an option ``output=label`` and the others given by hand must not make -1 a class."""
    output = {"name": "label", "datatype": "INT64", "shape": [1], "data": [-1], "parameters": {"labels": names}}
    reply = Reply(200, json.dumps({"outputs": [output]}).encode(), {})
    (answer,) = v2(model="digits", input="image", output="label").reply(reply)
    assert LabelIndex().vote((answer,)) == OUTSIDE


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, [{"name": "b"}, {"name": "a"}], "the server has the models a, b: give the protocol option model=NAME"),
        (200, [], "the server has the models none"),
        (404, {"error": "no such path"}, "the server does not list its models .*model=NAME, or another protocol"),
    ],
)
def test_a_server_without_exactly_one_model_is_refused(status: int, body: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        only_model(Reply(status, json.dumps(body).encode(), {}))


@pytest.mark.slow
def test_an_audit_of_a_smoothed_service_names_its_abstentions(tmp_path: Path) -> None:
    """By the command and from Python, with the address alone; the service abstains often at this n."""
    common = {"sigma": 0.25, "n0": 5, "n": 30, "budget": 400}
    with process("--n", "20", "--n0", "5", "--seed", "1") as (_, address):
        options = [text for name, value in common.items() for text in (f"--{name}", str(value))]
        run("audit", "--endpoint", address, "--data", "digits", "--skip", "100", *options, "--out", str(tmp_path / "a"))
        audited = certify.audit(address, "digits", skip=100, out=tmp_path / "b", progress=False, **common)  # type: ignore[arg-type]
    for path in (tmp_path / "a", tmp_path / "b"):
        rows = read_run(path / "run.jsonl").images
        assert sum(row.outside or 0 for row in rows) > 0
        for row in rows:
            assert sum(row.votes.values()) + row.failures == row.trials
            assert (row.outside or 0) <= row.failures
            assert not {"abstained", ABSTENTION, "-1"} & set((row.classes or {}).values())
    assert [row.votes for row in audited] == [row.votes for row in read_run(tmp_path / "a" / "run.jsonl").images]
    assert "abstained" in (tmp_path / "a" / "report.html").read_text()


def test_health_metadata_and_unknown_names(client: TestClient) -> None:
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").status_code == client.get("/v2/health/ready").status_code == 200
    assert client.get("/v2/models/digits/ready").status_code == 200
    metadata = client.get("/v2/models/digits").json()
    assert metadata["inputs"][0]["shape"] == [-1, *SIZE]
    assert [o["name"] for o in metadata["outputs"]][:2] == ["label", "name"]
    for path in (
        "/v2/models/other",
        "/v2/models/other/ready",
        "/v2/models/digits/versions/2",
        "/docs",
        "/openapi.json",
    ):
        reply = client.get(path)
        assert reply.status_code == 404
        assert reply.json()["error"]


def test_every_response_forbids_content_sniffing(client: TestClient) -> None:
    for method, path in (("GET", "/"), ("GET", "/metrics"), ("GET", "/v2"), ("GET", "/none"), ("POST", INFER)):
        assert client.request(method, path).headers["x-content-type-options"] == "nosniff"


def test_the_page_loads_nothing_from_other_sites(client: TestClient) -> None:
    reply = client.get("/")
    assert "connect-src 'self'" in reply.headers["content-security-policy"]
    assert "'unsafe" not in reply.headers["content-security-policy"]
    addresses = set(re.findall(r"https?://[^\s\"']+", reply.text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # the name of a language, which nobody opens


def test_an_uploaded_image_is_classified_like_its_tensor(
    client: TestClient, digits: Classifier, tmp_path: Path, images: np.ndarray
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tensor = load_images(str(tmp_path / "a.png"), digits, labels="none").load(0)
    body = (tmp_path / "a.png").read_bytes()
    reply = client.post("/classify?samples=300", content=body, headers={"content-type": "image/png"})
    assert reply.status_code == 200
    wanted = SmoothedClassifier(digits, 0.25).certify(tensor, n0=N0, n=300, alpha=ALPHA, seed=SEED)
    said = reply.json()
    assert (said["label"], said["radius"], said["samples"]) == (wanted.prediction, wanted.radius, N0 + 300)
    assert {v["label"]: v["votes"] for v in said["votes"]} == {c: k for c, k in enumerate(wanted.counts) if k}
    assert said["votes_cast"] == 300


def test_the_reply_to_the_page_holds_the_image_that_was_certified(
    client: TestClient, digits: Classifier, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    certified = load_images(str(tmp_path / "a.png"), digits, labels="none").load(0)
    reply = client.post("/classify", content=(tmp_path / "a.png").read_bytes(), headers=IMAGE).json()
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["picture"]))))
    assert np.array_equal(shown, (certified[0].numpy() * 255).round())


@pytest.mark.slow
def test_the_page_offers_an_example(digits: Classifier, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (8, 8), 51).save(tmp_path / "mine.png")
    for options, expected in ((), None), (("--example", str(tmp_path / "mine.png")), 51):
        with process("--n", "100", *options) as (_, address):
            assert '"example": true' in httpx2.get(address).text
            content = httpx2.get(f"{address}/example").content
            reply = httpx2.post(f"{address}/classify", content=content, headers=IMAGE)
        image = np.asarray(Image.open(io.BytesIO(content)))
        assert image.shape == (8, 8)
        if expected is None:
            assert reply.json()["name"] == "8"  # a digit, which it recognises
        else:
            assert np.all(image == expected)
    run("serve", "--model", "digits", "--sigma", "0.25", "--port", "0", "--example", str(tmp_path / "none.png"), code=2)
    assert "--example" in capfd.readouterr().err


def test_a_server_without_an_example_says_so(client: TestClient) -> None:
    assert '"example": false' in client.get("/").text
    assert client.get("/example").status_code == 404


def test_the_repository_index_names_the_model(client: TestClient) -> None:
    assert client.post("/v2/repository/index").json() == [{"name": "digits", "version": "1", "state": "READY"}]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_random_change_of_the_page_has_the_certified_norm(client: TestClient) -> None:
    (function,) = re.findall(r"^function randomChange\(.*?^}$", client.get("/").text, re.DOTALL | re.MULTILINE)
    changes = "['l1', 'l2', 'linf'].map((norm) => [...randomChange(3072, norm, 0.37)])"
    script = f"{function}\nconsole.log(JSON.stringify({changes}))"
    printed = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True).stdout
    for change, order in zip(json.loads(printed), (1, 2, math.inf), strict=True):
        assert np.linalg.norm(change, order) == pytest.approx(0.37, rel=1e-9)
        assert abs(np.mean(np.sign(change))) < 5 / math.sqrt(3072)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_of_the_page_displays_the_replies(client: TestClient, images: np.ndarray) -> None:
    out = io.BytesIO()
    Image.fromarray((images[1, 0] * 255).round().astype(np.uint8)).save(out, "PNG")
    paths = ("classify?", "classify?radius=0.1", "classify?radius=9")
    replies = {path: client.post(f"/{path}", content=out.getvalue(), headers=IMAGE).json() for path in paths}
    certified = replies["classify?"]
    given = json.dumps({"html": client.get("/").text, "replies": replies})
    child = Path(__file__).parent / "page_child.js"
    printed = subprocess.run(["node", str(child)], input=given, capture_output=True, text=True, check=True).stdout
    said = json.loads(printed)
    free, decided, refused = said["found"]
    assert said["sent"] == list(paths)
    assert free["verdict"] == decided["verdict"] == certified["name"]
    for words in ("sigma 0.25", f"l2 norm below {certified['radius_text']}", "probability at most 0.01"):
        assert words in free["claim"]
    assert "below 0.1000," in decided["claim"]
    assert free["votes"] == [[vote["name"], f"{vote['votes']:,}"] for vote in certified["votes"]]
    assert f"{math.ceil(255 * certified['radius']) - 1} of 255 grey levels" in free["grey"]
    assert free["allowed"]
    before, after, _ = (np.array(panel) for panel in free["painted"])
    assert len(before) == len(after) == 64
    assert np.linalg.norm(after - before) / 255 == pytest.approx(certified["radius"], abs=0.05)  # 8 bits
    assert refused["state"].startswith("No answer: ")
    assert not refused["answer"]


def test_the_page_displays_a_radius_rounded_down(client: TestClient, images: np.ndarray) -> None:
    """The text comes from the server, rounded down to four decimals; the page's script formats no radius."""
    out = io.BytesIO()
    Image.fromarray((images[1, 0] * 255).round().astype(np.uint8)).save(out, "PNG")
    found = [client.post(f"/classify?samples={n}", content=out.getvalue(), headers=IMAGE) for n in range(100, 400, 20)]
    certified = [reply.json() for reply in found if reply.json()["radius"]]
    assert len(certified) > 10
    for said in certified:
        radius, text = Decimal(repr(said["radius"])), Decimal(said["radius_text"])
        assert text <= radius < text + Decimal("0.0001")
    page = client.get("/").text
    assert "norm below ${answer.radius_text}, in pixels" in page
    assert "answer.radius." not in page


def test_metrics(digits: Classifier, images: np.ndarray) -> None:
    with serving(digits) as (client, *_):
        answers = outputs(client.post(INFER, json=request(images)))
        client.post(INFER, json=request(images, parameters={"samples": 10**6}))
        text = client.get("/metrics").text
    abstained = sum(label < 0 for label in answers["label"])
    route = "/v2/models/{name}/infer"
    for line in (
        f'certify_requests_total{{route="{route}",status="200"}} 1.0',
        f'certify_requests_total{{route="{route}",status="400"}} 1.0',
        f'certify_request_seconds_count{{route="{route}"}} 2.0',
        'certify_rejected_total{reason="budget"} 1.0',
        f"certify_samples_total {5 * (N0 + N)}.0",
        f"certify_abstentions_total {abstained}.0",
        f'certify_images_total{{outcome="certified"}} {5 - abstained}.0',
        "certify_failures_total 0.0",
        "certify_queue_length 0.0",
    ):
        assert line in text.splitlines()


# Refusals


def picture(width: int, height: int, kind: str = "PNG", **how: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, kind, **how)
    return out.getvalue()


ONE = np.full((1, *SIZE), 0.5, np.float32)
NUMBERS = json.dumps([0.5] * 64)
IMAGE = {"content-type": "image/png"}


def tensor(**changed: Any) -> dict[str, Any]:
    found = request(ONE)
    found["inputs"][0] |= changed
    return {"json": {**found, "inputs": [{k: v for k, v in found["inputs"][0].items() if v is not ...}]}}


def asked(**parameters: Any) -> dict[str, Any]:
    return {"json": request(ONE, parameters=parameters)}


def text(body: str | bytes, **headers: str) -> dict[str, Any]:
    return {"content": body, "headers": {"content-type": "application/json", **headers}}


def raw(size: Any, tail: bytes, *, length: str | None = None, **more: Any) -> dict[str, Any]:
    given = {"name": "image", "datatype": "FP32", "shape": [1, *SIZE], "parameters": {"binary_data_size": size}, **more}
    head = json.dumps({"inputs": [given]}).encode()
    return text(head + tail, **{LENGTH_HEADER: str(len(head)) if length is None else length})


def numbers(values: str) -> dict[str, Any]:
    return text(f'{{"inputs": [{{"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": {values}}}]}}')


def upload(content: bytes, path: str = "/classify", **headers: str) -> dict[str, Any]:
    return {"path": path, "content": content, "headers": {**IMAGE, **headers}}


PROGRESSIVE = picture(16, 16, "JPEG", progressive=True)
SCANS = PROGRESSIVE[:-2] + PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2] * 101 + PROGRESSIVE[-2:]
HOSTILE: dict[str, tuple[int, str, dict[str, Any]]] = {
    "no body": (400, "not JSON", text("")),
    "not JSON": (400, "not JSON", text("{inputs")),
    "not UTF-8": (400, "not JSON", text(b'{"id": "\xff\xfe"}')),
    "truncated JSON": (400, "not JSON", text(json.dumps(request(ONE))[:-9])),
    "two documents": (400, "not JSON", text("{} {}")),
    "a list": (400, "JSON list", text("[]")),
    "a number": (400, "JSON number", text("1")),
    "null": (400, "JSON null", text("null")),
    "nothing in it": (400, "'inputs'", text("{}")),
    "deep lists": (413, "more than 1,230 lists", text("[" * 40_000)),
    "deep objects": (413, "more than 1,230 lists", text('{"a":' * 9000 + "1" + "}" * 9000)),
    "deeper than a parser follows": (400, "recursion limit", text('{"a":' * 900 + "1" + "}" * 900)),
    "depth behind strings": (413, "more than 1,230 lists", text('["' + "]" * 49_000 + '",' + "[" * 49_000)),
    "deep data": (400, "not one tensor", tensor(data=json.loads("[" * 15 + "0.5" + "]" * 15))),
    "empty lists": (413, "more than 1,230 lists", text("[" + "[]," * 30_000 + "[]]")),
    "empty objects": (413, "more than 1,230 lists", text("[" + "{}," * 30_000 + "{}]")),
    "many numbers": (413, "more than 2,702 values", numbers(json.dumps([0] * 30_000))),
    "many members": (413, "more than 1,000 members", text(json.dumps({f"{i}": 0 for i in range(1001)}))),
    "a long id": (400, "1,001 characters", {"json": request(ONE, id="x" * 1001)}),
    "samples of 5,000 digits": (
        400,
        "not JSON",
        text(json.dumps(request(ONE, parameters={"samples": 1})).replace('"samples": 1', f'"samples": -{"9" * 5000}')),
    ),
    "a shape of 4,300 digits": (
        400,
        "shape",
        text(json.dumps(tensor(shape=[1])["json"]).replace("[1]", f"[{'9' * 4300}]")),
    ),
    "samples beyond the bounds": (400, "1,000,000,000", asked(samples=2**62)),
    "samples in text of 5,000 digits": (400, "samples", asked(samples="9" * 5000)),
    "number of many digits": (400, "not JSON", numbers("9" * 50_000)),
    "huge": (413, "limit", text(" " * 100_001)),
    "huge, unannounced": (413, "limit", {"content": (b" " * 1000 for _ in range(200)), "headers": {}}),
    "NaN": (400, "nan", numbers(NUMBERS.replace("0.5", "NaN", 1))),
    "infinity": (400, "inf", numbers(NUMBERS.replace("0.5", "-Infinity", 1))),
    "infinite in decimal": (400, "inf", numbers(NUMBERS.replace("0.5", "1e999", 1))),
    "infinite in float32": (400, "inf", numbers(NUMBERS.replace("0.5", "1e39", 1))),
    "above 1": (400, "expected [0, 1]", numbers(NUMBERS.replace("0.5", "1.5", 1))),
    "below 0": (400, "expected [0, 1]", numbers(NUMBERS.replace("0.5", "-1e-3", 1))),
    "no inputs": (400, "'inputs'", {"json": {"inputs": []}}),
    "two inputs": (400, "'inputs'", {"json": {"inputs": request(ONE)["inputs"] * 2}}),
    "input of text": (400, "'inputs'", {"json": {"inputs": ["image"]}}),
    "wrong type": (400, "FP32", tensor(datatype="FP16")),
    "type of another kind": (400, "FP32", tensor(datatype=["FP32"])),
    "no type": (400, "FP32", tensor(datatype=...)),
    "no shape": (400, "shape", tensor(shape=...)),
    "negative shape": (400, "shape", tensor(shape=[-1, 1, 8, 8])),
    "empty batch": (400, "shape", tensor(shape=[0, 1, 8, 8], data=[])),
    "shape without batch": (400, "shape", tensor(shape=[1, 8, 8])),
    "shape of truth": (400, "shape", tensor(shape=[True, 1, 8, 8])),
    "shape of fractions": (400, "shape", tensor(shape=[1.0, 1, 8, 8])),
    "shape of text": (400, "shape", tensor(shape="1188")),
    "other channels": (400, "expected [-1, 1, 8, 8]", tensor(shape=[1, 3, 8, 8], data=[0.5] * 192)),
    "shape beyond memory": (413, "pixels", tensor(shape=[2**31 - 1, 1, 8, 8])),
    "shape beyond integers": (400, "shape", tensor(shape=[2**70, 1, 8, 8])),
    "too many pixels": (413, "pixels", tensor(shape=[24, 1, 8, 8], data=[0] * 24 * 64)),
    "too few numbers": (400, "64 numbers", tensor(data=[0.5] * 63)),
    "too many numbers": (400, "64 numbers", tensor(data=[0.5] * 65)),
    "one long text": (400, "64 numbers", tensor(data=["x" * 90_000] + [0.5] * 63)),
    "numbers beyond floats": (400, "1e308", numbers(NUMBERS.replace("0.5", "9" * 400, 1))),
    "nested one level less": (400, "not one tensor", tensor(data=[[0.5] * 64])),
    "ragged data": (400, "not one tensor", tensor(data=[[0.5] * 8] * 7 + [[0.5] * 7])),
    "data of text": (400, "64 numbers", tensor(data=["0.5"] * 64)),
    "data of truth": (400, "64 numbers", tensor(data=[True] * 64)),
    "data of null": (400, "64 numbers", tensor(data=[None] * 64)),
    "data that is a number": (400, "'data'", tensor(data=0.5)),
    "no data": (400, "'data'", tensor(data=...)),
    "bytes of 256": (400, "0 to 255", tensor(datatype="UINT8", data=[256] * 64)),
    "bytes of a half": (400, "0 to 255", tensor(datatype="UINT8", data=[0.5] * 64)),
    "truncated tensor": (400, "256 bytes", raw(256, ONE.tobytes()[:-1])),
    "tensor too long": (400, "256 bytes", raw(256, ONE.tobytes() + b"\0")),
    "wrong tensor size": (400, "256 bytes", raw(8, ONE.tobytes())),
    "negative tensor size": (400, "256 bytes", raw(-256, ONE.tobytes())),
    "tensor of NaN": (400, "nan", raw(256, (ONE * np.nan).tobytes())),
    "tensor of infinity": (400, "inf", raw(256, (ONE * np.inf).tobytes())),
    "tensor twice": (400, "both", raw(256, ONE.tobytes(), data=[0.5] * 64)),
    "bytes of nobody": (400, "bytes follow", raw(None, ONE.tobytes())),
    "JSON longer than the body": (400, LENGTH_HEADER, raw(256, ONE.tobytes(), length="99999999")),
    "JSON of negative length": (400, LENGTH_HEADER, raw(256, ONE.tobytes(), length="-5")),
    "JSON of a length of 5,000 digits": (400, LENGTH_HEADER, raw(256, ONE.tobytes(), length="0" * 4999 + "1")),
    "shape of half a pair": (400, "not JSON", text(json.dumps(tensor(shape="\ud800")["json"]))),
    "size of half a pair": (400, "not JSON", raw("\ud800", ONE.tobytes())),
    "output of half a pair": (400, "not JSON", text(json.dumps(request(ONE, outputs=[{"name": "\ud800"}])))),
    "JSON cut short": (400, "not JSON", raw(256, ONE.tobytes(), length="20")),
    "no such output": (400, "output", {"json": request(ONE, outputs=[{"name": "logits"}])}),
    "outputs of text": (400, "output", {"json": request(ONE, outputs="label")}),
    "thousands of outputs": (413, "more than 1,230 lists", {"json": request(ONE, outputs=[{"name": "label"}] * 4000)}),
    "parameters of text": (400, "parameters", {"json": request(ONE, parameters="all")}),
    "a numeric id": (400, "id", {"json": request(ONE, id=5)}),
    "samples beyond the budget": (400, "10,000", asked(samples=10_001)),
    "no samples": (400, "samples", asked(samples=0)),
    "half a sample": (400, "samples", asked(samples=1.5)),
    "samples of text": (400, "samples", asked(samples="many")),
    "samples of truth": (400, "samples", asked(samples=True)),
    "a radius below 0": (400, "radius", asked(radius=-1)),
    "a radius of NaN": (400, "radius", asked(radius="nan")),
    "a radius beyond reach": (400, "radius", asked(radius=10.0)),
    "a negative seed": (400, "seed", asked(seed=-1)),
    "a seed in a list": (400, "seed", asked(seed=[1])),
    "a batch beyond the budget": (400, "budget|10,000", {"json": request(np.repeat(ONE, 23, 0))}),
    "a form": (
        415,
        "content type",
        {"content": b"a=1", "headers": {"content-type": "application/x-www-form-urlencoded"}},
    ),
    "text": (415, "content type", {"content": b"{}", "headers": {"content-type": "text/plain"}}),
    "a compressed body": (415, "compressed", text(zlib.compress(b" " * 10**7), **{"content-encoding": "gzip"})),
    "another model": (404, "'digits'", {"path": "/v2/models/..%5Cpasswd/infer", "json": request(ONE)}),
    "a path upwards": (404, "Not Found", {"path": "/v2/models/../../etc/passwd", "json": request(ONE)}),
    "a long name": (404, "'digits'", {"path": f"/v2/models/{'x' * 3000}/infer", "json": request(ONE)}),
    "another version": (404, "version", {"path": "/v2/models/digits/versions/9/infer", "json": request(ONE)}),
    "another method": (405, "Method", {"method": "PUT", "json": request(ONE)}),
    "decompression bomb": (400, "limit", upload(raw_png(60_000, 60_000, 8, 2, bytes(50_000)))),
    "image of too many pixels": (400, "limit", upload(picture(40, 40))),
    "image that is a line": (400, "20 times", upload(picture(30, 1))),
    "image that is a column": (400, "20 times", upload(picture(1, 30))),
    "empty image": (400, "empty", upload(b"")),
    "no image": (400, "not an image", upload(b"image" + bytes(100))),
    "JPEG of many scans": (400, "more than 100 scans", upload(SCANS)),
    "truncated image": (400, "damaged", upload(picture(30, 30)[:-40])),
    "image that is text": (415, "content type", upload(picture(8, 8), **{"content-type": "text/html"})),
    "image that is a form": (415, "content type", upload(b"", **{"content-type": "multipart/form-data; boundary=x"})),
    "image that is too long": (413, "limit", upload(bytes(100_001))),
    "image with samples beyond the budget": (400, "10,000", upload(picture(8, 8), "/classify?samples=99999")),
    "image with a strange radius": (400, "radius", upload(picture(8, 8), "/classify?radius=1e400")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_are_refused_with_a_reason(client: TestClient, images: np.ndarray, name: str) -> None:
    status, reason, how = HOSTILE[name]
    how = dict(how)
    reply = client.request(how.pop("method", "POST"), how.pop("path", INFER), **how)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert any(word in error for word in reason.split("|")), error
    assert len(error) < 400
    assert "Traceback" not in error
    assert outputs(client.post(INFER, json=request(images[:1], parameters={"samples": 20})))["samples"] == [N0 + 20]


def test_a_fault_of_the_server_gets_a_json_error(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*given: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr("certify.serve.app.read_request", stumble)
    reply = client.post(INFER, json=request(ONE))
    assert reply.status_code == 500
    assert reply.json() == {"error": "internal error; see the log of the server"}


def test_the_number_of_images_per_request_is_limited() -> None:
    few = Limits(max_images=3)
    for images in (np.repeat(ONE, 3, 0), np.repeat(ONE, 4, 0)):
        body = json.dumps(request(images)).encode()
        if len(images) == 3:
            assert len(read_request(body, {}, SIZE, few).images) == 3
            continue
        with pytest.raises(Refused, match="4 images; a request may have 3"):
            read_request(body, {}, SIZE, few)
        with pytest.raises(Refused, match="a request may have 256"):
            read_request(body.replace(b"[4, 1", b"[257, 1"), {}, SIZE, Limits())


@pytest.mark.parametrize(
    ("host", "origin", "allowed"),
    [
        ("127.0.0.1:80", None, True),
        ("localhost:80", "http://localhost:80", True),
        ("[::1]:80", "http://[::1]:80", True),
        ("127.0.0.1:80", "http://evil.example", False),
        ("127.0.0.1:80", "http://127.0.0.1:81", False),
        ("127.0.0.1:80", "null", False),
        ("127.0.0.1:80", "http://[", False),
        ("evil.example:80", "http://evil.example:80", False),  # a name that points to this machine
        ("evil.example:80", None, False),
        ("api.example", "https://api.example", True),
        ("127.0.0.1:80", "https://api.example", True),
        ("192.0.2.1:80", "http://192.0.2.1:80", True),
        ("192.0.2.1", None, True),
        ("[2001:db8::1]:80", None, True),
        ("192.0.2.1", "http://evil.example", False),
        ("192.0.2.1.evil.example", None, False),
        ("", None, False),
        (socket.gethostname(), None, True),
    ],
)
def test_requests_of_other_sites_are_refused(host: str, origin: str | None, allowed: bool) -> None:
    headers = [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin is not None else [])
    check = site_check(["API.example"])
    asks = HttpRequest({"type": "http", "headers": headers})
    if allowed:
        check(asks)
        return
    with pytest.raises(Refused) as refused:
        check(asks)
    assert refused.value.status == 403


@pytest.mark.parametrize("name", ["", "api.example:80", "https://api.example", "a b", "api.example/x"])
def test_allow_host_takes_host_names_only(name: str) -> None:
    with pytest.raises(UserError, match=r"--allow-host '.*': expected a host name"):
        site_check([name])


def test_a_request_of_another_site_costs_no_samples(client: TestClient) -> None:
    before = client.get("/metrics").text.partition("certify_samples_total ")[2].split()[0]
    for path, content in (("/classify", picture(8, 8)), (INFER, json.dumps(request(ONE)))):
        headers = {"origin": "http://evil.example", "content-type": "application/octet-stream"}
        reply = client.post(path, content=content, headers=headers)
        assert reply.status_code == 403
        assert "may not use this server" in reply.json()["error"]
    assert client.get("/metrics").text.partition("certify_samples_total ")[2].split()[0] == before
    assert client.post(INFER, json=request(ONE), headers={"origin": "http://testserver"}).status_code == 200


def test_a_long_string_among_numbers_takes_no_memory() -> None:
    body = json.dumps(request(ONE)["inputs"][0] | {"data": ["x" * 20_000] + [0.5] * 2000})
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match="64 numbers"):
            read_request(f'{{"inputs": [{body}]}}'.encode(), {}, SIZE, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20  # an array of such texts takes 160 MB
    finally:
        tracemalloc.stop()


def test_excess_requests_are_refused_and_may_be_retried(images: np.ndarray) -> None:
    held = Held(held=True)
    with serving(held, Limits(concurrency=2)) as (client, _, admission, metrics), ThreadPoolExecutor(2) as pool:
        body = request(images[:1])
        inside = [pool.submit(client.post, INFER, json=body) for _ in range(2)]
        wait_for(lambda: admission.inside == 2)
        refused = client.post(INFER, json=body)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/v2/health/live").status_code == 200
        assert "certify_queue_length 2.0" in client.get("/metrics").text
        held.let.set()
        assert [future.result().status_code for future in inside] == [200, 200]
        assert client.post(INFER, json=body).status_code == 200
        assert metrics.rejected.labels("full")._value.get() == 1


def test_a_timeout_ends_the_request_and_its_work(images: np.ndarray) -> None:
    held = Held(seconds=0.05)
    with serving(held, Limits(timeout=0.4), batch_size=20) as (client, service, *_):
        reply = client.post(INFER, json=request(images[:1], parameters={"samples": 50_000}))
        assert reply.status_code == 504
        assert "0.4 s" in reply.json()["error"]
        wait_for(lambda: not service._sampled)
        assert held.samples < 10_000
        assert client.post(INFER, json=request(images[:1], parameters={"samples": 20})).status_code in (200, 504)


def test_a_failing_classifier_does_not_stop_the_server(images: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    held = Held(broken=True)
    with serving(held) as (client, *_):
        for _ in range(2):
            reply = client.post(INFER, json=request(images[:1]))
            assert reply.status_code == 500
            assert reply.json() == {"error": "the classifier failed"}  # clients need not know what is behind
        assert "the endpoint is gone" in caplog.text
        assert client.get("/v2/health/ready").status_code == 503
        held.broken = False
        assert outputs(client.post(INFER, json=request(images[:1])))["label"] == [1]
        assert client.get("/v2/health/ready").status_code == 200


def test_a_spent_budget_is_reported(images: np.ndarray) -> None:
    class Spent(Held):
        one_by_one = True

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            raise BudgetSpent(3, 3, 1)

    with serving(Spent()) as (client, *_):
        assert client.get("/v2/health/ready").status_code == 200
        reply = client.post(INFER, json=request(images[:1]))
        assert (reply.status_code, reply.json()["error"]) == (503, "the query budget of this server is spent")
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/v2/health/live").status_code == 200


def test_the_server_is_ready_again_some_time_after_a_fault(images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("certify.serve.batching._RECOVERY", 0.0)
    with serving(Held(broken=True)) as (client, *_):
        assert client.post(INFER, json=request(images[:1])).status_code == 500
        assert client.get("/v2/health/ready").status_code == 200


def test_exact_noise_is_served(digits: Classifier) -> None:
    smoothed = SmoothedClassifier(digits, 0.25, noise="exact", batch_size=64)
    with Service(smoothed, SIZE, Certify(n0=10, n=40, alpha=0.01), Limits(), class_names(None)) as service:
        (answer,) = service.submit(np.zeros((1, *SIZE), np.float32), RequestOptions())
        assert answer.result(60).samples == 50


def test_failed_trials_are_counted_and_vote_for_no_class(images: np.ndarray) -> None:
    mean = float(images[0].mean())

    class Deaf(Held):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return torch.where(images.flatten(1).mean(1) > mean, 1, -1)

    with serving(Deaf()) as (client, _, _, metrics):
        found = outputs(client.post(INFER, json=request(images[:1], outputs=[{"name": "failures"}, {"name": "votes"}])))
        assert found["failures"][0] >= N - sum(found["votes"]) > 0
        assert metrics.failures._value.get() == found["failures"][0]


def test_a_stopping_server_answers_accepted_requests_and_refuses_others(images: np.ndarray) -> None:
    held = Held(held=True)
    with serving(held) as (client, _, admission, _), ThreadPoolExecutor(1) as pool:
        inside = pool.submit(client.post, INFER, json=request(images[:1]))
        assert held.called.wait(60)
        admission.closed = True
        refused = client.post(INFER, json=request(images[:1]))
        assert refused.status_code == 503
        assert "stopping" in refused.json()["error"]
        assert "retry-after" in refused.headers
        assert client.get("/v2/health/ready").status_code == client.get("/v2/models/digits/ready").status_code == 503
        assert client.get("/v2/health/live").status_code == 200
        held.let.set()
        assert inside.result().status_code == 200


def test_a_closing_service_finishes_accepted_images(images: np.ndarray) -> None:
    held = Held(held=True)
    smoothed = SmoothedClassifier(held, 0.25, batch_size=64)
    service = Service(smoothed, SIZE, Certify(n=200), Limits(), class_names(None))
    with service:
        found = service.submit(images, RequestOptions())
        assert held.called.wait(60)
        ending = threading.Thread(target=service.close)
        ending.start()
        wait_for(lambda: not service.alive)
        with pytest.raises(Refused, match="stopping"):
            service.submit(images, RequestOptions())
        held.let.set()
        ending.join(60)
        assert [future.result(0).label for future in found] == [1] * 5


def test_cancelled_images_are_dropped(images: np.ndarray) -> None:
    held = Held(held=True)
    smoothed = SmoothedClassifier(held, 0.25, batch_size=64)
    with Service(smoothed, SIZE, Certify(n=200), Limits(), class_names(None)) as service:
        inside = service.submit(images[:1], RequestOptions())
        assert held.called.wait(60)
        others = [service.submit(images, RequestOptions()) for _ in range(3)]
        for future in [*others[0], *others[1][1:], *others[2]]:
            future.cancel()
        assert [len(asked) for asked in service._waiting[""]] == [1]  # what was not cancelled
        held.let.set()
        assert inside[0].result(60).label == others[1][0].result(60).label == 1


def test_impossible_settings_are_refused_at_once() -> None:
    smoothed = SmoothedClassifier(Held(), 0.25)
    with pytest.raises(UserError, match="--samples-per-request"):
        Service(smoothed, SIZE, Certify(n=1000), Limits(budget=1000), class_names(None))
    with pytest.raises(UserError, match="radius 9"):
        Service(smoothed, SIZE, Decide((9.0,)), Limits(), class_names(None))
    with pytest.raises(UserError, match="timeout"):
        Limits(timeout=float("nan"))


# A service behind it


class Service8Bit:
    """Query a local classifier like an API; decline each 50th query."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier, self.spent = classifier, 0

    def __call__(self, queries: Iterable[Query]) -> Iterator[Answer]:
        for query in queries:
            self.spent += 1
            number = int(query.name.rpartition("| ")[2])
            if number % 50 == 49:
                yield Answer(query.name, failure="HTTP 500")
                continue
            (label,) = self.classifier(to_tensor(query.picture)[None]).tolist()
            yield Answer(query.name, (Scored(f"digit {label}", 0.5),))


def test_an_endpoint_is_queried_with_pictures(digits: Classifier, images: np.ndarray) -> None:
    asking = Service8Bit(digits)
    endpoint = Endpoint(asking, SIZE, 100, {"endpoint": "http://x"})
    with serving(endpoint, names=endpoint.name_of, batch_size=64) as (client, service, *_):
        assert asking.spent == 0  # nothing is paid for before somebody asks
        found = outputs(client.post(INFER, json=request(images[1:2])))
        assert asking.spent == QUERIES + N0 + N
        assert found["samples"] == [N0 + N]
        assert found["failures"] == [(N0 + N) // 50]
        wanted = SmoothedClassifier(AsSent(digits), 0.25).certify(images[1], n0=N0, n=N, alpha=ALPHA, seed=SEED)
        assert found["name"] == [f"digit {wanted.prediction}"]
        votes = client.post(INFER, json=request(images[1:2], outputs=[{"name": "votes"}]))
        assert 0 < wanted.counts[wanted.prediction] - max(outputs(votes)["votes"]) <= (N0 + N) // 50 + 1
        refused = client.post("/classify", content=picture(9, 9), headers=IMAGE)
        assert refused.json()["votes"][0]["name"].startswith("digit ")
    assert service.smoothed.base.describe()["steps"][0]["endpoint"] == "http://x"


def test_labels_beyond_the_number_of_classes_are_failed_trials(digits: Classifier, images: np.ndarray) -> None:
    endpoint = Endpoint(Service8Bit(digits), SIZE, 2, {})
    seen = endpoint(torch.from_numpy(images[[0, 1, 2, 3, 0]]))
    own = digits(torch.from_numpy(images[[0, 1, 2, 3, 0]])).tolist()
    first, second = dict.fromkeys(own[:4]).keys() if len(set(own[:4])) == 2 else list(dict.fromkeys(own))[:2]
    assert seen.tolist() == [{first: 0, second: 1}.get(label, -1) for label in own]
    assert -1 in seen.tolist()
    assert endpoint.beyond == seen.tolist().count(-1)


def test_exact_noise_sends_no_padding_queries(digits: Classifier) -> None:
    asking = Service8Bit(digits)
    smoothed = SmoothedClassifier(Endpoint(asking, SIZE, 10, {}), 0.25, noise="exact", batch_size=64)
    with Service(smoothed, SIZE, Certify(n0=10, n=45, alpha=0.01), Limits(), class_names(None)) as service:
        (answer,) = service.submit(np.zeros((1, *SIZE), np.float32), RequestOptions())
        assert answer.result(60).samples == 55
        assert asking.spent == QUERIES + 55


def test_the_in_memory_log_is_bounded() -> None:
    ledger, picture = InMemoryLog(), Picture(np.zeros((1, 1, 1), np.uint8))
    for number in range(10_050):
        asyncio.run(ledger.sent(Query(f"served | {number}", picture), b""))
    assert len(ledger._attempts) == 10_000
    assert (ledger.attempts("served | 0"), ledger.attempts("served | 10049")) == (0, 1)
    assert ledger.spent == 10_050


def test_the_in_memory_log_counts_requests_and_forgets_answered_queries(digits: Classifier, images: np.ndarray) -> None:
    replies = [500, 200, 200]
    ledger = InMemoryLog()

    async def send(request: Request) -> Reply:
        status = replies.pop(0)
        return Reply(status, b'{"outputs": [{"name": "label", "datatype": "INT64", "shape": [1], "data": [4]}]}')

    client = QueryClient(send, v2(model="m"), ledger, budget=3, limits=QueryLimits(concurrency=1, first_wait=0.001))
    endpoint = Endpoint(client, SIZE, 10, {})
    assert endpoint(torch.from_numpy(images[:2])).tolist() == [0, 0]
    assert ledger.spent == client.spent == 3
    assert not ledger._attempts
    with pytest.raises(BudgetSpent):
        endpoint(torch.from_numpy(images[:1]))


# The command, as a process


@pytest.mark.slow
def test_the_process_survives_broken_http_and_finishes_requests_when_stopped(images: np.ndarray) -> None:
    work = "--n0 10 --n 200000 --samples-per-request 300000 --batch-size 500 --precision float32 --compile off"
    with process(*work.split(), "--concurrency", "6") as (started, address):
        for content in (
            b"\x16\x03\x01 hello",
            b"GET / HTTP/1.1\r\n\r\n",
            b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n" % INFER.encode(),
            b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcde" % INFER.encode(),
            b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n" % INFER.encode(),
            b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
        ):
            with contextlib.suppress(ConnectionResetError):  # it may hang up while more is coming
                assert send(address, content)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431")
        truncated = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{" % INFER.encode()
        assert send(address, truncated)[9:12] in (b"", b"499")  # nobody waits for it
        with httpx2.Client(base_url=address, timeout=120) as client, ThreadPoolExecutor(6) as pool:
            wait_for(lambda: "certify_queue_length 0.0" in client.get("/metrics").text)
            inside = [pool.submit(client.post, INFER, json=request(images[i % 5][None])) for i in range(4)]
            wait_for(lambda: "certify_queue_length 4.0" in client.get("/metrics").text)
            started.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get("/v2/health/ready").status_code == 503)
            assert client.post(INFER, json=request(images[:1])).status_code == 503
            assert [outputs(future.result())["samples"] for future in inside] == [[200_010]] * 4
        assert started.wait(60) == 0


@pytest.mark.slow
def test_a_second_signal_reports_unanswered_requests(images: np.ndarray) -> None:
    work = "--n 3000000 --samples-per-request 4000000 --batch-size 100 --precision float32 --compile off"
    with process(*work.split()) as (started, address), ThreadPoolExecutor(1) as pool:
        with httpx2.Client(base_url=address, timeout=60) as client:
            inside = pool.submit(client.post, INFER, json=request(images[:1]))
            with httpx2.Client(base_url=address) as other:
                wait_for(lambda: "certify_queue_length 1.0" in other.get("/metrics").text)
                started.send_signal(signal.SIGTERM)
                wait_for(lambda: other.get("/v2/health/ready").status_code == 503)
            started.send_signal(signal.SIGTERM)
            assert inside.exception(60) or inside.result().status_code == 503
        assert started.stderr is not None
        assert "stopped    1 requests were not answered" in started.stderr.read()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--sigma 0.25 --endpoint http://127.0.0.1:9", "expected --model NAME or --endpoint URL"),
        ("--sigma 0.25 --protocol v2", "--protocol without --endpoint"),
        ("--sigma 0.25 --rate 3", "--rate without --endpoint"),
        ("--sigma 0.25 --protocol-option model=x", "--protocol-option without --endpoint"),
        ("--sigma 0.25 --budget 100", "--budget without --endpoint"),
        ("--sigma 0.25 --query-timeout 9", "--query-timeout without --endpoint"),
        ("--sigma 0.25 --name a/b", "--name 'a/b': expected letters"),
        ("--sigma 0.25 --n 200000", "--samples-per-request"),
        ("--sigma 0.25 --radius 9", "radius 9"),
        ("--sigma 0.25 --samples 2", "--samples"),
        ("--sigma 0.25 --samples 1 --seed 7", "--seed 7 with --samples 1: noise that can be repeated"),
        ("--sigma 0.25 --samples 1 --n 10", "--n is for certificates"),
        ("--sigma 0.25 --timeout nan", "seconds above 0"),
        ("--sigma 0.25 --host 192.0.2.1", "--host 192.0.2.1|cannot listen"),
    ],
)
def test_wrong_options_are_one_line(options: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    fault = "--host" in options  # an address of another machine is one that cannot be bound to
    run("serve", "--model", "digits", "--port", "0", *options.split(), code=1 if fault else 2)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("certify: ")
    assert any(word in last for word in words.split("|")), last


def test_an_endpoint_needs_an_input_size_and_no_protocol(capfd: pytest.CaptureFixture[str]) -> None:
    run("serve", "--endpoint", "http://127.0.0.1:9", "--sigma", "0.25", code=2)
    assert "--endpoint without --input-size: expected" in capfd.readouterr().err
    run("serve", "--endpoint", "http://127.0.0.1:9", "--sigma", "0.25", "--input-size", "1x8x8", "--port", "0", code=1)
    assert "http://127.0.0.1:9 cannot be reached" in capfd.readouterr().err


SERVICE = ("--protocol", "google-vision", "--input-size", "1x8x8", "--sigma", "0.25")


@pytest.mark.parametrize("option", ["--weights w.pth", "--mean 0.5", "--precision float32", "--compile off"])
def test_options_of_models_are_refused_with_an_endpoint(option: str, capfd: pytest.CaptureFixture[str]) -> None:
    run("serve", *SERVICE, *option.split(), code=2)
    assert f"{option.split(maxsplit=1)[0]} without --model" in capfd.readouterr().err


def test_a_protocol_with_a_fixed_url_needs_no_endpoint(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def instead(app: Any, admission: Admission, place: socket.socket, on_start: Any, on_stop: Any) -> None:
        on_stop(2)

    wanted: list[Any] = []

    @contextlib.contextmanager
    def opened(service: Any, *, timeout: float, **_: Any) -> Iterator[Any]:
        wanted.append((service.endpoint, timeout))
        yield (lambda request: None), service

    monkeypatch.setattr("certify.serve.server.serve", instead)
    monkeypatch.setattr("certify.blackbox.service_spec.open_sender", opened)
    run("serve", *SERVICE, "--port", "0", "--query-timeout", "7", "--timeout", "90", "--n0", "20", "--n", "100")
    assert wanted == [("https://vision.googleapis.com", 7.0)]
    said = capfd.readouterr().err
    assert "queries    at most 120 requests to the service per image" in said
    assert "17 more about the first image" in said
    assert "no --budget" in said
    assert "stopped    2 requests were not answered" in said


def test_a_port_in_use_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        run("serve", "--model", "digits", "--sigma", "0.25", "--port", port, code=1)
    assert f"port {port}: Address already in use; pass another --port" in capfd.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    run("serve", "--model", "digits", "--sigma", "0.25", code=2)
    assert "pip install 'certify-toolkit[serve]'" in capfd.readouterr().err


DROP = """(async () => {
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  canvas.width = canvas.height = 64;
  pen.fillStyle = "#000"; pen.fillRect(0, 0, 64, 64);
  pen.strokeStyle = "#fff"; pen.lineWidth = 11;
  pen.beginPath(); pen.ellipse(32, 32, 17, 26, 0, 0, 7); pen.stroke();
  const blob = await new Promise((done) => canvas.toBlob(done));
  await ask(new File([blob], "drawn.png", { type: "image/png" }));
  return ["verdict", "claim", "cost", "state"].map((id) => document.getElementById(id).textContent);
})()"""


@pytest.mark.browser
def test_the_page_shows_label_radius_and_votes() -> None:
    with browser() as page, process("--n", "2000", "--seed", "1") as (_, address):
        page.view(390, 800)
        page.open(address)
        verdict, claim, cost, state = page.evaluate(DROP)
        assert verdict == "0"  # a ring
        assert re.search(r"l2 norm below 0\.[1-9]\d{3}, .*\(1x8x8\)", claim)
        assert cost == "2,100 noisy copies were classified; the votes above are those of 2,000."
        assert state == ""
        lines = "[...document.querySelectorAll('#votes li')]"
        votes = page.evaluate(f"{lines}.map((line) => [...line.querySelectorAll('span')].map((s) => s.textContent))")
        assert votes[0][0] == "0"
        assert sum(int(line[-1].replace(",", "")) for line in votes) == 2000
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.evaluate("ask(new File(['no image'], 'a.png', { type: 'image/png' }))")
        assert "not an image" in page.evaluate("document.getElementById('state').textContent")
        own = (f"{address}/", f"blob:{address}/")
        assert all(url.startswith(own) for url in page.requests)
        assert not [text for text in page.complaints if "404" not in text and "400" not in text]
