"""AToP-style purification: masks, transforms, losses and the networks their gradients reach."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from certify.errors import UserError
from certify.models.checkpoints import read_state_dict
from certify.models.classifier import Classifier, ClassifierSpec
from certify.models.identity import state_digest
from certify.smoothing.rng import block_generator, stream_key
from denoisers.defences import build_defence
from denoisers.masked import GREY, NOISE, MaskedUNet, RandomTransformPurifier, block_masks, complete, random_transform
from denoisers.unet import UNet
from denoisers.weights import read_card
from training import loop
from training.atop import Completer, Discriminator
from training.data import load_training_data
from training.denoiser import train_denoiser
from training.losses import Batch, Draw, Prepared, make_objective
from training.recipe import Recipe

SMALL: dict[str, Any] = {"channels": (8, 16), "blocks": 1}
IMAGES = torch.rand((6, 3, 32, 32), generator=torch.Generator().manual_seed(0))
TRAIN = "train --denoiser masked-unet --option channels=[8,16] --option blocks=1 --data digits-train --quiet".split()
SHORT = "--epochs 0.5 --validations 1".split()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_net(channels: int = 1) -> nn.Module:
    """A network with a nonzero tail, so that its output depends on its features."""
    torch.manual_seed(0)
    net = MaskedUNet(**SMALL, image_channels=channels)
    nn.init.normal_(net.unet.tail.weight, std=0.1)
    return net


@pytest.fixture(scope="module")
def data(digits: Classifier) -> Any:
    return load_training_data("digits-train", digits, held_out=400)


def draw_of(data: Any, digits: Classifier | None, *, epoch: float = 9.0, seed: int = 0) -> Draw:
    chosen = data.train[:8]
    clean = data.take(chosen).float() / 255
    return Draw(clean, torch.zeros(8), data.labels[chosen], digits, seeded(seed), epoch)


def batch_of(objective: Any, draw: Draw, net: nn.Module | None = None) -> Batch:
    prepared = objective.prepare(draw)
    with torch.random.fork_rng():
        whole = objective.wrap(net or small_net(), dataclasses.make_dataclass("D", ["image"])((1, 8, 8)), 0)
    return loop.make_batch(draw, prepared, whole(*prepared.inputs), Recipe("complete"))


@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (4, 1, 8, 8), (2, 3, 224, 16)])
def test_masks_hide_16_of_64_blocks_and_four_of_them_cover_the_image(shape: tuple[int, ...]) -> None:
    masks = block_masks(torch.zeros(shape), 4, seeded())
    height, width = shape[2] // 8, shape[3] // 8
    blocks = masks.unfold(3, height, height).unfold(4, width, width).flatten(5)  # B, N, 1, 8, 8, pixels of a block
    assert torch.equal(blocks.amin(5), blocks.amax(5))
    assert (blocks.amax(5).sum((2, 3, 4)) == 16).all()
    assert torch.equal(masks.sum(1), torch.ones(shape[0], 1, *shape[2:]))
    assert not torch.equal(masks[0], masks[1])  # a mask for each image


def test_transforms_are_noise_and_masks() -> None:
    plain, masks = random_transform(IMAGES, "rt1", seeded())
    assert torch.equal(plain, IMAGES)
    assert masks.shape == (6, 1, 1, 32, 32)
    for name, count in (("rt2", 1), ("rt3", 4)):
        noisy, masks = random_transform(torch.full((6, 3, 32, 32), 0.5), name, seeded())
        assert masks.shape == (6, count, 1, 32, 32)
        assert noisy.min() == 0
        assert noisy.max() == 1
        inside = noisy[(noisy > 0) & (noisy < 1)] - 0.5
        # a normal number cut at two standard deviations has a standard deviation of 0.8796; sampling error 0.44%
        assert inside.std().item() == pytest.approx(0.8796 * NOISE, rel=0.02)


class Counting(nn.Module):
    """Marks every pass, and records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        self.seen.append((images, mask))
        return mask * 0.25 + torch.full_like(images, 0.5)


