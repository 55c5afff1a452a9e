"""Frozen classifiers by name or file: normalisation inside, input size and transform from the model's own settings.

Names are looked up, and mapped to a builder, in ``certify/models/resolve.py``. A builder is a function ``(name,
weights, num_classes) -> ClassifierSpec`` in its own module.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify.errors import CertifyError, CertifyWarning, UserError, first_line
from certify.models import resolve as hub
from certify.models.identity import classifier_fingerprint, state_digest
from certify.types import FAILED


@dataclass(frozen=True)
class InputSpec:
    """What a classifier wants to see.

    Attributes:
        size: (C, H, W), or None when it takes any.
        mean: per channel, subtracted inside the classifier.
        std: per channel, divided by inside the classifier.
        transform: from a PIL image or a (C, H, W) tensor in [0, 1] to the image that is certified, or None.
        steps: the transform in words.
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
        path: of the file.
        architecture: the one that it describes.
        used: whether that is the model's, so that size, mean and std come from the file.
    """

    path: Path
    architecture: str
    used: bool


@dataclass(frozen=True)
class ClassifierSpec:
    """What a builder hands over: a network from normalised images to logits ``(B, K)`` or labels ``(B,)``."""

    net: nn.Module
    input: InputSpec
    class_names: tuple[tuple[str, ...], ...] | None = None
    num_classes: int | None = None
    weights: str = "as built"
    code: str | None = None
    """SHA-256 of the file that defines the function, where tensors alone do not (TorchScript, ONNX, Python)."""
    native: bool = True
    """Whether ``net`` is made of torch modules, which can be copied, cast and compiled."""
    closed: bool = False
    """Whether tensors and ``code`` determine the function; if not, its record holds a fingerprint of its answers."""
    external: Mapping[str, str] | None = None
    """Of an ONNX file: SHA-256 of every other file that it reads, by name."""
    eight_bits: bool = False
    """Whether the network takes 8-bit pixels, which leaves no room for a mean and a standard deviation."""
    config_file: ConfigFile | None = None
    """Beside the weights, where there is one."""


def square_input(
    size: tuple[int, int, int],
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    *,
    resize: int | None = None,
    interpolation: str = "bilinear",
) -> InputSpec:
    """An input with torchvision's evaluation transform: shorter side to ``resize``, centre crop to ``size``."""
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
    """The label of each row ``(B, K)``: its first maximum; ``FAILED`` when that is infinite or any logit is NaN."""
    values, labels = logits.max(dim=1)
    return labels.masked_fill(~values.isfinite(), FAILED)


class _FailsOnImages(UserError):
    """A network that does not take what it should."""


