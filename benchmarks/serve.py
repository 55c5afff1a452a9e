"""The server's throughput beside the offline engine's, on the same classifier, run in the same way.

    python benchmarks/serve.py digits --n 20000
    python benchmarks/serve.py cifar_resnet56 --weights FILE --n 1000 --turn 20

A pair is one turn of each, one after the other. Offline: one call of ``SmoothedClassifier.tallies`` for all images of
the turn, selection and estimation. Server: a process of its own on loopback, asked about the same images by this one
with binary tensors, so many requests under way as ``--clients`` says. Both certify, in float32, eager, in batches of
one size. Two ratios: of samples per second by the clock, client included; and of samples per second of processor time,
where only the server's process counts, which says the same on a machine that others use too.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import torch

from certify import SmoothedClassifier, __version__, load_classifier, load_images
from certify.engine.execution import default_batch_size
from certify.engine.hardware import machine_name
from certify.types import Certificate

RESULTS = Path(__file__).parent / "results.jsonl"
SIGMA, SEED = 0.25, 0


@contextlib.contextmanager
def server(o: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """``certify serve`` on a free port: its address and its process."""
    command = [sys.executable, "-m", "certify", "serve", "--model", o.model, "--sigma", str(SIGMA), "--port", "0"]
    command += ["--n0", str(o.n0), "--n", str(o.n), "--samples-per-request", str(o.n0 + o.n), "--seed", str(SEED)]
    command += ["--precision", "float32", "--compile", "off", "--timeout", "600", "--concurrency", str(o.clients)]
    command += ["--device", o.device, "--name", "model"]
    command += ["--batch-size", str(o.batch_size)]
    command += ["--weights", o.weights] if o.weights else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stderr is not None
            yield next(m[0] for line in process.stderr if (m := re.search(r"http://\S+", line))), process.pid
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def processor_seconds(pid: int) -> float:
    """Seconds of processor time that this process took so far, all its threads together (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def offline(g: SmoothedClassifier, images: list[torch.Tensor], o: argparse.Namespace) -> list[Certificate]:
    """The certificates of these images, by one call of the engine."""
    from certify.engine.noisy_classifier import Target
    from certify.smoothing.procedures import Certify

    procedure, noise = Certify(o.n0, o.n), g.stated(images[0].numel())
    sampled = g.sample(map(Target, images), procedure.stages, seed=SEED)
    return [procedure.answer({k: tally.votes for k, tally in tallies.items()}, noise) for _, tallies in sampled]


def served(client: httpx2.Client, images: list[torch.Tensor], clients: int) -> list[tuple[int, float]]:
    """Label and radius of these images, by one request each."""

    def ask(image: torch.Tensor) -> tuple[int, float]:
        raw = image.numpy().tobytes()
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, *image.shape]}
        head = {"inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}]}
        text = json.dumps(head).encode()
        headers = {"inference-header-content-length": str(len(text)), "content-type": "application/octet-stream"}
        reply = client.post("/v2/models/model/infer", content=text + raw, headers=headers)
        reply.raise_for_status()
        said = {output["name"]: output["data"][0] for output in reply.json()["outputs"]}
        return said["label"], said["radius"]

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, images))


def measure(o: argparse.Namespace) -> dict[str, Any]:
    """Both, in turn."""
    classifier = load_classifier(o.model, weights=o.weights)
    assert classifier.input.size is not None
    o.batch_size = o.batch_size or default_batch_size(torch.empty(classifier.input.size, device=o.device))
    g = SmoothedClassifier(
        classifier, SIGMA, device=o.device, precision="float32", compile="off", batch_size=o.batch_size
    )
    found = load_images("digits" if o.model == "digits" else "photos", classifier, labels="none")
    base = [found.load(i) for i in range(min(len(found), o.turn))]
    grain = torch.rand((o.turn, *base[0].shape), generator=torch.Generator().manual_seed(0))
    images = [(base[i % len(base)] * 0.98 + 0.02 * grain[i]).clamp(0, 1) for i in range(o.turn)]  # no two alike
    samples = o.turn * (o.n0 + o.n)
    pairs: list[tuple[float, float, float, float]] = []
    with server(o) as (address, pid), httpx2.Client(base_url=address, timeout=900) as client:
        g.prepare(images[0], samples)
        offline(g, images[:1], o)
        served(client, images[: o.clients], o.clients)  # warms up
        for _ in range(o.pairs):
            start, own, other = time.perf_counter(), time.process_time(), processor_seconds(pid)
            mine = offline(g, images, o)
            middle, own = time.perf_counter(), time.process_time() - own
            theirs = served(client, images, o.clients)
            end, other = time.perf_counter(), processor_seconds(pid) - other
            pairs.append((samples / (middle - start), samples / (end - middle), samples / own, samples / other))
            same = sum((c.prediction, c.radius) == answer for c, answer in zip(mine, theirs, strict=True))
            alone, there, alone_cpu, there_cpu = pairs[-1]
            print(
                f"{o.model}, n = {o.n:,}: offline {alone:,.0f} and server {there:,.0f} samples/s, ratio "
                f"{there / alone:.3f}; a second of processor time {alone_cpu:,.0f} and {there_cpu:,.0f}, ratio "
                f"{there_cpu / alone_cpu:.3f}; {same} of {o.turn} certificates equal",
                flush=True,
            )
    by_clock, by_processor = ([pair[k + 1] / pair[k] for pair in pairs] for k in (0, 2))
    return {
        "offline": statistics.median(pair[0] for pair in pairs),
        "served": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(by_clock),
        "ratio_min": min(by_clock),
        "ratio_max": max(by_clock),
        "processor_ratio": statistics.median(by_processor),
        "processor_ratio_min": min(by_processor),
        "processor_ratio_max": max(by_processor),
        "pairs": o.pairs,
        "images": o.turn,
        "n0": o.n0,
        "n": o.n,
        "clients": o.clients,
        "same": same,
        "batch_size": o.batch_size,
        "machine": machine_name(torch.device(o.device)),
        "threads": torch.get_num_threads(),
        "certify": __version__,
        "torch": torch.__version__,
    }


def main() -> None:
    """Parse, measure, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="digits")
    parser.add_argument("--weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n0", type=int, default=100)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--turn", type=int, default=100, help="images of a turn")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--batch-size", type=int)
    o = parser.parse_args()
    result = measure(o)
    for kind in ("ratio", "processor_ratio"):
        print(f"median {kind} {result[kind]:.3f} ({result[f'{kind}_min']:.3f} - {result[f'{kind}_max']:.3f})")
    command = "python benchmarks/serve.py " + " ".join(shlex.quote(a) for a in sys.argv[1:])
    head = {"case": f"serve {o.model}", "date": datetime.date.today().isoformat(), "command": command}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**head, **result}) + "\n")


if __name__ == "__main__":
    main()
