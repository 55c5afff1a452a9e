"""Output folder of a training: checkpoints, metrics and best scores; and a meter of loss and throughput."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
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
_SHORT = 60  # characters of a setting that a message shows
Scores = dict[str, float]
"""Figures on held-out images by name; ``score`` is among them, and lower is better."""


class Meter:
    """Loss and throughput since the last report, and overall throughput; pauses do not count."""

    def __init__(self) -> None:
        self.begun = self.start = time.monotonic()
        self.images = self.total = 0
        self.losses: list[float] = []

    @property
    def since(self) -> float:
        """Seconds since the last report."""
        return time.monotonic() - self.start

    @property
    def rate(self) -> float:
        """Images per second overall."""
        return self.total / max(1e-9, time.monotonic() - self.begun)

    def add(self, images: int, loss: float) -> None:
        """Count one step."""
        self.images += images
        self.total += images
        self.losses.append(loss)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of a block."""
        begun = time.monotonic()
        yield
        self.start += time.monotonic() - begun
        self.begun += time.monotonic() - begun

    def take(self) -> dict[str, float]:
        """Return mean loss and images per second since the last call, and start anew."""
        report = {"loss": sum(self.losses) / len(self.losses), "images_per_second": self.images / max(1e-9, self.since)}
        self.start, self.images, self.losses = time.monotonic(), 0, []
        return report


