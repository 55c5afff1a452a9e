"""Execution of the base classifier: the same function with every engine, and failures are safe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run, run_of_json
from servers import wait_for
from small_networks import IMAGE, PLAIN, Float32Only, classifier, labels, network, trained
from torch import Tensor, nn

from certify import Gaussian, SmoothedClassifier, UserError, load_classifier
from certify.engine.execution import Execution, prepare
from certify.engine.monte_carlo import Job, count_votes
from certify.errors import CertifyWarning
from certify.models.classifier import Classifier, ClassifierSpec, square_input
from certify.models.pipeline import Pipeline
from certify.smoothing.rng import stream_key
from denoisers.dncnn import DnCNN


class TestFolding:
    def test_logits_stay_the_same(self) -> None:
        base = Pipeline(classifier(), trained(DnCNN(16, 5)), 0.5)
        run, real = prepare(base, replace(PLAIN, folded=True), IMAGE)
        assert real.folded
        assert not any(isinstance(m, nn.BatchNorm2d) for m in run.modules())  # type: ignore[attr-defined]
        noisy = IMAGE + 0.5 * torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected, found = base.logits(noisy), run.logits(noisy)  # type: ignore[attr-defined]
        assert float(expected.std()) > 0.1
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)

    def test_the_original_is_unchanged(self) -> None:
        base = Pipeline(classifier())
        before = base.describe()
        prepare(base, replace(PLAIN, folded=True, precision="bfloat16"), IMAGE)
        assert base.describe() == before
        assert next(base.parameters()).dtype == torch.float32

    def test_a_convolution_used_twice_is_not_folded(self) -> None:
        """One convolution before two batch norms: folding both into it would be wrong, so nothing is folded."""

        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 3, padding=1)
                self.first_bn, self.second_bn = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
                self.head = nn.Linear(3, 4)

            def forward(self, x: Tensor) -> Tensor:
                x = torch.relu(self.first_bn(self.conv(x)))
                return self.head(self.second_bn(self.conv(x)).mean((2, 3)))

        base = Pipeline(classifier(Shared()))
        run, real = prepare(base, replace(PLAIN, folded=True), IMAGE)
        assert not real.folded
        assert run is base

    def test_control_flow_is_not_folded(self) -> None:
        class Flow(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.sign = network(), 1

            def forward(self, x: Tensor) -> Tensor:
                return self.body(x) if float(x.sum()) > -1e9 else -self.body(x)

        base = Pipeline(classifier(Flow()))
        run, real = prepare(base, replace(PLAIN, folded=True), IMAGE)
        assert (run, real.folded) == (base, False)


class TestPrecision:
    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_noise_is_added_and_normalised_in_float32(self, precision: str) -> None:
        """The network receives the exact float32 normalisation of the exact float32 sum, cast once."""
        seen: list[Tensor] = []

        class Spy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(3, 4)

            def forward(self, x: Tensor) -> Tensor:
                seen.append(x.clone())
                return self.head(x.mean((2, 3)))

        base = Pipeline(classifier(Spy()))
        run, _ = prepare(base, replace(PLAIN, precision=precision), IMAGE)
        seen.clear()
        plain = labels(base, base)
        exact = torch.cat(seen)
        seen.clear()
        fast = labels(run, base)
        cast = torch.cat(seen)
        assert cast.dtype == {"bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
        assert torch.equal(cast, exact.to(cast.dtype))
        assert (fast == plain).double().mean() > 0.9

    def test_the_denoiser_is_cast_too(self) -> None:
        base = Pipeline(classifier(), trained(DnCNN(16, 5)), 0.5)
        run, _ = prepare(base, replace(PLAIN, folded=True, precision="bfloat16"), IMAGE)
        assert {p.dtype for p in run.parameters()} == {torch.bfloat16}  # type: ignore[attr-defined]
        assert (labels(run, base) == labels(base, base)).double().mean() > 0.8

    def test_other_than_torch_modules_run_as_they_are(self, linear_classifier: Any) -> None:
        base = Pipeline(linear_classifier(torch.ones(768), 380.0))
        run, real = prepare(base, replace(PLAIN, folded=True, compiled=True), IMAGE)
        assert run is base
        assert real.plain
        assert "not made of torch modules" in real.why[-1]
        with pytest.raises(UserError, match="drop precision"):
            prepare(base, replace(PLAIN, precision="bfloat16"), IMAGE)

    def test_a_network_that_cannot_be_cast(self) -> None:
        with pytest.raises(UserError, match=r"does not run in bfloat16.*precision float32"):
            prepare(Pipeline(classifier(Float32Only())), replace(PLAIN, precision="bfloat16"), IMAGE)


class TestCompilation:
    @pytest.mark.slow
    def test_the_same_votes(self) -> None:
        """Compiled: the same labels but for ties in the last bit, batches filled up, and several images in one."""
        base = Pipeline(classifier(), trained(DnCNN(8, 3)), 0.5)
        run, real = prepare(base, replace(PLAIN, folded=True, compiled=True), IMAGE)
        assert real.compiled, real.why
        jobs = [Job(IMAGE, stream_key(0, str(i), "estimation"), 130, keep=130) for i in range(3)]
        fast = list(count_votes(run, Gaussian(0.5), jobs, batch_size=50, fixed_shape=True))
        plain = list(count_votes(base, Gaussian(0.5), jobs, batch_size=50))
        assert [t.votes.trials for t in fast] == [130] * 3
        same = sum(int((a.labels == b.labels).sum()) for a, b in zip(fast, plain, strict=True))
        assert same >= 388
        again = list(count_votes(run, Gaussian(0.5), jobs[::-1], batch_size=50, fixed_shape=True))
        assert [t.votes for t in again[::-1]] == [t.votes for t in fast]

    @pytest.mark.slow
    def test_weights_are_frozen(self) -> None:
        """Freezing takes effect only where it is set while tracing; then convolutions hold packed weights."""
        base = Pipeline(classifier())
        run, real = prepare(base, replace(PLAIN, folded=True, compiled=True), IMAGE)
        assert real.compiled, real.why
        before = labels(run, base, 50)
        with torch.no_grad():
            for module in run.fast.modules():  # type: ignore[attr-defined]
                if isinstance(module, nn.Conv2d):
                    module.weight.zero_()
        assert torch.equal(labels(run, base, 50), before)
        assert len(before.unique()) > 1

    @pytest.mark.slow
    def test_many_classifiers_in_one_process(self) -> None:
        """Each compiled with its own weights; a compiler that gives up on the ninth would run it eagerly unnoticed."""
        from torch._dynamo.utils import counters

        counters.clear()
        for seed in range(10):
            base = Pipeline(Classifier("small", ClassifierSpec(trained(network(), seed), square_input((3, 16, 16)))))
            run, real = prepare(base, replace(PLAIN, folded=True, compiled=True), IMAGE)
            assert real.compiled, real.why
            assert (labels(run, base, 200) == labels(base, base, 200)).sum() >= 199
        assert counters["frames"]["ok"] == counters["frames"]["total"] == counters["stats"]["unique_graphs"] == 10

    @pytest.mark.slow
    @pytest.mark.parametrize("seconds", [0.1, 0.3, 0.6])
    def test_an_abandoned_compilation_changes_nothing(self, seconds: float) -> None:
        """Wherever the compiler is stopped, the classifier runs eagerly, and may be compiled later."""
        base = Pipeline(classifier(), trained(DnCNN(8, 12)), 0.5)
        wanted = replace(PLAIN, folded=True, compiled=True)
        before = labels(base, base, 50)
        run, real = prepare(base, wanted, IMAGE, compile_seconds=seconds)
        assert real.failed == (
            f"compilation was given up after {seconds:.3g} s: running eagerly (--compile on sets no limit)"
        )
        assert torch.equal(labels(base, base, 50), before)
        assert (labels(run, base, 50) == before).sum() >= 49
        wait_for(lambda: "certify-within" not in [thread.name for thread in threading.enumerate()])
        run, real = prepare(base, wanted, IMAGE, compile_seconds=600)
        assert real.compiled, real.why
        assert (labels(run, base, 50) == before).sum() >= 49

    @pytest.mark.slow
    def test_without_a_compiler(self, tmp_path: Path) -> None:
        """The real thing: no C++ compiler can be found. The run continues eagerly, says so once, and records it."""
        command = [sys.executable, "-m", "certify", "--model", "digits", "--sigma", "0.25", "--n", "100", "--max", "2"]
        command += ["--compile", "on", "--json", "--out", str(tmp_path / "r.jsonl")]
        environment = {**os.environ, "CXX": "/nonexistent/c++", "CERTIFY_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert json.loads(done.stdout)["ran_as"]["compiled"] is False
        assert done.stderr.count("compilation failed") == 1
        header = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])
        assert header["compiled"] is False
        assert "compilation failed" in header["execution"]["why"][-1]


def test_a_run_resumes_as_it_began(tmp_path: Path) -> None:
    """Resumed with `auto`, a run keeps its precision; asked for another one, it is refused."""
    path = tmp_path / "r.jsonl"
    command = [*"--model digits --sigma 0.25 --n 200 --max 4 --json --out".split(), str(path)]
    run(*command, "--precision", "bfloat16")
    whole = path.read_text().splitlines()
    header = json.loads(whole[0])
    assert (header["precision"], header["compiled"], header["folded"]) == ("bfloat16", False, False)
    assert header["execution"]["asked"]["precision"] == "bfloat16"
    assert json.loads(whole[1])["agreement"][1] == 100
    path.write_text("\n".join(whole[:3]) + "\n")
    run(*command)
    resumed = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["votes"] for r in resumed[1:]] == [json.loads(line)["votes"] for line in whole[1:]]
    run(*command, "--precision", "float32", code=2)


def test_disagreement_with_float32_is_a_warning() -> None:
    from certify.runs.transaction import warn_of_results

    counts = {"label": None, "prediction": 0, "trials": 1, "failures": 0}
    rows = [{**counts, "agreement": [94, 100]}, {**counts, "agreement": [95, 100]}, counts]
    with pytest.warns(CertifyWarning, match=r"only 189 of 200 labels .* pass precision float32"):
        warn_of_results(run_of_json("r", {}, rows))
    warn_of_results(run_of_json("r", {}, rows[1:]))


@pytest.mark.slow
def test_fast_and_float32_votes_of_real_images(shared_data: Path) -> None:
    """ResNet-56 on real images, folded and compiled against plain float32 with the same noise: of 3,000 labels none or
    a few move, those whose two leading logits agree to rounding. Fresh noise would move about 500."""
    from certify import load_images

    weights = shared_data / "classifiers" / "resnet56-4bfd9763.th"
    model = load_classifier("cifar_resnet56", weights=weights)
    images = load_images(str(shared_data / "cifar10_jpeg_test.zip"), model, skip=1000, max_images=10)
    fast, plain = SmoothedClassifier(model, 0.12, batch_size=50), SmoothedClassifier(model, 0.12, batch_size=50)
    real = fast.prepare(images.load(0), 3000, Execution("float32", True, True, 50))
    assert (real.folded, real.compiled) == (True, True)
    counts = [
        [g.votes(images.load(i), 300, stage="e", image_id=str(i)).counts for i in range(len(images))]
        for g in (fast, plain)
    ]
    moved = sum(abs(a - b) for x, y in zip(*counts, strict=True) for a, b in zip(x, y, strict=True)) / 2
    assert moved <= 3
