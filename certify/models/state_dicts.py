"""From what a checkpoint holds to the tensors that fit a network: which set of them, and under which names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from certify.errors import UserError

_USUAL = ("state_dict", "model", "model_state", "model_state_dict", "net", "params_ema", "params")
_OTHERS = ("network", "weights", "ema", "model_ema", "state_dict_ema", "ema_state_dict", "generator", "backbone")
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that DataParallel, torch.compile, FSDP and activation checkpoints leave."""

_COUNTER = "n_averaged"  # of models averaged by torch.optim.swa_utils, beside their weights
_DEPTH = 8  # keys around a set of weights


def choose_state(found: Mapping[Any, Any], path: Path, part: str) -> tuple[dict[str, Tensor], str]:
    """The set of weights in a checkpoint that is meant.

    Args:
        found: what the file holds.
        path: of the file, for messages.
        part: the key that the user chose, or the beginning of the tensors' names; empty: the usual one.

    Returns:
        The tensors by name, and a sentence about the choice where there was one; else an empty text.

    Raises:
        UserError: no tensors, or no such part.
    """
    sets = dict(_sets(found))
    if not sets:
        keys = ", ".join(list(map(str, found))[:4])
        raise UserError(f"{path} holds no weights (keys: {keys}); expected a state dict, bare or under a key")
    if part in sets:
        return sets[part], ""
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
        return inner, ""
    others = [key for key in sets if key != chosen]
    if not others:
        return sets[chosen], ""
    named = chosen or "the one without a key"
    return sets[chosen], (
        f"{path} holds several sets of weights: {named} is used, not {', '.join(others)}; "
        f"write {path}::{others[0]} for another"
    )


def _sets(
    found: Mapping[Any, Any], prefix: str = "", depth: int = 0, seen: set[int] | None = None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield sets of weights by their keys, nested ones joined by dots; an optimizer's numbered tensors are no set."""
    seen = set() if seen is None else seen
    new = id(found) not in seen  # a pickle may hold one mapping many times, itself too
    seen.add(id(found))
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    inner = [(key, value) for key, value in found.items() if isinstance(value, Mapping) and isinstance(key, str)]
    nested = []
    if new and depth < _DEPTH:
        nested = [one for key, value in inner for one in _sets(value, f"{prefix}.{key}".lstrip("."), depth + 1, seen)]
    known = prefix.rpartition(".")[2] in (*_USUAL, *_OTHERS) or not prefix
    if any("." in name for name in tensors) or (known and tensors and not nested):
        yield prefix, tensors
    yield from nested


def match_names(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the network's own names, as far as wrappers and one common prefix explain the others.

    Args:
        state: of a checkpoint.
        own: of the network.

    Returns:
        The tensors, and what was taken off their names.

    Raises:
        UserError: two of them get the same name.
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
            raise UserError(f"the checkpoint holds {short!r} twice, with and without a wrapper prefix; save it once")
        stripped[short] = state[key]
    return stripped, [*([prefix] if prefix else []), *(f"{part}." for part in sorted(wrappers))]


def _common_prefix(names: list[str], own: Mapping[str, Tensor]) -> str:
    """What stands in front of all names, if some of them are the network's without it and none is with it."""
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


def covering_parts(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Beginnings of names under which a checkpoint holds the whole network, beside other tensors."""
    found = []
    for part in dict.fromkeys(name.partition(".")[0] for name in state if "." in name):
        inner = {name: value for name, value in state.items() if name.startswith(f"{part}.")}
        if len(inner) < len(state):
            matched, _ = match_names(inner, own)
            if {k for k in own if not k.endswith("num_batches_tracked")} <= matched.keys() <= own.keys():
                found.append(part)
    return found
