"""``certify.audit`` on Python functions: the certificates of the function itself, within the budget, resumable."""

from __future__ import annotations

import ast
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import certify
from certify import SmoothedClassifier, UserError, load_classifier
from certify.blackbox.audit import Observer
from certify.blackbox.function_service import function_fingerprint
from certify.errors import CertifyWarning, ContractError, RunFault, python_spelling
from tests.command import run as command

LEVELS = (0.3, 0.45, 0.7)
IMAGES = torch.stack([torch.full((1, 6, 6), level) for level in LEVELS])


class Bright:
    """``bright`` where the mean of the 8-bit image exceeds one half; counts its calls."""

    def __init__(self, form: str = "label") -> None:
        self.calls, self.form = 0, form

    def __call__(self, image: np.ndarray) -> Any:
        self.calls += 1
        assert image.dtype == np.uint8
        assert image.shape == (6, 6, 1)
        return self.answer("bright" if image.mean() > 127.5 else "dark")

    def answer(self, label: str) -> Any:
        other = {"bright": "dark", "dark": "bright"}[label]
        return {"label": label, "list": [label, other], "scores": {other: 0.1, label: 0.9}, "number": np.int64(7)}[
            self.form
        ]


def eight_bits(images: torch.Tensor) -> torch.Tensor:
    """The same function as a base classifier: clipped, rounded, 0 for the first class in the order of the audit."""
    levels = (images.clamp(0, 1) * 255).round()
    return (levels.mean(dim=(1, 2, 3)) > 127.5).long()


OPTIONS: dict[str, Any] = {"sigma": 0.25, "budget": 1000, "n0": 10, "n": 100, "progress": False}


@pytest.mark.parametrize("form", ["label", "list", "scores"])
def test_votes_and_radii_are_those_of_the_function(form: str, tmp_path: Path) -> None:
    audit = certify.audit(Bright(form), IMAGES, out=tmp_path / "audit", **OPTIONS)
    classifier = load_classifier(eight_bits, input_size=(1, 6, 6), num_classes=2)
    g = SmoothedClassifier(classifier, sigma=0.25, precision="float32", compile="off")
    exact = g.certify(IMAGES, n0=10, n=100, image_id=["0", "1", "2"])  # type: ignore[arg-type]
    assert [row.radius for row in audit] == [c.radius for c in exact]
    assert [max(row.votes.values()) for row in audit] == [max(c.counts) for c in exact]
    assert [row.class_name for row in audit] == ["dark", "dark", "bright"]


def test_the_same_call_resumes_and_replays(tmp_path: Path) -> None:
    ask, folder = Bright(), tmp_path / "audit"
    short = certify.audit(ask, IMAGES, out=folder, **{**OPTIONS, "budget": 250})
    assert ask.calls == 250
    assert short.partial
    whole = certify.audit(ask, IMAGES, out=folder, **OPTIONS)
    assert not whole.partial
    done = ask.calls
    assert certify.audit(ask, IMAGES, out=folder, **OPTIONS).images == whole.images
    assert ask.calls == done + len(IMAGES)  # the clean images, to see that it is the same function
    assert json.loads((folder / "audit.json").read_text())["fixed_function"] is True
    assert (folder / "report.html").exists()
    command("replay", str(folder))
    with pytest.raises(UserError, match="sigma"):
        certify.audit(ask, IMAGES, out=folder, **{**OPTIONS, "sigma": 0.5})


@pytest.mark.slow
def test_decisions_and_reference_labels(tmp_path: Path) -> None:
    decided = certify.audit(
        Bright(),
        IMAGES,
        ["dark", "bright", "bright"],
        radius=0.2,
        out=tmp_path / "a",
        **{**OPTIONS, "n": None, "n0": None},
    )
    assert decided.header.kind == "decide"
    labels = [row.label == row.prediction for row in decided if not row.abstained]
    assert labels
    numbered = certify.audit(Bright("number"), IMAGES, torch.tensor([7, 7, 8]), out=tmp_path / "c", **OPTIONS)  # type: ignore[arg-type]
    assert [row.label == row.prediction for row in numbered if not row.abstained] == [True, True, False]
    with pytest.raises(UserError, match="unknown option 'max_image'"):
        certify.audit(Bright(), IMAGES, max_image=1, out=tmp_path / "d", **OPTIONS)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="2 labels for 3 images"):
        certify.audit(Bright(), IMAGES, ["dark", "bright"], out=tmp_path / "b", **OPTIONS)


