"""Mistakes of users give one line with the value received, the value expected and the fix; never a traceback.

Exit code 2 is the user's mistake, 1 a fault on the way; neither harms a file that is there.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import rows_without_seconds
from PIL import Image
from raw_png import raw_png
from safetensors.torch import save as safetensors_bytes

from certify.cli.app import group, main
from certify.images.decode import decode
from certify.models.builtin import CifarResNet
from certify.runs.run_file import read_run

Capture = pytest.CaptureFixture[str]
Content = bytes | str | Path | Callable[[], bytes]  # a path stands for a folder
DIR = Path()
D = "--model digits --sigma 0.25 --n 100 --n0 10 --max 2 --quiet "  # of two equal options the last one counts
S = "--model digits --sigma 0.25 --max 2 --quiet "
R = "--model cifar_resnet20 --sigma 0.25 --n 100 --quiet "
W = R + "--weights "
MODEL = "--sigma 1 --n 100 --data digits --max 1 --quiet --model "
T = "train --denoiser unet --data digits-train --sigma 0.25 --out o --quiet "
E = "evaluate-denoiser --denoiser median --sigma 0.25 --max 2 --data digits "
CLOUD = "audit --endpoint https://127.0.0.1:9 --data digits --sigma 1 --out x --budget 9 --protocol "
C = "compare --model digits --max 2 --quiet "
A = "audit --endpoint http://127.0.0.1:9 --protocol json --protocol-option labels=l --data digits --input-size 1x8x8 "
A += "--sigma 0.25 --n 10 --n0 5 --budget 100 --out a --quiet "
V = "serve --model digits --sigma 0.25 --port 0 "
MAP, LABELS = D + "--data d --class-map ", D + "--data d --labels "

# Files to get wrong


def written(save: Callable[..., Any], *given: Any, **named: Any) -> bytes:
    """The bytes that ``save(file, ...)`` writes."""
    out = io.BytesIO()
    save(out, *given, **named)
    return out.getvalue()


def npz(**arrays: Any) -> bytes:
    return written(np.savez, **arrays)


def torch_file(content: Any) -> bytes:
    return written(functools.partial(torch.save, content))


def picture(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    return written((image if isinstance(image, Image.Image) else Image.fromarray(image)).save, kind, **options)


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
    options = D if verb == "run" else D.replace("--n0 10 ", "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        with pytest.raises(SystemExit) as left:
            main([verb, *options.split(), "--out", str(path)])
        assert left.value.code == 0
        return path.read_bytes()


def decided() -> bytes:
    """A run file of two digits that stopped early."""
    lines = [json.loads(line) for line in finished().splitlines()]
    lines[0] |= {"n0": 0, "stopping": {"rule": "betting", "radii": [], "tolerance": 0.1}}
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def torn() -> bytes:
    """A run file whose first image (line 2) is cut in half."""
    lines = finished().splitlines(keepends=True)
    return lines[0] + lines[1][:40] + b"\n" + lines[2]


def log(line: bytes) -> bytes:
    """A log as the field publishes them."""
    return b"idx\tlabel\tpredict\tradius\tcorrect\ttime\n" + line + b"\n"


def odd_header() -> bytes:
    """An array whose header opens brackets that it never closes."""
    array = b"\x93NUMPY\x01\x00" + (5000).to_bytes(2, "little") + b"(" * 4999 + b"\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x.npy", array)
    return out.getvalue()


LOG = log(b"0\t1\t1\t0.5\t1\t0:00:01")
DIGIT = picture(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
HTML = "<!DOCTYPE html><html><body>404: not found</body></html>"
MODULE = """
def network(images): return images
def late(images): raise RuntimeError("it broke\\nhere")
def first(images): return images.flatten(1).sum(1).long() * 0
def beyond(images): return images.flatten(1).sum(1).long() * 0 + 12
def factory(): raise RuntimeError("no such file")
"""

# The table


def lay_out(files: dict[str, Content]) -> None:
    """Make the files here."""
    for path, content in ((Path(name), content) for name, content in files.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        given = content() if callable(content) else content
        if isinstance(given, Path):
            path.mkdir()
        else:
            path.write_bytes(given.encode() if isinstance(given, str) else given)


def case(id: str, argv: str, *words: str, x: Content | None = None, code: int = 2, **files: Content) -> Any:
    """A command, the files it finds, what its line must say and its exit code.

    ``x`` is the content of the file that the command calls ``x.*``, which the line must name. Other files are given by
    keywords, ``_`` for a dot and ``__`` for a slash.
    """
    found = {name.replace("__", "/").replace("_", "."): content for name, content in files.items()}
    if x is not None:
        name = next(word for word in argv.split() if word.startswith("x."))
        found[name], words = x, (name, *words)

    return pytest.param(argv, found, words, code, id=id)


FOLDERS: dict[str, Content] = {"d__cat__a_png": DIGIT, "d__dog__b_png": DIGIT}
LONG = "y" * 300  # no file system takes it as a name

CASES = [
    # names
    case("model", MODEL + "resnet5O", "unknown model 'resnet5O'", "resnet50"),
    case("model of timm", MODEL + "timm:resnet5O", "'resnet5O'", "resnet50", "timm"),
    case("dataset", D + "--data cifar1O", "unknown dataset 'cifar1O'", "cifar10"),
    case("folder", D + "--data pictures/", "no data at 'pictures/'", "a folder"),
    case("option", "--modle digits --sigma 1", "--modle", "--model"),
    case("verb", "plto x", "plto", "plot"),
    case("bound", D + "--bound clopper", "unknown bound 'clopper'", "clopper-pearson"),
    case("denoiser", D + "--denoiser medain", "unknown denoiser 'medain'", "median"),
    case("device", D + "--device gpu", "'gpu'", "cpu"),
    case("noise", D + "--noise unifrom", "unknown noise 'unifrom'", "uniform"),
    case("rule", D + "--radius 0.25 --rule beting", "unknown rule 'beting'", "betting"),
    case("norm", D + "--norm l3", "--norm", "'l3'", "linf"),
    case("list", "list modles", "'modles'", "models"),
    *(case(f"long {o}", f"{D} --{o} {LONG}", LONG) for o in ("data", "model", "weights", "out", "class-map")),
    # numbers
    case("no model", "--sigma 1", "--model"),
    case("no sigma", "--model digits", "--sigma"),
    *(case(f"sigma {v}", D + f"--sigma {v}", "--sigma", v, "above 0") for v in ("0", "-1", "nan", "inf", "wide")),
    *(case(f"n {v}", D + f"--n {v}", "--n", v, "whole number from 1") for v in ("0", "1.5", "-3", "nan", "many")),
    *(case(f"alpha {v}", D + f"--alpha {v}", "--alpha", v, "between 0 and 1") for v in ("0", "1", "2", "nan")),
    *(case(f"{o} 0", D + f"--{o} 0", f"--{o}", "'0'", "from 1") for o in ("n0", "skip", "max", "batch-size")),
    *(case(f"radii {v}", D + f"--radii {v}", "--radii", v, "numbers") for v in ("-1", "nan", "inf", "0,far")),
    case("mean without std", D + "--mean 0.5", "--mean", "--std", "both"),
    case("two means for one channel", D + "--mean 0.5,0.5 --std 1,1", "--mean", "expected 1"),
    *(case(f"std {v}", D + f"--mean 0 --std {v}", "--std", v, "above 0") for v in ("0", "nan", "inf")),
    case("mean nan", D + "--mean nan --std 1", "--mean", "nan"),
    case("classes", D + "--num-classes 5", "10 classes", "5", "--num-classes"),
    case("size in two parts", D + "--input-size 8x8", "--input-size", "8x8", "3x224x224"),
    case("size of another model", D + "--input-size 3x32x32", "3x32x32", "--input-size"),
    # weights
    case("no weights of its own", R, "cifar_resnet20", "--weights FILE"),
    case("weights missing", W + "x.pth", "no weights file 'x.pth'", ".safetensors"),
    case("weights a folder", W + "x.pth", ".safetensors", x=DIR),
    case("weights cut", W + "x.pth", "damaged", x=lambda: resnet20()[:40_000]),
    case("weights hostile", W + "x.pth", "io.open", "refused", x=lambda: torch_file([Hostile()])),
    case("weights hostile pickle", W + "x.pth", "io.open", "refused", x=pickle.dumps(Hostile(), 2)),
    case("weights hostile pickle 4", W + "x.pth", "refused", x=pickle.dumps(Hostile(), 4)),
    case("weights a module", W + "x.pth", "refused", "state dict", x=lambda: torch_file(torch.nn.ReLU())),
    case("weights HTML", W + "x.pth", "web page", x=HTML),
    case("weights text", W + "x.pth", "not a checkpoint", x="my notes on the weights\n"),
    case("weights LFS", W + "x.pth", "git lfs pull", x="version https://git-lfs.github.com/spec/v1\n"),
    case("weights empty", W + "x.pth", "empty", x=""),
    case("weights no tensors", W + "x.pth", "epoch", "state dict", x=lambda: torch_file({"epoch": 9})),
    case("weights of 20 in 56", W.replace("20", "56") + "x.pth", "cifar_resnet56", "layer1.3.conv1.weight", x=resnet20),
    case("safetensors cut", W + "x.sft", "complete", x=lambda: safetensors_bytes(CifarResNet(20).state_dict())[:-100]),
    # models in files and modules
    case("model a checkpoint", MODEL + "x.pth", "--weights", x=resnet20),
    case("model a checkpoint .pt", MODEL + "x.pt", "--weights", x=resnet20),
    case("TorchScript missing", MODEL + "x.pt", "x.pt", "TorchScript"),
    case("TorchScript garbage", MODEL + "x.pt", "TorchScript", x=b"\x00garbage" * 99),
    case("ONNX garbage", MODEL + "x.onnx", "ONNX", x=b"\x00garbage" * 99),
    case("module missing", MODEL + "no_such.module:net", "cannot import 'no_such.module'"),
    case("module not Python", MODEL + "badmodule1:net", "cannot import 'badmodule1'", badmodule1_py="def net(:"),
    case("module raises", MODEL + "badmodule2:net", "cannot import 'badmodule2'", badmodule2_py="1 / 0"),
    case("attribute missing", MODEL + "badmodule3:net", "no 'net'", "network", badmodule3_py=MODULE),
    case("not callable", MODEL + "sys:maxsize", "sys:maxsize", "int", "expected a module"),
    case("factory raises", MODEL + "badmodule4:factory", "badmodule4:factory", "no such file", badmodule4_py=MODULE),
    case("no size", MODEL + "badmodule5:network", "badmodule5:network", "--input-size", badmodule5_py=MODULE),
    case("shape", MODEL + "badmodule6:network --input-size 1x8x8", "(4, 1, 8, 8)", "(4, K)", badmodule6_py=MODULE),
    case("fails late", MODEL + "badmodule7:late --num-classes 10", "it broke", code=1, badmodule7_py=MODULE),
    case("radius below 0", S + "--radius=-1", "--radius -1", "from 0"),
    case("radius out of reach", S + "--radius 3", "radius 3 (l2)", "sigma = 0.25", "smaller radius"),
    case("radius of nothing", S + "--radius x", "--radius", "'x'", "0,0.25,0.5"),
    case("radius beyond uniform", S + "--noise uniform --radius 0.5", "radius 0.5 (l1)", "uniform noise"),
    case("radius and tolerance", S + "--radius 0.1 --tolerance 0.1", "--radius and --tolerance", "expected one"),
    case("tolerance of 2", S + "--tolerance 2", "--tolerance", "'2'", "between 0 and 1"),
    case("selection for a radius", S + "--radius 0.25 --n0 10", "--n0 with --radius", "leave it out"),
    case("bound for a radius", S + "--radius 0.25 --bound best", "--bound best with --radius", "--rule"),
    case(
        "peeking", S + "--tolerance 0.1 --bound clopper-pearson", "--bound clopper-pearson with --tolerance", "fixed n"
    ),
    case("rule for a tolerance", S + "--tolerance 0.1 --rule union-bound", "--rule union-bound", "expected betting"),
    case("rule for nothing", S + "--rule betting", "--rule betting without --radius", "add --radius"),
    case("off the grid", S + "--noise exact", "8-bit grid", "--round"),
    case("rounding for nothing", S + "--round", "--round", "'exact'"),
    case("recompute nothing", "recompute x.jsonl", "--alpha", "--bound", x_jsonl=""),
    case("recompute nowhere", "recompute nowhere.jsonl --alpha 0.1", "nowhere.jsonl", "No such file"),
    case("recompute to .json", "recompute x.jsonl --alpha 0.1 --out y.json", "y.json", ".jsonl", x_jsonl=finished),
    case("recompute no run", "recompute x.jsonl --alpha 0.1", "not a run file", x_jsonl="hello\n"),
    case("recompute by what", "recompute x.jsonl --bound clopper", "unknown bound", "clopper-pearson", x_jsonl=""),
    case("shard", D + "--shard 3", "--shard '3'", "expected i/n"),
    *(case(f"shard {v}", D + f"--shard {v}", f"--shard {v}", "i from 1 to n") for v in ("0/3", "4/3")),
    case("more shards than images", D + "--shard 1/3", "more shards than images", "at most 2 shards"),
    case("cluster", D + "--cluster locl:2", "--cluster 'locl:2'", "local:K", "ray://HOST:PORT"),
    case("cluster of no device", D + "--cluster local --device cuda:1", "--device cuda:1", "auto, cpu or cuda"),
    case("password of a cluster", D + "--cluster ray://me:secret1@host:1", "the address holds a user name or password"),
    case("cluster gone", D + "--cluster ray://127.0.0.1:9", "ray://127.0.0.1:9 does not answer", code=1),
    case("merge a run", "merge x.jsonl -o y.jsonl", "a whole run, not a shard", "--shard i/n", x=finished),
    case("merge nothing", "merge nowhere.jsonl -o y.jsonl", "nowhere.jsonl", "No such file"),
    case("merge to .csv", "merge x.jsonl -o y.csv", "y.csv", ".jsonl", x_jsonl=""),
    case("merge over a file", "merge x.jsonl -o x.jsonl", "x.jsonl is there already", "left alone", x_jsonl=""),
    case("precision", D + "--precision half", "--precision", "'half'", "bfloat16"),
    case("compile", D + "--compile maybe", "--compile", "'maybe'", "auto"),
    case("batch size", D + "--batch-size many", "--batch-size", "'many'", "auto or a batch size"),
    case("bench", "bench --model digits --pairs 0", "--pairs", "'0'", "from 1"),
    case("bench model", "bench --model digit", "digit", "digits"),
    case("bench weights", "bench --model cifar_resnet20", "--weights FILE"),
    case(
        "precision of a function",
        MODEL + "badmodule9:first --num-classes 10 --precision bfloat16",
        "--precision bfloat16",
        "not made of torch modules",
        badmodule9_py=MODULE,
    ),
    case("labels beyond", MODEL + "badmodule8:beyond --num-classes 10", "12", "0 to 9", badmodule8_py=MODULE),
    # data
    case("data missing", D + "--data no/where", "no/where", "folder"),
    case("data a name twice", D + "--data photos", "photos is a dataset's name and a folder", "photos/", photos=DIR),
    case("data of another kind", D + "--data x.txt", ".npz", x="hello"),
    case("folder empty", D + "--data d", "no images in d", ".png", d=DIR),
    case("depths", D + "--data d", "several depths", "d/b", d__a_png=DIGIT, d__b__c_png=DIGIT),
    case("folders without a map", D + "--data d", "cat, dog", "--class-map", "--labels none", **FOLDERS),
    case("map missing", MAP + "x.csv", "--class-map x.csv", **FOLDERS),
    case("map misses", MAP + "x.csv", "lacks 1 of 2", "dog", x="cat,1\n", **FOLDERS),
    case("map beyond", MAP + "x.csv", "'10'", "0 to 9", x="cat,1\ndog,10\n", **FOLDERS),
    case("map a list", MAP + "x.json", "list", "object", x="[1]", **FOLDERS),
    case("map not JSON", MAP + "x.json", "JSON", x="{cat", **FOLDERS),
    case("map without folders", MAP + "m.csv", "--class-map", "--labels", d__a_png=DIGIT, m_csv="cat,1\n"),
    case("labels missing", LABELS + "x.csv", "--labels x.csv", **FOLDERS),
    case("labels miss", LABELS + "x.csv", "lacks 1 of 2", "b.png", x="a.png,1\n", **FOLDERS),
    case("labels narrow", LABELS + "x.csv", "two columns", "a.png", x="a.png\nb.png\n", **FOLDERS),
    case(
        "labels wide", LABELS + "x.csv", "'a.png,1,7' has more than two columns", x="a.png,1,7\nb.png,2,8\n", **FOLDERS
    ),
    case("map wide", MAP + "x.csv", "'cat,0,3' has more than", "heading", x="cat,0,3\ndog,1,5\n", **FOLDERS),
    case("labels heading alone", LABELS + "x.csv", "two columns", "none", x="file,label\n", **FOLDERS),
    case("labels binary", LABELS + "x.csv", "CSV", x=DIGIT, **FOLDERS),
    case("npz to 255", D + "--data x.npz", "255", "[0, 1]", x_npz=npz(x=np.full((3, 8, 8), 255.0))),
    case("npz of text", D + "--data x.npz", x=npz(x=np.full((3, 8, 8), "a"))),
    case("npz without pixels", D + "--data x.npz", "(3, 0, 8)", x=npz(x=np.ones((3, 0, 8)))),
    case("npz of objects", D + "--data x.npz", "plain arrays", x=npz(x=np.array([Hostile()]))),
    case("npz without x", D + "--data x.npz", "holds images", "expected x", x=npz(images=[1])),
    case("npz of one image", D + "--data x.npz", "(8, 8)", "(N, H, W)", x=npz(x=np.eye(8))),
    case("npz of two labels", D + "--data x.npz", "(2,)", "3 integers", x=npz(x=np.ones((3, 8, 8)), y=[1, 2])),
    case("npz of label 10", D + "--data x.npz", "10", "--class-map", x_npz=npz(x=np.ones((1, 8, 8)), y=[10])),
    case("npz of an odd header", D + "--data x.npz", "plain arrays", "damaged header", x=odd_header),
    case("npz cut", D + "--data x.npz", "not a readable .npz", x=npz(x=np.ones((9, 8, 8)))[:300]),
    case("npy named npz", D + "--data x.npz", ".npz", x=written(np.save, np.ones((2, 8, 8)))),
    case("npy", D + "--data x.npy", ".npz", x=written(np.save, np.ones((2, 8, 8)))),
    case("zip corrupt", D + "--data x.zip", "not a readable zip", x=b"PK\x03\x04" + b"?" * 99),
    case("zip empty", D + "--data x.zip", "no images", x=b"PK\x05\x06" + b"\0" * 18),
    case("id", D + "--ids 1300,7", "'7'", "digits", "1297"),
    case("ImageNet not there", D + "--data imagenet --root r", "imagenet", "--root"),
    # the run file
    case("other settings", D + "--sigma 0.5 --out x.jsonl", "sigma 0.25 there, 0.5 here", "--out", x=finished),
    case("torn inside", D + "--out x.jsonl", "damaged at line 2", x=torn),
    case("not a run file", D + "--out x.jsonl", "not a run file", x='{"a": 1}\n'),
    case("not even a line", D + "--out x.jsonl", "not a run file", x="notes without an end of line"),
    case("out below a file", D + "--out f/x.jsonl", "f/x.jsonl", "--out", f="keep me"),
    case("out of another suffix", D + "--out x.csv", "x.csv", ".jsonl"),
    case("out a folder", D + "--out x.jsonl", "--out", x=DIR),
    case("no room for the curve", D + "--out x.jsonl", "x.png", "untouched", code=1, x_png=DIR),
    # plot and table
    case("plot to .bmp", "plot x.jsonl -o y.bmp", "y.bmp", ".png", x_jsonl=finished),
    case("plot below a file", "plot x.jsonl -o f/x.png", "f/x.png", code=1, x_jsonl=finished, f="keep me"),
    case("table below a file", "table x.jsonl -o f/x.txt", "f/x.txt", code=1, x_jsonl=finished, f="keep me"),
    case("table over its run", "table x.jsonl -o x.jsonl", "x.jsonl is a run file", "another", x_jsonl=finished),
    case("table over a log", "table x.tsv -o ./x.tsv", "a table does not replace", x_tsv=LOG),
    case("table of a folder of logs", "table x.d", "such as x.d/y.tsv", x_d__y_tsv=LOG),
    case("option empty", D + "--ids=", "--ids is empty", "shell variable"),
    case("table radii", "table x.jsonl --radii -1", "--radii", "-1", "from 0", x_jsonl=finished),
    case("table format", "table x.jsonl --format html", "html", "markdown", x_jsonl=finished),
    *(case(f"{v} nothing", v, "RUN") for v in ("plot", "table")),
    *(case(f"{v} missing", f"{v} x.jsonl", "cannot read x.jsonl") for v in ("plot", "table")),
    *(case(f"{v} folder", f"{v} x.d", "is a folder", "x.d/*.jsonl", x=DIR) for v in ("plot", "table")),
    *(case(f"{v} torn", f"{v} x.jsonl", "damaged at line 2", x=torn) for v in ("plot", "table")),
    *(case(f"{v} a picture", f"{v} x.png", "not a run file", x=DIGIT) for v in ("plot", "table")),
    *(case(f"{v} predict", f"{v} x.jsonl", "no radius", x=lambda: finished("predict")) for v in ("plot", "table")),
    case("log columns", "table x.tsv", "columns idx b", x="idx\tb\n"),
    case("log line", "table x.tsv", "line 2", "far", x=log(b"0\t1\t1\tfar\t1\t0:00:01")),
    case("log contradicts", "table x.tsv", "line 2", "contradicts", x=log(b"0\t1\t1\t0.5\t0\t0:00:01")),
    case("log not text", "table x.tsv", x=log(b"\xff\xfe")),
    # predict, list, doctor
    case("predict without a model", "predict --sigma 1", "--model"),
    case("predict no samples", "predict --model digits --sigma 1 --n 0", "--n", "from 1"),
    case("predict to .csv", "predict --model digits --sigma 1 --quiet --out x.csv", "x.csv", ".jsonl"),
    case("accuracy of nothing", "accuracy", "expected a run file, or --model and --sigma"),
    case("accuracy without sigma", "accuracy --model digits", "expected a run file, or --model and --sigma"),
    case(
        "accuracy of a fixed list",
        "accuracy --model digits --sigma 0.25 --alpha 0.25",
        "alpha = 0.25",
        "0.25 for a fixed",
    ),
    case("accuracy without draws", "accuracy --model digits --sigma 0.25 --draws 0", "--draws", "from 1"),
    case("accuracy without data", "accuracy --model resnet50 --weights untrained --sigma 0.25", "--data is missing"),
    case("accuracy no file", "accuracy x.jsonl", "cannot read x.jsonl"),
    case(
        "accuracy of a run again",
        "accuracy x.jsonl --sigma 1",
        "--sigma is for a new run; leave it out, or leave out RUN",
    ),
    case("accuracy of decisions", "accuracy x.jsonl", "biases their share", x=decided),
    case("status of nothing", "status x.jsonl", "no such file or folder", "x.jsonl"),
    case("list nothing found", "list bounds cloper", "unknown bound 'cloper'"),
    case("doctor", "doctor --jsn", "--jsn", "--json"),
    # train
    case("train what", "train --data digits-train --out o", "--denoiser", "--train-classifier", "one of the two"),
    case("train objective", T + "--objective mes", "unknown objective 'mes'", "mse"),
    case("train fractions", T + "--sigma 64/0", "--sigma", "64/0"),
    case("train downwards", T + "--sigma 1:0.5", "--sigma", "1:0.5", "0.1:1"),
    case("train option", T + "--option channels=wide", "unet", "channels=[48,96,192]", "blocks=2"),
    case("train half an option", T + "--option channels", "'channels'", "KEY=VALUE"),
    case("train without f", T + "--objective stability", "--classifier", "--surrogate"),
    case("train from another", T + "--init median", "--init median", "unet"),
    case("train no part", T + "--train-only nose", "nose", "head", "tail"),
    case("train no epochs", T + "--epochs 0", "--epochs", "above 0"),
    case("train device", T + "--device cuda:1", "--device cuda:1", "CUDA_VISIBLE_DEVICES"),
    case("train optimizer", T + "--optimizer adm", "'adm'", "adam-then-sgd"),
    case("train setting", T + "--set draws=2", "draws", "mse", "none"),
    case("train below a file", T + "--out f/x", "--out f/x", "folder", f="keep me"),
    case("train on no images", T + "--data d", "no images in d", d=DIR),
    # evaluate-denoiser
    case("evaluate what", "evaluate-denoiser --sigma 1", "--denoiser"),
    case("evaluate no denoiser", E + "--denoiser medain", "unknown denoiser 'medain'", "median"),
    case("evaluate level", E + "--sigma far", "--sigma", "'far'", "0,0.25"),
    case("evaluate without noise", E + "--sigma 0", "sigma = 0.0", "a positive number"),
    case("evaluate weights of no model", E + "--weights w.pt", "--weights without --model"),
    case("evaluate on text", E + "--data x.txt", ".npz", x="hello"),
    case("evaluate to .bmp", E + "--pictures x.bmp", "x.bmp", ".png"),
    # compare and inspect
    *(case(f"compare eps {v}", C + f"--eps {v}", "--eps", v, "8/255") for v in ("0", "1/0", "nan")),
    case("compare defence", C + "--defences medain", "unknown denoiser 'medain'", "median"),
    case("compare option", C + "--defences gs:width=2", "no option 'width'", "kernel=5, std=0.5"),
    case("compare a gap", C + "--defences none,,gs", "names separated by commas, each once"),
    case("compare without weights", C + "--defences ncis", "no shipped weights for 1x8x8 images", "train some"),
    case("compare attack", C + "--attacks pdg", "unknown attack 'pdg'"),
    case("compare transfer", C + "--attacks transfer", "attack transfer needs surrogates"),
    case("compare group", C + "--attacks blind-pgd --group adaptive", "group adaptive", "blind-pgd is blind only"),
    case("compare without labels", C + "--labels none", "no labels", "accuracies need them"),
    case("compare to .csv", C + "--attacks none --out c.csv", "c.csv", ".jsonl, or a folder"),
    case(
        "compare sizes",
        "compare --model badmodule10:beyond --num-classes 20 --data d --attacks none --quiet",
        "images of d have 2 sizes",
        "--input-size CxHxW",
        badmodule10_py=MODULE,
        d__0__a_png=DIGIT,
        d__1__b_png=picture(np.zeros((8, 9), np.uint8)),
    ),
    case("compare norm", C + "--norm l7", "--norm", "linf"),
    case("compare to .bmp", C + "--figure x.bmp", "x.bmp", ".svg"),
    case("compare below a file", C + "--defences median --out f/x.jsonl", "f/x.jsonl", "--out", f="keep me"),
    case("inspect what", "inspect", "--model"),
    case("inspect attack", "inspect --model digits --attacks pdg", "unknown attack 'pdg'"),
    # audit, its report and its replay
    case("audit protocol", A + "--protocol jsn", "unknown protocol 'jsn'", "json"),
    case("audit endpoint", A + "--endpoint ftp://x", "'ftp://x'", "http://HOST"),
    case("audit budget", A + "--budget=-1", "--budget", "'-1'", "from 0"),
    case("audit option", A + "--protocol-option label=x", "'label=...'", "options of json: labels, scores"),
    case("audit key", A + "--api-key-env NOT_THERE", "$NOT_THERE is not set", "export"),
    case("audit key of nothing", A + "--auth-header X-Key:{key}", "--auth-query without --api-key-env"),
    case(
        "audit key of AWS", CLOUD + "rekognition --api-key-env PATH --auth-query k={key}", "boto3 signs requests itself"
    ),
    *(
        case(f"audit sdk {p}", f"{CLOUD}{p} --sdk", f"protocol {p} is queried over HTTP alone; leave --sdk out")
        for p in ("google-vision", "azure-vision", "clarifai", "hugging-face")
    ),
    case("audit encoding", A + "--encoding gif", "gif", "png, jpeg"),
    case("audit labels", A + "--labels x.csv", "--labels without --reference given"),
    case("audit selection for a radius", A + "--radius 0.2", "--n0 with --radius"),
    case("audit attack on nothing", A + "--attacks square", "--attacks without --defences"),
    case(
        "audit attack with gradients", A + "--defences none --attacks blind-pgd", "an attack that needs queries alone"
    ),
    case("audit data", A + "--data nowhere/", "no data at 'nowhere/'", "folder"),
    *(case(f"{v} nowhere", f"{v} nowhere", "nowhere", "certify audit") for v in ("report", "replay")),
    *(case(f"{v} of a file", f"{v} x.txt", "x.txt", "certify audit", x="hello") for v in ("report", "replay")),
    # serve
    case("serve what", "serve --sigma 1", "--model", "--endpoint"),
    case("serve both", V + "--endpoint http://127.0.0.1:9", "--model", "--endpoint"),
    case("serve port", V + "--port 99999", "--port", "65535"),
    case("serve radius", V + "--radius 3", "radius 3", "sigma = 0.25"),
    case("serve without a service", V + "--query-concurrency 3", "--query-concurrency", "--endpoint"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, no model hub, empty caches, and an import path that is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    for name in ("HF_HOME", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name, value in (("HF_ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", "0"), ("no_proxy", "*")):
        monkeypatch.setenv(name, value)


def certify(capfd: Capture, argv: list[str]) -> tuple[int, str, list[str]]:
    """Exit code, stdout and the lines of stderr (those of C libraries too)."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        main(argv)
    out, err = capfd.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, err.splitlines()


