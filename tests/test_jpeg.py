"""JPEG as a purifier: the codec against Pillow, tables, training on coded images, the ensemble."""

from __future__ import annotations

import io
import json
import math
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import run
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from analysis.attacks.gradients import differentiable
from certify import load_classifier
from certify.errors import UserError
from certify.models.classifier import Classifier, ClassifierSpec, square_input
from certify.models.defence import Defence, Member
from certify.smoothing.rng import stream_key
from denoisers import quantisation
from denoisers.defences import build_defence
from denoisers.jpeg import (
    Codec,
    _dct2,
    coefficients,
    dct_matrix,
    from_record,
    inverse_coefficients,
    jpeg,
    to_images,
    to_planes,
)
from denoisers.quantisation import KINDS, QUALITIES, TableSet, multiplied, read_tables, shape_of, write_tables
from training.classifier import code_images, make_codecs
from training.coefficients import Coefficients, Probe, collect, main, measure, rate
from training.data import TrainingData, load_training_data
from training.losses import Draw, make_objective


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """A part of a photograph ``(1, 3, 96, 128)`` of whole grey levels."""
    pixels = torch.from_numpy(load_sample_image("china.jpg")[100:196, 200:328].copy())
    return pixels.permute(2, 0, 1)[None].float() / 255


def pillow(image: Tensor, quality: int, subsampling: int) -> Tensor:
    """Pillow's round trip of an image ``(1, C, H, W)`` in [0, 1], in grey levels."""
    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    out = io.BytesIO()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.save(out, "JPEG", quality=quality, subsampling={444: 0, 420: 2}[subsampling])
    decoded = np.array(Image.open(out))
    return torch.from_numpy(decoded.reshape(pixels.shape)).permute(2, 0, 1)[None].float()


def near_a_tie(codec: Codec, image: Tensor) -> Tensor:
    """Blocks ``(rows, columns)`` with a coefficient within 1/8 grey level of where it is rounded the other way."""
    planes = to_planes((image * 255).double())
    planes = [(p - (128 if i == 0 else 0) + 0.5).floor() for i, p in enumerate(planes)]
    found = torch.zeros(image.shape[2] // 8, image.shape[3] // 8, dtype=torch.bool)
    for plane, steps in zip(planes, (codec.luma, codec.chroma), strict=False):
        z = coefficients(plane)[0] / steps
        found |= (((z.abs() % 1) - 0.5).abs() * steps <= 0.125).any(-1).any(0)
    return found


@pytest.mark.parametrize("quality", [30, 45, 60, 75, 90, 95])
def test_the_round_trip_equals_pillows_up_to_two_grey_levels(quality: int, photo: Tensor) -> None:
    """Every block but those where libjpeg's whole-number transform may round a coefficient the other way.

    Blue adds the errors of two planes, one of them 1.772 times.
    """
    for image in (photo, photo[:, :1]):
        codec = jpeg(quality)
        off = (codec(image) * 255 - pillow(image, quality, 444)).abs()
        worst = off.unfold(2, 8, 8).unfold(3, 8, 8).amax((0, 1, 4, 5))
        sure = ~near_a_tie(codec, image)
        assert (worst[sure] <= (3 if image.shape[1] == 3 else 2)).all()
        assert sure.any() or quality > 90
        assert off.mean() < 0.3
        assert (off > 2).float().mean() < 0.03


@pytest.mark.parametrize("height", [96, 83])
def test_the_round_trip_is_close_to_pillows_at_half_the_colour_resolution(height: int, photo: Tensor) -> None:
    """More loosely: a coefficient of colour that is rounded the other way shows in 16x16 pixels."""
    image = photo[..., :height, : height + 14]
    for quality in (30, 75, 95):
        off = (jpeg(quality, 420)(image) * 255 - pillow(image, quality, 420)).abs()
        assert off.mean() < 0.4
        assert (off > 2).float().mean() < 0.02


def test_the_scaling_rule_and_the_tables_are_those_of_the_encoder() -> None:
    for quality in (1, 10, 30, 49, 50, 51, 75, 90, 100):
        out = io.BytesIO()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(out, "JPEG", quality=quality)
        theirs = Image.open(out).quantization  # type: ignore[attr-defined]
        ours = quantisation.standard(quality)
        assert (list(theirs[0]), list(theirs[1])) == (list(ours.luma), list(ours.chroma))
    assert quantisation.scaled([16, 99], 50) == (16, 99)
    assert quantisation.scaled([16, 99], 25) == (32, 198)
    assert quantisation.scaled([16, 99], 75) == (8, 50)
    assert quantisation.scaled([16, 99], 100) == (1, 1)
    assert set(quantisation.flat(75).luma) == {8}


def test_the_transform_is_orthonormal_and_keeps_energy(photo: Tensor) -> None:
    assert torch.allclose(dct_matrix() @ dct_matrix().T, torch.eye(8, dtype=torch.float64), atol=1e-14)
    planes = photo.double() * 255
    found = coefficients(planes)
    assert found.pow(2).sum().item() == pytest.approx(planes.pow(2).sum().item(), rel=1e-12)
    assert torch.allclose(inverse_coefficients(found, 96, 128), planes, atol=1e-10)
    block = torch.zeros(1, 1, 1, 1, 64, dtype=torch.float64)
    block[..., 3 * 8 + 1] = 1  # three half waves downwards, one across
    wave = inverse_coefficients(block, 8, 8)[0, 0]
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    expected = 0.25 * torch.cos((2 * y + 1) * 3 * math.pi / 16) * torch.cos((2 * x + 1) * math.pi / 16)
    assert torch.allclose(wave.float(), expected, atol=1e-6)
    assert torch.allclose(to_images(to_planes(photo)), photo, atol=1e-5)


@pytest.mark.parametrize("subsampling", [444, 420])
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 30, 30), (1, 3, 5, 17), (1, 1, 1, 1)])
def test_any_size_keeps_its_shape(shape: tuple[int, ...], subsampling: int) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    ones = Codec([1] * 64, [1] * 64, subsampling)
    found = ones(images)
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    if shape[1] == 1:
        assert (found - images).abs().max() * 255 <= 2.5  # 2 grey levels from the whole ones, which are 0.5 away
    grey = torch.full(shape, 100 / 255)
    assert torch.allclose(jpeg(50, subsampling)(grey), grey, atol=1.01 / 255)
    alone = torch.cat([jpeg(50, subsampling)(images[i : i + 1]) for i in range(len(images))])
    assert torch.equal(alone, jpeg(50, subsampling)(images))


