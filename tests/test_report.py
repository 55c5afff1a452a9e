"""An audit's report says what the records say, and nothing that it should not; a browser shows it as it is meant."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browser
from command import run as command
from PIL import Image
from scipy.stats import beta
from small_audit import WORDS, make_audit

from analysis.report import page as report
from analysis.report.page import write_report
from certify.blackbox.client.credentials import public
from certify.errors import RunFault, UserError
from certify.images.dataset import ImageSet, load_images
from certify.models.classifier import Classifier
from certify.runs.config import Settings
from certify.smoothing.procedures import Certify, Decide

DECIDE = Settings(Decide((0.05, 0.12), n=150))
CERTIFY = Settings(Certify(n0=10, n=60))
HOSTILE = "<script>alert('x')</script>\"&amp;"
SECRET = "s3cr3t-t0ken"


class Page(HTMLParser):
    """The page as parsed: tables by class, named values, texts by class, every attribute."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.tables: dict[str, list[list[str]]] = {}
        self.ids: list[tuple[str, str]] = []  # outcome and id of each line of the tables of images
        self.pairs: dict[str, list[str]] = {}
        self.texts: dict[str, list[str]] = {}
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.images: dict[str, str] = {}  # data URIs by their alternative texts
        self._open: list[tuple[str, str]] = []
        self._outcome = ""
        self.feed(self.source)
        assert self._open == [], "every element is closed"

    @property
    def _holder(self) -> str:
        return next((kind for tag, kind in reversed(self._open) if tag in ("table", "dl")), "")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        self.attributes += [(tag, *item) for item in given.items()]
        if tag == "img":
            self.images[given["alt"]] = given["src"]
        if tag in ("meta", "img", "br"):
            return
        self._open.append((tag, given.get("class", "")))
        body = any(name == "tbody" for name, _ in self._open)
        if tag == "table":
            self._outcome = given.get("data-outcome", "")
            self.tables.setdefault(self._holder, [])
        elif tag == "tr" and body:
            self.tables[self._holder].append([])
            self.ids += [(self._outcome, given["data-id"])] if "data-id" in given else []
        elif tag in ("td", "th") and body:
            self.tables[self._holder][-1].append("")
        elif tag in ("dt", "dd"):
            self.pairs.setdefault(self._holder, []).append("")
        if given.get("class"):
            self.texts.setdefault(given["class"], []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "img", "br"):
            self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        inside = {tag for tag, _ in self._open}
        if inside & {"td", "th"} and "tbody" in inside:
            self.tables[self._holder][-1][-1] += " " + data
        elif inside & {"dt", "dd"}:
            self.pairs[self._holder][-1] += data
        for _, kind in self._open:
            if kind:
                self.texts[kind][-1] += data

    def rows(self, table: str) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in row] for row in self.tables[table]]

    def named(self, kind: str) -> dict[str, str]:
        found = [" ".join(text.split()) for text in self.pairs[kind]]
        return dict(zip(found[::2], found[1::2], strict=True))

    def tiles(self) -> dict[str, tuple[str, str]]:
        found = [" ".join(text.split()) for text in self.pairs["tiles"]]
        return {found[i]: (found[i + 1], found[i + 2]) for i in range(0, len(found), 3)}

    def text(self, kind: str) -> str:
        return " ".join(" ".join(self.texts.get(kind, [])).split())


class Records:
    """The folder's files, read line by line here."""

    def __init__(self, folder: Path) -> None:
        lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()][1:]
        self.sent = [line["name"].rsplit(" | ", 2) for line in lines if line["type"] == "sent"]
        self.answers = {tuple(x["name"].rsplit(" | ", 2)): x for x in lines if x["type"] == "answer"}
        self.header, *rows = (json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines())
        self.rows = {row["id"]: row for row in rows}


def moody(name: str, number: int) -> tuple[int, str]:
    """Retries, a few of them in vain."""
    if " | estimation | " not in name and " | selection | " not in name:
        return 1, ""
    failed = {29: (3, "HTTP 503: Service Unavailable"), 47: (1, "timed out after 30 s")}
    return next((how for every, how in failed.items() if number % every == 0), (2 if number % 23 == 0 else 1, ""))


