"""One model in one file: whatever a classifier or denoiser reads belongs to its identity, and older files say less."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import run

from certify import SmoothedClassifier, UserError, load_classifier, load_images, read_run
from certify.cluster.worker import Worker, WorkerEngine, WorkerSpec, code_identity

Capture = pytest.CaptureFixture[str]
RUN = "--data digits --sigma 0.25 --n 100 --n0 10 --max 4 --quiet "

MODULE = '''
"""Classifiers and denoisers that read weights from files beside them."""
from pathlib import Path
import numpy as np
import torch
from torch import nn

def _weight():
    return torch.from_numpy(np.load("weight.npy"))

def scores():
    weight, kind = _weight(), getattr(torch, Path("dtype").read_text())
    def f(images): return (images.flatten(1).to(kind) @ weight.to(kind)).float()
    f.input_size = (1, 8, 8)
    return f

def labels():
    weight = _weight()
    def f(images): return (images.flatten(1) @ weight).argmax(1)
    f.input_size, f.num_classes = (1, 8, 8), 10
    return f

def bright():
    level = float(_weight()[0, 0])
    def f(images): return (images.mean(dim=(1, 2, 3)) > level).long()
    f.num_classes = 10
    return f

class Net(nn.Module):
    """A module whose weight is neither parameter nor buffer."""
    input_size = (1, 8, 8)
    def __init__(self):
        super().__init__()
        self.held = [_weight()]
    def forward(self, x): return x.flatten(1) @ self.held[0]

def denoise():
    weight = _weight()[:, :1].reshape(8, 8).abs().clamp(0, 1)
    def f(noisy, sigma): return noisy * (1 - sigma * weight)
    return f

def blind():
    weight = _weight()[:, :1].reshape(8, 8).abs().clamp(0, 1)
    def f(images): return images * weight
    return f
'''


def retrain(seed: int) -> None:
    np.save("weight.npy", np.random.default_rng(seed).normal(size=(64, 10)).astype(np.float32))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("reads_files.py").write_text(MODULE)
    Path("dtype").write_text("float32")
    retrain(0)
    yield tmp_path
    import sys

    sys.modules.pop("reads_files", None)


def write_onnx(name: str, seed: int, *, branch: bool = False) -> None:
    """A linear classifier of 1x8x8 images whose weight lies in ``name.data``; in a branch of a condition, if told."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    weight = np.random.default_rng(seed).normal(size=(64, 10)).astype(np.float32)
    Path(f"{name}.data").write_bytes(weight.tobytes())
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=weight.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", f"{name}.data"), ("offset", "0"), ("length", str(weight.nbytes))):
        tensor.external_data.add(key=key, value=value)
    images = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    if branch:
        inner = helper.make_graph(
            [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("MatMul", ["f", "w"], ["z"])],
            "inner", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 10])],
        )  # fmt: skip
        true = helper.make_tensor("t", TensorProto.BOOL, [], [True])
        nodes = [nodes[0], helper.make_node("Constant", [], ["c"], value=true)]
        nodes.append(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner))
    graph = helper.make_graph(nodes, "g", [images], [y], [] if branch else [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    Path(name).write_bytes(model.SerializeToString())
    assert onnx is not None


def only_line(capsys: Capture) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.slow
@pytest.mark.parametrize("branch", [False, True])
def test_files_beside_an_onnx_graph_belong_to_it(branch: bool, here: Path, capsys: Capture) -> None:
    for seed in (0, 1):
        write_onnx("m.onnx", seed, branch=branch)
        run(*f"--model m.onnx {RUN} --out r.jsonl".split(), code=2 * seed)
    assert "r.jsonl holds a run with other settings (pipeline[0].external_data.m.onnx.data" in only_line(capsys)
    retrain(0)
    write_onnx("m.onnx", 1, branch=branch)
    run(*f"--model m.onnx {RUN} --shard 1/2 --out 1.jsonl".split())
    write_onnx("m.onnx", 0, branch=branch)
    run(*f"--model m.onnx {RUN} --shard 2/2 --out 2.jsonl".split())
    capsys.readouterr()
    run(*"merge 1.jsonl 2.jsonl -o m.jsonl".split(), code=2)
    assert "2.jsonl is a shard of another run than 1.jsonl (pipeline[0].external_data.m.onnx.data" in only_line(capsys)


def test_an_onnx_file_that_points_elsewhere_is_refused(here: Path, capsys: Capture) -> None:
    write_onnx("m.onnx", 0)
    whole = Path("m.onnx").read_bytes()
    for name in (b"../data.bin", b"/tmp/xx.bin", b"..\\data.bin"):
        Path("m.onnx").write_bytes(whole.replace(b"m.onnx.data", name))
        run(*f"--model m.onnx {RUN} --out r.jsonl".split(), code=2)
        assert f"m.onnx keeps tensors in {name.decode()!r}, which is not in its own folder: refused" in only_line(
            capsys
        )
    Path("m.onnx").write_bytes(whole)
    Path("m.onnx.data").unlink()
    run(*f"--model m.onnx {RUN} --out r.jsonl".split(), code=2)
    assert only_line(capsys) == (
        "certify: m.onnx keeps its weights in m.onnx.data, which is not beside it; copy that file to ."
    )


MODELS = {
    "scores": "--model reads_files:scores",
    "labels": "--model reads_files:labels",
    "any size": "--model reads_files:bright",
    "module": "--model reads_files:Net",
    "denoiser": "--model digits --denoiser reads_files:denoise",
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_a_run_is_not_resumed_with_a_retrained_model(model: str, here: Path, capsys: Capture) -> None:
    command = f"predict {model} {RUN.replace('--n0 10', '')} --out r.jsonl".split()
    run(*command)
    run(*command)
    retrain(1)
    capsys.readouterr()
    run(*command, code=2)
    assert only_line(capsys) == (
        f"certify: r.jsonl holds a run with other settings ({model.rpartition(' ')[2]} gives other answers to the same "
        "probe images); it is left alone: name another --out"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["labels"])
def test_shards_of_a_retrained_model_do_not_merge(kind: str, here: Path, capsys: Capture) -> None:
    """Two of the same model do."""
    shards = [f"{MODELS[kind]} {RUN} --shard {i}/2 --out {i}.jsonl".split() for i in (1, 2)]
    run(*shards[0])
    run(*shards[1])
    run(*"merge 1.jsonl 2.jsonl -o whole.jsonl".split())
    Path("2.jsonl").unlink()
    retrain(1)
    run(*shards[1])
    capsys.readouterr()
    run(*"merge 1.jsonl 2.jsonl -o m.jsonl".split(), code=2)
    assert only_line(capsys) == (
        f"certify: 2.jsonl is a shard of another run than 1.jsonl ({MODELS[kind].rpartition(' ')[2]} gives other "
        "answers to the same probe images); leave it out"
    )


def test_another_arithmetic_is_no_other_model(here: Path) -> None:
    """Answers that differ a thousand times more than another processor's would still resume."""
    command = f"predict --model reads_files:scores {RUN.replace('--n0 10', '')} --out r.jsonl".split()
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        Path("dtype").write_text(dtype)
        run(*command)


def test_a_fine_tuned_network_is_another_one(here: Path, capsys: Capture) -> None:
    """A tenth of noise on the weights, which leaves most labels as they are."""
    command = f"predict --model reads_files:scores {RUN.replace('--n0 10', '')} --out r.jsonl".split()
    run(*command)
    weight = np.load("weight.npy")
    np.save("weight.npy", weight + 0.1 * np.random.default_rng(1).normal(size=weight.shape).astype(np.float32))
    run(*command, code=2)
    assert "gives other answers to the same probe images" in capsys.readouterr().err


def test_answers_near_a_tie_are_not_compared() -> None:
    """A labelling whose boundary moves by as much as single precision does is the same one."""
    from certify.runs.identity import same_answers

    def record(level: float, images: int = 0) -> Any:
        classifier = load_classifier(
            lambda: lambda x: (x.mean(dim=(1, 2, 3)) > level).long(), input_size=(3, 8, 8), num_classes=2
        )
        return classifier.record()["fingerprint"]

    assert same_answers(record(0.5), record(0.5 + 1e-4))
    assert not same_answers(record(0.5), record(0.55))


def without_fingerprints(path: str, change: Callable[[dict[str, Any]], None] | None = None) -> None:
    """The file as an older version wrote it."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("fingerprint", "external_data")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    header, *rows = Path(path).read_text().splitlines()
    Path(path).write_text("\n".join([json.dumps(strip(json.loads(header))), *rows]) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["denoiser"])
def test_a_file_without_a_fingerprint_is_resumed_on_trust_alone(kind: str, here: Path, capsys: Capture) -> None:
    """It is read, recomputed and merged with a warning; the advice is what works."""
    model = MODELS[kind]
    command = f"{model} {RUN} --out r.jsonl"
    run(*command.split())
    without_fingerprints("r.jsonl")
    torn = Path("r.jsonl").read_text().splitlines(keepends=True)[:-1]
    Path("r.jsonl").write_text("".join(torn))
    capsys.readouterr()
    run(*command.split(), code=2)
    line, name = only_line(capsys), model.rpartition(" ")[2]
    assert line == (
        f"certify: r.jsonl holds no fingerprint of {name}, so whether it is still the same model is unknown; "
        "if neither its code nor any file that it reads has changed, add --trust-identity, else name another --out"
    )
    run(*shlex.split(command), line.split("add ")[1].split(",")[0])
    assert len(read_run("r.jsonl").images) == 4
    capsys.readouterr()
    for verb in ("table r.jsonl", "recompute r.jsonl --alpha 0.01 --out again.jsonl"):
        run(*verb.split())
        assert only_line(capsys) == (
            f"warning: r.jsonl: it holds no fingerprint of {name}: nothing shows that all its images met the same model"
        )
    for i in (1, 2):
        run(*f"{model} {RUN} --shard {i}/2 --out {i}.jsonl".split())
    without_fingerprints("2.jsonl")
    capsys.readouterr()
    run(*"merge 1.jsonl 2.jsonl -o m.jsonl".split())
    assert f"warning: 2.jsonl: it holds no fingerprint of {name}" in only_line(capsys)
    run(*"table m.jsonl".split())
    assert "warning: m.jsonl: it holds no fingerprint" in only_line(capsys)


def test_an_onnx_run_that_names_no_other_files_is_resumed_on_trust_alone(here: Path, capsys: Capture) -> None:
    write_onnx("m.onnx", 0)
    command = f"--model m.onnx {RUN} --out r.jsonl".split()
    run(*command)
    without_fingerprints("r.jsonl")
    capsys.readouterr()
    run(*command, code=2)
    assert "r.jsonl holds no fingerprint of m.onnx" in only_line(capsys)
    run(*command, "--trust-identity")


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_a_worker_with_other_files_is_refused(model: str, here: Path, digits: Any) -> None:
    """The worker compares its pipeline with the driver's before it is given an image."""
    from certify.api import load_smoothed

    named = dict(zip(model.split()[::2], model.split()[1::2], strict=True))
    options = {"denoiser": named.get("--denoiser", "none"), "precision": "float32", "compile": "off"}
    load = functools.partial(load_smoothed, named["--model"], 0.25, options, "cpu", (1, 8, 8))
    mine = load().base.record()
    spec = WorkerSpec(lambda: WorkerEngine(load), str(here), code_identity(), mine)
    Worker(spec).start()
    retrain(1)
    kind, name = "denoiser" if "denoise" in model else "classifier", model.rpartition(" ")[2]
    with pytest.raises(UserError) as refused:
        Worker(spec).start()
    assert str(refused.value).startswith("the worker on ")
    assert str(refused.value).endswith(
        f" gives other answers of {kind} {name} to the same probe images than this driver: "
        "give every machine the same code, and the same files that it reads"
    )


COMPARE = "compare --data digits --max 2 --attacks none --certify-n 0 --quiet --out c.jsonl "


@pytest.mark.parametrize(
    "named",
    [
        "--model reads_files:labels --defences none",
        "--model digits --defences median,reads_files:blind",
        "--model digits --defences denoised:denoiser=reads_files:denoise:n=2",
    ],
)
def test_a_comparison_is_of_one_model(named: str, here: Path, capsys: Capture) -> None:
    run(*(COMPARE + named).split())
    run(*(COMPARE + named).split())
    retrain(1)
    capsys.readouterr()
    run(*(COMPARE + named).split(), code=2)
    assert "gives other answers to the same probe images" in only_line(capsys)


def test_a_comparison_knows_the_weights_of_its_denoisers(here: Path, capsys: Capture) -> None:
    """A checkpoint of the same name with other weights is another denoiser."""
    from denoisers import ARCHITECTURES

    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(ARCHITECTURES.get("dncnn")(image_channels=1).state_dict(), "d.pth")
        run(*(COMPARE + "--model digits --defences denoised:denoiser=dncnn=d.pth:n=2").split(), code=2 * seed)
    assert "defences[0].members[0].purifier." in only_line(capsys)


@pytest.mark.slow
def test_a_training_goes_on_with_the_same_guide_alone(here: Path, capsys: Capture) -> None:
    command = "train --denoiser dncnn --classifier reads_files:Net --objective stability --data digits-train --max 40 "
    command += "--sigma 0.25 --epochs 0.5 --held-out 10 --validations 1 --out t --quiet"
    run(*command.split())
    run(*command.split())
    retrain(1)
    capsys.readouterr()
    run(*command.split(), code=2)
    assert "reads_files:Net gives other answers to the same probe images" in only_line(capsys)
    state = json.loads(Path("t/checkpoint/state.json").read_text())
    del state["guides"]
    Path("t/checkpoint/state.json").write_text(json.dumps(state))
    run(*command.split(), code=2)
    assert "add --trust-identity" in only_line(capsys)
    run(*command.split(), "--trust-identity")


def test_own_objects_have_fingerprints_and_built_in_ones_need_none() -> None:
    """A denoiser that somebody hands over in Python is anybody's code, too."""

    class Halve(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, sigma: float | None = None) -> torch.Tensor:
            return noisy / 2

    steps = SmoothedClassifier(load_classifier("digits"), sigma=0.25, denoiser=Halve()).base.record()
    assert len(steps[0]["fingerprint"]["residuals"]) == 64
    assert "fingerprint" not in steps[1]
    assert load_images("digits", load_classifier("digits"), max_images=1) is not None
