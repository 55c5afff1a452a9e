"""The execution policy: a pure function of the hardware and the amount of work, and safe where a machine fails it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import run
from servers import wait_for
from small_networks import IMAGE, Float32Only, classifier
from torch import Tensor, nn

from analysis.bench import product_speed
from certify import UserError, read_run
from certify.engine.execution import default_batch_size
from certify.engine.hardware import Hardware, detect_hardware
from certify.engine.policy import LITTLE_WORK, EngineOptions, choose_execution, count_operations, plan_execution
from certify.models.pipeline import Pipeline

CPU = Hardware("cpu", "", 0, compiler=True)
GPU = Hardware("cuda", "tensor cores", 80, compiler=True)
LONG = 1e30


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that should pay for every run and does not end by itself for 1 s."""

    def compile_endlessly(*arguments: Any, **options: Any) -> None:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            time.sleep(0.01)
        raise RuntimeError("nobody stopped it")

    monkeypatch.setenv("CERTIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(torch, "compile", compile_endlessly)
    monkeypatch.setattr("certify.engine.policy.COMPILE_SECONDS", 0.05)
    monkeypatch.setattr("certify.engine.policy._COMPILED_FROM", {"cpu": 0.0})


class TestPlan:
    @pytest.mark.parametrize(
        ("hardware", "precision"),
        [
            (CPU, "float32"),
            (replace(CPU, bfloat16="AMX"), "bfloat16"),
            (GPU, "bfloat16"),
            (replace(GPU, bfloat16=""), "float32"),
            (Hardware("mps", "", 0, compiler=False), "float32"),
        ],
    )
    def test_the_device_decides_the_precision(self, hardware: Hardware, precision: str) -> None:
        found = plan_execution(EngineOptions(), hardware, batch_size=7, work=0.0)
        assert (found.precision, found.folded, found.compiled, found.batch_size) == (precision, True, False, 7)
        assert found.why[0].startswith(f"{precision}: ")

    def test_long_work_is_compiled_where_there_is_a_compiler(self) -> None:
        def compiled(hardware: Hardware, work: float) -> bool:
            return plan_execution(EngineOptions(), hardware, batch_size=1, work=work).compiled

        assert compiled(CPU, LONG)
        assert compiled(GPU, LONG)
        assert not compiled(CPU, 1e9)
        assert not compiled(replace(CPU, compiler=False), LONG)
        assert not compiled(Hardware("mps", "", 0, compiler=False), LONG)

    def test_options_are_kept(self) -> None:
        fast = replace(CPU, bfloat16="AMX")
        assert plan_execution(EngineOptions("float16"), fast, batch_size=1, work=0.0).precision == "float16"
        assert plan_execution(EngineOptions(compile="on"), fast, batch_size=1, work=0.0).compiled
        assert not plan_execution(EngineOptions(compile="off"), fast, batch_size=1, work=LONG).compiled
        unchanged = plan_execution(EngineOptions("float32", "off"), fast, batch_size=1, work=LONG)
        assert unchanged.plain
        assert unchanged.why == ()

    def test_wrong_options(self) -> None:
        with pytest.raises(UserError, match="precision 'half'; expected auto, float32"):
            EngineOptions(precision="half")
        with pytest.raises(UserError, match="compile 'yes'"):
            EngineOptions(compile="yes")

    @pytest.mark.parametrize("wrong", [0, -5])
    def test_wrong_batch_sizes(self, wrong: int) -> None:
        with pytest.raises(UserError, match=f"batch size {wrong}; expected"):
            EngineOptions(batch_size=wrong)


class TestHardware:
    def test_bfloat16_needs_compute_capability_8(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("certify.engine.hardware.find_spec", lambda name: object())
        for major, minor, found in ((7, 5, ""), (8, 0, "tensor cores"), (9, 0, "tensor cores")):
            facts = SimpleNamespace(major=major, minor=minor, total_memory=79 * 2**30 + 2**29 + 1)
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, facts=facts: facts)
            assert detect_hardware(torch.device("cuda")) == Hardware("cuda", found, 80, compiler=True)

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "/nonexistent/c++")
        assert not detect_hardware(torch.device("cpu")).compiler

    def test_a_batch_takes_half_of_a_small_accelerator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("certify.engine.execution.detect_hardware", lambda device: replace(GPU, memory=8))
        photo = torch.empty(3, 224, 224, device="meta")
        assert default_batch_size(photo) == 8 * 2**30 // 800 // photo.numel() == 71