@pytest.fixture(scope="module")
def images(digits: Classifier) -> ImageSet:
    return load_images("digits", digits, skip=60)


@pytest.fixture(scope="module")
def few(digits: Classifier) -> ImageSet:
    return load_images("digits", digits, skip=120)


@pytest.fixture(scope="module", params=[DECIDE, CERTIFY], ids=["decide", "certify"])
def audited(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, digits: Classifier, images: ImageSet
) -> Path:
    folder = tmp_path_factory.mktemp("audits") / "run"
    return make_audit(folder, digits, images, settings=request.param, mood=moody)


@pytest.fixture(scope="module")
def page(audited: Path) -> Page:
    return page_of(audited)


@pytest.fixture(scope="module")
def records(audited: Path) -> Records:
    return Records(audited)


@pytest.fixture(scope="module")
def calm_audit(tmp_path_factory: pytest.TempPathFactory, digits: Classifier, few: ImageSet) -> Path:
    return make_audit(tmp_path_factory.mktemp("calm") / "run", digits, few, settings=DECIDE)


@pytest.fixture
def copy(tmp_path: Path, calm_audit: Path) -> Path:
    return Path(shutil.copytree(calm_audit, tmp_path / "run"))


def page_of(folder: Path) -> Page:
    return Page(write_report(folder))


def rewrite(folder: Path, **changes: Any) -> dict[str, Any]:
    """Change ``audit.json``."""
    about = json.loads((folder / "audit.json").read_text()) | changes
    (folder / "audit.json").write_text(json.dumps(about))
    return dict(about)


def loud(page: Page) -> str:
    return page.text("notice loud")


def floored(value: float) -> str:
    return f"{math.floor(value * 10_000) / 10_000:.4f}"


def group_of(row: dict[str, Any]) -> str:
    last = row["decisions"][-1]["outcome"] if row.get("decisions") else None
    if last in ("not certifiable", "undecided"):
        return str(last).replace(" ", "-")
    if row["prediction"] < 0:
        return "undecided"
    return "keeps-its-label" if row["prediction"] == row["label"] else "another-label"


def test_every_image_is_listed_with_its_own_numbers(page: Page, records: Records) -> None:
    lines = dict(zip([name for _, name in page.ids], page.rows("images stack"), strict=True))
    assert lines.keys() == records.rows.keys()
    for name, row in records.rows.items():
        who, _, what, votes = lines[name]
        label, score = records.answers[name, "clean", "0"]["ranked"][0]
        assert who == f"{name} {label} ({score:.3g})"
        wanted = sorted(((k, WORDS[int(c)]) for c, k in row["votes"].items()), key=lambda v: (-v[0], v[1]))
        text, others = "".join(f"{word} {k} " for k, word in wanted[:3]), wanted[3:]
        text += f"{len(others)} other label{'s' * (len(others) > 1)} {sum(k for k, _ in others)} " if others else ""
        text += f"failed {row['failures']} " if row["failures"] else ""
        assert votes == f"{text}{row['trials']} noisy copies"
        if row["radius"]:
            assert f"radius {floored(row['radius'])} label {WORDS[row['prediction']]}" in what
        for decision in row.get("decisions", ()):
            assert f"{decision['radius']:g}: {decision['outcome']}" in what
        if not row.get("decisions") and row["prediction"] >= 0:
            assert f"p at least {floored(row['p_lower'])}" in what
    groups = Counter(outcome for outcome, _ in page.ids)
    assert groups == Counter(group_of(row) for row in records.rows.values())
    assert len(groups) >= 2, "there are images of several kinds"