def make_folder(out: str | Path) -> None:
    """Create the output folder if it is missing.

    Raises:
        UserError: it cannot be created.
    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}; expected a folder") from None


class Checkpoints:
    """Step, best scores and checkpoint files of a training; a new checkpoint replaces the old one atomically.

    Args:
        out: output folder.
        digest: hash of everything that must be equal for a training to be resumed.
        accelerator: saves and loads the network, the optimizers and their states.
        average: EMA of the weights to save with them, or None.
        settings: what the digest is made from, so that a refusal can name what differs.
        classifiers: records of the frozen classifiers, which must be equal too.
        trust_identity: resume from a checkpoint that cannot prove that they are.
    """

    def __init__(
        self,
        out: Path,
        digest: str,
        accelerator: Accelerator,
        average: nn.Module | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        classifiers: Sequence[Mapping[str, Any]] = (),
        trust_identity: bool = False,
    ) -> None:
        self.out, self.digest, self.accelerator, self.average = out, digest, accelerator, average
        self.classifiers, self.trust_identity = [dict(record) for record in classifiers], trust_identity
        self.settings = json.loads(json.dumps(settings or {}, default=str))
        self.step = self.saved = self.best_step = 0
        self._written = time.monotonic()
        self.best: Scores = {}
        self.folder, self.old, self.new = (out / f"checkpoint{end}" for end in ("", ".old", ".new"))
        self.metrics = out / "metrics.jsonl"

    def kept(self, advice: str = "; the same command resumes there") -> str:
        """Return the part of an error message about the last checkpoint; ``advice`` follows if there is one."""
        return f"the checkpoint of step {self.saved:,} is in {self.out}{advice}" if self.saved else "no checkpoint yet"

    def resume(self) -> None:
        """Load the checkpoint, if there is one, and drop later lines of the metrics.

        Raises:
            UserError: the checkpoint is damaged, or that of another training.
        """
        make_folder(self.out)
        folder = next((f for f in (self.folder, self.old) if (f / "state.json").is_file()), None)
        if folder is None:
            self.metrics.unlink(missing_ok=True)
            return
        try:
            state = json.loads((folder / "state.json").read_text())
        except (ValueError, RecursionError):
            raise UserError(f"{folder} is damaged; remove it to start again") from None
        if state["digest"] != self.digest:
            different = self._differences(state.get("settings", {}))
            raise UserError(f"{self.out} holds another training ({different}); use another --out, or remove {folder}")
        if any(FINGERPRINT in record for record in self.classifiers):
            bare = [{k: v for k, v in record.items() if k != FINGERPRINT} for record in self.classifiers]
            there, here = {"guides": state.get("guides", bare)}, {"guides": self.classifiers}
            refuse_other_run(folder, there, here, trust_identity=self.trust_identity)
            self.classifiers = there["guides"]
        try:
            self.accelerator.load_state(str(folder))
            if self.average is not None:
                self.average.load_state_dict(torch.load(folder / _AVERAGE, map_location="cpu", weights_only=True))
        except Exception as error:  # of safetensors, pickle or zipfile
            raise UserError(f"{folder} is damaged ({first_line(error)}); remove it to start again") from error
        self.step = self.saved = state["step"]
        self.best, self.best_step = state["best"], state["best_step"]
        if self.accelerator.is_main_process and self.metrics.is_file():
            lines = [line for line in self.metrics.read_text().splitlines() if _step_of(line) <= self.step]
            with self._writing(), replacing(self.metrics) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines))

    def _differences(self, there: Mapping[str, Any]) -> str:
        """Describe the settings that differ from those of the checkpoint."""
        differing = [key for key in self.settings if key in there and there[key] != self.settings[key]]

        def value(settings: Mapping[str, Any], key: str) -> str:
            text = json.dumps(settings[key])
            return text if len(text) <= _SHORT else "others"

        shown = [f"{key} {value(there, key)} there, {value(self.settings, key)} here" for key in differing]
        return "; ".join(shown) or "other options, data or classifiers"

    def save(self) -> None:
        """Write a checkpoint."""
        self.accelerator.wait_for_everyone()
        with self._writing():
            self.accelerator.save_state(str(self.new))
            if self.accelerator.is_main_process:
                state = {"step": self.step, "best": self.best, "best_step": self.best_step, "digest": self.digest}
                state["guides"], state["settings"] = self.classifiers, self.settings
                if self.average is not None:
                    torch.save(self.average.state_dict(), self.new / _AVERAGE)
                (self.new / "state.json").write_text(json.dumps(state))
                if self.folder.exists():
                    shutil.rmtree(self.old, ignore_errors=True)
                    os.replace(self.folder, self.old)
                os.replace(self.new, self.folder)
                shutil.rmtree(self.old, ignore_errors=True)
        self.saved, self._written = self.step, time.monotonic()
        self.accelerator.wait_for_everyone()

    def due(self, seconds: float) -> bool:
        """True if the last checkpoint is older than this; the first process decides for all."""
        old = time.monotonic() - self._written > seconds
        if self.accelerator.num_processes == 1:
            return old
        from accelerate.utils import broadcast_object_list

        return bool(broadcast_object_list([old])[0])

    def update_best(self, scores: Scores, save_weights: Callable[[Scores, int], None]) -> None:
        """Log scores on held-out images, and save the weights if they are the best so far.

        Raises:
            RunFault: the score is not finite.
        """
        self.log({"held_out": scores})
        if not math.isfinite(scores["score"]):
            raise RunFault(f"the held-out score is {scores['score']} at step {self.step}: stopped (try a lower --rate)")
        if scores["score"] < self.best.get("score", float("inf")):
            self.best, self.best_step = scores, self.step
            if self.accelerator.is_main_process:
                with self._writing():
                    save_weights(scores, self.step)

    def log(self, values: dict[str, Any]) -> None:
        """Append a line to the metrics, and log the same to TensorBoard."""
        flat = {f"held_out/{k}": v for k, v in values["held_out"].items()} if "held_out" in values else values
        with self._writing():
            if self.accelerator.is_main_process:
                with self.metrics.open("a") as file:
                    file.write(json.dumps({"step": self.step, **values}) + "\n")
            self.accelerator.log(flat, step=self.step)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn write errors, such as a full disk, into a RunFault that names the last checkpoint."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
            raise RunFault(f"could not write to {self.out}: {first_line(error)}; {self.kept()}") from error


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], int | None]]:
    """Defer the first Ctrl-C or SIGTERM, so that a step can end and be saved; the second one interrupts at once.

    Yields:
        A function that returns the number of the signal that has arrived, or None. Outside the main thread, which
        alone receives signals, it always returns None.
    """
    earlier: dict[int, Any] = {}
    arrived: list[int] = []

    def restore() -> None:
        while earlier:
            signal.signal(*earlier.popitem())

    def defer(number: int, _frame: Any) -> None:
        arrived.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(number)):
                earlier[number] = handler
                signal.signal(number, defer)
    try:
        yield lambda: arrived[0] if arrived else None
    finally:
        restore()


def _step_of(line: str) -> int:
    """Return the step of a line of metrics; of a torn line, a number above all steps."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62