def test_a_function_that_fails_or_gives_chance_is_named(tmp_path: Path) -> None:
    def broken(image: np.ndarray) -> str:
        raise ValueError("out of order")

    with pytest.raises(RunFault, match="ValueError: out of order"):
        certify.audit(broken, IMAGES, out=tmp_path / "broken", **OPTIONS)
    draws = np.random.default_rng(0)
    with pytest.raises(ContractError, match="returned different labels for image 0 when queried again"):
        certify.audit(lambda image: int(draws.integers(50)), IMAGES, out=tmp_path / "chance", **OPTIONS)


def test_a_function_that_changes_during_the_audit_is_named(tmp_path: Path) -> None:
    ask = Bright()

    def tired(image: np.ndarray) -> str:
        return "dark" if ask.calls > 300 else str(ask(image))

    with pytest.warns(CertifyWarning, match="at the end the service returned other labels"):
        certify.audit(tired, IMAGES, out=tmp_path / "drift", **OPTIONS)


def test_an_answer_of_another_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFault, match="the function returned NoneType; expected a label, a sequence"):
        certify.audit(lambda image: None, IMAGES[:1], out=tmp_path / "none", **OPTIONS)


def test_values_that_are_no_labels_are_named(tmp_path: Path) -> None:
    for labels, shown in ((["dark", None, "bright"], "None"), (torch.tensor([1.0, 2.0, 3.0]), r"1\.0")):
        with pytest.raises(UserError, match=f"the label of image [01] is {shown}; expected a name or a class number"):
            certify.audit(Bright(), IMAGES, labels, out=tmp_path / "labels", **OPTIONS)  # type: ignore[arg-type]
    answers: list[tuple[Any, str]] = [
        ({None: 0.9, "dark": 0.1}, "None as a label"),
        (["dark", None], "None as a label"),
        ({"dark": None}, "None as the score of 'dark'"),
        (0.5, "float"),
        (True, "bool"),
    ]
    for i, (answer, said) in enumerate(answers):
        with pytest.raises(RunFault, match=f"the function returned {said}; expected a label, a sequence"):
            certify.audit(lambda image, a=answer: a, IMAGES[:1], out=tmp_path / str(i), **OPTIONS)  # type: ignore[misc]


def test_options_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="api_key_env with a Python function"):
        certify.audit(Bright(), IMAGES, api_key_env="KEY", out=tmp_path / "x", **OPTIONS)
    with pytest.raises(UserError, match="unknown option 'concurency'; nearest: concurrency"):
        certify.audit(Bright(), IMAGES, concurency=2, out=tmp_path / "x", **OPTIONS)  # type: ignore[call-arg]
    url = "https://example.org/predict"
    for options, said in (({"label": "x"}, "unknown option 'label' of protocol json; its options: labels"), ({}, "")):
        with pytest.raises(UserError, match=said or "protocol json needs protocol_options labels=<JMESPath>"):
            certify.audit(url, IMAGES, protocol="json", protocol_options=options, out=tmp_path / "x", **OPTIONS)
    with pytest.raises(UserError, match="budget -1: expected a whole number from 0"):
        certify.audit(Bright(), IMAGES, out=tmp_path / "x", **{**OPTIONS, "budget": -1})
    with pytest.raises(UserError, match="ask is of type int; expected a function"):
        certify.audit(7, IMAGES, out=tmp_path / "x", **OPTIONS)
    assert not (tmp_path / "x").exists()


