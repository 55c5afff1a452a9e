"""A run over several processes or machines: ``--cluster``, ``--shard`` and ``certify merge``."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.cli.console import warn
from certify.cli.load import load_smoothed
from certify.cli.summary import summarise
from certify.errors import UserError
from certify.runs.shards import Shard, merge_files

if TYPE_CHECKING:
    from certify.cluster.connect import Address
    from certify.cluster.driver import Crew
    from certify.cluster.worker_engine import SmoothedStation
    from certify.smoothed_classifier import SmoothedClassifier

spread_options = options.together(
    click.option(
        "--cluster",
        metavar="WHERE",
        help="Run on the workers of a Ray cluster: local[:K] (K on this machine), auto, or ray://HOST:PORT.",
    ),
    click.option(
        "--shard", metavar="I/N", help="Only part I of N of the images, into a file of its own; then `certify merge`."
    ),
)


@dataclass(frozen=True)
class Spread:
    """Where a run goes.

    Attributes:
        shard: the part of it that this command does; None: all.
        address: of the cluster; None: this process.
    """

    shard: Shard | None
    address: Address | None

    def places(self, images: int) -> Sequence[int]:
        """The images that this command owes."""
        return range(images) if self.shard is None else self.shard.places(images)

    def words(self) -> list[str]:
        """For the name of the run file."""
        return [] if self.shard is None else [f"shard{self.shard.index}of{self.shard.of}"]


def spread_from(o: dict[str, Any]) -> Spread:
    """What the options say, refused before anything is loaded where it cannot work."""
    shard = None if o["shard"] is None else Shard.parse(o["shard"])
    if o["cluster"] is None:
        return Spread(shard, None)
    from certify.cluster.connect import Address, require_ray

    address = Address.parse(o["cluster"])
    if o["device"] not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {o['device']} with --cluster: Ray gives out devices; expected auto, cpu or cuda")
    require_ray(address)
    return Spread(shard, address)


@contextlib.contextmanager
def crew_for(o: dict[str, Any], spread: Spread, smoothed: SmoothedClassifier, images: int) -> Iterator[Crew | None]:
    """The workers of the cluster, no more than images; None without a cluster."""
    if spread.address is None:
        yield None
        return
    import torch

    from certify.cluster.connect import connected
    from certify.cluster.driver import Crew
    from certify.cluster.worker import Order

    with connected(
        spread.address, device=o["device"], gpus=torch.cuda.device_count(), threads=torch.get_num_threads(), most=images
    ) as slots:
        probe_size = smoothed.classifier.probe_size  # type: ignore[attr-defined]
        there = {**o, "device": "cuda" if slots[0].gpus else "cpu", "probe_size": probe_size}
        order = Order(functools.partial(station, there), os.getcwd())
        with contextlib.closing(Crew(slots, order, smoothed.base.record(), warn)) as crew:
            yield crew


def station(o: dict[str, Any]) -> SmoothedStation:
    """What a worker builds: the smoothed classifier that the options name."""
    from certify.cluster.worker_engine import SmoothedStation

    return SmoothedStation(functools.partial(load_smoothed, o))


@click.command(short_help="Merge the shards of a run into its file.")
@click.argument("shards", nargs=-1, required=True, metavar="SHARD...")
@click.option("-o", "--out", required=True, metavar="RUN", help="Run file to write (.jsonl).")
@click.option("--radii", type=options.Numbers(), help="Radii of the table (default: round numbers).")
@options.as_json("the table")
def merge(shards: tuple[str, ...], out: str, radii: list[float] | None, as_json: bool) -> None:
    """Merge the files of all shards of a run (`--shard i/n`) into the file of the whole run, images in their order.

    Shards that overlap, are missing, unfinished or another run's are refused by name. The shards stay.
    """
    options.check_radii(radii)
    run = merge_files(shards, out, command=options.command_line(), warn=warn)
    summarise(run, radii, as_json=as_json)
