"""Audits by queries alone: their votes equal a local run's, and no answer that was paid for is lost."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_audit import WORDS

from certify import SmoothedClassifier, load_images
from certify.blackbox.answers import OUTSIDE, LabelIndex, read_class_map, stage_of
from certify.blackbox.audit import prepare
from certify.blackbox.audit_loop import MAX_DOWN, send_queries
from certify.blackbox.client.rate_limit import QueryLimits
from certify.blackbox.determinism import probe_warnings
from certify.blackbox.encoding import AsSent, to_tensor
from certify.blackbox.plan import Audit, plan
from certify.blackbox.record import FINISHED, SPENT, AuditRecord, Probed
from certify.blackbox.results import conclude, replay
from certify.blackbox.service_spec import ServiceSpec
from certify.blackbox.types import Answer, Picture, Query, Scored
from certify.cli.console import warn
from certify.errors import BudgetSpent, CertifyWarning, RunFault, UserError
from certify.images.dataset import ImageSet
from certify.models.classifier import Classifier, InputSpec
from certify.runs.config import Settings, run_header
from certify.runs.run_file import RunFile, read_run
from certify.runs.runner import process
from certify.smoothing.noise import make_noise
from certify.smoothing.procedures import Certify, Decide, Measure
from certify.types import FAILED

COUNT = 5
FIXED = Settings(Certify(n0=10, n=40, alpha=0.01), seed=3)
DECIDING = Settings(Decide((0.1, 0.25), n=150, alpha=0.01), seed=3)
MEASURING = Settings(Measure(0.3, n=300, alpha=0.01), seed=3)

Respond = Callable[[str, torch.Tensor], Answer | None]


class Fake:
    """A ledger and a service in this process: the digits classifier, which answers words.

    Args:
        respond: another answer for this query, or None for the classifier's.
    """

    def __init__(self, digits: Classifier, respond: Respond = lambda name, image: None) -> None:
        self.digits, self.respond = digits, respond
        self.answers: dict[str, Answer] = {}
        self.pictures: dict[str, Picture] = {}
        self.sent: list[str] = []
        self.stop_after = 10**9

    @property
    def spent(self) -> int:
        return len(self.sent)

    def open(self, budget: int) -> Fake:
        self.budget = budget
        return self

    def __call__(self, queries: Iterable[Query]) -> Iterator[Answer]:
        for query in queries:
            known = self.answers.get(query.name)
            if known is not None:
                assert self.pictures[query.name].sha256 == query.picture.sha256  # the same noise, bit for bit
                yield Answer(known.name, known.ranked, known.failure, known.seconds, known.attempts, known=True)
                continue
            if self.spent >= self.budget:
                raise BudgetSpent(self.spent, self.budget, 1)
            if self.spent >= self.stop_after:
                raise KeyboardInterrupt
            self.sent.append(query.name)
            self.pictures[query.name] = query.picture
            image = to_tensor(query.picture)
            answer = self.respond(query.name, image) or ranked(query.name, self.digits, image)
            self.answers[query.name] = answer
            yield answer


def ranked(name: str, digits: Classifier, image: torch.Tensor) -> Answer:
    scores = digits.logits(image[None]).softmax(1)[0]
    order = scores.argsort(descending=True).tolist()
    return Answer(name, tuple(Scored(WORDS[c], float(scores[c])) for c in order), seconds=0.01)


def failed(name: str, why: str = "HTTP 500") -> Answer:
    return Answer(name, (), why, 0.01, down=why.startswith("HTTP"))


class AnySize:
    """Whoever audits sees images as they are."""

    class_names, num_classes, input = None, 0, InputSpec(None)


def some_images(count: int = COUNT, skip: int = 7) -> ImageSet:
    return load_images("digits", AnySize(), labels="none", skip=skip, max_images=count)


def set_up(folder: Path, settings: Settings = FIXED, *, images: ImageSet | None = None, **more: Any) -> Audit:
    service = ServiceSpec("http://127.0.0.1:9/predict", "json", {"labels": "label"})
    more = {"budget": 100_000, "limits": QueryLimits(more.pop("concurrency", 1)), **more}
    return Audit(folder, service, images or some_images(), settings, make_noise("gaussian", 0.25), **more)


def run_audit(audit: Audit, fake: Fake) -> AuditRecord:
    header, about = prepare(audit, plan(audit))
    status, reason = "stopped", ""
    try:
        status = send_queries(audit, about, fake.open)
    except RunFault as error:
        reason = str(error)
        raise
    finally:
        about = conclude(audit.folder, header, about, fake.answers, status=status, reason=reason)
    return about


def lines(folder: Path, *without: str) -> list[dict[str, Any]]:
    rows = read_run(folder / "run.jsonl", allow_partial=True).images
    return [{k: v for k, v in row.items() if k not in without} for row in rows]


def local_run(
    path: Path, digits: Classifier, settings: Settings, denoiser: torch.nn.Module | None = None
) -> list[dict[str, Any]]:
    """The same images, noise and numbers through the classifier itself, in this package's own engine."""
    smoothed = SmoothedClassifier(AsSent(digits), 0.25, denoiser=denoiser)
    images = load_images("digits", digits, labels="none", skip=7, max_images=COUNT)
    header = run_header(smoothed, images, settings, model="digits", data="digits")
    with RunFile(path, header) as file:
        process(smoothed, images, settings, file)
    return sorted(read_run(path).images, key=lambda row: int(row["id"]))