def test_messages_name_options_that_python_spells_its_own_way() -> None:
    """Each option in a message is a parameter of ``certify.audit``, as which it is shown outside of the command."""
    package = Path(certify.__file__).parent
    for path in (*(package / "blackbox").rglob("*.py"), package / "auditing.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise | ast.Return):
                assert " --" not in python_spelling(ast.unparse(node)), f"{path}:{node.lineno}"
    with pytest.raises(UserError, match="auth_header or auth_query without api_key_env"):
        certify.audit(
            "https://example.org",
            IMAGES,
            protocol="json",
            protocol_options={"labels": "x"},
            auth_header="X: {key}",
            out="x",
            **OPTIONS,
        )


def level(threshold: float, network: torch.nn.Module | None = None) -> Any:
    """Return a function whose name does not depend on what it computes."""

    def ask(image: np.ndarray) -> str:
        values = torch.from_numpy(image.astype(np.float32))
        return "bright" if (values if network is None else network(values)).mean() > threshold else "dark"

    return ask


def test_another_function_of_the_same_name_is_refused(tmp_path: Path) -> None:
    def scale(by: float) -> torch.nn.Module:
        network = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(network.weight, by)
        return network.requires_grad_(False)

    folder = tmp_path / "answers"
    first = certify.audit(level(127.5), IMAGES, out=folder, **OPTIONS)
    with pytest.raises(UserError, match="for image 0 it returns bright, the ledger holds dark; pass the earlier"):
        certify.audit(level(10), IMAGES, out=folder, **OPTIONS)
    assert json.loads((folder / "audit.json").read_text())["status"] == "finished"
    assert certify.audit(level(127.5), IMAGES, out=folder, **OPTIONS).images == first.images
    folder = tmp_path / "network"
    certify.audit(level(127.5, scale(1.0)), IMAGES, out=folder, **OPTIONS)
    with pytest.raises(UserError, match="the ledger of another function of the same name"):
        certify.audit(level(127.5, scale(1.01)), IMAGES, out=folder, **OPTIONS)
    certify.audit(level(127.5, scale(1.01)), IMAGES, out=folder, trust_identity=True, **OPTIONS)


def test_audits_without_a_comparable_fingerprint_are_resumed(tmp_path: Path) -> None:
    """Those of earlier versions, and of another version of Python: the answers to clean images decide."""
    certify.audit(Bright(), IMAGES, out=tmp_path, **OPTIONS)
    ledger = tmp_path / "ledger.jsonl"
    first, rest = ledger.read_text().split("\n", 1)
    header = json.loads(first)
    for function in (None, "python 2.7: 0123456789abcdef"):
        changed = {**header, "function": function} if function else {k: v for k, v in header.items() if k != "function"}
        ledger.write_text(f"{json.dumps(changed)}\n{rest}")
        ask = Bright()
        certify.audit(ask, IMAGES, out=tmp_path, **OPTIONS)
        assert ask.calls == len(IMAGES)
        with pytest.raises(UserError, match="this is not the function that the audit began with"):
            certify.audit(Bright("number"), IMAGES, out=tmp_path, **OPTIONS)


def test_fingerprints_of_functions() -> None:
    def code(body: str) -> Any:
        space: dict[str, Any] = {"__name__": "somewhere"}
        exec(body, space)
        return space["ask"]

    same = "def ask(image):\n    return helper(image) in {'a', 'b'}\ndef helper(image):\n    return 'a'\n"
    kept = function_fingerprint(code(same))
    assert kept == function_fingerprint(code("# a comment\n\n" + same))
    assert kept != function_fingerprint(code(same.replace("return 'a'", "return 'b'")))
    assert kept != function_fingerprint(code(same.replace("{'a', 'b'}", "{'a', 'c'}")))
    assert function_fingerprint(Bright("list")) == function_fingerprint(Bright("list"))
    assert function_fingerprint(functools.partial(level(3.0), 1)) != function_fingerprint(len)
    assert function_fingerprint(len) is None


def test_a_class_map_and_labels_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("0,dim\n1,dim\n2,light\n")
    options = {**OPTIONS, "class_map": {"dark": "dim", "bright": "light"}}
    run = certify.audit(Bright(), IMAGES, tmp_path / "labels.csv", out=tmp_path / "a", **options)
    assert [row.class_name for row in run] == ["dim", "dim", "light"]
    assert [row.label == row.prediction for row in run] == [True, True, True]
    with pytest.raises(UserError, match="the class map has no class 'dark', a label of the data"):
        certify.audit(Bright(), IMAGES, ["dark", "dark", "light"], out=tmp_path / "b", **options)


def test_an_observer_is_told_what_the_command_prints(tmp_path: Path) -> None:
    told: list[str] = []
    observer = Observer(
        planned=lambda audit, planned: told.append(f"{planned.most} queries, {planned.cost:.2f}"),
        opened=lambda ledger, spent, budget: told.append(f"{ledger.name}: {spent} of {budget}"),
        started=lambda images: told.append(f"{images} images"),
        advanced=lambda images: told.append(f"{images} finished"),
    )
    options = {**OPTIONS, "observer": observer, "price_per_1000": 2.0, "n": 10, "n0": 5, "alpha": 0.05}
    certify.audit(Bright(), IMAGES, out=tmp_path / "a", **options)
    assert told == ["54 queries, 0.11", "ledger.jsonl: 0 of 1000", "3 images", "3 finished"]
    with pytest.warns(CertifyWarning, match="a budget of 5 finishes no image: one takes 24 requests"):
        certify.audit(Bright(), IMAGES, out=tmp_path / "b", **{**options, "budget": 5})


def test_an_unknown_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown protocol"):
        certify.audit("https://example.org/predict", IMAGES, protocol="nothing", out=tmp_path / "x", **OPTIONS)
