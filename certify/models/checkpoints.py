"""Checkpoints as people have them -> a state dict that fits, or a reason.

No code of a file is run: ``torch.load`` with ``weights_only=True`` reads tensors and plain values, to which numpy's
numbers and the ``Namespace`` of parsed options are added here, as training scripts leave them beside the weights.
Nothing is loaded partially.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certify.errors import UserError, first_line
from certify.models.file_kind import SAFETENSORS, weights_kind
from certify.models.resolve import UNTRAINED

_CONTAINERS = ("state_dict", "model", "model_state", "model_state_dict", "net", "params_ema", "params")
_NUMBERS = ("Float64DType", "Float32DType", "Int64DType", "Int32DType", "BoolDType")
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(getattr(np.dtypes, name) for name in _NUMBERS),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_WRAPPERS = ("module", "_orig_mod")  # DataParallel, torch.compile


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, out of a bare state dict or one under a usual key.

    Raises:
        UserError: not a checkpoint (and what it is instead), damaged, or a pickle that would run code.
    """
    path = Path(path)
    found = _load(path, weights_kind(path))
    if isinstance(found, nn.Module):
        raise UserError(f"{path} holds a whole model; expected a state dict")
    for key in _CONTAINERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found:
        raise UserError(
            f"{path} holds {type(found).__name__}; expected a state dict, bare or under {', '.join(_CONTAINERS)}"
        )
    state = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if not state:
        keys = ", ".join(list(map(str, found))[:4])
        raise UserError(
            f"{path} holds no tensors (keys: {keys}); expected a state dict, bare or under {', '.join(_CONTAINERS)}"
        )
    return state


def load_weights(net: nn.Module, path: str | Path, architecture: str) -> str:
    """Load a checkpoint into ``net``, every key or none; ``untrained`` leaves it as it was built.

    What DataParallel and torch.compile leave in names is taken off, wherever it stands, and so is the number that
    ``nn.Sequential(normalise, network)`` puts in front of all of them.

    Returns:
        What was loaded, for the record: the file's name and what was taken off.

    Raises:
        UserError: keys or shapes that do not fit; the first few are listed.
    """
    return UNTRAINED if path == UNTRAINED else fit_weights(net, read_state_dict(path), path, architecture)


def fit_weights(net: nn.Module, state: Mapping[str, Tensor], path: str | Path, architecture: str) -> str:
    """:func:`load_weights` of a checkpoint that was read already."""
    own = net.state_dict()
    stripped, taken = _strip_wrappers(state, own)
    for key in own.keys() - stripped.keys():
        if key.endswith("num_batches_tracked"):  # absent from checkpoints of torch before 0.4.1, unused in evaluation
            stripped[key] = own[key]
    _refuse_misfit(own, stripped, Path(path), architecture)
    net.load_state_dict(stripped)
    return Path(path).name + (f" (without {', '.join(taken)} in its names)" if taken else "")


def _strip_wrappers(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under names without wrappers, and what was taken off."""
    if state.keys() <= own.keys():
        return dict(state), []
    wrappers = {part for key in state for part in key.split(".")} & {*_WRAPPERS}
    names = {key: ".".join(part for part in key.split(".") if part not in wrappers) for key in state}
    first = {name.partition(".")[0] for name in names.values()}
    if len(first) == 1 and min(first).isdecimal() and not own.keys() & set(names.values()):
        names = {key: name.partition(".")[2] for key, name in names.items()}
        wrappers |= first
    stripped: dict[str, Tensor] = {}
    for key, short in names.items():
        if short in stripped:
            raise UserError(f"the checkpoint holds {short!r} twice, with and without a wrapper prefix; save it once")
        stripped[short] = state[key]
    return stripped, [f"{part}." for part in sorted(wrappers)]


def _refuse_misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path, architecture: str) -> None:
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    shapes = [
        f"{k} {_shape(state[k])} for {_shape(own[k])}" for k in own if k in state and state[k].shape != own[k].shape
    ]
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in ((missing, "missing"), (extra, "unexpected"), (shapes, "of another shape"))
        if names
    ]
    if parts:
        head_only = not missing and not extra and len(shapes) <= 2
        hint = "; another number of classes? pass --num-classes" if head_only else "; is it another architecture's?"
        raise UserError(f"{path} does not fit {architecture}: {'; '.join(parts)}{hint}")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _load(path: Path, kind: str) -> Any:
    if kind == SAFETENSORS:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); download it again") from None
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN):
            warnings.simplefilter("ignore")  # torch warns of the pickle protocol before it refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(_refused_pickle(path, str(error))) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = first_line(error).partition(" (Could this")[0].rstrip(". ")  # torch asks for reports of its wording
        raise UserError(
            f"{path} is damaged or not a checkpoint ({reason}); expected what torch.save or safetensors wrote: "
            "download it again, or name another file"
        ) from None


def _refused_pickle(path: Path, reason: str) -> str:
    with path.open("rb") as file:
        is_pickle = file.read(2) in (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
    if not is_pickle:
        return f"{path} is damaged or not a checkpoint; expected a state dict saved by torch.save, or safetensors"
    wanted = re.search(r"(?:GLOBAL|Unsupported class) ([A-Za-z_][\w.]+)", reason)
    what = wanted[1] if wanted else "more than tensors"
    return (
        f"{path} asks for {what} when it is unpickled, which can run code: refused; "
        "expected tensors only (save the state dict alone, best as .safetensors)"
    )