@pytest.mark.parametrize("denoised", [False, True])
@pytest.mark.parametrize("settings", [FIXED, DECIDING, MEASURING], ids=["fixed", "deciding", "measuring"])
def test_votes_and_certificates_are_those_of_a_local_run(
    tmp_path: Path, digits: Classifier, settings: Settings, denoised: bool
) -> None:
    from denoisers import load_denoiser

    denoiser = load_denoiser("median") if denoised else None
    fake = Fake(digits)
    about = run_audit(set_up(tmp_path / "run", settings, denoiser=denoiser, concurrency=5), fake)
    words = about["vocabulary"]

    def digit(c: int) -> int:
        return WORDS.index(words[c]) if c >= 0 else c

    here = lines(tmp_path / "run")
    there = local_run(tmp_path / "local.jsonl", digits, settings, denoiser)
    assert [row["id"] for row in here] == [row["id"] for row in there]
    for mine, local in zip(here, there, strict=True):
        for key in ("votes", "selection"):
            assert {str(digit(int(c))): n for c, n in mine[key].items()} == local[key]
        assert (digit(mine["prediction"]), mine["radius"]) == (local["prediction"], local["radius"])
        assert (mine["p_lower"], mine["trials"], mine["failures"]) == (local["p_lower"], local["trials"], 0)
        assert mine["image"] == local["image"]
        if not denoised:  # a local run labels the clean image behind the denoiser too, a service is asked without it
            assert digit(mine["base"]) == local["base"]
        for a, b in zip(mine.get("decisions", ()), local.get("decisions", ()), strict=True):
            leader, *counts = a["look"]
            assert (a["outcome"], [digit(leader), *counts]) == (b["outcome"], b["look"])
    assert any(row["radius"] > 0 for row in here)
    assert about["status"] == FINISHED
    pictures = {path.name for path in (tmp_path / "run" / "pictures").iterdir()}
    assert {"000-clean.png", "000-noisy.png", "004-noisy.png"} <= pictures
    assert ("000-denoised.png" in pictures) == denoised


def test_failures_are_failed_trials(tmp_path: Path, digits: Classifier) -> None:
    """Every fifth noisy query fails: trials for nobody, and the same votes otherwise."""

    def respond(name: str, image: torch.Tensor) -> Answer | None:
        stage, number = name.split(" | ")[1:]
        return failed(name) if stage == "estimation" and int(number) % 5 == 0 else None

    run_audit(set_up(tmp_path / "a"), fake := Fake(digits, respond))
    run_audit(set_up(tmp_path / "b"), whole := Fake(digits))
    assert fake.sent == whole.sent
    for mine, theirs in zip(lines(tmp_path / "a"), lines(tmp_path / "b"), strict=True):
        assert (mine["failures"], mine["trials"], sum(mine["votes"].values())) == (8, 40, 32)
        assert mine["outside"] == 0
        assert mine["selection"] == theirs["selection"]
        assert all(count <= theirs["votes"].get(c, 0) for c, count in mine["votes"].items())
        assert mine["radius"] < theirs["radius"] or theirs["radius"] == 0