class Classifier(nn.Module):
    """A frozen base classifier: images in [0, 1] (plus noise) to labels, normalisation inside.

    In evaluation mode for good: batch statistics would tie the samples of a batch together and void a certificate.
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
        """(C, H, W) of the probe images of its fingerprint: its input, or the images' size where it takes any."""
        self._fingerprints: dict[tuple[int, int, int] | None, dict[str, Any] | None] = {}
        self.dtype = torch.float32
        self.register_buffer("mean", torch.tensor(spec.input.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.input.std).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False)
        super().train(False)
        self.channels_last = any(p.ndim == 4 for p in self.net.parameters())
        if self.channels_last:  # the layout convolutions are fastest in; values stay the same
            self.net.to(memory_format=torch.channels_last)
        self.num_classes = self._count_classes(num_classes or spec.num_classes)

    def train(self, mode: bool = True) -> Classifier:
        """Refused: a frozen classifier stays in evaluation mode."""
        if mode:
            raise UserError(f"classifier {self.name!r} is frozen; it cannot be put into training mode")
        return super().train(False)

    def cast(self, dtype: torch.dtype) -> None:
        """Compute in this type from here on; the normalisation stays in float32."""
        self.net.to(dtype)
        self.dtype = dtype

    def output(self, images: Tensor) -> Tensor:
        """The network's own answer to images ``(B, C, H, W)``: scores ``(B, K)``, or labels ``(B,)``."""
        if self.mean.numel():
            images = (images - self.mean) / self.std
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        output: Tensor = self.net(images.to(self.dtype, memory_format=layout))
        return output

    def logits(self, images: Tensor) -> Tensor:
        """Scores ``(B, K)`` of images ``(B, C, H, W)``; differentiable where the network is.

        Raises:
            UserError: the classifier gives labels only.
        """
        output = self.output(images)
        if output.ndim != 2:
            raise UserError(
                f"classifier {self.name!r} gives labels only; logits need a model that returns (B, K) scores"
            )
        return output

    def forward(self, images: Tensor) -> Tensor:
        """Labels ``(B,)``, int64, of images ``(B, C, H, W)``; ``FAILED`` where there is no finite answer."""
        return self.labels(self.output(images))

    def labels(self, output: Tensor) -> Tensor:
        """Labels ``(B,)`` that an :meth:`output` stands for, as :meth:`forward` returns them."""
        return labels_from_logits(output) if output.ndim == 2 else self._whole(output)

    def _whole(self, labels: Tensor) -> Tensor:
        """Labels as int64: numbers that are not finite are failures, fractions are refused."""
        if not labels.is_floating_point():
            return labels.long()
        finite = labels.isfinite()
        if not (labels[finite] == labels[finite].round()).all():
            raise UserError(f"classifier {self.name!r} returned labels that are not whole numbers; expected 0 to K-1")
        return labels.masked_fill(~finite, FAILED).long()

    def _count_classes(self, stated: int | None) -> int:
        """K from a forward pass, which also shows that the network takes its own size (the rest: `contract`)."""
        if self.input.size is None:
            if stated is None:
                raise UserError(
                    f"classifier {self.name!r} does not say what it takes; "
                    "give its input size, such as --input-size 3x32x32 (from Python: input_size=(3, 32, 32))"
                )
            return stated
        probe = torch.rand((4, *self.input.size), generator=torch.Generator().manual_seed(0))
        output = self._tried(probe)
        if not isinstance(output, Tensor) or output.shape[:1] != (4,) or output.ndim not in (1, 2):
            got = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(
                f"classifier {self.name!r} returned {got} for 4 images; expected logits (4, K) or labels (4,)"
            )
        if output.ndim == 2 and output.shape[1] < 2:
            raise UserError(
                f"classifier {self.name!r} returned one score an image; expected one a class: return two columns, "
                "or labels and --num-classes 2"
            )
        if output.ndim == 1 and stated is None:
            raise UserError(
                f"classifier {self.name!r} returns labels only; say how many classes there are: --num-classes K "
                "(from Python: num_classes=K)"
            )
        found = stated if output.ndim == 1 else output.shape[1]
        assert found is not None
        if stated is not None and stated != found:
            raise UserError(f"classifier {self.name!r} has {found} classes, not {stated}; drop --num-classes")
        return int(found)

    def _tried(self, images: Tensor) -> Tensor:
        """What the network says to images that nobody chose.

        Raises:
            UserError: it fails on them.
        """
        try:
            with torch.inference_mode():
                return self.output(images)
        except CertifyError:
            raise
        except Exception as error:
            shape = "x".join(map(str, images.shape[1:]))
            raise _FailsOnImages(f"classifier {self.name!r} fails on a {shape} image: {first_line(error)}") from error

    def identity(self) -> str:
        """What tells it from another: a hash of its tensors, and of the file that defines it where they do not."""
        own = state_digest(self.net) or self.name
        if self.code is None:
            return own
        files = "".join(f" {name} {digest}" for name, digest in (self.external or {}).items())
        return hashlib.sha256(f"{self.code} {own}{files}".encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Everything that fixes the function, as JSON."""
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
        """:meth:`describe`, with a fingerprint where hashes do not determine the function; before any :meth:`cast`."""
        return {**self.describe(), **({} if self.closed else {"fingerprint": self.fingerprint()})}

    def fingerprint(self) -> dict[str, Any] | None:
        """Answers to the probe images; None where their size is not known, or where the classifier fails on them."""
        size = self.probe_size
        if size not in self._fingerprints:
            found = classifier_fingerprint(self.output, size, self.mean.device) if size else None
            self._fingerprints[size] = found
        return self._fingerprints[size]


def load_classifier(
    model: str | nn.Module | Callable[..., Any],
    *,
    weights: str | Path | None = None,
    input_size: tuple[int, int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_classes: int | None = None,
    trust_code: bool = False,
) -> Classifier:
    """A frozen classifier, on the CPU, in evaluation mode.

    Args:
        model: ``digits``, ``cifar_resnet20`` .. ``cifar_resnet110``, a timm or torchvision name (``timm:NAME`` or
            ``torchvision:NAME`` where both have it, else timm's), ``hf-hub:OWNER/NAME``, a TorchScript or ONNX file
            (``FILE.onnx::OUTPUT`` of several outputs), a folder that timm saved, or ``package.module:callable``; or the
            object itself: a module, which is copied, a function from images ``(B, C, H, W)`` to logits or labels, or a
            function without arguments that returns one of them.
        weights: a checkpoint, or ``FILE::PART`` of one that holds several sets of weights; without it the model's
            published weights are used.
        input_size: (C, H, W), in place of the model's own.
        mean: per-channel mean in place of the model's own; needs ``std``.
        std: per-channel standard deviation in place of the model's own; needs ``mean``.
        num_classes: K, for checkpoints with another head than the published one, and for label-only callables.
        trust_code: run the program in a TorchScript file; it can do anything that you can.

    Returns:
        The classifier; images go in as float32 in [0, 1], normalisation is inside.

    Raises:
        UserError: unknown name, weights that do not fit, settings that contradict.
        RunFault: weights that cannot be downloaded.
    """
    spec: ClassifierSpec
    if isinstance(model, str):
        source = hub.find_source(model, weights)
        hub.require_weights(source, weights, trust_code=trust_code)
        consent = {"trust_code": trust_code} if source.kind == "torchscript" else {}
        name, spec = model, hub.BUILDERS.get(source.kind)(source.name, weights, num_classes, **consent)
    else:
        from certify.models.callables import build_from_object

        name, spec = build_from_object(model, weights, num_classes)
        if input_size is not None and input_size[1] != input_size[2]:  # of tensors, which nobody resizes
            spec, input_size = replace(spec, input=replace(spec.input, size=input_size, transform=None)), None
    if mean is not None and spec.eight_bits:
        raise UserError(f"{name} takes 8-bit pixels and normalises them itself; drop --mean and --std")
    if spec.config_file is not None:
        _warn_of_config(name, spec.config_file, input_size, mean)
    spec = replace(spec, input=_override_input(spec.input, input_size, mean, std))
    try:
        return Classifier(name, spec, num_classes)
    except _FailsOnImages as error:
        given = f"; is --input-size {'x'.join(map(str, input_size))} the right one?" if input_size else ""
        raise UserError(f"{error}{given}") from error


def _warn_of_config(
    model: str, file: ConfigFile, size: tuple[int, int, int] | None, mean: Sequence[float] | None
) -> None:
    """Name the settings that come from a file beside the weights (or do not), if the user has not given them all."""
    left = [*(["size"] if size is None else []), *(["mean", "std"] if mean is None else [])]
    if not left:
        return
    settings = " and ".join(", ".join(left).rsplit(", ", 1))
    if file.used:
        options = " and ".join(", ".join(f"--{s}".replace("--size", "--input-size") for s in left).rsplit(", ", 1))
        verbs = ("is that", "replaces it") if left == ["size"] else ("are those", "replace them")
        text = f"{settings} {verbs[0]} of {file.path} beside the weights; {options} {verbs[1]}"
    else:
        text = f"{file.path} beside the weights describes {file.architecture}, not {model}: its {settings} "
        text += "is not used" if left == ["size"] else "are not used"
    warnings.warn(text, CertifyWarning, stacklevel=3)


_LARGE_STD = 4.0  # of pixels in [0, 1], where it is hardly meant


def _override_input(
    own: InputSpec, size: tuple[int, int, int] | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> InputSpec:
    """The model's input with the user's settings in place of its own."""
    if (mean is None) != (std is None):
        raise UserError("--mean without --std (or the reverse); give both, such as --mean 0.5 --std 0.5")
    if size is not None:
        own = square_input(size, own.mean, own.std, resize=_keep_ratio(own, size))
    if mean is not None and std is not None:
        if min(std) <= 0:
            raise UserError(f"--std {std}: expected numbers above 0")
        channels = own.size[0] if own.size else len(mean)
        if (
            len(mean) not in (1, channels)
            or len(std) not in (1, channels)
            or not all(map(math.isfinite, (*mean, *std)))
        ):
            raise UserError(f"--mean {mean} --std {std}: expected 1 or {channels} numbers each, std above 0")
        if max(mean) > 1 or max(std) > _LARGE_STD:
            in_units = " ".join(
                f"--{k} {','.join(f'{x / 255:.3g}' for x in v)}" for k, v in (("mean", mean), ("std", std))
            )
            given = f"mean {','.join(f'{x:g}' for x in mean)} and std {','.join(f'{x:g}' for x in std)}"
            warnings.warn(
                f"{given} are large for images in [0, 1]; are they in pixels of 255? that is {in_units}",
                CertifyWarning,
                stacklevel=3,
            )
        own = replace(own, mean=tuple(mean) * (channels // len(mean)), std=tuple(std) * (channels // len(std)))
    return own


def _keep_ratio(own: InputSpec, size: tuple[int, int, int]) -> int | None:
    """The resize that keeps the published ratio of resize to crop (256 to 224) at another size."""
    resize = getattr(own.transform, "resize_size", None)
    return round(size[1] * resize[0] / own.size[1]) if resize and own.size else None
