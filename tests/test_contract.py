"""A model that is not one fixed function of each image is refused on every path, by name; honest networks pass."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import run
from fastapi.testclient import TestClient
from offenders import CLASSIFIERS, DENOISERS, coin_labels
from small_networks import network, trained
from torch import Tensor, nn

from certify import SmoothedClassifier, load_classifier, load_images, read_run
from certify.cluster.worker import WorkerEngine
from certify.errors import CertifyError, RunFault, UserError
from denoisers import load_denoiser

LISTED = ("coin_labels", "SharedDropout", "CoinDenoiser", "BatchStatistics")
"""The others are tried where a check costs least."""
RUN = ("--data", "digits", "--max", "2", "--sigma", "0.25", "--n", "100")


def parts(offender: str) -> list[str]:
    """Options of the command that name the offender: as the model, or as the denoiser before the digits' model."""
    if offender in DENOISERS:
        return ["--model", "digits", "--denoiser", f"offenders:{offender}"]
    return ["--model", f"offenders:{offender}", "--num-classes", "10"]


def blamed(offender: str, module: str = "offenders:") -> str:
    return f"{'denoiser' if offender in DENOISERS else 'base classifier'} {module}{offender}"


def smoothed(offender: str) -> SmoothedClassifier:
    if offender in DENOISERS:
        return SmoothedClassifier(load_classifier("digits"), 0.25, denoiser=DENOISERS[offender]())  # type: ignore[arg-type]
    return SmoothedClassifier(load_classifier(CLASSIFIERS[offender](), num_classes=10), 0.25)  # type: ignore[arg-type]


@pytest.fixture
def image() -> Tensor:
    return load_images("digits", load_classifier("digits"), max_images=1).load(0)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., None]:
    """Run the command, expect one line that blames this part, and nothing written."""

    def check(blamed: str, *args: str) -> None:
        run(*args, code=2)
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"certify: the {blamed} answers differently "), last
        assert list(tmp_path.iterdir()) == []

    return check


# Every path

COMMANDS = {
    "run": [],
    "predict": ["predict"],
    "decide": ["--radius", "0.1"],
    "tolerance": ["--tolerance", "0.5"],
    "shard": ["--shard", "1/2"],
}


@pytest.mark.parametrize("offender", LISTED)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_is_refused(command: str, offender: str, tmp_path: Path, refused: Callable[..., None]) -> None:
    out = ["--out", str(tmp_path / "r.jsonl")]
    refused(blamed(offender), *COMMANDS[command], *RUN, *parts(offender), *out)


@pytest.mark.parametrize("offender", [*CLASSIFIERS, *DENOISERS])
def test_python_refuses(offender: str, image: Tensor) -> None:
    for ask in (
        lambda g: g.certify(image, n=100),
        lambda g: g.decide(image, radius=0.1),
        lambda g: g.base_label(image),
    ):
        with pytest.raises(UserError, match=f"^the {blamed(offender, '')} (answers differently|writes into)"):
            ask(smoothed(offender))


@pytest.mark.parametrize("offender", LISTED)
def test_a_worker_of_a_cluster_refuses(offender: str, image: Tensor) -> None:
    with pytest.raises(UserError, match=f"^the {blamed(offender, '')} answers differently"):
        WorkerEngine(lambda: smoothed(offender)).prepare(image.numpy(), 100, None)


@pytest.mark.parametrize("offender", LISTED)
def test_a_comparison_is_refused(offender: str, tmp_path: Path, refused: Callable[..., None]) -> None:
    images = ["--data", "digits", "--max", "2", "--attacks", "none", "--out", str(tmp_path / "c.jsonl")]
    if offender in CLASSIFIERS:
        model = ["--model", f"offenders:{offender}", "--num-classes", "10", "--input-size", "1x8x8"]
        refused(f"base classifier offenders:{offender}", "compare", *model, *images, "--defences", "none,median")
        return
    compare = ["compare", "--model", "digits", *images, "--defences"]
    defence = f"denoised:denoiser=offenders:{offender}:sigma=0.25"
    refused(f"denoiser offenders:{offender} of defence denoised", *compare, f"none,{defence}")
    other = "offenders:batch_maximum"
    refused(f"denoiser {other} of defence {other}", *compare, f"none,{other}")


