"""Measure JPEG coefficients of training images, and derive quantisation tables from them.

Run ``python -m training.coefficients --help``. Statistics of each of the 64 coefficients, for luma and for both colour
differences together: S, the standard deviation over clean blocks; P, the standard deviation and 95th percentile of the
absolute coefficients of a perturbation; G, the mean absolute derivative of the loss. The tables
(:func:`denoisers.quantisation.shape_of`) follow from S and P; G is for inspection.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from certify.errors import CertifyError, UserError, options_in_messages
from certify.models.classifier import Classifier
from certify.models.load import load_classifier
from certify.runs.config import versions
from certify.smoothing.rng import block_generator, stream_key
from denoisers.jpeg import coefficients, inverse_coefficients, to_images, to_planes
from denoisers.quantisation import KINDS, QUALITIES, Steps, TableSet, multiplied, shape_of, standard, write_tables
from training.data import TrainingData, load_training_data

_BATCH = 100
_BLOCKS = 64  # per image, at most; a random choice if there are more
_SMALLEST_SPREAD = 0.125  # of S, in grey levels: the precision of coefficients before quantisation
_BISECTIONS = 30


@dataclass(frozen=True)
class Probe:
    """A weak attack, to measure the coefficients of perturbations; it evaluates nothing.

    PGD (Madry et al. 2018): sign gradient ascent on the cross-entropy from a uniformly random start.

    Attributes:
        epsilon: l_inf radius in grey levels of 255.
        steps: of the ascent.
        size: of a step, in grey levels.
    """

    epsilon: float = 4.0
    steps: int = 5
    size: float = 1.0

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Attack images ``(B, C, H, W)``; the result stays within the ball and [0, 1]."""
        start = 2 * torch.rand(images.shape, generator=generator).to(images) - 1
        attacked = (images + self.epsilon / 255 * start).clamp(0, 1)
        for _ in range(self.steps):
            attacked.requires_grad_(True)
            (gradient,) = torch.autograd.grad(cross_entropy(classifier.logits(attacked), labels), attacked)
            moved = attacked.detach() + self.size / 255 * gradient.sign() - images
            attacked = (images + moved.clamp(-self.epsilon / 255, self.epsilon / 255)).clamp(0, 1)
        return attacked.detach()


@dataclass(frozen=True)
class Coefficients:
    """Coefficients ``(blocks, 64)`` of one kind of plane (luma, or both colour differences), in grey levels.

    Attributes:
        clean: of the images.
        perturbation: of the attack's perturbation.
        gradient: of each image's own loss with respect to ``clean``.
    """

    clean: Tensor
    perturbation: Tensor
    gradient: Tensor

    def statistics(self) -> dict[str, list[float]]:
        """Compute S, P (``P_std``, ``P_p95``) and G of the 64 coefficients."""
        sizes = self.perturbation.abs().sort(0).values
        return {
            "S": _to_list(self.clean.std(0).clamp_min(_SMALLEST_SPREAD)),
            "P_std": _to_list(self.perturbation.std(0)),
            "P_p95": _to_list(sizes[round(0.95 * (len(sizes) - 1))]),
            "G": _to_list(self.gradient.abs().mean(0), 12),
        }


