"""``certify audit --defences``: attacks by queries on the service, out of the same budget, into a comparison file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.cli.attack_options import build, check_names, distance_options, listed, one_size
from certify.cli.console import progress_bar
from certify.errors import UserError

if TYPE_CHECKING:
    from certify.blackbox.plan import Audit
    from certify.blackbox.remote_classifier import RemoteClassifier
    from certify.blackbox.types import Answer, Client
    from certify.images.dataset import ImageSet

COMPARISON = "comparison.jsonl"

attack_options = options.together(
    click.option("--defences", help="Also attack the service behind these: NAME:KEY=VALUE:..., `none` among them."),
    click.option("--attacks", default="hopskipjump", help="With --defences: hopskipjump (labels), square (scores)."),
    distance_options,
    click.option(
        "--queries", type=options.Count("queries"), default=200, help="Queries of an attack for an image, at most."
    ),
)


def check_attacks(o: dict[str, Any]) -> None:
    """Refuse what cannot work before anything is asked."""
    if o["defences"] is None:
        without = "without --defences: there is nothing to attack; add --defences none"
        options.refuse_given(("attacks", "eps", "norm", "queries"), without)
        return
    from analysis.attacks import check_attacks as check
    from analysis.attacks import find_attack

    check_names(listed("--defences", o["defences"]))
    names = listed("--attacks", o["attacks"])
    check(names, norm=o["norm"])
    blocked = [name for name in names if not find_attack(name, o["norm"]).asks]
    if blocked:
        raise UserError(f"--attacks {blocked[0]}: it needs gradients or surrogates; a service can only be asked")


def most_queries(o: dict[str, Any], images: int) -> int:
    """What attacks ask at most, if every defence passes an image once."""
    if o["defences"] is None:
        return 0
    defences, attacks = len(listed("--defences", o["defences"])), len(listed("--attacks", o["attacks"]))
    each = attacks * ((1 + defences) * o["queries"] + 2 * defences) + 2 * defences
    return int(images * each)


def attack(
    o: dict[str, Any], job: Audit, asking: Client, answers: Mapping[str, Answer], quiet: bool, command: str
) -> Path:
    """Attack whatever was not attacked yet; the comparison file.

    Raises:
        LedgerBudgetSpent: the budget does not cover it; outcomes that are finished are in the file.
        UserError: nothing to attack, or images of several sizes.
    """
    from analysis.comparison.runner import check_defences, compare, make_header
    from certify.runs.run_file import RunFile
    from denoisers.defences import undefended

    classifier, images = _target(job, asking, answers)
    service: Any = classifier  # a classifier to those who only ask
    defences = {text: build(text, service, trust_code=o["trust_code"]) for text in listed("--defences", o["defences"])}
    plan = _plan(o)
    check_defences(defences, images, plan)
    header = make_header(plan, defences, images, model=classifier.name, data=o["data"], command=command)
    craft = _crafter(o, service, {id(defence): text for text, defence in defences.items()})
    path = job.folder / COMPARISON
    with (
        RunFile(path, header, trust_identity=o["trust_identity"]) as file,
        progress_bar(header["expected"], "outcomes", hidden=quiet) as bar,
    ):
        compare(defences, undefended(service), images, plan, file, craft, bar.update)
    return path


def _target(job: Audit, asking: Client, answers: Mapping[str, Answer]) -> tuple[RemoteClassifier, ImageSet]:
    """The service with the classes that its own answers name, and the images whose reference label is one of them."""
    from certify.blackbox.answer_rows import clean_answer
    from certify.blackbox.label_index import Vocabulary
    from certify.blackbox.remote_classifier import RemoteClassifier

    vocabulary = Vocabulary(job.class_map)
    kept, labels, scored = [], [], True
    sizes: set[tuple[int, ...]] = set()
    for index, item in enumerate(job.images.items):
        clean = clean_answer(answers, item.id)
        if clean is None or not clean.ranked:
            continue
        own = vocabulary.vote(clean.ranked)
        if job.class_map is None:
            for one in clean.ranked:
                vocabulary.number(one.label)
        label = own if job.given is None else vocabulary.number(job.given[item.id])
        scored = scored and all(one.score is not None for one in clean.ranked)
        if label >= 0:
            kept.append(item)
            labels.append(label)
            sizes.add(tuple(job.load(index).shape))
    size = one_size("--defences: the images with an answer", sizes)
    classifier = RemoteClassifier(
        asking, vocabulary.names, size, job.service.describe, class_map=job.class_map, scored=scored
    )
    own_input = dataclasses.replace(job.images.input, size=classifier.input.size)
    return classifier, dataclasses.replace(job.images, items=kept, labels=labels, input=own_input)


def _plan(o: dict[str, Any]) -> Any:
    from analysis.comparison.results import Condition
    from analysis.comparison.runner import CLEAN, RANDOM, Plan

    attacks = listed("--attacks", o["attacks"])
    conditions = [CLEAN, RANDOM, *(Condition(name, group) for group in ("blind", "adaptive") for name in attacks)]
    eps, text = o["eps"]
    settings = {"eps_text": text, "queries": o["queries"], "steps": 0, "eot": 1, "surrogates": []}
    return Plan(conditions, eps, o["norm"], 5, o["seed"], 0, o["alpha"], settings)


def _crafter(o: dict[str, Any], classifier: Any, names: Mapping[int, str]) -> Any:
    """Attacks image by image, so that their queries bear the image's name; ``names`` are the defences' by identity."""
    import torch

    from analysis.attacks import crafter
    from analysis.comparison.runner import Proposed

    craft = crafter(classifier, eps=o["eps"][0], norm=o["norm"], queries=o["queries"], steps=1, eot=1, seed=o["seed"])

    def one_by_one(condition: Any, target: Any, images: Any, labels: Any, ids: Any) -> Proposed:
        found = []
        for i, name in enumerate(ids):
            classifier.begin(name, f"attack {condition.name} {names.get(id(target), 'none')}")
            try:
                found.append(craft(condition, target, images[i : i + 1], labels[i : i + 1], [name]))
            finally:
                classifier.end()
        moved = torch.cat([one.images for one in found])
        return Proposed(moved, [n for one in found for n in one.queries], [n for one in found for n in one.notes])

    return one_by_one
