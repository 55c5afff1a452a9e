"""Match the class names of the data with the classifier's class indices.

A common silent error is to number classes by sorted folder name when the classifier was trained on another order:
accuracy drops to nearly zero without a hint. Names are matched; sorted order is used only if there is nothing else and
the numbers of classes agree; anything doubtful is an error that asks for a class map.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from certify.errors import UserError
from certify.models.signatures import HEAD, ZIP, name_content
from certify.text import read_text

ClassNames = tuple[tuple[str, ...], ...]
"""All names of each class, by class index."""


class UnclearLabels(UserError):
    """Raised for labels of the data that cannot be matched with the classifier's classes.

    Args:
        cause: cause of the mismatch.
        advice: options that resolve it.
    """

    def __init__(self, cause: str, advice: str) -> None:
        super().__init__(f"{cause}; {advice}")
        self.cause = cause


@functools.cache
def imagenet_classes() -> ClassNames:
    """Return the 1,000 ImageNet classes in the classifiers' order: WordNet id, then its words."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return tuple(
        (info.index_to_label_name(i), *(word.strip() for word in info.index_to_description(i).split(",")))
        for i in range(1000)
    )


def default_class_names(num_classes: int | None) -> ClassNames | None:
    """Return ImageNet's names for 1,000 classes, else None."""
    return imagenet_classes() if num_classes == 1000 else None


def map_names(
    names: Sequence[str],
    class_names: ClassNames | None,
    num_classes: int,
    class_map: str | Path | None = None,
    order: Sequence[str] | None = None,
) -> tuple[dict[str, int], str]:
    """Map each class name of the data to a class index.

    Rules, in this order: ``class_map``; the classifier's own class names (WordNet ids and words for ImageNet);
    ``order``, the dataset's order of K classes; names that are the integers 0 .. K-1; sorted order if there are exactly
    K names. A classifier with class names accepts, apart from those, only indices.

    Args:
        names: class names of the data.
        class_names: class names of the classifier, or None.
        num_classes: K.
        class_map: file that maps names to classes.
        order: class names of the dataset in index order, if it defines one.

    Returns:
        The index of each name, and a description of the rule.

    Raises:
        UnclearLabels: no rule applies; the message asks for a class map and says how to write one.
        UserError: a class map that does not fit.
    """
    names = sorted(set(names))
    if class_map is not None:
        return _from_map(names, class_names, num_classes, Path(class_map)), f"class map {Path(class_map).name}"
    if class_names is not None:
        index = name_index(class_names)
        matches = {name: index.get(_plain(name), []) for name in names}
        missing = [name for name, indices in matches.items() if not indices]
        ambiguous = [name for name, indices in matches.items() if len(indices) > 1]
        if not missing and not ambiguous:
            mapping = {name: indices[0] for name, indices in matches.items()}
            return mapping, f"by name ({len(set(mapping.values()))} of {num_classes} classes)"
        if not all(name.isdecimal() for name in names):  # numbers may still be indices
            bad = f"{len(missing)} of {len(names)} class names are not the classifier's ({_few(missing)})"
            if len(missing) == len(names):
                bad += f", which are called {_few([each[0] for each in class_names])}"
            if not missing:
                bad = f"class names that mean several classes: {_few(ambiguous)}"
            raise UnclearLabels(bad, f"{_HOW}, {OR_NONE}")
    count = Counter(map(_plain, names))
    if alike := sorted((name for name in names if count[_plain(name)] > 1), key=_plain):
        raise UnclearLabels(
            f"class names {', '.join(map(repr, alike[:2]))} differ only in case, spaces or hyphens",
            f"if they are one class, {_HOW} with the same class for both, {OR_NONE}",
        )
    if order is not None and len(order) == num_classes:
        return {name: i for i, name in enumerate(order)}, f"the data set's own order of {num_classes} classes"
    indices = all(name.isdecimal() and str(int(name)) == name and int(name) < num_classes for name in names)
    if indices and ("0" in names or len(names) < num_classes):
        return {name: int(name) for name in names}, f"class names are indices ({len(names)} of {num_classes})"
    if class_names is None and len(names) == num_classes and _are_ordered(names):
        return {name: i for i, name in enumerate(names)}, f"sorted order of {num_classes} class names"
    raise UnclearLabels(
        f"cannot tell which of the classifier's {num_classes} classes the data's {len(names)} are ({_few(names)})",
        f"{_HOW}, {OR_NONE}",
    )