def test_hidden_pixels_are_grey_and_rt3_uses_hidden_pixels_only() -> None:
    for parts in (1, 4):
        net, masks = Counting(), block_masks(IMAGES, parts, seeded())
        made = complete(net, IMAGES, masks)
        ((shown, mask),) = net.seen
        each = IMAGES.repeat_interleave(parts, 0)
        assert (shown[mask.expand_as(shown) == 1] == GREY).all()
        assert torch.equal(shown * (1 - mask), each * (1 - mask))
        if parts == 4:
            assert (made == 0.75).all()  # what the net makes where it sees is 0.5
        else:
            assert torch.equal(made, masks[:, 0] * 0.25 + torch.full_like(IMAGES, 0.5))


@pytest.mark.parametrize("transform", ["rt1", "rt2", "rt3"])
def test_purification_is_random_reproducible_and_independent_of_the_batch(transform: str) -> None:
    purifier = RandomTransformPurifier(small_net(3).eval(), transform)
    generator = seeded()
    first, second = purifier(IMAGES, generator=generator), purifier(IMAGES, generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, purifier(IMAGES, generator=seeded()))
    assert first.min() >= 0
    assert first.max() <= 1
    keys = [stream_key(0, str(i), "test") for i in range(6)]
    whole = purifier(IMAGES, generator=[block_generator(k, 0) for k in keys])
    for i, key in enumerate(keys):
        alone = purifier(IMAGES[i : i + 1], generator=[block_generator(key, 0)])
        assert torch.allclose(whole[i : i + 1], alone, atol=1e-5)


def test_the_gradient_is_that_of_the_output() -> None:
    purifier = RandomTransformPurifier(small_net(3).eval().double(), "rt3").double()
    x = IMAGES[:1].double().requires_grad_(True)
    purifier(x, generator=seeded()).sum().backward()
    step = torch.randn(x.shape, generator=seeded(1), dtype=torch.float64) * 1e-6
    with torch.no_grad():
        change = purifier(x + step, generator=seeded()).sum() - purifier(x - step, generator=seeded()).sum()
    assert change.item() == pytest.approx(2 * (x.grad * step).sum().item(), rel=1e-3)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 8, 8), (1, 3, 224, 224)])
def test_the_network_keeps_the_shape_and_needs_no_mask(shape: tuple[int, ...]) -> None:
    net = MaskedUNet((8, 16, 16), 1, shape[1]).eval()
    images = torch.rand(shape)
    with torch.no_grad():
        assert net(images).shape == shape
        assert torch.equal(net(images), net(images, torch.zeros(shape[0], 1, *shape[2:])))


def test_sizes_levels_and_names_that_do_not_fit(digits: Classifier) -> None:
    with pytest.raises(UserError, match=r"30x32 cannot be cut into 8x8 equal blocks; .* such as 32x32"):
        MaskedUNet(**SMALL)(torch.rand(1, 3, 30, 32))
    with pytest.raises(UserError, match="takes no noise level; expected a mask"):
        MaskedUNet(**SMALL)(torch.rand(1, 3, 32, 32), 0.25)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="transform='rt4'; expected one of rt1, rt2, rt3"):
        build_defence("atop:transform=rt4", digits)
    with pytest.raises(UserError, match="transform='rt4'"):
        make_objective("atop", {"transform": "rt4"})
    with pytest.raises(UserError, match="expected eps in"):
        make_objective("atop", {"eps": 0})
    assert not make_objective("complete").accepts(UNet((8, 16), 1, 1))


def test_the_attack_is_one_step_of_eps_along_the_sign(data: Any, digits: Classifier) -> None:
    eps = 0.1
    draw = draw_of(data, digits)
    with torch.no_grad():
        prepared = make_objective("atop", {"eps": eps, "transform": "rt1"}).prepare(draw)
    x = draw.clean.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(cross_entropy(digits.logits(x), draw.labels), x)
    wanted = draw.clean + eps * gradient.sign()
    inside = (wanted >= 0) & (wanted <= 1)
    change = prepared.target - draw.clean
    assert inside.float().mean() > 0.4
    assert torch.allclose(change[inside], eps * gradient.sign()[inside], atol=1e-6)
    assert torch.equal(prepared.target[~inside], wanted[~inside].clamp(0, 1))
    assert torch.equal(prepared.inputs[0], prepared.target)  # rt1 adds no noise
    with torch.no_grad():
        before, after = (cross_entropy(digits.logits(i), draw.labels) for i in (draw.clean, prepared.target))
    assert after > before
    assert not prepared.target.requires_grad
    kept = make_objective("atop", {"eps": eps, "clean_target": True}).prepare(draw_of(data, digits))
    assert torch.equal(kept.target, draw.clean)
    bare = make_objective("atop", {"adversarial": False}).prepare(draw_of(data, None))
    assert torch.equal(bare.target, draw.clean)