@pytest.mark.parametrize("settings", [FIXED, DECIDING], ids=["fixed", "deciding"])
def test_open_vocabulary(tmp_path: Path, digits: Classifier, settings: Settings) -> None:
    """Labels that appear late are classes like any other: the first ones do not move, and nothing is lost."""

    def respond(name: str, image: torch.Tensor) -> Answer | None:
        one, stage, number = name.split(" | ")
        strange = stage == "estimation" and int(number) % 3 == 2
        return Answer(name, (Scored(f"thing {one} {number}", 1.0),)) if strange else None

    about = run_audit(set_up(tmp_path, settings), fake := Fake(digits, respond))
    rows = lines(tmp_path)
    first = fake.answers[f"{rows[0]['id']} | clean | 0"].ranked[0].label
    assert (rows[0]["label"], about["vocabulary"][0]) == (0, first)
    for row in rows:
        things = {c: n for c, n in row["votes"].items() if row["classes"][c].startswith("thing")}
        assert set(things.values()) == {1}
        assert sum(things.values()) == len([k for k in range(row["trials"]) if k % 3 == 2])
        assert row["classes"][str(row["base"])] in WORDS
        assert all(about["vocabulary"][int(c)] == name for c, name in row["classes"].items())
        assert row["radius"] < 0.25  # a third of the votes went elsewhere


def test_class_map(tmp_path: Path, digits: Classifier) -> None:
    """Even or odd, and nothing at all for eights and nines: those answers are nobody's, and counted apart."""
    mapping = {word: ("even", "odd")[i % 2] for i, word in enumerate(WORDS[:8])}

    def respond(name: str, image: torch.Tensor) -> Answer | None:
        if name.endswith("estimation | 4"):
            return failed(name)
        best = ranked(name, digits, image).ranked[0]
        return Answer(name, (Scored("a picture", 1.0), best))  # the map does not know what comes first

    audit = set_up(tmp_path, images=some_images(20), class_map=mapping)
    about = run_audit(audit, fake := Fake(digits, respond))
    assert about["vocabulary"] == ["even", "odd"]
    rows = {row["id"]: row for row in lines(tmp_path)}
    unmapped = 0
    for name, row in rows.items():
        labels = [fake.answers[f"{name} | estimation | {k}"].ranked[-1:] for k in range(40) if "error" not in row]
        truth = [mapping.get(found[0].label) for found in labels if found]
        if "error" in row:
            assert fake.answers[f"{name} | clean | 0"].ranked[1].label in ("eight", "nine")
            assert f"{name} | estimation | 0" not in fake.answers  # there is nothing to certify it for
            continue
        assert row["votes"] == {str(i): truth.count(c) for i, c in enumerate(("even", "odd")) if truth.count(c)}
        assert (row["outside"], row["failures"]) == (truth.count(None), truth.count(None) + 1)
        unmapped += row["outside"]
    assert unmapped > 0
    assert 0 < sum("error" in row for row in rows.values()) < len(rows)


def test_class_map_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Tabby cat,cat\nimage,thing\n")
    (tmp_path / "a.json").write_text(json.dumps({"Tabby cat": "cat", "7": 7}))
    assert read_class_map(tmp_path / "a.csv") == {"Tabby cat": "cat", "image": "thing"}
    assert read_class_map(tmp_path / "a.json") == {"Tabby cat": "cat", "7": "7"}
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(UserError, match="expected an object"):
        read_class_map(tmp_path / "b.json")


