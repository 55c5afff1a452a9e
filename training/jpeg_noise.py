"""Noisy training: a classifier fine-tuned on images coded as JPEG, for a member of the JPEG ensemble.

The idea is that of Zhang and Gao (2021, arXiv 2106.13394): compression as augmentation, one classifier a level. Shares,
rates and levels are ours. The result is a classifier of its own, no longer a frozen one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from certify.errors import UserError
from denoisers.jpeg import Codec, jpeg
from denoisers.quantisation import QUALITIES, read_tables
from training.data import TrainingData
from training.held_out import viewed_scores
from training.losses import Draw, Objective, Prepared, classification

MIXED = "mixed"


def codecs(
    level: int | str = 75, tables: str | None = None, table: str | None = None, subsampling: int = 444
) -> tuple[Codec, ...]:
    """The codecs that images are shown through: one, or for ``mixed`` one a level.

    Args:
        level: nominal quality, or ``mixed``.
        tables: a file of ``python -m training.coefficients``; None: the standard's.
        table: see :func:`denoisers.jpeg.jpeg`.
        subsampling: 444 or 420.

    Raises:
        UserError: no such level, table or file.
    """
    if type(level) is not int and level != MIXED:
        raise UserError(f"--set level={level}: expected a nominal quality such as 75, or {MIXED}")
    levels: Sequence[int] = [int(level)] if level != MIXED else QUALITIES
    if tables is not None:
        if not isinstance(tables, str):
            raise UserError(f"--set tables={tables}: expected a file of `python -m training.coefficients`")
        there = read_tables(tables).tables
        if (table or "nn") not in there:
            raise UserError(f"--set table={table}: {tables} has {', '.join(there)}; expected one of these")
        levels = list(there[table or "nn"]) if level == MIXED else levels
    return tuple(jpeg(one, subsampling, table, tables) for one in levels)


def objective(
    level: int | str = 75,
    tables: str | None = None,
    table: str | None = None,
    subsampling: int = 444,
    share: float = 0.8,
) -> Objective:
    """Cross-entropy of the network itself on images coded at a level.

    Args:
        level: nominal quality, or ``mixed``: one of them for each image.
        tables: a file of tables.
        table: its kind.
        subsampling: 444 or 420.
        share: of the images that are coded; the others stay clean.
    """
    if not 0 < share <= 1:
        raise UserError(f"--set share={share}: expected a share of the images above 0, at most 1")
    chosen = codecs(level, tables, table, subsampling)
    return Objective(
        classification,
        classifier=False,
        labels=True,
        noise=False,
        prepare=functools.partial(coded, codecs=chosen, share=share),
        for_classifiers=True,
        for_denoisers=False,
        codecs=chosen,
    )


def coded(draw: Draw, codecs: tuple[Codec, ...], share: float) -> Prepared:
    """The images, each coded with probability ``share``, by one of the codecs; augmented before, as they are shown."""
    count = len(draw.clean)
    which = torch.randint(len(codecs), (count,), generator=draw.generator)
    which[torch.rand(count, generator=draw.generator) >= share] = -1
    shown = draw.clean.clone()
    for i, codec in enumerate(codecs):
        mine = (which == i).nonzero().flatten().to(shown.device)
        if len(mine):
            shown[mine] = codec.to(shown.device)(draw.clean[mine])
    return Prepared((shown, draw.sigma), draw.clean)


def coded_scores(net: nn.Module, data: TrainingData, codecs: Sequence[Codec]) -> dict[str, float]:
    """``score`` and ``accuracy@qLEVEL`` of a classifier on coded held-out images, and ``accuracy@clean``."""
    views = {f"q{codec.quality}": lambda clean, block, codec=codec: codec.to(clean.device)(clean) for codec in codecs}
    clean = viewed_scores(net, data, {"clean": lambda clean, block: clean})
    return {**clean, **viewed_scores(net, data, views)}
