"""Counter-based random generators, one for each (run seed, image id, stage, block number).

Noise is drawn in blocks of fixed size (:func:`block_size`). The generator of a block depends on these four alone, so
the noise is the same for any batch size, order, interruption or number of workers, and no block repeats.

``torch.Generator.manual_seed`` does not suffice on the CPU: it keeps only the low 32 bits of the seed, so among
the ten million blocks of a CIFAR-10 run thousands would coincide. Instead, the whole state of the Mersenne twister
(624 words) is written, from a counter-based generator (Philox, Salmon et al. 2011) keyed by a hash of (seed, image,
stage) and started at the block's own counter. On an accelerator torch itself uses Philox and takes all 64 bits.
"""

from __future__ import annotations

import functools
import hashlib
import threading

import numpy as np
import torch

from certify.smoothing.numeric import as_int

STREAM = (
    "blocks of 100 (1000 below 1024 values); cpu: mt19937 by philox4x64(sha256(seed, id, stage), block); cuda: philox"
)
"""Description of the scheme in the run file: another scheme is another run."""

_WORDS = 624
_STATE_OFFSET = 24  # bytes before the twister's words in a CPU generator's state: seed, left, seeded, next


def block_size(values: int) -> int:
    """Return the samples per block for images of this many values (C * H * W): part of the scheme, never tuned.

    100 divides the field's usual n0 and n, and 100 images of 3x224x224 are 60 MB. Images as small as MNIST's cost less
    to draw than a generator costs to seed, so 1,000 of them share one.
    """
    return 100 if values >= 1024 else 1000


def stream_key(seed: int, image_id: str, stage: str) -> bytes:
    """Return 32 bytes that identify a stream: all noise of one image in one stage of one run."""
    text = "\0".join((str(as_int(seed, "seed", "a whole number")), image_id, stage))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def bound_draw(seed: int, image_id: str) -> float:
    """Return the uniform draw from (0, 1] of a randomized bound for one image: 53 bits, from a separate stream."""
    word = int.from_bytes(stream_key(seed, image_id, "bound")[:8], "little") >> 11
    return (word + 1) * 2.0**-53


@functools.cache
def _fresh_cpu_state() -> np.ndarray:
    """Return the state of a newly seeded CPU generator, with a check of where it holds the twister's words."""
    state = torch.Generator().manual_seed(20_190_208).get_state().numpy().copy()
    words = state[_STATE_OFFSET : _STATE_OFFSET + 8 * _WORDS].view(np.uint64)
    plain = np.random.RandomState(20_190_208).get_state(legacy=False)["state"]["key"]  # by numpy's implementation
    if words.size != _WORDS or not (words == plain).all():
        raise RuntimeError(f"torch {torch.__version__} lays out its CPU generator differently: certify must be updated")
    return state


_LOCAL = threading.local()


def _philox(key: bytes, block: int) -> np.random.Philox:
    """Return Philox at this key and counter; one object per thread, as construction reads unused system entropy."""
    if not hasattr(_LOCAL, "philox"):
        _LOCAL.philox = np.random.Philox(0)
        _LOCAL.state = _LOCAL.philox.state
    state = _LOCAL.state
    state["state"]["key"] = np.frombuffer(key[:16], dtype=np.uint64)
    state["state"]["counter"] = np.array([0, 0, 0, block], dtype=np.uint64)
    _LOCAL.philox.state = state  # its buffer is empty, as in a new one
    philox: np.random.Philox = _LOCAL.philox
    return philox


def block_generator(key: bytes, block: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the generator of one block of the stream ``key``: on the device for CUDA, else on the CPU."""
    if torch.device(device).type == "cuda":
        digest = hashlib.sha256(key + block.to_bytes(8, "little")).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    state = _fresh_cpu_state().copy()
    words = state[_STATE_OFFSET : _STATE_OFFSET + 8 * _WORDS].view(np.uint64)
    words[:] = _philox(key, block).random_raw(_WORDS // 2).view(np.uint32)
    generator = torch.Generator()
    generator.set_state(torch.from_numpy(state))
    return generator