def test_label_index() -> None:
    free, mapped = LabelIndex(), LabelIndex({"tabby": "cat", "pug": "dog", "lynx": "cat"})
    assert [free.vote((Scored(w),)) for w in ("b", "a", "b")] == [0, 1, 0]
    assert free.names == ["b", "a"]
    assert mapped.names == ["cat", "dog"]
    assert mapped.vote((Scored("animal"), Scored("lynx"), Scored("pug"))) == 0
    assert mapped.vote((Scored("animal"),)) == OUTSIDE
    assert mapped.vote(()) == free.vote(()) == FAILED


def test_given_labels(tmp_path: Path, digits: Classifier) -> None:
    images = some_images()
    given = {item.id: WORDS[int(str(item.name))] for item in images.items}
    given[images.items[2].id] = "a label that never comes back"
    about = run_audit(set_up(tmp_path, images=images, given=given), Fake(digits))
    for row, item in zip(lines(tmp_path), images.items, strict=True):
        assert about["vocabulary"][row["label"]] == given[item.id]
    assert lines(tmp_path)[2]["prediction"] != lines(tmp_path)[2]["label"]
    assert [image["reference"] for image in about["images"]] == list(given.values())


@pytest.mark.parametrize("settings", [FIXED, DECIDING, MEASURING], ids=["fixed", "deciding", "measuring"])
def test_a_spent_budget_keeps_finished_images_and_a_larger_one_resumes(
    tmp_path: Path, digits: Classifier, settings: Settings
) -> None:
    run_audit(set_up(tmp_path / "whole", settings), whole := Fake(digits))
    fake = Fake(digits)
    budget = len(whole.sent) // 2
    about = run_audit(set_up(tmp_path / "half", settings, budget=budget), fake)
    assert fake.spent == budget
    assert about["status"] == SPENT
    assert len(about["drift"]) == COUNT  # for which a part of the budget was kept
    full = {row["id"]: row for row in lines(tmp_path / "whole")}
    some = lines(tmp_path / "half")
    assert fake.sent[: budget - COUNT] == whole.sent[: budget - COUNT]
    owed = {name.split(" | ")[0] for name in whole.sent[budget - COUNT :] if stage_of(name) == "estimation"}
    finished = [name for name in full if name not in owed]
    done = [row["id"] for row in some if not row.get("unfinished")]
    assert done == finished == list(full)[: len(finished)]
    assert 1 < len(done) < len(full)
    covered = about["plan"]["covers"]  # what the plan promised: exact where every image takes all its samples
    assert covered <= len(done) if settings.procedure.sequential else covered == len(done)
    assert (
        len(some) - len(finished) == settings.procedure.sequential
    )  # one image was begun; the budget went into no other
    for row in some:
        if not row.get("unfinished"):
            assert row == full[row["id"]]
        else:
            assert settings.procedure.sequential
            assert row["trials"] < full[row["id"]]["trials"]
            whole_votes = full[row["id"]]["votes"]
            assert all(count <= whole_votes[c] for c, count in row["votes"].items())
            assert settings is MEASURING or "undecided" in {d["outcome"] for d in row["decisions"]}
    run_audit(set_up(tmp_path / "half", settings), fake)
    assert lines(tmp_path / "half") == lines(tmp_path / "whole")
    assert len(fake.sent) == len(set(fake.sent))
    noisy = {name for name in fake.sent if "drift" not in name}
    assert noisy == {name for name in whole.sent if "drift" not in name}


def test_an_empty_budget_sends_nothing(tmp_path: Path, digits: Classifier) -> None:
    fake = Fake(digits)
    about = run_audit(set_up(tmp_path, budget=0), fake)
    assert (fake.sent, about["status"], lines(tmp_path), about["determinism"]) == ([], SPENT, [], [])