def complaint(lines: list[str]) -> str:
    """The one line that is not a warning."""
    rest = [line for line in lines if not line.startswith("warning: ")]
    assert len(rest) == 1, lines
    assert rest[0].startswith("certify: ")
    return rest[0]


@pytest.mark.parametrize(("argv", "files", "words", "code"), CASES)
def test_one_line(argv: str, files: dict[str, Content], words: tuple[str, ...], code: int, capfd: Capture) -> None:
    lay_out(files)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    ended, out, lines = certify(capfd, argv.split())
    line = complaint(lines)
    assert [word for word in words if word not in line] == [], line
    assert ended == code
    assert out == "" or code == 1  # a fault takes away nothing that can still be shown
    assert {path: path.read_bytes() for path in before} == before
    assert not any(Path(name).exists() for name in ("pwned", "a"))  # no code was run, no audit begun


def test_every_command_is_in_the_table() -> None:
    """``run`` is the default; it needs no name."""
    first = {str(c.values[0]).split()[0] for c in CASES}
    assert set(group.commands) - first == {"run"}


# The network

OFFLINE = [("resnet50", "0"), ("hf-hub:timm/resnet18", "0"), ("resnet50", "1"), ("torchvision:resnet50", "1")]


@pytest.mark.parametrize(("model", "forbidden"), OFFLINE)
def test_no_network(model: str, forbidden: str, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", forbidden)
    start = time.perf_counter()
    code, _, lines = certify(capfd, ["--model", model, "--sigma", "0.25", "--quiet"])
    assert time.perf_counter() - start < 20  # the hub client's own retries take 47 s
    assert code == 1
    reason = "HF_HUB_OFFLINE is set" if forbidden == "1" else "http://127.0.0.1:9 does not answer"
    assert f"{model.rpartition(':')[2]}': {reason}; pass a local checkpoint with --weights FILE" in complaint(lines)


@pytest.mark.slow
def test_hub_hangs_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        hub = f"http://127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-m", "certify", "--model", "resnet18", "--sigma", "0.25", "--quiet"]
        ended = subprocess.run(
            command, env={**os.environ, "HF_ENDPOINT": hub}, capture_output=True, text=True, timeout=99
        )
    assert "--weights FILE" in complaint(ended.stderr.splitlines())
    assert ended.returncode == 1