def test_the_verdict_counts_correctly(page: Page, records: Records) -> None:
    groups = Counter(group_of(row) for row in records.rows.values())
    kept = sorted(row["radius"] for row in records.rows.values() if group_of(row) == "keeps-its-label")
    headline = page.text("headline")
    under = "below 0.12"
    if records.header["procedure"] == "certify":
        middle, most = floored(kept[(len(kept) - 1) // 2]), floored(kept[-1])
        under = f"below an image-specific radius (median {middle}, largest {most})"
    start = f"Of {len(records.rows)} images, the smoothed service keeps the service's own label on {len(kept)}"
    start += " under every change of l2 size"
    assert headline.startswith(f"{start} {under}, at 99.9 % confidence per image")
    for outcome, words in {"undecided": "undecided", "not-certifiable": "cannot be certified"}.items():
        found = re.search(rf"; (\d+) (?:is |are )?{words}", headline)
        assert int(found[1] if found else 0) == groups[outcome]
    count, about = page.tiles()["keep their label"]
    assert count == f"{len(kept)} of {len(records.rows)}"
    low = beta.ppf(0.025, len(kept), len(records.rows) - len(kept) + 1)
    assert f": {math.floor(1000 * low) / 1000:.3f} to " in about


def test_radii_are_rounded_down_and_their_limit_up(audited: Path, tmp_path: Path) -> None:
    """An image at the limit: its radius is not displayed as larger, nor the limit as smaller, than it is."""
    folder = shutil.copytree(audited, tmp_path / "run")
    header, *rows = (json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines())
    if header["procedure"] == "decide":
        pytest.skip("a decided radius has no limit")
    limit = 0.37511875602822375
    best = max(range(len(rows)), key=lambda i: (rows[i]["prediction"] == rows[i]["label"], rows[i]["radius"]))
    rows[best]["radius"] = limit
    (folder / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *rows]))
    rewrite(folder, plan={"radius_cap": limit})
    page = page_of(folder)
    assert page.tiles()["median radius"][1] == "largest 0.3751; at most 0.3752 with this many samples"
    assert "largest 0.3751)" in page.text("headline")


def test_the_curve_is_that_of_the_run_file(page: Page, records: Records) -> None:
    rows = list(records.rows.values())
    assert page.rows("curve")
    for radius, reached, share, interval in page.rows("curve"):
        count = sum(row["prediction"] == row["label"] and row["radius"] >= float(radius) for row in rows)
        assert int(reached) == count
        assert share == f"{math.floor(1000 * count / len(rows)) / 1000:.3f}"
        high = beta.ppf(0.975, count + 1, len(rows) - count) if count < len(rows) else 1.0
        assert interval.endswith(f"to {math.ceil(1000 * high) / 1000:.3f}")
    assert page.tags["svg"] == 2, "the curve and the answer times"
    decided = page.rows("decided") if "decided" in page.tables else []
    outcomes = ("robust", "not certifiable", "undecided")
    for radius, *counts in decided:
        here = Counter(d["outcome"] for row in rows for d in row["decisions"] if d["radius"] == float(radius))
        assert [int(c) for c in counts] == [here[name] for name in outcomes]
    assert len(decided) == (2 if rows[0].get("decisions") else 0)


def test_queries_failures_cost_and_times_are_counted_from_the_ledger(page: Page, records: Records) -> None:
    sent, answers = Counter(stage for _, stage, _ in records.sent), records.answers
    seen = {row[0].split()[0]: [int(cell.replace(",", "")) for cell in row[1:]] for row in page.rows("queries stack")}
    assert seen.keys() == sent.keys()
    for stage, (queries, requests, answered, failed, lost, still_open) in seen.items():
        here = [answer for (_, of, _), answer in answers.items() if of == stage]
        good = sum(bool(answer["ranked"]) for answer in here)
        assert (queries, requests, answered, failed) == (len(here), sent[stage], good, len(here) - good)
        assert (lost, still_open) == (0, 0)
    kinds = Counter(answer["failure"] for answer in answers.values() if answer["failure"])
    assert {why: int(times) for why, times in page.rows("failures")} == kinds
    assert len(kinds) == 2
    total = len(records.sent)
    cost = page.named("pairs cost")
    assert cost["requests sent"] == f"{total:,}"
    assert cost["of them retries"] == f"{total - len(answers):,}"
    assert cost["remaining budget"] == f"{20_000 - total:,}"
    assert cost["cost of the requests"] == page.tiles()["cost"][0] == f"{total * 1.5 / 1000:.2f} USD"
    assert page.tiles()["failed queries"][0] == str(sum(kinds.values()))
    seconds = [answer["seconds"] for answer in answers.values() if answer["ranked"]]
    times = page.named("pairs quantiles")
    assert times["half within"] == page.tiles()["median time"][0] == report.clock(float(np.median(seconds)))
    assert times["99 % within"] == report.clock(float(np.quantile(seconds, 0.99)))


