"""The training loop: one network from noisy images to images or logits, with checkpoints and exact resumption.

accelerate handles devices, mixed precision and several processes. All random numbers are keyed by (seed, step), so that
a training that was killed and resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from certify.errors import RunFault, Stopped, UserError, first_line
from certify.models.classifier import Classifier
from certify.runs.progress import duration
from certify.smoothing.rng import block_generator, stream_key
from training.checkpoint import Checkpoints, Meter, Scores, deferred_interrupts, make_folder
from training.data import TrainingData, augment
from training.frozen_classifiers import FrozenClassifiers
from training.losses import Batch, Draw, Prepared
from training.optimizers import averaged, make_average, make_optimizers
from training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST = 500
"""Maximum number of held-out images used to choose weights."""

COST_AFTER = 3
"""Steps after which the cost of a training is estimated."""

_LOG_SECONDS = 5.0
_MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # our names -> accelerate's


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of a training that do not define its result.

    Attributes:
        accelerator: from :func:`make_accelerator`.
        compile: compile the network.
        validations: number of validations on held-out images; the best weights among them are kept.
        checkpoint_seconds: time between checkpoints.
        stop_after: stop after this many steps of this call, as if killed; None: train to the end.
        progress: called with the number of images since the last call, and the loss.
        say: called with a line about the training, such as the step that it resumes from.
        command: command line, for the card.
        licence: of the weights, for the card.
        trust_identity: resume from a checkpoint that cannot prove that its Python classifiers are still the same.
    """

    accelerator: Accelerator
    compile: bool = False
    validations: int = 20
    checkpoint_seconds: float = 120.0
    stop_after: int | None = None
    progress: Callable[[int, float], None] = lambda images, loss: None
    say: Callable[[str], None] = lambda text: None
    command: str = ""
    licence: str = "MIT"
    trust_identity: bool = False

    @property
    def precision(self) -> str:
        """The accelerator's precision, as :func:`make_accelerator` names it."""
        return next(name for name, mixed in _MIXED.items() if mixed == self.accelerator.mixed_precision)


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training.

    Attributes:
        steps: steps done, including those before a resumption.
        finished: True if all steps are done.
        best: held-out scores of the weights that were kept.
        best_step: the step of these weights.
        images_per_second: throughput of this call without validation.
        of: steps of the whole training.
        held_out: number of held-out images that weights are chosen by.
    """

    steps: int
    finished: bool
    best: Scores
    best_step: int
    images_per_second: float
    of: int
    held_out: int


def make_accelerator(device: str = "auto", precision: str = "float32", out: str | Path | None = None) -> Accelerator:
    """Build accelerate's driver, with TensorBoard if it is installed.

    Args:
        device: ``auto`` or ``cuda``: an accelerator if there is one; ``cpu``.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        out: folder for TensorBoard, or None.

    Raises:
        UserError: accelerate is not installed; float16 on a CPU, which has no gradient scaling; ``out`` cannot be
            created.
    """
    if precision == "float16" and (device == "cpu" or not torch.cuda.is_available()):
        raise UserError("--precision float16 needs an accelerator; expected float32 or bfloat16 on a CPU")
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import is_tensorboard_available
    except ImportError:
        raise UserError("training needs accelerate: pip install 'certify-toolkit[train]'") from None
    mixed = _MIXED[precision]
    log = "tensorboard" if out is not None and is_tensorboard_available() else None
    if AcceleratorState._shared_state.get("_mixed_precision", mixed) != mixed:
        AcceleratorState._reset_state()  # it is global, and an earlier training had another precision
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed, log_with=log, project_dir=str(out or "."))
    if log:
        make_folder(str(out))
    return accelerator


def train(
    net: nn.Module,
    data: TrainingData,
    recipe: Recipe,
    classifiers: FrozenClassifiers,
    out: str | Path,
    config: TrainerConfig,
    *,
    identity: Any,
    validate: Callable[[], Scores],
    save_weights: Callable[[Scores, int], None],
) -> TrainingResult:
    """Train a network in place, from the checkpoint in ``out`` if there is one.

    Args:
        net: ``forward(noisy, sigma)`` to images or logits.
        data: training images.
        recipe: objective, noise levels, optimizer, seed.
        classifiers: frozen classifiers for the objective; may be empty.
        out: folder for ``checkpoint/`` and ``metrics.jsonl``.
        config: device, checkpoints, progress.
        identity: architecture and initial weights of the network, as JSON; a checkpoint of another one is refused.
        validate: computes the scores of ``net``, in evaluation mode, on held-out images.
        save_weights: called with scores and step whenever the score is the best so far.

    Raises:
        UserError: ``out`` holds a checkpoint of another training.
        RunFault: loss or weights are not finite, or the disk is full; the message names the last checkpoint.
        Stopped: by Ctrl-C or SIGTERM. The step in progress is finished and saved first, unless there is a second signal
            or several processes share the training.
    """
    accelerator = config.accelerator
    model, optimizers, average = _prepare(net, data, recipe, classifiers, config)
    processes = accelerator.num_processes
    digest = recipe.digest(identity, data.image, data.about, config.validations, classifiers.describe(), processes)
    records, trust = classifiers.records(), config.trust_identity
    settings = {**recipe.describe(), "network": identity, "image": data.image, "data": data.about}
    settings |= {"validations": config.validations, "classifiers": classifiers.describe(), "processes": processes}
    state = Checkpoints(
        Path(out), digest, accelerator, average, settings=settings, classifiers=records, trust_identity=trust
    )
    state.resume()
    if accelerator.log_with:
        accelerator.init_trackers("tensorboard")
    steps, start, meter = recipe.steps(len(data.train)), state.step, Meter()
    interval = max(1, steps // config.validations)
    config.progress(start * recipe.batch_size, float("nan"))
    if start:
        config.say(f"resuming   from step {start:,} of {steps:,}")
    with _stoppable(state, steps) as stopped:
        while state.step < steps and (config.stop_after is None or state.step - start < config.stop_after):
            model.train()
            _freeze_batch_norms(net)
            loss = train_step(model, optimizers, data, recipe, classifiers, state.step, steps, accelerator)
            if not math.isfinite(loss):
                raise _diverged(f"the loss is {loss}", state, steps)
            if average is not None:
                average.update_parameters(net)
            state.step += 1
            meter.add(recipe.batch_size, loss)
            config.progress(recipe.batch_size, loss)
            if state.step == start + COST_AFTER:
                left = steps - state.step
                time_left = duration(left * recipe.batch_size / meter.rate)
                config.say(f"cost       about {time_left} for {left:,} more steps, without validation")
            validating = state.step == steps or state.step % interval == 0
            if validating or meter.since >= _LOG_SECONDS:
                rate = recipe.rate_at(state.step - 1, steps)
                state.log({"images": state.step * recipe.batch_size, **meter.take(), "rate": rate})
            interrupted = stopped()
            if validating or interrupted or state.due(config.checkpoint_seconds):
                if not all(v.isfinite().all() for v in net.state_dict().values()):
                    raise _diverged("weights are not finite", state, steps)
                if validating:
                    with meter.paused(), averaged(net, average):
                        model.eval()
                        state.update_best(validate(), save_weights)
                state.save()
            if interrupted:
                signal.raise_signal(interrupted)
    accelerator.end_training()
    return TrainingResult(
        state.step, state.step >= steps, state.best, state.best_step, meter.rate, steps, len(data.held_out[:MOST])
    )


def _prepare(
    net: nn.Module, data: TrainingData, recipe: Recipe, classifiers: FrozenClassifiers, config: TrainerConfig
) -> tuple[nn.Module, list[torch.optim.Optimizer], AveragedModel | None]:
    """Move the network to its device, compile it if asked to, and build its optimizers and its EMA."""
    accelerator = config.accelerator
    accelerator.free_memory()  # forget the network of an earlier training, which it would save too
    torch.manual_seed(recipe.seed)  # for random layers
    classifiers.to(accelerator.device)
    net.to(accelerator.device)
    if any(p.ndim == 4 for p in net.parameters()):
        net.to(memory_format=torch.channels_last)  # the fastest layout for convolutions
    average = make_average(net, recipe.ema)
    model, *optimizers = accelerator.prepare(net, *make_optimizers(net, recipe))
    if config.compile:
        _compile(net, data, recipe, classifiers, accelerator.device)
    return model, optimizers, average


def _freeze_batch_norms(net: nn.Module) -> None:
    """Put frozen batch norms into evaluation mode, so that they keep their statistics."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine and not module.weight.requires_grad:
            module.eval()