# Images that cannot be read

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
BAD = {
    "bomb.png": (raw_png(30_000, 30_000, 8, 0, b"\0" * 99), "limit of 64,000,000 pixels"),
    "cut.jpg": (picture(NOISE, "JPEG")[:2000], "is damaged"),
    "cut.png": (picture(NOISE)[:2000], "is damaged"),
    "empty.png": (b"", "is empty"),
    "large.png": (raw_png(8_001, 8_000, 8, 0, b"\0"), "8001x8000 pixels; the limit is 64,000,000"),
    "page.jpg": (HTML.encode(), "is a web page, not an image"),
}
MIXED = (D + "--max 99 --data d --labels none --out x.jsonl").split()


def mixed_folder() -> None:
    Path("d").mkdir()
    for name, (content, _) in (BAD | {"a.png": (DIGIT, ""), "z.png": (DIGIT, "")}).items():
        (Path("d") / name).write_bytes(content)


def test_bad_images_are_left_out(capfd: Capture) -> None:
    mixed_folder()
    code, out, lines = certify(capfd, MIXED)
    assert code == 0, lines
    assert "6 images could not be used" in out
    rows = {row["id"]: row for row in read_run("x.jsonl", allow_partial=True).images}
    assert rows.keys() == {"a.png", "z.png", *BAD}
    assert {name for name, row in rows.items() if "error" in row} == set(BAD)
    for name, line in zip(sorted(BAD), lines, strict=True):
        assert line.startswith(f"warning: image {name} {rows[name]['error']}")
        assert BAD[name][1] in line
        assert (rows[name]["prediction"], rows[name]["radius"], rows[name]["trials"]) == (-1, 0.0, 0)
    assert (rows["a.png"]["trials"], rows["z.png"]["trials"]) == (100, 100)


