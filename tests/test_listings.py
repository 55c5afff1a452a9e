"""Folders, archives and arrays as sources of images; everything that is not read is counted."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import struct
import subprocess
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command import run
from PIL import Image

from certify import load_images, read_run
from certify.cli.app import main
from certify.errors import ImageError, UserError
from certify.models.classifier import Classifier

D = "--model digits --sigma 0.25 --n 100 --n0 10 --out x.jsonl "
KINDS = "an image, a zip file or an .npz file"
Capture = pytest.CaptureFixture[str]


def encoded(value: int = 40, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(out, kind)
    return out.getvalue()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lay_out(*files: str) -> None:
    for i, name in enumerate(files):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(encoded(i))


def archive(path: str, *members: str) -> None:
    with zipfile.ZipFile(path, "w") as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one member twice
        for i, name in enumerate(members):
            info = zipfile.ZipInfo(name)
            info.filename = name  # as it is: backslashes too
            out.writestr(info, encoded(i))


def listed(data: str, classifier: Classifier, **options: str) -> tuple[dict[str, int | None], tuple[str, ...]]:
    """Labels by id, and what was not read."""
    images = load_images(data, classifier, **options)
    return {item.id: label for item, label in zip(images.items, images.labels, strict=True)}, images.unread


def refused(capfd: Capture, argv: str) -> str:
    """The one line of a refusal."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        main(shlex.split(argv))
    (line,) = capfd.readouterr().err.splitlines()
    assert left.value.code == 2
    return line


# Folders


def test_folder_links_are_followed_and_loops_are_not(digits: Classifier) -> None:
    lay_out("d/1/a.png", "elsewhere/2/b.png", "elsewhere/3/c.png", "elsewhere/3/d.png")
    Path("d/2").symlink_to("../elsewhere/2")
    Path("d/3").symlink_to(Path("elsewhere/3").absolute())
    Path("d/3/up").symlink_to("..", target_is_directory=True)  # elsewhere: there 3 is a way back to itself
    Path("d/1/self").symlink_to(".", target_is_directory=True)
    Path("d/1/e.png").symlink_to("../3/c.png")
    with pytest.raises(UserError, match="lie outside its 3 class folders"):  # 3/up/2/b.png
        listed("d", digits)
    Path("elsewhere/3/up").unlink()
    labels, unread = listed("d", digits)
    assert labels == {"1/a.png": 1, "1/e.png": 1, "2/b.png": 2, "3/c.png": 3, "3/d.png": 3}
    assert unread == ("1 link back to a folder around it (1/self)",)


def test_unread_files_are_counted_and_named(digits: Classifier) -> None:
    lay_out("d/1/a.png", "d/1/b.jfif", "d/2/c.jpe", "d/1/d.heic", "d/2/e.HEIC", "d/2/f.avif", "d/README", "d/.g.png")
    lay_out("d/.cache/h.png", "d/.cache/i.png")
    Path("d/2/gone.png").symlink_to("nowhere.png")
    Path("d/2/round.png").symlink_to("round.png")
    os.mkfifo("d/2/pipe.png")
    labels, unread = listed("d", digits)
    assert labels == {"1/a.png": 1, "1/b.jfif": 1, "2/c.jpe": 2}
    assert unread == (
        "2 hidden files (.cache, ...)",
        "2 .heic files (1/d.heic, ...)",
        "2 dangling links (2/gone.png, ...)",
        "1 file without a suffix (README)",
        "1 .avif file (2/f.avif)",
        "1 more",
    )


@contextlib.contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder of a user whom permissions bind, also where the tests are run by root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder)


def test_an_unreadable_folder_is_an_error(digits: Classifier) -> None:
    listed("digits", digits)  # whatever is imported for it
    with unprivileged() as folder:
        for name in ("1", "2"):
            (folder / "it's" / name).mkdir(parents=True)
            (folder / "it's" / name / "a.png").write_bytes(encoded())
        (folder / "it's" / "2").chmod(0)
        with pytest.raises(UserError) as error:
            listed(str(folder / "it's"), digits)
        text = str(error.value)
        assert text.startswith(f"cannot list {folder}/it's/2: Permission denied; make it readable: ")
        subprocess.run(text.partition("make it readable: ")[2], shell=True, check=True)
        assert listed(str(folder / "it's"), digits) == ({"1/a.png": 1, "2/a.png": 2}, ())
        (folder / "it's").chmod(0)
        with pytest.raises(UserError, match="it's/1: Permission denied"):
            listed(str(folder / "it's/1"), digits)