@pytest.mark.parametrize("settings", [FIXED, DECIDING], ids=["fixed", "deciding"])
def test_an_interrupted_audit_gives_the_same_results(tmp_path: Path, digits: Classifier, settings: Settings) -> None:
    images = some_images(4, skip=31)
    run_audit(set_up(tmp_path / "whole", settings, images=images, concurrency=3), whole := Fake(digits))
    for stop in (1, 5, 9, len(whole.sent) // 2, len(whole.sent) - 2):
        folder = tmp_path / f"stopped{stop}"
        fake = Fake(digits)
        fake.stop_after = stop
        with pytest.raises(KeyboardInterrupt):
            run_audit(set_up(folder, settings, images=images, concurrency=3), fake)
        assert json.loads((folder / "audit.json").read_text())["status"] == "stopped"
        fake.stop_after = 10**9
        run_audit(set_up(folder, settings, images=images, concurrency=3), fake)
        assert lines(folder) == lines(tmp_path / "whole")
        assert sorted(fake.sent) == sorted(whole.sent)  # none lost, none repeated


@pytest.mark.parametrize("settings", [FIXED, DECIDING, MEASURING], ids=["fixed", "deciding", "measuring"])
def test_replay_reproduces_the_run_and_runs_at_another_alpha(
    tmp_path: Path, digits: Classifier, settings: Settings
) -> None:
    import dataclasses

    fake, other = Fake(digits), Fake(digits)
    run_audit(set_up(tmp_path / "a", settings), fake)
    found = replay(tmp_path / "a", answers=fake.answers)
    assert found.differing == ()
    assert found.run.images == lines(tmp_path / "a")
    run_audit(
        set_up(
            tmp_path / "b", dataclasses.replace(settings, procedure=dataclasses.replace(settings.procedure, alpha=0.1))
        ),
        other,
    )
    again = replay(tmp_path / "a", alpha=0.1, answers=fake.answers)
    assert again.run.images == lines(tmp_path / "b")
    assert lines(tmp_path / "a") != lines(tmp_path / "b")
    assert again.run.header["recomputed"]["from"]["alpha"] == 0.01
    if settings is FIXED:
        best = replay(tmp_path / "a", bound="best", answers=fake.answers).run.images
        assert sum(row["radius"] for row in best) != sum(row["radius"] for row in found.run.images)
    else:
        with pytest.raises(UserError, match="looking at its votes"):
            replay(tmp_path / "a", bound="clopper-pearson", answers=fake.answers)


def test_the_record_does_not_depend_on_the_order_in_which_answers_arrive(tmp_path: Path, digits: Classifier) -> None:
    fake, found = Fake(digits), []
    audit = set_up(tmp_path)
    record = run_audit(audit, fake)
    header, _ = prepare(audit, plan(audit))
    for names in (sorted(fake.answers), sorted(fake.answers, reverse=True)):
        answers = {name: fake.answers[name] for name in names}
        found.append(conclude(tmp_path, header, record, answers, status=FINISHED).replace(finished=None))
    assert len(found[0].drift) == COUNT
    assert found[0] == found[1]


def test_replay_names_the_certificates_that_differ(tmp_path: Path, digits: Classifier) -> None:
    fake = Fake(digits)
    run_audit(set_up(tmp_path), fake)
    name = lines(tmp_path)[3]["id"]
    for k in range(5):
        fake.answers[f"{name} | estimation | {k}"] = failed("")
    assert replay(tmp_path, answers=fake.answers).differing == (name,)
    del fake.answers[f"{name} | estimation | 7"]
    assert replay(tmp_path, answers=fake.answers).differing == (name,)


def test_replay_accepts_the_rounding_and_the_shorter_hashes_of_older_versions(
    tmp_path: Path, digits: Classifier
) -> None:
    fake = Fake(digits)
    run_audit(set_up(tmp_path), fake)
    header, *rows = map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines())
    for change, same in ((1 + 2.2e-8, True), (1.001, False)):
        old = [{**row, "radius": row["radius"] * change, "image": row["image"][:16]} for row in rows]
        (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (header, *old)))
        certified = tuple(row["id"] for row in rows if row["radius"])
        assert replay(tmp_path, answers=fake.answers).differing == (() if same else certified)
    assert certified


