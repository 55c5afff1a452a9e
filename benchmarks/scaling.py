"""A full ImageNet certification on 1, 8 and 64 devices, on paper: measured numbers through the driver's bookkeeping.

    python benchmarks/scaling.py --logs LOGS/imagenet/resnet50 [--rate 10000] [--price 3.0]

``LOGS`` are the logs that Cohen, Rosenfeld and Kolter published with their paper (repository locuslab/smoothing,
data/certify). From each radius follows the leading class's probability; votes are drawn with it and stopped by the rule
that ``certify --radius`` uses, which gives the samples an image takes. 50,000 images drawn from these then go through
``certify.cluster.driver``, as a run on a cluster hands them out. A worker takes its images one after the other at
``--rate`` samples per second, since images that share batches share the device.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.special import ndtr

from certify.cluster.driver import group_size
from certify.smoothing.noise import Gaussian
from certify.smoothing.procedures.decide import RadiusDecision

IMAGES = 50_000
ABSTAINED = 0.45
"""Probability of the leading class where the log abstains, which it does not say; the smaller, the sooner settled."""


def probabilities(log: Path) -> tuple[float, np.ndarray]:
    """sigma, and for each image of a log the probability of its leading class, from its radius."""
    found = re.search(r"sigma_([\d.]+)$", log.name)
    assert found is not None, f"{log}: expected a log called sigma_S"
    sigma = float(found[1])
    rows = list(csv.DictReader(log.open(encoding="utf-8"), delimiter="\t"))
    certified = np.array([float(row["radius"]) for row in rows])
    abstained = np.array([row["predict"] == "-1" for row in rows])
    return sigma, np.where(abstained, ABSTAINED, ndtr(certified / sigma))


def samples(p: np.ndarray, sigma: float, radius: float, n: int, seed: int) -> np.ndarray:
    """Samples that deciding at a radius takes, for images with these probabilities."""
    chance = np.random.default_rng(seed)
    found = []
    for probability in p:
        test = RadiusDecision(2, n=n, radii=(radius,), noise=Gaussian(sigma), alpha=0.001, rule="one-sided")
        while test.pending:
            test.add((chance.random(test.pending) >= probability).astype(np.int64))
        found.append(test.drawn)
    return np.array(found)


def makespan(costs: Sequence[float], workers: int, most: int, delay: float) -> float:
    """Return the seconds until the last image is answered; ``delay`` passes between an answer and the next images."""
    free = [0.0] * workers
    done = 0
    while done < len(costs):
        size = group_size(len(costs) - done, workers, most)
        heapq.heappush(free, heapq.heappop(free) + sum(costs[done : done + size]) + delay)
        done += size
    return max(free)


def main() -> None:
    """Read the arguments, print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=10_000, help="samples per second of one device")
    parser.add_argument("--price", type=float, default=3.0, help="of one device for an hour")
    parser.add_argument("--start", type=float, default=120.0, help="seconds until a worker stands ready, compiled")
    parser.add_argument("--delay", type=float, default=0.02, help="seconds between an answer and the next image")
    parser.add_argument("--radius", type=float, default=0.5)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--batch", type=int, default=222, help="samples a forward pass")
    o = parser.parse_args()
    chance = np.random.default_rng(0)
    cases = {"n = 100,000": (np.full(IMAGES, 100_100), 1)}
    for log in sorted(o.logs.glob("noise_*/test/sigma_*")):
        if log.parts[-3].removeprefix("noise_") != log.name.removeprefix("sigma_"):
            continue  # trained for other noise
        sigma, p = probabilities(log)
        for n in (20_000, 100_000):
            found = samples(p, sigma, o.radius, n, seed=0)
            name = f"decided at {o.radius:g}, sigma {sigma:g}, n <= {n:,}"
            cases[name] = (chance.choice(found, IMAGES), -(-5 * o.batch // 16))
    for name, (drawn, most) in cases.items():
        for devices in o.devices:
            work = makespan((drawn / o.rate).tolist(), devices, most, o.delay)
            even = float(drawn.sum()) / o.rate / devices
            hours = (work + o.start) / 3600
            row = {
                "case": name,
                "devices": devices,
                "samples_an_image": round(float(drawn.mean())),
                "hours": round(hours, 3),
                "cost": round(hours * devices * o.price, 2),
                "start_share": round(o.start / (work + o.start), 4),
                "straggler_share": round((work - even) / (work + o.start), 4),
                "images_a_second": round(IMAGES / work, 1),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
