"""An audit before anything is asked: what is audited, what it will cost, and the folder that it starts with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify.blackbox.query_votes import CLEAN, DRIFT, PROBE, TOGETHER
from certify.blackbox.results import RUN, RUNNING, write_about, write_rows
from certify.engine.contract import check_contract
from certify.engine.noisy_classifier import image_digest
from certify.errors import ImageError
from certify.images.dataset import ImageSet
from certify.models.pipeline import Pipeline
from certify.runs.config import Settings
from certify.runs.config import make_header as run_header
from certify.runs.identity import refuse_other_run
from certify.runs.records import SCHEMA, Reference, RunHeader
from certify.runs.run_file import peek_header
from certify.smoothing.procedures import samples
from certify.types import Noise

DRIFT_IMAGES = 20
"""Clean images that are asked about once more at the end, at most; that much of the budget is kept for it."""

CHUNK = 16
"""Images whose clean answers are asked for together."""

OWN, GIVEN = "service", "given"
"""Where reference labels come from: the service's own clean answers, or the data."""


class Service:
    """What stands at the end of the pipeline, for the record: a function that is reached by queries alone.

    Args:
        endpoint: its address, without credentials.
        protocol: name of the format.
        options: of the format that shape votes.
        encoding: of the pictures.
        size: (C, H, W) that images are brought to, or None: as they are.
    """

    num_classes = 0  # nobody says

    def __init__(
        self,
        endpoint: str,
        protocol: str,
        options: Mapping[str, Any],
        encoding: str,
        size: tuple[int, int, int] | None = None,
    ) -> None:
        self.endpoint, self.protocol, self.options = endpoint, protocol, dict(options)
        self.encoding, self.size = encoding, size
        self.probe_size = size

    def __call__(self, images: Tensor) -> Tensor:
        """Refused: queries go through the ledger."""
        raise RuntimeError("a service is asked by queries, which a ledger records")

    def describe(self) -> dict[str, Any]:
        """Everything that is known of the function."""
        return {
            "step": "service",
            "name": self.endpoint,
            "protocol": self.protocol,
            "options": self.options,
            "picture": {"range": "clipped to [0, 1]", "bits": 8, "encoding": self.encoding},
            "input": list(self.size) if self.size else None,
        }


@dataclass(frozen=True)
class Audit:
    """What is to be done, before anything is asked.

    Attributes:
        folder: where it is left.
        service: what is audited.
        images: as they are sent without noise.
        settings: numbers of the run.
        noise: the smoothing distribution.
        denoiser: ``forward(noisy, sigma)``, on ``device``, or None.
        given: the reference label of each image by id; None: the service's own answers.
        class_map: from its labels to classes, or None.
        repeat_clean: how often one clean image is asked about again at the start.
        budget: requests, retries included.
        concurrency: queries at a time.
        about: what else ``audit.json`` says: manners, prices, the command. Nothing secret.
        device: where noise is drawn and denoised.
        trust_identity: resume although the folder cannot prove that the denoiser is still the same.
    """

    folder: Path
    service: Service
    images: ImageSet
    settings: Settings
    noise: Noise
    budget: int
    denoiser: nn.Module | None = None
    given: Mapping[str, str] | None = None
    class_map: Mapping[str, str] | None = None
    repeat_clean: int = 3
    concurrency: int = 1
    about: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    trust_identity: bool = False

    @property
    def pipeline(self) -> Pipeline:
        """Denoiser and service."""
        return Pipeline(self.service, self.denoiser, self.noise.scale).to(self.device)

    def check_denoiser(self) -> None:
        """Check the denoiser on noisy copies of the first usable image, here and without a query.

        Raises:
            ContractError: it is not a fixed function of one image.
        """
        if self.denoiser is None:
            return
        for index in range(len(self.images)):
            with contextlib.suppress(ImageError):
                check_contract(None, self.pipeline.denoiser, self.noise, self.load(index))
                return

    def load(self, index: int) -> Tensor:
        """The image as it is certified, on the device.

        Raises:
            ImageError: it cannot be used.
        """
        return self.noise.input(self.images.load(index)).to(self.device)


def make_header(audit: Audit, *, data: str, denoiser: str = "none", command: str = "") -> RunHeader:
    """Return the run file's header: everything that shapes the certificates."""
    header = run_header(
        audit.settings,
        audit.noise,
        audit.noise.norm,
        audit.images,
        audit.pipeline,
        audit.device,
        model=audit.service.endpoint,
        data=data,
        denoiser=denoiser,
        precision="float32",
        compiled=False,
        folded=False,
        batch_size=TOGETHER,
        command=command,
    )
    return header.replace(
        in_order=True,  # the images of an unfinished run are the first ones, not the easy ones
        reference=Reference(labels=OWN if audit.given is None else GIVEN, sha256=_digest(audit.given)),
        class_map=audit.class_map and dict(audit.class_map),
    )


