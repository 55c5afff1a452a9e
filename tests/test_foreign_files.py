"""Model files and weights in common formats; everything else is named with a remedy."""

from __future__ import annotations

import gzip
import io
import json
import shlex
import sys
import tarfile
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import run
from torch import Tensor, nn

from certify import UserError, load_classifier, load_images, read_run
from certify.errors import CertifyWarning
from certify.images.files import open_zip
from certify.models.builtin import CifarResNet
from certify.models.file_kind import file_kind
from denoisers import load_denoiser

Capture = pytest.CaptureFixture[str]
RUN = "predict --data digits --sigma 0.25 --n 20 --max 2 --quiet --out r.jsonl "
WEIGHTS = RUN + "--model cifar_resnet20 --weights "


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def error(capsys: Capture, command: str) -> str:
    """The one line of a command that is the user's mistake."""
    capsys.readouterr()
    run(*shlex.split(command), code=2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def warning(capsys: Capture, command: str) -> str:
    """The one line of a command that warns."""
    capsys.readouterr()
    run(*shlex.split(command))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    return line


# ONNX


def write_onnx(
    name: str,
    *,
    kind: str = "FLOAT",
    last: bool = False,
    size: tuple[int, int, int] = (1, 8, 8),
    features: bool = False,
) -> np.ndarray:
    """A linear classifier of ten classes in this form; its weights, for images ``(C, H, W)`` in [0, 1]."""
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    channels, height, width = size
    values = channels * height * width
    weight = np.random.default_rng(0).normal(size=(values, 10)).astype(np.float16).astype(np.float32)
    shape = ["n", height, width, channels] if last else ["n", channels, height, width]
    laid = weight.reshape(channels, height, width, 10).transpose(1, 2, 0, 3).reshape(values, 10) if last else weight
    small = np.float16 if kind == "FLOAT16" else np.float64 if kind == "DOUBLE" else np.float32
    out = kind if kind in ("FLOAT16", "DOUBLE") else "FLOAT"
    scale = 1 / 255 if kind == "UINT8" else 1
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=getattr(TensorProto, out)),
        helper.make_node("Flatten", ["c"], ["features"]),
        helper.make_node("MatMul", ["features", "w"], ["y"]),
    ]
    outputs = [("features", values), ("y", 10)] if features else [("y", 10)]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", getattr(TensorProto, kind), shape)],
        [helper.make_tensor_value_info(n, getattr(TensorProto, out), ["n", width_]) for n, width_ in outputs],
        [numpy_helper.from_array((laid * scale).astype(small), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    Path(name).write_bytes(model.SerializeToString())
    return weight


@pytest.mark.parametrize(
    ("kind", "last", "size"),
    [
        ("FLOAT16", False, (3, 8, 8)),
        ("DOUBLE", False, (3, 8, 8)),
        ("FLOAT", True, (3, 8, 8)),
        ("FLOAT", True, (1, 8, 8)),
        ("UINT8", False, (3, 8, 8)),
        ("UINT8", True, (3, 8, 8)),
    ],
)
def test_onnx_inputs_of_every_type_and_layout(kind: str, last: bool, size: tuple[int, int, int]) -> None:
    """The labels are those of the matrix; 8-bit graphs see pixels rounded and clipped to 0 .. 255."""
    weight = write_onnx("m.onnx", kind=kind, last=last, size=size)
    classifier = load_classifier("m.onnx")
    assert (classifier.input.size, classifier.num_classes) == (size, 10)
    x = torch.rand((50, *size), generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2  # noisy: it leaves [0, 1]
    seen = (x.clamp(0, 1) * 255).round() / 255 if kind == "UINT8" else x
    exact = seen.flatten(1).double() @ torch.from_numpy(weight).double()
    tolerance = 0.05 if kind == "FLOAT16" else 1e-4
    assert torch.allclose(classifier.logits(x).double(), exact, atol=tolerance)


def test_onnx_with_8_bit_pixels_takes_no_mean(capsys: Capture) -> None:
    write_onnx("m.onnx", kind="UINT8")
    assert error(capsys, RUN + "--model m.onnx --mean 0.5 --std 0.5") == (
        "certify: m.onnx takes 8-bit pixels and normalises them itself; drop --mean and --std"
    )
    run(*(RUN + "--model m.onnx").split())


def test_unsupported_onnx_input_type_is_named(capsys: Capture) -> None:
    write_onnx("m.onnx", kind="INT64")
    assert error(capsys, RUN + "--model m.onnx") == (
        "certify: m.onnx takes tensor(int64); expected images in floating point or uint8"
    )


@pytest.mark.parametrize("name", ["m.pt", "m.bin", "model"])
def test_onnx_is_recognised_by_its_content(name: str, capsys: Capture) -> None:
    weight = write_onnx("m.onnx")
    Path("m.onnx").rename(name)
    run(*(RUN + f"--model ./{name}").split())
    x = torch.rand(5, 1, 8, 8)
    assert torch.allclose(load_classifier(f"./{name}").logits(x), x.flatten(1) @ torch.from_numpy(weight), atol=1e-4)
    assert error(capsys, RUN + f"--model digits --weights {name}") == (
        f"certify: {name} is ONNX, a complete model, not weights alone: pass --model {name}"
    )


def test_other_protobuf_files_are_not_mistaken_for_onnx(capsys: Capture) -> None:
    Path("saved_model.pb").write_bytes(b"\x08\x01\x12\x04abcd")  # as TensorFlow writes it: version, meta graphs
    assert error(capsys, RUN + "--model saved_model.pb").startswith(
        "certify: saved_model.pb is neither TorchScript nor"
    )


@pytest.mark.parametrize(
    ("node", "cause"),
    [
        ("MyVeryOwnOperator", "No Op registered for MyVeryOwnOperator with domain_version of 17)"),
        ("MatMul", "has input size 1 not in range [min=2, max=2])"),
    ],
)
def test_onnx_runtime_error_is_quoted(node: str, cause: str, capsys: Capture) -> None:
    pytest.importorskip("onnx")
    from onnx import helper

    tensors = [
        helper.make_tensor_value_info(name, 1, shape) for name, shape in (("x", ["n", 1, 8, 8]), ("y", ["n", 9]))
    ]
    graph = helper.make_graph([helper.make_node(node, ["x"], ["y"])], "g", tensors[:1], tensors[1:])
    folder = Path("a/folder/with/a/path/that/is/longer/than/anybody/needs/to/read/in/a/message")
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    line = error(capsys, RUN + f"--model {folder}/m.onnx")
    assert line.startswith(f"certify: {folder}/m.onnx is not a usable ONNX file (This is an invalid model. In Node, ")
    assert line.endswith(cause)


def test_onnx_output_is_chosen_by_number_of_classes_or_name(capsys: Capture) -> None:
    weight = write_onnx("m.onnx", features=True)
    line = error(capsys, RUN + "--model m.onnx")
    assert line == (
        "certify: m.onnx has several outputs: features (n, 64), y (n, 10); choose the one with the class "
        "scores, such as --model m.onnx::y"
    )
    run(*(RUN + line.partition("such as ")[2]).split())
    x = torch.rand(5, 1, 8, 8)
    for classifier in (load_classifier("m.onnx::y"), load_classifier("m.onnx", num_classes=10)):
        assert torch.allclose(classifier.logits(x), x.flatten(1) @ torch.from_numpy(weight), atol=1e-4)
    assert load_classifier("m.onnx::features").num_classes == 64
    with pytest.raises(UserError, match=r"m\.onnx has no output 'z'; it has features \(n, 64\), y \(n, 10\)"):
        load_classifier("m.onnx::z")


# TorchScript


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


class One(Half):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(1, 64))


class Wide(Half):
    """At another size than the weights'."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)[:, :60])


def save_script(net: nn.Module, name: str, *, frozen: bool = False, example: Tensor | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.script(net.eval()) if example is None else torch.jit.trace(net.eval(), example)
        torch.jit.save(torch.jit.freeze(made) if frozen else made, name)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_torchscript_runs_in_its_own_precision(kind: torch.dtype, frozen: bool) -> None:
    save_script(Half().to(kind), "m.pt", frozen=frozen)
    x = torch.rand(7, 1, 8, 8)
    logits = load_classifier("m.pt", input_size=(1, 8, 8), trust_code=True).logits(x)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, Half()(x), atol=0.05)


@pytest.mark.parametrize("net", [One(), One().half()])
def test_torchscript_traced_for_one_image(net: nn.Module) -> None:
    kind = next(net.parameters()).dtype
    save_script(net, "m.pt", example=torch.rand(1, 1, 8, 8, dtype=kind))
    x = torch.rand(7, 1, 8, 8)
    classifier = load_classifier("m.pt", input_size=(1, 8, 8), trust_code=True)
    assert torch.allclose(classifier.logits(x), Half()(x), atol=0.05)


def test_torchscript_error_is_quoted(capsys: Capture) -> None:
    save_script(Wide(), "m.pt")
    line = error(capsys, RUN + "--model m.pt --trust-code --input-size 1x8x8")
    assert line == (
        "certify: classifier 'm.pt' fails on a 1x8x8 image: RuntimeError: mat1 and mat2 shapes cannot be multiplied "
        "(4x60 and 64x10); is --input-size 1x8x8 the right one?"
    )


def test_torchscript_named_like_a_checkpoint(capsys: Capture) -> None:
    """It loads as a model; as weights the message names the command that works."""
    save_script(Half(), "m.pth")
    line = error(capsys, WEIGHTS + "m.pth")
    assert line == (
        "certify: m.pth is TorchScript, a complete model, not weights alone: pass --model m.pth --trust-code"
    )
    run(*(RUN + line.partition("pass ")[2] + " --input-size 1x8x8").split())


# Checkpoints


def resnet() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return CifarResNet(20).state_dict()


def other() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return CifarResNet(20).state_dict()


def named(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def inside(name: str, wrapper: str) -> str:
    """The name with a wrapper after its first part, as activation checkpoints leave it."""
    first, _, rest = name.partition(".")
    return f"{first}.{wrapper}.{rest}"


CHECKPOINTS: dict[str, tuple[Callable[[], Any], str]] = {
    "Lightning": (lambda: {"state_dict": named("model.", resnet()), "hyper_parameters": {"lr": 0.1}}, "model."),
    "net.": (lambda: named("net.", resnet()), "net."),
    "encoder.backbone.": (lambda: named("encoder.backbone.", resnet()), "encoder.backbone."),
    "compiled Lightning": (lambda: {"state_dict": named("model._orig_mod.", resnet())}, "model., _orig_mod."),
    "FSDP": (lambda: named("_fsdp_wrapped_module.", resnet()), "_fsdp_wrapped_module."),
    "activation checkpoints": (
        lambda: {inside(k, "_checkpoint_wrapped_module"): v for k, v in resnet().items()},
        "_checkpoint_wrapped_module.",
    ),
    "SWA": (lambda: {"n_averaged": torch.tensor(3), **named("module.", resnet())}, "module."),
    "ema": (lambda: {"ema": resnet(), "epoch": 3}, ""),
    "network": (lambda: {"network": resnet()}, ""),
    "weights": (lambda: {"weights": resnet(), "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}, ""),
    "any key": (lambda: {"my_resnet": resnet()}, ""),
    "two keys": (lambda: {"ema": {"module": resnet(), "updates": 7}}, ""),
    "three keys": (lambda: {"trainer": {"best": {"network": resnet(), "epoch": 3}}}, ""),
    "five keys": (lambda: {"a": {"b": {"c": {"d": {"weights": named("module.", resnet())}}}}}, "module."),
    "itself": (lambda: holds_itself({"trainer": {"state_dict": resnet()}}), ""),
}


def holds_itself(mapping: dict[str, Any]) -> dict[str, Any]:
    mapping["self"] = mapping
    return mapping


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_common_trainers_load(kind: str) -> None:
    make, prefix = CHECKPOINTS[kind]
    torch.save(make(), "c.ckpt")
    classifier = load_classifier("cifar_resnet20", weights="c.ckpt")
    for name, tensor in resnet().items():
        assert torch.equal(classifier.net.state_dict()[name], tensor)
    assert classifier.weights == "c.ckpt" + (f" (without {prefix} in its names)" if prefix else "")


@pytest.mark.parametrize(
    "key", ["state_dict_ema", *(pytest.param(key, marks=pytest.mark.slow) for key in ("model_ema", "ema"))]
)
def test_choice_among_several_sets_of_weights_is_announced(key: str, capsys: Capture) -> None:
    torch.save({"state_dict": resnet(), key: named("module.", other()), "epoch": 3}, "c.pth")
    line = warning(capsys, WEIGHTS + "c.pth")
    assert line == (
        f"warning: c.pth holds several sets of weights: state_dict is used, not {key}; write c.pth::{key} for another"
    )
    with pytest.warns(CertifyWarning, match="several sets of weights: state_dict is used"):
        first = load_classifier("cifar_resnet20", weights="c.pth")
    assert torch.equal(first.net.state_dict()["linear.bias"], resnet()["linear.bias"])
    chosen = load_classifier("cifar_resnet20", weights=line.partition("write ")[2].split()[0])
    assert torch.equal(chosen.net.state_dict()["linear.bias"], other()["linear.bias"])
    assert chosen.weights == f"c.pth::{key} (without module. in its names)"
    assert error(capsys, WEIGHTS + "c.pth::emma") == f"certify: c.pth has no part 'emma'; it has state_dict, {key}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: (t * 100).to(torch.int8), "int8"),
        (lambda t: torch.complex(t, t), "complex64"),
        (lambda t: t.to("meta"), "without values"),
        (lambda t: t.to_sparse(), "sparse_coo"),
    ],
)
def test_weights_that_are_not_dense_floats_are_refused(
    change: Callable[[Tensor], Tensor], said: str, capsys: Capture
) -> None:
    """Integers would be taken for values and imaginary parts dropped; the rest cannot be copied."""
    torch.save({**resnet(), "conv1.weight": change(resnet()["conv1.weight"])}, "c.pth")
    assert error(capsys, WEIGHTS + "c.pth") == (
        "certify: c.pth does not fit cifar_resnet20: 1 not plain floating-point numbers (conv1.weight "
        f"{said}); save the weights as dense float32 tensors"
    )
    torch.save({k: t.half() if t.is_floating_point() else t for k, t in resnet().items()}, "c.pth")
    assert load_classifier("cifar_resnet20", weights="c.pth").num_classes == 10


def test_checkpoints_without_weights_are_named(capsys: Capture) -> None:
    from safetensors.torch import save_file

    save_file({}, "c.safetensors")
    said = "holds no tensors; expected a state dict, bare or under a key"
    assert error(capsys, WEIGHTS + "c.safetensors") == f"certify: c.safetensors {said}"
    Path("mine").mkdir()
    Path("mine/model-00001-of-00002.safetensors").write_bytes(b"...")
    assert error(capsys, WEIGHTS + "mine") == (
        "certify: mine keeps its weights in several files (model-00001-of-00002.safetensors, ...); save them in one "
        "file"
    )


def test_common_key_is_preferred_at_any_depth(capsys: Capture) -> None:
    torch.save({"trainer": {"old": {"teacher": other()}, "best": {"model": resnet()}}}, "c.pth")
    line = warning(capsys, WEIGHTS + "c.pth")
    assert line == (
        "warning: c.pth holds several sets of weights: trainer.best.model is used, not trainer.old.teacher; "
        "write c.pth::trainer.old.teacher for another"
    )
    chosen = load_classifier("cifar_resnet20", weights=line.partition("write ")[2].split()[0])
    assert torch.equal(chosen.net.state_dict()["linear.bias"], other()["linear.bias"])


def test_two_networks_in_one_state_dict_are_named(capsys: Capture) -> None:
    """Lightning modules that hold a loss with weights, or a copy of the network."""
    loss = {"loss.weight": torch.zeros(3)}
    torch.save({"state_dict": {**named("model.", resnet()), **named("teacher.", other()), **loss}}, "c.ckpt")
    line = error(capsys, WEIGHTS + "c.ckpt")
    assert line == (
        "certify: c.ckpt contains more than cifar_resnet20, whose names begin with model. or teacher. there; "
        "select that part: c.ckpt::model"
    )
    part = line.partition("that part: ")[2].split()[0]
    for named_part, state in ((part, resnet()), ("c.ckpt::teacher", other())):
        found = load_classifier("cifar_resnet20", weights=named_part)
        assert torch.equal(found.net.state_dict()["linear.bias"], state["linear.bias"])


def test_denoisers_checkpoints_are_read_the_same_way() -> None:
    from denoisers import ARCHITECTURES

    net = ARCHITECTURES.get("dncnn")(image_channels=1)
    torch.save({"state_dict": named("model.", net.state_dict()), "ema": net.state_dict()}, "d.pth")
    with pytest.warns(CertifyWarning, match=r"state_dict is used, not ema; write d\.pth::ema for another"):
        load_denoiser("dncnn=d.pth", image=(1, 8, 8))
    chosen = load_denoiser("dncnn=d.pth::ema", image=(1, 8, 8))
    assert chosen.describe() == {"name": "dncnn", "weights": "d.pth::ema"}  # type: ignore[operator]


# Files that are something else


HTML = "<!DOCTYPE html><html>404</html>"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"


@pytest.mark.parametrize("name", ["x.onnx", "x.pt", "x.safetensors", "x.pth", "x.ts"])
@pytest.mark.parametrize(
    ("content", "said"), [(HTML, "is a web page, not a model"), (LFS, "is a Git LFS pointer, not a model")]
)
def test_failed_downloads_are_named_whatever_they_are_called(
    name: str, content: str, said: str, capsys: Capture
) -> None:
    Path(name).write_text(content)
    for option in (f"--model {name}", f"--model cifar_resnet20 --weights {name}", f"--model digits --denoiser {name}"):
        assert f"certify: {name} {said}" in error(capsys, RUN + option)
    assert f"certify: {name} {said}" in error(capsys, RUN + f"--model digits --denoiser dncnn={name}")


def archive(name: str) -> None:
    """A tar or zip archive with a checkpoint and a text in it, or the checkpoint compressed."""
    torch.save(resnet(), "inside.pth")
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        with tarfile.open(name, "w:" + ("" if name.endswith(".tar") else "gz")) as out:
            out.add("inside.pth")
    elif name.endswith(".gz"):
        Path(name).write_bytes(gzip.compress(Path("inside.pth").read_bytes()))
    else:
        with zipfile.ZipFile(name, "w") as packed:
            packed.write("inside.pth")
    Path("inside.pth").unlink()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.tar", "is a tar archive: unpack it (tar -xf x.tar) and pass the file in it: inside.pth"),
        ("x.tar.gz", "is a tar archive: unpack it (tar -xf x.tar.gz) and pass the file in it"),
        ("x.pth.gz", "is compressed by gzip: unpack it (gunzip -k x.pth.gz) and pass the resulting file"),
        ("x.zip", "is a zip archive: unpack it (unzip x.zip) and pass the file in it: inside.pth"),
        ("x.pth", "is a zip archive: unpack it (unzip x.pth) and pass the file in it: inside.pth"),
    ],
)
def test_archive_of_weights_has_unpacking_advice(name: str, said: str, capsys: Capture) -> None:
    """The command in the message is run, and what comes out of it loads."""
    import subprocess

    archive(name)
    line = error(capsys, WEIGHTS + name)
    assert line == f"certify: {name} {said}"
    command = shlex.split(line.partition("(")[2].partition(")")[0])
    if command[0] == "unzip":
        zipfile.ZipFile(name).extractall()  # not every machine has the command
    else:
        subprocess.run(command, check=True)
    out = "x.pth" if name == "x.pth.gz" else "inside.pth"
    assert load_classifier("cifar_resnet20", weights=out).num_classes == 10


def tar_header(name: str, size: int, kind: bytes) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def test_hostile_archives_are_named_without_reading_them_whole() -> None:
    """A tar archive may call gigabytes a file's name; a zip archive may be of a version yet to come."""
    long_name = tar_header("x", 2**26, tarfile.GNUTYPE_LONGNAME)
    with gzip.open("a.tar.gz", "wb", compresslevel=1) as packed:
        packed.write(long_name + bytes(2**26))
    for name, content in (
        ("a.tar", long_name),
        ("b.tar", tar_header("x.pth", 0, tarfile.REGTYPE) + tar_header("y", 2**26, tarfile.XHDTYPE)),
        ("c.tar", tar_header("x", 0, tarfile.REGTYPE).replace(b"0", b"z")),
    ):
        with Path(name).open("wb") as file:
            file.write(content)
            file.truncate(2**26 + 2048)
    tracemalloc.start()
    try:
        for name, said in (("a.tar.gz", "the file in it"), ("a.tar", "it"), ("b.tar", "it: x.pth"), ("c.tar", "it")):
            with pytest.raises(UserError, match=rf"is a tar archive: unpack it \(tar -xf {name}\) and pass .*{said}$"):
                file_kind(name)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    with zipfile.ZipFile("d.zip", "w") as out:
        out.writestr("x", "")
    content = bytearray(Path("d.zip").read_bytes())
    content[content.rindex(b"PK\x01\x02") + 6] = 99
    Path("d.zip").write_bytes(content)
    assert file_kind("d.zip") == "checkpoint"  # damaged, as its reader says
    with pytest.raises(UserError, match=r"d\.zip is not a readable zip file \(zip file version 9\.9\)"):
        open_zip(Path("d.zip"))


def hdf5(name: str) -> None:
    Path(name).write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600))


