"""The one training loop: a network from clean + noise to images or logits, checkpointed, resumed to the same result.

accelerate drives devices, mixed precision and several processes; everything random comes from (seed, step), so that a
training that was killed and goes on ends with the weights it would have had.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from certify.errors import RunFault, UserError
from certify.streams import block_generator, stream_key
from training.data import Levels, TrainingData, augment
from training.guides import Guides
from training.losses import OBJECTIVES, Batch
from training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

Scores = dict[str, float]
Validate = Callable[[nn.Module], Scores]
"""A network in evaluation mode to its figures on held-out images; ``score`` among them, smaller is better."""

_LOG_SECONDS = 5.0


@dataclass(frozen=True)
class Schedule:
    """When to write what.

    Attributes:
        validations: how often the held-out images are looked at.
        checkpoint_seconds: between checkpoints.
        stop_after: stop after so many steps of this call, as if killed there; None: to the end.
    """

    validations: int = 20
    checkpoint_seconds: float = 120.0
    stop_after: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What training came to.

    Attributes:
        steps: done in all.
        finished: whether that is all of them.
        best: the figures of the chosen weights.
        best_step: when they were reached.
        images_per_second: of this call, validation left out.
    """

    steps: int
    finished: bool
    best: Scores
    best_step: int
    images_per_second: float


def make_accelerator(device: str = "auto", precision: str = "float32", out: str | Path | None = None) -> Accelerator:
    """The driver from accelerate, with TensorBoard where it is installed.

    Args:
        device: ``auto`` or ``cuda``: an accelerator where there is one; ``cpu``.
        precision: ``float32``, ``bfloat16``, ``float16``.
        out: folder of the TensorBoard files, or None for none.

    Raises:
        UserError: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import is_tensorboard_available
    except ImportError:
        raise UserError("training needs accelerate: pip install 'certify-toolkit[train]'") from None
    mixed = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision]
    log = "tensorboard" if out is not None and is_tensorboard_available() else None
    driver = Accelerator(cpu=device == "cpu", mixed_precision=mixed, log_with=log, project_dir=str(out or "."))
    if log:
        driver.init_trackers("tensorboard")
    return driver


def train(
    net: nn.Module,
    data: TrainingData,
    recipe: Recipe,
    guides: Guides,
    out: str | Path,
    *,
    validate: Validate,
    keep: Callable[[nn.Module, Scores, int], None],
    driver: Accelerator,
    schedule: Schedule | None = None,
    compile: bool = False,
    progress: Callable[[int, float], None] = lambda images, loss: None,
) -> Outcome:
    """Train ``net`` in place, from the checkpoint in ``out`` if there is one.

    Args:
        net: ``forward(noisy, sigma)`` to images, or to logits.
        data: the images.
        recipe: how.
        guides: the frozen classifiers; empty where the objective needs none.
        out: folder for ``checkpoint/`` and ``metrics.jsonl``.
        validate: figures on held-out images.
        keep: called with the network whenever its score is the best so far; it writes the weights.
        driver: of :func:`make_accelerator`.
        schedule: when to validate and checkpoint.
        compile: whether the network is compiled.
        progress: told images done since the last call, and the loss.

    Raises:
        UserError: a checkpoint of another training in ``out``; an objective without what it needs.
        RunFault: the loss is no number any more; says where the last good weights are.
    """
    plan = schedule or Schedule()
    guides.to(driver.device)
    net.to(driver.device)
    if any(p.ndim == 4 for p in net.parameters()):
        net.to(memory_format=torch.channels_last)  # the layout that convolutions are fastest in
    optimizers = _optimizers(net, recipe)
    model, *prepared = driver.prepare(net, *optimizers)
    if compile:
        net.compile()
    state = _State(Path(out), recipe.digest(data.about, guides.describe(), driver.num_processes), driver)
    state.resume()
    steps = recipe.steps(len(data.train))
    every = max(1, steps // plan.validations)
    meter, saved, done = _Meter(), time.monotonic(), 0
    while state.step < steps and (plan.stop_after is None or done < plan.stop_after):
        model.train()
        loss = _step(model, prepared, data, recipe, guides, state.step, steps, driver)
        if not math.isfinite(loss):
            raise _no_number(f"the loss is {loss}", state, steps)
        state.step += 1
        done += 1
        meter.add(recipe.batch_size, loss)
        progress(recipe.batch_size, loss)
        last = state.step == steps
        if last or meter.since >= _LOG_SECONDS:
            state.log(
                {
                    "images": state.step * recipe.batch_size,
                    **meter.take(),
                    "rate": recipe.rate_at(state.step - 1, steps),
                }
            )
        if last or state.step % every == 0:
            begun = time.monotonic()
            model.eval()
            scores = validate(net)
            state.log({"held_out": scores})
            if scores["score"] < state.best.get("score", float("inf")):
                state.best, state.best_step = scores, state.step
                if driver.is_main_process:
                    keep(net, scores, state.step)
            meter.pause(time.monotonic() - begun)
        if last or time.monotonic() - saved > plan.checkpoint_seconds or state.step % every == 0:
            if not all(p.isfinite().all() for p in net.parameters()):
                raise _no_number("the weights are no numbers any more", state, steps)
            state.save()
            saved = time.monotonic()
    driver.end_training()
    return Outcome(state.step, state.step >= steps, state.best, state.best_step, meter.rate)


def _no_number(what: str, state: _State, steps: int) -> RunFault:
    return RunFault(
        f"{what} after step {state.step} of {steps}: stopped; the checkpoint of step {state.saved} and the best "
        f"weights so far are in {state.out} (try a smaller --rate)"
    )


def _optimizers(net: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Adam, SGD, or both where one takes over from the other."""
    trained = [p for p in net.parameters() if p.requires_grad]
    found: list[torch.optim.Optimizer] = []
    if recipe.optimizer != "sgd":
        found.append(torch.optim.Adam(trained, lr=recipe.rate, weight_decay=recipe.weight_decay))
    if recipe.optimizer != "adam":
        found.append(torch.optim.SGD(trained, lr=recipe.rate, momentum=0.9, weight_decay=recipe.weight_decay))
    return found