@pytest.mark.parametrize("offender", LISTED)
def test_a_server_does_not_start(offender: str, refused: Callable[..., None]) -> None:
    size = [] if offender in DENOISERS else ["--input-size", "1x8x8"]
    refused(blamed(offender), "serve", *parts(offender), *size, "--sigma", "0.25", "--port", "0")


@pytest.mark.parametrize("offender", LISTED[2:])
def test_denoisers_are_checked_wherever_they_are_measured(
    offender: str, tmp_path: Path, refused: Callable[..., None]
) -> None:
    about = ["--model", "digits", "--denoiser", f"offenders:{offender}", "--sigma", "0.25"]
    refused(blamed(offender), "bench", *about)
    refused(blamed(offender), "evaluate-denoiser", *about, "--max", "2", "--pictures", str(tmp_path / "p.png"))


# Services


class Labels(ThreadingHTTPServer):
    """A service that answers every picture with the next of these labels."""

    daemon_threads = True

    def __init__(self, labels: Iterator[int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.labels, self.requests, self.lock = labels, 0, threading.Lock()

    @property
    def arguments(self) -> list[str]:
        where = f"http://127.0.0.1:{self.server_address[1]}"
        return ["--endpoint", where, "--protocol", "json", "--protocol-option", "labels=label", "--sigma", "0.25"]


class _Handler(BaseHTTPRequestHandler):
    server: Labels

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.requests += 1
            body = f'{{"label": "class {next(self.server.labels)}"}}'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def service(labels: Iterator[int]) -> Iterator[Labels]:
    with Labels(labels) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found
        finally:
            found.shutdown()
            thread.join(10)


def coins() -> Iterator[int]:
    draws = random.Random(0)
    return iter(lambda: draws.randrange(2), None)


@pytest.fixture
def ask_server(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Two requests about one image, in place of listening: their replies, and whether the server is ready."""
    replies: list[Any] = []

    def instead(app: Any, *_: Any) -> int:
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0.5] * 64}
        with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
            for _ in range(2):
                replies.append(client.post("/v2/models/json/infer", json={"inputs": [tensor]}))
            replies.append(client.get("/v2/health/ready"))
        return 0

    monkeypatch.setattr("certify.serve.server.serve", instead)
    return replies


SERVE = ("serve", "--port", "0", "--input-size", "1x8x8", "--n0", "10", "--n", "20")


def test_a_served_service_that_tosses_coins_is_refused_after_the_repeat_test(
    ask_server: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with service(coins()) as found:
        run(*SERVE, *found.arguments)
        assert found.requests == 17
    first, second, ready = ask_server
    assert first.status_code == second.status_code == ready.status_code == 503
    wanted = {"error": "the classifier is not a fixed function of the image: nothing can be certified"}
    assert first.json() == second.json() == wanted
    assert "answers differently when queried 17 times about one image (2 labels, " in caplog.text


def test_the_repeat_test_of_a_served_service_is_made_once_and_counts(ask_server: list[Any]) -> None:
    with service(itertools.repeat(3)) as found:
        run(*SERVE, *found.arguments, "--budget", str(17 + 2 * 30))
        assert found.requests == 17 + 2 * 30
    assert [reply.status_code for reply in ask_server] == [200, 200, 200]


@pytest.mark.parametrize("offender", LISTED[2:])
def test_a_denoiser_before_a_service_is_checked_without_a_query(
    offender: str, tmp_path: Path, refused: Callable[..., None]
) -> None:
    with service(itertools.repeat(3)) as found:
        denoiser = ["--denoiser", f"offenders:{offender}"]
        refused(blamed(offender), *SERVE, *found.arguments, *denoiser)
        audit = ["audit", *found.arguments, *denoiser, "--data", "digits", "--max", "2", "--budget", "500"]
        run(*audit, "--out", str(tmp_path / "audit"), "--dry-run", code=2)
        run(*audit, "--out", str(tmp_path / "audit"), code=2)
        assert not (tmp_path / "audit" / "run.jsonl").exists()
        assert found.requests == 0


def test_an_audit_of_a_service_that_tosses_coins_stops_after_the_probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = ["audit", "--data", "digits", "--max", "2", "--budget", "500", "--out", str(tmp_path)]
    with service(coins()) as found:
        run(*audit, *found.arguments, "--repeat-clean", "16", code=2)
        spent = found.requests
        assert spent <= 2 + 16 + 2  # clean, probe, drift: no noisy copy
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(
            "certify: the service returned different labels for image 1297 when queried again (class "
        )
        assert read_run(tmp_path / "run.jsonl", allow_partial=True).images == []
        run(*audit, *found.arguments, "--repeat-clean", "16", code=2)  # from the ledger
        assert found.requests == spent


# What else is refused


def test_every_call_counts() -> None:
    """A function that changes its answer once, at whatever call, is refused: a fair coin passes one time in 2^17."""
    for changes in range(2, 19):
        calls = itertools.count(1)

        def label(images: Tensor, calls: Any = calls, changes: int = changes) -> Tensor:
            return torch.full((len(images),), int(next(calls) >= changes))

        g = SmoothedClassifier(load_classifier(label, num_classes=2), 0.25)
        with pytest.raises(UserError, match=r"^the base classifier .* answers differently"):
            g.certify(torch.zeros(1, 8, 8), n=100)


def test_training_mode_is_noticed_before_every_run(image: Tensor) -> None:
    """Statistics that move while votes are counted would make every batch another function."""
    denoiser = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1))
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
    classifier = load_classifier(net, input_size=(1, 8, 8))
    g = SmoothedClassifier(classifier, 0.25, denoiser=denoiser)
    wanted = g.certify(image, n=100)
    for part, words in (
        (denoiser[1], r"the denoiser Sequential is in training mode \(inner.1: BatchNorm2d\)"),
        (classifier.net[0], r"the base classifier Sequential is in training mode \(net.0: BatchNorm2d\)"),  # type: ignore[index]
    ):
        before = copy.deepcopy(part.state_dict())  # type: ignore[union-attr]
        part.train()  # type: ignore[operator]
        for ask in (
            lambda: g.certify(image, n=100),
            lambda: g.decide(image, radius=0.1),
            lambda: g.predict(image, n=9),
        ):
            with pytest.raises(UserError, match=f"^{words}, where .*; call .eval\\(\\) on it$"):
                ask()
        assert all(torch.equal(before[key], value) for key, value in part.state_dict().items())  # type: ignore[union-attr]
        part.eval()  # type: ignore[operator]
    assert g.certify(image, n=100) == wanted


def test_a_network_in_training_mode_inside_a_function_is_refused(image: Tensor) -> None:
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))
    g = SmoothedClassifier(load_classifier(lambda x: net(x), num_classes=10), 0.25)
    with pytest.raises(UserError, match=r"alone and in a batch .*is a network inside in training mode\?"):
        g.certify(image, n=100)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: torch.zeros(len(x), 7), "returned 7 scores per image; expected 10, as num_classes says"),
        (lambda x: torch.zeros(1, dtype=torch.int64), r"returned torch.int64 \(1,\) for 16 images; expected integer"),
        (lambda x: torch.full((len(x),), 10), r"returned 16 of 16 labels outside 0 to 9 \(from 10 to 10; -1 is a"),
        (lambda x: torch.full((len(x),), 0.5), "returned labels that are not whole numbers"),
    ],
)
def test_what_is_no_answer_is_refused(answer: Any, words: str, image: Tensor) -> None:
    with pytest.raises(CertifyError, match=words):
        SmoothedClassifier(load_classifier(answer, num_classes=10), 0.25).certify(image, n=100)


@pytest.mark.parametrize("masked", [-1e3, -1e4, -1e9, -3e38, -torch.inf])
def test_a_masked_class_hides_no_coin(masked: float, image: Tensor) -> None:
    """The range of the scores says nothing where some are far below those that decide."""

    def coin(images: Tensor) -> Tensor:
        scores = torch.full((len(images), 10), masked)
        scores[:, int(torch.rand(()) < 0.5)], scores[:, 2] = 2.0, 1.0
        return scores

    def shaken(images: Tensor) -> Tensor:
        scores = images.flatten(1)[:, :10] + torch.rand(10)
        scores[:, 3:] = scores[:, 3:] + masked
        return scores

    for function in (coin, shaken):
        with pytest.raises(UserError, match=r"^the base classifier .* answers differently"):
            SmoothedClassifier(load_classifier(function, num_classes=10), 0.25).certify(image, n=100)


def coin_in_bfloat16(images: Tensor) -> Tensor:
    scores = torch.full((len(images), 10), 20.0, dtype=torch.bfloat16)
    scores[:, int(torch.rand(()) < 0.5)] += 0.5  # within what rounding to 16 bits explains
    return scores


def coin_beside_a_large_score(images: Tensor) -> Tensor:
    scores = torch.zeros(len(images), 10)
    scores[:, int(torch.rand(()) < 0.5)] = 1.0  # a small part of the range that one image in four has
    scores[:, 2] += 1e5 * (images.flatten(1)[:, 0] > images.new_tensor(0.17))
    return scores


@pytest.mark.parametrize("function", [coin_in_bfloat16, coin_beside_a_large_score])
def test_no_tolerance_admits_a_coin(function: Callable[[Tensor], Tensor]) -> None:
    """Differences within the tolerance decide most labels here: the same batch has to have the same ones."""
    for _ in range(5):
        with pytest.raises(UserError, match=r"^the base classifier .* answers differently"):
            SmoothedClassifier(load_classifier(function, num_classes=10), 0.25).certify(torch.zeros(1, 8, 8), n=100)


# What passes


def in_bfloat16(*, float_scores: bool = False, labels: bool = False) -> Callable[[Tensor], Tensor]:
    """A convolutional network in bfloat16: its scores as they come, or in float32, or its labels."""
    net = trained(network()).eval().to(torch.bfloat16)

    def scores(images: Tensor) -> Tensor:
        found: Tensor = net(images.expand(-1, 3, -1, -1).to(torch.bfloat16))
        return found.argmax(1) if labels else found.float().softmax(1) if float_scores else found

    return scores


def exact_ties(images: Tensor) -> Tensor:
    """True if the mean is above the mean of the same pixels in another order: rounding alone decides."""
    return (images.flatten(1).mean(1) > images.flip(2, 3).flatten(1).mean(1)).long()


def coarse_ties(images: Tensor) -> Tensor:
    """The largest of ten sums of few levels: several are equal in most images, and the first one wins."""
    return (2 * images.flatten(1).unfold(1, 10, 6).mean(2)).round().argmax(1)


def masked() -> Callable[[Tensor], Tensor]:
    """A network of which three classes are masked; what is left of their scores is rounding."""
    net, mask = trained(network()).eval(), torch.tensor([0.0, 0.0, -1e9, -torch.inf, -1e4])
    return lambda images: net(images.expand(-1, 3, -1, -1)) + mask


HONEST: dict[str, Any] = {
    "digits": lambda: load_classifier("digits"),
    "bfloat16": lambda: load_classifier(in_bfloat16(), num_classes=5),
    "bfloat16, scores in float32": lambda: load_classifier(in_bfloat16(float_scores=True), num_classes=5),
    "labels of bfloat16": lambda: load_classifier(in_bfloat16(labels=True), num_classes=5),
    "exact ties": lambda: load_classifier(exact_ties, num_classes=2),
    "coarse ties": lambda: load_classifier(coarse_ties, num_classes=10),
    "masked classes": lambda: load_classifier(masked(), num_classes=5),
    "failures": lambda: load_classifier(lambda x: x.flatten(1)[:, :10].log(), num_classes=10),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_classifiers_pass_and_no_random_state_changes(name: str) -> None:
    classifier = HONEST[name]()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    for seed in range(4):
        image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(seed))
        g = SmoothedClassifier(classifier, 0.25)
        g.check_contract(g.check(image))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


@pytest.mark.parametrize("denoiser", ["median", "jpeg:quality=30", "bits", "tv", "gaussian"])
def test_honest_denoisers_pass(denoiser: str) -> None:
    """Median and rounding jump; the jump of one coefficient in a thousand pixels is rounding, too."""
    image = torch.rand(3, 12, 10, generator=torch.Generator().manual_seed(0))
    base = load_classifier(lambda x: (x.mean((1, 2, 3)) > 0.5).long(), num_classes=2)
    SmoothedClassifier(base, 0.25, denoiser=denoiser).check_contract(image)


@pytest.mark.parametrize(
    "options", [{"precision": "bfloat16"}, {"noise": "exact", "rounded": True}, {"denoiser": "auto"}]
)
def test_options_of_the_engine_pass(options: dict[str, str], image: Tensor) -> None:
    g = SmoothedClassifier(load_classifier("digits"), 0.25, compile="off", **options)  # type: ignore[arg-type]
    assert g.certify(image, n=200).radius > 0


# Denoisers as people have them


class OnlyImages(nn.Module):
    def forward(self, noisy: Tensor) -> Tensor:
        return noisy.clamp(0, 1)


class LevelByName(nn.Module):
    def forward(self, noisy: Tensor, mask: Tensor | None = None, *, sigma: float) -> Tensor:
        assert mask is None
        return noisy * (sigma == 0.25)


class OtherOption(nn.Module):
    def forward(self, noisy: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None
        return noisy


@pytest.mark.parametrize(
    ("denoiser", "same_as"),
    [
        (OnlyImages(), lambda x, sigma: x.clamp(0, 1)),
        (lambda noisy: noisy.clamp(0, 1), lambda x, sigma: x.clamp(0, 1)),
        (LevelByName(), lambda x, sigma: x),
        (OtherOption(), lambda x, sigma: x),
        (lambda noisy: noisy.numpy(), lambda x, sigma: x),
    ],
)
def test_a_denoiser_is_called_as_its_signature_says(denoiser: Any, same_as: Any, image: Tensor) -> None:
    class Wanted(nn.Module):
        def forward(self, noisy: Tensor, sigma: float) -> Tensor:
            found: Tensor = same_as(noisy, sigma)
            return found

    digits = load_classifier("digits")
    found = SmoothedClassifier(digits, 0.25, denoiser=denoiser).certify(image, n=500)
    assert found == SmoothedClassifier(digits, 0.25, denoiser=Wanted()).certify(image, n=500)


def test_a_denoiser_by_name_is_the_command_s(image: Tensor, tmp_path: Path) -> None:
    digits = load_classifier("digits")
    g = SmoothedClassifier(digits, 0.25, denoiser="auto")
    run(*RUN, "--model", "digits", "--denoiser", "auto", "--out", str(tmp_path / "r.jsonl"), "--quiet")
    row = read_run(tmp_path / "r.jsonl").images[0]
    found = g.certify(image, n=100, image_id=row["id"])
    assert (found.prediction, found.radius) == (row["prediction"], row["radius"])
    assert SmoothedClassifier(digits, 0.25, denoiser="none").base.denoiser is None


def three(noisy: Tensor, sigma: float, steps: int) -> Tensor:
    return noisy


class Late(nn.Module):
    """Fits images of eight rows only."""

    def forward(self, noisy: Tensor, sigma: float) -> Tensor:
        if noisy.shape[2] != 8:
            raise ValueError("eight rows, please")
        return noisy


@pytest.mark.parametrize(
    ("denoiser", "words"),
    [
        (three, r"^denoiser three also requires steps; expected forward\(noisy\) or forward\(noisy, sigma\)$"),
        (OnlyImages, "^denoiser = the class OnlyImages: expected a module or a function"),
        (3, "^denoiser = int: expected a module or a function"),
        ("medain", "^unknown denoiser 'medain'; nearest: median"),
        (
            lambda x: x[:, :, :4],
            r"^the denoiser .*<lambda> returned torch.float32 \(16, 1, 4, 8\) for 16 images of 1x8x8",
        ),
        (nn.Conv2d(3, 3, 1), "^the denoiser Conv2d fails on images of 1x8x8: Given groups=1"),
    ],
)
def test_a_wrong_denoiser_is_named_as_the_denoiser(denoiser: Any, words: str, image: Tensor) -> None:
    with pytest.raises(UserError, match=words):
        SmoothedClassifier(load_classifier("digits"), 0.25, denoiser=denoiser).certify(image, n=100)


def test_a_denoiser_that_fails_on_a_later_image_is_named_as_the_denoiser() -> None:
    base = load_classifier(lambda x: (x.mean((1, 2, 3)) > 0.5).long(), num_classes=2)
    g = SmoothedClassifier(base, 0.25, denoiser=Late())
    g.predict(torch.zeros(1, 8, 8), n=10)
    with pytest.raises(RunFault, match=r"^the denoiser Late failed: ValueError: eight rows, please$"):
        g.predict(torch.zeros(1, 9, 8), n=10)


def test_auto_without_a_level_or_a_size_says_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"^denoiser 'auto' needs the noise level \(sigma\); give it, or"):
        load_denoiser("auto")
    with pytest.raises(UserError, match=r"^denoiser 'auto' needs the images' size \(input_size\); give it, or"):
        SmoothedClassifier(load_classifier(coin_labels, num_classes=2), 0.25, denoiser="auto")