def test_a_random_service_is_refused_before_any_noisy_copy(tmp_path: Path, digits: Classifier) -> None:
    """It adds noise of its own; the probe asks where that shows first, and stays silent about the plain one."""
    generator = torch.Generator().manual_seed(5)

    def respond(name: str, image: torch.Tensor) -> Answer | None:
        return ranked(name, digits, image + 0.3 * torch.randn(image.shape, generator=generator))

    images, wavering = some_images(16), Fake(digits, respond)
    with pytest.raises(
        UserError, match=r"^the service returned different labels for image \d+ when queried again \("
    ) as found:
        run_audit(set_up(tmp_path / "a", images=images, repeat_clean=5), wavering)
    assert "\n" not in str(found.value)
    assert {stage_of(name) for name in wavering.sent} == {"clean", "probe"}
    refused = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert (lines(tmp_path / "a"), refused["fixed_function"], refused["status"]) == ([], False, "stopped")
    plain = run_audit(set_up(tmp_path / "b", images=images, repeat_clean=5), Fake(digits))
    assert plain["fixed_function"] is True
    (probe,) = plain["determinism"]
    assert (len(probe["labels"]), probe["spread"], sum(probe["labels"].values())) == (1, 0.0, 6)


def test_labels_that_change_at_a_tie_are_a_warning(tmp_path: Path, digits: Classifier) -> None:
    """Two scores within a hundredth of each other are equal up to the rounding of 16 bits."""

    def respond(better: float) -> Respond:
        def answer(name: str, image: torch.Tensor) -> Answer | None:
            pair = [Scored("cat", 0.49), Scored("dog", better)]
            return Answer(name, tuple(sorted(pair, key=lambda one: -one.score)) if "probe" in name else tuple(pair))  # type: ignore[operator]

        return answer

    with pytest.warns(CertifyWarning, match="NON-DETERMINISTIC"):
        (probe,) = run_audit(set_up(tmp_path / "tie"), Fake(digits, respond(0.494)))["determinism"]
    assert (probe["labels"], probe["tie"]) == ({"dog": 3, "cat": 1}, True)
    with pytest.raises(UserError, match=r"\(dog 3 times, cat 1 times\)"):
        run_audit(set_up(tmp_path / "no tie"), Fake(digits, respond(0.5)))


def test_drift_is_detected(tmp_path: Path, digits: Classifier) -> None:
    def respond(name: str, image: torch.Tensor) -> Answer | None:
        return Answer(name, (Scored("new", 0.9),)) if "drift" in name and int(name[:4]) > 1310 else None

    about = run_audit(set_up(tmp_path), Fake(digits, respond))
    assert about["fixed_function"] is False
    changed = [entry["id"] for entry in about["drift"] if entry["before"] != entry["after"]]
    assert changed == [image["id"] for image in about["images"] if int(image["id"]) > 1310]
    assert changed
    assert len(about["drift"]) == len(about["images"]) == COUNT
    assert "new" not in about["vocabulary"]  # no certificate counts it


def test_a_service_that_is_down_stops_the_audit(tmp_path: Path, digits: Classifier) -> None:
    """At once if the first answer fails, after some queries if all do; a failed clean query is sent again later."""
    down = Fake(digits, lambda name, image: failed(name, "HTTP 401 Unauthorized"))
    with pytest.raises(RunFault, match="no label for the first image: HTTP 401 Unauthorized"):
        run_audit(set_up(tmp_path / "a"), down)
    assert len(down.sent) == 1
    down.respond = lambda name, image: None
    assert run_audit(set_up(tmp_path / "a"), down)["status"] == FINISHED
    assert len(lines(tmp_path / "a")) == COUNT
    broken = Fake(digits, lambda name, image: failed(name) if "estimation" in name else None)
    with pytest.raises(RunFault, match="10 queries in a row got no answer"):
        run_audit(set_up(tmp_path / "b"), broken)
    assert sum("estimation" in name for name in broken.sent) == MAX_DOWN
    broken.respond = lambda name, image: None
    assert run_audit(set_up(tmp_path / "b"), broken)["status"] == FINISHED
    assert lines(tmp_path / "b")[0]["failures"] == MAX_DOWN  # they stay failed trials


