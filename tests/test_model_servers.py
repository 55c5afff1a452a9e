"""Model servers that others wrote, on loopback, holding the digits network: their votes equal local ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from servers import free_ports, process
from small_audit import WORDS
from vision_stubs import noisy_digits

from certify.blackbox.client.http import HttpSender, run_async
from certify.blackbox.encoding import to_pictures, to_tensor
from certify.blackbox.protocols import FORMATS
from certify.blackbox.protocols.v2 import metadata_request, options_from
from certify.blackbox.types import BadReply, Format, Picture, Ranked, Request, Sender
from certify.models.classifier import Classifier

HERE = Path(__file__).parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return to_pictures(noisy_digits())


@pytest.fixture(scope="module")
def local(digits: Classifier, pictures: list[Picture]) -> torch.Tensor:
    """Probabilities ``(50, 10)``."""
    return digits.logits(torch.stack([to_tensor(picture) for picture in pictures])).softmax(1)


def answers(wire: Format, send: Sender, pictures: list[Picture]) -> list[Ranked]:
    return [wire.reply(run_async(send(wire.request(picture)))) for picture in pictures]


# MLServer, Open Inference Protocol v2


def environment(requirement: str) -> Path:
    """Python of an environment with this package, kept between test runs: it pins other libraries than ours."""
    name = requirement.partition("=")[0]
    named = os.environ.get(f"CERTIFY_TEST_{name.upper()}")
    folder = Path(named or Path(tempfile.gettempdir()) / f"certify-test-{requirement}")
    python = folder / "bin" / "python"
    if not (folder / "installed").exists() and named is None:
        venv.create(folder, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "-q", requirement]
        done = subprocess.run(install, capture_output=True, check=False, timeout=1200)
        if done.returncode:
            shutil.rmtree(folder)
            pytest.skip(f"{requirement} cannot be installed: {done.stderr.decode()[-300:]}")
        (folder / "installed").touch()
    return python


@pytest.fixture(scope="module")
def mlserver() -> Path:
    return environment("mlserver==1.7.1")


@pytest.fixture(scope="module")
def weights(digits: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits network for NumPy."""
    linear = [layer for layer in digits.net if isinstance(layer, torch.nn.Linear)]
    found = {f"w{n}": layer.weight.numpy() for n, layer in enumerate(linear)}
    file = tmp_path_factory.mktemp("weights") / "weights.npz"
    np.savez(file, **found, **{f"b{n}": layer.bias.numpy() for n, layer in enumerate(linear)})
    return file


