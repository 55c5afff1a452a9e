"""Training: learning, exact resumption, frozen classifiers, errors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import small_networks
import torch
from torch import Tensor, nn

from certify import load_classifier
from certify.errors import RunFault, Stopped, UserError
from certify.models.checkpoints import read_state_dict
from certify.models.classifier import Classifier, ClassifierSpec, InputSpec
from certify.models.identity import state_digest
from denoisers.unet import PooledUNet, UNet
from denoisers.weights import read_denoiser
from training import loop
from training.class_head import with_class_head
from training.data import Levels, augment, load_training_data
from training.denoiser import WEIGHTS, train_denoiser
from training.frozen_classifiers import FrozenClassifiers
from training.held_out import denoiser_scores
from training.loop import TrainerConfig, TrainingResult, draw_order, make_accelerator
from training.losses import OBJECTIVES, Draw, make_objective
from training.recipe import Recipe

SMALL = {"channels": [8, 16], "blocks": 1}


@pytest.fixture(scope="module")
def data(digits: Classifier) -> Any:
    return load_training_data("digits-train", digits, held_out=400)


def run(
    data: Any, out: Path, recipe: Recipe, *, frozen: FrozenClassifiers | None = None, **settings: Any
) -> TrainingResult:
    init = settings.pop("init", None)
    config = TrainerConfig(make_accelerator("cpu"), **settings)
    return train_denoiser("unet", data, recipe, out, config, classifiers=frozen, options=SMALL, init=init)


@pytest.mark.slow
def test_mse_training_beats_the_identity_and_the_linear_estimate(data: Any, tmp_path: Path) -> None:
    """Held-out images: error below that of the noisy image (sigma^2) and of the untrained network (Wiener's)."""
    sigma = 0.25
    untrained = run(data, tmp_path / "a", Recipe(epochs=0.01), validations=1)
    trained = run(data, tmp_path / "b", Recipe(epochs=12, rate=5e-3, sigmas=(sigma,)), validations=3)
    noisy_psnr = -20 * torch.tensor(sigma).log10().item()
    assert trained.best["psnr@0.25"] > max(noisy_psnr, untrained.best["psnr@0.25"]) + 2
    denoiser = read_denoiser(tmp_path / "b" / WEIGHTS)
    again = denoiser_scores(denoiser, data, (sigma,), make_objective("mse"), [])
    assert again["psnr@0.25"] == pytest.approx(trained.best["psnr@0.25"], abs=2e-3)


@pytest.mark.slow
def test_stability_training_raises_accuracy_and_leaves_the_classifier_unchanged(
    data: Any, digits: Classifier, tmp_path: Path
) -> None:
    before = state_digest(digits.net)
    recipe = Recipe("mse+stability", (0.5,), epochs=24, rate=5e-3)
    frozen = FrozenClassifiers([digits])
    outcome = run(data, tmp_path, recipe, frozen=frozen, validations=4)
    none = denoiser_scores(Identity(), data, (0.5,), make_objective("stability"), [digits])
    # 400 images: three standard errors of a difference of accuracies are at most 3 * sqrt(2 * 0.25 / 400) = 0.106
    assert outcome.best["accuracy@0.5"] > none["accuracy@0.5"] + 0.106
    assert state_digest(digits.net) == before
    assert all(p.grad is None for p in digits.parameters())
    assert frozen.unchanged()
    card = read_denoiser(tmp_path / WEIGHTS).card
    assert (card.objective, card.access, card.classifiers[0]["sha256"]) == ("mse+stability", "white-box", before)
    assert card.training["precision"] == "float32"


@pytest.mark.slow
def test_zeroth_order_training_improves_on_squared_error(data: Any, digits: Classifier, tmp_path: Path) -> None:
    """More images keep the label of the clean image, and no gradient of the classifier is used."""

    class NoGradients(Classifier):
        def logits(self, images: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return super().logits(images)

    target = NoGradients("digits", ClassifierSpec(digits.net, digits.input, digits.class_names, 10))
    run(data, tmp_path / "mse", Recipe(sigmas=(0.5,), epochs=12, rate=5e-3), validations=1)
    recipe = Recipe("zeroth-order", (0.5,), epochs=10, rate=2e-3, queries=40)
    start = str(tmp_path / "mse" / WEIGHTS)
    after = run(data, tmp_path / "zo", recipe, frozen=FrozenClassifiers([target]), init=start, validations=1)
    before = denoiser_scores(read_denoiser(start), data, (0.5,), make_objective("stability"), [digits])
    # 400 images, of which some 60 change sides: one standard error of the difference is sqrt(60) / 400 = 0.02
    assert after.best["agreement@0.5"] > before["agreement@0.5"] + 0.04
    assert read_denoiser(tmp_path / "zo" / WEIGHTS).card.access == "queries"


def test_a_class_head_uses_the_bottleneck_and_is_discarded(data: Any, tmp_path: Path) -> None:
    """Its gradient reaches the encoder only, and the saved file is a plain denoiser."""
    torch.manual_seed(0)
    net = UNet((8, 16), 1, 1)
    features: list[Tensor] = []
    headed = with_class_head(net, data, 0)
    net.down[-1][0].register_forward_hook(lambda module, given, output: features.append(output))
    noisy = torch.rand(6, 1, 8, 8)
    _, scores = headed(noisy, torch.full((6,), 0.5))
    assert torch.equal(scores, headed.head(features[0].mean((2, 3))))
    scores.sum().backward()
    assert net.head.weight.grad.abs().sum() > 0
    assert net.tail.weight.grad is None  # the head comes before the decoder
    run(data, tmp_path, Recipe("mse+classes", epochs=0.2), validations=1)
    found = read_denoiser(tmp_path / WEIGHTS)
    assert not any("head" in key and "net.head" not in key for key in found.state_dict())
    assert found.card.access == "none"
    heavy = Recipe("mse+classes", epochs=0.02, settings={"weight": 1000.0})
    chosen_by = run(data, tmp_path / "heavy", heavy, validations=1).best["score"]
    assert 1000 * 2 < chosen_by < 1000 * 4  # untrained, of ten classes: log 10 = 2.3
    with pytest.raises(UserError, match=r"needs a U-Net with a bottleneck .*, not DnCNN"):
        train_denoiser("dncnn", data, Recipe("mse+classes"), tmp_path, TrainerConfig(make_accelerator("cpu")))


@pytest.mark.slow
def test_only_the_named_parts_are_trained(data: Any, tmp_path: Path) -> None:
    """All else is unchanged, batch statistics included; parts that the initial weights lack are new, and listed."""
    how = TrainerConfig(make_accelerator("cpu"), validations=1)
    small = {"channels": [8, 16], "light": [4, 8]}
    first = Recipe("mse+classes", epochs=0.2)
    train_denoiser("pooled-unet", data, first, tmp_path / "a", how, options=small)
    told = {**small, "classes": 10}
    parts = ("read", "tell", "tail")
    then = Recipe("mse+classes", epochs=0.2, only=parts)
    start = str(tmp_path / "a" / WEIGHTS)
    with pytest.warns(UserWarning, match="lacks read, tell; initialised from seed 0"):
        train_denoiser("pooled-unet", data, then, tmp_path / "b", how, options=told, init=start)
    before, found = read_denoiser(start).state_dict(), read_denoiser(tmp_path / "b" / WEIGHTS)
    after = found.state_dict()
    kept = [key for key in before if not key.removeprefix("net.").startswith("tail")]
    assert len(kept) > 20
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert not torch.equal(before["net.tail.weight"], after["net.tail.weight"])
    assert after["net.tell.0.weight"].abs().sum() > 0
    assert found.card.started_from is not None
    assert found.card.started_from["new"] == [
        "read.bias",
        "read.weight",
        *sorted(f"tell.{i}.{name}" for i in range(2) for name in ("bias", "weight")),
    ]
    with pytest.raises(UserError, match="only way: the network has no such part; expected some of embed, "):
        train_denoiser("pooled-unet", data, Recipe(only=("way",)), tmp_path / "c", how, options=small)


def test_a_networks_own_class_head_modulates_its_decoder(data: Any) -> None:
    """Training uses the network's own head, whose probabilities enter the decoder."""
    torch.manual_seed(0)
    net = small_networks.trained(PooledUNet((8, 16), (4, 8), 10, 1)).eval()
    noisy, sigma = torch.rand(5, 1, 8, 8), torch.full((5,), 0.5)
    headed = with_class_head(net, data, 0).eval()
    cleaned, _ = headed(noisy, sigma)
    assert torch.equal(cleaned, net(noisy, sigma))
    assert not any("head" in name and "net.head" not in name for name, _ in headed.named_parameters())
    net.read.bias.data[3] += 100  # every image is classified as 3
    assert (headed(noisy, sigma)[1].argmax(1) == 3).all()
    assert not torch.allclose(net(noisy, sigma), cleaned)
    with pytest.raises(UserError, match="the class head has 3 classes; expected at least the 10 of the data"):
        with_class_head(PooledUNet((8, 16), (4, 8), 3, 1), data, 0)


class Identity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, noisy: Tensor, sigma: Tensor | None = None) -> Tensor:
        return noisy


class Forbidden(Classifier):
    """A target that must not be queried."""

    def logits(self, images: Tensor) -> Tensor:
        raise AssertionError("the target was used")

    forward = logits


def other_digits(seed: int) -> Classifier:
    """The digits architecture with other weights: another classifier of the same task."""
    from certify.models.builtin import digits_net

    torch.manual_seed(seed)
    own = load_classifier("digits")
    return Classifier(f"other{seed}", ClassifierSpec(digits_net(), own.input, own.class_names, 10))


def test_query_access_uses_surrogates_in_turn_and_never_the_target(
    data: Any, digits: Classifier, tmp_path: Path
) -> None:
    target = Forbidden("digits", ClassifierSpec(digits.net, digits.input, digits.class_names, 10), 10)
    surrogates = [other_digits(1), other_digits(2), other_digits(3)]
    frozen = FrozenClassifiers(surrogates, target, surrogates=True)
    assert [frozen.at(i).name for i in range(5)] == ["other1", "other2", "other3", "other1", "other2"]  # type: ignore[union-attr]
    run(data, tmp_path, Recipe("stability", epochs=0.2), frozen=frozen, validations=1)
    assert all(p.grad is None for p in target.parameters())
    card = read_denoiser(tmp_path / WEIGHTS).card
    assert card.access == "surrogates"
    assert digits.identity() not in [c["sha256"] for c in card.classifiers]
    with pytest.raises(UserError, match="surrogate 'digits' is the target itself"):
        FrozenClassifiers([*surrogates, digits], target, surrogates=True)


def test_gradients_reach_the_denoiser_only(data: Any, digits: Classifier) -> None:
    """Every objective: finite, a gradient for the output, none for the classifier."""
    clean = data.take(data.train[:8]).float() / 255
    for name in OBJECTIVES:
        objective = make_objective(name)
        generator = torch.Generator().manual_seed(0)
        draw = Draw(clean, torch.full((8,), 0.25), data.labels[data.train[:8]], digits, generator, epoch=9.0)
        prepared = objective.prepare(draw)
        output = (prepared.target + 0.1).detach().requires_grad_(True)
        scores = output.flatten(1)[:, :10]  # of the network's own, where an objective wants some
        loss = objective.loss(loop.make_batch(draw, prepared, (output, scores), Recipe(queries=4)))
        loss.backward()
        assert loss.isfinite()
        assert output.grad is not None
        assert output.grad.abs().sum() > 0
        assert all(p.grad is None for p in digits.parameters())


@pytest.mark.slow
def test_a_killed_training_ends_with_the_same_weights(data: Any, digits: Classifier, tmp_path: Path) -> None:
    recipe = Recipe("mse+stability", (0.12, 0.5), epochs=0.7, optimizer="adam-then-sgd")
    frozen = FrozenClassifiers([digits])
    whole = run(data, tmp_path / "whole", recipe, validations=4, frozen=frozen)
    part = run(data, tmp_path / "parts", recipe, validations=4, checkpoint_seconds=0.0, stop_after=5, frozen=frozen)
    assert not part.finished
    resumed = run(data, tmp_path / "parts", recipe, validations=4, checkpoint_seconds=0.0, frozen=frozen)
    assert resumed.finished
    assert resumed.steps == whole.steps
    a, b = (read_denoiser(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert a.card.sha256 == b.card.sha256
    assert resumed.best == whole.best
    lines = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(lines)
    with pytest.raises(
        UserError, match=r"holds another training \(objective \"mse\+stability\" there, \"mse\" here; sigmas"
    ):
        run(data, tmp_path / "parts", Recipe("mse", epochs=0.7), frozen=frozen)


@pytest.mark.slow
def test_a_training_killed_between_two_renames_resumes(data: Any, tmp_path: Path) -> None:
    recipe = Recipe(epochs=0.5)
    run(data, tmp_path, recipe, validations=1, checkpoint_seconds=0.0, stop_after=3)
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")  # killed between the two renames
    assert run(data, tmp_path, recipe, validations=1).steps == recipe.steps(len(data.train))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_the_step_in_progress_first(data: Any, tmp_path: Path, number: signal.Signals) -> None:
    """Also before the first validation; the message says so, and the resumed training is the uninterrupted one."""
    recipe = Recipe(epochs=0.5)
    steps = iter(range(100))

    def interrupt(images: int, loss: float) -> None:
        if next(steps) == 3:  # the first call is that of the start
            signal.raise_signal(number)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command does
    try:
        with pytest.raises(Stopped, match=r"stopped after step 3 of 7; the checkpoint of step 3 is in .*; the same"):
            run(data, tmp_path / "a", recipe, validations=1, progress=interrupt)
    finally:
        assert signal.signal(signal.SIGTERM, before) is signal.default_int_handler
    told: list[str] = []
    resumed = run(data, tmp_path / "a", recipe, validations=1, say=told.append)
    assert told[0] == "resuming   from step 3 of 7"
    assert resumed.best == run(data, tmp_path / "b", recipe, validations=1).best


def test_a_second_interrupt_stops_at_once(data: Any, tmp_path: Path) -> None:
    def interrupt(images: int, loss: float) -> None:
        if images:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped, match="stopped after step 1 of 7; no checkpoint yet"):
        run(data, tmp_path, Recipe(epochs=0.5), validations=1, progress=interrupt)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(epochs=1)
    run(data, tmp_path, recipe, validations=14, checkpoint_seconds=0.0, stop_after=5)
    good = read_denoiser(tmp_path / WEIGHTS).card.sha256
    plain = loop.draw_batch
    with monkeypatch.context() as patched:
        patched.setattr(
            loop, "draw_batch", lambda *a: dataclasses.replace(plain(*a), clean=plain(*a).clean * float("nan"))
        )
        with pytest.raises(RunFault, match=r"the loss is nan after step 5 of 14: stopped; the checkpoint of step 5"):
            run(data, tmp_path, recipe, validations=14, checkpoint_seconds=0.0)
    assert read_denoiser(tmp_path / WEIGHTS).card.sha256 == good
    assert run(data, tmp_path, recipe, validations=14).finished  # resumes from there


@pytest.mark.parametrize(
    "largest",
    [
        pytest.param(100, id="metrics", marks=pytest.mark.slow),
        pytest.param(10_000, id="weights", marks=pytest.mark.slow),
        pytest.param(80_000, id="checkpoint"),
    ],
)
def test_a_full_disk_keeps_the_checkpoint(data: Any, tmp_path: Path, largest: int) -> None:
    recipe = Recipe(epochs=1)
    run(data, tmp_path, recipe, validations=1, checkpoint_seconds=0.0, stop_after=5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        with pytest.raises(RunFault, match=r"could not write to .*; the checkpoint of step 5 is in .*; the same"):
            run(data, tmp_path, recipe, validations=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run(data, tmp_path, recipe, validations=1).steps == 14


def test_weights_that_are_not_finite_never_become_a_checkpoint(data: Any, tmp_path: Path) -> None:
    recipe = Recipe(epochs=4, rate=1e38, optimizer="sgd", schedule="constant")
    with pytest.raises(RunFault, match=r"weights are not finite|the loss is (nan|inf)|the held-out score is (nan|inf)"):
        run(data, tmp_path, recipe, validations=56, checkpoint_seconds=0.0)
    if (tmp_path / "checkpoint").exists():
        assert all(v.isfinite().all() for v in read_state_dict(tmp_path / "checkpoint" / "model.safetensors").values())


def test_the_images_of_a_step_do_not_depend_on_the_number_of_processes(data: Any) -> None:
    recipe = Recipe(batch_size=50)
    whole = draw_order(data.train, recipe, 30, 0, 1)[0]
    parts = [draw_order(data.train, recipe, 30, rank, 2)[0] for rank in range(2)]
    assert sorted(whole.tolist()) == sorted(torch.cat(parts).tolist())
    epoch = torch.cat([draw_order(data.train, recipe, s, 0, 1)[0] for s in range(len(data.train) // 50 + 1)])
    assert set(epoch[: len(data.train)].tolist()) == set(data.train.tolist())  # each image once an epoch


def test_held_out_images_are_a_random_part_of_all_classes(digits: Classifier) -> None:
    """So are the first of them, which are used if there are many; independent of the seed."""
    data = load_training_data("digits-train", digits, held_out=600)
    assert data.labels is not None
    assert len(data.labels[data.held_out[:100]].unique()) == 10
    fewer = load_training_data("digits-train", digits, held_out=300)
    assert set(fewer.held_out.tolist()) < set(data.held_out.tolist())


@pytest.mark.slow
def test_another_image_size_is_not_resumed(data: Any, digits: Classifier, tmp_path: Path) -> None:
    run(data, tmp_path, Recipe(epochs=0.5), validations=1, checkpoint_seconds=0.0, stop_after=2)
    with pytest.raises(UserError, match="holds another training"):
        run(dataclasses.replace(data, image=(1, 8, 9)), tmp_path, Recipe(epochs=0.5), validations=1)
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"checkpoint is damaged .* remove it to start again"):
        run(data, tmp_path, Recipe(epochs=0.5), validations=1)


@pytest.mark.slow
def test_one_accelerator_for_two_trainings(data: Any, tmp_path: Path) -> None:
    config = TrainerConfig(make_accelerator("cpu"), validations=1)
    for name, seed in (("a", 0), ("b", 1)):
        train_denoiser("unet", data, Recipe(epochs=0.2, seed=seed), tmp_path / name, config, options=SMALL)
        kept = read_state_dict(tmp_path / name / "checkpoint" / "model.safetensors")
        assert all(torch.equal(kept[k], v) for k, v in read_state_dict(tmp_path / name / WEIGHTS).items())


def test_every_training_has_its_own_precision() -> None:
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        with make_accelerator("cpu", precision).autocast():
            assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_folding_that_changes_a_classifier_is_skipped() -> None:
    """One convolution used twice with two batch norms: folding both into it gives another function."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.bn1, self.bn2, self.linear = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.bn2(self.conv(self.bn1(self.conv(x)))).mean((2, 3)))

    classifier = small_networks.classifier(small_networks.trained(Twice()))
    (working,) = FrozenClassifiers([classifier]).working
    images = torch.rand(8, 3, 16, 16)
    assert torch.allclose(working.logits(images), classifier.logits(images), atol=1e-4)


def test_classifiers_of_one_python_file_have_different_identities() -> None:
    """The hash of a Python file does not determine the weights it builds."""

    def build(seed: int) -> Classifier:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        return Classifier("m:f", ClassifierSpec(net, InputSpec((3, 2, 2)), num_classes=3, code="c" * 64))

    assert build(0).identity() == build(0).identity() != build(1).identity()


def test_held_out_images_are_never_trained_on(data: Any) -> None:
    assert not set(data.train.tolist()) & set(data.held_out.tolist())
    assert len(data.train) + len(data.held_out) == 1297


def test_a_part_of_the_data_is_spread_over_it(digits: Classifier) -> None:
    part = load_training_data("digits-train", digits, max_images=100)
    assert len(part.train) + len(part.held_out) == 100
    everything = load_training_data("digits-train", digits)
    assert torch.equal(part.take(torch.arange(100)), everything.take(torch.arange(100) * 1297 // 100))
    assert part.labels is not None
    assert len(part.labels.unique()) == 10


def test_levels() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = Levels((0.1, 1.0), continuous=True).draw(20_000, generator)
    assert 0.1 <= drawn.min() < drawn.max() <= 1.0
    # log-uniform: the logarithm's mean is that of its ends, with standard error (log 10 / sqrt(12)) / sqrt(20,000)
    assert drawn.log().mean().item() == pytest.approx(torch.tensor([0.1, 1.0]).log().mean().item(), abs=5 * 0.0047)
    assert set(Levels((0.25, 0.5)).draw(100, generator).tolist()) == {0.25, 0.5}


def test_augmented_images_are_windows_of_the_padded_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(3 * 16 * 16, dtype=torch.float32).view(1, 3, 16, 16)
    padded = nn.functional.pad(image, (2, 2, 2, 2), mode="reflect")
    windows = {
        tuple(v.flatten().tolist())
        for dy in range(5)
        for dx in range(5)
        for w in [padded[..., dy : dy + 16, dx : dx + 16]]
        for v in (w, w.flip(3))
    }
    out = augment(image.expand(400, -1, -1, -1), generator)
    seen = {tuple(v.flatten().tolist()) for v in out}
    assert seen <= windows
    assert len(seen) == 50  # all of them: each is missed with probability (1 - 1/50)^400 = 3e-4


def test_rates_and_phases_are_functions_of_the_step() -> None:
    cycle = Recipe(rate=1.0)
    rates = [cycle.rate_at(s, 1000) for s in range(1000)]
    assert max(rates) == pytest.approx(1.0, abs=0.02)
    assert rates.index(max(rates)) in range(95, 105)
    assert rates[-1] < 0.02
    published = Recipe(rate=1e-3, schedule="step", epochs=90)
    assert [published.rate_at(s, 90) for s in (0, 29, 30, 59, 60, 89)] == pytest.approx(
        [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5]
    )
    both = Recipe("mse+stability", first_share=0.25)
    assert [both.objectives.index(both.phase(s, 100)[0]) for s in (0, 24, 25, 99)] == [0, 0, 1, 1]
    switch = Recipe(optimizer="adam-then-sgd", sgd_rate=0.5, schedule="constant")
    assert [switch.uses_sgd(s, 90) for s in (49, 50)] == [False, True]
    assert [switch.rate_at(s, 90) for s in (49, 50)] == [1e-3, 0.5]


def test_a_field_at_its_default_is_not_in_the_digest() -> None:
    """A new field leaves the digests of earlier trainings unchanged."""
    recipe = Recipe("stability", (0.5,), rate=1e-4)
    text = json.dumps([{"objective": "stability", "sigmas": [0.5], "rate": 1e-4}, "data"], sort_keys=True)
    assert recipe.digest("data") == hashlib.sha256(text.encode()).hexdigest()

    @dataclasses.dataclass(frozen=True)
    class Later(Recipe):
        novelty: float = 0.0

    fields = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    assert Later(**fields).digest("data") == recipe.digest("data")
    assert Later(**fields, novelty=1.0).digest("data") != recipe.digest("data")
    assert dataclasses.replace(recipe, seed=1).digest("data") != recipe.digest("data") != recipe.digest("other")


def test_an_objective_without_its_classifier_is_an_error(data: Any, tmp_path: Path) -> None:
    for objective in ("stability", "classification", "zeroth-order"):
        with pytest.raises(UserError, match=f"objective {objective} needs a frozen classifier"):
            run(data, tmp_path, Recipe(objective))
    with pytest.raises(UserError, match="unknown objective 'stabilty'; nearest: stability"):
        Recipe("stabilty")
