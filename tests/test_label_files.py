"""Label files and class maps: encodings, spellings, missing labels, rows that match nothing."""

from __future__ import annotations

import io
import json
import re
import shlex
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from certify import load_classifier, load_images
from certify.cli.app import main
from certify.errors import UserError, options_in_messages
from certify.models.classifier import Classifier
from certify.models.labels import map_names, read_labels, read_rows

D = "--model digits --sigma 0.25 --n 100 --n0 10 --quiet --out x.jsonl "
Capture = pytest.CaptureFixture[str]


def picture() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40, np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lay_out(*files: str) -> None:
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(picture())


def certify(capfd: Capture, argv: str) -> tuple[int, str]:
    """Exit code and the last line of stderr."""
    with pytest.raises(SystemExit) as left:
        main(shlex.split(argv))
    code = left.value.code
    assert isinstance(code, int)
    return code, (capfd.readouterr().err.splitlines() or [""])[-1]


def any_of(classes: int) -> Classifier:
    """A classifier that names none of its classes."""
    return load_classifier(
        lambda images: images.flatten(1).sum(1).long() * 0, input_size=(1, 8, 8), num_classes=classes
    )


# Numbers are numbers
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_label_files_of_every_spreadsheet(mark: str) -> None:
    Path("labels.csv").write_text(f"file{mark}label\na.png{mark}1\nb.png{mark}2\n")
    assert read_rows(Path("labels.csv"), "--labels") == [("a.png", "1"), ("b.png", "2")]


NO_CLASS = ("-1", "- 1", "_1", "1_", "+1", "1.0", "-0", "1-2")


@pytest.mark.parametrize("label", NO_CLASS)
def test_numbers_are_not_normalised_like_names(label: str, capfd: Capture) -> None:
    """The digits' class 1 is called "1"; none of these is it."""
    lay_out("d/a.png", f"c/{label}/a.png")
    Path("labels.csv").write_text(f"a.png,{label}\n")
    Path("map.json").write_text(json.dumps({label: label}))
    fix = "or --labels none to certify without labels"
    for data in ("--data d --labels labels.csv", "--data c", "--data c --class-map map.json"):
        code, line = certify(capfd, D + data)
        assert code == 2
        assert label in line
        assert line.endswith(fix)
    assert load_images("c", any_of(10), labels="none").labels == [None]


def test_label_minus_one_in_an_array_is_refused(capfd: Capture) -> None:
    np.savez("x.npz", x=np.zeros((10, 8, 8), np.uint8), y=np.arange(-1, 9))
    code, line = certify(capfd, D + "--data x.npz")
    assert code == 2
    assert line.startswith("certify: 1 of 10 class names are not the classifier's (-1); pass --class-map FILE")
    with pytest.raises(UserError, match="cannot tell which of the classifier's 10 classes"):
        load_images("x.npz", any_of(10))  # sorted, -1 would be class 0 and all others one too high
    np.savez("gap.npz", x=np.zeros((3, 8, 8), np.uint8), y=[1, 2, 5])
    with pytest.raises(UserError, match="cannot tell which"):
        load_images("gap.npz", any_of(3))
    assert certify(capfd, D + "--data x.npz --labels none")[0] == 0


# Text of any editor


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks(encoding: str, digits: Classifier) -> None:
    lay_out("d/eins/a.png", "d/zwei/b.png")
    Path("map.json").write_text('{"eins": 1, "zwei": 2}', encoding=encoding)
    Path("map.csv").write_text("eins,1\nzwei,2\n", encoding=encoding)
    Path("labels.csv").write_text("a.png,1\nb.png,2\n", encoding=encoding)
    for given in ({"class_map": "map.json"}, {"class_map": "map.csv"}, {"labels": "labels.csv"}):
        assert load_images("d", digits, **given).labels == [1, 2]


def test_a_published_log_with_a_byte_order_mark(capfd: Capture) -> None:
    log = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\t1\t0:00:01\n"
    Path("x.tsv").write_text(log, encoding="utf-8-sig")
    assert certify(capfd, "table x.tsv --radii 0.25")[0] == 0


def test_a_run_file_with_a_byte_order_mark(capfd: Capture) -> None:
    assert certify(capfd, D + "--max 2 --data digits")[0] == 0
    Path("x.jsonl").write_bytes(b"\xef\xbb\xbf" + Path("x.jsonl").read_bytes())
    assert certify(capfd, "table x.jsonl --radii 0.25")[0] == 0


# Nothing fits


def test_label_mismatch_shows_both_sides(capfd: Capture) -> None:
    lay_out("d/cat/a.png", "d/dog/b.png", "d/cow/c.png", "d/owl/d.png")
    Path("labels.csv").write_text("1.png,1\n2.png,2\n3.png,3\n4.png,4\n")
    assert certify(capfd, D + "--data d --labels labels.csv") == (
        2,
        "certify: --labels labels.csv names none of the 4 images: it has '1.png', '2.png', '3.png', "
        "the data has 'cat/a.png', 'cow/c.png', 'dog/b.png'",
    )
    for name, content in {
        "map.csv": "0,cat\n1,cow\n2,dog\n3,owl\n",
        "map.json": '{"0": "cat", "1": 1, "2": 2}',
    }.items():
        Path(name).write_text(content)
        assert certify(capfd, D + f"--data d --class-map {name}") == (
            2,
            f"certify: --class-map {name} names none of the 4 class names: it has '0', '1', '2', "
            "the data has 'cat', 'cow', 'dog'",
        )


