"""What people get wrong: one line that says what came, what was expected and what to write instead; never a traceback.

Exit code 2 is the user's mistake, 1 a fault on the way; neither harms a file that is there.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from certify.cifar_resnet import CifarResNet
from certify.cli.app import main
from certify.decode import decode
from certify.errors import ImageError
from certify.records import read_run

Content = bytes | str | Callable[[], bytes] | None  # None is a folder
D = "--model digits --sigma 0.25 --n 100 --n0 10 --max 2 --quiet "  # the last of two equal options wins
W = "--model cifar_resnet20 --sigma 0.25 --n 100 --quiet --weights "


# --- files to get wrong ------------------------------------------------------------------------------------------------


def picture(array: Any, mode: str | None = None, kind: str = "PNG", **options: Any) -> bytes:
    """An image file of an array."""
    out = io.BytesIO()
    Image.fromarray(np.asarray(array), mode).save(out, kind, **options)
    return out.getvalue()


def raw_png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG chunk by chunk: its header need not be true."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


DIGIT = picture(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
HTML = "<!DOCTYPE html><html><body>404: not found</body></html>"
FOLDERS = {"d/cat/a.png": DIGIT, "d/dog/b.png": DIGIT}


def npz(**arrays: Any) -> bytes:
    """An .npz of these arrays."""
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def torch_file(content: Any) -> bytes:
    """What torch.save writes."""
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


@functools.cache
def resnet20() -> bytes:
    """A whole checkpoint."""
    return torch_file(CifarResNet(20).state_dict())


class Hostile:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("pwned", "w")


@functools.cache
def finished(verb: str = "run") -> bytes:
    """A run file of two digits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        with pytest.raises(SystemExit) as left:
            main([verb, *without_n0(D, verb), "--out", str(path)])
        assert left.value.code == 0
        return path.read_bytes()


def without_n0(argv: str, verb: str) -> list[str]:
    """``certify predict`` has one stage."""
    return (argv.replace("--n0 10 ", "") if verb == "predict" else argv).split()


def torn() -> bytes:
    """A run file whose first image (line 2) is cut in half."""
    lines = finished().splitlines(keepends=True)
    return lines[0] + lines[1][:40] + b"\n" + lines[2]


def log(line: str) -> str:
    """A log as the field publishes them."""
    return f"idx\tlabel\tpredict\tradius\tcorrect\ttime\n{line}\n"