def _are_ordered(names: Sequence[str]) -> bool:
    """True if sorted order is plausible: names are words, or numbers without gaps that sort by value."""
    if not any(_NUMBER.fullmatch(name) for name in names):
        return True
    if not all(name.isdecimal() for name in names):  # -1 marks a missing label; 1.5 is not a class
        return False
    values = [int(name) for name in names]
    return values == list(range(values[0], values[0] + len(values)))  # rejects 1, 10, 2


_NUMBER = re.compile(r"\s*[+-]?[\d.,]*\d[\d.,]*\s*")
OR_NONE = "or --labels none to certify without labels"
_HOW = 'pass --class-map FILE: JSON {"name": class} or lines "name,class"'


def read_labels(path: str | Path) -> dict[str, str]:
    """Read the ``file,label`` rows of a CSV with or without a heading; return labels by file name.

    Raises:
        UserError: unreadable, or several columns that could be the label.
    """
    rows = read_rows(Path(path), "--labels")
    return dict(rows[1:] if rows[0][0].lower() in _FILE_HEADINGS else rows)


def match_labels(path: str | Path, ids: Sequence[str], every: Iterable[str] = ()) -> tuple[dict[str, str], list[str]]:
    """Look up the label of each image in a CSV, by path or else by file name.

    Args:
        path: the CSV.
        ids: ids of the images that need a label.
        every: ids of all images that the file may name.

    Returns:
        Labels by id, and the rows that match no image.

    Raises:
        UserError: unreadable, an image without a label, or one row for several images.
    """
    given = read_labels(path)
    keys = _rows_of(ids, given)
    missing = [i for i in ids if i not in keys]
    if missing:
        raise UserError(_mismatch(f"--labels {path}", "images", ids, missing, given))
    double = next((key for key, count in Counter(keys.values()).items() if count > 1), None)
    if double is not None:
        first = next(i for i in ids if keys[i] == double)
        raise UserError(f"--labels {path}: several images are called {double!r}; write their paths, such as {first}")
    named = set(_rows_of(list(every), given).values()) | set(keys.values())
    return {i: given[keys[i]] for i in ids}, [key for key in given if key not in named]