def test_steps_of_one_keep_images_to_two_grey_levels(photo: Tensor) -> None:
    """Each plane, and so grey images; blue adds two planes' errors, one of them 1.772 times."""
    ones = Codec([1] * 64, [1] * 64)
    assert (ones(photo[:, :1]) - photo[:, :1]).abs().max() * 255 <= 2.01
    off = (ones(photo) - photo).abs() * 255
    assert off.max() <= 2 * 2.772 + 0.51
    assert (off > 2.01).float().mean() < 0.002


def test_coding_twice_changes_little(photo: Tensor) -> None:
    """Rounding pixels and clipping leave coefficients near their multiples: but for fine steps, no other is chosen."""
    for quality in (75, 30):
        once = jpeg(quality)(photo)
        change = (jpeg(quality)(once) - once).abs() * 255
        assert change.mean() < 0.1 * ((once - photo).abs() * 255).mean()
        assert (change > 3).float().mean() < 0.01
    grey = jpeg(75)(photo[:, :1] * 0.8 + 0.1)
    assert (jpeg(75)(grey) - grey).abs().max() * 255 <= 2.01


def test_more_compression_keeps_less(photo: Tensor) -> None:
    shape = shape_of("nn", [100.0 / (1 + k) for k in range(64)], [8.0] * 64)
    kept = []
    for kappa in (0.1, 0.3, 1.0, 3.0):
        codec = Codec(multiplied(shape, kappa, 16), multiplied(shape, kappa, 17))
        kept.append((codec.nonzeros(photo).item(), -10 * (codec(photo) - photo).pow(2).mean().log10().item()))
    rates, psnr = zip(*kept, strict=True)
    assert all(a > b for a, b in pairwise(rates))
    assert all(a > b for a, b in pairwise(psnr))


def test_nonzeros_by_hand() -> None:
    """A flat image has its mean alone; a mean of 128 not even that."""
    assert jpeg(50).nonzeros(torch.full((1, 1, 8, 8), 1.0)).item() == 1 / 64
    assert jpeg(50).nonzeros(torch.full((2, 1, 16, 8), 128 / 255)).tolist() == [0, 0]


