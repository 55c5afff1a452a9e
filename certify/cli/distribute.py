"""A run over several processes or machines: ``--cluster``, ``--shard`` and ``certify merge``."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from certify.cli.console import warn
from certify.cli.load import load_smoothed
from certify.cli.option_groups import (
    ClusterOptions,
    ComputeOptions,
    JsonOptions,
    ModelOptions,
    NoiseOptions,
    RadiiOptions,
)
from certify.cli.options import Options, check_radii, command, command_line, option
from certify.cli.summary import summarise
from certify.errors import UserError

if TYPE_CHECKING:
    from certify.cluster.connect import Address
    from certify.cluster.driver import WorkerPool
    from certify.cluster.worker_engine import WorkerEngine
    from certify.runs.shards import Shard
    from certify.smoothed_classifier import SmoothedClassifier


@dataclass(frozen=True)
class Distribution:
    """Place where a run is computed: all or a part of it, in this process or on a cluster.

    Attributes:
        shard: the part of the run that this command processes; None: all of it.
        address: of the cluster; None: this process.
    """

    shard: Shard | None
    address: Address | None

    def places(self, images: int) -> Sequence[int]:
        """Return the indices of the images that this command processes."""
        return range(images) if self.shard is None else self.shard.places(images)

    def words(self) -> list[str]:
        """Return words for the name of the run file."""
        return [] if self.shard is None else [f"shard{self.shard.index}of{self.shard.of}"]


def distribution_from(compute: ClusterOptions) -> Distribution:
    """Parse --shard and --cluster, and refuse what cannot work before anything is loaded."""
    from certify.runs.shards import Shard

    shard = None if compute.shard is None else Shard.parse(compute.shard)
    if compute.cluster is None:
        return Distribution(shard, None)
    from certify.cluster.connect import Address, require_ray

    address = Address.parse(compute.cluster)
    if compute.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--device {compute.device} with --cluster: Ray assigns the devices; expected auto, cpu or cuda"
        )
    require_ray(address)
    return Distribution(shard, address)


@contextlib.contextmanager
def workers_for(
    distribution: Distribution,
    model: ModelOptions,
    noise: NoiseOptions,
    compute: ComputeOptions,
    norm: str | None,
    smoothed: SmoothedClassifier,
    images: int,
) -> Iterator[WorkerPool | None]:
    """Start the workers of the cluster, no more than images; yield None without a cluster.

    Args:
        distribution: where the run is computed.
        model: options from which each worker builds the smoothed classifier; so are the next three.
        noise: noise and denoiser.
        compute: device and execution.
        norm: of the radii.
        smoothed: the smoothed classifier of this process, for its identity.
        images: number of images to process.
    """
    if distribution.address is None:
        yield None
        return
    import torch

    from certify.cluster.connect import connected
    from certify.cluster.driver import WorkerPool
    from certify.cluster.worker import WorkerSpec, code_identity

    address, gpus, threads = distribution.address, torch.cuda.device_count(), torch.get_num_threads()
    with connected(address, device=compute.device, gpus=gpus, threads=threads, most=images) as slots:
        probe_size = smoothed.classifier.probe_size  # type: ignore[attr-defined]
        on_worker = replace(compute, device="cuda" if slots[0].gpus else "cpu")
        load = functools.partial(load_smoothed, model.model, model, noise, on_worker, norm=norm, probe_size=probe_size)
        build = functools.partial(worker_engine, load)
        spec = WorkerSpec(build, os.getcwd(), code_identity(), smoothed.base.record())
        with contextlib.closing(WorkerPool(slots, spec, warn)) as pool:
            yield pool


def worker_engine(load: functools.partial[SmoothedClassifier]) -> WorkerEngine:
    """Build the engine of a worker, which loads the smoothed classifier itself."""
    from certify.cluster.worker_engine import WorkerEngine

    return WorkerEngine(load)


class MergeOptions(Options):
    """File of the whole run."""

    out: str = option("-o", "--out", required=True, metavar="RUN", help="Run file to write (.jsonl).")


@command("Merge the shards of a run into one run file.")
@click.argument("shards", nargs=-1, required=True, metavar="SHARD...")
def merge(shards: tuple[str, ...], target: MergeOptions, table: RadiiOptions, output: JsonOptions) -> None:
    """Merge the files of all shards of a run (`--shard i/n`) into the file of the whole run, images in their order.

    Shards that overlap, are missing, unfinished or belong to another run are refused by name. The shards are kept.
    """
    from certify.runs.shards import merge_files

    check_radii(table.radii)
    run = merge_files(shards, target.out, command=command_line(), warn=warn)
    summarise(run, table.radii, as_json=output.as_json)
