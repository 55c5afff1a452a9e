"""The command over loopback: plan, audit, again, replay; what it leaves is an ordinary run file without any secret."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import run
from PIL import Image
from servers import free_ports, process
from small_audit import WORDS

import certify
from analysis.report.audit_folder import read_audit
from analysis.report.page import _stage_rows
from analysis.runs import read_comparison
from certify import SmoothedClassifier, load_images, read_run
from certify.blackbox.encoding import AsSent
from certify.blackbox.ledger import Ledger
from certify.blackbox.ledger_contents import read_ledger
from certify.models.classifier import Classifier

KEY = "a-secret-key-1234567890"
NUMBERS = ["--data", "digits", "--skip", "90", "--sigma", "0.25", "--n0", "5", "--n", "20", "--seed", "2"]
FILE = "comparison.jsonl"
ROOT = Path(__file__).parent.parent


class Service(ThreadingHTTPServer):
    """Digits by POST: base64 in JSON, words and scores out."""

    daemon_threads = True

    def __init__(self, digits: Classifier) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.digits, self.requests, self.keys = digits, 0, set[str]()
        self.lock = threading.Lock()
        self.decline = 10**9  # requests after which the service is down
        self.described, self.description_status = 0, 200

    @property
    def arguments(self) -> list[str]:
        port = self.server_address[1]
        options = [f"--protocol-option={name}={name}" for name in ("labels", "scores")]
        return ["--endpoint", f"http://127.0.0.1:{port}/predict", "--protocol", "json", *options]


class _Handler(BaseHTTPRequestHandler):
    server: Service
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body in one packet: a second one would wait for a delayed acknowledgement

    def do_GET(self) -> None:
        assert self.path == "/v2/models/digits"
        self.server.described += 1
        inputs = [{"name": "pixels", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
        outputs = [{"name": "label", "datatype": "BYTES", "shape": [-1, 1]}]
        self.reply(self.server.description_status, {"inputs": inputs, "outputs": outputs})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v2/repository/index":
            self.reply(200, [{"name": "digits", "version": "1", "state": "READY"}])
            return
        tensor = "inputs" in body
        if tensor:
            assert body["inputs"][0]["name"] == "pixels"
            picture = 255 * np.asarray(body["inputs"][0]["data"], np.float32).reshape(8, 8)
        else:
            picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(body["image"]))), dtype=np.float32)
        with self.server.lock:
            self.server.requests += 1
            declined = self.server.requests > self.server.decline
            self.server.keys.add(self.headers.get("Authorization", ""))
            scores = self.server.digits.logits(torch.from_numpy(picture / 255)[None, None]).softmax(1)[0]
        order = scores.argsort(descending=True).tolist()
        answer: dict[str, Any] = {"labels": [WORDS[c] for c in order], "scores": [float(scores[c]) for c in order]}
        if tensor:
            found = {"name": "label", "datatype": "BYTES", "shape": [1, 1], "data": [WORDS[order[0]]]}
            answer = {"model_name": "digits", "outputs": [found]}
        self.reply(503 if declined else 200, answer)

    def reply(self, status: int, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def service(digits: Classifier) -> Iterator[Service]:
    with Service(digits) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield found
        finally:
            found.shutdown()
            thread.join(10)


def same_as_a_local_run(folder: Path, digits: Classifier) -> None:
    about = json.loads((folder / "audit.json").read_text())
    rows = read_run(folder / "run.jsonl").images
    g = SmoothedClassifier(AsSent(digits), 0.25)
    images = load_images("digits", digits, skip=90)
    assert [row["id"] for row in rows] == [item.id for item in images.items]
    for i, row in enumerate(rows):
        c = g.certify(images.load(i), n0=5, n=20, seed=2, image_id=row["id"])
        votes = {WORDS.index(about["vocabulary"][int(k)]): count for k, count in row["votes"].items()}
        assert votes == {k: count for k, count in enumerate(c.counts) if count}
        assert row["radius"] == c.radius
        assert (row["prediction"] < 0) == c.abstained
        assert row["prediction"] < 0 or row["class"] == WORDS[c.prediction]
    assert any(row["radius"] > 0 for row in rows)


def test_an_audit_belongs_to_one_denoiser(
    tmp_path: Path, service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that reads a file: after it has changed, the audit is not resumed, nor replayed beside another's record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "from pathlib import Path\ndef shrink():\n    by = float(Path('by').read_text())\n"
    Path("shrinks.py").write_text(code + "    return lambda noisy: noisy * by\n")
    command = ["audit", *service.arguments, *NUMBERS, "--skip", "250", "--budget", "400", "--out", "a", "--quiet"]
    command += ["--denoiser", "shrinks:shrink"]
    Path("by").write_text("0.9")
    run(*command)
    run("replay", "a")
    asked = service.requests
    about = json.loads(Path("a/audit.json").read_text())
    Path("by").write_text("0.7")
    capsys.readouterr()
    run(*command, code=2)
    other = "shrinks:shrink gives other answers to the same probe images"
    assert f"a/run.jsonl holds a run with other settings ({other})" in capsys.readouterr().err
    assert service.requests == asked
    about["pipeline"][0]["fingerprint"]["residuals"][:32] = [0.5] * 32
    Path("a/audit.json").write_text(json.dumps(about))
    run("replay", "a", code=2)
    assert capsys.readouterr().err == (
        f"certify: a/audit.json and a/run.jsonl are of different audits ({other}); expected the files of one audit\n"
    )


def test_audit_over_http(
    tmp_path: Path,
    service: Service,
    digits: Classifier,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SERVICE_KEY", KEY)
    command = ["audit", *service.arguments, *NUMBERS, "--budget", "400", "--price-per-1000", "2"]
    command += ["--api-key-env", "SERVICE_KEY", "--out", str(tmp_path / "a")]
    run(*command, "--dry-run")
    said = capsys.readouterr()
    assert service.requests == 0
    assert not (tmp_path / "a").exists()
    assert "165 queries (6 clean, 3 probe, 30 selection, 120 estimation, 6 drift)" in said.err
    assert "0.33 without retries, 0.80 if they use up the budget; at 2 per 1,000" in said.err
    run(*command, "--dry-run", "--json")
    said = capsys.readouterr()
    found = json.loads(said.out)["plan"]
    assert (found["most"], found["cost"], found["cost_most"], said.err) == (165, 0.33, 0.8, "")
    assert service.requests == 0
    run(*command)
    assert service.requests == read_ledger(tmp_path / "a" / "ledger.jsonl").spent == 165
    assert service.keys == {f"Bearer {KEY}"}
    said = capsys.readouterr()
    assert "165 of a budget of 400" in said.out
    assert "4 queries of one clean image agree; at the end 6 of 6 clean images" in said.out
    same_as_a_local_run(tmp_path / "a", digits)
    assert not [p for p in (tmp_path / "a").rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert KEY not in said.out + said.err
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {"audit.json", "run.jsonl", "ledger.jsonl", "report.html"}
    run(*command)  # the same command again: everything is there
    assert service.requests == 165
    capsys.readouterr()
    run("replay", str(tmp_path / "a"))
    assert "equal: all 6 certificates" in capsys.readouterr().out
    run("replay", str(tmp_path / "a"), "--alpha", "0.05", "--out", str(tmp_path / "b.jsonl"))
    run("recompute", str(tmp_path / "a" / "run.jsonl"), "--alpha", "0.05", "--out", str(tmp_path / "c.jsonl"))
    replayed, recomputed = (read_run(tmp_path / name).images for name in ("b.jsonl", "c.jsonl"))
    assert replayed == recomputed
    run("table", str(tmp_path / "a" / "run.jsonl"))
    ledger = tmp_path / "a" / "ledger.jsonl"
    other = ledger.read_text().replace('"ranked": [["zero"', '"ranked": [["nine"')
    ledger.write_text(other)
    run("replay", str(tmp_path / "a"), code=1)
    assert "certificates differ" in capsys.readouterr().err


def test_python_and_the_command_conduct_the_same_audit(tmp_path: Path, service: Service) -> None:
    options = ["--denoiser", "median", "--price-per-1000", "2", "--quiet", "--budget", "400", "--concurrency", "2"]
    run("audit", *service.arguments, *NUMBERS, *options, "--out", str(tmp_path / "a"))
    certify.audit(
        service.arguments[1],
        "digits",
        sigma=0.25,
        n0=5,
        n=20,
        seed=2,
        budget=400,
        denoiser="median",
        concurrency=2,
        progress=False,
        skip=90,
        protocol="json",
        protocol_options={"labels": "labels", "scores": "scores"},
        price_per_1000=2.0,
        out=tmp_path / "b",
    )
    rows, headers, records = [], [], []
    for name in ("a", "b"):
        found = read_run(tmp_path / name / "run.jsonl")
        rows.append([{k: v for k, v in row.items() if k != "seconds"} for row in found.images])
        headers.append({k: v for k, v in found.header.items() if k not in ("created", "command")})
        about = json.loads((tmp_path / name / "audit.json").read_text())
        for key in ("created", "finished", "command", "replay"):
            del about[key]
        del about["asked"]["seconds"]
        about["drift"].sort(key=lambda one: one["id"])  # of concurrent queries, whichever was answered first
        records.append(about)
    assert rows[0] == rows[1]
    assert headers[0] == headers[1]
    assert records[0] == records[1]
    assert records[0]["asked"]["cost"] == 0.33


def test_a_small_budget_is_kept_and_a_larger_one_resumes(
    tmp_path: Path, service: Service, digits: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["audit", *service.arguments, *NUMBERS, "--out", str(tmp_path), "--quiet"]
    run(*command, "--budget", "0")
    assert service.requests == 0
    err = capsys.readouterr().err
    assert "a budget of 0 finishes no image: one takes 40 requests, probes included" in err
    run(*command[:-1], "--budget", "39", "--dry-run")
    assert "finishes no image" in capsys.readouterr().err
    run(*command[:-1], "--budget", "40", "--dry-run")
    assert "finishes no image" not in capsys.readouterr().err
    run(*command, "--budget", "70")
    assert service.requests <= 70
    said = capsys.readouterr().out
    assert "unfinished         budget spent" in said
    assert len(read_run(tmp_path / "run.jsonl", allow_partial=True).images) == 2
    run(*command[:-1], "--budget", "400", "--dry-run")
    assert "ledger.jsonl: 70 of 400 requests are spent" in capsys.readouterr().err
    run(*command, "--budget", "400", "--sigma", "0.5", "--dry-run", code=2)
    assert "holds a run with other settings (sigma 0.25 there, 0.5 here" in capsys.readouterr().err
    assert service.requests == 70
    run(*command, "--budget", "400", "--concurrency", "7")
    same_as_a_local_run(tmp_path, digits)
    assert json.loads((tmp_path / "audit.json").read_text())["fixed_function"] is True
    names = [json.loads(line)["name"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()[1:]]
    assert len(names) == 2 * len(set(names))  # sent and answered, each once


@pytest.mark.slow
def test_a_model_describes_itself_once_beside_the_budget(
    tmp_path: Path, service: Service, digits: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    address = ["--endpoint", service.arguments[1].removesuffix("/predict"), "--protocol", "v2"]
    command = ["audit", *address, "--protocol-option", "model=digits", *NUMBERS, "--budget", "165"]
    out = ["--out", str(tmp_path / "a")]
    run(*command, *out, "--dry-run")
    assert "metadata   one request for the model's metadata" in capsys.readouterr().err
    service.description_status = 503
    run(*command, *out, code=1)
    assert "does not describe its model: HTTP 503" in capsys.readouterr().err
    assert (service.described, service.requests, (tmp_path / "a").exists()) == (1, 0, False)
    service.description_status = 200
    run(*command, *out, "--quiet")
    assert (service.described, service.requests) == (2, 165)
    same_as_a_local_run(tmp_path / "a", digits)
    about = read_ledger(tmp_path / "a" / "ledger.jsonl").header["format"]
    assert (about["input"], about["output"], about["layout"]) == ("pixels", "label", "NCHW")
    capsys.readouterr()
    run(*command, *out)  # resumes, with the options of then
    run(*command, *out, "--dry-run")
    assert "metadata" not in capsys.readouterr().err
    given = [f"--protocol-option={k}={about[k]}" for k in ("input", "output", "datatype", "layout")]
    run(*command, *given, "--out", str(tmp_path / "b"), "--quiet")
    assert (service.described, service.requests) == (2, 330)
    same_as_a_local_run(tmp_path / "b", digits)


@pytest.mark.slow
def test_a_classifier_is_audited_with_its_address_alone(
    tmp_path: Path, service: Service, digits: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server lists its model and describes it; the same from the command and from Python."""
    address = service.arguments[1].removesuffix("/predict")
    command = ["audit", "--endpoint", address, *NUMBERS, "--budget", "165", "--out", str(tmp_path / "a")]
    run(*command, "--dry-run")
    assert "metadata   two requests for the model's name and metadata" in capsys.readouterr().err
    run(*command, "--quiet")
    same_as_a_local_run(tmp_path / "a", digits)
    numbers = {"sigma": 0.25, "n0": 5, "n": 20, "seed": 2, "budget": 165}
    certify.audit(address, "digits", skip=90, out=tmp_path / "b", progress=False, **numbers)  # type: ignore[arg-type]
    same_as_a_local_run(tmp_path / "b", digits)
    assert (service.described, service.requests) == (2, 330)


