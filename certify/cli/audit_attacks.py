"""``certify audit --defences``: query attacks on the service, within the same budget, into a comparison file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from certify.cli.attack_context import settings_from, split_defences, split_names
from certify.cli.console import warn
from certify.cli.option_groups import AttackOptions
from certify.cli.options import option, overridden, refuse_given
from certify.errors import UserError
from certify.runs.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from analysis.attacks import AttackSettings
    from analysis.comparison.results import Condition
    from analysis.comparison.runner import Craft, Proposed
    from certify.blackbox.plan import Attack, Audit
    from certify.blackbox.remote_classifier import RemoteClassifier
    from certify.blackbox.types import Answer, Client
    from certify.images.dataset import ImageSet
    from certify.models.defence import Defence

COMPARISON = "comparison.jsonl"
_REPEATS = 5  # answers of a random defence per image


class AuditAttackOptions(AttackOptions):
    """Attacks on the service by queries."""

    defences: str | None = option(
        help="Also attack the service behind these defences: NAME:KEY=VALUE:..., separated by commas; none is the "
        "service alone."
    )
    attacks: str = overridden(
        AttackOptions,
        "attacks",
        default="hopskipjump",
        help="Attacks for --defences: hopskipjump (labels), square (scores).",
    )
    queries: int = overridden(AttackOptions, "queries", default=200)


def check_attacks(options: AuditAttackOptions) -> None:
    """Refuse attacks that cannot work on a service, before any query.

    Raises:
        UserError: an unknown name, an attack that needs more than queries, or options without --defences.
    """
    if options.defences is None:
        without = "without --defences: there is nothing to attack; add --defences none"
        refuse_given(("attacks", "eps", "norm", "queries"), without)
        return
    from analysis.attacks import check_attacks as check
    from analysis.attacks import find_attack

    split_defences(options.defences)
    names = split_names("--attacks", options.attacks)
    check(names, norm=options.norm)
    blocked = [name for name in names if not find_attack(name, options.norm).by_queries]
    if blocked:
        raise UserError(
            f"--attacks {blocked[0]}: it needs gradients or surrogates; expected an attack that needs queries alone "
            "(hopskipjump, square)"
        )


def attack_service(options: AuditAttackOptions, images: int, *, trust_code: bool, shown: bool | float) -> Attack:
    """Return the attack on the images that were not attacked yet.

    Args:
        options: attacks and defences.
        images: their number, by which queries are planned: every defence passes each once.
        trust_code: run code in model files.
        shown: how progress is shown, as for :func:`certify.runs.progress.progress_bar`.
    """
    from certify.blackbox.plan import Attack

    names, attacks = split_names("--defences", options.defences or ""), split_names("--attacks", options.attacks)
    queries = images * (len(attacks) * ((1 + len(names)) * options.queries + 2 * len(names)) + 2 * len(names))

    def run(job: Audit, client: Client, answers: Mapping[str, Answer]) -> None:
        from analysis.comparison.plan import AttackContext, Plan, build_defence, make_header
        from analysis.comparison.runner import compare
        from certify.runs.run_file import ComparisonFile

        classifier, images = _target(job, client, answers)
        service: Any = classifier  # a classifier to attacks that need queries alone
        settings = settings_from(options, attacks, seed=job.settings.seed)
        defences = {name: build_defence(name, name, service, trust_code=trust_code, warn=warn) for name in names}
        craft = _crafter(settings, service, {id(defence): name for name, defence in defences.items()})
        context = AttackContext(service, images, defences, settings, craft)
        context.check_defences()
        plan = Plan.of(context, "both", repeats=_REPEATS, certify_n=0, alpha=job.settings.procedure.alpha)
        header = make_header(plan, context, model=classifier.name, data=job.data, command=job.command)
        with (
            ComparisonFile(job.folder / COMPARISON, header, trust_identity=job.trust_identity) as file,
            progress_bar(header.expected, "outcomes", shown=shown) as bar,
        ):
            compare(context, plan, file, bar.update)

    return Attack(queries, run)


def _target(job: Audit, client: Client, answers: Mapping[str, Answer]) -> tuple[RemoteClassifier, ImageSet]:
    """Return the service as a classifier of the classes it has returned, and the images labelled with one of them."""
    from analysis.comparison.plan import one_size
    from certify.blackbox.answers import LabelIndex, clean_answer
    from certify.blackbox.remote_classifier import RemoteClassifier

    vocabulary = LabelIndex(job.class_map)
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
        client, vocabulary.names, size, job.service.describe, class_map=job.class_map, scored=scored
    )
    own_input = dataclasses.replace(job.images.input, size=classifier.input.size)
    return classifier, dataclasses.replace(job.images, items=kept, labels=labels, input=own_input)


def _crafter(settings: AttackSettings, classifier: Any, names: Mapping[int, str]) -> Craft:
    """Attack image by image, so that queries carry the image's id; ``names`` are those of the defences, by identity."""
    import torch

    from analysis.attacks import crafter
    from analysis.comparison.runner import Proposed

    craft = crafter(classifier, settings)

    def one_by_one(
        condition: Condition, target: Defence, images: Tensor, labels: Tensor, ids: Sequence[str]
    ) -> Proposed:
        proposed = []
        for i, name in enumerate(ids):
            classifier.begin(name, f"attack {condition.name} {names.get(id(target), 'none')}")
            try:
                proposed.append(craft(condition, target, images[i : i + 1], labels[i : i + 1], [name]))
            finally:
                classifier.end()
        moved = torch.cat([one.images for one in proposed])
        return Proposed(moved, [n for one in proposed for n in one.queries], [n for one in proposed for n in one.notes])

    return one_by_one
