"""An hour of certify, kill, resume, merge, recompute, train, audit and replay at random: nothing may be lost.

    python benchmarks/soak.py --minutes 60 --seed 0

Every scenario is run as a user would, in processes that are killed (SIGKILL) or stopped (SIGINT) at random moments and
started again with the same command until they finish. Its result is compared with a run that nobody disturbed: each
image's line, ``seconds`` apart; weights, number by number; an audit's certificates, and no answer paid for twice beyond
the requests that were under way. The last line is JSON. Everything is drawn from the seed, but when a kill falls into
the work depends on the machine.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from certify import load_classifier
from certify.models.identity import tensors_digest

Command = list[str]
OF_VOTES = (
    *("votes", "selection", "failures", "selection_failures", "prediction", "class", "base", "base_class"),
    *("radius", "p_lower", "p_other"),
)
UNDER_WAY = 8  # requests that a killed audit may have sent without keeping the answer, each time


class Soak:
    """What happened so far, and how commands are run and killed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.did: Counter[str] = Counter()
        self.wrong: list[str] = []

    def start(self, command: Command, folder: Path) -> subprocess.Popen[str]:
        """``certify COMMAND`` in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "certify", *command],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def whole(self, command: Command, folder: Path) -> None:
        """Run it to its end."""
        process = self.start(command, folder)
        _, told = process.communicate()
        if process.returncode:
            self.wrong.append(f"{' '.join(command)}: exit {process.returncode}: {told.strip()[-300:]}")

    def disturbed(self, command: Command, folder: Path, longest: float, most: int = 6) -> None:
        """Kill or stop it at random moments, start it again, and let it finish at last."""
        for _ in range(self.chance.randrange(1, most)):
            process = self.start(command, folder)
            try:
                process.communicate(timeout=self.chance.uniform(0.3, 1.0) * longest)
                return  # it was faster
            except subprocess.TimeoutExpired:
                how = self.chance.choice([signal.SIGKILL, signal.SIGINT])
                process.send_signal(how)
                process.communicate()
                self.did["killed" if how is signal.SIGKILL else "stopped"] += 1
        self.whole(command, folder)

    def same(self, what: str, first: Any, second: Any) -> None:
        """Note where the two differ."""
        if first != second:
            self.wrong.append(f"{what}: differs from the run that nobody disturbed")


def lines(path: Path) -> dict[str, Any]:
    """The lines of a run file by image, without what may differ."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["id"]: {k: v for k, v in row.items() if k != "seconds"} for row in rows if "id" in row}


def certifying(soak: Soak, folder: Path) -> None:
    """A run at a fixed n, or one that stops by itself; killed and resumed; then recomputed."""
    kind = soak.chance.choice([["--n", "20000"], ["--radius", "0.1,0.3"], ["--tolerance", "0.1", "--n", "20000"]])
    denoiser = ["--denoiser", soak.chance.choice(["none", "auto", "median"])]
    base = ["--model", "digits", "--sigma", "0.25", "--skip", "2", "--seed", str(soak.chance.randrange(1000)), *kind]
    engine = ["--precision", "float32", "--compile", "off", "--quiet"]
    soak.disturbed([*base, *denoiser, *engine, "--out", "killed.jsonl"], folder, 8)
    soak.whole([*base, *denoiser, *engine, "--out", "whole.jsonl"], folder)
    soak.same("certify", lines(folder / "killed.jsonl"), lines(folder / "whole.jsonl"))
    if kind[0] == "--n":
        soak.whole(["recompute", "killed.jsonl", "--alpha", "0.01", "--out", "again.jsonl"], folder)
        soak.whole(["recompute", "whole.jsonl", "--alpha", "0.01", "--out", "more.jsonl"], folder)
        soak.same("recompute", lines(folder / "again.jsonl"), lines(folder / "more.jsonl"))


def sharding(soak: Soak, folder: Path) -> None:
    """Shards in any order, each killed and resumed, merged."""
    of = soak.chance.randrange(2, 5)
    base = "--model digits --sigma 0.5 --n 5000 --skip 5 --precision float32 --compile off --quiet".split()
    order = list(range(1, of + 1))
    soak.chance.shuffle(order)
    for i in order:
        soak.disturbed([*base, "--shard", f"{i}/{of}", "--out", f"part{i}.jsonl"], folder, 6, most=3)
    soak.whole(["merge", *[f"part{i}.jsonl" for i in order], "-o", "merged.jsonl"], folder)
    soak.whole([*base, "--out", "whole.jsonl"], folder)
    soak.same("merge", lines(folder / "merged.jsonl"), lines(folder / "whole.jsonl"))


