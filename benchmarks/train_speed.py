"""Images a second in training, beside the plain float32 loop, in turns in one process.

    python benchmarks/train_speed.py unet dncnn --classifier cifar_resnet56 --weights FILE

The plain loop is what the field's code does: float32, PyTorch's default layout, eager, the classifier as it was loaded.
Ours: channels-last layout, the frozen classifier's batch norms folded; with ``--compile`` the network compiled, with
``--precision bfloat16`` under autocast. Both draw noise, move and mirror images, and take one step of Adam.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from analysis.tables import render
from certify.models.classifier import Classifier
from certify.models.load import load_classifier
from denoisers import ARCHITECTURES
from training.data import TrainingData
from training.frozen_classifiers import FrozenClassifiers
from training.loop import make_accelerator, train_step
from training.optimizers import make_optimizers
from training.recipe import Recipe


def random_data(count: int = 2048) -> TrainingData:
    """CIFAR-sized images; their content does not change the speed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), generator=generator).to(torch.uint8)
    indices = torch.arange(count)
    return TrainingData(lambda i: images[i], indices % 10, (3, 32, 32), indices, indices[:1], {})


def plain(net: nn.Module, data: TrainingData, recipe: Recipe, classifier: Classifier | None) -> Callable[[], None]:
    """One step of the plain loop."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    device = next(net.parameters()).device
    if classifier is not None:
        classifier.net.to(memory_format=torch.contiguous_format)
        classifier.channels_last = False

    def step() -> None:
        clean = data.take(torch.randint(len(data.train), (recipe.batch_size,))).to(device).float() / 255
        clean = clean.flip(3) if torch.rand(()) < 0.5 else clean
        output = net(clean + recipe.sigmas[0] * torch.randn_like(clean), recipe.sigmas[0])
        if classifier is None:
            loss = mse_loss(output, clean)
        else:
            with torch.no_grad():
                target = classifier(clean)
            loss = cross_entropy(classifier.logits(output), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def ours(
    net: nn.Module, data: TrainingData, recipe: Recipe, classifier: Classifier | None, options: argparse.Namespace
) -> Callable[[], None]:
    """One step of this package's loop."""
    accelerator = make_accelerator(options.device, options.precision)
    frozen = FrozenClassifiers([classifier] if classifier is not None else [])
    frozen.to(accelerator.device)
    net.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model, *optimizers = accelerator.prepare(net, *make_optimizers(net, recipe))
    if options.compile:
        net.compile()
    at = iter(range(10**9))
    return lambda: (train_step(model, optimizers, data, recipe, frozen, next(at), 10**9, accelerator), None)[1]


def rate(step: Callable[[], None], batch: int, seconds: float) -> float:
    """Images a second over at least so long."""
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        step()
        done += batch
    return done / (time.perf_counter() - begun)


def main() -> None:
    """Measure every network named, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", help="architectures")
    parser.add_argument("--classifier", help="frozen classifier: stability; without one: mse")
    parser.add_argument("--weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--plain-batch", type=int, default=256, help="the field's batch")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    data, rows = random_data(), []
    for name in options.networks:
        classifier = load_classifier(options.classifier, weights=options.weights) if options.classifier else None
        torch.manual_seed(0)
        net = ARCHITECTURES.get(name)()
        objective = "stability" if classifier is not None else "mse"
        recipe = Recipe(objective, (0.25,), batch_size=options.batch_size)
        fast = ours(copy.deepcopy(net), data, recipe, copy.deepcopy(classifier), options)
        slow = plain(
            net.to(options.device), data, Recipe(objective, (0.25,), batch_size=options.plain_batch), classifier
        )
        for step in (slow, fast):
            step()
        pairs = [
            (rate(slow, options.plain_batch, options.seconds), rate(fast, options.batch_size, options.seconds))
            for _ in range(options.pairs)
        ]
        ratios = [b / a for a, b in pairs]
        rows.append(
            [
                name,
                options.classifier or "-",
                f"{statistics.median(a for a, _ in pairs):.0f}",
                f"{statistics.median(b for _, b in pairs):.0f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})",
            ]
        )
    print(render(["network", "classifier", "plain, images/s", "ours, images/s", "ratio"], rows, "text"))


if __name__ == "__main__":
    main()
