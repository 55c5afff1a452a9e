"""Whether a worker fits the run, and how it ended: in words that name both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from certify.errors import in_words
from certify.runs.identity import FINGERPRINT, same_answers


def other_code(mine: Mapping[str, str], there: Mapping[str, str], name: str) -> str:
    """Why a worker's code does not fit; empty when it is the driver's."""
    if (mine["certify"], mine["code"]) == (there["certify"], there["code"]):
        return ""
    return (
        f"{name} runs certify-toolkit {there['certify']} (code {there['code']}), this driver {mine['certify']} (code "
        f"{mine['code']}): install the same version on every machine"
    )


def other_weights(mine: Sequence[Mapping[str, Any]], there: Sequence[Mapping[str, Any]], name: str) -> str:
    """Why a worker's pipeline does not fit; empty when it is the driver's, weights included."""
    if len(mine) != len(there):
        return f"{name} has a pipeline of {len(there)} steps, this driver one of {len(mine)}"
    for own, other in zip(mine, there, strict=True):
        for key in sorted(own.keys() | other.keys(), key=lambda key: key not in ("sha256", "code_sha256")):
            if key == FINGERPRINT and same_answers(own.get(key), other.get(key)):
                continue
            if key == FINGERPRINT:
                return (
                    f"{name} gives other answers of {own['step']} {own['name']} to the same probe images than this "
                    "driver: give every machine the same code, and the same files that it reads"
                )
            if own.get(key) != other.get(key):
                what = {"sha256": "weights", "code_sha256": "code"}.get(key, key)
                return (
                    f"{name} has other {what} of {own['step']} {own['name']} ({_short(other.get(key))}) than this "
                    f"driver ({_short(own.get(key))}): give every machine the same file"
                )
    return ""


def _short(value: Any) -> str:
    return str(value)[:16]


def how_it_ended(error: Exception, cause: BaseException | None) -> str:
    """What an exception on a worker says, or the line of Ray's report that says how a worker ended."""
    if cause is not None:
        return in_words(cause)
    lines = [line.strip() for line in str(error).splitlines()]
    told = next((line for line in lines if "exit type" in line or "node" in line.lower()), lines[0] if lines else "")
    return told.partition("Some common causes")[0].strip()[:200] or type(error).__name__