def test_method_settings_and_commands_are_shown(audited: Path, page: Page, records: Records) -> None:
    about, header = json.loads((audited / "audit.json").read_text()), records.header
    assert page.text("command") == about["command"]
    assert page.text("replay") == f"certify replay {audited} certify report {audited}"
    settings = page.named("pairs settings")
    assert settings["sigma"] == f"{header['sigma']:g}"
    assert settings["images.sha256"] == header["images"]["sha256"]
    assert settings["settings.timeout"] == "30"
    assert page.named("pairs versions") == about["versions"]
    assert "with probability at least 0.999 over the noise draws" in page.source
    deciding = header["procedure"] == "decide"
    assert ("is evaluated after every answer" in page.source) == deciding
    assert ("10 noisy copies choose a label; its votes are counted on 60 new ones" in page.source) != deciding


def test_thumbnails_equal_the_pictures_sent(audited: Path, page: Page) -> None:
    about = json.loads((audited / "audit.json").read_text())
    for entry in about["images"]:
        for stage in ("clean", "noisy", "denoised"):
            kind, content = page.images[f"{entry['id']}, {stage}"].split(",")
            assert kind == "data:image/png;base64"
            with (
                Image.open(io.BytesIO(base64.b64decode(content))) as shown,
                Image.open(audited / "pictures" / f"{entry['pictures']}-{stage}.png") as sent,
            ):
                assert np.array_equal(np.asarray(shown), np.asarray(sent))


def test_the_page_is_self_contained(page: Page) -> None:
    assert not page.tags.keys() & {"script", "link", "iframe", "object", "embed", "form", "base", "audio", "video"}
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert value.startswith(("data:image/", "#")), (tag, name, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.source))
    assert "@import" not in page.source
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for _, name, value in page.attributes if name == "href"} <= set(ids)
    (policy,) = [value for _, name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_text_from_outside_is_escaped(tmp_path: Path, digits: Classifier, few: ImageSet) -> None:
    about = dict.fromkeys(("endpoint", "command", "denoiser", "replay", "reason", "status", "protocol"), HOSTILE)
    folder = make_audit(
        tmp_path / "run",
        digits,
        few,
        settings=DECIDE,
        words=[f"{HOSTILE}{word}" for word in WORDS],
        mood=lambda name, number: (1, HOSTILE if number % 30 == 0 and "estimation" in name else ""),
        turn=lambda name, number: "drift" in name or "probe" in name,
        only=3,
        about=about | {"settings": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}},
    )
    page = page_of(folder)
    assert "script" not in page.tags
    assert "<script" not in page.source.lower()
    assert HOSTILE in page.text("own")
    for table in ("images stack", "failures", "probes stack", "drifts stack"):
        assert any(HOSTILE in cell for row in page.rows(table) for cell in row), table
    assert page.text("command") == HOSTILE
    assert page.named("pairs versions") == {HOSTILE: HOSTILE}


def test_credentials_in_addresses_are_removed(copy: Path) -> None:
    address = f"https://me:{SECRET}@host.example/v1/classify?key={SECRET}&x=1#{SECRET}"
    settings = {"proxy": address, "list": [address]}
    rewrite(copy, endpoint=address, command=f"certify audit --endpoint '{address}' --data d", settings=settings)
    page = page_of(copy)
    assert SECRET not in page.source
    assert page.text("command") == "certify audit --endpoint 'https://host.example/v1/classify' --data d"
    assert public("http://127.0.0.1:9/v2/models/m@1 a@b.c") == "http://127.0.0.1:9/v2/models/m@1 a@b.c"


