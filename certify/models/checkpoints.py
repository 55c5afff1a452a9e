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

from certify.errors import CertifyWarning, UserError, first_line
from certify.models.file_kind import SAFETENSORS, split_part, weights_kind
from certify.models.resolve import UNTRAINED
from certify.models.state_dicts import choose_state, covering_parts, match_names

_NUMBERS = ("Float64DType", "Float32DType", "Int64DType", "Int32DType", "BoolDType")
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(getattr(np.dtypes, name) for name in _NUMBERS),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, out of a bare state dict or one under a key.

    Where there are several sets of weights the usual one is taken, with a warning that names the others:
    ``FILE::KEY`` chooses among them.

    Raises:
        UserError: not a checkpoint (and what it is instead), damaged, or a pickle that would run code.
    """
    file, part = split_part(path)
    found = _load(file, weights_kind(file))
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{file} holds {type(found).__name__}; expected a state dict, bare or under a key")
    state, choice = choose_state(found, file, part)
    if choice:
        warnings.warn(choice, CertifyWarning, stacklevel=2)
    return state


def load_weights(net: nn.Module, path: str | Path, architecture: str) -> str:
    """Load a checkpoint into ``net``, every key or none; ``untrained`` leaves it as it was built.

    What DataParallel, torch.compile, FSDP and activation checkpoints leave in names is taken off, wherever it stands,
    and so is one prefix of all names, such as Lightning's ``model.`` or the number of ``nn.Sequential``.

    Returns:
        What was loaded, for the record: the file's name and what was taken off.

    Raises:
        UserError: keys or shapes that do not fit; the first few are listed.
    """
    return UNTRAINED if path == UNTRAINED else fit_weights(net, read_state_dict(path), path, architecture)


def fit_weights(net: nn.Module, state: Mapping[str, Tensor], path: str | Path, architecture: str) -> str:
    """:func:`load_weights` of a checkpoint that was read already."""
    own = net.state_dict()
    stripped, taken = match_names(state, own)
    for key in own.keys() - stripped.keys():
        if key.endswith("num_batches_tracked"):  # absent from checkpoints of torch before 0.4.1, unused in evaluation
            stripped[key] = own[key]
    _refuse_misfit(own, stripped, state, path, architecture)
    net.load_state_dict(stripped)
    return Path(path).name + (f" (without {', '.join(taken)} in its names)" if taken else "")


def _refuse_misfit(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
    path: str | Path,
    architecture: str,
) -> None:
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
        if parts_of := covering_parts(whole, own):
            raise UserError(
                f"{path} holds more than {architecture}, whose names begin with {'. or '.join(parts_of)}. there; "
                f"write {path}::{parts_of[0]} for that part"
            )
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
        with path.open("rb") as file, warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN):
            warnings.simplefilter("ignore")  # torch warns of the pickle protocol before it refuses
            return torch.load(file, map_location="cpu", weights_only=True)  # by name it would go by the suffix
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
