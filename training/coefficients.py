"""What JPEG's coefficients hold, measured on training images: ``python -m training.coefficients --help``.

Three statistics of each of the 64 coefficients, for luma and for both colour differences together: S, the standard
deviation over clean blocks; P, standard deviation and 95th percentile of the size of a perturbation's coefficients; G,
the mean size of the loss's derivative. S and P make the tables (``denoisers/quantisation.py``); G is kept to look at.
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

from certify.errors import CertifyError, UserError
from certify.models.classifier import Classifier, load_classifier
from certify.runs.config import versions
from certify.smoothing.rng import block_generator, stream_key
from denoisers.jpeg import coefficients, planes_of, to_images, to_planes
from denoisers.quantisation import KINDS, QUALITIES, Steps, TableSet, multiplied, shape_of, standard, write_tables
from training.data import TrainingData, load_training_data

_BATCH = 100
_BLOCKS = 64  # of an image that are looked at, at most; drawn at random where there are more
_LEAST = 0.125  # of a standard deviation, in grey levels: the precision that coefficients are quantised from
_HALVINGS = 30


@dataclass(frozen=True)
class Probe:
    """The weak attack that shows what perturbations look like; it measures, it does not evaluate.

    Attributes:
        epsilon: l_inf radius in grey levels of 255.
        steps: of sign gradient ascent on the cross-entropy (PGD, Madry et al. 2018) from a uniformly random start.
        size: of a step, in grey levels.
    """

    epsilon: float = 4.0
    steps: int = 5
    size: float = 1.0

    def perturbed(self, classifier: Classifier, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Images ``(B, C, H, W)`` within the ball and [0, 1]."""
        start = 2 * torch.rand(images.shape, generator=generator).to(images) - 1
        found = (images + self.epsilon / 255 * start).clamp(0, 1)
        for _ in range(self.steps):
            found.requires_grad_(True)
            (up,) = torch.autograd.grad(cross_entropy(classifier.logits(found), labels), found)
            moved = found.detach() + self.size / 255 * up.sign() - images
            found = (images + moved.clamp(-self.epsilon / 255, self.epsilon / 255)).clamp(0, 1)
        return found.detach()


@dataclass(frozen=True)
class Coefficients:
    """Of one plane kind (luma, or both colour differences), over all blocks: ``(N, 64)``, in grey levels.

    Attributes:
        clean: of the images.
        moved: of the perturbation.
        slope: of the loss, one image's own, with respect to ``clean``.
    """

    clean: Tensor
    moved: Tensor
    slope: Tensor

    def statistics(self) -> dict[str, list[float]]:
        """S, P (``P_std``, ``P_p95``) and G of the 64 coefficients."""
        size = self.moved.abs().sort(0).values
        return {
            "S": _listed(self.clean.std(0).clamp_min(_LEAST)),
            "P_std": _listed(self.moved.std(0)),
            "P_p95": _listed(size[round(0.95 * (len(size) - 1))]),
            "G": _listed(self.slope.abs().mean(0), 12),
        }


def collect(classifier: Classifier, data: TrainingData, images: int, probe: Probe, seed: int = 0) -> list[Coefficients]:
    """Coefficients of training images (never of held-out ones), their perturbations and slopes; luma first.

    Labels are the data's own where there are some, else the classifier's.

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
        moved = probe.perturbed(classifier, clean, labels, generator) - clean
        own, change = ([coefficients(p) for p in to_planes(x * 255)] for x in (clean, moved))
        own[0][..., 0] -= 128 * 8  # as the codec shifts luma
        slopes = _slopes(classifier, clean, labels)
        for k, triple in enumerate(zip(own, change, slopes, strict=True)):
            kept = torch.randperm(triple[0][0, 0].numel() // 64, generator=generator)[:_BLOCKS]
            rows.extend([] for _ in range(k + 1 - len(rows)))
            rows[k].append(tuple(t.flatten(2, 3)[:, :, kept].reshape(-1, 64) for t in triple))
    return [Coefficients(*(torch.cat(column) for column in zip(*parts, strict=True))) for parts in rows]


def _slopes(classifier: Classifier, clean: Tensor, labels: Tensor) -> list[Tensor]:
    """The derivative of each image's loss with respect to its coefficients, shaped as these."""
    found = [coefficients(p).requires_grad_(True) for p in to_planes(clean * 255)]
    images = to_images([planes_of(c, *clean.shape[-2:]) for c in found]) / 255
    return list(torch.autograd.grad(cross_entropy(classifier.logits(images), labels, reduction="sum"), found))