def test_strict_stops_at_the_first(capfd: Capture) -> None:
    mixed_folder()
    code, _, lines = certify(capfd, [*MIXED, "--strict"])
    assert (code, len(lines)) == (2, 1)
    assert "bomb.png" in complaint(lines)
    assert "--strict" in lines[0]
    assert [row["id"] for row in read_run("x.jsonl", allow_partial=True).images] == ["a.png"]


def test_broken_member_of_a_zip(capfd: Capture) -> None:
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.writestr("a.png", DIGIT)
        archive.writestr("b.png", DIGIT)
    content = bytearray(Path("x.zip").read_bytes())
    content[content.index(DIGIT) + 60] ^= 1  # the checksum no longer agrees
    Path("x.zip").write_bytes(content)
    code, _, lines = certify(capfd, (D + "--data x.zip --out x.jsonl").split())
    assert (code, len(lines)) == (0, 1)
    assert lines[0].startswith("warning: image a.png ")
    assert ["error" in row for row in read_run("x.jsonl", allow_partial=True).images] == [True, False]


PALETTE = Image.new("P", (2, 1))
PALETTE.putpalette([10, 20, 30, 200, 90, 0])
PALETTE.putdata([0, 1])
WORDS = np.array([[65_535, 25_700, 128 * 257 + 129, 255, 0]], dtype=np.uint16)  # v / 257: 255, 100, 128.502, 0.99, 0
COLOUR = raw_png(2, 1, 16, 2, struct.pack(">x6H", 65_535, 25_700, 255, 0, 0, 0))


