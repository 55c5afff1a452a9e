"""A service that sends the key back in every encoding: no file, no message and no log of the command may hold it."""

from __future__ import annotations

import base64
import html
import json
import logging
import quopri
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from command import run
from scripted_service import Answer, Reply, service

from certify.cli.options import command_line

KEY = 'sk-4f9a/Zq+0123=%x"\\Qw&7<pL-_T'
NUMBERS = ["--data", "digits", "--skip", "200", "--sigma", "0.25", "--repeat-clean", "1", "--retries", "1"]


def in_json(text: str) -> str:
    """The text inside the quotation marks of JSON."""
    return json.dumps(text)[1:-1]


def code(pattern: str, text: str = KEY) -> str:
    return "".join(pattern % ord(c) for c in text)


def base64_of(text: str, urlsafe: bool = False) -> str:
    encode = base64.urlsafe_b64encode if urlsafe else base64.b64encode
    return encode(text.encode()).decode()


ECHOES = {
    # as they stand between the quotation marks of a JSON text
    "plain": in_json(KEY),
    "solidus": in_json(KEY).replace("/", "\\/"),
    "plus sign": in_json(KEY).replace("+", "\\u002B"),
    "every character": code("\\u%04X"),
    "every character, lower case": code("\\u%04x"),
    "solidus and plus sign": in_json(KEY).replace("/", "\\/").replace("+", "\\u002b"),
    # further members of the kind
    "a part": in_json(KEY[3:12]),
    "lower case": in_json(KEY.lower()),
    "percent": in_json(quote(KEY, safe="")),
    "percent, in part": in_json(KEY.replace("+", "%2b")),
    "percent inside JSON escapes": code("\\u%04x", quote(KEY, safe="")),
    "percent twice": in_json(quote(code("%%%02X"), safe="")),
    "JSON inside JSON inside JSON": in_json(json.dumps(json.dumps({"key": KEY}))),
    "JSON escapes inside JSON": in_json(code("\\u%04x")),
    "JavaScript": in_json(code("\\x%02x")),
    "octal": in_json(code("\\%03o")),
    "HTML": in_json(html.escape(KEY)),
    "HTML, by number": in_json(code("&#%d;")),
    "HTML, by number in hexadecimal, inside percent": in_json(quote(code("&#x%X;"), safe="")),
    "quoted-printable": in_json(code("=%02X")),
    "in lines": in_json(f"{KEY[:7]}\r\n{KEY[7:14]}\r\n{KEY[14:]}"),
    "UTF-16": in_json(KEY.encode("utf-16-le").decode("latin-1")),
    "control characters between": in_json("\x01".join(KEY)),
    "escaped control characters between": in_json("\\u001b".join(KEY)),
    "hexadecimal": code("%02X"),
    **{f"base64 at {n}": in_json(base64_of("x" * n + KEY + "yz")) for n in range(3)},
    **{f"URL-safe base64 at {n}": in_json(base64_of("x" * n + KEY + "yz", urlsafe=True)) for n in range(3)},
    "base64 without padding": in_json(base64_of(KEY).rstrip("=")),
    "base64 in percent": in_json(quote(base64_of("user:" + KEY), safe="")),
    "base64 of JSON": in_json(base64_of(json.dumps({"Authorization": f"Bearer {KEY}"}))),
    "base64 of percent": in_json(base64_of(quote(KEY, safe=""))),
    "base64 of base64": in_json(base64_of("a:" + base64_of("b:" + KEY))),
}