# Archives


def test_backslashes_in_archives_separate_folders(digits: Classifier) -> None:
    archive("x.zip", "data\\1\\a.png", "data\\1\\b.png", "data\\2\\", "data\\2\\a.png")
    assert listed("x.zip", digits) == ({"1/a.png": 1, "1/b.png": 1, "2/a.png": 2}, ())
    archive("y.zip", "test\\1\\a.png", "train\\1\\a.png")
    assert listed("y.zip/test", digits) == ({"1/a.png": 1}, ())
    archive("z.zip", ".\\1\\a.png", "/2/b.png", "./3//c.png")
    assert listed("z.zip", digits) == ({"1/a.png": 1, "2/b.png": 2, "3/c.png": 3}, ())


def test_unread_members_of_an_archive_are_counted_and_named(digits: Classifier) -> None:
    archive("x.zip", "1/a.png", "2/b.png", "1/a.png", "__MACOSX/1/._a.png", "2/c.jp2", "notes.txt")
    with zipfile.ZipFile("x.zip", "a") as out:
        link = zipfile.ZipInfo("2/link.png")
        link.external_attr = 0o120777 << 16
        out.writestr(link, "../1/a.png")
        out.writestr("2/d.png/", "")  # a folder
    labels, unread = listed("x.zip", digits)
    assert labels == {"1/a.png": 1, "2/b.png": 2}
    assert sorted(unread) == [
        "1 .jp2 file (2/c.jp2)",
        "1 .txt file (notes.txt)",
        "1 hidden file (__MACOSX/1/._a.png)",
        "1 link inside the archive (2/link.png)",
        "1 overwritten member (1/a.png)",
    ]
    assert load_images("x.zip", digits).load(0)[0, 0, 0] * 255 == 2  # the later member, as unzip has it


@pytest.mark.parametrize("around", ["", "ds/", "some/where/"])
@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_sibling_splits_are_refused_with_advice(kind: str, around: str, capfd: Capture, digits: Classifier) -> None:
    files = [f"{around}{split}/{c}/{c}.png" for split in ("train", "test") for c in (3, 4)]
    if kind == "zip":
        archive("x y.zip", *files, "__MACOSX/._x")
    else:
        lay_out(*(f"x y/{name}" for name in files))
    data = "x y.zip" if kind == "zip" else "x y"
    line = refused(capfd, D + f"--data {shlex.quote(data)}")
    assert (
        f"images in {data} lie in several folders of folders (under test, train); expected one flat folder or" in line
    )
    advice = re.fullmatch(r".*: choose one, such as --data (.*)", line)
    assert advice is not None
    assert shlex.split(advice[1]) == [f"{data}/{around}test"]
    assert listed(shlex.split(advice[1])[0], digits) == ({"3/3.png": 3, "4/4.png": 4}, ())
    if kind == "zip":
        assert listed("x y.zip/train", digits)[0] == {"3/3.png": 3, "4/4.png": 4}  # without the folders around
        assert load_images("x y.zip/test", digits).name == "x y.zip/test"
        assert "no folder 'tset' in x y.zip; expected one such as test, train" in refused(
            capfd, D + "--data 'x y.zip/tset'"
        )


def test_advised_folder_of_an_archive_works() -> None:
    archive("x.zip", *(f"{split}/{c}/{c}.png" for split in ("train", "val") for c in (3, 4)))
    run(*(D + "--quiet --data x.zip/val").split())
    assert [(row["id"], row["label"]) for row in read_run("x.jsonl").images] == [("3/3.png", 3), ("4/4.png", 4)]


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_images_beside_class_folders_are_named(kind: str, capfd: Capture, digits: Classifier) -> None:
    files = ["3/a.png", "3/b.png", "4/a.png", "cover.png", "4/old/a.png", "4/old/b.png", "5/c.png"]
    archive("d.zip", *files) if kind == "zip" else lay_out(*(f"d/{name}" for name in files))
    data = "d.zip" if kind == "zip" else "d"
    assert refused(capfd, D + f"--data {data}") == (
        f"certify: 3 of 7 images in {data} lie outside its 3 class folders (4/old/a.png, 4/old/b.png, cover.png); "
        "take them out, pass --labels FILE.csv, or --labels none to certify without labels"
    )
    assert listed(data, digits, labels="none")[0] == dict.fromkeys(files)
    Path("l.csv").write_text("".join(f"{name},{i}\n" for i, name in enumerate(files)))
    assert listed(data, digits, labels="l.csv")[0] == {name: i for i, name in enumerate(files)}


