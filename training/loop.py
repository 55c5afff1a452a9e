"""The one training loop: a network from clean + noise to images or logits, checkpointed, resumed to the same result.

accelerate drives devices, mixed precision and several processes; everything random comes from (seed, step), so that a
training that was killed and goes on ends with the weights it would have had.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from certify.errors import RunFault, UserError, first_line
from certify.models.classifier import Classifier
from certify.smoothing.rng import block_generator, stream_key
from training.average import averaged, make_average
from training.checkpoint import Checkpoints, Meter, Scores, make_folder
from training.data import TrainingData, augment
from training.frozen_classifiers import Guides
from training.losses import Batch, Draw, Prepared
from training.muon import Muon
from training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

_LOG_SECONDS = 5.0
_MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # our names, accelerate's


@dataclass(frozen=True)
class Conduct:
    """How a training is conducted.

    Attributes:
        driver: of :func:`make_accelerator`.
        compile: whether the network is compiled.
        validations: how often the held-out images are looked at; the best of so many is kept.
        checkpoint_seconds: between checkpoints.
        stop_after: stop after so many steps of this call, as if killed there; None: to the end.
        progress: told images done since the last call, and the loss.
        command: what was typed, for the card.
        licence: of the weights, for the card.
        trust_identity: resume a checkpoint that cannot prove that its Python classifiers are still the same.
    """

    driver: Accelerator
    compile: bool = False
    validations: int = 20
    checkpoint_seconds: float = 120.0
    stop_after: int | None = None
    progress: Callable[[int, float], None] = lambda images, loss: None
    command: str = ""
    licence: str = "MIT"
    trust_identity: bool = False

    @property
    def precision(self) -> str:
        """The driver's arithmetic, as :func:`make_accelerator` calls it."""
        return next(name for name, mixed in _MIXED.items() if mixed == self.driver.mixed_precision)


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
        UserError: accelerate is not installed; half precision on a processor, which has no scaling of gradients; a
            folder that cannot be made.
    """
    if precision == "float16" and (device == "cpu" or not torch.cuda.is_available()):
        raise UserError("--precision float16 needs an accelerator; expected float32 or bfloat16 on a processor")
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import is_tensorboard_available
    except ImportError:
        raise UserError("training needs accelerate: pip install 'certify-toolkit[train]'") from None
    mixed = _MIXED[precision]
    log = "tensorboard" if out is not None and is_tensorboard_available() else None
    if AcceleratorState._shared_state.get("_mixed_precision", mixed) != mixed:
        AcceleratorState._reset_state()  # one state for the process: the training before this one had its own precision
    driver = Accelerator(cpu=device == "cpu", mixed_precision=mixed, log_with=log, project_dir=str(out or "."))
    if log:
        make_folder(str(out))
    return driver


def train(
    net: nn.Module,
    data: TrainingData,
    recipe: Recipe,
    guides: Guides,
    out: str | Path,
    conduct: Conduct,
    *,
    identity: Any,
    validate: Callable[[], Scores],
    keep: Callable[[Scores, int], None],
) -> Outcome:
    """Train ``net`` in place, from the checkpoint in ``out`` if there is one.

    Args:
        net: ``forward(noisy, sigma)`` to images, or to logits.
        data: the images.
        recipe: how.
        guides: the frozen classifiers; empty where the objective needs none.
        out: folder for ``checkpoint/`` and ``metrics.jsonl``.
        conduct: device, checkpoints, progress.
        identity: what the network is and starts from, as JSON; another one does not go on from this checkpoint.
        validate: the figures on held-out images of ``net``, then in evaluation mode; ``score`` among them, less is
            better.
        keep: called with the figures and the step whenever the score is the best; it writes the weights of ``net``.

    Raises:
        UserError: a checkpoint of another training in ``out``.
        RunFault: the loss is no number any more, or the disk is full; says what was kept.
    """
    driver = conduct.driver
    model, optimizers, average = _ready(net, data, recipe, guides, conduct)
    digest = recipe.digest(
        identity, data.image, data.about, conduct.validations, guides.describe(), driver.num_processes
    )
    state = Checkpoints(
        Path(out), digest, driver, average, guides=guides.records(), trust_identity=conduct.trust_identity
    )
    state.resume()
    if driver.log_with:
        driver.init_trackers("tensorboard")
    steps, start, meter = recipe.steps(len(data.train)), state.step, Meter()
    every = max(1, steps // conduct.validations)
    conduct.progress(start * recipe.batch_size, float("nan"))
    while state.step < steps and (conduct.stop_after is None or state.step - start < conduct.stop_after):
        model.train()
        _rest_frozen(net)
        loss = _step(model, optimizers, data, recipe, guides, state.step, steps, driver)
        if not math.isfinite(loss):
            raise _no_number(f"the loss is {loss}", state, steps)
        if average is not None:
            average.update_parameters(net)
        state.step += 1
        meter.add(recipe.batch_size, loss)
        conduct.progress(recipe.batch_size, loss)
        look = state.step == steps or state.step % every == 0
        if look or meter.since >= _LOG_SECONDS:
            rate = recipe.rate_at(state.step - 1, steps)
            state.log({"images": state.step * recipe.batch_size, **meter.take(), "rate": rate})
        if look or state.due(conduct.checkpoint_seconds):
            if not all(v.isfinite().all() for v in net.state_dict().values()):
                raise _no_number("the weights are no numbers any more", state, steps)
            if look:
                with meter.paused(), averaged(net, average):
                    model.eval()
                    state.judge(validate(), keep)
            state.save()
    driver.end_training()
    return Outcome(state.step, state.step >= steps, state.best, state.best_step, meter.rate)


def _ready(
    net: nn.Module, data: TrainingData, recipe: Recipe, guides: Guides, conduct: Conduct
) -> tuple[nn.Module, list[torch.optim.Optimizer], AveragedModel | None]:
    """The network as it is trained, on its device and perhaps compiled, its optimizers, and its average."""
    driver = conduct.driver
    driver.free_memory()  # of a training before this one with the same driver, whose network it would save
    torch.manual_seed(recipe.seed)  # for layers that draw
    guides.to(driver.device)
    net.to(driver.device)
    if any(p.ndim == 4 for p in net.parameters()):
        net.to(memory_format=torch.channels_last)  # the layout that convolutions are fastest in
    average = make_average(net, recipe.ema)
    model, *optimizers = driver.prepare(net, *_optimizers(net, recipe))
    if conduct.compile:
        _compile(net, data, recipe, guides, driver.device)
    return model, optimizers, average


def _rest_frozen(net: nn.Module) -> None:
    """Batch norms that are not trained keep the statistics they have."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine and not module.weight.requires_grad:
            module.eval()


