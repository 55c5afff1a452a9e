"""What the machine is: its name, the speed of its matrix products, the room in its memory."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time

import torch

from certify.engine.execution import PRECISIONS
from certify.errors import UserError

_LONG_ENOUGH = 0.5  # seconds for one matrix product again and again


def in_threads(count: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{count} thread{'s' * (count != 1)}"


def machine_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def find_device(device: str | torch.device) -> torch.device:
    """Return this device of this machine; an accelerator, if there is one, for ``"auto"``.

    Raises:
        UserError: this machine has no such device.
    """
    accelerators = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    accelerators += ["mps"] if torch.backends.mps.is_available() else []
    if str(device) == "auto":
        return torch.device(accelerators[0] if accelerators else "cpu")
    known = ["cpu", *accelerators, *(["cuda"] if torch.cuda.is_available() else [])]
    if str(device) not in known:
        raise UserError(
            f"device {str(device)!r} does not exist on this machine; expected auto or one of {', '.join(known)}"
        )
    return torch.device(device)


def product_speed(precision: str, device: torch.device) -> float:
    """Operations a second of a square matrix product in this precision, the best of some: the machine's ceiling."""
    accelerator = device.type != "cpu"
    size, most = (8192, 30) if accelerator else (1024, 5)
    dtype = PRECISIONS[precision]
    if not accelerator and dtype != torch.float32:  # without instructions of its own a product takes seconds
        small = _product_seconds(128, dtype, device, 2)
        if small > 4 * _product_seconds(128, torch.float32, device, 2):
            return 2 * 128**3 / small
    return 2 * size**3 / _product_seconds(size, dtype, device, most)


def _product_seconds(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    a = torch.rand(size, size, device=device).to(dtype)
    best, begun = math.inf, time.perf_counter()
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
        if start - begun > _LONG_ENOUGH:
            break
    return best


def room_for_inputs(device: torch.device) -> float:
    """Values of input a batch may have: an accelerator raises when it is full, a processor's memory must not be."""
    if device.type != "cpu":
        return 2.0**28
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2.0**22
    return free / 4 / 4 / 100  # a quarter of it, 4 bytes a value, activations 100 times the input