def test_the_cross_entropy_is_added_after_its_warm_up(data: Any, digits: Classifier) -> None:
    with_term = make_objective("atop", {"weight": 0.3, "warmup": 2.0})
    without = make_objective("atop", {"weight": 0})
    batch = batch_of(with_term, draw_of(data, digits, epoch=1.99))
    assert torch.equal(with_term.loss(batch), without.loss(batch))
    batch = dataclasses.replace(batch, output=2 * batch.output - 0.5)
    assert batch.output.min() < 0
    later = dataclasses.replace(batch, epoch=2.0, temperature=2.0)
    term = 0.3 * cross_entropy(digits.logits(batch.output.clamp(0, 1)) / 2, batch.labels)
    assert torch.allclose(with_term.loss(later) - without.loss(later), term, atol=1e-6)


def test_without_weight_fine_tuning_is_completion_of_the_attacked_images(data: Any, digits: Classifier) -> None:
    tuning, plain = make_objective("atop", {"weight": 0.0}), make_objective("complete")
    draw = draw_of(data, digits)
    a = batch_of(tuning, draw)
    attacked = a.target
    b = batch_of(plain, dataclasses.replace(draw, clean=attacked, classifier=None, generator=seeded()))
    assert a.prepared is not None
    assert b.prepared is not None
    assert all(torch.equal(x, y) for x, y in zip(a.prepared.inputs, b.prepared.inputs, strict=True))
    assert torch.equal(tuning.loss(a), plain.loss(b))
    # l1 on the [-1, 1] scale
    assert plain.loss(b).item() == pytest.approx(2 * (b.output - attacked).abs().mean().item())


def gradients(data: Any, settings: dict[str, Any]) -> tuple[Tensor, Tensor, Completer, Prepared]:
    """Of the generator and, where there is one, of its discriminator."""
    torch.manual_seed(1)
    objective = make_objective("complete", settings)
    draw = draw_of(data, None)
    prepared = objective.prepare(draw)
    whole = objective.wrap(small_net(), data, 3)  # type: ignore[misc]
    loss = objective.loss(loop.make_batch(draw, prepared, whole(*prepared.inputs), Recipe("complete")))
    loss.backward()

    def flat(net: nn.Module | None) -> Tensor:
        own = [] if net is None else [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        return torch.cat(own) if own else torch.zeros(0)

    assert isinstance(whole, Completer)
    return flat(whole.net), flat(whole.discriminator), whole, prepared


def test_the_adversarial_term_reaches_the_generator_unless_switched_off(data: Any) -> None:
    plain, none, _, _ = gradients(data, {})
    deaf, critic, _, _ = gradients(data, {"gan": True, "gan_gradient": False})
    taught, same_critic, whole, prepared = gradients(data, {"gan": True})
    assert none.numel() == 0
    assert torch.equal(deaf, plain)
    assert critic.abs().sum() > 0
    assert torch.equal(critic, same_critic)  # the generator's term teaches the discriminator nothing
    net = small_net()
    made = complete(net, *prepared.inputs[:2])
    judge = copy.deepcopy(whole.discriminator)
    assert judge is not None
    (-judge.eval()(made.clamp(0, 1), prepared.inputs[1].amax(1)).mean()).backward()
    own = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    # the same up to the spectral norms, which each call in training sharpens
    assert cosine_similarity(taught - plain, own, 0) > 0.99
    assert (taught - plain).norm() / own.norm() == pytest.approx(1, abs=0.05)


def test_held_out_images_are_not_scored_by_the_discriminator(data: Any) -> None:
    objective = make_objective("complete", {"gan": True})
    whole = objective.wrap(small_net(), data, 0)  # type: ignore[misc]
    prepared = objective.prepare(draw_of(data, None))
    assert len(whole(*prepared.inputs)) == 4
    with torch.no_grad():
        assert len(whole.eval()(*prepared.inputs)) == 1


def test_the_discriminator_is_spectrally_normalised() -> None:
    torch.manual_seed(0)
    judge = Discriminator(3)
    images, mask = torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 32, 32)
    for _ in range(50):
        judge(images, mask)
    norms = [torch.linalg.matrix_norm(m.weight.flatten(1), 2) for m in judge.eval().layers if isinstance(m, nn.Conv2d)]
    assert torch.stack(norms).detach() == pytest.approx(1.0, abs=1e-2)
    assert judge(images, mask).shape == (2, 1, 4, 4)


