"""What exact noise costs beside ordinary Gaussian noise, which takes turns with it in one run.

    python benchmarks/noise.py --sigma 0.25 --pairs 7

Two measurements, each the median of the pairs' ratios (above 1: exact noise is faster) with the smallest and largest:

- blocks: drawing a block of 100x3x32x32, looking for failed draws and adding an image, on one thread and on all. Beside
  it the published way to draw such integers, a loop over all thresholds, whose rate is that of one block.
- votes: labels per second of :func:`certify.engine.monte_carlo.count_votes`, noise and classifier, for
  ``cifar_resnet20`` and for a single convolution, beside which noise costs the most.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from certify import load_classifier
from certify.engine.hardware import machine_name
from certify.engine.monte_carlo import Job, count_votes
from certify.smoothing.exact_gaussian import ExactGaussian, atom_counts
from certify.smoothing.noise import Gaussian
from certify.smoothing.rng import block_generator, stream_key
from certify.types import BaseClassifier, Noise

SHAPE = (3, 32, 32)
KEY = stream_key(0, "noise", "benchmark")
IMAGE = torch.randint(256, SHAPE, generator=torch.Generator().manual_seed(0)).float() / 255


class OneConvolution(nn.Module):
    """About the smallest network that sees every pixel."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, self.num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Labels ``(B,)``."""
        labels: torch.Tensor = self.head(self.net(images)).argmax(1)
        return labels

    def describe(self) -> dict[str, Any]:
        """Nothing is recorded."""
        return {}


def seconds(work: Callable[[], object]) -> float:
    """How long it takes once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(name: str, work: Callable[[Noise], object], done: int, sigma: float, pairs: int) -> None:
    """Run it with either noise in turn, once to warm up, and print rates and ratios."""
    turns = [[seconds(lambda n=n: work(n)) for n in (Gaussian(sigma), ExactGaussian(sigma))] for _ in range(pairs + 1)]
    ordinary, exact = (done / statistics.median(column) for column in zip(*turns[1:], strict=True))
    ratios = sorted(a / b for a, b in turns[1:])
    print(
        f"{name:<34} gaussian {ordinary:>9,.0f}/s   exact {exact:>9,.0f}/s   "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )


def draw_blocks(noise: Noise, blocks: int) -> None:
    """So many blocks of noisy images."""
    for block in range(blocks):
        drawn = noise.sample((100, *SHAPE), block_generator(KEY, block))
        noise.failed(drawn)
        noise.add(IMAGE, drawn)


def threshold_loop(atoms: list[int]) -> torch.Tensor:
    """A block the published way: K is the number of thresholds that a 60-bit number reaches, compared one by one."""
    numbers = torch.randint(2**60, (100, *SHAPE))
    drawn = torch.full(numbers.shape, 1 - len(atoms), dtype=torch.int16)
    for threshold in torch.tensor([*reversed(atoms[1:]), *atoms]).cumsum(0)[:-1].tolist():
        drawn += numbers >= threshold
    return drawn


def label(classifier: BaseClassifier, noise: Noise, trials: int) -> None:
    """Count the votes of so many noisy images."""
    list(count_votes(classifier, noise, [Job(IMAGE, KEY, trials)], batch_size=500))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--pairs", type=int, default=7)
    o = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"{machine_name(torch.device('cpu'))}, {threads} threads, torch {torch.__version__}, sigma = {o.sigma}")
    atoms = atom_counts(o.sigma)
    for used in dict.fromkeys((1, threads)):
        torch.set_num_threads(used)
        name = f"blocks as images, threads: {used}"
        compare(name, lambda noise: draw_blocks(noise, 100), 10_000, o.sigma, o.pairs)
        slow = seconds(lambda: threshold_loop(atoms))
        fast = min(seconds(lambda: ExactGaussian(o.sigma).sample((100, *SHAPE), torch.Generator())) for _ in range(20))
        print(f"{'':<34} a loop over thresholds takes {slow / fast:,.0f} times as long as the look-up")
    small, resnet = OneConvolution(), load_classifier("cifar_resnet20", weights="untrained")
    compare("votes of one convolution", lambda noise: label(small, noise, 20_000), 20_000, o.sigma, o.pairs)
    compare("votes of cifar_resnet20", lambda noise: label(resnet, noise, 1_000), 1_000, o.sigma, o.pairs)


if __name__ == "__main__":
    main()