def test_the_soft_twin_is_close_and_has_gradients(photo: Tensor) -> None:
    for subsampling in (444, 420):
        exact = jpeg(60, subsampling)
        assert not exact.differentiable
        twin = exact.twin()
        assert twin.differentiable
        image = photo.clone().requires_grad_(True)
        found = twin(image)
        assert (found - exact(photo)).pow(2).mean() < 0.1 * (exact(photo) - photo).pow(2).mean()
        (up,) = torch.autograd.grad((found * torch.linspace(-1, 1, 128)).sum(), image)
        assert (up.abs() > 1e-4).float().mean() > 0.5
        assert exact.describe() == from_record(exact.describe()).describe()
        assert twin.describe()["luma"] == exact.describe()["luma"]
    coarse = jpeg(60).twin()
    inside = torch.full((1, 1, 8, 8), 0.5, dtype=torch.float64)  # one coefficient, the mean: slope 3 (z - round(z))^2
    inside.requires_grad_(True)
    (slope,) = torch.autograd.grad(coarse(inside).sum(), inside)
    z = (128 - 128) * 8 / coarse.luma[0].item()
    assert slope.sum().item() == pytest.approx(64 * 3 * (z - round(z)) ** 2, abs=1e-9)
    brighter = torch.full((1, 1, 8, 8), 131 / 255, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(coarse(brighter).sum(), brighter)
    z = 3 * 8 / coarse.luma[0].item()
    assert slope.sum().item() == pytest.approx(64 * 3 * (z - round(z)) ** 2, rel=1e-6)


def test_tables_from_statistics_by_hand() -> None:
    """Sref = sqrt(4 * 16) = 8 in alternating bands; p95 = 5: 10 sqrt(2) and 10 / sqrt(2)."""
    spread, reach = [4.0, 16.0] * 32, [5.0] * 64
    assert shape_of("nn", spread, reach)[:2] == pytest.approx([10 * 2**0.5, 10 / 2**0.5])
    assert shape_of("nn", spread, reach, gamma=0) == pytest.approx([10.0] * 64)
    assert shape_of("nn", spread, reach, gamma=1)[:2] == pytest.approx([20, 5])
    assert shape_of("std", spread, reach)[:2] == pytest.approx([32, 8])
    assert shape_of("flat", spread, reach) == [16.0] * 64
    assert multiplied(shape_of("nn", spread, reach, gamma=1), 2, 16)[:3] == (
        32,
        10,
        40,
    )  # the mean's is capped at 2 * 16
    assert multiplied([1000.0] * 64, 1, 16)[:2] == (16, 255)
    assert multiplied([1e-9] * 64, 1, 16)[:2] == (1, 1)


@pytest.fixture(scope="module")
def data(digits: Classifier) -> TrainingData:
    return load_training_data("digits-train", digits)


@pytest.fixture(scope="module")
def measured(digits: Classifier, data: TrainingData) -> TableSet:
    return measure(digits, data, 300, probe=Probe(steps=2, size=2.0), command="test")


def test_statistics_of_known_coefficients(digits: Classifier, data: TrainingData) -> None:
    generator = torch.Generator().manual_seed(0)
    size = torch.arange(1.0, 65.0)
    normal = torch.randn(20_000, 64, generator=generator)
    found = Coefficients(size * normal, size * normal.flip(0), size * normal).statistics()
    # relative errors of the 64 columns: 0.5% of a deviation, 0.7% of a 95% quantile, 0.5% of a mean size
    assert found["S"] == pytest.approx(size.tolist(), rel=0.03)
    assert found["P_std"] == pytest.approx(size.tolist(), rel=0.03)
    assert found["P_p95"] == pytest.approx((1.96 * size).tolist(), rel=0.05)
    assert found["G"] == pytest.approx((0.798 * size).tolist(), rel=0.03)
    (luma,) = collect(digits, data, 20, Probe(), 0)
    clean = data.take(data.train[:20]).float() - 128
    assert torch.allclose(luma.clean, coefficients(clean)[:, 0, 0, 0], atol=1e-3)
    images = (clean + 128) / 255
    images.requires_grad_(True)
    assert data.labels is not None
    loss = cross_entropy(digits.logits(images), data.labels[data.train[:20]], reduction="sum")
    (up,) = torch.autograd.grad(loss, images)
    assert torch.allclose(luma.gradient, coefficients(up / 255)[:, 0, 0, 0], atol=1e-6)


def test_the_probe_stays_in_its_ball_and_raises_the_loss(digits: Classifier, data: TrainingData) -> None:
    images = data.take(data.train[:100]).float() / 255
    labels = digits(images)
    found = Probe(epsilon=16, steps=4, size=8).perturb(digits, images, labels, torch.Generator().manual_seed(0))
    assert ((found - images).abs() * 255).max() <= 16.001
    assert found.min() >= 0
    assert found.max() <= 1
    before, after = (cross_entropy(digits.logits(x), labels) for x in (images, found))
    assert after > before + 0.05


def test_measured_tables_match_the_standard_rates(measured: TableSet, digits: Classifier, data: TrainingData) -> None:
    """At every level as many coefficients are left as by the standard table, to what whole steps allow."""
    planes = collect(digits, data, 300, Probe(steps=2, size=2.0), 0)
    for kind in KINDS:
        levels = [measured.steps(kind, quality) for quality in QUALITIES]
        for quality, steps in zip(QUALITIES, levels, strict=True):
            wanted = rate(planes, quantisation.standard(quality))
            assert steps.rate == pytest.approx(wanted, abs=0.02)
            assert rate(planes, steps) == steps.rate
        assert [s.kappa for s in levels] == sorted(s.kappa or 0 for s in levels)
    statistics = measured.about["statistics"]["luma"]
    shape = shape_of("nn", statistics["S"], statistics["P_p95"])
    steps = measured.steps("nn", 60)
    assert steps.luma == multiplied(shape, steps.kappa or 0, 16)
    images = data.take(data.train[:300]).float() / 255  # what was counted is what the codec keeps
    codec = Codec(steps.luma, steps.chroma)
    assert codec.nonzeros(images).mean().item() == pytest.approx(steps.rate, abs=0.01)


def test_a_file_of_tables_is_read_back_and_others_are_refused(measured: TableSet, tmp_path: Path) -> None:
    path = tmp_path / "tables.json"
    write_tables(path, measured)
    found = read_tables(path)
    assert found.tables == {k: dict(v) for k, v in measured.tables.items()}
    assert (found.sha256, found.image) == (measured.sha256, (1, 8, 8))
    assert found.about["attack"]["name"] == "PGD"
    assert found.about["classifier"]["sha256"] == load_classifier("digits").identity()
    write_tables(tmp_path / "again.json", found)
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    raw = json.loads(path.read_text())
    raw["tables"]["nn"]["75"]["luma"][3] += 1
    (tmp_path / "changed.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="was changed after it was written"):
        read_tables(tmp_path / "changed.json")
    for text, message in [("{}", "holds no JPEG tables of format 1"), ("[", "cannot read JPEG tables")]:
        (tmp_path / "foreign.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_tables(tmp_path / "foreign.json")
    raw["tables"]["nn"]["75"]["luma"] = [0] * 64
    (tmp_path / "impossible.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="expected 64 whole numbers from 1 to 255"):
        read_tables(tmp_path / "impossible.json")


def test_the_shipped_tables_are_those_of_their_statistics() -> None:
    found = quantisation.find_tables(None, (1, 8, 8), "test")
    statistics, gamma = found.about["statistics"]["luma"], found.about["gamma"]
    for kind in KINDS:
        shape = shape_of(kind, statistics["S"], statistics["P_p95"], gamma)
        for quality in QUALITIES:
            steps = found.steps(kind, quality)
            assert steps.luma == multiplied(shape, steps.kappa or 0, 16)
    assert found.about["classifier"]["sha256"] == load_classifier("digits").identity()
    with pytest.raises(UserError, match="no shipped tables for 3x8x8 images"):
        quantisation.find_tables(None, (3, 8, 8), "test")


def test_measuring_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.json"
    main(f"--model digits --data digits-train --images 40 --steps 1 --out {out}".split())
    assert f"wrote {out}" in capsys.readouterr().out
    assert read_tables(out).about["command"].startswith("python -m training.coefficients --model digits")
    with pytest.raises(SystemExit, match="2"):
        main(f"--model digits --data digits --out {out}".split())
    assert "expected --data digits-train" in capsys.readouterr().err


def fixed(label: int, confidence: float = 5.0) -> Classifier:
    """A classifier that always gives this of four labels."""

    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            scores = confidence * torch.eye(4)[label]
            return scores.expand(len(images), 4)

    return Classifier(f"always {label}", ClassifierSpec(Constant(), square_input((1, 8, 8)), None, 4))


def votes(*members: tuple[int, float]) -> set[int]:
    """Labels that an ensemble of constant classifiers gives, in several orders of them."""
    made = [Member(jpeg(75), fixed(*m)) for m in members]
    orders = list(permutations(made))[:: 1 + len(made)]
    defences = [Defence("jpeg-ensemble", order, frozen=False) for order in orders]
    image, key = torch.rand(1, 1, 8, 8), stream_key(0, "x", "test")
    return {int(defence(image, [key])) for defence in defences}


def test_the_vote_is_unanimous_plural_or_a_tie_in_any_order() -> None:
    assert votes((2, 5.0), (2, 1.0), (2, 3.0)) == {2}
    assert votes((1, 1.0), (1, 1.0), (0, 9.0), (3, 9.0), (2, 9.0)) == {1}
    assert votes((3, 4.0), (3, 1.0), (0, 3.0), (0, 3.0), (1, 9.0)) == {0}  # the larger summed softmax


def test_ensembles_of_the_original_classifier(digits: Classifier, measured: TableSet, tmp_path: Path) -> None:
    images = torch.rand((3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    keys = [stream_key(0, str(i), "test") for i in range(3)]
    whole = build_defence("jpeg-ensemble", digits)
    assert (whole.frozen, whole.passes, whole.about["levels"]) == (True, 5, [90, 75, 60, 45, 30])
    assert not whole.differentiable
    some = build_defence("jpeg-ensemble:levels=45,90:combine=logits", digits)
    assert torch.equal(some.passes_of(images, keys), whole.passes_of(images, keys)[:, [3, 0]])
    assert some.combine == "logits"
    plus = build_defence("jpeg-ensemble:levels=45+90:combine=logits", digits)  # of a list with commas
    assert torch.equal(plus.passes_of(images, keys), some.passes_of(images, keys))
    path = tmp_path / "t.json"
    write_tables(path, measured)
    one = build_defence(f"jpeg-nn:tables={path}:level=30", digits)
    same = build_defence(f"jpeg:tables={path}:quality=30", digits)
    assert torch.equal(one.purify(images), same.purify(images))
    assert one.describe()["members"][0]["purifier"]["luma"] == list(measured.steps("nn", 30).luma)
    soft = differentiable(whole)
    assert soft.differentiable
    images.requires_grad_(True)
    (up,) = torch.autograd.grad(soft.scores(images, keys)[:, 0].sum(), images)
    assert up.abs().sum() > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jpeg:quality=0", "expected a whole number from 1 to 100"),
        ("jpeg:quality=7.5", "expected a whole number from 1 to 100"),
        ("jpeg:table=nn", "expected standard or flat, or tables=FILE"),
        ("jpeg:subsampling=422", r"expected 444 \(none\) or 420"),
        ("jpeg-nn:level=80", "level 80: this file of JPEG tables has 90, 75"),
        ("jpeg-nn:table=best", "table=best: this file of JPEG tables has nn, std, flat"),
        ("jpeg-nn:tables=none.json", "cannot read JPEG tables none.json"),
        ("jpeg-ensemble:levels=80,75", "there are 90, 75, 60, 45, 30"),
        ("jpeg-ensemble:levels=x", "expected nominal qualities such as 90.75.60"),
        ("jpeg-ensemble:folder=nowhere", "nowhere holds no members"),
        ("jpeg-ensemble:folder=x:tables=y", "leave tables= and table= out"),
    ],
)
def test_mistakes_get_one_line(text: str, message: str, digits: Classifier) -> None:
    with pytest.raises(UserError, match=message):
        build_defence(text, digits)


def test_a_codec_that_ran_without_gradients_has_them_afterwards() -> None:
    """The transform cached by the first call works in later ones."""
    _dct2.cache_clear()
    images = torch.rand((1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        jpeg()(images)
    images.requires_grad_(True)
    (slope,) = torch.autograd.grad(jpeg().twin()(images).square().sum(), images)
    assert slope.abs().sum() > 0


def test_other_channels_are_refused() -> None:
    with pytest.raises(UserError, match=r"images of 4 channels; expected 1 \(grey\) or 3"):
        jpeg()(torch.rand(1, 4, 8, 8))


def test_four_of_five_images_are_coded() -> None:
    clean = torch.rand((2000, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    draw = Draw(clean, torch.zeros(2000), None, None, torch.Generator().manual_seed(1))
    shown, _ = code_images(draw, make_codecs("mixed"), 0.8).inputs
    same = torch.stack(
        [(jpeg(q)(clean) == shown).flatten(1).all(1) for q in QUALITIES] + [(clean == shown).flatten(1).all(1)]
    )
    shares = same.float().mean(1).tolist()  # sampling error 0.009
    assert shares[-1] == pytest.approx(0.2, abs=0.04)
    assert shares[:-1] == pytest.approx([0.16] * 5, abs=0.04)
    assert make_objective("jpeg-noise", {"level": 60}).noise is False
    shipped = "/".join((*Path(quantisation.__file__).parts[:-1], "data", "digits-jpeg.json"))
    assert len(make_codecs("mixed", shipped, "std")) == 5
    for settings, message in [
        ({"level": "best"}, "expected a nominal quality"),
        ({"share": 0}, "above 0, at most 1"),
        ({"share": "all"}, "share=all: expected a number, such as 0.8"),
        ({"level": 75.0}, "level=75.0: expected a nominal quality"),
        ({"level": 7.5}, "level=7.5: expected a nominal quality"),
        ({"tables": 5}, "tables=5: expected a file"),
        ({"tables": shipped, "level": "mixed", "table": "best"}, "this file of JPEG tables has nn, std, flat"),
        ({"tables": shipped, "table": "standard"}, "this file of JPEG tables has nn, std, flat"),
    ]:
        with pytest.raises(UserError, match=message):
            make_objective("jpeg-noise", settings)


@pytest.mark.slow
def test_training_on_coded_images_and_its_ensemble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning improves on the initial weights at its level, and the card names the codec."""
    monkeypatch.chdir(tmp_path)
    tables = "/".join((*Path(quantisation.__file__).parts[:-1], "data", "digits-jpeg.json"))
    line = "train --train-classifier digits --data digits-train --quiet --validations 2"
    run(*line.split(), *"--sigma 0 --epochs 8 --rate 3e-3 --out start".split())
    start = ["--objective", "jpeg-noise", "--weights", "start/classifier.safetensors"]
    sgd = "--optimizer sgd --rate 1e-2 --weight-decay 5e-4".split()
    for level, epochs in (("30", "6"), ("90", "0.2")):
        out = f"members/q{level}"
        options = ["--set", f"level={level}", "--set", f"tables={tables}", "--epochs", epochs, "--out", out]
        run(*line.split(), *start, *sgd, *options)
    digits = load_classifier("digits", weights="start/classifier.safetensors")
    with safe_open("members/q30/classifier.safetensors", framework="pt") as file:
        card: dict[str, Any] = json.loads(file.metadata()["card"])
    assert card["started_from"]["sha256"] == digits.identity()
    after, before = card["validation"], card["started_from"]["validation"]
    assert after["score"] < before["score"] - 0.02
    assert after["accuracy@q30"] > before["accuracy@q30"] - 0.02  # of 129 images
    found = quantisation.read_tables(tables)
    assert card["codecs"][0]["luma"] == list(found.steps("nn", 30).luma)
    assert card["codecs"][0]["tables"] == found.sha256

    defence = build_defence("jpeg-ensemble:folder=members", digits)
    assert (defence.frozen, defence.about["levels"], defence.passes) == (False, [90, 30], 2)
    alone = load_classifier("digits", weights="members/q30/classifier.safetensors")
    images = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    keys = [stream_key(0, str(i), "test") for i in range(4)]
    expected = alone.logits(from_record(card["codecs"][0])(images))
    assert torch.allclose(defence.passes_of(images, keys)[:, 1], expected, atol=1e-5)
    assert not torch.allclose(digits.logits(defence.purify(images, 1)), expected, atol=1e-3)

    (tmp_path / "members" / "other.safetensors").write_bytes(Path("start/classifier.safetensors").read_bytes())
    with pytest.raises(UserError, match="is no member of a JPEG ensemble"):
        build_defence("jpeg-ensemble:folder=members", digits)
    twice = (tmp_path / "members" / "q30" / "classifier.safetensors").read_bytes()
    (tmp_path / "members" / "other.safetensors").write_bytes(twice)
    with pytest.raises(UserError, match="members has another member of level 30"):
        build_defence("jpeg-ensemble:folder=members", digits)
    (tmp_path / "members" / "other.safetensors").write_bytes(twice[:-4] + b"\0\0\0\0")
    with pytest.raises(UserError, match="does not match its tensors"):
        build_defence("jpeg-ensemble:folder=members", digits)


def test_a_denoiser_is_not_trained_on_coded_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "train --denoiser unet --objective jpeg-noise --data digits-train --quiet --out"
    run(*line.split(), str(tmp_path / "d"), code=2)
    assert "write --train-classifier MODEL" in capsys.readouterr().err