def rate(planes: Sequence[Coefficients], steps: Steps) -> float:
    """Coefficients a pixel that are not zero after quantisation."""
    tables = (steps.luma, steps.chroma)
    counts = [((p.clean.abs() >= torch.tensor(t) / 2).sum().item()) for p, t in zip(planes, tables, strict=False)]
    return sum(counts) / planes[0].clean.numel()


def matched(planes: Sequence[Coefficients], shapes: Sequence[Sequence[float]], wanted: float) -> Steps:
    """The multiple kappa of the shapes whose rate is nearest to the one that is wanted.

    Args:
        planes: luma, and the colour differences where there are some.
        shapes: of the table for luma, and for the colour differences.
        wanted: coefficients a pixel.
    """

    def at(kappa: float) -> Steps:
        luma, chroma = (multiplied(s, kappa, mean) for s, mean in zip(shapes, (16, 17), strict=True))
        found = Steps(luma, chroma, kappa)
        return replace(found, rate=rate(planes, found))

    low, high = 1e-3, 1e3
    for _ in range(_HALVINGS):  # the rate never rises with kappa
        middle = (low * high) ** 0.5
        low, high = (middle, high) if (at(middle).rate or 0) > wanted else (low, middle)
    return min((at(low), at(high)), key=lambda s: abs((s.rate or 0) - wanted))


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
    """Statistics, and the tables that follow from them at every nominal quality.

    Args:
        classifier: undefended; the probe attacks it.
        data: training images.
        images: of them, so many.
        gamma: of :func:`denoisers.quantisation.shape_of`.
        probe: the attack.
        seed: of the attack's start and of the blocks that are looked at.
        command: for the record.
    """
    if not 0 <= gamma <= 4:
        raise UserError(f"--gamma {gamma:g}: expected 0 (perturbations only) to 1 (information only), at most 4")
    probe = probe or Probe()
    planes = collect(classifier, data, images, probe, seed)
    names = ("luma", "chroma")[: len(planes)]
    found = {name: plane.statistics() for name, plane in zip(names, planes, strict=True)}
    both = [found["luma"], found.get("chroma", found["luma"])]  # grey images never use the second
    tables: dict[str, dict[int, Steps]] = {kind: {} for kind in KINDS}
    for quality in QUALITIES:
        wanted = rate(planes, standard(quality))
        for kind in KINDS:
            shapes = [shape_of(kind, s["S"], s["P_p95"], gamma) for s in both]
            tables[kind][quality] = matched(planes, shapes, wanted)
    about = {
        "statistics": found,
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


def _listed(values: Tensor, digits: int = 6) -> list[float]:
    return [round(v, digits) for v in values.tolist()]


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and write the file of tables."""
    parser = argparse.ArgumentParser(prog="python -m training.coefficients", description=__doc__)
    parser.add_argument("--model", required=True, help="the classifier without any defence")
    parser.add_argument("--weights", help="its checkpoint")
    parser.add_argument("--data", required=True, help="training images: a dataset's name, a folder, .zip or .npz")
    parser.add_argument("--root", help="folder of torchvision's datasets")
    parser.add_argument("--images", type=int, default=2000, help="of them, so many (default 2000)")
    parser.add_argument("--gamma", type=float, default=0.5, help="0: perturbations only, 1: information only (0.5)")
    parser.add_argument("--epsilon", type=float, default=4.0, help="of the perturbation, in grey levels (4)")
    parser.add_argument("--steps", type=int, default=5, help="of the perturbation (5)")
    parser.add_argument("--seed", type=int, default=0, help="of its start and of the blocks")
    parser.add_argument("--out", required=True, help="the file of tables")
    o = parser.parse_args(given)
    typed = sys.argv[1:] if given is None else list(given)
    try:
        classifier = load_classifier(o.model, weights=o.weights)
        data = load_training_data(o.data, classifier, root=o.root)
        found = measure(
            classifier,
            data,
            o.images,
            gamma=o.gamma,
            probe=Probe(o.epsilon, o.steps),
            seed=o.seed,
            command="python -m training.coefficients " + shlex.join(typed),
        )
        written = write_tables(o.out, found)
    except CertifyError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")
    for kind, levels in written.tables.items():
        marks = ", ".join(f"{q}: kappa {s.kappa:.3g}, {s.rate:.4f}" for q, s in levels.items())
        sys.stdout.write(f"{kind:5s} {marks} coefficients a pixel\n")
    sys.stdout.write(f"wrote {o.out}, SHA-256 {written.sha256}\n")


if __name__ == "__main__":
    main()