def test_a_sound_audit_has_no_warnings(calm_audit: Path) -> None:
    page = page_of(calm_audit)
    assert not page.texts.keys() & {"notice", "notice loud"}
    assert "0 labels changed" in page.text("drift")


def test_nondeterminism_is_the_first_warning(tmp_path: Path, digits: Classifier, few: ImageSet) -> None:
    folder = make_audit(
        tmp_path / "run",
        digits,
        few,
        settings=DECIDE,
        turn=lambda name, number: name.endswith("| probe | 2") or " | drift | " in name,
    )
    page, answers = page_of(folder), Records(folder).answers
    assert "The service is not deterministic" in loud(page)
    assert "3 of 3 images that were sent repeatedly" in loud(page)
    assert f"{len(few)} of {len(few)} images got another label at the end" in loud(page)
    assert page.source.index("not deterministic") < page.source.index('class="headline"')
    for name, count, labels, *_ in page.rows("probes stack"):
        asked = [a["ranked"][0][0] for (i, stage, _), a in answers.items() if i == name and stage in ("clean", "probe")]
        assert int(count) == len(asked) == 6
        assert labels == ", ".join(f"{label} × {k}" for label, k in Counter(asked).most_common()) + " ⚠ differ"
    for name, before, after in page.rows("drifts stack"):
        firsts = [answers[name, stage, "0"]["ranked"][0][0] for stage in ("clean", "drift")]
        assert [before, after] == firsts


@pytest.mark.slow
def test_the_warning_about_failures_depends_on_their_share(tmp_path: Path, digits: Classifier, few: ImageSet) -> None:
    def failing(every: int, settings: Settings = DECIDE) -> Page:
        def mood(name: str, number: int) -> tuple[int, str]:
            return 1, "HTTP 500" if "tion" in name and number % every == 0 else ""

        folder = tmp_path / f"{every}-{settings.procedure.kind}"
        return page_of(make_audit(folder, digits, few, settings=settings, mood=mood))

    some, many = failing(25), failing(4)
    assert "Some queries failed" in some.text("notice")
    assert loud(some) == ""
    assert "Many queries failed" in loud(many)
    for settings in (DECIDE, CERTIFY):
        page = failing(1, settings)
        assert "Every query failed" in loud(page)
        assert f"Of {len(few)} images, the smoothed service keeps the service's own label on 0" in page.text("headline")
        assert {outcome for outcome, _ in page.ids} <= {"undecided", "not-certifiable"}


def test_failures_that_prevent_certificates_are_counted(tmp_path: Path, digits: Classifier, few: ImageSet) -> None:
    """No label reaches its share where two of three queries fail: the words say why, and count what they mean."""

    def mood(name: str, number: int) -> tuple[int, str]:
        return 1, "HTTP 500" if "estimation" in name and number % 3 else ""

    folder = make_audit(tmp_path / "run", digits, few, settings=DECIDE, mood=mood)
    page, rows = page_of(folder), Records(folder).rows.values()
    against = sum(row["failures"] for row in rows if group_of(row) == "not-certifiable")
    assert against > 0
    assert f"cannot be certified, counting {against:,} failed queries as votes against" in page.text("headline")
    assert f"requires, counting {against:,} failed queries as votes against, and" in page.source
    calm = page_of(make_audit(tmp_path / "calm", digits, few, settings=DECIDE))
    assert "failed queries as votes" not in calm.source


def test_given_labels_and_images_without_answer_are_described(
    tmp_path: Path, digits: Classifier, few: ImageSet
) -> None:
    def mood(name: str, number: int) -> tuple[int, str]:
        return 1, "HTTP 500" if name == f"{few.items[1].id} | clean | 0" else ""

    about = {"labels": "given", "plan": {"budget": 0}, "status": "stopped"}
    about["reason"] = "https://me:hidden-1@host/x?t=hidden-2 is silent"
    page = page_of(make_audit(tmp_path / "run", digits, few, settings=CERTIFY, mood=mood, about=about))
    assert "the smoothed service returns the given label on" in page.text("headline")
    assert "returns the given label" in page.source
    assert "label of the unmodified image" not in page.source
    assert "; 1 of them with nothing to certify, which the curve leaves out" in page.tiles()["keep their label"][1]
    assert page.tiles()["requests sent"][1].startswith("of a budget of 0;")
    assert "https://host/x is silent" in loud(page)
    assert "hidden-" not in page.source


