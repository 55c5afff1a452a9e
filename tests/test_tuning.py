"""What `auto` decides: sensibly, the same again, and never a precision that changes the labels."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run
from servers import wait_for
from small_networks import IMAGE, PLAIN, classifier
from torch import Tensor, nn

from certify import Gaussian, UserError, read_run
from certify.engine.hardware import product_speed
from certify.engine.tuning import _COMPILE_GAIN, LITTLE_WORK, Wanted, _key, _Search, choose
from certify.models.classifier import Classifier, ClassifierSpec, square_input
from certify.models.pipeline import Pipeline


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that is believed to pay and does not end by itself for 1 s."""

    def compile_for_ever(*arguments: Any, **options: Any) -> None:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            time.sleep(0.01)
        raise RuntimeError("nobody stopped it")

    monkeypatch.setenv("CERTIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(torch, "compile", compile_for_ever)
    monkeypatch.setattr("certify.engine.tuning._compile_seconds", lambda base: 0.0)
    monkeypatch.setattr("certify.engine.tuning._COMPILE_LONGEST", 0.05, raising=False)
    monkeypatch.setitem(_COMPILE_GAIN, "float32", 1e6)


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
        monkeypatch.setattr("certify.engine.tuning.measure_speed", lambda *a: measured.append(1) or 1e5)
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
        monkeypatch.setattr("certify.engine.tuning.product_speed", lambda p, d: 1e9 if p == "float32" else 1e8)
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
        monkeypatch.setattr("certify.engine.tuning.product_speed", lambda p, d: 1e9 if p == "float32" else 1e10)
        search = _Search(base, IMAGE, Gaussian(0.5), 1_000_000, replace(PLAIN, batch_size=100))
        search.precisions()
        assert search.best.precision == "float32"
        assert any("agree with float32" in why for why in search.best.why)

    def test_compiling_pays_past_a_number_of_samples(self) -> None:
        """5.05 s to compile one layer, gain 1.2: at 1,000 samples a second, four times that is saved from 121,200."""
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

    @pytest.mark.usefixtures("endless")
    def test_compilation_is_given_up_in_time(self, tmp_path: Path) -> None:
        """The run is eager and records why; the compiler's thread ends, and nothing is remembered."""
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
        assert not (tmp_path / "choices.json").exists()

    @pytest.mark.usefixtures("endless")
    def test_a_remembered_compilation_is_given_up_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        remembered = replace(PLAIN, compiled=True, why=("compiled in 9 s",))
        monkeypatch.setattr("certify.engine.tuning._recall", lambda key: remembered)
        base = Pipeline(classifier())
        chosen, real = choose(base, IMAGE, Gaussian(0.25), 100_000, Wanted())
        assert chosen(IMAGE[None]).tolist() == base(IMAGE[None]).tolist()
        assert real.why == (
            "compiled in 9 s",
            "compilation was given up after 0.05 s: running eagerly (--compile on sets no limit)",
        )

    @pytest.mark.usefixtures("endless")
    def test_what_is_to_be_compiled_has_no_limit(self) -> None:
        _, real = choose(Pipeline(classifier()), IMAGE, Gaussian(0.25), 100_000, Wanted(compile="on"))
        assert real.failed == "compilation failed (RuntimeError: nobody stopped it): running eagerly"

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
        monkeypatch.setattr("certify.engine.hardware._product_seconds", lambda size, *a: size**3 / 1e9)
        assert product_speed("float32", torch.device("cpu")) == pytest.approx(2e9)