def test_training_refuses_images_beside_class_folders(capfd: Capture) -> None:
    lay_out("d/0/a.png", "d/0/b.png", "d/1/a.png", "d/1/b.png", "d/cover.png")
    train = (
        "train --train-classifier cifar_resnet20 --input-size 3x32x32 --data d --sigma 0.25 --out o --epochs 1 --quiet"
    )
    assert "1 of 5 images in d lie outside its 2 class folders (cover.png)" in refused(capfd, train)


@pytest.mark.parametrize("name", ["a.png", "z.png"])
def test_training_names_an_unreadable_image(name: str, capfd: Capture) -> None:
    lay_out("d/a.png", "d/m.png", "d/z.png")
    Path("d", name).write_bytes(b"")
    line = refused(capfd, "train --denoiser unet --data d --sigma 0.25 --out o --quiet")
    assert line == f"certify: image {name} is empty (0 bytes); mend it or take it out"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\xef\xbb\xbf<!DOCTYPE html><html>Quota exceeded</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\n", "a Git LFS pointer"),
    ],
)
def test_web_pages_and_lfs_pointers_named_as_archives(content: bytes, what: str, capfd: Capture) -> None:
    for name, expected in {"x.zip": "a zip file", "x.npz": "an .npz file"}.items():
        Path(name).write_bytes(content)
        assert refused(capfd, D + f"--data {name}").startswith(f"certify: {name} is {what}, not {expected}")


@pytest.mark.parametrize("name", ["mine.zip", "mine.npz", "mine.tgz", "mine"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_archive_has_unpacking_advice_under_any_name(name: str, mode: str, capfd: Capture) -> None:
    lay_out("d/1/a.png", "d/2/b.png")
    with tarfile.open(name, mode) as out:
        out.add("d", ".")
    if not Path(name).suffix:
        assert "is a tar archive, not an image, a zip file or an .npz file" in refused(capfd, D + f"--data ./{name}")
        return
    line = refused(capfd, D + f"--data {name}")
    assert line.startswith(f"certify: {name} is a tar archive, not a")
    subprocess.run(line.partition("name the folder: ")[2], shell=True, check=True)
    run(*(D + "--data mine --quiet").split())


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"7z\xbc\xaf\x27\x1c" + bytes(99), "a 7-Zip archive"),
        (b"Rar!\x1a\x07\x01\x00" + bytes(99), "a RAR archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
        (b"\xfd7zXZ\0" + bytes(99), "compressed by xz"),
        (b"\x80\x04}q\0.", "a Python pickle"),
    ],
)
def test_other_formats_named_as_archives(content: bytes, what: str, capfd: Capture) -> None:
    for name, expected in {"x.zip": "a zip file", "x.npz": "an .npz file"}.items():
        Path(name).write_bytes(content)
        assert refused(capfd, D + f"--data {name}").startswith(f"certify: {name} is {what}, not {expected}")