def _rows_of(ids: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Return the key of each image's row, by path or else by file name; images without a row are left out."""
    by_path = find_keys(ids, given)
    by_name = find_keys([i.rpartition("/")[2] for i in ids], given)
    keys = {i: by_path.get(i, by_name.get(i.rpartition("/")[2])) for i in ids}
    return {i: key for i, key in keys.items() if key is not None}


def find_keys(names: Iterable[str], given: Iterable[str]) -> dict[str, str]:
    """Return the matching key of each name that has one, ignoring surrounding spaces and differences in encoding.

    Backslashes match slashes, and composed accents match decomposed ones, as macOS writes them.
    """
    known = set(given)
    alike = {_same(key): key for key in known}
    keys = {name: name if name in known else alike.get(_same(name)) for name in names}
    return {name: key for name, key in keys.items() if key is not None}


def _same(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().replace("\\", "/").removeprefix("./")


def _mismatch(where: str, what: str, names: Sequence[str], missing: Sequence[str], given: Iterable[str]) -> str:
    """Describe names that a file lacks; if it lacks all of them, show entries of both."""
    if len(missing) < len(names):
        return f"{where} lacks {len(missing)} of {len(names)} {what}: {_few(missing)}; add them"
    there, here = (", ".join(map(repr, list(side)[:3])) or "nothing" for side in (given, names))
    return f"{where} names none of the {len(names)} {what}: it has {there}, the data has {here}"


def read_class_map(path: str | Path) -> dict[str, Any]:
    """Read a class map: JSON ``{"name": class}``, recognised by its first character, or lines ``name,class``.

    Raises:
        UserError: unreadable, not of that form, or a name twice with different classes.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--class-map {path}: cannot be read ({error.strerror})") from None
    start = content[:1000].replace(b"\0", b"").lstrip(_BYTE_ORDER_MARKS + b" \t\r\n")[:1]
    if start not in (b"{", b"["):
        return dict(read_rows(path, "--class-map"))
    try:
        given: Any = json.loads(content, object_pairs_hook=_unique)  # as bytes: json detects UTF-8, -16 and -32
    except (ValueError, RecursionError) as error:
        raise UserError(f"--class-map {path}: not readable as JSON ({error})") from None
    if not isinstance(given, dict):
        raise UserError(f'--class-map {path}: expected an object {{"name": class}}, got {type(given).__name__}')
    return given


_BYTE_ORDER_MARKS = b"\xef\xbb\xbf\xff\xfe"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the members of a JSON object; raise ValueError for a name with two different values."""
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members and members[key] != value:
            raise ValueError(f"{key!r} occurs twice with different classes")
        members[key] = value
    return members


def _from_map(names: Sequence[str], class_names: ClassNames | None, num_classes: int, path: Path) -> dict[str, int]:
    given = read_class_map(path)
    keys = find_keys(names, given)
    missing = [name for name in names if name not in keys]
    if missing:
        raise UserError(_mismatch(f"--class-map {path}", "class names", names, missing, given))
    index = name_index(class_names)
    return {name: class_index(given[keys[name]], index, num_classes, f"--class-map {path}") for name in names}


def class_index(value: Any, index: Mapping[str, list[int]], num_classes: int, where: str) -> int:
    """Return the index of a class given as an index or as one of the classifier's class names.

    Raises:
        UserError: ``value`` is neither.
    """
    text = str(value).strip()
    if re.fullmatch(r"\d+", text):
        if int(text) < num_classes:
            return int(text)
    elif len(index.get(_plain(text), [])) == 1:
        return index[_plain(text)][0]
    raise UserError(
        f"{where}: class {text!r}; expected 0 to {num_classes - 1} or a class name of the classifier, {OR_NONE}"
    )


def readable(class_names: ClassNames | None, label: int) -> str:
    """Return a class's display name, or its index if the classifier has no names."""
    if class_names is None or not 0 <= label < len(class_names):
        return str(label)
    names = class_names[label]
    return names[1] if len(names) > 1 and re.fullmatch(r"n\d{8}", names[0]) else names[0]


@functools.cache
def name_index(class_names: ClassNames | None) -> dict[str, list[int]]:
    """Return the class indices of each normalised name; several if the name is ambiguous."""
    index: dict[str, list[int]] = {}
    for i, synonyms in enumerate(class_names or ()):
        for name in {_plain(s) for s in synonyms}:
            index.setdefault(name, []).append(i)
    return index


def _plain(name: str) -> str:
    """Normalise a name for comparison: case, spaces, hyphens and underscores do not count, unless it is a number."""
    plain = re.sub(r"[\s_\-]+", " ", unicodedata.normalize("NFC", name)).strip().lower()
    return name.strip() if _NUMBER.fullmatch(plain.replace(" ", "")) else plain  # -1 is not 1


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _why_no_text(path: Path, error: Exception) -> str:
    """Return why a file is not text, naming its actual format if its first bytes identify it."""
    if not isinstance(error, UnicodeDecodeError):
        return str(error)
    with path.open("rb") as file:
        kind = name_content(file.read(HEAD))
    spreadsheet = ", as spreadsheet programs write" if kind == ZIP else ""
    return f"it is {kind}{spreadsheet}; save the table as CSV" if kind else f"{error}; save it in UTF-8"


_FILE_HEADINGS = ("file", "filename", "file_name", "filepath", "image", "path", "id", "name")
_LABEL_HEADINGS = ("label", "class", "target", "category", "y")


def read_rows(path: Path, option: str) -> list[tuple[str, str]]:
    """Read two columns of a CSV: the only ones, or those that its heading calls a file (or name) and a label.

    Raises:
        UserError: unreadable, no lines, fewer columns, more columns without a heading that selects two, or a first
            column twice with different second ones.
    """
    try:
        text = read_text(path)
        heading = next((line for line in text.splitlines() if line.strip()), "")
        delimiter = next((mark for mark in ",;\t" if mark in heading), ",")  # ; where the comma is the decimal point
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows = [row for row in ([cell.strip() for cell in line] for line in lines) if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{option} {path}: not readable as CSV ({_why_no_text(path, error)})") from None
    first = [cell.lower() for cell in rows[0]] if rows else []
    keys, values = ([i for i, cell in enumerate(first) if cell in known] for known in (_FILE_HEADINGS, _LABEL_HEADINGS))
    headed = len(keys) == len(values) == 1
    key, value = (keys[0], values[0]) if headed else (0, 1)
    rows = rows[1:] if headed else rows
    bad = next((row for row in rows if len(row) <= max(key, value)), None)
    if bad is not None or not rows:
        got = repr(",".join(bad)) if bad else "none"
        raise UserError(
            f"{option} {path}: expected lines of two columns, separated by a comma, semicolon or tab, got {got}"
        )
    wide = next((row for row in rows if any(row[2:])), None)
    if wide is not None and not headed:
        raise UserError(
            f"{option} {path}: {','.join(wide)!r} has more than two columns; "
            "put a heading above that names two of them: file and label (of a class map: name and class)"
        )
    pairs = [(row[key], row[value]) for row in rows]
    if len(dict(pairs)) < len(set(pairs)):
        double = next(key for key, value in pairs if dict(pairs)[key] != value)
        raise UserError(f"{option} {path}: {double!r} occurs twice with different classes; expected one line each")
    return pairs