@pytest.mark.slow
def test_pre_train_fine_tune_and_defend(digits: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two commands; the classifier stays, the generator moves, and the file is a purifier alone."""
    monkeypatch.chdir(tmp_path)
    before = state_digest(digits.net)
    run(*TRAIN, *SHORT, *"--objective complete --set gan=true --out a".split())
    more = "--objective atop --classifier digits --init a/denoiser.safetensors --set weight=0.05 --set warmup=0"
    run(*TRAIN, *SHORT, *more.split(), "--set", "transform=rt1", "--set", "gan=true", "--out", "b")
    assert state_digest(digits.net) == before
    a, b = (read_state_dict(f"{name}/denoiser.safetensors") for name in "ab")
    moved = [k for k in a if not torch.equal(a[k], b[k])]
    assert "unet.head.weight" in moved
    assert set(b) == set(MaskedUNet(**SMALL, image_channels=1).state_dict())  # no discriminator
    first, card = read_card("a/denoiser.safetensors"), read_card("b/denoiser.safetensors")
    assert (first.purifier, first.access, first.sigmas) == ("atop", "none", ())
    assert (card.purifier, card.access, card.objective) == ("atop", "white-box", "atop")
    assert [c["sha256"] for c in card.classifiers] == [digits.identity()]
    assert card.started_from is not None
    assert card.started_from["sha256"] == first.sha256

    defence = build_defence("atop:transform=rt3:draws=2:weights=b/denoiser.safetensors", digits)
    assert (defence.random, defence.differentiable, defence.passes) == (True, True, 2 * (4 + 1))
    assert defence.combine == "logits"
    about = defence.describe()
    assert about["trained_with"]["transform"] == "rt1"
    assert about["members"][0]["purifier"]["transform"] == "rt3"
    assert about["members"][0]["purifier"]["net"]["sha256"] == card.sha256
    usual = build_defence("atop:weights=b/denoiser.safetensors", digits).describe()
    assert usual["members"][0]["purifier"]["transform"] == "rt1"
    images = torch.rand((3, 1, 8, 8), generator=seeded())
    keys = [stream_key(0, str(i), "test") for i in range(3)]
    together = defence.passes_of(images, keys)
    alone = torch.cat([defence.passes_of(images[i : i + 1], keys[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-4)
    json.dumps(about)


def train(data: Any, out: Path, recipe: Recipe, **how: Any) -> loop.Outcome:
    conduct = loop.TrainerConfig(loop.make_accelerator("cpu"), **how)
    return train_denoiser("masked-unet", data, recipe, out, conduct, options=SMALL)


@pytest.mark.slow
def test_training_learns_to_complete(data: Any, tmp_path: Path) -> None:
    """Held-out images: nearer to the truth than the best constant image and than the input itself."""
    trained = train(data, tmp_path, Recipe("complete", (), epochs=6, rate=1e-2), validations=1)
    clean = data.take(data.held_out).float() / 255
    noisy, masks = random_transform(clean, "rt2", seeded())
    shown = noisy.masked_fill(masks[:, 0].bool(), GREY)
    typical = data.take(data.train).float().median(0).values / 255
    baselines = [2 * (other - clean).abs().mean().item() for other in (shown, typical)]
    assert trained.best["score"] < 0.95 * min(baselines)


@pytest.mark.slow
def test_a_killed_training_resumes_with_its_discriminator(data: Any, tmp_path: Path) -> None:
    recipe = Recipe("complete", (), epochs=0.57, rate=1e-2, settings={"gan": True})
    whole = train(data, tmp_path / "whole", recipe, validations=2)
    part = train(data, tmp_path / "parts", recipe, validations=2, stop_after=4)
    assert (whole.steps, part.steps, part.finished) == (8, 4, False)
    train(data, tmp_path / "parts", recipe, validations=2)
    kept = [read_state_dict(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(value, kept[1][key]) for key, value in kept[0].items())
    assert any(key.startswith("discriminator.") for key in kept[0])


def test_a_classifier_without_gradients_is_refused_in_one_line(data: Any, digits: Classifier) -> None:
    class Deaf(Classifier):
        def logits(self, images: Tensor) -> Tensor:
            return super().logits(images).detach()

    deaf = Deaf("deaf", ClassifierSpec(digits.net, digits.input, digits.class_names, 10))
    with pytest.raises(UserError, match=r"deaf passes no gradients; .* settings adversarial=false"):
        make_objective("atop").prepare(draw_of(data, deaf))
    with pytest.raises(UserError, match="settings gan=False: expected true or false"):
        make_objective("atop", {"gan": "False"})
    with pytest.raises(UserError, match=r"settings weight=none: expected a number, such as 0.05"):
        make_objective("atop", {"weight": "none"})
    with pytest.raises(UserError, match="settings eps=True: expected a number"):
        make_objective("atop", {"eps": True})
    free = make_objective("atop", {"adversarial": False, "weight": 0})
    assert not any((free.classifier, free.labels, free.gradients))


def test_the_discriminator_sees_clipped_images(data: Any) -> None:
    """Completed images are clipped to [0, 1] before they are scored."""
    seen: list[Tensor] = []

    class Judge(nn.Module):
        def forward(self, images: Tensor, mask: Tensor) -> Tensor:
            seen.append(images)
            return images.mean((1, 2, 3))

    masks = block_masks(IMAGES, 1, seeded())
    wild = small_net(3)
    nn.init.normal_(wild.unet.tail.weight, std=10.0)  # type: ignore[union-attr,arg-type]
    made = Completer(wild, Judge(), True)(IMAGES, masks, IMAGES)[0]
    assert made.min() < 0
    assert made.max() > 1
    assert len(seen) == 3
    assert all(images.min() >= 0 and images.max() <= 1 for images in seen)


def test_without_attack_and_classifier_the_card_claims_no_queries(data: Any, tmp_path: Path) -> None:
    train(data, tmp_path, Recipe("atop", (), epochs=0.1, settings={"adversarial": False, "weight": 0}), validations=1)
    assert read_card(tmp_path / "denoiser.safetensors").access == "none"


@pytest.mark.slow
def test_a_network_with_a_mask_is_compiled_on_prepared_images(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial gives no warning and changes nothing; a failing backward pass is detected before training."""
    monkeypatch.setattr(nn.Module, "compile", lambda net: setattr(net, "_compiled_call_impl", net._call_impl))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(data, tmp_path / "on", Recipe("complete", (), epochs=0.1), validations=1, compile=True)
    train(data, tmp_path / "off", Recipe("complete", (), epochs=0.1), validations=1)
    on, off = (read_card(tmp_path / name / "denoiser.safetensors").sha256 for name in ("on", "off"))
    assert on == off

    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, images: Tensor) -> Tensor:
            return images.clone()

        @staticmethod
        def backward(ctx: Any, *slopes: Tensor) -> Tensor:
            raise RuntimeError("no way back")

    def broken(net: nn.Module) -> None:
        net._compiled_call_impl = lambda *given: OneWay.apply(net._call_impl(*given)[0])

    monkeypatch.setattr(nn.Module, "compile", broken)
    with pytest.warns(UserWarning, match=r"cannot be compiled \(no way back\)"):
        train(data, tmp_path / "back", Recipe("complete", (), epochs=0.1), validations=1, compile=True)