def test_an_encrypted_archive_is_refused_as_a_whole(capfd: Capture) -> None:
    archive("x.zip", "1/a.png", "2/b.png")
    content = bytearray(Path("x.zip").read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        for place in re.finditer(signature, content):
            content[place.start() + flags] |= 1
    Path("x.zip").write_bytes(content)
    assert refused(capfd, D + "--data x.zip") == (
        "certify: x.zip is encrypted with a password; unpack it (unzip x.zip) and name the folder"
    )


def test_truncated_and_nested_archives_are_named(capfd: Capture) -> None:
    archive("x.zip", "1/a.png", "2/b.png")
    with zipfile.ZipFile("outer.zip", "w") as out:
        out.write("x.zip")
    assert refused(capfd, D + "--data outer.zip").endswith("; it holds 1 .zip file (x.zip)")
    assert refused(capfd, D + "--data outer.zip/x.zip").endswith("no folder 'x.zip' in outer.zip; it holds no folders")
    Path("x.zip").write_bytes(Path("x.zip").read_bytes()[:150])
    assert "it is cut off: the list of its files, at its end, is missing" in refused(capfd, D + "--data x.zip")


def test_npy_file_is_not_an_npz_file(capfd: Capture) -> None:
    np.save("x.npy", np.zeros((2, 8, 8), np.uint8))
    advice = "save images and labels with numpy.savez(FILE, x=images, y=labels)"
    assert refused(capfd, D + "--data x.npy").endswith(f"x.npy is a NumPy array, not {KINDS}; {advice}")
    Path("x.npy").rename("x.npz")
    assert refused(capfd, D + "--data x.npz").endswith(f"x.npz is a NumPy array, not an .npz file; {advice}")


def test_odd_members_of_an_npz(capfd: Capture, digits: Classifier) -> None:
    with zipfile.ZipFile("x.npz", "w") as out:
        out.writestr("x", "text")
    assert refused(capfd, D + "--data x.npz") == "certify: x.npz holds x; expected x (images) and y (labels)"
    member = io.BytesIO()
    np.save(member, np.zeros((2, 8, 8), np.uint8))
    with zipfile.ZipFile("x.npz", "w") as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            out.writestr("x.npy", member.getvalue())
    assert refused(capfd, D + "--data x.npz") == "certify: x.npz holds x 2 times; save each array once"
    np.savez("x.npz", x=np.full((2, 8, 8), 0.25, np.longdouble))
    assert (load_images("x.npz", digits).load(0) == 0.25).all()


def test_pictures_in_formats_that_are_not_read_are_named(capfd: Capture) -> None:
    for content, what in (
        (b"\0\0\0\x18ftypheic" + bytes(99), "a HEIC image"),
        (b"%PDF-1.7" + bytes(99), "a PDF document"),
    ):
        Path("a.jpg").write_bytes(content)
        line = refused(capfd, D.replace("x.jsonl", f"{what[-3:]}.jsonl") + "--data a.jpg --strict --quiet")
        assert line.startswith(f"certify: image a.jpg is {what}, which is not read (")


# Where it is said


def test_data_line_names_unread_files(capfd: Capture) -> None:
    lay_out("d/1/a.png", "d/2/b.png", "d/2/c.heic")
    run(*(D + "--data d").split())
    says = "not read: 1 .heic file (2/c.heic)"
    assert f"data       d: 2 of 2 images; labels: by name (2 of 10 classes); {says}\n" in capfd.readouterr().err
    assert read_run("x.jsonl").header["unread"] == ["1 .heic file (2/c.heic)"]
    run(*(D + "--data d").split())  # it is no setting: the same run
    run(*"evaluate-denoiser --denoiser median --sigma 0.25 --model digits --data d".split())
    assert f"data       d: 2 of 2 images; {says}\n" in capfd.readouterr().err
    run(*"compare --model digits --defences none --attacks none --data d --out c.jsonl".split())
    assert f"data       d: 2 of 2 images; {says}\n" in capfd.readouterr().err


def test_label_rows_without_an_image_are_counted(capfd: Capture, digits: Classifier) -> None:
    lay_out("d/a.png", "d/b.png", "d/c.png")
    Path("l.csv").write_text("file,label\na.png,1\nb.png,2\nc.png,3\nd.png,4\ne.png,5\n")
    expected = ("2 rows of l.csv without an image (d.png, ...)",)
    assert load_images("d", digits, labels="l.csv", max_images=2).unread == expected
    run(*(D + "--data d --labels l.csv").split())
    assert f"labels: from l.csv; not read: {expected[0]}\n" in capfd.readouterr().err


def test_audit_and_training_name_unread_files(capfd: Capture) -> None:
    lay_out("d/1/a.png", "d/1/b.png", "d/2/c.png", "d/2/d.avif")
    audit = "audit --endpoint http://127.0.0.1:9 --protocol json --protocol-option labels=l --sigma 0.25 --n 10 --n0 5"
    run(*f"{audit} --input-size 1x8x8 --budget 100 --out a --data d --dry-run".split())
    assert "images     d: 3 of 3, size 1x8x8; not read: 1 .avif file (2/d.avif)\n" in capfd.readouterr().err
    train = "train --denoiser unet --option channels=[8,8] --option blocks=1 --sigma 0.25 --input-size 1x8x8 --data d"
    run(*f"{train} --epochs 1 --batch-size 2 --validations 1 --held-out 1 --out o".split())
    assert "1 held out; not read: 1 .avif file (2/d.avif)\n" in capfd.readouterr().err


# Arrays


def test_other_arrays_of_an_npz_are_named(digits: Classifier) -> None:
    x = np.zeros((2, 8, 8), np.uint8)
    np.savez("x.npz", x=x, labels=[1, 2], mean=0.5)
    assert load_images("x.npz", digits).unread == ("2 other arrays (labels, ...)",)
    np.savez_compressed("y.npz", x=x, y=[1, 2])
    assert load_images("y.npz", digits).unread == ()


def test_large_array_is_read_only_as_far_as_needed(digits: Classifier) -> None:
    """Sixty million stored images, which no test could list or load; the file is a hole but for its ends."""
    count, size = 60_000_000, 64
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (count, 8, 8)})
    length = len(head.getvalue()) + count * size
    common = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, 0, length, length, 5, 0)
    central = b"PK\1\2" + struct.pack("<H", 20) + common + bytes(14) + b"x.npy"
    with open("x.npz", "wb") as file:
        file.write(b"PK\3\4" + common + b"x.npy" + head.getvalue())
        file.seek(count * size - size, io.SEEK_CUR)
        file.write(bytes([255]) * size)
        end = file.tell()
        file.write(central + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), end, 0))
    few = load_images("x.npz", digits, skip=1000, max_images=2)
    assert ([item.id for item in few.items], few.available) == (["0", "1000"], count)
    assert few.load(1).max() == 0
    last = load_images("x.npz", digits, ids=["59999999"])
    assert last.load(0).min() == 1
    with pytest.raises(UserError, match=r"no image .60000000. in x\.npz; ids look like 0, 1, 2"):
        load_images("x.npz", digits, ids=["60000000"])
    Path("x.npz").unlink()


