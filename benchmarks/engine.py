"""This engine against the loop that everybody copies, in one process, as a ratio.

    python benchmarks/engine.py                                   # digits
    python benchmarks/engine.py --model cifar_resnet56 --weights FILE --n 2000
    python benchmarks/engine.py --model squeezenet1_0 --weights FILE --n 100 --reference-batch 64

The reference: float32, eager, contiguous layout, batches of 1,000, one image at a time, noise from one generator. The
two take turns, so that a machine whose speed drifts does not favour one; the ratio is the median over the pairs. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch

from certify import SmoothedClassifier, load_classifier
from certify.classifiers import Classifier


def reference_votes(classifier: Classifier, image: torch.Tensor, sigma: float, n: int, batch: int) -> torch.Tensor:
    """The field's loop."""
    counts = torch.zeros(classifier.num_classes, dtype=torch.int64)
    with torch.no_grad():
        left = n
        while left > 0:
            this = min(batch, left)
            left -= this
            copies = image.repeat(this, 1, 1, 1)
            scores = classifier.logits(copies + torch.randn_like(copies) * sigma)
            counts += torch.bincount(scores.argmax(1), minlength=classifier.num_classes)
    return counts


def plain(classifier: Classifier) -> Classifier:
    """The same classifier in the layout that code without further thought has."""
    classifier.net.to(memory_format=torch.contiguous_format)
    classifier.channels_last = False
    return classifier


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--weights")
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--reference-batch", type=int, default=1000)
    options = parser.parse_args()

    ours = SmoothedClassifier(load_classifier(options.model, weights=options.weights), options.sigma)
    theirs = plain(load_classifier(options.model, weights=options.weights))
    size = ours.classifier.input.size  # type: ignore[attr-defined]
    image = torch.rand(size, generator=torch.Generator().manual_seed(0))
    rates: dict[str, list[float]] = {"engine": [], "reference": []}
    for pair in range(options.pairs + 1):
        start = time.perf_counter()
        ours.votes(image, options.n, stage="benchmark", image_id=str(pair))
        middle = time.perf_counter()
        reference_votes(theirs, image, options.sigma, options.n, options.reference_batch)
        end = time.perf_counter()
        if pair:  # the first pair warms up
            rates["engine"].append(options.n / (middle - start))
            rates["reference"].append(options.n / (end - middle))
    ratios = [a / b for a, b in zip(rates["engine"], rates["reference"], strict=True)]
    result = {
        "model": options.model,
        "n": options.n,
        "engine_per_second": round(statistics.median(rates["engine"]), 1),
        "reference_per_second": round(statistics.median(rates["reference"]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "pairs": options.pairs,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
    print(f"{options.model}: {result['ratio']} times the reference loop ({min(ratios):.2f} to {max(ratios):.2f})")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