def collect(classifier: Classifier, data: TrainingData, images: int, probe: Probe, seed: int = 0) -> list[Coefficients]:
    """Collect the coefficients of training images (no held-out ones), of perturbations and of gradients; luma first.

    Labels are those of the data, or else the classifier's.

    Raises:
        UserError: fewer than 2 images.
    """
    chosen = data.train[:images]
    if len(chosen) < 2:
        raise UserError(f"--images {images}: expected 2 or more of the {len(data.train)} training images")
    rows: list[list[tuple[Tensor, ...]]] = []
    for i, part in enumerate(chosen.split(_BATCH)):
        generator = block_generator(stream_key(seed, "probe", "coefficients"), i)
        clean = data.take(part).float() / 255
        labels = classifier(clean) if data.labels is None else data.labels[part]
        perturbation = probe.perturb(classifier, clean, labels, generator) - clean
        own, change = ([coefficients(p) for p in to_planes(x * 255)] for x in (clean, perturbation))
        own[0][..., 0] -= 128 * 8  # the codec shifts luma by 128
        gradients = _gradients(classifier, clean, labels)
        for k, triple in enumerate(zip(own, change, gradients, strict=True)):
            kept = torch.randperm(triple[0][0, 0].numel() // 64, generator=generator)[:_BLOCKS]
            rows.extend([] for _ in range(k + 1 - len(rows)))
            rows[k].append(tuple(t.flatten(2, 3)[:, :, kept].reshape(-1, 64) for t in triple))
    return [Coefficients(*(torch.cat(column) for column in zip(*parts, strict=True))) for parts in rows]


def _gradients(classifier: Classifier, clean: Tensor, labels: Tensor) -> list[Tensor]:
    """Differentiate each image's loss with respect to its coefficients."""
    own = [coefficients(p).requires_grad_(True) for p in to_planes(clean * 255)]
    images = to_images([inverse_coefficients(c, *clean.shape[-2:]) for c in own]) / 255
    return list(torch.autograd.grad(cross_entropy(classifier.logits(images), labels, reduction="sum"), own))


def rate(planes: Sequence[Coefficients], steps: Steps) -> float:
    """Count the coefficients per pixel that are not zero after quantisation."""
    tables = (steps.luma, steps.chroma)
    counts = [((p.clean.abs() >= torch.tensor(t) / 2).sum().item()) for p, t in zip(planes, tables, strict=False)]
    return sum(counts) / planes[0].clean.numel()


def match_rate(planes: Sequence[Coefficients], shapes: Sequence[Sequence[float]], target: float) -> Steps:
    """Scale shapes by the factor kappa whose rate is closest to a target.

    Args:
        planes: luma and, for colour images, the colour differences.
        shapes: of the tables for luma and for chroma.
        target: nonzero coefficients per pixel.
    """

    def at(kappa: float) -> Steps:
        luma, chroma = (multiplied(s, kappa, dc_step) for s, dc_step in zip(shapes, (16, 17), strict=True))
        steps = Steps(luma, chroma, kappa)
        return replace(steps, rate=rate(planes, steps))

    low, high = 1e-3, 1e3
    for _ in range(_BISECTIONS):  # the rate never rises with kappa
        middle = (low * high) ** 0.5
        low, high = (middle, high) if (at(middle).rate or 0) > target else (low, middle)
    return min((at(low), at(high)), key=lambda s: abs((s.rate or 0) - target))


def measure(
    classifier: Classifier,
    data: TrainingData,
    images: int = 2000,
    *,
    gamma: float = 0.5,
    probe: Probe | None = None,
    seed: int = 0,
    command: str = "",
) -> TableSet:
    """Measure the statistics, and derive the tables of every kind and nominal quality.

    Args:
        classifier: undefended; the probe attacks it.
        data: training images.
        images: number of them to use.
        gamma: of :func:`denoisers.quantisation.shape_of`.
        probe: the attack.
        seed: of the attack's start and of the choice of blocks.
        command: command line, for the record.

    Raises:
        UserError: gamma out of range, or fewer than 2 images.
    """
    if not 0 <= gamma <= 4:
        raise UserError(f"--gamma {gamma:g}: expected 0 (perturbations only) to 1 (information only), at most 4")
    probe = probe or Probe()
    planes = collect(classifier, data, images, probe, seed)
    names = ("luma", "chroma")[: len(planes)]
    statistics = {name: plane.statistics() for name, plane in zip(names, planes, strict=True)}
    both = [statistics["luma"], statistics.get("chroma", statistics["luma"])]  # grey images never use the second
    tables: dict[str, dict[int, Steps]] = {kind: {} for kind in KINDS}
    for quality in QUALITIES:
        target = rate(planes, standard(quality))
        for kind in KINDS:
            shapes = [shape_of(kind, s["S"], s["P_p95"], gamma) for s in both]
            tables[kind][quality] = match_rate(planes, shapes, target)
    about = {
        "statistics": statistics,
        "standard_rates": {str(q): rate(planes, standard(q)) for q in QUALITIES},
        "gamma": gamma,
        "images": min(images, len(data.train)),
        "attack": {"name": "PGD", "norm": "linf", "loss": "cross-entropy", "start": "uniform", **asdict(probe)},
        "seed": seed,
        "data": data.about,
        "classifier": {"name": classifier.name, "weights": classifier.weights, "sha256": classifier.identity()},
        "versions": versions(),
        "command": command,
    }
    return TableSet(data.image, tables, about)


def _to_list(values: Tensor, digits: int = 6) -> list[float]:
    return [round(v, digits) for v in values.tolist()]


def main(given: Sequence[str] | None = None) -> None:
    """Run the command: measure, and write a file of tables."""
    parser = argparse.ArgumentParser(prog="python -m training.coefficients", description=__doc__)
    parser.add_argument("--model", required=True, help="classifier without a defence")
    parser.add_argument("--weights", help="checkpoint of the classifier")
    parser.add_argument("--data", required=True, help="training images: a dataset name, folder, .zip or .npz")
    parser.add_argument("--root", help="folder of torchvision's datasets")
    parser.add_argument("--images", type=int, default=2000, help="number of images to use (default: 2000)")
    parser.add_argument("--gamma", type=float, default=0.5, help="0: perturbations only, 1: information only (0.5)")
    parser.add_argument("--epsilon", type=float, default=4.0, help="radius of the perturbation in grey levels (4)")
    parser.add_argument("--steps", type=int, default=5, help="steps of the attack (5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the attack and of the choice of blocks (0)")
    parser.add_argument("--out", required=True, help="file to write")
    o = parser.parse_args(given)
    command = "python -m training.coefficients " + shlex.join(sys.argv[1:] if given is None else given)
    try:
        classifier = load_classifier(o.model, weights=o.weights)
        data = load_training_data(o.data, classifier, root=o.root)
        probe = Probe(o.epsilon, o.steps)
        tables = measure(classifier, data, o.images, gamma=o.gamma, probe=probe, seed=o.seed, command=command)
        write_tables(o.out, tables)
    except CertifyError as error:
        with options_in_messages():  # options as the command spells them
            parser.exit(error.exit_code, f"{parser.prog}: {error}\n")
    for kind, levels in tables.tables.items():
        rates = ", ".join(f"{q}: kappa {s.kappa:.3g}, {s.rate:.4f}" for q, s in levels.items())
        sys.stdout.write(f"{kind:5s} {rates} nonzero coefficients per pixel\n")
    sys.stdout.write(f"wrote {o.out}, SHA-256 {tables.sha256}\n")


if __name__ == "__main__":
    main()