def keras(name: str) -> None:
    with zipfile.ZipFile(name, "w") as out:
        out.writestr("config.json", "{}")
        out.writestr("model.weights.h5", b"\x89HDF")


def arrays(name: str) -> None:
    with Path(name).open("wb") as out:
        np.savez(out, a=1)


def exported(name: str) -> None:
    torch.export.save(torch.export.export(Half().eval(), (torch.rand(4, 1, 8, 8),)), name)


OWN = "load it in your own function and pass that: --model package.module:function"


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("x.h5", hdf5, f"is an HDF5 file, as Keras writes them; {OWN}, or export it to ONNX"),
        ("x.keras", keras, f"is a Keras model; {OWN}, or export it to ONNX"),
        (
            "x.pt2",
            exported,
            f"is a program saved by torch.export, which runs code; {OWN} (torch.export.load(FILE).module())",
        ),
        ("x.npz", arrays, "contains NumPy arrays; expected weights written by torch.save or safetensors"),
        ("x.pth", arrays, "contains NumPy arrays; expected weights written by torch.save or safetensors"),
    ],
)
def test_other_model_formats_are_named(name: str, write: Any, said: str, capsys: Capture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(name)
    for option in (f"--model {name}", f"--model cifar_resnet20 --weights {name}"):
        assert error(capsys, RUN + option).startswith(f"certify: {name} {said}")


def test_exported_program_runs_in_a_user_function() -> None:
    """The advice of the message works."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = {0: torch.export.Dim("batch", min=1, max=100_000)}
        torch.export.save(
            torch.export.export(Half().eval(), (torch.rand(4, 1, 8, 8),), dynamic_shapes=(batch,)), "x.pt2"
        )
    code = "import torch\ndef net():\n    found = torch.export.load('x.pt2').module()\n    return lambda x: found(x)\n"
    Path("exported_net.py").write_text(code)
    x = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        classifier = load_classifier("exported_net:net", input_size=(1, 8, 8))
        assert torch.allclose(classifier.logits(x), Half()(x), atol=1e-5)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"hello world, not weights",
            "is not a safetensors file: it begins with b'hello world, not'; download it again",
        ),
        (b"x", "is not a safetensors file: it begins with b'x'; download it again"),
        (
            (100_000_001).to_bytes(8, "little") + b"{" + bytes(100),
            "is not a complete safetensors file: its header would have 100,000,001 bytes, the file has 109 (a header "
            "at most 100,000,000); download it again",
        ),
        (
            (5000).to_bytes(8, "little") + b"{" + bytes(100),
            "is not a complete safetensors file: its header would have 5,000 bytes, the file has 109 (a header at most "
            "100,000,000); download it again",
        ),
        ((20).to_bytes(8, "little") + b"{not json at all!!!}" + bytes(100), "is not a complete safetensors file ("),
    ],
)
def test_broken_safetensors_file_is_named(content: bytes, said: str, capsys: Capture) -> None:
    Path("x.safetensors").write_bytes(content)
    assert error(capsys, WEIGHTS + "x.safetensors").startswith(f"certify: x.safetensors {said}")
    assert "x.safetensors" in error(capsys, RUN + "--model digits --denoiser x.safetensors")


def test_checkpoint_named_safetensors_loads() -> None:
    torch.save({"state_dict": resnet()}, "x.safetensors")
    assert load_classifier("cifar_resnet20", weights="x.safetensors").num_classes == 10


# Folders of the model hub


def hub_folder(folder: str, **pretrained: Any) -> dict[str, Tensor]:
    """A folder as timm saves it, with its own size, mean, std and classes."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state: dict[str, Tensor] = timm.create_model("test_resnet", pretrained=False, num_classes=10).state_dict()
    Path(folder).mkdir(parents=True)
    save_file(state, Path(folder) / "model.safetensors")
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    own = {"input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "crop_pct": 1.0}
    config = {
        "architecture": "test_resnet",
        "num_classes": 10,
        "label_names": names,
        "pretrained_cfg": {**own, **pretrained},
    }
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return state


@pytest.mark.parametrize("named_as", ["folder", "file"])
def test_hub_folder_sets_size_mean_std_and_classes(named_as: str, capsys: Capture) -> None:
    state = hub_folder("hf/mine")
    if named_as == "folder":
        run(*(RUN + "--model hf/mine").split())
        assert capsys.readouterr().err == ""
    else:
        said = warning(capsys, RUN + "--model test_resnet --num-classes 10 --weights hf/mine/model.safetensors")
        assert said == (
            "warning: size, mean and std are those of hf/mine/config.json beside the weights; --input-size, --mean and "
            "--std replace them"
        )
    (step,) = read_run("r.jsonl").header["pipeline"]
    assert (step["input"], step["mean"], step["std"]) == ([3, 64, 64], [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    classifier = load_classifier("hf/mine")
    assert torch.equal(classifier.net.state_dict()["conv1.0.weight"], state["conv1.0.weight"])
    assert classifier.class_names is not None
    assert [names[0] for names in classifier.class_names][:2] == ["zero", "one"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"architecture": "no_such_net"},
            "cannot build the model that mine/config.json describes (RuntimeError: Unknown",
        ),
        ({"num_classes": "ten"}, "cannot build the model that mine/config.json describes (TypeError: "),
        ({"num_classes": 11}, "mine does not fit test_resnet: 2 of another shape (fc.weight 10x"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_named(change: dict[str, Any], said: str, capsys: Capture) -> None:
    hub_folder("mine")
    config = json.loads(Path("mine/config.json").read_text())
    Path("mine/config.json").write_text(json.dumps({**config, **change}))
    assert error(capsys, RUN + "--model mine").startswith(f"certify: {said}")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["test_resnet", "resnet50"])
def test_no_warning_about_settings_that_the_user_gives(architecture: str, capsys: Capture) -> None:
    hub_folder("mine")
    config = json.loads(Path("mine/config.json").read_text())
    Path("mine/config.json").write_text(json.dumps({**config, "architecture": architecture}))
    command = RUN + "--model test_resnet --num-classes 10 --weights mine"
    run(*(command + " --input-size 3x32x32 --mean 0.5 --std 0.5").split())
    assert capsys.readouterr().err == ""
    Path("r.jsonl").unlink()
    said = warning(capsys, command + " --mean 0.5 --std 0.5")
    if architecture == "test_resnet":
        assert said == "warning: size is that of mine/config.json beside the weights; --input-size replaces it"
    else:
        assert said.endswith("describes resnet50, not test_resnet: its size is not used")
    Path("r.jsonl").unlink()
    said = warning(capsys, command + " --input-size 3x32x32")
    if architecture == "test_resnet":
        assert said == (
            "warning: mean and std are those of mine/config.json beside the weights; --mean and --std replace them"
        )
    else:
        assert said.endswith("describes resnet50, not test_resnet: its mean and std are not used")


@pytest.mark.slow
def test_configuration_of_another_architecture_warns(capsys: Capture) -> None:
    state = hub_folder("mine")
    config = json.loads(Path("mine/config.json").read_text())
    Path("mine/config.json").write_text(json.dumps({**config, "architecture": "resnet50"}))
    said = warning(capsys, RUN + "--model test_resnet --num-classes 10 --weights mine/model.safetensors")
    assert said == (
        "warning: mine/config.json beside the weights describes resnet50, not test_resnet: its size, mean and std are "
        "not used"
    )
    assert state


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"architectures": ["ResNetForImageClassification"], "model_type": "resnet"},
            "mine contains a transformers model (ResNetForImageClassification), not a timm one; load it in your own "
            "function that returns it and pass that: --model package.module:function",
        ),
        (
            {"_class_name": "UNet2DModel"},
            "mine contains a diffusers network, not a classifier; pass --denoiser diffusers:mine",
        ),
        ("{", "mine is a folder without a readable config.json (Expecting property name"),
        (None, "mine is a folder without a readable config.json ([Errno 2] No such file or directory"),
    ],
)
def test_hub_folders_of_other_libraries_are_named(config: Any, said: str, capsys: Capture) -> None:
    Path("mine").mkdir()
    if config is not None:
        Path("mine/config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    assert error(capsys, RUN + "--model mine").startswith(f"certify: {said}")
    assert error(capsys, WEIGHTS + "mine") == (
        "certify: mine is a folder without weights; expected a file, or one of model.safetensors, pytorch_model.bin, "
        "diffusion_pytorch_model.safetensors in it"
    )


# Values that were hardly meant


@pytest.mark.parametrize(
    ("given", "advised"),
    [
        ("--mean 123.675 --std 58.395", "--mean 0.485 --std 0.229"),
        ("--mean 0.5 --std 127.5", "--mean 0.00196 --std 0.5"),
    ],
)
def test_mean_in_255_scale_warns(given: str, advised: str, capsys: Capture) -> None:
    words = given.split()
    line = warning(capsys, RUN + f"--model digits {given}")
    assert line == (
        f"warning: mean {words[1]} and std {words[3]} are large for images in [0, 1]; if they are for pixels from "
        f"0 to 255, pass {advised}"
    )
    run(*(RUN.replace("r.jsonl", "s.jsonl") + "--model digits " + line.partition("pass ")[2]).split())
    assert capsys.readouterr().err == ""


# Classifiers of neither grey nor colour images

CHANNELS = """
import torch
def net(channels):
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * 64, 10))
    made.input_size = (channels, 8, 8)
    return made
def two(): return net(2)
def four(): return net(4)
def five(): return net(5)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "channels"), [("two", 2), ("four", 4), ("five", 5)])
def test_classifiers_with_other_channels_than_grey_and_rgb(name: str, channels: int, capsys: Capture) -> None:
    """Pictures are refused when they are loaded, by a line whose advice works: arrays, channels first or last."""
    Path("many_channels.py").write_text(CHANNELS)
    sys.modules.pop("many_channels", None)
    command = RUN.replace("--data digits ", "") + f"--model many_channels:{name} --data "
    for data in ("photos", "d"):
        Path("d").mkdir(exist_ok=True)
        from PIL import Image

        Image.new("RGBA", (8, 8), 9).save("d/a.png")
        assert error(capsys, command + data) == (
            f"certify: the classifier takes {channels} channels and {data} holds pictures in grey or colour; pass "
            f"arrays: --data FILE.npz, with x of shape (N, {channels}, 8, 8)"
        )
    x = np.random.default_rng(0).integers(0, 256, (2, channels, 8, 8), dtype=np.uint8)
    np.savez("first.npz", x=x)
    np.savez("last.npz", x=np.moveaxis(x, 1, 3))
    images = {}
    for file in ("first.npz", "last.npz"):
        Path("r.jsonl").unlink(missing_ok=True)
        run(*(command + file).split())
        images[file] = [row["image"] for row in read_run("r.jsonl").images]
    assert images["first.npz"] == images["last.npz"]


def test_arrays_with_many_channels_are_resized(capsys: Capture) -> None:
    """8-bit arrays of other channels than pictures have are resized like floating-point ones, channel by channel."""
    Path("many_channels.py").write_text(CHANNELS)
    sys.modules.pop("many_channels", None)
    x = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 16), dtype=np.uint8)
    for name, channels in (("five", 5), ("four", 4), ("two", 2)):
        np.savez("bytes.npz", x=x[:, :channels])
        np.savez("floats.npz", x=(x[:, :channels] / 255).astype(np.float32))
        classifier = load_classifier(f"many_channels:{name}")
        seen = [load_images(file, classifier).load(1) for file in ("bytes.npz", "floats.npz")]
        assert torch.allclose(*seen, atol=1e-6)
        assert seen[0].shape == (channels, 8, 8)


def test_arrays_with_wrong_channels_are_refused_unread(capsys: Capture) -> None:
    np.savez_compressed("x.npz", x=np.zeros((8, 4096, 64, 64), np.uint8))
    began = time.monotonic()
    assert error(capsys, RUN.replace("--data digits", "--data x.npz") + "--model digits") == (
        "certify: the classifier takes 1 channel and x.npz holds arrays of 4096 channels; "
        "pass arrays: --data FILE.npz, with x of shape (N, 1, 8, 8)"
    )
    assert time.monotonic() - began < 2


def test_truncated_checkpoint_is_not_taken_for_an_archive() -> None:
    """A zip archive that is cut off is a damaged checkpoint, not an archive of something."""
    out = io.BytesIO()
    torch.save(resnet(), out)
    Path("c.pth").write_bytes(out.getvalue()[:5000])
    with pytest.raises(UserError, match=r"c\.pth is damaged or not a checkpoint"):
        load_classifier("cifar_resnet20", weights="c.pth")
