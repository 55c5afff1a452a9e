"""Read checkpoints of every common layout safely: select a set of weights, match parameter names, load all of it.

No code in a file is run: ``torch.load`` with ``weights_only=True`` reads tensors and plain values. NumPy scalars and
the ``argparse.Namespace`` that training scripts often save beside the weights are also allowed.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certify.errors import CertifyWarning, UserError, first_line
from certify.models.file_kind import SAFETENSORS, split_part, weights_kind
from certify.models.resolve import UNTRAINED

_NUMBERS = ("Float64DType", "Float32DType", "Int64DType", "Int32DType", "BoolDType")
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(getattr(np.dtypes, name) for name in _NUMBERS),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


_USUAL = ("state_dict", "model", "model_state", "model_state_dict", "net", "params_ema", "params")
_OTHERS = ("network", "weights", "ema", "model_ema", "state_dict_ema", "ema_state_dict", "generator", "backbone")
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Name parts added by DataParallel, torch.compile, FSDP and activation checkpointing."""

_COUNTER = "n_averaged"  # counter that torch.optim.swa_utils stores with averaged weights
_DEPTH = 8  # maximum nesting of a set of weights


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name, from a bare state dict or one under a key.

    Of several sets of weights the one under the most common key is used, with a warning that names the others;
    ``FILE::KEY`` selects another.

    Raises:
        UserError: not a checkpoint (the message says what it is), damaged, or a pickle that would run code.
    """
    file, part = split_part(path)
    content = _load(file, weights_kind(file))
    if not isinstance(content, Mapping) or not content:
        what = "no tensors" if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"{file} holds {what}; expected a state dict, bare or under a key")
    return _choose_state(content, file, part)


def load_weights(net: nn.Module, path: str | Path, architecture: str) -> str:
    """Load a checkpoint into ``net``; all keys must match. ``untrained`` keeps the initial weights.

    Name parts added by DataParallel, torch.compile, FSDP and activation checkpointing are removed, and so is one prefix
    common to all names, such as Lightning's ``model.`` or an index of ``nn.Sequential``.

    Returns:
        A description for the run file: the file's name and the parts removed from parameter names.

    Raises:
        UserError: keys, shapes or types that do not fit; the first few are listed.
    """
    return UNTRAINED if path == UNTRAINED else fit_weights(net, read_state_dict(path), path, architecture)


def fit_weights(net: nn.Module, state: Mapping[str, Tensor], path: str | Path, architecture: str) -> str:
    """Load the tensors of :func:`read_state_dict` into ``net``, as described for :func:`load_weights`."""
    own = net.state_dict()
    matched, removed = _match_names(state, own)
    for key in own.keys() - matched.keys():
        if key.endswith("num_batches_tracked"):  # absent from checkpoints of torch before 0.4.1, unused in evaluation
            matched[key] = own[key]
    if (misfit := _describe_misfit(own, matched)) and (parts := _covering_parts(state, own)):
        raise UserError(
            f"{path} contains more than {architecture}, whose names begin with {'. or '.join(parts)}. there; "
            f"select that part: {path}::{parts[0]}"
        )
    if misfit:
        raise UserError(f"{path} does not fit {architecture}: {misfit}")
    net.load_state_dict(matched)
    return Path(path).name + (f" (without {', '.join(removed)} in its names)" if removed else "")


def _describe_misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Describe the tensors that do not fit a network, with a hint; empty if all fit."""
    both = [key for key in own if key in state]
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    shapes = [f"{k} {_shape(state[k])} for {_shape(own[k])}" for k in both if state[k].shape != own[k].shape]
    types = [f"{k} {kind}" for k in both if (kind := _unusable_type(own[k], state[k]))]
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in (
            (missing, "missing"),
            (extra, "unexpected"),
            (shapes, "of another shape"),
            (types, "not plain floating-point numbers"),
        )
        if names
    ]
    if not parts:
        return ""
    if types and not (missing or extra or shapes):
        return f"{parts[0]}; save the weights as dense float32 tensors"
    head_only = shapes and not (missing or extra or types) and len(shapes) <= 2
    return "; ".join(parts) + (
        "; another number of classes? pass --num-classes" if head_only else "; is it another architecture's?"
    )


def _unusable_type(own: Tensor, given: Tensor) -> str:
    """Return the type of a tensor that cannot be copied into a floating-point parameter; empty if it can."""
    if given.is_meta:
        return "without values"
    if given.layout != torch.strided:
        return str(given.layout).removeprefix("torch.")
    if own.is_floating_point() and not given.is_floating_point():  # quantized, or complex
        return str(given.dtype).removeprefix("torch.")
    return ""


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _load(path: Path, kind: str) -> Any:
    """Read a checkpoint file without running code in it."""
    if kind == SAFETENSORS:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is not a complete safetensors file ({error}); download it again") from None
    try:
        with path.open("rb") as file, warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN):
            warnings.simplefilter("ignore")  # torch warns about the pickle protocol before it refuses
            return torch.load(
                file, map_location="cpu", weights_only=True
            )  # given a path, torch.load goes by the suffix
    except pickle.UnpicklingError as error:
        raise UserError(_refused_pickle(path, str(error))) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = first_line(error).partition(" (Could this")[0].rstrip(". ")  # drop torch's request to report the error
        raise UserError(
            f"{path} is damaged or not a checkpoint ({reason}); expected a file written by torch.save or safetensors: "
            "download it again, or name another file"
        ) from None