def undone(text: str) -> Iterator[str]:
    """The text with escapes undone, its base64 and its hexadecimal decoded."""
    plain = html.unescape(unquote(text, "latin-1"))
    plain = re.sub(r"\\u([0-9a-fA-F]{4})|\\x([0-9a-fA-F]{2})", lambda m: chr(int(m[1] or m[2], 16)), plain)
    plain = re.sub(r"\\([0-3][0-7]{2})", lambda m: chr(int(m[1], 8)), plain)
    plain = re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r"}.get(m[1], m[1]), plain)
    yield re.sub("[\x00-\x1f\x7f]", "", plain)
    yield quopri.decodestring(plain.encode("utf-8", "replace")).decode("latin-1")
    runs = re.findall(r"[A-Za-z0-9+/_-]{12,}", text)
    cut = [run[n : n + (len(run) - n) // 4 * 4] for run in runs for n in range(4)]
    yield "\n".join(
        base64.b64decode(one, altchars=b"-_" if set(one) & {"-", "_"} else b"+/").decode("latin-1") for one in cut
    )
    runs = re.findall(r"(?:[0-9a-fA-F]{2}){8,}", text)
    yield "\n".join(bytes.fromhex(run).decode("latin-1") for run in runs)


def leaks(text: str, secret: str = KEY, depth: int = 3) -> set[str]:
    """The runs of eight characters of the secret that can be read in a text."""
    runs = {secret[i : i + 8].lower() for i in range(len(secret) - 7)}
    found, seen, now = set[str](), set[str](), {text}
    for _ in range(depth + 1):
        for one in now:
            lower = one.lower()
            found |= {run for run in runs if run in lower}
        seen |= now
        now = {other for one in now for other in undone(one)} - seen
    return found


@pytest.fixture
def audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Callable[..., dict[str, str]]:
    """Audits a service in a folder; everything that was written: by file name, ``stdout``, ``stderr`` and ``logs``."""
    monkeypatch.setenv("SERVICE_KEY", KEY)
    for name in ("httpx2", "httpcore2", "asyncio", "stamina", "certify"):
        caplog.set_level(logging.DEBUG, name)

    def audit_it(answer: Answer, *more: str, code: int = 0, typed: Sequence[str] = ()) -> dict[str, str]:
        def checked(number: int, headers: Mapping[str, str]) -> Reply:
            assert KEY in headers["Authorization"]
            return answer(number, headers)

        with service(checked) as url:
            arguments = ["audit", "--endpoint", url, *more, "--api-key-env", "SERVICE_KEY", *NUMBERS]
            arguments += ["--out", str(tmp_path / "audit")]
            monkeypatch.setattr(sys, "argv", ["certify", *arguments, *typed])
            run(*arguments, code=code)
        said = capfd.readouterr()
        written = {
            p.name: p.read_text() for p in (tmp_path / "audit").rglob("*") if p.suffix in (".jsonl", ".json", ".html")
        }
        return {**written, "stdout": said.out, "stderr": said.err, "logs": caplog.text}

    return audit_it


def clean(found: dict[str, str]) -> None:
    assert {"ledger.jsonl", "run.jsonl", "audit.json", "report.html"} <= found.keys()
    for name, text in found.items():
        assert not leaks(text), name


JSON = ["--protocol", "json", "--protocol-option", "labels=labels"]


@pytest.mark.slow
def test_keys_in_labels_and_errors_are_hidden(audit: Callable[..., dict[str, str]]) -> None:
    echoes = list(ECHOES.values())

    def answer(number: int, headers: Mapping[str, str]) -> Reply:
        echo = echoes[number // 4 % len(echoes)]
        shown = number if number >= 8 else 0  # the first picture's label is the same when it is queried again
        label, error = f'{{"labels": ["label {shown}: {echo}"]}}', f'{{"error": "error {number}: {echo}"}}'
        if number >= 4 * len(echoes) + 2:
            return 401, f'{{"error": "your key is {echoes[3]}"}}', {}
        kinds = [(200, label, {}), (400, error, {}), (503, error, {"Retry-After": "0"}), (200, error, {})]
        return kinds[number % 4]

    found = audit(answer, *JSON, "--n0", "1", "--n", "500", "--budget", "1000", code=1)
    clean(found)
    assert "HTTP 401: your key is [key]; check the key" in found["stderr"]
    labels = [r[0] for line in found["ledger.jsonl"].splitlines() for r in json.loads(line).get("ranked", ())]
    assert len(labels) == len(echoes) + 1
    assert labels[:4] == [f"label {number}: [key]" for number in (0, 0, 8, 12)]
    assert all("[key]" in label and label.startswith("label ") for label in labels)


def test_the_key_search_of_these_tests_covers_every_encoding() -> None:
    for name, echo in ECHOES.items():
        assert leaks(f'{{"error": "bad {echo} key"}}'), name


def test_keys_in_names_of_objects_and_whole_numbers(
    audit: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.KEY", "8204716359028417")
    monkeypatch.setenv("SERVICE_KEY", KEY)
    body = '{"found": {"cat \\u0038204716359028417": 1}, "number": 8204716359028417, "scores": [0.8204716359, 0.25]}'
    labels = "labels=[keys(found)[0], to_string(number), number]"
    option = [
        "--protocol",
        "json",
        "--protocol-option",
        labels,
        "--protocol-option",
        "scores=[scores[0], `0.5`, scores[1]]",
    ]
    found = audit(lambda number, headers: (200, body, {}), *option, "--n0", "1", "--n", "5", "--budget", "20")
    answers = [json.loads(line) for line in found["ledger.jsonl"].splitlines() if '"answer"' in line]
    assert answers[0]["ranked"] == [["cat [key]", 0.8204716359], ["[key]", 0.5]]  # fractions are scores, and stay


def test_text_without_the_key_is_unchanged(audit: Callable[..., dict[str, str]]) -> None:
    labels = ["sk-4f9a", "k-4F9A/", "Qw&7<pL", "zero \U0001f600 \\u0041 %41 &amp; =41\n", "c2stNGY5"]
    body = json.dumps({"labels": labels, "scores": [0.1 + 0.2, 1e-7, 0.1, 0.0, 0.0]})
    option = [*JSON, "--protocol-option", "scores=scores"]
    found = audit(lambda number, headers: (200, body, {}), *option, "--n0", "1", "--n", "5", "--budget", "20")
    answers = [json.loads(line) for line in found["ledger.jsonl"].splitlines() if '"answer"' in line]
    assert [label for label, _ in answers[0]["ranked"]] == [labels[0], labels[2], labels[1], *labels[3:]]
    assert answers[0]["ranked"][0][1] == 0.1 + 0.2


@pytest.mark.parametrize("status", [200, 401])
def test_keys_in_model_metadata_are_hidden(audit: Callable[..., dict[str, str]], status: int) -> None:
    echo = ECHOES["solidus and plus sign"]
    tensor = f'{{"name": "pixels {echo}", "datatype": "FP32", "shape": [1, 1, 8, 8]}}'
    output = f'{{"name": "label {echo}", "datatype": "BYTES", "shape": [1], "data": ["zero {echo}"]}}'

    def answer(number: int, headers: Mapping[str, str]) -> Reply:
        if status == 401:
            return 401, f'{{"error": "no {echo} here"}}', {"X-Key": KEY}
        return 200, f'{{"inputs": [{tensor}], "outputs": [{output}]}}', {}

    option = ["--protocol", "v2", "--protocol-option", "model=m", "--n0", "1", "--n", "5", "--budget", "20"]
    found = audit(answer, *option, code=status == 401)
    if status == 401:
        assert "HTTP 401: no [key] here" in found["stderr"]
        assert not leaks(found["stderr"] + found["logs"])
    else:
        assert json.loads(found["ledger.jsonl"].splitlines()[0])["format"]["input"] == "pixels [key]"
        clean(found)


def test_keys_in_redirects_and_headers(audit: Callable[..., dict[str, str]]) -> None:
    where = {"Location": f"https://elsewhere.example/{quote(KEY, safe='')}", "X-Key": KEY, "Retry-After": KEY[:20]}
    found = audit(lambda number, headers: (307, "", where), *JSON, "--n0", "1", "--n", "5", "--budget", "20", code=1)
    assert "it redirects to 'https://elsewhere.example/[key]', which is not followed" in found["stderr"]
    clean(found)


def test_http_basic(audit: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.KEY", base64_of("alice:pass1"))
    monkeypatch.setenv("SERVICE_KEY", KEY)
    body = json.dumps({"labels": [f"{base64.b64decode(KEY).decode()} is alice, who knows pass1"]})
    option = ["--auth-header", "Authorization: Basic {key}", "--n0", "1", "--n", "5", "--budget", "20"]
    found = audit(lambda number, headers: (200, body, {}), *JSON, *option)
    clean(found)
    assert all("pass1" not in text for text in found.values())
    assert '"[key] is alice, who knows [key]"' in found["ledger.jsonl"]


def test_passwords_of_proxies(audit: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    token, said = base64_of("me:pr0xy-p4ss"), base64_of("a request of me:pr0xy-p4ss")

    def answer(number: int, headers: Mapping[str, str]) -> Reply:
        return (200, json.dumps({"labels": [f"zero {said}"]}), {}) if number < 3 else (407, f"pr0xy%2Dp4ss {token}", {})

    with service(answer) as url:
        proxy = url.replace("//", "//me:pr0xy%2Dp4ss@").removesuffix("/predict")
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy)
        to = ["--insecure", "--endpoint", "http://service.invalid/predict"]
        found = audit(answer, *JSON, *to, "--n0", "1", "--n", "5", "--budget", "20", code=1)
    clean(found)
    assert "HTTP 407: [key]" in found["stderr"]
    for text in found.values():
        assert not leaks(text, "me:pr0xy-p4ss")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--endpoint", f"http://127.0.0.1:9/{quote(KEY, safe='')}/predict"], "the endpoint contains the key itself"),
        (["--protocol-option", f"path=v1/{KEY}"], "protocol option path contains the key itself"),
        (["--protocol-option", f"api_key={KEY}"], "--protocol-option 'api_key=...': expected KEY=VALUE"),
        (["--api-key-env", KEY], "the variable named is not set"),
        (["--auth-header", f"X-Key: {KEY}"], "--auth-header: expected NAME: VALUE with {key} in it"),
        (["--auth-query", f"key={KEY}"], "--auth-query: expected NAME={key}"),
        ([f"--api-key={KEY}"], "No such option '--api-key'. Did you mean '--api-key-env'?"),
    ],
)
def test_a_key_among_the_options_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    monkeypatch.setenv("SERVICE_KEY", KEY)
    arguments = ["audit", "--endpoint", "http://127.0.0.1:9/predict", *JSON, "--api-key-env", "SERVICE_KEY", *NUMBERS]
    run(*arguments, "--budget", "20", "--out", str(tmp_path / "audit"), *options, code=2)
    said = capfd.readouterr()
    assert says in said.err
    assert not leaks(said.out + said.err)
    assert not (tmp_path / "audit").exists()


def test_the_recorded_command_holds_no_key(audit: Callable[..., dict[str, str]]) -> None:
    numbers = ["--n0", "1", "--n", "5", "--budget", "20", "--max", "2"]
    found = audit(
        lambda number, headers: (200, '{"labels": ["zero"]}', {}), *JSON, *numbers, typed=["--name", KEY[2:20]]
    )
    assert json.loads(found["audit.json"])["command"].endswith(" --name '[key]'")
    clean(found)


def test_no_recorded_command_holds_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verb that records its command takes it from one function."""
    words = ["certify", "--cluster", "ray://user:secret1@host:10001", "--endpoint=https://host/x?token=secret2#secret3"]
    monkeypatch.setattr("sys.argv", [*words, "--name", "a b"])
    assert command_line() == "certify --cluster ray://host:10001 --endpoint=https://host/x --name 'a b'"