def _step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    data: TrainingData,
    recipe: Recipe,
    guides: Guides,
    step: int,
    steps: int,
    driver: Accelerator,
) -> float:
    """One step on this process's share of the batch; the loss."""
    objective = OBJECTIVES.get(recipe.phase(step, steps)[0])()
    indices, generator = draw_order(data.train, recipe, step, driver.process_index, driver.num_processes)
    clean, noisy, sigma = make_batch(data, indices, recipe, generator, driver.device)
    labels = data.labels[indices].to(driver.device) if data.labels is not None else None
    optimizer = optimizers[-1 if recipe.uses_sgd(step, steps) else 0]
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate_at(step, steps)
    optimizer.zero_grad()
    with driver.autocast():
        output = model(noisy, sigma)
        batch = Batch(clean, output, sigma, labels, guides.at(step), generator, recipe.queries)
        loss = objective.loss(batch)
    driver.backward(loss)
    optimizer.step()
    return float(loss.item())


def draw_order(train: Tensor, recipe: Recipe, step: int, rank: int, ranks: int) -> tuple[Tensor, torch.Generator]:
    """The images of this step and process, and the generator of everything else that is drawn for it."""
    first = step * recipe.batch_size
    position = torch.arange(first, first + recipe.batch_size)[rank::ranks]
    epochs = (position // len(train)).unique().tolist()
    chosen = torch.empty_like(position)
    for epoch in epochs:
        order = _epoch_order(len(train), recipe.seed, epoch)
        mine = position // len(train) == epoch
        chosen[mine] = train[order[position[mine] % len(train)]]
    return chosen, block_generator(stream_key(recipe.seed, f"rank {rank}", "train"), step)


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=block_generator(stream_key(seed, "order", "train"), epoch))