# --- the table ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A command, the files it finds, how it ends and what its line must say."""

    argv: str
    words: tuple[str, ...]
    files: dict[str, Content]
    code: int

    def build(self, folder: Path) -> list[str]:
        """Write the files and give the arguments."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir()
            else:
                given = content() if callable(content) else content
                path.write_bytes(given.encode() if isinstance(given, str) else given)
        return self.argv.split()


def case(id: str, argv: str, *words: str, files: dict[str, Content] | None = None, code: int = 2) -> Any:
    """A line of the table."""
    return pytest.param(Case(argv, words, files or {}, code), id=id)


CASES = [
    # names
    case("unknown model", "--model resnet5O --sigma 1", "unknown model 'resnet5O'", "resnet50"),
    case("unknown model of timm", "--model timm:resnet5O --sigma 1", "'resnet5O'", "resnet50", "timm"),
    case("unknown dataset", D + "--data cifar1O", "unknown dataset 'cifar1O'", "cifar10"),
    case("unknown option", "--modle digits --sigma 1", "--modle", "--model"),
    case("unknown verb", "plto x", "plto", "plot"),
    case("unknown bound", D + "--bound clopper", "unknown bound 'clopper'", "clopper-pearson"),
    case("unknown denoiser", D + "--denoiser medain", "unknown denoiser 'medain'", "median"),
    case("unknown device", D + "--device gpu", "'gpu'", "cpu"),
    case("unknown list", "list modles", "'modles'", "models"),
    # numbers
    case("no model", "--sigma 1", "--model"),
    case("no sigma", "--model digits", "--sigma"),
    *(case(f"sigma {v}", D + f"--sigma {v}", "--sigma", v, "above 0") for v in ("0", "-1", "nan", "inf", "wide")),
    *(case(f"n {v}", D + f"--n {v}", "--n", v, "whole number from 1") for v in ("0", "1.5", "-3", "nan", "many")),
    case("n0 0", D + "--n0 0", "--n0", "'0'", "whole number from 1"),
    *(case(f"alpha {v}", D + f"--alpha {v}", "--alpha", v, "between 0 and 1") for v in ("0", "1", "2", "nan")),
    case("skip 0", D + "--skip 0", "--skip", "'0'", "from 1"),
    case("max 0", D + "--max 0", "--max", "'0'", "from 1"),
    case("batch size 0", D + "--batch-size 0", "--batch-size", "'0'", "from 1"),
    case("radii -1", D + "--radii -1", "--radii", "-1", "from 0"),
    case("radii text", D + "--radii 0,far", "--radii", "0,far", "0.25"),
    case("mean without std", D + "--mean 0.5", "--mean", "--std", "both"),
    case("std 0", D + "--mean 0.5 --std 0", "--std", "above 0"),
    case("two means for one channel", D + "--mean 0.5,0.5 --std 1,1", "--mean", "expected 1"),
    case("classes", D + "--num-classes 5", "10 classes", "5", "--num-classes"),
    case("size in two parts", D + "--input-size 8x8", "--input-size", "8x8", "3x224x224"),
    case("size of another model", D + "--input-size 3x32x32", "3x32x32", "--input-size"),
    # weights
    case("no weights of its own", W.removesuffix("--weights "), "cifar_resnet20", "--weights FILE"),
    case("weights missing", W + "x.pth", "no weights file 'x.pth'", ".safetensors"),
    case("weights a folder", W + "x.pth", "x.pth", ".safetensors", files={"x.pth": None}),
    case("weights cut", W + "x.pth", "x.pth", "damaged", files={"x.pth": lambda: resnet20()[:40_000]}),
    case("weights hostile", W + "x.pth", "x.pth", "refused", "open", files={"x.pth": lambda: torch_file([Hostile()])}),
    case("pickle hostile", W + "x.pth", "x.pth", "refused", "open", files={"x.pth": pickle.dumps(Hostile(), 2)}),
    case("new pickle hostile", W + "x.pth", "x.pth", "refused", files={"x.pth": pickle.dumps(Hostile(), 4)}),
    case("whole module", W + "x.pth", "x.pth", "refused", files={"x.pth": lambda: torch_file(torch.nn.ReLU())}),
    case("weights HTML", W + "x.pth", "x.pth", "web page", files={"x.pth": HTML}),
    case("weights text", W + "x.pth", "x.pth", "not a checkpoint", files={"x.pth": "my notes on the weights\n"}),
    case("weights LFS", W + "x.pth", "x.pth", "git lfs", files={"x.pth": "version https://git-lfs.github.com/spec/v1"}),
    case("weights empty", W + "x.pth", "x.pth", "empty", files={"x.pth": ""}),
    case(
        "weights without tensors", W + "x.pth", "epoch", "state dict", files={"x.pth": lambda: torch_file({"epoch": 9})}
    ),
    case(
        "safetensors cut",
        W + "x.safetensors",
        "x.safetensors",
        "not a whole safetensors file",
        files={"x.safetensors": lambda: safetensors_bytes(CifarResNet(20).state_dict())[:-100]},
    ),
    case(
        "weights of another depth",
        W.replace("20", "56") + "x.pth",
        *("x.pth", "does not fit cifar_resnet56", "missing", "layer1.3.conv1.weight", "layer1.3.bn1.weight"),
        files={"x.pth": resnet20},
    ),
    # models in files and modules
    case("checkpoint as model", "--model x.pth --sigma 1", "x.pth", "--weights", files={"x.pth": resnet20}),
    case("checkpoint .pt as model", "--model x.pt --sigma 1", "x.pt", "--weights", files={"x.pt": resnet20}),
    case("TorchScript missing", "--model x.pt --sigma 1", "x.pt", "TorchScript"),
    case("TorchScript garbage", "--model x.pt --sigma 1", "x.pt", "TorchScript", files={"x.pt": b"\x00garbage" * 99}),
    case("ONNX garbage", "--model x.onnx --sigma 1", "x.onnx", "ONNX", files={"x.onnx": b"\x00garbage" * 99}),
    case("no such module", "--model no_such.module:net --sigma 1", "no_such", "import"),
    case("module that breaks", "--model broken_a:net --sigma 1", "broken_a", files={"broken_a.py": "def net(:"}),
    case("module that raises", "--model broken_b:net --sigma 1", "broken_b", "1 / 0", files={"broken_b.py": "1 / 0"}),
    case("no such attribute", "--model json:net --sigma 1", "'json'", "'net'", "loads"),
    case("not callable", "--model sys:maxsize --sigma 1", "sys:maxsize", "int", "expected a module"),
    case(
        "factory that raises",
        *("--model broken_c:net --sigma 1 --input-size 3x8x8", "broken_c:net", "no such file"),
        files={"broken_c.py": "def net():\n    raise RuntimeError('no such file')"},
    ),
    case(
        "function of another shape",
        *("--model broken_d:net --sigma 1 --input-size 3x8x8", "broken_d:net", "(2, 3, 8, 8)", "(2, K)"),
        files={"broken_d.py": "def net(images):\n    return images"},
    ),
    # data
    case("data missing", D + "--data no/where", "no/where", "folder"),
    case("data of another kind", D + "--data x.txt", "x.txt", ".npz", files={"x.txt": "hello"}),
    case("folder empty", D + "--data d", "no images in d", ".png", files={"d": None}),
    case("depths", D + "--data d", "several depths", "d/b", files={"d/a.png": DIGIT, "d/b/c.png": DIGIT}),
    case("folders without a map", D + "--data d", "cat, dog", "--class-map", "--labels none", files=FOLDERS),
    case("map missing", D + "--data d --class-map m.csv", "m.csv", "--class-map", files=FOLDERS),
    case("map misses", D + "--data d --class-map m.csv", "m.csv", "dog", files={**FOLDERS, "m.csv": "cat,1\n"}),
    case("map beyond", D + "--data d --class-map m.csv", "'10'", "0 to 9", files={**FOLDERS, "m.csv": "cat,1\ndog,10"}),
    case("map a list", D + "--data d --class-map m.json", "list", "object", files={**FOLDERS, "m.json": "[1]"}),
    case("map not JSON", D + "--data d --class-map m.json", "m.json", "JSON", files={**FOLDERS, "m.json": "{cat"}),
    case(
        "map without folders",
        *(D + "--data d --class-map m.csv", "--class-map", "--labels"),
        files={"d/a.png": DIGIT, "m.csv": "cat,1"},
    ),
    case("labels missing", D + "--data d --labels l.csv", "l.csv", "--labels", files=FOLDERS),
    case("labels miss", D + "--data d --labels l.csv", "l.csv", "b.png", files={**FOLDERS, "l.csv": "a.png,1\n"}),
    case("labels narrow", D + "--data d --labels l.csv", "l.csv", "two columns", files={**FOLDERS, "l.csv": "a.png\n"}),
    case("labels binary", D + "--data d --labels l.csv", "l.csv", "CSV", files={**FOLDERS, "l.csv": DIGIT}),
    case("npz to 255", D + "--data x.npz", "255", "[0, 1]", files={"x.npz": npz(x=np.full((3, 8, 8), 255.0))}),
    case("npz of objects", D + "--data x.npz", "x.npz", "plain arrays", files={"x.npz": npz(x=np.array([Hostile()]))}),
    case("npz without x", D + "--data x.npz", "x.npz", "holds images", "expected x", files={"x.npz": npz(images=[1])}),
    case("npz of one image", D + "--data x.npz", "x.npz", "(8, 8)", "(N, H, W)", files={"x.npz": npz(x=np.eye(8))}),
    case("npz cut", D + "--data x.npz", "x.npz", "not a readable", files={"x.npz": npz(x=np.ones((9, 8, 8)))[:300]}),
    case("npz of labels", D + "--data x.npz", "y", "3 integers", files={"x.npz": npz(x=np.ones((3, 8, 8)), y=[1, 2])}),
    case("npz beyond", D + "--data x.npz", "10", "--class-map", files={"x.npz": npz(x=np.ones((1, 8, 8)), y=[10])}),
    case("npy", D + "--data x.npy", "x.npy", ".npz", files={"x.npy": b"\x93NUMPY"}),
    case("npy named npz", D + "--data x.npz", "x.npz", files={"x.npz": lambda: npy(np.ones((2, 8, 8)))}),
    case("zip corrupt", D + "--data x.zip", "x.zip", "zip", files={"x.zip": b"PK\x03\x04" + b"?" * 99}),
    case("zip empty", D + "--data x.zip", "no images in x.zip", files={"x.zip": b"PK\x05\x06" + b"\0" * 18}),
    case("no such id", D + "--ids 1300,7", "'7'", "digits", "1297"),
    case("no dataset there", D + "--data imagenet --root r", "imagenet", "--root"),
    # the run file
    case(
        "other settings",
        D + "--sigma 0.5 --out x.jsonl",
        "x.jsonl",
        "sigma 0.25 there, 0.5 here",
        "--out",
        files={"x.jsonl": finished},
    ),
    case("torn inside", D + "--out x.jsonl", "x.jsonl", "damaged at line 2", files={"x.jsonl": torn}),
    case("not a run file", D + "--out x.jsonl", "x.jsonl", "not a run file", files={"x.jsonl": '{"a": 1}\n'}),
    case(
        "not even JSON", D + "--out x.jsonl", "x.jsonl", "not a run file", files={"x.jsonl": "notes, one line, no end"}
    ),
    case("below a file", D + "--out f.txt/x.jsonl", "f.txt/x.jsonl", "--out", files={"f.txt": "keep me"}),
    case("suffix", D + "--out x.csv", "x.csv", ".jsonl"),
    case("folder named .jsonl", D + "--out x.jsonl", "x.jsonl", "--out", files={"x.jsonl": None}),
    case("no room for the curve", D + "--out x.jsonl", "x.png", "untouched", files={"x.png": None}, code=1),
    # plot and table
    case("plot to .bmp", "plot x.jsonl -o x.bmp", "x.bmp", ".png", files={"x.jsonl": finished}),
    case("plot below a file", "plot x.jsonl -o f/x.png", "f/x.png", files={"x.jsonl": finished, "f": ""}, code=1),
    case("table below a file", "table x.jsonl -o f/x.txt", "f/x.txt", files={"x.jsonl": finished, "f": ""}, code=1),
    case("table radii", "table x.jsonl --radii -1", "--radii", "-1", "from 0", files={"x.jsonl": finished}),
    case("table format", "table x.jsonl --format html", "html", "markdown", files={"x.jsonl": finished}),
    case("nothing to plot", "plot", "RUN"),
    *(
        made
        for verb in ("plot", "table")
        for made in (
            case(f"{verb} missing", f"{verb} x.jsonl", "cannot read x.jsonl"),
            case(f"{verb} folder", f"{verb} runs", "runs is a folder", "runs/*.jsonl", files={"runs": None}),
            case(
                f"{verb} predictions", f"{verb} x.jsonl", "predictions", files={"x.jsonl": lambda: finished("predict")}
            ),
            case(f"{verb} torn", f"{verb} x.jsonl", "damaged at line 2", files={"x.jsonl": torn}),
            case(f"{verb} picture", f"{verb} x.png", "x.png is not a run file", files={"x.png": DIGIT}),
            case(f"{verb} empty", f"{verb} x.jsonl", "x.jsonl", "no header", files={"x.jsonl": ""}),
        )
    ),
    case("log columns", "table x.tsv", "x.tsv", "columns idx b", files={"x.tsv": "idx\tb\n"}),
    case("log line", "table x.tsv", "x.tsv", "line 2", "far", files={"x.tsv": log("0\t1\t1\tfar\t1\t0:00:01")}),
    case("log contradicts", "table x.tsv", "line 2", "contradicts", files={"x.tsv": log("0\t1\t1\t0.5\t0\t0:00:01")}),
    case("log not text", "table x.tsv", "x.tsv", files={"x.tsv": log("0").encode() + b"\xff\xfe\n"}),
]


def npy(array: Any) -> bytes:
    """A bare array file."""
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def certify(capfd: pytest.CaptureFixture[str], argv: list[str]) -> tuple[int, str, list[str]]:
    """Exit code, stdout and the lines of stderr (of C libraries too)."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        main(argv)
    out, err = capfd.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, err.splitlines()