def test_label_mismatch_in_an_audit_shows_both_sides(capfd: Capture) -> None:
    lay_out("d/cat/a.png", "d/dog/b.png")
    audit = "audit --endpoint http://127.0.0.1:9 --protocol json --protocol-option labels=l --sigma 0.25 --n 10 --n0 5"
    audit += " --input-size 1x8x8 --budget 100 --out a --quiet --reference given --data d "
    Path("labels.csv").write_text("1.png,cat\n")
    code, line = certify(capfd, audit + "--labels labels.csv")
    assert (code, line) == (
        2,
        "certify: --labels labels.csv names none of the 2 images: it has '1.png', the data has "
        "'cat/a.png', 'dog/b.png'",
    )
    Path("map.csv").write_text("tabby,feline\npug,canine\n")
    code, line = certify(capfd, audit + "--class-map map.csv")
    assert code == 2
    assert line.endswith("no class 'cat', a label of the data; add it to those it has: 'canine', 'feline'")


@pytest.mark.parametrize(
    ("name", "content"),
    [("map.txt", '{"cat": 1, "dog": 2}'), ("map.json", "cat,1\ndog,2\n"), ("map.JSON", '\ufeff {"cat": 1, "dog": 2}')],
)
def test_a_class_map_is_recognised_by_its_content(name: str, content: str) -> None:
    Path(name).write_text(content)
    mapping, rule = map_names(["cat", "dog"], None, 10, name)
    assert (mapping, rule) == ({"cat": 1, "dog": 2}, f"class map {name}")


def test_invalid_class_map_names_the_cause() -> None:
    for content, said in (
        ('{"cat": NaN, "dog": 2}', "map.json: class 'nan'; expected 0 to 9"),
        ("{}", "names none of the 2 class names: it has nothing, the data has 'cat', 'dog'"),
        ('{"cat": 1, "cat": 2, "dog": 3}', "'cat' occurs twice with different classes"),
    ):
        Path("map.json").write_text(content)
        with pytest.raises(UserError, match=re.escape(said)):
            map_names(["cat", "dog"], None, 10, "map.json")


def test_spreadsheet_as_label_file_is_refused(capfd: Capture) -> None:
    Path("l.xlsx").write_bytes(b"PK\3\4" + bytes([0xA3]) * 99)
    with pytest.raises(
        UserError, match=re.escape("(it is a zip archive, as spreadsheet programs write; save the table")
    ):
        read_labels("l.xlsx")
    Path("l.csv").write_bytes("a.png,Köln\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"invalid .*; save it in UTF-8\)"):
        read_labels("l.csv")


def test_ambiguous_class_map_entry_is_refused() -> None:
    lay_out("d/cat/a.png")
    Path("map.json").write_text('{"cat": 1, "cat": 2}')
    with pytest.raises(UserError, match="'cat' occurs twice with different classes"):
        load_images("d", any_of(10), class_map="map.json")


# Other spellings of one name


@pytest.mark.parametrize("other", ["Cat", "cat ", "CAT", "c\u0327at"])
def test_nearly_equal_folder_names_are_refused(other: str) -> None:
    """They are not two of the three classes; the class map in the message makes them one."""
    name = unicodedata.normalize("NFC", other) if "\u0327" in other else "cat"
    lay_out(f"d/{name}/a.png", f"d/{other}/b.png", "d/dog/c.png")
    with pytest.raises(UserError) as refused:
        load_images("d", any_of(3))
    assert re.search(
        r"class names '.*at ?', '.*at ?' differ only in case, spaces or hyphens; ", str(refused.value), re.I
    )
    with options_in_messages():
        assert 'pass --class-map FILE: JSON {"name": class} or lines "name,class" with the same class' in str(
            refused.value
        )
    for suffix, content in {
        "json": json.dumps({name: 3, other: 3, "dog": 5}),
        "csv": f"{name},3\n{other},3\ndog,5\n",
    }.items():
        Path(f"map.{suffix}").write_text(content)
        labels = load_images("d", any_of(10), class_map=f"map.{suffix}").labels
        assert sorted(v for v in labels if v is not None) == [3, 3, 5]


def test_class_names_match_in_any_case() -> None:
    classifier = load_classifier("digits")
    lay_out("d/1/a.png", "d/1 /b.png")
    images = load_images("d", classifier)
    assert images.labels == [1, 1]
    assert images.rule == "by name (1 of 10 classes)"


def test_label_rows_with_backslashes_and_accents(digits: Classifier) -> None:
    """Backslashes, a leading ./, spaces, and accents apart, as Windows, find and macOS write them."""
    accented = "k\u00e4se.png"
    lay_out("d/x/a.png", "d/x/b.png", "d/y/c.png", f"d/y/{accented}")
    rows = f"x\\a.png,1\n./x/b.png,2\nc.png ,3\n{unicodedata.normalize('NFD', accented)},4\n"
    Path("labels.csv").write_text(rows)
    assert load_images("d", digits, labels="labels.csv").labels == [1, 2, 3, 4]


@pytest.mark.parametrize("heading", ["filename,fold,label", "ID,Fold,Class"])
def test_heading_selects_the_columns(heading: str, digits: Classifier) -> None:
    lay_out("d/a.png", "d/b.png")
    Path("l.csv").write_text(f"{heading}\na.png,1,7\nb.png,2,8\n")
    assert load_images("d", digits, labels="l.csv").labels == [7, 8]


@pytest.mark.parametrize("argv", [["--ids", ""], ["--data", ""], ["--out="], ["--root", ""]])
def test_empty_option_value_is_refused(argv: list[str], capfd: Capture) -> None:
    lay_out("a.png")
    code, line = certify(capfd, shlex.join([*D.replace("--out x.jsonl", "").split(), *argv]))
    assert code == 2
    assert line == (
        f"certify: {argv[0].rstrip('=')} is empty; write a value, or leave it out (is a shell variable not set?)"
    )
    assert not Path("runs").exists()