def _compile(
    net: nn.Module, data: TrainingData, recipe: Recipe, classifiers: FrozenClassifiers, device: torch.device
) -> None:
    """Compile the network, or warn and leave it eager if that fails.

    It is tried on two prepared images, forward and backward: some networks fail in the backward pass only.
    """
    objective = recipe.objectives[0]
    draw = draw_batch(data, data.train[:2], recipe, torch.Generator().manual_seed(0), classifiers.at(0), 0, device)
    with torch.no_grad():
        prepared = objective.prepare(draw)
    net.compile()
    net.eval()  # keep the trial out of the batch statistics
    try:
        output = net(*prepared.inputs)
        (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    except Exception as error:  # no compiler, or an unsupported operator
        net._compiled_call_impl = None
        warnings.warn(f"the network cannot be compiled ({first_line(error)}); it runs eagerly", stacklevel=2)
    net.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _stoppable(state: Checkpoints, steps: int) -> Iterator[Callable[[], int | None]]:
    """Turn Ctrl-C and SIGTERM into an error of one line that names the last checkpoint; see :func:`train`.

    Yields:
        The function of :func:`training.checkpoint.deferred_interrupts`.
    """
    several = state.accelerator.num_processes > 1  # which would wait for each other
    try:
        with contextlib.nullcontext(lambda: None) if several else deferred_interrupts() as stopped:
            yield stopped
    except KeyboardInterrupt:
        raise Stopped(f"stopped after step {state.step:,} of {steps:,}; {state.kept()}") from None


def _diverged(reason: str, state: Checkpoints, steps: int) -> RunFault:
    kept = state.kept(f", with the best weights so far, of step {state.best_step:,}" if state.best else "")
    return RunFault(f"{reason} after step {state.step:,} of {steps:,}: stopped; {kept} (try a lower --rate)")


def train_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    data: TrainingData,
    recipe: Recipe,
    classifiers: FrozenClassifiers,
    step: int,
    steps: int,
    accelerator: Accelerator,
) -> float:
    """Take one step on this process's share of the batch, and return the loss.

    Raises:
        UserError: no gradient reaches the network through the classifier.
    """
    objective, _, _ = recipe.phase(step, steps)
    indices, generator = draw_order(data.train, recipe, step, accelerator.process_index, accelerator.num_processes)
    draw = draw_batch(data, indices, recipe, generator, classifiers.at(step), step, accelerator.device)
    draw = draw.repeat(objective.draws)
    with torch.no_grad():
        prepared = objective.prepare(draw)
    optimizer = optimizers[-1 if recipe.uses_sgd(step, steps) else 0]
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate_at(step, steps)
    optimizer.zero_grad()
    with accelerator.autocast():
        loss = objective.loss(make_batch(draw, prepared, model(*prepared.inputs), recipe))
    if not loss.requires_grad:
        name = draw.classifier.name if draw.classifier else "the network"
        raise UserError(
            f"{name} passes no gradients; expected a PyTorch model: pass --surrogate, or train by queries: "
            "--objective zeroth-order"
        )
    accelerator.backward(loss)
    optimizer.step()
    return float(loss.item())


