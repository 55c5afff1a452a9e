"""Damage to JSON and JSON Lines at random, as disks, editors and other programs do it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

ODD: list[Any] = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3.5,
        -0.0,
        1e308,
        10**30,
        "",
        "x",
        "0",
        "-1",
        "1e999",
        "\ud800",
        "\udcff",
        "a\0b",
        "\n",
    ),
    *([], {}, [[]], [None], [1, 2, 3], ["x"], {"": {}}, {"0": -1}, {"x": 1}, {"0": "1"}, {"-1": 5}, {"0": 10**30}),
    *(10**400, float("nan"), float("inf"), -float("inf")),
]
"""Values of every kind."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of keys and indices to all values inside this one."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def damage_value(rng: random.Random, value: Any) -> Any:
    """One value inside of it replaced, left out, renamed, doubled or wrapped."""
    value = json.loads(json.dumps(value))
    paths = list(places(value))
    if not paths:
        return rng.choice(ODD)
    *way, last = rng.choice(paths)
    holder = value
    for key in way:
        holder = holder[key]
    old, kind = holder[last], rng.choice(["odd", "odd", "odd", "delete", "rename", "wrap", "text", "number"])
    if kind == "delete":
        del holder[last]
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice([f"{last}x", "", "0", "-1", "id", last.upper()])] = holder.pop(last)
    elif kind == "wrap":
        holder[last] = rng.choice([[old], {"0": old}, [old, old], {str(last): old}])
    elif kind == "text":
        holder[last] = json.dumps(old)
    elif kind == "number" and isinstance(old, int | float):
        holder[last] = rng.choice([-old, old + 1, old + 0.5, old * 10**6, float(old), str(old), old - 1])
    else:
        holder[last] = rng.choice(ODD)
    return value


def damage_lines(rng: random.Random, content: bytes) -> bytes:
    """A value in one of its lines of JSON is damaged, often in the first."""
    lines = content.split(b"\n")
    number = rng.choice([0, rng.randrange(max(1, len(lines) - 1))])
    lines[number] = json.dumps(damage_value(rng, json.loads(lines[number]))).encode()
    return b"\n".join(lines)


def damage_document(rng: random.Random, content: bytes) -> bytes:
    """A value of the one JSON document is damaged."""
    return json.dumps(damage_value(rng, json.loads(content))).encode()


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """The bytes are damaged, whatever they mean."""
    at = rng.randrange(len(content) + 1)
    lines = content.split(b"\n")
    line = rng.randrange(len(lines))
    kinds: list[Callable[[], bytes]] = [
        lambda: content[:at],
        lambda: content[at:],
        lambda: (
            content[:at]
            + rng.choice([b"\xff", b"\x00", b"\xc3\x28", b"\xed\xa0\x80", b"}", b'"', b"\n"])
            + content[at:]
        ),
        lambda: b"\xef\xbb\xbf" + content,
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: content.replace(b"\n", b"\r"),
        lambda: content.decode("utf-8").encode("utf-16"),
        lambda: b"\n".join([*lines[: line + 1], *lines[line:]]),
        lambda: b"\n".join([*lines[:line], *lines[line + 1 :]]),
        lambda: b"\n".join(reversed(lines)),
        lambda: b"\n".join(rng.sample(lines, len(lines))),
        lambda: b"\n".join([*lines[:line], b"[" * 100_000, *lines[line:]]),
        lambda: b"\n".join([*lines[:line], b'{"type":' * 5000, *lines[line:]]),
        lambda: b"\n".join([*lines[:line], b"", *lines[line:]]),
        lambda: b"\n".join([*lines[:line], b"9" * 10_000, *lines[line:]]),
        lambda: b"",
        lambda: b"\n",
        lambda: content.rstrip(b"\n"),
        lambda: content + content,
        lambda: bytes(rng.randrange(256) for _ in range(100)),
    ]
    return rng.choice(kinds)()