class TestChoice:
    def test_little_work_runs_unchanged(self) -> None:
        base = Pipeline(classifier())
        run, real = choose_execution(base, IMAGE, LITTLE_WORK // IMAGE.numel(), EngineOptions())
        assert run is base
        assert real.plain

    @pytest.mark.slow
    def test_the_same_work_is_run_alike_in_every_process(self, tmp_path: Path) -> None:
        """No file, clock or random number has a say."""
        code = (
            "import dataclasses\n"
            "from small_networks import IMAGE, classifier\n"
            "from certify.engine.policy import EngineOptions, choose_execution\n"
            "from certify.models.pipeline import Pipeline\n"
            "print(choose_execution(Pipeline(classifier()), IMAGE, 10**6, EngineOptions())[1])\n"
        )
        said = [
            subprocess.run(
                [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
            ).stdout
            for _ in range(2)
        ]
        assert said[0] == said[1]
        assert "folded=True" in said[0]

    def test_a_network_that_cannot_be_cast_runs_in_float32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fast = replace(CPU, bfloat16="AMX")
        monkeypatch.setattr("certify.engine.policy.detect_hardware", lambda device: fast)
        base = Pipeline(classifier(Float32Only()))
        _, real = choose_execution(base, IMAGE, 10**5, EngineOptions(compile="off"))
        assert real.precision == "float32"
        assert real.why[-1].startswith("not bfloat16: the base classifier does not run in bfloat16")
        with pytest.raises(UserError, match="does not run in bfloat16"):
            choose_execution(base, IMAGE, 10**5, EngineOptions("bfloat16", "off"))

    def test_disagreement_with_float32_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A network of large offsets loses its answer in 16 bits: that is reported, and the choice stays."""

        class Fragile(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.offset = nn.Parameter(torch.tensor(4096.0))

            def forward(self, x: Tensor) -> Tensor:
                small = x.mean((2, 3)) + self.offset
                return torch.cat([small, small[:, :1] + 0.001], 1)

        fast = replace(CPU, bfloat16="AMX")
        monkeypatch.setattr("certify.engine.policy.detect_hardware", lambda device: fast)
        _, real = choose_execution(Pipeline(classifier(Fragile())), IMAGE, 10**5, EngineOptions(compile="off"))
        assert real.precision == "bfloat16"

    def test_the_unchanged_classifier_can_be_requested(self) -> None:
        """float32 without compilation is the base classifier itself, also where folding would be faster."""
        base = Pipeline(classifier())
        run, real = choose_execution(base, IMAGE, 10**6, EngineOptions(precision="float32", compile="off"))
        assert run is base
        assert real.plain

    def test_operations_are_products_and_sums(self) -> None:
        base = Pipeline(classifier(nn.Sequential(nn.Flatten(), nn.Linear(768, 5))))
        assert count_operations(base, IMAGE) == 2 * 768 * 5

    @pytest.mark.slow
    @pytest.mark.usefixtures("endless")
    def test_compilation_is_given_up_in_time(self, tmp_path: Path) -> None:
        """The run is eager and records why; the compiler's thread ends."""
        out = tmp_path / "r.jsonl"
        run(
            *"--model digits --sigma 0.25 --n 150000 --max 2 --precision float32 --batch-size 500".split(),
            "--out",
            str(out),
        )
        header = read_run(out).header
        why = "compilation was given up after 0.05 s: running eagerly (--compile on sets no limit)"
        assert header["execution"]["why"][-1] == why
        assert header["compiled"] is False
        wait_for(lambda: "certify-within" not in [thread.name for thread in threading.enumerate()])

    @pytest.mark.slow
    @pytest.mark.usefixtures("endless")
    def test_a_requested_compilation_has_no_limit(self) -> None:
        _, real = choose_execution(Pipeline(classifier()), IMAGE, 100_000, EngineOptions(compile="on"))
        assert real.failed == "compilation failed (RuntimeError: nobody stopped it): running eagerly"

    def test_a_batch_that_does_not_fit_is_halved_before_the_run(self) -> None:
        class Small(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(3, 4)

            def forward(self, x: Tensor) -> Tensor:
                if len(x) > 32:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return self.head(x.mean((2, 3)))

        base = Pipeline(classifier(Small()))
        _, real = choose_execution(base, IMAGE, 10**5, EngineOptions("float32", "off", 100))
        assert real.batch_size == 25


def test_product_speed_counts_two_operations_per_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.bench._product_seconds", lambda size, *a: size**3 / 1e9)
    assert product_speed("float32", torch.device("cpu")) == pytest.approx(2e9)
