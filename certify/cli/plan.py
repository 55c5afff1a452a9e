"""Terminal output of a run during its course: what the options mean, how it is run, its cost and its progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from certify.cli.console import few_warnings, show_engine, show_prospects, speaker, stoppable
from certify.runs.progress import duration
from certify.runs.transaction import Observer
from certify.smoothing.norms import IN_WORDS
from certify.smoothing.procedures import samples

if TYPE_CHECKING:
    from torch import Tensor

    from certify.cli.option_groups import OutputOptions
    from certify.engine.execution import Execution
    from certify.runs.records import RunHeader
    from certify.runs.run_file import RunFile
    from certify.runs.transaction import Engine, Job


class Console(Observer):
    """Shows a run on stderr; a context manager that turns Ctrl-C into one line.

    Args:
        demonstration: a line about the images and samples that were chosen for the user, if they were.
        output: options on what is shown.
    """

    def __init__(self, demonstration: str, output: OutputOptions) -> None:
        super().__init__(shown=output.shown)
        self._say, self._demonstration = speaker(quiet=output.silent), demonstration
        self._stack = contextlib.ExitStack()
        self._warn_left_out: Callable[[str], None] = lambda text: None
        self.rate: float | None = None  # samples per second of one device
        self.samples = 0
        self.seconds: float | None = None  # of the whole run, estimated

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def resolved(self, job: Job, header: RunHeader, image: Tensor | None) -> None:
        """Show model, data and procedure."""
        smoothed, images, say = job.smoothed, job.images, self._say
        for step in header.pipeline:
            if step["step"] == "denoiser":
                trained = step.get("trained_for")
                about = f" ({step['objective']}, trained for sigma {trained})" if trained else ""
                say(f"denoiser   {step['name']}{about}, between the noise and the classifier")
                continue
            size = "x".join(map(str, step["input"])) if step["input"] else "any size"
            norm = f"mean {_list(step['mean'])} std {_list(step['std'])}" if step["mean"] else "none"
            say(f"model      {step['name']}: {step['num_classes']} classes, input {size}, weights: {step['weights']}")
            say(f"input      {step['transform']}; the noise is added there; then normalisation: {norm}")
        count = f"{len(images):,} of {images.available:,} images"
        say(f"data       {header.data}: {count}; labels: {images.rule}{images.omissions}")
        noise, stated = smoothed.noise, smoothed.stated(1 if image is None else image.numel())
        implied = "" if stated.norm == noise.norm else f", implied by the {IN_WORDS[noise.norm]} radius"
        about = f", {noise.name} noise, sigma = {noise.scale:g} in [0, 1] pixels"
        show_prospects(job.settings.procedure, stated, noise.scale, say, about, implied)

    def preparing(self) -> None:
        """Say that this takes a while."""
        self._say("engine     preparing the classifier ...")

    def running(self, job: Job, execution: Execution, where: str) -> None:
        """Show how the base classifier is run."""
        show_engine(execution, job.smoothed, self._say, where)

    def opened(self, file: RunFile, expected: int) -> None:
        """Show the run file; from now on Ctrl-C says what is kept."""
        present = f": {len(file.done):,} of {expected:,} images are there already" if file.resumed else ""
        self._say(f"run file   {file.path}{present}")
        if self._demonstration:
            self._say(self._demonstration)
        self._stack.enter_context(stoppable(file, expected, "images"))
        self._warn_left_out = self._stack.enter_context(few_warnings("; the run file says why"))

    def ready(self, job: Job, engine: Engine, image: Tensor, left: int, devices: int) -> None:
        """Measure the speed and show the cost."""
        procedure = job.settings.procedure
        each = samples(procedure)
        self.rate, self.samples = engine.measure_rate(image), left * each
        if self.rate is not None:
            self.seconds = self.samples / (self.rate * devices)
            most = "at most " if procedure.sequential else ""
            work = f"{left:,} images x {most}{each:,} samples = {self.samples:,}"
            self._say(f"cost       {work}: {most}about {duration(self.seconds)}")

    def left_out(self, text: str) -> None:
        """Warn of an image; of many, the first are named."""
        self._warn_left_out(text)


def _list(values: Any) -> str:
    return ",".join(f"{v:g}" for v in values)