def test_a_service_without_labels_for_noise_is_not_down(tmp_path: Path, digits: Classifier) -> None:
    def respond(name: str, image: torch.Tensor) -> Answer | None:
        return failed(name, "an answer without labels") if "tion" in name else None

    assert run_audit(set_up(tmp_path / "a"), Fake(digits, respond))["status"] == FINISHED
    assert [(row["prediction"], row["failures"]) for row in lines(tmp_path / "a")] == [(-1, FIXED.procedure.n)] * COUNT
    nothing = Fake(digits, lambda name, image: failed(name, "an answer without labels"))
    with pytest.raises(RunFault, match="if only this image has no label, leave it out"):
        run_audit(set_up(tmp_path / "b"), nothing)


def test_labels_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    probe = Probed(id="a", labels={"cat\x1b]0;x\x07": 2, "dög\r": 1}, failures=0, spread=None, tie=False)
    for text in probe_warnings([probe]):
        warn(text)
    said = capsys.readouterr().err
    assert "cat\\x1b]0;x\\x07 2 times, dög\\r 1 times" in said
    assert said[:-1].isprintable()


def test_the_replay_command_can_be_pasted(tmp_path: Path, digits: Classifier) -> None:
    about = run_audit(set_up(tmp_path / "my audit"), Fake(digits))
    assert shlex.split(about["replay"]) == ["certify", "replay", str(tmp_path / "my audit")]


def test_the_probe_is_reported_before_any_noisy_copy(
    tmp_path: Path, digits: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def respond(name: str, image: torch.Tensor) -> Answer | None:
        return Answer(name, (Scored("cat", 0.9 if "probe" in name else 0.8),)) if "noise" not in name else None

    audit, fake, told = set_up(tmp_path), Fake(digits, respond), list[tuple[str, list[str]]]()
    _, about = prepare(audit, plan(audit))
    monkeypatch.setattr("certify.blackbox.audit_loop.warn", lambda text: told.append((text, list(fake.answers))))
    send_queries(audit, about, fake.open)
    ((text, known),) = told
    assert text == "the scores of one image vary by 0.1 between repeated queries; its label does not"
    assert [stage_of(name) for name in known] == ["clean"] * COUNT + ["probe"] * 3


def test_another_audit_is_refused(tmp_path: Path, digits: Classifier) -> None:
    import dataclasses

    run_audit(set_up(tmp_path), Fake(digits))
    with pytest.raises(UserError, match="other settings"):
        run_audit(set_up(tmp_path, dataclasses.replace(FIXED, seed=4)), Fake(digits))


def test_plan(tmp_path: Path, digits: Classifier) -> None:
    numbers: dict[str, Any] = {"images": some_images(8), "price_per_1000": 1.5}
    found = plan(set_up(tmp_path, Settings(Certify(n0=20, n=100)), budget=500, limits=QueryLimits(1, 10.0), **numbers))
    assert found.queries == {"clean": 8, "probe": 3, "selection": 160, "estimation": 800, "drift": 8}
    assert found.most == 979
    assert found.covers == (500 - 3 - 8 - 8) // 120
    assert found.radius_cap == pytest.approx(1.50 * 0.25, abs=0.002)
    assert (found.cost, found.cost_most, found.seconds) == (0.75, 0.75, 50.0)
    ample = plan(set_up(tmp_path, Settings(Certify(n0=20, n=100)), budget=2000, **numbers))
    assert (ample.cost, ample.cost_most, ample.covers) == (979 * 1.5 / 1000, 3.0, 8)
    for budget in (60, 96, 97, 150, 300, 500):  # the plan says what the budget really finishes
        some = set_up(tmp_path / str(budget), Settings(Certify(n0=2, n=8)), images=some_images(20), budget=budget)
        run_audit(some, Fake(digits))
        assert len(lines(some.folder)) == plan(some).covers
    deciding = plan(set_up(tmp_path, DECIDING, images=some_images(8)))
    assert deciding.queries["estimation"] == 8 * 150
    assert 16 < deciding.earliest < 60