@pytest.mark.slow
def test_deciding_with_a_denoiser_and_given_labels(
    tmp_path: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "map.csv").write_text("".join(f"{word},{i}\n" for i, word in enumerate(WORDS)))
    options = ["--denoiser", "median", "--radius", "0.1", "--reference", "given"]
    options += ["--class-map", str(tmp_path / "map.csv"), "--budget", "2000", "--out", str(tmp_path / "a")]
    numbers = ["--data", "digits", "--skip", "90", "--sigma", "0.25", "--n", "100", "--alpha", "0.01"]
    run("audit", *service.arguments, *numbers, *options, "--json")
    found = json.loads(capsys.readouterr().out)
    truth = load_images("digits", service.digits, skip=90).labels
    assert [row["label"] for row in found["images"]] == truth
    assert found["audit"]["vocabulary"] == [str(i) for i in range(10)]
    assert {row["decisions"][0]["outcome"] for row in found["images"]} & {"robust", "not certifiable"}
    assert all(row["drawn"] <= 100 for row in found["images"])
    assert (tmp_path / "a" / "pictures" / "000-denoised.png").is_file()


@pytest.mark.slow
def test_requests_without_an_answer_count_as_spent(tmp_path: Path, service: Service) -> None:
    """A request that was refused when the budget ended has no answer: it was paid for all the same."""
    command = [
        "audit",
        *service.arguments,
        *NUMBERS,
        "--out",
        str(tmp_path),
        "--quiet",
        "--concurrency",
        "1",
        "--retries",
        "1",
    ]
    service.decline = 13
    run(*command, "--budget", "32")
    kept, about = read_ledger(tmp_path / "ledger.jsonl"), json.loads((tmp_path / "audit.json").read_text())
    assert service.requests == kept.spent == about["asked"]["requests"]
    assert kept.queries == len(kept.answers) + 1
    assert about["asked"]["retries"] == kept.spent - kept.queries == read_audit(tmp_path).retries
    stages = _stage_rows(read_audit(tmp_path))
    assert sum(row.requests for row in stages) == kept.spent
    assert (sum(row.open for row in stages), sum(row.lost for row in stages)) == (1, 0)