def make_batch(
    data: TrainingData, indices: Tensor, recipe: Recipe, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Clean images, images plus noise, and each image's noise level."""
    images = data.take(indices).to(device)
    clean = (augment(images, generator) if recipe.augment else images.float()) / 255
    sigma = Levels(recipe.sigmas, recipe.continuous).draw(len(indices), generator).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    return clean, clean + sigma[:, None, None, None] * noise, sigma


class _Meter:
    """Loss and speed since the last report, and speed overall; pauses do not count."""

    def __init__(self) -> None:
        self.begun = self.start = time.monotonic()
        self.images = self.all = 0
        self.losses: list[float] = []

    @property
    def since(self) -> float:
        return time.monotonic() - self.start

    @property
    def rate(self) -> float:
        return self.all / max(1e-9, time.monotonic() - self.begun)

    def add(self, images: int, loss: float) -> None:
        self.images += images
        self.all += images
        self.losses.append(loss)

    def pause(self, seconds: float) -> None:
        self.start += seconds
        self.begun += seconds

    def take(self) -> dict[str, float]:
        found = {"loss": sum(self.losses) / len(self.losses), "images_per_second": self.images / max(1e-9, self.since)}
        self.start, self.images, self.losses = time.monotonic(), 0, []
        return found


class _State:
    """Step and best score, in ``out``: a checkpoint is written beside the old one and then takes its place."""

    def __init__(self, out: Path, digest: str, driver: Accelerator) -> None:
        self.out, self.digest, self.driver = out, digest, driver
        self.step = self.saved = self.best_step = 0
        self.best: Scores = {}
        self.folder, self.old, self.new = (out / f"checkpoint{end}" for end in ("", ".old", ".new"))
        self.metrics = out / "metrics.jsonl"

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one; lines of metrics after it are dropped."""
        self.out.mkdir(parents=True, exist_ok=True)
        found = next((f for f in (self.folder, self.old) if (f / "state.json").is_file()), None)
        if found is None:
            self.metrics.unlink(missing_ok=True)
            return
        state = json.loads((found / "state.json").read_text())
        if state["digest"] != self.digest:
            raise UserError(
                f"{self.out} holds another training (other options, data or classifiers); name another --out, or "
                f"remove {found}"
            )
        self.driver.load_state(str(found))
        self.step = self.saved = state["step"]
        self.best, self.best_step = state["best"], state["best_step"]
        if self.driver.is_main_process and self.metrics.is_file():
            lines = [line for line in self.metrics.read_text().splitlines() if _step_of(line) <= self.step]
            beside = self.metrics.with_suffix(".new")
            beside.write_text("".join(line + "\n" for line in lines))
            os.replace(beside, self.metrics)

    def save(self) -> None:
        """Everything that is needed to go on."""
        self.driver.wait_for_everyone()
        self.driver.save_state(str(self.new))
        if self.driver.is_main_process:
            state = {"step": self.step, "best": self.best, "best_step": self.best_step, "digest": self.digest}
            (self.new / "state.json").write_text(json.dumps(state))
            if self.folder.exists():
                shutil.rmtree(self.old, ignore_errors=True)
                os.replace(self.folder, self.old)
            os.replace(self.new, self.folder)
            shutil.rmtree(self.old, ignore_errors=True)
        self.saved = self.step
        self.driver.wait_for_everyone()

    def log(self, values: dict[str, Any]) -> None:
        """One line of metrics, flushed, and the same for TensorBoard."""
        if self.driver.is_main_process:
            with self.metrics.open("a") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
        flat = {f"held_out/{k}": v for k, v in values["held_out"].items()} if "held_out" in values else values
        self.driver.log(flat, step=self.step)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # torn