def only_line(lines: list[str]) -> str:
    """The complaint, after warnings."""
    rest = [line for line in lines if not line.startswith("warning: ")]
    assert len(rest) == 1, lines
    assert rest[0].startswith("certify: ")
    return rest[0]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, no model hub, no cache, and an import path that is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name, value in (("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_HOME", str(tmp_path)), ("no_proxy", "*")):
        monkeypatch.setenv(name, value)
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


@pytest.mark.parametrize("given", CASES)
def test_one_line(given: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = given.build(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, out, lines = certify(capfd, argv)
    line = only_line(lines)
    assert [word for word in given.words if word not in line] == [], line
    assert code == given.code
    assert out == ""
    assert {path: path.read_bytes() for path in before} == before
    assert not Path("pwned").exists()


@pytest.mark.parametrize("model", ["resnet50", "resnet50.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"])
def test_no_network(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    code, _, lines = certify(capfd, ["--model", model, "--sigma", "0.25", "--quiet"])
    assert time.perf_counter() - start < 3
    assert code == 1
    line = only_line(lines)
    assert model in line
    assert "http://127.0.0.1:9" in line
    assert "--weights FILE" in line


@pytest.mark.parametrize("model", ["resnet50", "torchvision:resnet50"])
def test_network_forbidden(model: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, lines = certify(capfd, ["--model", model, "--sigma", "0.25", "--quiet"])
    assert code == 1
    assert "HF_HUB_OFFLINE" in only_line(lines)


# --- images that cannot be read ----------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
BOMB = raw_png(30_000, 30_000, 8, 0, b"\0" * 99)
BAD = {
    "bomb.png": BOMB,
    "cut.jpg": picture(NOISE, kind="JPEG")[:2000],
    "empty.png": b"",
    "page.jpg": HTML.encode(),
    "cut.png": picture(NOISE)[:2000],
}


@pytest.fixture
def mixed(tmp_path: Path) -> list[str]:
    """A folder of two good and some bad images, and the command over it."""
    Case("", (), {f"d/{name}": content for name, content in (BAD | {"a.png": DIGIT, "z.png": DIGIT}).items()}, 0).build(
        tmp_path
    )
    return [*D.replace("--max 2 ", "").split(), *"--data d --labels none --out x.jsonl".split()]


def test_bad_images_are_left_out(mixed: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    code, out, lines = certify(capfd, mixed)
    assert code == 0, lines
    assert "5 images could not be read" in out
    rows = {row["id"]: row for row in read_run("x.jsonl").images}
    assert rows.keys() == {"a.png", "z.png", *BAD}
    assert {name for name, row in rows.items() if "error" in row} == set(BAD)
    for name in BAD:
        (line,) = (line for line in lines if f" {name} " in line)
        assert line.startswith("warning: ")
        assert rows[name]["error"] in line
        assert (rows[name]["prediction"], rows[name]["radius"], rows[name]["trials"]) == (-1, 0.0, 0)
    assert rows["a.png"]["trials"] == 100


def test_strict_stops_at_the_first(mixed: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    code, _, lines = certify(capfd, [*mixed, "--strict"])
    assert code == 2
    assert len(lines) == 1
    line = only_line(lines)
    assert "bomb.png" in line
    assert "--strict" in line
    assert [row["id"] for row in read_run("x.jsonl").images] == ["a.png"]


def test_broken_member_of_a_zip(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.writestr("a.png", DIGIT)
        archive.writestr("b.png", DIGIT)
    content = bytearray(Path("x.zip").read_bytes())
    content[content.index(DIGIT) + 60] ^= 1  # the checksum no longer agrees
    Path("x.zip").write_bytes(content)
    code, _, lines = certify(capfd, [*D.split(), *"--data x.zip --out x.jsonl".split()])
    assert code == 0
    assert sum("a.png" in line and line.startswith("warning: ") for line in lines) == len(lines) == 1
    assert ["error" in row for row in read_run("x.jsonl").images] == [True, False]


PALETTE = Image.new("P", (2, 1))
PALETTE.putpalette([10, 20, 30, 200, 90, 0])
PALETTE.putdata([0, 1])


def saved(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "rgb", "grey"),
    [
        pytest.param(picture(np.uint8([[7, 250]])), [[7] * 3, [250] * 3], [7, 250], id="grey"),
        pytest.param(
            picture(np.uint8([[[10, 20, 30, 0], [255, 0, 0, 128]]])), [[10, 20, 30], [255, 0, 0]], [18, 76], id="RGBA"
        ),
        pytest.param(
            picture(np.uint16([[65_535, 25_700, 128 * 257 + 129, 255, 0]])),
            [[v] * 3 for v in (255, 100, 129, 1, 0)],
            [255, 100, 129, 1, 0],
            id="16 bits",
        ),
        pytest.param(
            raw_png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 65_535, 25_700, 255, 0, 0, 0)),
            [[255, 100, 1], [0, 0, 0]],
            [135, 0],
            id="16 bits in colour",
        ),
        pytest.param(saved(PALETTE, transparency=0), [[10, 20, 30], [200, 90, 0]], [18, 113], id="palette"),
    ],
)
def test_decoded_values(content: bytes, rgb: list[list[int]], grey: list[int]) -> None:
    colour, single = decode(content), decode(content, channels=1)
    assert (colour.mode, single.mode) == ("RGB", "L")
    assert np.asarray(colour)[0].tolist() == rgb
    assert np.asarray(single)[0].tolist() == grey


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (BOMB, "limit of 64,000,000"),
        (raw_png(8_001, 8_000, 8, 0, b"\0"), "8001x8000 pixels; the limit is 64,000,000"),
        (HTML.encode(), "is not an image"),
        (BAD["cut.png"], "is damaged"),
    ],
)
def test_decode_refuses(content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode(content)


# --- a disk that fills up ----------------------------------------------------------------------------------------------


def test_full_disk_keeps_what_was_done(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    resource = pytest.importorskip("resource")
    argv = (D + "--max 4 --out whole.jsonl").split()
    monkeypatch.setattr(sys, "argv", ["certify", *argv])  # the header holds it
    assert certify(capfd, argv)[0] == 0
    lines = Path("whole.jsonl").read_bytes().splitlines(keepends=True)
    room = sum(map(len, lines[:3])) + len(lines[3]) // 2  # the header, two images and half of the third

    argv[-1] = "short.jsonl"
    limited = subprocess.run(
        [sys.executable, "-m", "certify", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    assert limited.returncode == 1, limited.stderr
    line = only_line(limited.stderr.splitlines())
    assert "short.jsonl" in line
    assert "2 finished images are kept" in line

    def records(name: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in read_run(name).images]

    assert records("short.jsonl") == records("whole.jsonl")[:2]
    assert certify(capfd, argv)[0] == 0
    assert records("short.jsonl") == records("whole.jsonl")
    assert len(json.loads(lines[0])["images"]["sha256"]) == 64