@pytest.mark.parametrize(
    ("content", "rgb", "grey"),
    [
        pytest.param(picture(np.uint8([[7, 250]])), [[7] * 3, [250] * 3], [7, 250], id="grey"),
        pytest.param(picture(np.uint8([[[255, 0, 0, 0], [9, 9, 9, 8]]])), [[255, 0, 0], [9] * 3], [76, 9], id="RGBA"),
        pytest.param(picture(WORDS), [[v] * 3 for v in (255, 100, 129, 1, 0)], [255, 100, 129, 1, 0], id="16 bits"),
        pytest.param(COLOUR, [[255, 100, 0], [0] * 3], [135, 0], id="16 bits in colour"),
        pytest.param(picture(PALETTE, transparency=0), [[10, 20, 30], [200, 90, 0]], [18, 113], id="palette"),
    ],
)
def test_decoded_values(content: bytes, rgb: list[list[int]], grey: list[int]) -> None:
    colour, single = decode(content), decode(content, channels=1)
    assert (colour.mode, single.mode) == ("RGB", "L")
    assert np.asarray(colour)[0].tolist() == rgb
    assert np.asarray(single)[0].tolist() == grey


# A disk that fills up


@pytest.mark.slow
def test_full_disk_keeps_what_was_done(monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    resource = pytest.importorskip("resource")
    argv = (D + "--max 4 --out whole.jsonl").split()
    monkeypatch.setattr(sys, "argv", ["certify", *argv])  # the header holds it
    assert certify(capfd, argv)[0] == 0
    lines = Path("whole.jsonl").read_bytes().splitlines(keepends=True)
    room = sum(map(len, lines[:3])) + len(lines[3]) // 2  # the header, two images and half of the third

    argv[-1] = "short.jsonl"
    command = [sys.executable, "-m", "certify", *argv]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
    limited = subprocess.run(command, capture_output=True, text=True, timeout=99, preexec_fn=limit)
    assert "2 finished images are kept" in complaint(limited.stderr.splitlines())
    assert limited.returncode == 1

    assert rows_without_seconds("short.jsonl") == rows_without_seconds("whole.jsonl")[:2]
    assert certify(capfd, argv)[0] == 0
    assert rows_without_seconds("short.jsonl") == rows_without_seconds("whole.jsonl")
