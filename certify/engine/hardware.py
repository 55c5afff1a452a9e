"""The machine: its name, the facts on which the execution policy depends, and its memory allocator."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from certify.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK = 32 << 20  # glibc takes no larger block from its heap
_KEPT = 256 << 20


@dataclass(frozen=True)
class Hardware:
    """Facts that are equal on all machines of one kind, whatever else runs on them.

    Attributes:
        device: torch's device type: ``cpu``, ``cuda``, ``mps``, ...
        bfloat16: the instructions that multiply bfloat16 (``AMX``, ``AVX-512 BF16``, ``tensor cores``); empty: none.
        memory: GiB of an accelerator, rounded; 0 on a processor.
        compiler: True if torch.compile finds the compiler that it needs for this device.
    """

    device: str
    bfloat16: str
    memory: int
    compiler: bool


def detect_hardware(device: torch.device) -> Hardware:
    """Return the facts about a device."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        bfloat16 = "tensor cores" if (facts.major, facts.minor) >= (8, 0) else ""
        memory = round(facts.total_memory / 2**30)
        return Hardware("cuda", bfloat16, memory, find_spec("triton") is not None)
    if device.type != "cpu":
        return Hardware(device.type, "", 0, False)
    # torch itself decides by these private functions whether its bfloat16 kernels have instructions of their own.
    units = {"AMX": "_is_amx_tile_supported", "AVX-512 BF16": "_is_avx512_bf16_supported"}
    bfloat16 = next((unit for unit, name in units.items() if getattr(torch.cpu, name, lambda: False)()), "")
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return Hardware("cpu", bfloat16, 0, shutil.which(compiler) is not None)


def machine_name(device: torch.device) -> str:
    """Return the accelerator's name, or the processor's."""
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


def in_threads(count: int) -> str:
    """Return ``1 thread``, ``2 threads``."""
    return f"{count} thread{'s' * (count != 1)}"


def keep_freed_memory(kept: int = _KEPT) -> bool:
    """Let glibc keep this many bytes of freed memory, and take blocks of up to 32 MiB from it.

    By default it returns memory to the system after every layer, and every page faults again in the next one: a
    perceptron's votes take up to twice as long (``benchmarks/log.md``). The user's own settings (``MALLOC_...``) are
    respected, and other allocators are left alone. glibc's own adaptation arrives at 64 MiB.

    Returns:
        True if it was done.
    """
    mallopt = _mallopt()
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, kept))


@functools.cache
def _mallopt() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return None
    try:
        function: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return None
    return function
