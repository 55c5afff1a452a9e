"""JPEG at several qualities, a classifier behind each, and a majority vote: our design, after Zhang and Gao (2021).

"Countering Adversarial Examples: Combining Input Transformation and Noisy Training" (ICCV Workshops 2021, arXiv
2106.13394) adapts the quantisation table to networks, fine-tunes the classifier on images of each compression level,
and lets the classifiers vote. Tables (:mod:`denoisers.quantisation`), levels and training
(:mod:`training.classifier`) are ours.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from torch import nn

from certify.errors import UserError, first_line
from certify.models.checkpoints import load_weights
from certify.models.classifier import Classifier, ClassifierSpec
from certify.models.defence import Defence, Member
from certify.models.identity import state_digest
from denoisers.jpeg import from_record, from_tables
from denoisers.quantisation import find_tables
from denoisers.weights import stored_card

_EXPECTED = "expected a file of `certify train --train-classifier M --objective jpeg-noise`"


def frozen_codec(
    classifier: Classifier, level: int = 75, table: str = "nn", tables: str | None = None, subsampling: int = 444
) -> Defence:
    """Build a purifier that codes images at one quality before the frozen classifier.

    Args:
        classifier: frozen.
        level: nominal quality.
        table: ``nn``, ``std`` or ``flat``.
        tables: a file of tables; None: those shipped for images of this size.
        subsampling: 444 or 420.
    """
    table_set = find_tables(tables, classifier.input.size, "jpeg-nn")
    return Defence("jpeg-nn", [Member(from_tables(table_set, table, level, subsampling), classifier)])


def ensemble(
    classifier: Classifier,
    folder: str | None = None,
    tables: str | None = None,
    levels: Any = None,
    table: str = "nn",
    combine: str = "vote",
) -> Defence:
    """Build an ensemble with one member per quality: a codec, and the network that was fine-tuned on its images.

    Args:
        classifier: the frozen original: members have its architecture; without a folder it is behind every codec.
        folder: of fine-tuned members: ``*.safetensors`` in it, or ``classifier.safetensors`` one folder below. The card
            of each names the codec it was trained with.
        tables: without a folder, a file of tables; None: those shipped for images of this size.
        levels: nominal qualities, such as ``90+75+60``; commas work too, except within the command's list of defences;
            None: all there are.
        table: without a folder, ``nn``, ``std`` or ``flat``.
        combine: how the members' outputs are combined, one of ``certify.models.defence.COMBINE``.

    Raises:
        UserError: no members, two of the same quality, or files of another kind.
    """
    if folder is not None:
        if tables is not None or table != "nn":
            raise UserError("jpeg-ensemble: folder= brings its own tables; leave tables= and table= out")
        members = trained_members(folder, classifier)
    else:
        table_set = find_tables(tables, classifier.input.size, "jpeg-ensemble")
        members = {level: Member(from_tables(table_set, table, level), classifier) for level in table_set.levels(table)}
    available = sorted(members, reverse=True)
    chosen = available if levels is None else _parse_levels(levels)
    if not chosen or not set(chosen) <= members.keys():
        raise UserError(f"jpeg-ensemble: levels={levels}; there are {', '.join(map(str, available))}")
    about = {"levels": chosen, "folder": folder}
    return Defence("jpeg-ensemble", [members[k] for k in chosen], combine=combine, frozen=folder is None, about=about)


def trained_members(folder: str | Path, original: Classifier) -> dict[int, Member]:
    """Load the fine-tuned members in a folder, by nominal quality.

    Raises:
        UserError: no such files, weights of another architecture, or two members of the same quality.
    """
    files = [p for pattern in ("*.safetensors", "*/classifier.safetensors") for p in sorted(Path(folder).glob(pattern))]
    if not files:
        raise UserError(f"{folder} holds no members (*.safetensors, */classifier.safetensors); {_EXPECTED}")
    members: dict[int, Member] = {}
    for file in files:
        card = _read_card(file)
        classifier = _with_weights(original, file, card["sha256"])
        for record in card["codecs"]:
            codec = from_record(record)
            if codec.quality in members or codec.quality is None:
                raise UserError(f"{file}: {folder} has another member of level {codec.quality}; expected one per level")
            members[codec.quality] = Member(codec, classifier)
    return members


def _read_card(file: Path) -> dict[str, Any]:
    try:
        card: dict[str, Any] = json.loads(stored_card(file) or "{}")
        if not card["codecs"] or not card["sha256"]:
            raise KeyError("codecs")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no member of a JPEG ensemble ({first_line(error)}); {_EXPECTED}") from None
    return card


def _with_weights(original: Classifier, file: Path, sha256: str) -> Classifier:
    """Copy a classifier with the weights of a file."""
    if not original.native:
        raise UserError(f"jpeg-ensemble: {original.name} is no PyTorch network; members need its architecture")
    net: nn.Module = copy.deepcopy(original.net)
    loaded = load_weights(net, file, original.name)
    if state_digest(net) != sha256:
        raise UserError(f"the card of {file} does not match its tensors (another SHA-256): do not use it; get it again")
    spec = ClassifierSpec(
        net, original.input, original.class_names, original.num_classes, loaded, closed=original.closed
    )
    return Classifier(original.name, spec)


def _parse_levels(levels: Any) -> list[int]:
    try:
        if isinstance(levels, str):
            levels = levels.replace("+", ",").split(",")
        return [int(part) for part in (levels if isinstance(levels, list) else [levels])]
    except (TypeError, ValueError):
        raise UserError(f"jpeg-ensemble: levels={levels!r}; expected nominal qualities such as 90+75+60") from None