@pytest.mark.parametrize("bound", ["runner-up", "best"])
def test_bounds_on_two_classes_have_their_own_method_section(
    tmp_path: Path, digits: Classifier, few: ImageSet, bound: str
) -> None:
    page = page_of(
        make_audit(
            tmp_path / "run",
            digits,
            few,
            settings=dataclasses.replace(CERTIFY, procedure=dataclasses.replace(CERTIFY.procedure, bound=bound)),
        )
    )
    assert "an upper bound q for its strongest rival" in page.source
    assert "undecided if p is at most q" in page.source
    assert "half of sigma times the difference" in page.source
    assert "1/2 under" not in page.source


def test_an_unfinished_audit_has_a_report_that_says_so(tmp_path: Path, digits: Classifier, few: ImageSet) -> None:
    about = {"status": "budget spent", "reason": "3,000 of 3,000 requests are sent", "finished": None}
    folder = make_audit(tmp_path / "run", digits, few, settings=DECIDE, only=3, about=about)
    with (folder / "ledger.jsonl").open("a") as ledger:
        ledger.write(json.dumps({"type": "sent", "name": "9 | estimation | 0", "attempt": 1, "pixels": "0"}) + "\n")
        ledger.write('{"type": "answ')
    page = page_of(folder)
    assert "The audit is not finished" in loud(page)
    how = "ended when its budget was spent (3,000 of 3,000 requests are sent)"
    assert f"{how}; 3 of {len(few)} images are done" in loud(page)
    assert "would flatter" in loud(page)
    assert "is cut off" in page.text("notice")
    assert "run its command again to resume" in page.text("none"), "no curve of the easy ones"
    assert dict(page.rows("failures")) == {"sent before a stop, no answer kept": "1"}
    assert len(page.ids) == 3


@pytest.mark.parametrize("left", [("ledger.jsonl",), ("run.jsonl",), ("audit.json", "ledger.jsonl")])
def test_the_remaining_files_of_an_audit_are_shown(copy: Path, left: tuple[str, ...]) -> None:
    for part in {"audit.json", "ledger.jsonl", "run.jsonl"} - set(left):
        (copy / part).unlink()
    page = page_of(copy)
    said = page.text("notice")
    assert ("No certificate can be shown" in said) == ("run.jsonl" not in left)
    assert ("cannot be counted" in said) == ("ledger.jsonl" not in left)
    assert ("audit.json is missing" in said) == ("audit.json" not in left)
    assert bool(page.ids) == ("run.jsonl" in left)
    assert ("there is no verdict" in page.text("headline")) == ("run.jsonl" not in left)


def test_an_audit_without_images_yet(copy: Path) -> None:
    for part in ("ledger.jsonl", "run.jsonl"):
        (copy / part).write_bytes((copy / part).read_bytes().split(b"\n")[0] + b"\n")
    rewrite(copy, status="running")
    page = page_of(copy)
    assert "was stopped or is still running" in loud(page)
    assert "No image is finished" in page.source
    assert page.ids == []


def test_a_damaged_ledger_is_reported_and_the_rest_is_shown(copy: Path) -> None:
    lines = (copy / "ledger.jsonl").read_bytes().split(b"\n")
    lines[5] = b"{"
    (copy / "ledger.jsonl").write_bytes(b"\n".join(lines))
    page = page_of(copy)
    assert "damaged at line 6" in page.text("notice")
    assert sorted(name for _, name in page.ids) == sorted(row["id"] for row in rewrite(copy)["images"])


def test_a_folder_without_an_audit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds none of audit\.json, ledger\.jsonl, run\.jsonl"):
        write_report(tmp_path)