@pytest.mark.parametrize("dtype", ["u1", "<f4", ">f2"])
def test_compressed_arrays_are_unpacked_as_far_as_needed(dtype: str, digits: Classifier) -> None:
    """The end of the file is damaged: nobody notices who does not read so far, and what lies there is no image."""
    noise = np.random.default_rng(0).integers(0, 256, (3000, 8, 8))
    x = (noise if dtype == "u1" else noise / 255).astype(dtype)
    np.savez_compressed("x.npz", x=x, y=np.arange(3000) % 10)
    content = bytearray(Path("x.npz").read_bytes())
    with zipfile.ZipFile("x.npz") as whole:
        at = whole.getinfo("x.npy").compress_size - 100
    content[at : at + 50] = bytes(50)
    Path("x.npz").write_bytes(content)
    images = load_images("x.npz", digits)
    for i in (1000, 0, 1, 1500):  # in any order
        assert np.allclose(images.load(i)[0], x[i].astype(float) / (255 if dtype == "u1" else 1), atol=1e-6)
        assert images.labels[i] == i % 10
    with pytest.raises(ImageError, match="cannot be unpacked"):
        images.load(2999)
    run(*(D + "--quiet --data x.npz --max 1").split())


def test_arrays_with_floats_above_one_are_refused(capfd: Capture) -> None:
    for name, save in {"x.npz": np.savez, "y.npz": np.savez_compressed}.items():
        save(name, x=np.full((3, 8, 8), 255.0))
        assert "x has values from 255 to 255; expected [0, 1], or uint8" in refused(capfd, D + f"--data {name}")


# Choosing


@pytest.mark.slow
def test_ids_with_commas(capfd: Capture) -> None:
    lay_out("d/a,b.png", "d/a.png", "d/c.png")
    line = refused(capfd, D + "--data d --ids a,b.png")
    expected = (
        "certify: no image 'a' in d; ids look like a,b.png, a.png, c.png; quote an id that contains a comma: --ids "
    )
    assert line.startswith(expected)
    advice = re.search(r"--ids (.*)", line)
    assert advice is not None
    run(*shlex.split(D + f"--quiet --data d {advice[0]}"))
    assert [row["id"] for row in read_run("x.jsonl").images] == ["a,b.png"]
    run(*shlex.split(D + """--quiet --data d --out y.jsonl --ids 'c.png,"a,b.png",a.png'"""))
    assert [row["id"] for row in read_run("y.jsonl").images] == ["c.png", "a,b.png", "a.png"]


# Many


@pytest.mark.parametrize(
    "verb", ["", "predict ", "compare --defences none --attacks none ", "evaluate-denoiser --denoiser median "]
)
def test_many_bad_images_give_few_warnings(verb: str, capfd: Capture) -> None:
    lay_out("d/1/z.png", "d/2/z.png")
    for i in range(60):
        Path(f"d/1/{i:02}.png").write_bytes(b"")
    options = D if not verb else D.replace("--n0 10 ", "") if verb == "predict " else "--model digits "
    options = options if "evaluate" not in verb else options + "--sigma 0.25 --max 100 "
    quiet = "--json " if "evaluate" in verb else "--quiet "
    run(*f"{verb}{options}{quiet}--data d".split())
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 11
    assert "1/00.png" in lines[0]
    where = "; the run file says why" if verb in ("", "predict ") else ""
    assert lines[-1] == f"warning: 50 more images are left out{where}"
