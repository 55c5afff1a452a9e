"""The identity of a run: settings and hashes compared exactly, fingerprints within a tolerance."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from certify.errors import UserError

FREE_KEYS = ("data", "created", "command", "versions", "machine", "batch_size", "execution", "merged", "unread")
"""Header keys that may differ between two commands that mean the same run: provenance, not configuration."""

FINGERPRINT, EXTERNAL = "fingerprint", "external_data"
_EVIDENCE = (FINGERPRINT, EXTERNAL, "sha256")
"""Keys of a step that older files may lack: a missing one is unknown, not different."""

_TOLERANCE = 0.02
"""Root mean square difference of two fingerprints over that of the first, up to which they are one function's.

Measured on three networks against float32: float64 1e-6, float16 2e-3, bfloat16 at most 1.2e-2; weights moved by 3 % of
their spread 4.5e-2 and more, by 10 % 0.15 and more."""

_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_LABELS = 1  # of stable labels that may differ, out of 96


def identity(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that identify a run, flat: ``{"n": 100000, "images.sha256": ...}``; without fingerprints."""
    kept = {key: value for key, value in header.items() if key not in FREE_KEYS}
    return {path: value for path, value in _walk("", kept, FINGERPRINT) if not isinstance(value, Mapping)}


def _walk(path: str, value: Any, left_out: str = "") -> Iterator[tuple[str, Any]]:
    """Yield objects and plain values with their paths, objects before their contents; lists of values are values."""
    if isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for i, inner in enumerate(value):
            yield from _walk(f"{path}[{i}]", inner, left_out)
        return
    yield path, value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key != left_out:
                yield from _walk(f"{path}.{key}" if path else str(key), inner, left_out)


def identity_digest(header: Mapping[str, Any]) -> str:
    """Return eight hexadecimal digits of the identity, for default file names: other settings go to another file."""
    text = json.dumps(identity(header), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def refuse_other_run(
    path: Path, old: Mapping[str, Any], new: Mapping[str, Any], *, trust_identity: bool = False
) -> None:
    """Refuse a run file of other settings or another model.

    Args:
        path: of the file.
        old: its header.
        new: the header of the command.
        trust_identity: True if the user vouches for what the file cannot prove.

    Raises:
        UserError: other settings (named), or a file that cannot prove that its model is still the same.
    """
    if found := differences(old, new):
        raise UserError(f"{path} holds a run with other settings ({found}); it is left alone: name another --out")
    if (names := _unknown(old, new)) and not trust_identity:
        raise UserError(
            f"{path} holds no fingerprint of {', '.join(names)}, so whether it is still the same model is unknown; "
            "if neither its code nor any file that it reads has changed, add --trust-identity, else name another --out"
        )


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Describe how two headers differ as runs; empty if they are the same run, as far as both of them say."""
    before, now = identity(there), identity(here)
    skipped = _missing(there, here)
    keys = sorted(
        k
        for k in before.keys() | now.keys()
        if before.get(k) != now.get(k) and not any(f"{k}.".startswith(f"{path}.") for path in skipped)
    )
    parts = [f"{k} {_short(before.get(k))} there, {_short(now.get(k))} here" for k in keys]
    parts += [f"{name} gives other answers to the same probe images" for name in _changed(there, here)]
    return ", ".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else text[:20] + '..."'


def _steps(header: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return every named object of a header (denoisers, classifiers, purifiers) by its path."""
    return {path: value for path, value in _walk("", header) if isinstance(value, Mapping) and "name" in value}


def _pairs(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    before, now = _steps(there), _steps(here)
    yield from ((path, before[path], now[path]) for path in before.keys() & now.keys())


def _missing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return the paths of hashes that only one of the headers has."""
    return [f"{path}.{key}" for path, a, b in _pairs(there, here) for key in _EVIDENCE if (key in a) != (key in b)]


def _unknown(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return the names of the steps for which only one header has a hash or a comparable fingerprint."""
    found = []
    for _, a, b in _pairs(there, here):
        for key in _EVIDENCE:
            one_sided = (key in a) != (key in b) and bool(a.get(key) or b.get(key) or key == FINGERPRINT)
            if one_sided or (key == FINGERPRINT and key in a and _comparable(a[key], b[key]) is None):
                found.append(str(b["name"]))
                break
    return sorted(set(found))


def _changed(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return the names of the steps whose fingerprints differ."""
    return sorted(
        str(b["name"]) for _, a, b in _pairs(there, here) if not same_answers(a.get(FINGERPRINT), b.get(FINGERPRINT))
    )


def unproven(header: Mapping[str, Any]) -> str:
    """Describe which models a run file cannot prove; empty if it proves all.

    Files older than fingerprints hold the hash of one file, whatever else the model read.
    """
    names = {str(step["name"]) for step in _steps(header).values() if not _proven(step)}
    if not names:
        return ""
    return (
        f"it holds no fingerprint of {', '.join(sorted(names))}: nothing shows that all its images met the same model"
    )


def _proven(step: Mapping[str, Any]) -> bool:
    """Return True if a step has hashes of everything it reads, or a fingerprint."""
    if FINGERPRINT in step:
        return step[FINGERPRINT] is not None
    if step.get("code_sha256") is None:
        return True
    return not _CALLABLE.fullmatch(str(step["name"])) and (EXTERNAL in step or not str(step["name"]).endswith(".onnx"))


def same_answers(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Return True if two fingerprints can be of one function on different machines, or one of them is missing."""
    same = _comparable(one, other)
    return True if same is None else same


def _comparable(one: Any, other: Any) -> bool | None:
    """Return True if both are of one function; None if they cannot be compared."""
    kind, a = _read(one)
    other_kind, b = _read(other)
    if kind is None or other_kind is None or one.get("probe") != other.get("probe"):
        return None
    if kind != other_kind or len(a) != len(b):
        return False
    known = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if kind == "labels":
        return len([x for x, y in known if x != y]) <= _LABELS
    if any((x is None) != (y is None) for x, y in zip(a, b, strict=True)):
        return False
    apart, length = math.hypot(*(x - y for x, y in known)), math.hypot(*(x for x, _ in known))
    return apart <= _TOLERANCE * length + 1e-12


def _read(fingerprint: Any) -> tuple[str | None, list[float | None]]:
    """Return the kind of a fingerprint and its values; None for anything else."""
    for kind, values in fingerprint.items() if isinstance(fingerprint, Mapping) else ():
        numbers = isinstance(values, list) and all(v is None or type(v) in (int, float) for v in values)
        if kind != "probe" and numbers:
            return str(kind), values
    return None, []
