"""Frozen classifiers by name or file: normalisation inside, input size and transform from the model's own settings.

:mod:`certify.models.resolve` maps names to builders; a builder is a function ``(name, weights, num_classes)`` that
returns a :class:`ClassifierSpec`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify.errors import CertifyError, UserError, first_line
from certify.models.identity import classifier_fingerprint, state_digest
from certify.models.labels import ClassNames
from certify.types import FAILED


@dataclass(frozen=True)
class InputSpec:
    """Input specification of a classifier.

    Attributes:
        size: (C, H, W), or None if any size is accepted.
        mean: per-channel mean, subtracted inside the classifier.
        std: per-channel standard deviation, divided by inside the classifier.
        transform: function from a PIL image or a (C, H, W) tensor in [0, 1] to the image that is certified, or None.
        steps: description of the transform.
    """

    size: tuple[int, int, int] | None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    transform: Callable[[Any], Tensor] | None = None
    steps: str = "none"


@dataclass(frozen=True)
class ConfigFile:
    """A ``config.json`` beside a checkpoint, as timm saves it.

    Attributes:
        path: the file's path.
        architecture: the architecture it describes.
        used: whether that is the model's architecture, in which case size, mean and std come from the file.
    """

    path: Path
    architecture: str
    used: bool


@dataclass(frozen=True)
class ClassifierSpec:
    """Result of a builder: a network and what the classifier has to know about it.

    Attributes:
        net: the network, from normalised images to logits ``(B, K)`` or labels ``(B,)``.
        input: input specification.
        class_names: all names of each class, by class index, or None.
        num_classes: K, if known.
        weights: description of the weights, for the run file.
        code: SHA-256 of the file that defines the function, if tensors alone do not (TorchScript, ONNX, Python).
        native: whether ``net`` is made of torch modules, which can be copied, cast and compiled.
        closed: whether tensors and ``code`` determine the function; if not, the run file stores a fingerprint.
        external: for an ONNX file, the SHA-256 of every other file that it reads, by name.
        eight_bits: whether the network takes 8-bit pixels, which rules out ``mean`` and ``std``.
        config_file: the ``config.json`` beside the weights, if any.
    """

    net: nn.Module
    input: InputSpec
    class_names: ClassNames | None = None
    num_classes: int | None = None
    weights: str = "as built"
    code: str | None = None
    native: bool = True
    closed: bool = False
    external: Mapping[str, str] | None = None
    eight_bits: bool = False
    config_file: ConfigFile | None = None


def square_input(
    size: tuple[int, int, int],
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    *,
    resize: int | None = None,
    interpolation: str = "bilinear",
) -> InputSpec:
    """Return an input with torchvision's evaluation transform: shorter side to ``resize``, centre crop to ``size``.

    Raises:
        UserError: ``size`` is not square.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    channels, height, width = size
    if height != width:
        raise UserError(f"input size {channels}x{height}x{width}: expected a square image, such as {channels}x224x224")
    transform = ImageClassification(
        crop_size=height,
        resize_size=resize or height,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        interpolation=InterpolationMode(interpolation),
    )
    steps = f"shorter side to {resize or height} ({interpolation}), centre crop {height}"
    return InputSpec(size, tuple(mean), tuple(std), transform, steps)


def labels_from_logits(logits: Tensor) -> Tensor:
    """Return labels ``(B,)``, the first maximum of scores ``(B, K)``; ``FAILED`` if it is infinite or any is NaN."""
    values, labels = logits.max(dim=1)
    return labels.masked_fill(~values.isfinite(), FAILED)


class FailsOnImages(UserError):
    """Raised for a network that fails on images of its stated size."""


