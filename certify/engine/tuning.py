"""Which way of running a base classifier is the fastest here, for so much work: measured, decided, remembered.

Deciding may cost a few hundredths of the run, so little work is done without asking. A choice is remembered for this
machine, so that the same command computes the same way again; a resumed run takes what its file says.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from certify import __version__
from certify.engine.execution import PRECISIONS, Execution, cache_folder, convertible, default_batch_size, prepare
from certify.engine.hardware import machine_name, product_speed, room_for_inputs
from certify.engine.monte_carlo import label_batch
from certify.errors import CertifyError, UserError
from certify.smoothing.numeric import as_int
from certify.smoothing.rng import block_generator, block_size
from certify.types import BaseClassifier, Noise

LITTLE_WORK = 2**24
"""Values (samples x C x H x W) below which nothing is measured, folded or compiled."""

_WINDOW = 0.2  # seconds of one measurement, at most
_SHORT = 5.0  # seconds: a shorter run is not worth measuring precisions and batch sizes for
_SHARE = 0.02  # of the run that may go into measuring, compilation apart
_FASTER = 1.05  # what counts as faster: below, it may be the machine's noise
_WORTH_TRYING = 1.5  # a precision's matrix products over float32's
_AGREEMENT = 0.95  # of labels with float32: below, a precision is not chosen

_REMEMBERED = 500  # choices

# What compiling costs and brings, before it was tried here (benchmarks/log.md).
_COMPILE_SECONDS, _COMPILE_SECONDS_A_LAYER = 5.0, 0.05
_COMPILE_GAIN = {"float32": 1.2, "bfloat16": 1.5, "float16": 1.5}
_COMPILE_MARGIN = 4.0  # compile when it should save so many times what it costs
_COMPILE_LONGEST = 300.0  # seconds; given up earlier where it has taken what it should save


@dataclass(frozen=True)
class Wanted:
    """What the user asks for; ``auto`` (None for the batch size) leaves it to measurements.

    Attributes:
        precision: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        compile: ``auto``, ``on`` or ``off``.
        batch_size: samples a forward pass.
    """

    precision: str = "auto"
    compile: str = "auto"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in ("auto", *PRECISIONS):
            raise UserError(f"precision {self.precision!r}; expected auto, {', '.join(PRECISIONS)}")
        if self.compile not in ("auto", "on", "off"):
            raise UserError(f"compile {self.compile!r}; expected auto, on or off")
        if self.batch_size is not None:
            object.__setattr__(self, "batch_size", as_int(self.batch_size, "batch_size"))
            if self.batch_size < 1:
                raise UserError(f"batch size {self.batch_size}; expected a whole number from 1, or None for auto")


def choose(
    base: BaseClassifier, example: Tensor, noise: Noise, samples: int, wanted: Wanted, *, again: bool = False
) -> tuple[BaseClassifier, Execution]:
    """The base classifier run in the fastest way for so many samples, and what that is and why.

    Args:
        base: the base classifier in float32, on its device.
        example: one clean image ``(C, H, W)`` on the same device.
        noise: the smoothing distribution.
        samples: noisy copies that the run holds.
        wanted: what is fixed already.
        again: measure although a choice is remembered, and leave that one as it is.
    """
    size = wanted.batch_size or default_batch_size(example)
    precision = "float32" if wanted.precision == "auto" else wanted.precision
    first = Execution(precision, folded=False, compiled=False, batch_size=size)
    if not convertible(base) or samples * example.numel() <= LITTLE_WORK:
        why = ("little work: nothing measured",) if convertible(base) else ()
        return prepare(base, replace(first, compiled=wanted.compile == "on", why=why), example)
    key = _key(base, example, samples, wanted)
    remembered = None if again else _recall(key)
    if remembered is not None:
        return prepare(base, remembered, example, compile_seconds=_limit(wanted, _COMPILE_LONGEST))
    search = _Search(base, example, noise, samples, first)
    if (wanted.precision, wanted.compile) != ("float32", "off"):  # which asks for the classifier untouched
        search.fold()
    if search.seconds > _SHORT:
        if wanted.precision == "auto":
            search.precisions()
        if wanted.batch_size is None:
            search.batch_sizes()
    if wanted.compile == "on" or (wanted.compile == "auto" and search.compiling_pays()):
        search.compile(_limit(wanted, search.saved))
    if not again and not search.best.failed:
        _remember(key, search.best)
    return search.run, search.best


class _Search:
    """The fastest execution found so far, its speed, and what was learnt on the way."""

    def __init__(self, base: BaseClassifier, example: Tensor, noise: Noise, samples: int, first: Execution) -> None:
        self.base, self.example, self.noise, self.samples = base, example, noise, samples
        self.run, self.best = prepare(base, first, example)
        batch = self.batch(first.batch_size)
        self.best = replace(self.best, batch_size=label_batch(self.run, batch)[1])
        self.window = 0.0
        self.speed = measure_speed(self.run, batch, self.window)
        self.window = min(_WINDOW, _SHARE / 4 * self.seconds)

    @property
    def seconds(self) -> float:
        """What the run takes at the speed found so far."""
        return self.samples / self.speed

    def batch(self, size: int) -> Tensor:
        generator = block_generator(b"tune" * 8, 0, self.example.device)
        drawn = self.noise.sample((size, *self.example.shape), generator)
        return self.noise.add(self.example, drawn.to(self.example.device))

    def better(
        self, run: BaseClassifier, execution: Execution, factor: float, *, rounds: int = 2
    ) -> tuple[float, float]:
        """Both in turn; the new one is taken when it is so many times faster. Returns the old and the new speed."""
        mine, other = self.batch(self.best.batch_size), self.batch(execution.batch_size)
        window = self.window
        label_batch(run, other)  # warms up
        turns = [(measure_speed(self.run, mine, window), measure_speed(run, other, window)) for _ in range(rounds)]
        old, new = max(a for a, _ in turns), max(b for _, b in turns)
        self.speed = old
        if new > factor * old:
            self.run, self.best, self.speed = run, replace(execution, why=self.best.why), new
        return old, new

    def say(self, why: str) -> None:
        self.best = replace(self.best, why=(*self.best.why, why))

    def fold(self) -> None:
        """Batch norms into convolutions, where there are any and it helps."""
        run, real = prepare(self.base, replace(self.best, folded=True), self.example)
        if real.folded:
            old, new = self.better(run, real, 1.0)
            self.say(f"batch norms {'' if self.best.folded else 'not '}folded: {new:,.0f} samples/s against {old:,.0f}")

    def precisions(self) -> None:
        """16-bit arithmetic, where the machine is faster at it and the labels stay."""
        full = product_speed("float32", self.example.device)
        gains = {p: product_speed(p, self.example.device) / full for p in ("bfloat16", "float16")}
        if max(gains.values()) < _WORTH_TRYING:
            slow = " and ".join(f"{gain:.2g} in {precision}" for precision, gain in gains.items())
            self.say(f"float32: matrix products run at {slow} of its speed here")
        for precision in (p for p, gain in gains.items() if gain >= _WORTH_TRYING):
            try:
                run, real = prepare(self.base, replace(self.best, precision=precision), self.example)
                agreement = self.agreement(run)
            except CertifyError as error:
                self.say(f"not {precision}: {error}")
                continue
            if agreement < _AGREEMENT:
                self.say(f"not {precision}: {agreement:.0%} of labels agree with float32's")
                continue
            old, new = self.better(run, real, 1.2)
            if self.best.precision == precision:
                self.say(f"{precision}: {new:,.0f} samples/s against float32's {old:,.0f}")
                return
            self.say(f"not {precision}: {new / old:.2f} times float32's speed")

    def agreement(self, run: BaseClassifier) -> float:
        noisy = self.batch(min(100, max(8, int(_SHARE * self.samples))))
        return float((label_batch(self.base, noisy)[0] == label_batch(run, noisy)[0]).double().mean())

    def batch_sizes(self) -> None:
        """Larger batches while they are faster; if the first is not, smaller ones. Stops at its share of the time."""
        end = time.perf_counter() + min(_SHARE * self.seconds, 20.0)
        sizes = [self.best.batch_size]
        for factor in (4.0, 0.25):
            size = round(self.best.batch_size * factor)
            while size >= 1 and size * self.example.numel() <= room_for_inputs(self.example.device):
                if time.perf_counter() + 5 * size / self.speed > end:
                    break
                sizes.append(size)
                if not self._faster_in(size):
                    break
                size = round(size * factor)
            if self.best.batch_size != sizes[0]:
                break
        if len(sizes) > 1:
            self.say(f"batches of {self.best.batch_size}: {self.speed:,.0f} samples/s, fastest of {sorted(sizes)}")

    def _faster_in(self, size: int) -> bool:
        if label_batch(self.run, self.batch(size))[1] < size:  # it does not fit in memory
            return False
        self.better(self.run, replace(self.best, batch_size=size), _FASTER)
        return self.best.batch_size == size

    @property
    def saved(self) -> float:
        """Seconds of the run that compilation should save, by what was measured elsewhere."""
        return self.seconds * (1 - 1 / _COMPILE_GAIN[self.best.precision])

    def compiling_pays(self) -> bool:
        """Whether the time it saves is well above what it costs, by what was measured elsewhere."""
        cost = _compile_seconds(self.base)
        if self.saved >= _COMPILE_MARGIN * cost:
            return True
        needed = self.samples * _COMPILE_MARGIN * cost / self.saved
        self.say(
            f"eager: compiling would take about {cost:.0f} s and pay from {_round(needed):,} samples; "
            f"this run has {self.samples:,}"
        )
        return False

    def compile(self, limit: float | None) -> None:
        """Compile within so many seconds, and keep it if it is faster; without a limit because it is wanted, always."""
        start = time.perf_counter()
        run, real = prepare(self.base, replace(self.best, compiled=True), self.example, compile_seconds=limit)
        cost = time.perf_counter() - start
        if not real.compiled:
            self.best = real
            return
        old, new = self.better(run, real, 0.0 if limit is None else _FASTER, rounds=3)
        how = "compiled" if self.best.compiled else "eager: compiled"
        self.say(f"{how} in {cost:.0f} s: {new:,.0f} samples/s against {old:,.0f} eagerly")


def measure_speed(run: BaseClassifier, batch: Tensor, seconds: float) -> float:
    """Samples a second of one batch again and again, for so long but at least once, once warm."""
    done, start = 0, time.perf_counter()
    while not done or time.perf_counter() - start < seconds:
        label_batch(run, batch)[0].cpu()
        done += len(batch)
    return done / (time.perf_counter() - start)


def measure_rate(run: BaseClassifier, example: Tensor, noise: Noise, size: int) -> float:
    """Samples a second, noise included: one block of it and some batches."""
    length = block_size(example.numel())
    generator = block_generator(b"rate" * 8, 0, example.device)
    float(noise.sample((length, *example.shape), generator).sum())  # the first one pays for memory
    start = time.perf_counter()
    noisy = noise.add(example, noise.sample((length, *example.shape), generator).to(example.device))
    float(noisy[-1, -1, -1, -1])  # waits for the device
    drawing = (time.perf_counter() - start) / length
    repeats = -(-size // length)
    batch = noisy.repeat(repeats, 1, 1, 1)[:size]
    label_batch(run, batch)  # warms up
    return 1.0 / (drawing + 1.0 / measure_speed(run, batch, 0.5))


def _limit(wanted: Wanted, seconds: float) -> float | None:
    """Seconds that compilation may take: none where the user insists on it."""
    return None if wanted.compile == "on" else min(seconds, _COMPILE_LONGEST)


def _compile_seconds(base: BaseClassifier) -> float:
    assert isinstance(base, nn.Module)
    layers = sum(any(True for _ in module.parameters(recurse=False)) for module in base.modules())
    return _COMPILE_SECONDS + _COMPILE_SECONDS_A_LAYER * layers


def _round(samples: float) -> int:
    digits = max(0, int(math.log10(samples)) - 1)
    return int(math.ceil(samples / 10**digits) * 10**digits)


def _key(base: BaseClassifier, example: Tensor, samples: int, wanted: Wanted) -> str:
    """Everything a choice depends on; amounts of work within a factor of three share one."""
    facts = {
        "certify": __version__,
        "base": base.describe(),
        "shape": list(example.shape),
        "work": round(2 * math.log10(samples)),
        "wanted": asdict(wanted),
        "device": str(example.device),
        "machine": machine_name(example.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _choices() -> dict[str, Any]:
    try:
        choices = json.loads((cache_folder() / "choices.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return choices if isinstance(choices, dict) else {}


def _recall(key: str) -> Execution | None:
    """The choice made here before; anything unreadable is none."""
    try:
        found = _choices()[key]
        execution = Execution(**{**found["execution"], "why": tuple(map(str, found["execution"]["why"]))})
        date = str(found["date"])
    except (KeyError, TypeError):
        return None
    numbers = (execution.folded, execution.compiled, execution.batch_size)
    if execution.precision not in PRECISIONS or [type(n) for n in numbers] != [bool, bool, int] or numbers[2] < 1:
        return None
    return replace(execution, why=(*execution.why, f"chosen on this machine on {date}"))


def _remember(key: str, execution: Execution) -> None:
    """Best effort: a home that cannot be written costs the measurements again, nothing else."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    choices = dict([*_choices().items(), (key, {"execution": asdict(execution), "date": date})][-_REMEMBERED:])
    path = cache_folder() / "choices.json"
    beside = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(choices, indent=1), encoding="utf-8")
        beside.replace(path)