def training(soak: Soak, folder: Path) -> None:
    """A denoiser, killed and resumed: the same weights."""
    base = "train --denoiser unet --option channels=[8,16] --option blocks=1 --objective stability --classifier digits"
    rest = f"--sigma 0.5 --data digits-train --epochs 6 --validations 3 --seed {soak.chance.randrange(1000)} --quiet"
    soak.disturbed([*base.split(), *rest.split(), "--out", "killed"], folder, 15)
    soak.whole([*base.split(), *rest.split(), "--out", "whole"], folder)
    both = [tensors_digest(load_file(folder / name / "denoiser.safetensors")) for name in ("killed", "whole")]
    soak.same("train", *both)


def auditing(soak: Soak, folder: Path) -> None:
    """A service, audited by queries; killed and resumed; replayed from its folder alone."""
    with service() as (port, asked):
        base = ["audit", "--endpoint", f"http://127.0.0.1:{port}/predict", "--protocol", "json"]
        base += "--protocol-option labels=labels --data digits --max 6 --sigma 0.25 --n0 20 --n 100 --quiet".split()
        base += ["--input-size", "1x8x8", "--budget", "100000", "--seed", str(soak.chance.randrange(1000))]
        before = soak.did["killed"] + soak.did["stopped"]
        soak.disturbed([*base, "--out", "killed"], folder, 10)
        kills, first = soak.did["killed"] + soak.did["stopped"] - before, asked[0]
        soak.whole([*base, "--out", "whole"], folder)
        if first > asked[0] - first + UNDER_WAY * (kills + 1):
            soak.wrong.append(f"audit: {first} requests with {kills} kills, {asked[0] - first} without")
    kept = lines(folder / "killed" / "run.jsonl")
    if not only_lost(kept, lines(folder / "whole" / "run.jsonl"), UNDER_WAY * kills):
        soak.wrong.append("audit: differs by more than the answers that were under way when it was killed")
    soak.whole(["replay", "killed"], folder)
    soak.same("replay", kept, lines(folder / "killed" / "run.jsonl"))


def only_lost(kept: dict[str, Any], whole: dict[str, Any], most: int) -> bool:
    """Whether ``kept`` is ``whole`` but for at most so many answers that became failed trials, and no radius grew."""
    lost = 0
    for name, row in whole.items():
        other = kept.get(name, {})
        if {**other, **{key: row[key] for key in OF_VOTES}} != row:
            return False
        for stage in ("selection", "votes"):
            gone = Counter(row[stage])
            gone.subtract(other[stage])
            if min(gone.values()) < 0:
                return False
            lost += gone.total()
        if other["prediction"] == row["prediction"] and other["radius"] > row["radius"]:
            return False
    return kept.keys() == whole.keys() and lost <= most


@contextlib.contextmanager
def service() -> Iterator[tuple[int, list[int]]]:
    """The digits behind plain JSON on loopback: its port, and how many requests it answered."""
    classifier, asked = load_classifier("digits"), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            picture = Image.open(io.BytesIO(base64.b64decode(body["image"]))).convert("L")
            image = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None, None]
            label = int(classifier(image)[0])
            asked[0] += 1
            time.sleep(0.002)
            answer = json.dumps({"labels": [f"digit {label}"]}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            with contextlib.suppress(OSError):  # whoever asked was killed
                self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1], asked
    finally:
        server.shutdown()
        server.server_close()


SCENARIOS: tuple[Callable[[Soak, Path], None], ...] = (certifying, certifying, sharding, training, auditing)


def main() -> None:
    """Draw scenarios until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    torch.set_num_threads(1)
    soak, end = Soak(o.seed), time.monotonic() + 60 * o.minutes
    while time.monotonic() < end:
        scenario = soak.chance.choice(SCENARIOS)
        with tempfile.TemporaryDirectory() as folder:
            scenario(soak, Path(folder))
        soak.did[scenario.__name__] += 1
        print(json.dumps({**soak.did, "wrong": soak.wrong}), file=sys.stderr, flush=True)
    print(json.dumps({"minutes": o.minutes, "seed": o.seed, **soak.did, "wrong": soak.wrong}))
    sys.exit(bool(soak.wrong))


if __name__ == "__main__":
    main()