def test_a_report_that_cannot_be_written_is_a_fault(copy: Path) -> None:
    (copy / "report.html").unlink(missing_ok=True)
    (copy / "report.html").mkdir()
    with pytest.raises(RunFault, match="the audit's records are untouched"):
        write_report(copy)


def test_large_pictures_are_reduced_and_surplus_ones_left_out(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0)
    for path in (copy / "pictures").iterdir():
        Image.fromarray(noise.integers(0, 256, (200, 300, 3), dtype=np.uint8)).save(path)
    (copy / "pictures" / "001-noisy.png").write_bytes(b"no picture")
    whole = page_of(copy)
    sizes = set()
    for uri in whole.images.values():
        with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as shown:
            sizes.add(shown.size)
    assert sizes == {(160, 107)}
    assert len(whole.images) == 3 * len(whole.ids) - 1
    monkeypatch.setattr(report, "THUMBNAIL_BYTES", 5 * sum(map(len, whole.images.values())) // (2 * len(whole.ids)))
    monkeypatch.setattr(report, "MAX_ROWS", len(whole.ids) - 2)
    page = page_of(copy)
    seen = {name.rsplit(", ", 1)[0] for name in page.images}
    assert len(seen) == 2 < len(page.ids) == len(whole.ids) - 2
    assert sum(map(len, page.images.values())) <= report.THUMBNAIL_BYTES
    assert "the thumbnails of 1 image are left out" in page.source
    assert "2 images are left out of this table" in page.source


def test_picture_names_cannot_leave_their_folder(copy: Path) -> None:
    Image.new("L", (8, 8)).save(copy / "secret-clean.png")
    entries = [entry | {"pictures": "../secret"} for entry in rewrite(copy)["images"]]
    rewrite(copy, images=entries)
    assert page_of(copy).images == {}


def test_the_command(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("report", str(copy))
    assert capsys.readouterr().out == f"wrote {copy / 'report.html'}\n"
    assert (copy / "report.html").is_file()
    command("report", str(tmp_path / "nowhere"), code=2)
    assert "expected the folder of `certify audit --out`" in capsys.readouterr().err


LOW_CONTRAST = """
(() => {
  const parts = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const line = v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 };
  const light = c => { const [r, g, b] = parts(c).map(line); return .2126 * r + .7152 * g + .0722 * b };
  const clear = c => parts(c).length == 4 && parts(c)[3] == 0;
  const back = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!clear(c)) return c } return 'rgb(255, 255, 255)' };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const style = getComputedStyle(e), a = light(e.closest('svg') ? style.fill : style.color), b = light(back(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) low.push(e.outerHTML.slice(0, 80) + ' ' + ratio);
  }
  return low;
})()
"""
"""Elements whose text has less contrast than WCAG 2 asks for: 4.5 to 1."""

STICKS_OUT = """
[...document.querySelectorAll('body *')]
  .filter(e => getComputedStyle(e.closest('thead') || e).position !== 'absolute')  // hidden, but for screen readers
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))
"""


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_renders_in_a_browser(audited: Path) -> None:
    """Wide, narrow, dark, printed: nothing is loaded, nothing complains, nothing sticks out, all text can be read."""
    path = write_report(audited)
    with browser() as page:
        looks = {}
        for name, width, dark in (("wide", 1200, False), ("dark", 1200, True), ("phone", 375, False)):
            page.view(width, 800, dark=dark)
            page.open(path.as_uri())
            assert page.requests == [path.as_uri()]
            assert page.complaints == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(STICKS_OUT) == []
            assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert page.evaluate(LOW_CONTRAST) == []
            with Image.open(io.BytesIO(page.screenshot())) as shot:
                assert shot.size == (width, 800)
                looks[name] = np.asarray(shot.convert("L"), dtype=float)
        assert looks["wide"].mean() > 200
        assert looks["dark"].mean() < 70
        assert all(look.std() > 10 for look in looks.values()), "something is drawn"
        page.view(700, 900, dark=True, media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate(STICKS_OUT) == []
        printed = page.pdf()
    assert printed.startswith(b"%PDF-")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 20
