"""JPEG at several levels, a classifier behind each, and a majority vote: after Zhang and Gao (2021), our design.

"Countering Adversarial Examples: Combining Input Transformation and Noisy Training" (ICCV Workshops 2021, arXiv
2106.13394) changes the quantisation table to one that suits networks, fine-tunes the classifier on images of each
compression level, and lets the classifiers vote. Tables (``denoisers/quantisation.py``), levels and training
(``training/jpeg_noise.py``) are ours.
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
from certify.models.pipeline import state_digest
from denoisers.jpeg import Codec, from_record
from denoisers.quantisation import TableSet, find_tables
from denoisers.weights import stored_card

_WANTED = "expected a file of `certify train --train-classifier M --objective jpeg-noise`"


def _codec(found: TableSet, table: str, level: int, subsampling: int) -> Codec:
    steps = found.steps(table, level)
    return Codec(steps.luma, steps.chroma, subsampling, table=table, quality=level, tables=found.sha256)


def frozen_codec(
    classifier: Classifier, level: int = 75, table: str = "nn", tables: str | None = None, subsampling: int = 444
) -> Defence:
    """Coding at one level before the classifier as it is: a purifier only.

    Args:
        classifier: frozen.
        level: nominal quality.
        table: ``nn``, ``std`` or ``flat``.
        tables: a file of them; None takes the shipped ones for images of this size.
        subsampling: 444 or 420.
    """
    found = find_tables(tables, classifier.input.size, "jpeg-nn")
    return Defence("jpeg-nn", [Member(_codec(found, table, level, subsampling), classifier)])


def ensemble(
    classifier: Classifier,
    folder: str | None = None,
    tables: str | None = None,
    levels: Any = None,
    table: str = "nn",
    combine: str = "vote",
) -> Defence:
    """One member a level: coded at it, and classified by the network that was fine-tuned on such images.

    Args:
        classifier: the frozen original: members have its architecture; without a folder it is behind every level.
        folder: of the fine-tuned members: ``*.safetensors`` in it, ``classifier.safetensors`` one folder below. Each
            says on its card how the images were coded that it was trained on; so are those it gets.
        tables: without a folder, the file of tables; None takes the shipped ones for images of this size.
        levels: nominal qualities, such as ``90+75+60``, or with commas, at which the command would split a list of
            defences; all there are by default.
        table: without a folder, ``nn``, ``std`` or ``flat``.
        combine: how the members' answers become one; one of ``certify.models.defence.COMBINE``.

    Raises:
        UserError: no members, two of one level, or files of something else.
    """
    if folder is not None:
        if tables is not None or table != "nn":
            raise UserError("jpeg-ensemble: folder= brings its own tables; leave tables= and table= out")
        members = trained_members(folder, classifier)
    else:
        found = find_tables(tables, classifier.input.size, "jpeg-ensemble")
        codecs = [_codec(found, table, level, 444) for level in found.tables.get(table, ())]
        members = {codec.quality or 0: Member(codec, classifier) for codec in codecs}
    chosen = sorted(members, reverse=True) if levels is None else _numbers(levels)
    missing = [level for level in chosen if level not in members]
    if missing or not chosen:
        has = ", ".join(map(str, sorted(members, reverse=True))) or f"none for table={table}"
        raise UserError(f"jpeg-ensemble: levels={levels}: there are {has}")
    about = {"levels": chosen, "folder": folder}
    return Defence("jpeg-ensemble", [members[k] for k in chosen], combine=combine, frozen=folder is None, about=about)


def trained_members(folder: str | Path, original: Classifier) -> dict[int, Member]:
    """Nominal quality -> codec and fine-tuned classifier, of the files in a folder.

    Raises:
        UserError: no such file, weights of another architecture, two members of one level.
    """
    files = [p for pattern in ("*.safetensors", "*/classifier.safetensors") for p in sorted(Path(folder).glob(pattern))]
    if not files:
        raise UserError(f"{folder} holds no members (*.safetensors, */classifier.safetensors); {_WANTED}")
    found: dict[int, Member] = {}
    for file in files:
        card = _card(file)
        tuned = _tuned(original, file, card["sha256"])
        for record in card["codecs"]:
            codec = from_record(record)
            if codec.quality in found or codec.quality is None:
                raise UserError(f"{file}: another member of {folder} is of level {codec.quality}; expected one a level")
            found[codec.quality] = Member(codec, tuned)
    return found


def _card(file: Path) -> dict[str, Any]:
    """What noisy training wrote about a member."""
    try:
        card = json.loads(stored_card(file) or "{}")
        if not card["codecs"] or not card["sha256"]:
            raise KeyError("codecs")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no member of a JPEG ensemble ({first_line(error)}); {_WANTED}") from None
    found: dict[str, Any] = card
    return found


def _tuned(original: Classifier, file: Path, sha256: str) -> Classifier:
    """The original with the weights of a file."""
    if not original.native:
        raise UserError(f"jpeg-ensemble: {original.name} is no torch network; members need its architecture")
    net: nn.Module = copy.deepcopy(original.net)
    loaded = load_weights(net, file, original.name)
    if state_digest(net) != sha256:
        raise UserError(f"the card of {file} does not match its tensors (another SHA-256): do not use it; get it again")
    spec = ClassifierSpec(
        net, original.input, original.class_names, original.num_classes, loaded, closed=original.closed
    )
    return Classifier(original.name, spec)


def _numbers(levels: Any) -> list[int]:
    try:
        if isinstance(levels, str):
            levels = levels.replace("+", ",").split(",")
        return [int(part) for part in (levels if isinstance(levels, list) else [levels])]
    except (TypeError, ValueError):
        raise UserError(f"jpeg-ensemble: levels={levels!r}; expected nominal qualities such as 90+75+60") from None
