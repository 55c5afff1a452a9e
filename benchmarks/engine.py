"""The vote engine against the plain loop, for several classifiers, precisions and amounts of work.

    python benchmarks/engine.py speed digits cifar_resnet56 --classifiers DIR
    python benchmarks/engine.py speed cifar_resnet56 --compile on --turn 20000
    python benchmarks/engine.py amounts digits            # 10^3 to 10^8 samples, compilation included
    python benchmarks/engine.py memory cifar_resnet56     # peak memory over n

Both loops run in one process and take turns (``analysis/bench.py``). DIR holds checkpoints whose names begin like the
classifier's; without one the classifier is untrained, which is as fast. Every result is appended to
``benchmarks/results.jsonl`` with the command, the machine, versions and spread. On an accelerator: ``--device cuda``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from analysis.bench import Measured, Plain, compare, describe, reference_votes
from certify import SmoothedClassifier, load_classifier, load_images
from certify.models.resolve import UNTRAINED
from denoisers.dncnn import DnCNN

RESULTS = Path(__file__).parent / "results.jsonl"
FILES = {"cifar_resnet56": "resnet56-*", "squeezenet1_0": "squeezenet1_0*"}


def smoothed(case: str, o: argparse.Namespace) -> tuple[SmoothedClassifier, list[torch.Tensor]]:
    """A case such as ``cifar_resnet56`` or ``dncnn+cifar_resnet56``, not prepared yet, and images for it."""
    denoiser, _, model = case.rpartition("+")
    found = sorted(Path(o.classifiers).glob(FILES.get(model, "\0"))) if o.classifiers else []
    weights = None if model == "digits" else found[0] if found else UNTRAINED
    classifier = load_classifier(model, weights=weights)
    g = SmoothedClassifier(
        classifier,
        0.25,
        denoiser=DnCNN() if denoiser else None,
        device=o.device,
        precision=o.precision,
        compile=o.compile,
        batch_size=o.batch_size,
    )
    images = load_images("digits" if model == "digits" else "photos", classifier, labels="none", max_images=2)
    return g, [images.load(i) for i in range(2)]


def speed(case: str, o: argparse.Namespace) -> None:
    """Ratio, spread and share of the ceiling."""
    g, images = smoothed(case, o)
    found = compare(g, images, n=o.n, pairs=o.pairs, turn=o.turn, reference_batch=o.reference_batch)
    print(describe(found) + "\n", flush=True)
    save(case, asdict(found))


def amounts(case: str, o: argparse.Namespace) -> None:
    """Seconds for 10^3 to 10^8 samples with ``auto``, compilation included, against the plain loop."""
    for n in [10**k for k in range(o.first, o.last + 1)]:
        g, images = smoothed(case, o)
        found = compare(g, images, n=n, pairs=o.pairs, turn=min(n, 10**4) if n < 10**5 else None)
        mine, theirs, how = found.certificate, found.certificate_reference, "rates"
        if theirs < 20:  # short enough to do the whole thing, from the decision on
            mine, theirs, how = whole(case, o, n, found)
        row = {"n": n, "engine_s": mine, "reference_s": theirs, "ratio": theirs / mine, "from": how}
        print(f"{case} n = {n:>11,}: {theirs / mine:6.2f} ({mine:,.4g} s against {theirs:,.4g} s, by {how}; ", end="")
        print(f"{'compiled' if found.ran_as.compiled else 'eager'}, {found.prepared:.1f} s to prepare)", flush=True)
        save(case, {**row, "ran_as": asdict(found.ran_as), "machine": found.machine})


def whole(case: str, o: argparse.Namespace, n: int, found: Measured) -> tuple[float, float, str]:
    """Return the median of five whole runs of each, in turn; the engine is prepared in each (compiled code: cached)."""
    pairs = []
    for i in range(6):
        g, images = smoothed(case, o)
        loop = Plain(g.base)
        start = time.perf_counter()
        g.prepare(images[0], n)
        g.votes(images[0], n, stage="benchmark", image_id=str(i))
        middle = time.perf_counter()
        reference_votes(loop, images[0], 0.25, n, found.reference_batch, g.num_classes)
        pairs.append((middle - start, time.perf_counter() - middle))
    mine, theirs = (sorted(t)[2] for t in zip(*pairs[1:], strict=True))
    return mine, theirs, "whole runs"


def memory(case: str, o: argparse.Namespace) -> None:
    """Peak memory of processes that run alike and differ in n alone: 2, 10 and 100 batches."""
    g, images = smoothed(case, o)
    batch = g.prepare(images[0], 10**6).batch_size
    peaks = {}
    for n in (2 * batch, 10 * batch, 100 * batch):
        command = [sys.executable, __file__, "peak", case, "--n", str(n), "--batch-size", str(batch)]
        command += ["--compile", o.compile, "--precision", o.precision, "--device", o.device]
        command += ["--classifiers", o.classifiers] if o.classifiers else []
        peaks[n] = int(subprocess.run(command, capture_output=True, check=True).stdout.split()[-1])
    print(f"{case}, batches of {batch}: " + ", ".join(f"n = {n:,}: {p / 1024:,.0f} MiB" for n, p in peaks.items()))
    save(case, {"peak_kib": peaks, "batch_size": batch})


def peak(case: str, o: argparse.Namespace) -> None:
    """Peak memory of this process after n samples, in KiB."""
    g, images = smoothed(case, o)
    g.prepare(images[0], 10**6)
    g.votes(images[0], o.n, stage="benchmark")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def save(case: str, result: dict[str, Any]) -> None:
    """Append a result with the command that made it."""
    command = "python benchmarks/engine.py " + " ".join(shlex.quote(a) for a in sys.argv[1:])
    head = {"case": case, "date": datetime.date.today().isoformat(), "command": command}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**head, **result}) + "\n")


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "amounts", "memory", "peak"])
    parser.add_argument("cases", nargs="*", default=["digits"])
    parser.add_argument("--classifiers", help="folder of checkpoints")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--n", type=int, default=100_000, help="samples of a certificate: the amount of work")
    parser.add_argument("--turn", type=int, help="samples of a turn (default: 5 seconds' worth)")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--reference-batch", type=int)
    parser.add_argument("--first", type=int, default=3, help="amounts: from 10^FIRST samples")
    parser.add_argument("--last", type=int, default=8, help="amounts: to 10^LAST samples")
    o = parser.parse_args()
    for case in o.cases:
        {"speed": speed, "amounts": amounts, "memory": memory, "peak": peak}[o.what](case, o)


if __name__ == "__main__":
    main()