def _digest(given: Mapping[str, str] | None) -> str | None:
    return None if given is None else hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


def plan(audit: Audit, *, price: float | None = None, rate: float | None = None, attacks: int = 0) -> dict[str, Any]:
    """What an audit costs at most, and what can come out of it.

    Args:
        audit: what is to be done.
        price: of 1,000 requests, or None.
        rate: requests a second that are allowed, or None.
        attacks: queries of attacks, at most, which come last.

    Returns:
        ``images``; ``queries`` by stage and ``most`` of them; ``budget`` and ``covers``, the images that it finishes
        if each takes all its samples, and ``least``, the budget that finishes one; ``radius_cap``;
        ``price_per_1000``, ``cost`` without retries and ``cost_most`` if they take up the budget; ``rate``,
        ``concurrency`` and ``seconds`` at that rate, without retries; ``earliest``: samples that settle an image at
        the least.
    """
    procedure, count = audit.settings.procedure, len(audit.images)
    each, prospects = samples(procedure), procedure.prospects(audit.noise)
    beside = audit.repeat_clean + min(count, DRIFT_IMAGES)
    clean = tuple(min(count, -(-k // CHUNK) * CHUNK) for k in range(1, count + 1))  # a chunk's come before its noise
    queries = {CLEAN: count, PROBE: audit.repeat_clean, **{k: count * n for k, n in procedure.stages.items()}}
    queries[DRIFT] = min(count, DRIFT_IMAGES)
    queries |= {"attacks": attacks} if attacks else {}
    most = sum(queries.values())
    spent = min(most, audit.budget)
    return {
        "images": count,
        "queries": queries,
        "most": most,
        "budget": audit.budget,
        "covers": sum(beside + first + k * each <= audit.budget for k, first in enumerate(clean, 1)),
        "least": beside + clean[0] + each if clean else 0,
        "radius_cap": prospects.largest,
        "earliest": prospects.earliest,
        "price_per_1000": price,
        "cost": None if price is None else spent * price / 1000,
        "cost_most": None if price is None else audit.budget * price / 1000,
        "rate": rate,
        "concurrency": audit.concurrency,
        "seconds": None if rate is None else spent / rate,
    }


def header_there(audit: Audit, header: RunHeader) -> RunHeader | None:
    """The run file's header in the folder, which must mean the same; None where there is none yet.

    Raises:
        UserError: the folder holds an audit with other settings.
    """
    known = peek_header(audit.folder / RUN)
    if known is None:
        return None
    refuse_other_run(audit.folder / RUN, known, header, trust_identity=audit.trust_identity)
    assert isinstance(known, RunHeader)  # another kind of file differs
    return known


def prepare(audit: Audit, header: RunHeader, planned: Mapping[str, Any]) -> tuple[RunHeader, dict[str, Any]]:
    """Make the folder and write what is known beforehand into it, or go on with what is there.

    Returns:
        The run file's header, and what ``audit.json`` says.

    Raises:
        UserError: the folder holds an audit with other settings.
        ContractError: the denoiser is not a fixed function of one image; nothing is written.
        RunFault: it cannot be written.
    """
    known = header_there(audit, header)
    audit.check_denoiser()
    if known is not None:
        pipeline = known.pipeline if known.has("pipeline") else header.pipeline
        header = header.replace(created=known.created, pipeline=pipeline)
    images: list[dict[str, Any]] = []
    for index, item in enumerate(audit.images.items):
        entry: dict[str, Any] = {"id": item.id, "pictures": f"{index:03d}", "values": None, "image": None, "error": ""}
        try:
            image = audit.load(index)
            entry |= {"values": image.numel(), "image": image_digest(image), "size": list(image.shape)}
        except ImageError as error:
            entry["error"] = str(error)
        images.append(entry | {"given": audit.given[item.id] if audit.given is not None else None})
    sizes = {tuple(entry["size"]) for entry in images if not entry["error"]}
    about = {
        "type": "audit",
        "schema": SCHEMA,
        "created": header.created,
        "finished": None,
        "status": RUNNING,
        "reason": "",
        "command": header.command,
        "endpoint": audit.service.endpoint,
        "protocol": audit.service.protocol,
        "format": audit.service.options,
        "encoding": audit.service.encoding,
        "size": list(sizes.pop()) if len(sizes) == 1 else None,
        "denoiser": header.denoiser,
        "pipeline": header.pipeline,
        "labels": OWN if audit.given is None else GIVEN,
        "class_map": header.class_map,
        "vocabulary": [],
        "plan": dict(planned),
        "images": images,
        "fixed_function": None,
        "determinism": [],
        "drift": [],
        "versions": header.versions,
        "replay": f"certify replay {shlex.quote(str(audit.folder))}",
        **audit.about,
    }
    if known is None:
        write_rows(audit.folder, header, [])
    write_about(audit.folder, about)
    return header, about
