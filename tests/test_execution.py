"""How the base classifier is run: the same function whichever way, decided sensibly, recorded, and safe to fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from certify import Gaussian, SmoothedClassifier, UserError, load_classifier
from certify.classifiers import Classifier, ClassifierSpec, square_input
from certify.execution import Execution, prepare
from certify.machine import product_speed
from certify.pipeline import Pipeline
from certify.streams import block_size, stream_key
from certify.tuning import LITTLE_WORK, Wanted, _key, _Search, choose
from certify.votes import Job, count_votes
from denoisers.dncnn import DnCNN

PLAIN = Execution("float32", False, False, 50)
IMAGE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with weights and batch statistics as if it had been trained: nothing is zero, one or the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                fan_in = max(1, tensor[0].numel()) if tensor.ndim > 1 else 1
                draw = torch.randn(tensor.shape, generator=generator) * (
                    0.2 if tensor.ndim < 2 else (2 / fan_in) ** 0.5
                )
                tensor.copy_(draw.abs() + 0.5 if name.endswith(("running_var", "bn.weight")) else draw)
    return module


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def classifier(net: nn.Module | None = None) -> Classifier:
    net = trained(net or network())
    return Classifier("small", ClassifierSpec(net, square_input((3, 16, 16), (0.4,) * 3, (0.3,) * 3)))


def labels(run: Any, base: Pipeline, trials: int = 500, sigma: float = 0.5) -> Tensor:
    job = Job(IMAGE, stream_key(0, "x", "estimation"), trials, keep=trials)
    (tally,) = count_votes(run, Gaussian(sigma), [job], batch_size=50)
    return tally.labels


class TestFolding:
    def test_logits_stay(self) -> None:
        base = Pipeline(classifier(), trained(DnCNN(16, 5)), 0.5)
        run, real = prepare(base, replace(PLAIN, folded=True), IMAGE)
        assert real.folded
        assert not any(isinstance(m, nn.BatchNorm2d) for m in run.modules())  # type: ignore[attr-defined]
        noisy = IMAGE + 0.5 * torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected, found = base.logits(noisy), run.logits(noisy)  # type: ignore[attr-defined]
        assert float(expected.std()) > 0.1
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)

    def test_the_original_is_left_alone(self) -> None:
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
        """What reaches the network is the exact float32 normalisation of the exact float32 sum, cast once."""
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

    def test_what_is_no_torch_module_stays_as_it_is(self, linear_classifier: Any) -> None:
        base = Pipeline(linear_classifier(torch.ones(768), 380.0))
        run, real = prepare(base, replace(PLAIN, folded=True, compiled=True), IMAGE)
        assert run is base
        assert real.plain
        assert "not made of torch modules" in real.why[-1]
        with pytest.raises(UserError, match="drop --precision"):
            prepare(base, replace(PLAIN, precision="bfloat16"), IMAGE)

    def test_a_network_that_cannot_be_cast(self) -> None:
        class Stubborn(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(3, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(x.float().mean((2, 3)))

        with pytest.raises(UserError, match=r"does not run in bfloat16.*--precision float32"):
            prepare(Pipeline(classifier(Stubborn())), replace(PLAIN, precision="bfloat16"), IMAGE)


class TestCompilation:
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

    def test_without_a_compiler(self, tmp_path: Path) -> None:
        """The real thing: no C++ compiler can be found. The run goes on eagerly, says so once, and records it."""
        command = [sys.executable, "-m", "certify", "--model", "digits", "--sigma", "0.25", "--n", "100", "--max", "2"]
        command += ["--compile", "on", "--json", "--out", str(tmp_path / "r.jsonl")]
        environment = {**os.environ, "CXX": "/nonexistent/c++", "CERTIFY_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert json.loads(done.stdout)["ran_as"]["compiled"] is False
        assert done.stderr.count("compilation failed") == 1
        header = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])
        assert header["compiled"] is False
        assert "compilation failed" in header["execution"]["why"][-1]


class TestChoice:
    def test_little_work_is_not_measured(self) -> None:
        base = Pipeline(classifier())
        run, real = choose(base, IMAGE, Gaussian(0.25), LITTLE_WORK // IMAGE.numel(), Wanted())
        assert run is base
        assert real.plain

    def test_a_choice_is_remembered(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The second time nothing is measured, and the same comes out; other work is measured anew."""
        monkeypatch.setenv("CERTIFY_CACHE", str(tmp_path))
        base, measured = Pipeline(classifier()), []
        monkeypatch.setattr("certify.tuning.measure_speed", lambda *a: measured.append(1) or 1e5)
        _, first = choose(base, IMAGE, Gaussian(0.25), 100_000, Wanted(compile="off"))
        count = len(measured)
        assert count
        _, second = choose(base, IMAGE, Gaussian(0.25), 100_000, Wanted(compile="off"))
        assert len(measured) == count
        assert replace(second, why=()) == replace(first, why=())
        assert "chosen on this machine" in second.why[-1]
        choose(base, IMAGE, Gaussian(0.25), 100_000, Wanted(compile="off"), again=True)
        assert len(measured) == 2 * count
        choose(base, IMAGE, Gaussian(0.25), 300_000, Wanted(compile="off"))
        assert len(measured) == 3 * count

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "[]",
            '{"KEY": 1}',
            '{"KEY": {"date": "x", "execution": {"why": []}}}',
            '{"KEY": {"date": "x", "execution": {"precision": "half", "folded": true, "compiled": false, '
            '"batch_size": 9, "why": []}}}',
            '{"KEY": {"date": "x", "execution": {"precision": "float32", "folded": true, "compiled": false, '
            '"batch_size": "9", "why": []}}}',
        ],
    )
    def test_a_damaged_memory_is_ignored(self, content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CERTIFY_CACHE", str(tmp_path))
        base, wanted = Pipeline(classifier()), Wanted(compile="off")
        key = _key(base, IMAGE, 100_000, wanted)
        (tmp_path / "choices.json").write_text(content.replace("KEY", key))
        _, real = choose(base, IMAGE, Gaussian(0.25), 100_000, wanted)
        assert real.precision == "float32"
        assert not any("chosen on" in why for why in real.why)
        assert json.loads((tmp_path / "choices.json").read_text())[key]["execution"]["precision"] == "float32"

    def test_a_precision_that_changes_labels_is_not_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """16 bits look ten times as fast, but a network of large offsets loses its answer in them."""

        class Fragile(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.offset = nn.Parameter(torch.tensor(4096.0))

            def forward(self, x: Tensor) -> Tensor:
                small = x.mean((2, 3)) + self.offset
                return torch.cat([small, small[:, :1] + 0.001], 1)

        net = Fragile()
        base = Pipeline(Classifier("fragile", ClassifierSpec(net, square_input((3, 16, 16)))))
        monkeypatch.setattr("certify.tuning.product_speed", lambda p, d: 1e9 if p == "float32" else 1e10)
        search = _Search(base, IMAGE, Gaussian(0.5), 1_000_000, replace(PLAIN, batch_size=100))
        search.precisions()
        assert search.best.precision == "float32"
        assert any("agree with float32" in why for why in search.best.why)

    def test_compiling_pays_past_a_number_of_samples(self) -> None:
        """5.05 s to compile one layer for a gain of 1.2: four times that is saved from 121,200 samples at 1,000 a second."""
        base = Pipeline(classifier(nn.Sequential(nn.Flatten(), nn.Linear(768, 5))))
        search = _Search(base, IMAGE, Gaussian(0.5), 1, PLAIN)
        search.speed = 1000.0
        pays = []
        for search.samples in (10_000, 121_000, 121_400, 10**8):
            pays.append(search.compiling_pays())
        assert pays == [False, False, True, True]
        assert "pay from 130,000 samples; this run has 10,000" in search.best.why[0]

    def test_the_classifier_untouched_can_be_asked_for(self) -> None:
        """float32 without compilation is the base classifier itself, also where folding would be faster."""
        base = Pipeline(classifier())
        run, real = choose(base, IMAGE, Gaussian(0.25), 10**6, Wanted(precision="float32", compile="off"))
        assert run is base
        assert real.plain

    def test_a_failure_to_compile_is_not_remembered(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Else a compiler that is installed later would never be used."""
        monkeypatch.setenv("CERTIFY_CACHE", str(tmp_path))

        def broken(*arguments: Any, **options: Any) -> None:
            raise RuntimeError("no compiler")

        with monkeypatch.context() as patched:
            patched.setattr(torch, "compile", broken)
            _, real = choose(Pipeline(classifier()), IMAGE, Gaussian(0.25), 100_000, Wanted(compile="on"))
        assert real.failed == "compilation failed (RuntimeError: no compiler): running eagerly"
        assert not (tmp_path / "choices.json").exists()

    def test_a_batch_that_does_not_fit_is_learnt_while_measuring(self) -> None:
        class Small(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(3, 4)

            def forward(self, x: Tensor) -> Tensor:
                if len(x) > 32:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return self.head(x.mean((2, 3)))

        base = Pipeline(classifier(Small()))
        _, real = choose(base, IMAGE, Gaussian(0.25), 10**5, Wanted("float32", "off", 100))
        assert real.batch_size == 25

    def test_wrong_wishes(self) -> None:
        with pytest.raises(UserError, match="precision 'half'; expected auto, float32"):
            Wanted(precision="half")
        with pytest.raises(UserError, match="compile 'yes'"):
            Wanted(compile="yes")

    @pytest.mark.parametrize("wrong", [0, -5])
    def test_wrong_batch_sizes(self, wrong: int) -> None:
        with pytest.raises(UserError, match=f"batch size {wrong}; expected"):
            Wanted(batch_size=wrong)

    def test_product_speed_counts_two_operations_a_term(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("certify.machine._product_seconds", lambda size, *a: size**3 / 1e9)
        assert product_speed("float32", torch.device("cpu")) == pytest.approx(2e9)


class TestLoop:
    @pytest.mark.parametrize("batch_size", [1, 64, 1000])
    def test_images_that_share_batches_get_the_votes_they_get_alone(
        self, batch_size: int, linear_classifier: Any
    ) -> None:
        f = Pipeline(linear_classifier(torch.ones(12), 6.0))
        images = [torch.full((3, 2, 2), v) for v in (0.45, 0.5, 0.55)]
        jobs = [Job(x, stream_key(0, str(i), s), n, keep=3) for i, x in enumerate(images) for s, n in STAGES.items()]
        alone = [next(count_votes(f, Gaussian(0.25), [job], batch_size=1000)) for job in jobs]
        together = list(count_votes(f, Gaussian(0.25), jobs, batch_size=batch_size))
        assert [t.votes for t in together] == [t.votes for t in alone]
        assert [t.labels.tolist() for t in together] == [t.labels.tolist() for t in alone]

    def test_full_batches(self, linear_classifier: Any) -> None:
        """Twenty images of 10 + 20 samples: batches of 64 to the last but one, not sixty small ones."""
        sizes: list[int] = []

        class Spy(linear_classifier):  # type: ignore[misc]
            def __call__(self, images: Tensor) -> Tensor:
                sizes.append(len(images))
                return super().__call__(images)

        f = Pipeline(Spy(torch.ones(12), 6.0))
        image = torch.full((3, 2, 2), 0.5)
        jobs = [Job(image, stream_key(0, str(i), s), n) for i in range(20) for s, n in (("a", 10), ("b", 20))]
        tallies = list(count_votes(f, Gaussian(0.25), jobs, batch_size=64))
        assert sizes == [64] * 9 + [24]
        assert [t.votes.trials for t in tallies] == [10, 20] * 20

    def test_without_noise_the_image_itself(self, linear_classifier: Any) -> None:
        f = Pipeline(linear_classifier(torch.ones(12), 6.0))
        jobs = [Job(torch.full((3, 2, 2), v), None, 1, keep=1) for v in (0.4, 0.6, 0.4)]
        assert [int(t.labels) for t in count_votes(f, Gaussian(0.25), jobs, batch_size=2)] == [0, 1, 0]

    def test_images_of_several_sizes(self) -> None:
        class Mean:
            num_classes = 2

            def __call__(self, images: Tensor) -> Tensor:
                return (images.mean((1, 2, 3)) > 0.5).long()

            def describe(self) -> dict[str, Any]:
                return {}

        shapes = [(1, 4, 4), (1, 8, 8), (3, 4, 4)]
        jobs = [Job(torch.full(s, 0.6), stream_key(0, str(s), "a"), 150) for s in shapes]
        assert [t.votes.trials for t in count_votes(Mean(), Gaussian(0.1), jobs, batch_size=64)] == [150] * 3

    def test_memory_that_is_too_small_is_learnt_once(self, linear_classifier: Any) -> None:
        """After one batch that did not fit, all later ones are smaller: no failure a batch."""
        failures: list[int] = []

        class Small(linear_classifier):  # type: ignore[misc]
            def __call__(self, images: Tensor) -> Tensor:
                if len(images) > 50:
                    failures.append(len(images))
                    raise MemoryError
                return super().__call__(images)

        f = Pipeline(Small(torch.ones(48), 24.0))
        job = Job(torch.full((3, 4, 4), 0.5), stream_key(0, "x", "a"), 5000)
        (tally,) = count_votes(f, Gaussian(0.25), [job], batch_size=400)
        assert tally.votes.trials == 5000
        assert failures == [400, 200, 100, 100, 200, 100, 100]

    def test_a_classifier_that_uses_its_output_again(self, linear_classifier: Any) -> None:
        """Labels in memory that the next call overwrites, as recorded graphs give them, and batches that are halved."""
        buffer = torch.zeros(400, dtype=torch.int64)

        class Reusing(linear_classifier):  # type: ignore[misc]
            def __call__(self, images: Tensor) -> Tensor:
                if len(images) > 100:
                    raise MemoryError
                return buffer[: len(images)].copy_(super().__call__(images))

        job = Job(torch.full((3, 4, 4), 0.5), stream_key(0, "x", "a"), 1000, keep=500)
        arguments = (torch.ones(48), 24.0)
        (found,) = count_votes(Pipeline(Reusing(*arguments)), Gaussian(0.25), [job], batch_size=400)
        (plain,) = count_votes(Pipeline(linear_classifier(*arguments)), Gaussian(0.25), [job], batch_size=400)
        assert found.votes == plain.votes
        assert torch.equal(found.labels, plain.labels)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
    def test_labels_of_any_integer_type(self, dtype: torch.dtype, linear_classifier: Any) -> None:
        class Typed(linear_classifier):  # type: ignore[misc]
            def __call__(self, images: Tensor) -> Tensor:
                return super().__call__(images).to(dtype)

        job = Job(torch.full((3, 4, 4), 0.5), stream_key(0, "x", "a"), 1000)
        (found,) = count_votes(Pipeline(Typed(torch.ones(48), 24.0)), Gaussian(0.25), [job], batch_size=400)
        (plain,) = count_votes(Pipeline(linear_classifier(torch.ones(48), 24.0)), Gaussian(0.25), [job], batch_size=400)
        assert found.votes == plain.votes

    def test_blocks_drawn_at_once_are_the_blocks_drawn_one_by_one(self, linear_classifier: Any) -> None:
        """Blocks of 307,200 values are drawn on several threads; the samples are those of the stream, in order."""
        seen: list[Tensor] = []

        class Spy(linear_classifier):  # type: ignore[misc]
            def __call__(self, images: Tensor) -> Tensor:
                seen.append(images.clone())
                return super().__call__(images)

        from certify.streams import block_generator

        key, image = stream_key(0, "x", "a"), torch.zeros(3, 32, 32)
        list(count_votes(Pipeline(Spy(torch.ones(3072), 0.0)), Gaussian(0.25), [Job(image, key, 450)], batch_size=64))
        step = block_size(3072)
        drawn = [0.25 * torch.randn((step, 3, 32, 32), generator=block_generator(key, b)) for b in range(5)]
        assert torch.equal(torch.cat(seen), torch.cat(drawn)[:450])


STAGES = {"selection": 10, "estimation": 1500}


def test_memory_does_not_grow_with_n() -> None:
    """Peak memory of 400,000 samples is that of 20,000, in processes of their own."""
    code = """
import resource, sys, torch
from certify import SmoothedClassifier, load_classifier
g = SmoothedClassifier(load_classifier("digits"), 0.25)
g.votes(torch.rand(1, 8, 8), int(sys.argv[1]), stage="a")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = [
        int(subprocess.run([sys.executable, "-c", code, n], capture_output=True, check=True).stdout)
        for n in ("20000", "400000")
    ]
    assert peaks[1] < 1.1 * peaks[0]


def test_a_run_goes_on_as_it_began(tmp_path: Path) -> None:
    """Resumed with `auto`, a run keeps its precision; asked for another one, it is refused."""
    from certify.cli.app import main

    def certify(*more: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["--model", "digits", "--sigma", "0.25", "--n", "200", "--max", "4", "--json", *more])
        return int(ended.value.code or 0)

    path = tmp_path / "r.jsonl"
    assert certify("--out", str(path), "--precision", "bfloat16") == 0
    whole = path.read_text().splitlines()
    header = json.loads(whole[0])
    assert (header["precision"], header["compiled"], header["folded"]) == ("bfloat16", False, False)
    assert header["execution"]["asked"]["precision"] == "bfloat16"
    assert json.loads(whole[1])["agreement"][1] == 100
    path.write_text("\n".join(whole[:3]) + "\n")
    assert certify("--out", str(path)) == 0
    resumed = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["votes"] for r in resumed[1:]] == [json.loads(line)["votes"] for line in whole[1:]]
    assert certify("--out", str(path), "--precision", "float32") == 2


def test_disagreement_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    from certify.cli.summary import _warn_of_disagreement
    from certify.records import Run

    rows = [{"agreement": [94, 100]}, {"agreement": [95, 100]}, {}]
    _warn_of_disagreement(Run(Path("r"), {}, rows))
    assert "only 189 of 200 labels" in (err := capsys.readouterr().err)
    assert "--precision float32" in err
    _warn_of_disagreement(Run(Path("r"), {}, [{"agreement": [95, 100]}]))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("channels", [64, 128])
def test_dncnn_has_the_published_size_and_starts_as_the_identity(channels: int) -> None:
    net = DnCNN(channels).eval()
    assert sum(p.numel() for p in net.parameters()) == {64: 558_400, 128: 2_222_720}[channels]
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(net(images, 0.25), images)


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
