"""TorchScript files are programs: none is loaded without consent, on any path."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command import run
from torch import Tensor, nn

from certify import UserError, load_classifier, read_run
from denoisers import load_denoiser

Capture = pytest.CaptureFixture[str]
LINE = (
    " is TorchScript, a program: loading and running it can do anything that you can, such as overwrite files; "
    "if you trust its source, add --trust-code\n"
)
RUN = "--data digits --sigma 0.25 --n 50 --n0 10 --max 2 --quiet "


class Overwrites(nn.Module):
    """Scores of digits, or images, and a file that is gone."""

    def __init__(self, denoises: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.denoises = denoises

    def forward(self, x: Tensor) -> Tensor:
        torch.ops.aten.save(x, "thesis.txt")
        return x * 0.9 if self.denoises else self.layer(x.flatten(1))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a thesis in it, and two programs that overwrite it under several names."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("net", "denoiser"):
            for suffix in ("pt", "ts", "pth"):
                torch.jit.save(torch.jit.script(Overwrites(kind == "denoiser").eval()), f"{kind}.{suffix}")
    Path("thesis.txt").write_text("years of work")
    return tmp_path


COMMANDS = [
    f"--model net.pt {RUN}",
    f"--model net.pth {RUN}",
    f"predict --model net.ts {RUN.replace('--n0 10 ', '')}",
    f"--model net.pt --shard 1/2 {RUN}",
    f"--model digits --denoiser denoiser.pt {RUN}",
    f"--model digits --denoiser denoiser.pth {RUN}",
    f"--model net.pt --cluster local:1 {RUN}",
    "bench --model net.pt",
    "compare --model net.ts --data digits --max 2 --attacks none --quiet",
    "compare --model digits --defences denoiser.pth --data digits --max 2 --attacks none --quiet",
    "compare --model digits --defences denoised:denoiser=denoiser.pt --data digits --max 2 --attacks none --quiet",
    "compare --model digits --defences none --data digits --max 2 --attacks transfer --surrogate net.pt --quiet",
    "inspect --model net.pt --data digits --max 2 --attacks square",
    "evaluate-denoiser --denoiser denoiser.pt --sigma 0.25 --data digits --max 2",
    "evaluate-denoiser --denoiser median --model net.pt --sigma 0.25 --data digits --max 2",
    "train --denoiser dncnn --classifier net.pt --objective stability --data digits-train --sigma 0.25 --out t --quiet",
    "train --denoiser dncnn --init denoiser.pt --data digits-train --sigma 0.25 --out t --quiet",
    "serve --model net.pt --sigma 0.25 --port 0",
    "serve --endpoint http://127.0.0.1:9 --protocol v2 --input-size 1x8x8 --denoiser denoiser.pt --sigma 0.25 --port 0",
    "audit --endpoint http://127.0.0.1:9 --protocol json --protocol-option labels=l --data digits --input-size 1x8x8 "
    "--sigma 0.25 --n 10 --n0 5 --budget 100 --out a --quiet --denoiser denoiser.ts",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_torchscript_without_consent(command: str, here: Path, capsys: Capture) -> None:
    if "--cluster" in command:
        pytest.importorskip("ray")
    run(*command.split(), code=2)
    name = next(word.rpartition("=")[2] for word in command.split() if word.endswith((".pt", ".ts", ".pth")))
    assert capsys.readouterr().err == f"certify: {name}{LINE}"
    assert Path("thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_the_advice_works(here: Path) -> None:
    """For a classifier and for a denoiser, in a shard, too; as a whole command and from Python."""
    out = "--trust-code --out r.jsonl"
    run(*f"predict --model net.pth --input-size 1x8x8 {RUN.replace('--n0 10 ', '')} {out}".split())
    assert len(read_run("r.jsonl").images) == 2
    assert Path("thesis.txt").read_bytes()[:2] == b"PK"
    run(*f"--model digits --denoiser denoiser.pth {RUN} --shard 1/2 {out.replace('r.', 's.')}".split())
    assert load_classifier("net.pt", input_size=(1, 8, 8), trust_code=True).num_classes == 10
    assert load_denoiser("denoiser.pt", trust_code=True)(torch.ones(1, 1, 8, 8)).max() == pytest.approx(0.9)


def test_python_api_requires_consent(here: Path) -> None:
    for load in (load_classifier, load_denoiser):
        with pytest.raises(UserError) as refused:
            load("net.pt")
        assert f"{refused.value}\n" == f"net.pt{LINE}".replace("--trust-code", "trust_code=True")
    assert Path("thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_workers_receive_the_consent(here: Path) -> None:
    pytest.importorskip("ray")
    command = f"--model net.pt --input-size 1x8x8 {RUN} --trust-code --cluster local:1 --out r.jsonl".split()
    done = subprocess.run([sys.executable, "-m", "certify", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(read_run("r.jsonl").images) == 2