@pytest.mark.slow
def test_a_second_process_overwrites_nothing(
    tmp_path: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["audit", *service.arguments, *NUMBERS, "--out", str(tmp_path), "--quiet", "--budget", "400"]
    run(*command)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    held = read_ledger(tmp_path / "ledger.jsonl").header
    with Ledger(tmp_path / "ledger.jsonl", held):
        run(*command, code=2)
    assert "is being written by another process" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_attacks_stop_when_the_service_is_down(
    tmp_path: Path, service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("certify.blackbox.audit_loop.MAX_DOWN", 3)
    numbers = ["--data", "digits", "--skip", "250", "--sigma", "0.25", "--n0", "2", "--n", "8", "--quiet"]
    attacks = ["--defences", "none", "--attacks", "square", "--queries", "60", "--eps", "0.3"]
    service.decline = 2 * 11 + 3 + 2  # of two images all but the attacks
    run(
        "audit",
        *service.arguments,
        *numbers,
        *attacks,
        "--budget",
        "900",
        "--retries",
        "0",
        "--out",
        str(tmp_path),
        code=1,
    )
    assert "3 queries in a row got no answer" in capsys.readouterr().err
    about = json.loads((tmp_path / "audit.json").read_text())
    assert about["status"] == "stopped"
    assert "3 queries in a row" in about["reason"]
    assert service.decline + 3 <= service.requests <= service.decline + 4
    assert len(read_run(tmp_path / "run.jsonl").images) == 2


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["hopskipjump", "square"])
def test_attacks_go_through_the_same_ledger_and_budget(
    tmp_path: Path, service: Service, attack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A budget that ends amid the attacks keeps what is finished; a larger one ends where one that was enough does."""
    numbers = ["--data", "digits", "--skip", "250", "--sigma", "0.25", "--n0", "2", "--n", "8", "--quiet"]
    attacks = ["--defences", "none,median", "--attacks", attack, "--queries", "60", "--eps", "0.3"]
    command = ["audit", *service.arguments, *numbers, *attacks]
    run(*command, "--budget", "5000", "--out", str(tmp_path / "whole"))
    spent = service.requests
    assert attack in capsys.readouterr().out
    run(*command, "--budget", str(spent - 6), "--out", str(tmp_path / "parts"))
    assert service.requests - spent == spent - 6
    assert "budget spent" in capsys.readouterr().out
    run(*command, "--budget", "5000", "--out", str(tmp_path / "parts"))
    assert service.requests == 2 * spent
    outcomes = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_comparison(tmp_path / name / FILE).run.images]
        for name in ("whole", "parts")
    ]
    assert outcomes[0] == outcomes[1]
    answers = read_ledger(tmp_path / "parts" / "ledger.jsonl").answers
    first = read_run(tmp_path / "parts" / "run.jsonl").images[0]["id"]
    assert f"{first} | attack {attack} median | 0" in answers
    rows = {(row["image"], row["defence"], row["condition"]): row for row in outcomes[0]}
    attacked = rows[first, "median", f"adaptive: {attack}"]
    asked = sum(name.startswith(f"{first} | attack {attack} median |") for name in answers)
    assert attacked["queries"] == asked <= 60
    assert rows[first, "none", "clean"]["answers"] == [rows[first, "none", "clean"]["label"]]
    run("table", str(tmp_path / "whole" / FILE))


@pytest.mark.slow
def test_a_real_model_server(tmp_path: Path, digits: Classifier) -> None:
    """LitServe holds the digits: the audit's votes and certificates are a local run's."""
    pytest.importorskip("litserve")
    (port,) = free_ports(1)
    command = [sys.executable, str(ROOT / "examples" / "litserve_digits.py"), str(port)]
    with process(command, tmp_path, f"http://127.0.0.1:{port}", "health") as sender:
        protocol = ["--protocol", "json", "--protocol-option", "labels=labels", "--protocol-option", "scores=scores"]
        address = ["--endpoint", f"{sender.endpoint}/predict", *protocol]
        run("audit", *address, *NUMBERS, "--budget", "300", "--out", str(tmp_path / "a"))
    same_as_a_local_run(tmp_path / "a", digits)