@pytest.fixture(scope="module")
def v2_server(mlserver: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpSender]:
    folder = tmp_path_factory.mktemp("mlserver")
    shutil.copy(HERE / "mlserver_digits.py", folder)
    outputs = {"scores": ("FP32", [-1, 10]), "label": ("INT64", [-1, 1])}
    for answer, (datatype, shape) in outputs.items():
        (folder / answer).mkdir()
        settings = {
            "name": f"digits-{answer}",
            "implementation": "mlserver_digits.Digits",
            "inputs": [{"name": "pixels", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
            "outputs": [{"name": answer, "datatype": datatype, "shape": shape}],
            "parameters": {"uri": str(weights), "extra": {"answer": answer}},
        }
        (folder / answer / "model-settings.json").write_text(json.dumps(settings))
    http, grpc = free_ports(2)
    server = {
        "host": "127.0.0.1",
        "http_port": http,
        "grpc_port": grpc,
        "metrics_endpoint": None,
        "parallel_workers": 0,
    }
    (folder / "settings.json").write_text(json.dumps({**server, "debug": False}))
    command = [str(mlserver.parent / "mlserver"), "start", "."]
    with process(command, folder, f"http://127.0.0.1:{http}", "v2/health/ready") as send:
        yield send


@pytest.mark.parametrize("answer", ["scores", "label"])
def test_mlserver_votes_as_the_local_classifier(
    v2_server: HttpSender, pictures: list[Picture], local: torch.Tensor, answer: str
) -> None:
    model = f"digits-{answer}"
    options = options_from(run_async(v2_server(metadata_request(model))), {"model": model})
    assert options == {"model": model, "input": "pixels", "output": answer, "datatype": "FP32", "layout": "NCHW"}
    found = answers(FORMATS.get("v2")(**options), v2_server, pictures)
    assert [one[0].label for one in found] == [str(n) for n in local.argmax(1).tolist()]
    if answer == "scores":
        assert [one[0].score for one in found] == pytest.approx(local.max(1).values.tolist(), abs=1e-5)
        assert all(len(one) == 10 for one in found)


def test_mlserver_refuses_in_words(v2_server: HttpSender, pictures: list[Picture]) -> None:
    for options in ({"model": "nothing"}, {"model": "digits-scores", "binary": True}):  # it has no binary tensors
        wire = FORMATS.get("v2")(**options)
        with pytest.raises(BadReply, match=r"HTTP (404|4\d\d|500)"):
            wire.reply(run_async(v2_server(wire.request(pictures[0]))))


def test_binary_requests_are_those_of_tritons_client(mlserver: Path, pictures: list[Picture]) -> None:
    """Triton's own client, which MLServer brings along, writes the same bytes."""
    sent = FORMATS.get("v2")(model="m", input="pixels", output="p", binary=True).request(pictures[0])
    code = """if True:
        import json, sys
        import numpy as np
        from tritonclient.http import InferInput, InferRequestedOutput, InferenceServerClient
        pixels = np.array(json.load(sys.stdin), np.float32)
        tensor = InferInput("pixels", list(pixels.shape), "FP32")
        tensor.set_data_from_numpy(pixels, binary_data=True)
        wanted = [InferRequestedOutput("p", binary_data=True)]
        body, length = InferenceServerClient.generate_request_body([tensor], outputs=wanted)
        print(json.dumps([json.loads(body[:length]), bytes(body[length:]).hex()]))
    """
    tensor = json.dumps(to_tensor(pictures[0])[None].tolist())
    done = subprocess.run(
        [str(mlserver), "-c", code], input=tensor, capture_output=True, text=True, check=True, timeout=120
    )
    head, content = json.loads(done.stdout)
    length = int(sent.headers["Inference-Header-Content-Length"])
    assert json.loads(sent.body[:length]) == head
    assert sent.body[length:].hex() == content


# KServe: protocol v1, and v2 with tensors in JSON and in binary


@pytest.fixture(scope="module")
def kserve(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpSender]:
    (port,) = free_ports(1)
    command = [str(environment("kserve==0.21.0")), str(HERE / "kserve_digits.py"), str(weights), str(port)]
    with process(
        command, tmp_path_factory.mktemp("kserve"), f"http://127.0.0.1:{port}", "v2/models/digits/ready"
    ) as send:
        yield send


@pytest.mark.parametrize(
    ("name", "options"),
    [("tf-serving", {}), ("v2", {}), ("v2", {"binary": True}), ("v2", {"binary": True, "output": "output-0"})],
)
def test_kserve_votes_as_the_local_classifier(
    kserve: HttpSender, pictures: list[Picture], local: torch.Tensor, name: str, options: dict[str, Any]
) -> None:
    wire = FORMATS.get(name)(model="digits", **options)
    found = answers(wire, kserve, pictures)
    assert [one[0].label for one in found] == [str(n) for n in local.argmax(1).tolist()]
    assert [one[0].score for one in found] == pytest.approx(local.max(1).values.tolist(), abs=1e-5)
    if options.get("binary"):
        reply = run_async(kserve(wire.request(pictures[0])))
        assert "inference-header-content-length" in reply.headers  # so the tensor came as bytes


# LitServe, plain JSON


def test_litserve_votes_as_the_local_classifier(pictures: list[Picture], local: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("litserve")
    (port,) = free_ports(1)
    wire = FORMATS.get("json")(path="predict", labels="labels", scores="scores")
    command = [sys.executable, str(HERE.parent / "examples" / "litserve_digits.py"), str(port)]
    with process(command, tmp_path, f"http://127.0.0.1:{port}", "health") as send:
        found = answers(wire, send, pictures)
        broken = Request(b'{"image": "bm90IGFuIGltYWdl"}', "predict", headers={"Content-Type": "application/json"})
        with pytest.raises(BadReply, match=r"HTTP [45]\d\d"):
            wire.reply(run_async(send(broken)))
    assert [one[0].label for one in found] == [WORDS[n] for n in local.argmax(1).tolist()]
    assert [one[0].score for one in found] == pytest.approx(local.max(1).values.tolist(), abs=1e-5)