class Classifier(nn.Module):
    """A frozen base classifier from images in [0, 1] (plus noise) to labels; normalisation is included.

    It stays in evaluation mode: batch statistics would make the samples of a batch depend on each other, which
    invalidates a certificate.

    Args:
        name: name for messages and the run file.
        spec: the network, its input size, normalisation and provenance.
        num_classes: K, if the network's output does not show it (a network that returns labels).

    Raises:
        UserError: a network that fails on its own input size, or without a known number of classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, spec: ClassifierSpec, num_classes: int | None = None) -> None:
        super().__init__()
        self.name = name
        self.net = spec.net
        self.input = spec.input
        self.class_names = spec.class_names
        self.weights = spec.weights
        self.code = spec.code
        self.native = spec.native
        self.closed, self.external = spec.closed, spec.external
        self.probe_size = spec.input.size
        """(C, H, W) of the probe images for its fingerprint: its input size, or the images' size if it takes any."""
        self._fingerprints: dict[tuple[int, int, int] | None, dict[str, Any] | None] = {}
        self.dtype = torch.float32
        self.register_buffer("mean", torch.tensor(spec.input.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.input.std).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False)
        super().train(False)
        self.channels_last = any(p.ndim == 4 for p in self.net.parameters())
        if self.channels_last:  # the fastest layout for convolutions; values are unchanged
            self.net.to(memory_format=torch.channels_last)
        self.num_classes = self._count_classes(num_classes or spec.num_classes)

    def train(self, mode: bool = True) -> Classifier:
        """Refuse training mode: a frozen classifier stays in evaluation mode."""
        if mode:
            raise UserError(f"classifier {self.name!r} is frozen; it cannot be put into training mode")
        return super().train(False)

    def cast(self, dtype: torch.dtype) -> None:
        """Convert the network to ``dtype``; normalisation stays in float32."""
        self.net.to(dtype)
        self.dtype = dtype

    def output(self, images: Tensor) -> Tensor:
        """Return the network's output for images ``(B, C, H, W)``: scores ``(B, K)``, or labels ``(B,)``."""
        if self.mean.numel():
            images = (images - self.mean) / self.std
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        output: Tensor = self.net(images.to(self.dtype, memory_format=layout))
        return output

    def logits(self, images: Tensor) -> Tensor:
        """Return scores ``(B, K)`` of images ``(B, C, H, W)``; differentiable if the network is.

        Raises:
            UserError: the classifier returns labels only.
        """
        output = self.output(images)
        if output.ndim != 2:
            raise UserError(
                f"classifier {self.name!r} returns labels only; logits need a model that returns (B, K) scores"
            )
        return output

    def forward(self, images: Tensor) -> Tensor:
        """Return labels ``(B,)``, int64, of images ``(B, C, H, W)``; ``FAILED`` where the output is not finite."""
        return self.labels(self.output(images))

    def labels(self, output: Tensor) -> Tensor:
        """Return the labels ``(B,)`` of an :meth:`output`, as :meth:`forward` returns them."""
        return labels_from_logits(output) if output.ndim == 2 else self._integer_labels(output)

    def _integer_labels(self, labels: Tensor) -> Tensor:
        """Return labels as int64; non-finite ones become ``FAILED``, fractions raise an error."""
        if not labels.is_floating_point():
            return labels.long()
        finite = labels.isfinite()
        if not (labels[finite] == labels[finite].round()).all():
            raise UserError(f"classifier {self.name!r} returned labels that are not whole numbers; expected 0 to K-1")
        return labels.masked_fill(~finite, FAILED).long()

    def _count_classes(self, stated: int | None) -> int:
        """Infer K from a forward pass, which also checks that the network accepts its stated input size."""
        if self.input.size is None:
            if stated is None:
                raise UserError(
                    f"classifier {self.name!r} has no stated input size; pass it, such as --input-size 3x32x32"
                )
            return stated
        probe = torch.rand((4, *self.input.size), generator=torch.Generator().manual_seed(0))
        output = self._probe(probe)
        if not isinstance(output, Tensor) or output.shape[:1] != (4,) or output.ndim not in (1, 2):
            got = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(
                f"classifier {self.name!r} returned {got} for 4 images; expected logits (4, K) or labels (4,)"
            )
        if output.ndim == 2 and output.shape[1] < 2:
            raise UserError(
                f"classifier {self.name!r} returned one score per image; expected one per class: return two columns, "
                "or labels and --num-classes 2"
            )
        if output.ndim == 1 and stated is None:
            raise UserError(
                f"classifier {self.name!r} returns labels only; pass the number of classes: --num-classes K"
            )
        if output.ndim == 2 and stated not in (None, output.shape[1]):
            raise UserError(f"classifier {self.name!r} has {output.shape[1]} classes, not {stated}; drop --num-classes")
        return int(stated or output.shape[1])

    def _probe(self, images: Tensor) -> Tensor:
        """Return the network's output for images of its input size.

        Raises:
            FailsOnImages: the network raised an error.
        """
        try:
            with torch.inference_mode():
                return self.output(images)
        except CertifyError:
            raise
        except Exception as error:
            shape = "x".join(map(str, images.shape[1:]))
            raise FailsOnImages(f"classifier {self.name!r} fails on a {shape} image: {first_line(error)}") from error

    def identity(self) -> str:
        """Return a hash that identifies the classifier, over its tensors and the other files that define it."""
        own = state_digest(self.net) or self.name
        if self.code is None:
            return own
        files = "".join(f" {name} {digest}" for name, digest in (self.external or {}).items())
        return hashlib.sha256(f"{self.code} {own}{files}".encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return everything that determines the function, as JSON for the run file's header."""
        return {
            "step": "classifier",
            "name": self.name,
            "num_classes": self.num_classes,
            "input": list(self.input.size) if self.input.size else None,
            "mean": list(self.input.mean),
            "std": list(self.input.std),
            "transform": self.input.steps,
            "weights": self.weights,
            "sha256": state_digest(self.net),
            "code_sha256": self.code,
            **({} if self.external is None else {"external_data": dict(self.external)}),
        }

    def record(self) -> dict[str, Any]:
        """Return :meth:`describe`, plus a fingerprint if hashes are not sufficient. Call before :meth:`cast`."""
        return {**self.describe(), **({} if self.closed else {"fingerprint": self.fingerprint()})}

    def fingerprint(self) -> dict[str, Any] | None:
        """Return the outputs for the probe images; None if their size is unknown or the classifier fails on them."""
        size = self.probe_size
        if size not in self._fingerprints:
            self._fingerprints[size] = classifier_fingerprint(self.output, size, self.mean.device) if size else None
        return self._fingerprints[size]
