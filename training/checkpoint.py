"""What training leaves in its folder: checkpoints, metrics, the best figures so far; and its speed."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from certify.errors import RunFault, UserError, first_line
from certify.runs.files import replacing
from certify.runs.identity import FINGERPRINT, refuse_other_run

if TYPE_CHECKING:
    from accelerate import Accelerator

_AVERAGE = "average.pt"
Scores = dict[str, float]
"""Figures on held-out images; ``score`` among them, less is better."""


class Meter:
    """Loss and speed since the last report, and speed overall; pauses do not count."""

    def __init__(self) -> None:
        self.begun = self.start = time.monotonic()
        self.images = self.all = 0
        self.losses: list[float] = []

    @property
    def since(self) -> float:
        """Seconds since the last report."""
        return time.monotonic() - self.start

    @property
    def rate(self) -> float:
        """Images a second overall."""
        return self.all / max(1e-9, time.monotonic() - self.begun)

    def add(self, images: int, loss: float) -> None:
        """One step."""
        self.images += images
        self.all += images
        self.losses.append(loss)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        begun = time.monotonic()
        yield
        self.start += time.monotonic() - begun
        self.begun += time.monotonic() - begun

    def take(self) -> dict[str, float]:
        """Mean loss and images a second since the last call."""
        found = {"loss": sum(self.losses) / len(self.losses), "images_per_second": self.images / max(1e-9, self.since)}
        self.start, self.images, self.losses = time.monotonic(), 0, []
        return found


def make_folder(out: str | Path) -> None:
    """Make the folder of a training, unless it is there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}; expected a folder") from None


class Checkpoints:
    """Step and best score, in ``out``: a checkpoint is written beside the old one and then takes its place.

    Args:
        out: folder.
        digest: of what must be the same for a training to go on.
        driver: keeps the network, the optimizers and their states.
        average: of the weights, or None; it is kept too.
        guides: records of the frozen classifiers, which must be the same, too.
        trust_identity: resume a checkpoint that cannot prove that they are.
    """

    def __init__(
        self,
        out: Path,
        digest: str,
        driver: Accelerator,
        average: nn.Module | None = None,
        *,
        guides: Sequence[Mapping[str, Any]] = (),
        trust_identity: bool = False,
    ) -> None:
        self.out, self.digest, self.driver, self.average = out, digest, driver, average
        self.guides, self.trust_identity = [dict(guide) for guide in guides], trust_identity
        self.step = self.saved = self.best_step = 0
        self._written = time.monotonic()
        self.best: Scores = {}
        self.folder, self.old, self.new = (out / f"checkpoint{end}" for end in ("", ".old", ".new"))
        self.metrics = out / "metrics.jsonl"

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one; lines of metrics after it are dropped."""
        make_folder(self.out)
        found = next((f for f in (self.folder, self.old) if (f / "state.json").is_file()), None)
        if found is None:
            self.metrics.unlink(missing_ok=True)
            return
        try:
            state = json.loads((found / "state.json").read_text())
        except ValueError:
            raise UserError(f"{found} is damaged; remove it to start again") from None
        if state["digest"] != self.digest:
            raise UserError(
                f"{self.out} holds another training (other options, data or classifiers); name another --out, or "
                f"remove {found}"
            )
        if any(FINGERPRINT in guide for guide in self.guides):
            bare = [{k: v for k, v in guide.items() if k != FINGERPRINT} for guide in self.guides]
            there, here = {"guides": state.get("guides", bare)}, {"guides": self.guides}
            refuse_other_run(found, there, here, trust_identity=self.trust_identity)
            self.guides = there["guides"]
        try:
            self.driver.load_state(str(found))
            if self.average is not None:
                self.average.load_state_dict(torch.load(found / _AVERAGE, map_location="cpu", weights_only=True))
        except Exception as error:  # of safetensors, pickle or zip
            raise UserError(f"{found} is damaged ({first_line(error)}); remove it to start again") from error
        self.step = self.saved = state["step"]
        self.best, self.best_step = state["best"], state["best_step"]
        if self.driver.is_main_process and self.metrics.is_file():
            lines = [line for line in self.metrics.read_text().splitlines() if _step_of(line) <= self.step]
            with self._writing(), replacing(self.metrics) as beside:
                beside.write_text("".join(line + "\n" for line in lines))

    def save(self) -> None:
        """Everything that is needed to go on."""
        self.driver.wait_for_everyone()
        with self._writing():
            self.driver.save_state(str(self.new))
            if self.driver.is_main_process:
                state = {"step": self.step, "best": self.best, "best_step": self.best_step, "digest": self.digest}
                state["guides"] = self.guides
                if self.average is not None:
                    torch.save(self.average.state_dict(), self.new / _AVERAGE)
                (self.new / "state.json").write_text(json.dumps(state))
                if self.folder.exists():
                    shutil.rmtree(self.old, ignore_errors=True)
                    os.replace(self.folder, self.old)
                os.replace(self.new, self.folder)
                shutil.rmtree(self.old, ignore_errors=True)
        self.saved, self._written = self.step, time.monotonic()
        self.driver.wait_for_everyone()

    def due(self, seconds: float) -> bool:
        """Whether the last checkpoint is older; of several processes the first one's clock decides, for all of them."""
        old = time.monotonic() - self._written > seconds
        if self.driver.num_processes == 1:
            return old
        from accelerate.utils import broadcast_object_list

        return bool(broadcast_object_list([old])[0])

    def judge(self, scores: Scores, keep: Callable[[Scores, int], None]) -> None:
        """Log figures on held-out images, and keep the weights if they are the best so far."""
        self.log({"held_out": scores})
        if not math.isfinite(scores["score"]):
            raise RunFault(
                f"held-out images give {scores['score']} at step {self.step}: stopped (try a smaller --rate)"
            )
        if scores["score"] < self.best.get("score", float("inf")):
            self.best, self.best_step = scores, self.step
            if self.driver.is_main_process:
                with self._writing():
                    keep(scores, self.step)

    def log(self, values: dict[str, Any]) -> None:
        """One line of metrics, flushed, and the same for TensorBoard."""
        flat = {f"held_out/{k}": v for k, v in values["held_out"].items()} if "held_out" in values else values
        with self._writing():
            if self.driver.is_main_process:
                with self.metrics.open("a") as file:
                    file.write(json.dumps({"step": self.step, **values}) + "\n")
            self.driver.log(flat, step=self.step)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk, in whosever words, stops the training and says what was kept."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save says RuntimeError
            kept = "there is no checkpoint yet"
            if self.saved:
                kept = f"the checkpoint of step {self.saved} is kept, and the same command goes on from it"
            raise RunFault(f"could not write to {self.out}: {first_line(error)}; {kept}") from error


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # torn
