"""``certify audit --statement accuracy``: one query per image, failures count as wrong, random services are allowed."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import certify
from analysis.accuracy_bound import accuracy_bound
from certify import UserError
from certify.blackbox.answers import stage_of
from certify.blackbox.results import replay
from certify.errors import ContractError, RunFault
from certify.smoothing.dataset_accuracy import dataset_accuracy
from tests.command import rows_without_seconds, run

COUNT = 20
IMAGES = torch.stack([torch.full((1, 6, 6), 0.3 + 0.4 * i / (COUNT - 1)) for i in range(COUNT)])
LABELS = ["dark"] * (COUNT // 2) + ["bright"] * (COUNT // 2)
OPTIONS: dict[str, Any] = {"sigma": 0.5, "statement": "accuracy", "progress": False, "device": "cpu"}


class Bright:
    """``bright`` where the mean of the 8-bit image exceeds one half; fails at the given calls, numbered from 0."""

    def __init__(self, *failing: int) -> None:
        self.calls, self.failing = -1, failing

    def __call__(self, image: np.ndarray) -> str:
        self.calls += 1
        if self.calls in self.failing:
            raise TimeoutError("no answer")
        return "bright" if image.mean() > 127.5 else "dark"


def eight_bits(images: torch.Tensor) -> torch.Tensor:
    """The same function as a base classifier."""
    return ((images.clamp(0, 1) * 255).round().mean(dim=(1, 2, 3)) > 127.5).long()


def stages(folder: Path) -> Counter[str]:
    """The queries that the ledger says were sent, by stage."""
    rows = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    return Counter(stage_of(row["name"]) for row in rows if row["type"] == "sent")


@pytest.mark.parametrize("labels", [LABELS, None], ids=["given", "own"])
@pytest.mark.parametrize("draws", [1, 3])
def test_it_costs_one_query_per_draw_and_counts_the_votes_of_a_local_run(
    labels: list[str] | None, draws: int, tmp_path: Path
) -> None:
    """Without labels, one more for the clean image; and the votes are those of the function itself."""
    ask, folder = Bright(), tmp_path / "audit"
    audited = certify.audit(ask, IMAGES, labels, budget=200, out=folder, draws=draws, **OPTIONS)
    expected = {"estimation": COUNT * draws} | ({} if labels else {"clean": COUNT})
    assert stages(folder) == expected
    assert ask.calls + 1 == sum(expected.values())
    bound = audited.accuracy_bound()
    classifier = certify.load_classifier(eight_bits, input_size=(1, 6, 6), num_classes=2)
    truth = torch.tensor([label == "bright" for label in LABELS]).long() if labels else None
    local = certify.accuracy(classifier, IMAGES, truth, sigma=0.5, draws=draws, precision="float32", progress=False)
    assert bound.result == local.result
    assert bound.labelled == local.labelled == (labels is not None)
    assert [row.trials for row in audited] == [draws] * COUNT
    assert replay(folder).differing == ()
    again = replay(folder, alpha=0.05).run
    assert accuracy_bound(again).result == local.run.accuracy_bound(alpha=0.05).result


@pytest.mark.parametrize("labels", [LABELS, None], ids=["given", "own"])
def test_failed_calls_count_as_wrong(labels: list[str] | None, tmp_path: Path) -> None:
    """One noisy query fails, and without labels also one about a clean image, which leaves no reference label."""
    whole = certify.audit(Bright(), IMAGES, labels, budget=100, out=tmp_path / "whole", **OPTIONS)
    votes = [row.estimation_votes.of(row.label or 0) for row in whole]
    noisy, clean = (0, None) if labels else (COUNT, 5)  # the first chunk has 16 clean images, the second 4
    failing = [noisy] if labels else [16, 5]
    audited = certify.audit(Bright(*failing), IMAGES, labels, budget=100, out=tmp_path / "failed", **OPTIONS)
    lost = {0} if labels else {0, 5}
    bound = audited.accuracy_bound()
    assert bound.result == dataset_accuracy([0 if i in lost else vote for i, vote in enumerate(votes)])
    assert bound.missing == (clean is not None)
    assert audited[0].failures == 1


def test_a_spent_budget_counts_the_rest_as_wrong_and_a_larger_one_resumes(tmp_path: Path) -> None:
    whole = certify.audit(Bright(), IMAGES, LABELS, budget=COUNT, out=tmp_path / "whole", **OPTIONS)
    ask = Bright()
    some = certify.audit(ask, IMAGES, LABELS, budget=12, out=tmp_path / "some", **OPTIONS)
    bound = some.accuracy_bound()
    assert (len(some), bound.missing, bound.result.images) == (12, COUNT - 12, COUNT)
    assert "is not finished" in (tmp_path / "some" / "report.html").read_text()
    certify.audit(ask, IMAGES, LABELS, budget=COUNT, out=tmp_path / "some", **OPTIONS)
    assert ask.calls + 1 == COUNT
    assert rows_without_seconds(tmp_path / "some" / "run.jsonl") == [
        {k: v for k, v in row.items() if k != "seconds"} for row in whole
    ]


def test_a_random_service_is_bounded_although_it_has_no_certificates(tmp_path: Path) -> None:
    """It errs at every tenth call at random; the statement allows that, a certificate does not."""
    chance = random.Random(1)

    def erring(image: np.ndarray) -> str:
        right = "bright" if image.mean() > 127.5 else "dark"
        return {"bright": "dark", "dark": "bright"}[right] if chance.random() < 0.1 else right

    images = torch.full((200, 1, 6, 6), 0.9)
    bound = certify.audit(erring, images, ["bright"] * 200, budget=200, out=tmp_path / "a", **OPTIONS).accuracy_bound()
    assert 0.75 < bound.lower < 0.9  # the truth is 0.9
    assert bound.under_attack(0.4) < bound.lower
    certificates = {"sigma": 0.5, "n0": 5, "n": 20, "repeat_clean": 60, "progress": False}
    with pytest.raises(ContractError, match=r"different labels for image .* when queried again"):
        certify.audit(erring, images[:3], budget=500, out=tmp_path / "b", **certificates)  # type: ignore[arg-type]


def test_a_service_that_never_gives_a_label_stops_the_audit(tmp_path: Path) -> None:
    ask = Bright(*range(100))
    with pytest.raises(RunFault, match=r"none of the first 10 replies has a label|10 queries in a row"):
        certify.audit(ask, IMAGES, LABELS, budget=100, out=tmp_path / "a", **OPTIONS)
    assert ask.calls + 1 in (10, 11)  # one may be under way


def test_the_report_says_what_is_promised_and_what_not(tmp_path: Path) -> None:
    audited = certify.audit(Bright(3), IMAGES, LABELS, budget=100, out=tmp_path / "a", **OPTIONS)
    page = (tmp_path / "a" / "report.html").read_text()
    text = " ".join(re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL).split())
    bound = audited.accuracy_bound()
    assert "nothing is said about a single image, nor about the majority vote" in text
    assert "It is a mean: some images may always be answered wrongly" in text
    assert f"of at least {int(1000 * bound.lower) / 1000:.3f}, and" in text
    assert "expected accuracy at least" in text
    for absent in ("presupposes", "certified radius", "undecided", "Determinism"):
        assert absent not in text
    assert "counts as wrong" in text


def plan_of(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    line = "audit --endpoint http://127.0.0.1:9/x --protocol json --protocol-option labels=label --data digits --out a"
    run(*line.split(), "--sigma", "0.25", "--budget", "1000", "--dry-run", "--statement", "accuracy", *words)
    return capsys.readouterr().err


def test_the_plan_says_it_before_anything_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    own = plan_of("--max", "50", capsys=capsys)
    assert "100 queries (50 clean, 50 estimation)" in own
    assert "the mean accuracy over these images" in own
    assert "nothing about a single image" in own
    given = plan_of("--max", "50", "--reference", "given", "--population", capsys=capsys)
    assert "50 queries (50 estimation)" in given
    assert "over the population of these images" in given


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"statement": "accuracy", "n": 100}, "n is for certificates; leave it out with statement accuracy"),
        ({"statement": "accuracy", "radius": 0.1}, "radius is for certificates"),
        ({"draws": 2}, "draws is for statement accuracy"),
        ({"population": True}, "population is for statement accuracy"),
        ({"statement": "accurate"}, "expected certificates or accuracy"),
    ],
)
def test_arguments_of_the_other_statement_are_refused(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        certify.audit(Bright(), IMAGES, sigma=0.5, budget=100, out=tmp_path / "a", **options)
    assert expected in str(refused.value)
    assert not (tmp_path / "a").exists()
