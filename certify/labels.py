"""From the names that data gives its classes to the indices that the classifier means.

The field's most common silent error is an index by sorted folder name where the classifier was trained on another
order: accuracy near zero and no hint. Names are matched; sorted order is used only when there is nothing else and the
numbers agree; anything doubtful is an error that asks for a map.
"""

from __future__ import annotations

import csv
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from certify.errors import UserError

ClassNames = tuple[tuple[str, ...], ...]
"""For each class index, every name it goes by."""


@functools.cache
def imagenet_classes() -> ClassNames:
    """The 1,000 ImageNet classes in the order of the classifiers: WordNet id, then its words."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return tuple(
        (info.index_to_label_name(i), *(word.strip() for word in info.index_to_description(i).split(",")))
        for i in range(1000)
    )


def map_names(
    names: Sequence[str],
    class_names: ClassNames | None,
    num_classes: int,
    class_map: str | Path | None = None,
    order: Sequence[str] | None = None,
) -> tuple[dict[str, int], str]:
    """The class index of every name the data uses, and the rule that gave it, in words.

    In this order: ``class_map``; the classifier's own class names (WordNet ids and words for ImageNet), and if it has
    any, only indices beside them; ``order``, the data set's own order of K classes; names that are the integers
    0 .. K-1 themselves; sorted order when there are exactly K names.

    Raises:
        UserError: no rule applies; the message asks for a class map and says how to write one.
    """
    names = sorted(set(names))
    if class_map is not None:
        return _from_map(names, class_names, num_classes, Path(class_map)), f"class map {Path(class_map).name}"
    if class_names is not None:
        index = _index(class_names)
        found = {name: index.get(_plain(name), []) for name in names}
        missing = [name for name, hits in found.items() if not hits]
        twofold = [name for name, hits in found.items() if len(hits) > 1]
        if not missing and not twofold:
            return {name: hits[0] for name, hits in found.items()}, f"by name ({len(names)} of {num_classes} classes)"
        if not all(name.isdecimal() for name in names):  # numbers may still be indices
            bad = f"{len(missing)} of {len(names)} class names are not the classifier's ({_few(missing)})"
            if not missing:
                bad = f"class names that mean several classes: {_few(twofold)}"
            raise UserError(f"{bad}; {_HOW}, or --labels none to certify without labels")
    if order is not None and len(order) == num_classes:
        return {name: i for i, name in enumerate(order)}, f"the data set's own order of {num_classes} classes"
    indices = all(name.isdecimal() and str(int(name)) == name and int(name) < num_classes for name in names)
    if indices and ("0" in names or len(names) < num_classes):
        return {name: int(name) for name in names}, f"class names are indices ({len(names)} of {num_classes})"
    numbers = all(name.isdecimal() for name in names)
    ordered = not (numbers and sorted(names, key=int) != names)  # 1, 10, 2: not an order
    if class_names is None and len(names) == num_classes and ordered:
        return {name: i for i, name in enumerate(names)}, f"sorted order of {num_classes} class names"
    raise UserError(
        f"cannot tell which of the classifier's {num_classes} classes the data's {len(names)} are ({_few(names)}); "
        f"{_HOW}, or --labels none to certify without labels"
    )


_HOW = 'pass --class-map FILE: JSON {"name": class} or lines "name,class"'


def read_labels(path: str | Path) -> dict[str, str]:
    """``file,label`` rows of a CSV with or without a heading, by file name.

    Raises:
        UserError: unreadable, or not two columns.
    """
    rows = read_rows(Path(path), "--labels")
    if rows and rows[0][0].lower() in ("file", "filename", "image", "path", "id", "name"):
        rows = rows[1:]
    return dict(rows)


def _from_map(names: Sequence[str], class_names: ClassNames | None, num_classes: int, path: Path) -> dict[str, int]:
    if path.suffix.lower() == ".json":
        try:
            given: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"--class-map {path}: not readable as JSON ({error})") from None
        if not isinstance(given, dict):
            raise UserError(f'--class-map {path}: expected an object {{"name": class}}, got {type(given).__name__}')
    else:
        given = dict(read_rows(path, "--class-map"))
    missing = [name for name in names if name not in given]
    if missing:
        raise UserError(
            f"--class-map {path} misses {len(missing)} of {len(names)} class names: {_few(missing)}; add them"
        )
    index = name_index(class_names)
    return {name: class_index(given[name], index, num_classes, f"--class-map {path}") for name in names}


def class_index(value: Any, index: Mapping[str, list[int]], num_classes: int, where: str) -> int:
    """A class given as an index or as one of the classifier's names.

    Raises:
        UserError: neither.
    """
    text = str(value).strip()
    if re.fullmatch(r"\d+", text):
        if int(text) < num_classes:
            return int(text)
    elif len(index.get(_plain(text), [])) == 1:
        return index[_plain(text)][0]
    raise UserError(f"{where}: class {text!r}; expected 0 to {num_classes - 1} or one name of the classifier's")


def readable(class_names: ClassNames | None, label: int) -> str:
    """What a person calls this class: its name, or its index where the classifier has no names."""
    if class_names is None or not 0 <= label < len(class_names):
        return str(label)
    names = class_names[label]
    return names[1] if len(names) > 1 and re.fullmatch(r"n\d{8}", names[0]) else names[0]


def name_index(class_names: ClassNames | None) -> dict[str, list[int]]:
    """Every class index by each plain name; several where the name is ambiguous."""
    return _index(class_names) if class_names else {}


@functools.cache
def _index(class_names: ClassNames) -> dict[str, list[int]]:
    index: dict[str, list[int]] = {}
    for i, synonyms in enumerate(class_names):
        for name in {_plain(s) for s in synonyms}:
            index.setdefault(name, []).append(i)
    return index


def _plain(name: str) -> str:
    return re.sub(r"[\s_\-]+", " ", name).strip().lower()


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def read_rows(path: Path, option: str) -> list[tuple[str, str]]:
    """The lines of a CSV of two columns.

    Raises:
        UserError: unreadable, no lines, fewer columns, or a first column twice with different second ones.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row and any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{option} {path}: not readable as CSV ({error})") from None
    bad = next((row for row in rows if len(row) < 2), None)
    if bad is not None or not rows:
        raise UserError(f"{option} {path}: expected lines of two columns, got {','.join(bad) if bad else 'none'!r}")
    pairs = [(row[0].strip(), row[1].strip()) for row in rows]
    if len(dict(pairs)) < len(set(pairs)):
        double = next(key for key, value in pairs if dict(pairs)[key] != value)
        raise UserError(
            f"{option} {path}: {double!r} stands there twice with different classes; expected one line each"
        )
    return pairs