def _refused_pickle(path: Path, reason: str) -> str:
    """Return why a pickle was refused, from torch's reason."""
    with path.open("rb") as file:
        is_pickle = file.read(2) in (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
    if not is_pickle:
        return f"{path} is damaged or not a checkpoint; expected a state dict saved by torch.save, or safetensors"
    requested = re.search(r"(?:GLOBAL|Unsupported class) ([A-Za-z_][\w.]+)", reason)
    what = requested[1] if requested else "more than tensors"
    return (
        f"{path} asks for {what} when it is unpickled, which can run code: refused; "
        "expected tensors only (save the state dict alone, best as .safetensors)"
    )


def _choose_state(content: Mapping[Any, Any], path: Path, part: str) -> dict[str, Tensor]:
    """Choose a set of weights in a checkpoint; warn if there are others.

    Args:
        content: the file's content.
        path: the file's path, for messages.
        part: the key that the user chose, or a prefix of tensor names; empty for the most common key.

    Raises:
        UserError: no tensors, or no such part.
    """
    sets = dict(_sets(content))
    if not sets:
        keys = ", ".join(list(map(str, content))[:4])
        raise UserError(f"{path} holds no weights (keys: {keys}); expected a state dict, bare or under a key")
    if part in sets:
        return sets[part]
    order = ["", *_USUAL, *_OTHERS]

    def rank(key: str) -> int:
        return order.index(key) if key in order else len(order)

    chosen = min(sets, key=lambda key: (rank(key), rank(key.rpartition(".")[2])))
    if part:
        inner = {name: value for name, value in sets[chosen].items() if name.startswith(f"{part}.")}
        if not inner:
            prefixes = dict.fromkeys(f"{name.partition('.')[0]}." for name in sets[chosen] if "." in name)
            there = ", ".join([key for key in sets if key] or list(prefixes)[:6])
            raise UserError(f"{path} has no part {part!r}; it has {there}")
        return inner
    others = [key for key in sets if key != chosen]
    if others:
        named = chosen or "the one without a key"
        text = f"{path} holds several sets of weights: {named} is used, not {', '.join(others)}"
        warnings.warn(f"{text}; write {path}::{others[0]} for another", CertifyWarning, stacklevel=3)
    return sets[chosen]


def _sets(
    content: Mapping[Any, Any], prefix: str = "", depth: int = 0, seen: set[int] | None = None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield sets of weights with their dotted keys; an optimizer's numbered tensors are not a set."""
    seen = set() if seen is None else seen
    new = id(content) not in seen  # a pickle may contain one mapping many times, even within itself
    seen.add(id(content))
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    inner = [(key, value) for key, value in content.items() if isinstance(value, Mapping) and isinstance(key, str)]
    nested = []
    if new and depth < _DEPTH:
        nested = [one for key, value in inner for one in _sets(value, f"{prefix}.{key}".lstrip("."), depth + 1, seen)]
    known = prefix.rpartition(".")[2] in (*_USUAL, *_OTHERS) or not prefix
    if any("." in name for name in tensors) or (known and tensors and not nested):
        yield prefix, tensors
    yield from nested


def _match_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Match tensor names to the network's by removing wrapper parts and one common prefix.

    Args:
        state: tensors of a checkpoint.
        own: tensors of the network.

    Returns:
        The renamed tensors, and the parts removed from their names.

    Raises:
        UserError: two tensors end up with the same name.
    """
    if state.keys() <= own.keys():
        return dict(state), []
    state = {key: value for key, value in state.items() if key.rpartition(".")[2] != _COUNTER or key in own}
    wrappers = {part for key in state for part in key.split(".")} & {*_WRAPPERS}
    names = {key: ".".join(part for part in key.split(".") if part not in wrappers) for key in state}
    prefix = _common_prefix(list(names.values()), own)
    stripped: dict[str, Tensor] = {}
    for key, name in names.items():
        short = name.removeprefix(prefix)
        if short in stripped:
            raise UserError(f"the checkpoint contains {short!r} twice, with and without a wrapper prefix; save it once")
        stripped[short] = state[key]
    return stripped, [*([prefix] if prefix else []), *(f"{part}." for part in sorted(wrappers))]


def _common_prefix(names: list[str], own: Mapping[str, Tensor]) -> str:
    """Return a prefix common to all names whose removal makes some match the network; empty if any matches already."""
    if not names or own.keys() & set(names):
        return ""
    first = names[0].split(".")
    for length in range(1, len(first)):
        prefix = ".".join(first[:length]) + "."
        if not all(name.startswith(prefix) for name in names):
            return ""
        if any(name.removeprefix(prefix) in own for name in names):
            return prefix
    return ""


def _covering_parts(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Return the name prefixes under which a larger checkpoint contains the whole network."""
    parts = []
    for part in dict.fromkeys(name.partition(".")[0] for name in state if "." in name):
        inner = {name: value for name, value in state.items() if name.startswith(f"{part}.")}
        if len(inner) < len(state):
            matched, _ = _match_names(inner, own)
            if {k for k in own if not k.endswith("num_batches_tracked")} <= matched.keys() <= own.keys():
                parts.append(part)
    return parts


def refuse_weights(name: str, weights: str | Path | None) -> None:
    """Raise an error if ``--weights`` is given for a model file that contains its own."""
    if weights is not None:
        raise UserError(f"{name} contains its weights; drop --weights")