def draw_order(train: Tensor, recipe: Recipe, step: int, rank: int, ranks: int) -> tuple[Tensor, torch.Generator]:
    """Return a process's image indices of a step, and the generator of all its other random numbers."""
    first = step * recipe.batch_size
    position = torch.arange(first, first + recipe.batch_size)[rank::ranks]
    epochs = position // len(train)
    chosen = torch.empty_like(position)
    for epoch in epochs.unique().tolist():
        order = _epoch_order(len(train), recipe.seed, epoch)
        here = epochs == epoch
        chosen[here] = train[order[position[here] % len(train)]]
    return chosen, block_generator(stream_key(recipe.seed, f"rank {rank}", "train"), step)


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=block_generator(stream_key(seed, "order", "train"), epoch))


def draw_batch(
    data: TrainingData,
    indices: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    classifier: Classifier | None,
    step: int,
    device: torch.device,
) -> Draw:
    """Load and augment images, and draw a noise level for each."""
    images = data.take(indices).to(device)
    clean = (augment(images, generator) if recipe.augment else images.float()) / 255
    sigma = recipe.levels.draw(len(indices), generator).to(device)
    labels = data.labels[indices].to(device) if data.labels is not None else None
    return Draw(clean, sigma, labels, classifier, generator, step * recipe.batch_size / len(data.train))


def make_batch(draw: Draw, prepared: Prepared, outputs: Any, recipe: Recipe) -> Batch:
    """Combine a draw with the network's outputs, for the loss."""
    output, *extra = outputs if isinstance(outputs, tuple) else (outputs,)
    return Batch(
        **vars(draw),
        output=output,
        queries=recipe.queries,
        temperature=recipe.temperature,
        extra=tuple(extra),
        prepared=prepared,
    )
