"""What a cluster run costs beside the work itself: workers that only sleep, and the driver's memory.

    python benchmarks/scheduling.py sleep --workers 64 --images 2000 --mean 5
    python benchmarks/scheduling.py memory --n 1000 100000

``sleep``: real Ray actors on this machine take images of uneven cost (uniform from 0.2 to 1.8 of the mean, or
lognormal) through the real driver, but sleep instead of computing, so that 64 of them fit on two cores. The time is
from the first image handed out to the last line written, once all workers are ready. It is compared with the ideal
makespan, max(total / workers, longest), and with handing out the same images in the same order without any delay.

``memory``: the largest resident memory of the driver of ``certify --cluster local:1`` on the digits, at each n.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import certify.cluster.driver
from certify.cluster.connect import Address, connected
from certify.cluster.driver import WorkerPool
from certify.cluster.worker import Line, WorkerSpec, WorkItem, code_identity
from certify.engine.execution import Execution
from certify.runs.config import Circumstances
from certify.runs.records import ImageRow, RunHeader
from certify.runs.run_file import RunFile, read_run


class Sleeper:
    """An engine that sleeps for as many seconds as each image says."""

    def describe(self) -> list[dict[str, Any]]:
        """No pipeline."""
        return []

    def facts(self) -> Circumstances:
        """Nothing that could differ."""
        return Circumstances("cpu", None, "none", {}, {"threads": 1})

    def prepare(self, image: np.ndarray, samples: int, execution: Any) -> Any:
        """Return settings that nobody uses."""
        return Execution("float32", False, False, 1)

    def answer(self, items: Sequence[WorkItem], settings: Any) -> list[Line]:
        """Sleep, then return lines of about the usual length."""
        lines: list[Line] = []
        for item in items:
            (seconds,) = struct.unpack("d", item.raw)  # type: ignore[arg-type]
            time.sleep(seconds)
            empty = {"prediction": 0, "radius": 0.0, "p_lower": 0.5, "votes": {"0": 100}, "selection": {"0": 10}}
            row = {"id": item.id, "label": 0, **empty, "trials": 100, "failures": 0, "seconds": seconds}
            lines.append((item.place, ImageRow.from_json(row)))
        return lines


def greedy(costs: Sequence[float], workers: int) -> float:
    """The makespan when whoever is free takes the next image at once."""
    free = [0.0] * workers
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)


def drawn(o: argparse.Namespace) -> np.ndarray:
    """Seconds for each image."""
    chance = np.random.default_rng(o.seed)
    if o.spread == "uniform":
        return chance.uniform(0.2, 1.8, o.images) * o.mean
    found = chance.lognormal(0.0, 1.0, o.images)
    return found / found.mean() * o.mean


def sleep(o: argparse.Namespace) -> None:
    """The makespan of workers that sleep."""
    os.environ["RAY_worker_register_timeout_seconds"] = "3600"  # noqa: SIM112 - Ray's own spelling
    certify.cluster.driver.PATIENCE = 3600.0  # so many processes on few cores take their time to start
    costs = drawn(o)
    ideal = max(costs.sum() / o.workers, costs.max())
    address = Address("local", o.workers)
    with connected(address, device="cpu", gpus=0, threads=1, most=o.images) as slots:
        begun = time.perf_counter()
        light = [replace(slot, threads=None) for slot in slots]  # nothing to share: torch stays outside
        spec = WorkerSpec(Sleeper, os.getcwd(), code_identity(), [])  # type: ignore[arg-type]
        pool = WorkerPool(light, spec, lambda text: print(text, file=sys.stderr))
        pool.prepare(SimpleNamespace(numpy=lambda: np.zeros(1)), 1)  # type: ignore[arg-type]
        while len(pool._free()) < o.workers:
            pool._wait()
        ready = time.perf_counter()
        before = _memory()

        def read(place: int) -> WorkItem:
            return WorkItem(place, str(place), 0, struct.pack("d", costs[place]))

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.jsonl"
            with RunFile(path, RunHeader.from_json({"schema": 1, "expected": o.images})) as file:
                for _, line in pool.answers(range(o.images), read, SimpleNamespace(), most=o.most):  # type: ignore[arg-type]
                    file.append(line)
            took = time.perf_counter() - ready
            assert len(read_run(path).images) == o.images
        pool.close()
    found = {
        "workers": o.workers,
        "images": o.images,
        "spread": o.spread,
        "mean": o.mean,
        "most": o.most,
        "longest": round(costs.max(), 2),
        "start": round(ready - begun, 1),
        "ideal": round(ideal, 2),
        "greedy": round(greedy(costs.tolist(), o.workers), 2),
        "took": round(took, 2),
        "over_ideal": round(took / ideal - 1, 4),
        "over_greedy": round(took / greedy(costs.tolist(), o.workers) - 1, 4),
        "driver_grew_mib": round((_memory() - before) / 1024, 1),
    }
    print(json.dumps(found))


def _memory() -> int:
    """KiB that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(o: argparse.Namespace) -> None:
    """The driver's memory at several n."""
    code = (
        "import resource, sys\n"
        "from certify.cli import main\n"
        "try: main()\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
    )
    for n in o.n:
        with tempfile.TemporaryDirectory() as folder:
            command = f"--model digits --data digits --skip 5 --sigma 0.25 --n {n} --quiet --json --cluster local:1"
            command += f" --precision float32 --compile off --out {folder}/run.jsonl"
            ended = subprocess.run(
                [sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=True
            )
        print(json.dumps({"n": n, "driver_mib": round(int(ended.stderr.split()[-1]) / 1024, 1)}))


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("sleep")
    part.set_defaults(run=sleep)
    part.add_argument("--workers", type=int, default=64)
    part.add_argument("--images", type=int, default=2000)
    part.add_argument("--mean", type=float, default=5.0, help="seconds an image")
    part.add_argument("--spread", choices=["uniform", "lognormal"], default="uniform")
    part.add_argument("--most", type=int, default=1, help="images that a worker gets at once, at most")
    part.add_argument("--seed", type=int, default=0)
    part = parts.add_parser("memory")
    part.set_defaults(run=memory)
    part.add_argument("--n", type=int, nargs="+", default=[1000, 100_000])
    o = parser.parse_args()
    o.run(o)


if __name__ == "__main__":
    main()