def _compile(net: nn.Module, data: TrainingData, recipe: Recipe, guides: Guides, device: torch.device) -> None:
    """Compile the network if this machine can; if not, a warning, and it runs eagerly.

    The trial is two images as the objective shows them, there and back: some networks fail on the way back only.
    """
    objective = recipe.objectives[0]
    draw = draw_batch(data, data.train[:2], recipe, torch.Generator().manual_seed(0), guides.at(0), 0, device)
    with torch.no_grad():
        prepared = objective.prepare(draw)
    net.compile()
    net.eval()  # the trial must not count as batch statistics
    try:
        found = net(*prepared.inputs)
        (found[0] if isinstance(found, tuple) else found).square().mean().backward()
    except Exception as error:  # no compiler, an operator it does not know
        net._compiled_call_impl = None
        warnings.warn(f"the network cannot be compiled ({first_line(error)}); it runs eagerly", stacklevel=2)
    net.zero_grad(set_to_none=True)


def _no_number(what: str, state: Checkpoints, steps: int) -> RunFault:
    kept = f"the checkpoint of step {state.saved} is in {state.out}" if state.saved else "there is no checkpoint yet"
    best = f", and the best weights so far, of step {state.best_step}" if state.best else ""
    return RunFault(f"{what} after step {state.step} of {steps}: stopped; {kept}{best} (try a smaller --rate)")


def _optimizers(net: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Adam, SGD, both where one takes over from the other, or Muon."""
    if recipe.optimizer == "muon":
        return [Muon(net, recipe.rate, recipe.weight_decay)]
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
    objective, _, _ = recipe.phase(step, steps)
    indices, generator = draw_order(data.train, recipe, step, driver.process_index, driver.num_processes)
    draw = draw_batch(data, indices, recipe, generator, guides.at(step), step, driver.device)
    draw = draw.times(objective.draws)
    with torch.no_grad():
        prepared = objective.prepare(draw)
    optimizer = optimizers[-1 if recipe.uses_sgd(step, steps) else 0]
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate_at(step, steps)
    optimizer.zero_grad()
    with driver.autocast():
        loss = objective.loss(make_batch(draw, prepared, model(*prepared.inputs), recipe))
    if not loss.requires_grad:
        by = draw.classifier.name if draw.classifier else "the network"
        raise UserError(
            f"no gradient comes back through {by}; expected a torch model: train "
            "through a --surrogate, or by queries alone: --objective zeroth-order"
        )
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


def draw_batch(
    data: TrainingData,
    indices: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    guide: Classifier | None,
    step: int,
    device: torch.device,
) -> Draw:
    """Clean images, augmented, and each image's noise level and label."""
    images = data.take(indices).to(device)
    clean = (augment(images, generator) if recipe.augment else images.float()) / 255
    sigma = recipe.levels.draw(len(indices), generator).to(device)
    labels = data.labels[indices].to(device) if data.labels is not None else None
    return Draw(clean, sigma, labels, guide, generator, step * recipe.batch_size / len(data.train))


def make_batch(draw: Draw, prepared: Prepared, found: Any, recipe: Recipe) -> Batch:
    """What the objective gets to see: the draw, and what the network made of it."""
    output, *extra = found if isinstance(found, tuple) else (found,)
    return Batch(
        **vars(draw),
        output=output,
        queries=recipe.queries,
        temperature=recipe.temperature,
        extra=tuple(extra),
        prepared=prepared,
    )
