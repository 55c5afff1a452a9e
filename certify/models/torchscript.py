"""Build classifiers from TorchScript files, which are programs and run only with the user's consent."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify.errors import UserError, last_line
from certify.models.checkpoints import refuse_weights
from certify.models.classifier import ClassifierSpec, InputSpec
from certify.models.file_kind import require_consent
from certify.models.identity import file_digest
from certify.models.labels import default_class_names

_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class TorchScriptNet(nn.Module):
    """A TorchScript module for batches of any size, run in the floating-point type in which it was saved.

    The first call determines how to call it: with another dtype if its weights are frozen constants and it rejects
    float32, and one image at a time if it was traced for batches of one.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        own = next((tensor.dtype for tensor in net.state_dict().values() if tensor.is_floating_point()), None)
        self._types = _TYPES if own is None else (own,)
        self._call_as: tuple[torch.dtype, bool] | None = None

    def state_dict(self, *args: Any, **named: Any) -> Any:
        """Return the state of the wrapped module, under its own names."""
        return self.net.state_dict(*args, **named)

    def forward(self, images: Tensor, *args: Any, **named: Any) -> Any:
        """Return the module's output for images ``(B, C, H, W)``, in float32.

        Raises:
            RuntimeError: the module fails.
        """
        if self._call_as is not None:
            return self._call(*self._call_as, images, args, named)
        first: Exception | None = None
        for kind in self._types:
            for alone in (False, True) if len(images) > 1 else (False,):
                try:
                    answer = self._call(kind, alone, images, args, named)
                except Exception as error:
                    first = first or error
                    continue
                if isinstance(answer, Tensor) and answer.shape[:1] != images.shape[:1]:
                    continue  # traced for a batch of one
                if len(images) > 1:
                    self._call_as = kind, alone
                return answer
        if first is None:
            return self._call(self._types[0], False, images, args, named)
        raise first

    def _call(self, kind: torch.dtype, alone: bool, images: Tensor, args: Any, named: Any) -> Any:
        def cast(value: Any) -> Any:
            return value.to(kind) if isinstance(value, Tensor) else value

        args, named = tuple(map(cast, args)), {key: cast(value) for key, value in named.items()}
        batches = images.to(kind).split(1) if alone else [images.to(kind)]
        answers = [self.net(batch, *args, **named) for batch in batches]
        if not all(isinstance(one, Tensor) for one in answers):
            return answers[0]
        answer = torch.cat(answers) if alone else answers[0]
        return answer.float() if answer.is_floating_point() else answer


def build(name: str, weights: str | Path | None, num_classes: int | None, *, trust_code: bool) -> ClassifierSpec:
    """Build a classifier from a TorchScript file, which does not state its input size."""
    refuse_weights(name, weights)
    net = open_torchscript(name, trust_code=trust_code)
    names, digest = default_class_names(num_classes), file_digest(name)
    return ClassifierSpec(net, InputSpec(None), names, num_classes, Path(name).name, digest, native=False, closed=True)


def open_torchscript(path: str | Path, *, trust_code: bool) -> TorchScriptNet:
    """Open a TorchScript module on the CPU.

    Args:
        path: an existing file.
        trust_code: whether the user trusts the program in it.

    Raises:
        UserError: no consent, or a damaged file.
    """
    require_consent(path, trust_code=trust_code)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, but such files are in use
            return TorchScriptNet(torch.jit.load(str(path), map_location="cpu"))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"{path} is not a TorchScript file that this torch reads ({last_line(error)}); save it with torch.jit.save"
        ) from None
