"""Adapters for external denoisers: deepinv, any Python callable, TorchScript.

Whether a denoiser fulfils its contract is checked on the first real image (:mod:`certify.engine.contract`).
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certify.errors import RunFault, UserError, first_line
from certify.models.callables import build_object, code_digest
from certify.models.checkpoints import load_weights
from certify.models.file_kind import split_part
from certify.models.identity import describe_module, file_digest
from certify.models.resolve import UNTRAINED, is_file
from certify.models.torchscript import open_torchscript
from certify.registry import unknown_name

_LEVELS = ("sigma", "ths", "noise_level")
"""Names of the noise level in other libraries (``ths``: the threshold of deepinv's variational denoisers)."""

_CHANNELS = ("in_channels", "out_channels", "in_nc", "in_chans", "img_channels", "channels")
"""Names of the number of image channels in deepinv's classes."""

_Parameters = list[tuple[str, bool]]
"""Name of each argument of a forward function, in order, and True if it is required."""


class Adapted(nn.Module):
    """An external denoiser, called with the noise level by name, by position, or without it.

    It is in evaluation mode, and its weights require no gradients.

    Args:
        inner: a module, or a function of noisy images.
        facts: result of ``describe``; at least ``name``.
        parameters: of its forward, if Python cannot inspect them.
        tensor_level: pass the level as a tensor without dimensions instead of a number.
        restarts: run one image at a time, each after a reset (``restart = True``).
        closed: True if ``facts`` and tensors determine the function; if not, records hold a fingerprint of it.

    Raises:
        UserError: it requires arguments besides images and a level.
    """

    def __init__(
        self,
        inner: Any,
        facts: dict[str, Any],
        parameters: _Parameters | None = None,
        *,
        tensor_level: bool = False,
        restarts: bool = False,
        closed: bool = True,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.facts = facts
        self.tensor_level = tensor_level
        self.restarts = restarts
        self.closed = closed
        if parameters is None:
            parameters = _parameters(inner.forward if isinstance(inner, nn.Module) else inner)
        self.level = _level(parameters)
        given = {self.level, parameters[1][0]} if self.level == "" else {self.level}
        unmet = [name for name, needed in parameters[1:] if needed and name not in given]
        if not parameters or unmet:
            wants = f"also requires {', '.join(unmet)}" if unmet else "takes no arguments"
            raise UserError(f"denoiser {facts['name']} {wants}; expected forward(noisy) or forward(noisy, sigma)")
        self.requires_grad_(False).eval()

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Denoise ``(B, C, H, W)``; ``generator`` is not used.

        Raises:
            UserError: it needs the noise level, and none is given.
        """
        if not self.restarts:
            return self._answer(noisy, sigma)
        answers = []
        for image in noisy.split(1):
            self.inner.restart = True
            answers.append(self._answer(image, sigma))
        return torch.cat(answers)

    def _answer(self, noisy: Tensor, sigma: float | None) -> Tensor:
        if self.level is None:
            output = self.inner(noisy)
        elif sigma is None:
            raise UserError(f"denoiser {self.facts['name']} needs the noise level: forward(noisy, sigma)")
        else:
            level = torch.tensor(sigma, dtype=noisy.dtype, device=noisy.device) if self.tensor_level else sigma
            output = self.inner(noisy, **{self.level: level}) if self.level else self.inner(noisy, level)
        if isinstance(self.inner, nn.Module):
            answer: Tensor = output
            return answer
        return (output if isinstance(output, Tensor) else torch.as_tensor(np.asarray(output))).to(noisy)

    def describe(self) -> dict[str, Any]:
        """Return ``facts``, for the record."""
        return dict(self.facts)


def _level(parameters: _Parameters) -> str | None:
    """Return how the level is passed: by this name, by position (empty), or not at all (None)."""
    named = next((name for name, _ in parameters[1:] if name in _LEVELS), None)
    if named is not None:
        return named
    return "" if len(parameters) > 1 and parameters[1][1] else None


def _parameters(function: Callable[..., Any]) -> _Parameters:
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions have no signature
        return [("", True)]
    single = [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)] or found[:1]
    return [("" if p.kind == p.POSITIONAL_ONLY else p.name, p.default is p.empty) for p in single]


def _takes_level(module: nn.Module) -> bool:
    """Return True if ``module(noisy, sigma)`` is a complete call with the level in its place, by its signature."""
    try:
        found = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return True
    if any(p.kind is p.VAR_POSITIONAL for p in found):
        return True
    others = [p for p in found if p.kind is not p.VAR_KEYWORD][1:]
    if not others or others[0].kind is inspect.Parameter.KEYWORD_ONLY or any(p.default is p.empty for p in others[1:]):
        return False
    return _level(_parameters(module.forward)) in ("", others[0].name)


def adapt(denoiser: Any) -> nn.Module:
    """Wrap a module or function, with or without a noise level among its arguments, as a denoiser.

    A module that can be called as ``forward(noisy, sigma)`` is returned as it is.

    Raises:
        UserError: neither a module nor a function, or it needs more than images and a level.
    """
    if not callable(denoiser) or isinstance(denoiser, type):
        kind = f"the class {denoiser.__name__}" if isinstance(denoiser, type) else type(denoiser).__name__
        raise UserError(
            f"denoiser = {kind}: expected a module or a function f(noisy, sigma), or the name of a denoiser"
        )
    if isinstance(denoiser, nn.Module):
        return denoiser if _takes_level(denoiser) else Adapted(denoiser, describe_module(denoiser), closed=False)
    own = denoiser if hasattr(denoiser, "__qualname__") else type(denoiser)
    facts = {"name": str(own.__qualname__), "code_sha256": code_digest(own.__module__)}
    return Adapted(denoiser, facts, closed=False)


def load_deepinv(name: str, weights: str | Path | None = None, channels: int = 3) -> nn.Module:
    """Load a denoiser of deepinv by the name of its class, such as ``DRUNet``.

    Denoisers that iterate until a whole batch has converged, starting from the previous result (total variation), get
    one image at a time, each after a reset; their threshold is sigma.

    Args:
        name: in ``deepinv.models``; built with its defaults.
        weights: a checkpoint; None: the published weights are downloaded.
        channels: of the images.

    Raises:
        UserError: deepinv is not installed, an unknown name (the nearest ones are listed), or weights that do not fit.
        RunFault: weights that cannot be downloaded.
    """
    label = f"deepinv:{name}"
    if weights is not None and weights != UNTRAINED and not is_file(split_part(weights)[0]):
        raise UserError(f"no weights file {str(weights)!r} for {label}; expected an existing checkpoint")
    try:
        from deepinv import models
    except ImportError:
        raise UserError(f"{label} needs deepinv: pip install 'certify-toolkit[denoisers]'") from None
    known = {key: build for key, build in vars(models).items() if _builds_denoiser(build, models.Denoiser)}
    if name not in known:
        raise unknown_name("denoiser", name, known, "not in deepinv.models")
    accepted = inspect.signature(known[name]).parameters
    options: dict[str, Any] = {
        key: channels for key in _CHANNELS if key in accepted and isinstance(accepted[key].default, int)
    }
    published = "pretrained" in accepted
    if published:
        options["pretrained"] = (accepted["pretrained"].default or "download") if weights is None else None
    try:
        with _quick_and_safe():
            net: nn.Module = known[name](**options)
    except Exception as error:  # deepinv's own types, and those of the packages it needs
        reason = first_line(error)
        if weights is None and published and isinstance(error, OSError):
            raise RunFault(f"could not fetch the weights of {label}: {reason}; pass a file: {label}=FILE") from error
        advice = f"; pass its weights in a file: {label}=FILE" if weights is None and published else ""
        raise UserError(f"cannot build {label} for {channels} channels: {reason}{advice}") from error
    trained = next(net.parameters(), None) is not None
    if trained and weights is None and not published:
        raise UserError(f"deepinv publishes no weights for {name}; pass them in a file: {label}=FILE")
    if not trained and weights is not None:
        raise UserError(f"{label} has no weights to load {weights} into; write {label}")
    loaded = "none" if not trained else "published" if weights is None else load_weights(net, weights, label)
    facts = {"name": label, "version": version("deepinv"), "channels": channels, "weights": loaded}
    return Adapted(net, facts, restarts=hasattr(net, "restart"))


def _builds_denoiser(found: Any, base: type) -> bool:
    """Return True for a denoiser class, or a function that builds one, that works without arguments."""
    if not (inspect.isclass(found) and issubclass(found, base) and found is not base) and not inspect.isfunction(found):
        return False
    parameters = _parameters(found)
    of_class = inspect.isclass(found) or "pretrained" in dict(parameters)
    return of_class and not any(needed for _, needed in parameters)


@contextlib.contextmanager
def _quick_and_safe() -> Iterator[None]:
    """Skip orthogonal initialisation, forbid pickled code, and keep stdout clean while a network is built.

    Its weights are replaced anyway. deepinv's DRUNet spends half a minute on orthogonal weights, and its downloads are
    unpickled without restrictions unless torch forbids it.
    """
    orthogonal, variable = nn.init.orthogonal_, "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    nn.init.orthogonal_ = lambda tensor, *_, **__: tensor
    os.environ[variable] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        nn.init.orthogonal_ = orthogonal
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


def load_callable(spec: str) -> nn.Module:
    """Load ``package.module:callable``: a module, a function ``f(noisy)`` or ``f(noisy, sigma)``, or a factory.

    A class or function that works without arguments is called, and must return a module or such a function.

    Raises:
        UserError: it cannot be imported, fails, or is none of these.
    """
    loaded, code = build_object(spec)
    if isinstance(loaded, type):
        raise UserError(f"{spec} is a class that needs arguments; expected a function without arguments that builds it")
    if not callable(loaded):
        raise UserError(f"{spec} gave {type(loaded).__name__}; expected a module or a function f(noisy, sigma)")
    return Adapted(loaded, {"name": spec, "code_sha256": code}, closed=False)


def load_torchscript(path: str | Path, *, trust_code: bool) -> nn.Module:
    """Load a TorchScript file whose forward takes ``(noisy)`` or ``(noisy, sigma)``, sigma as a number or a tensor.

    Args:
        path: of the file.
        trust_code: True if the user trusts the program in it.

    Raises:
        UserError: no such file, no consent, not TorchScript, or a forward with other arguments.
    """
    if not is_file(path):
        raise UserError(f"no TorchScript file {str(path)!r}; expected one saved by torch.jit.save")
    net = open_torchscript(path, trust_code=trust_code)
    try:
        _, *arguments = net.net.forward.schema.arguments
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"{path} has no forward that can be called ({first_line(error)})") from None
    parameters = [(argument.name, not argument.has_default_value()) for argument in arguments]
    kinds = {argument.name: str(argument.type) for argument in arguments}
    level = _level(parameters)
    kind = kinds[level or parameters[1][0]] if level is not None else "float"
    if kind not in ("float", "Optional[float]", "Tensor", "Optional[Tensor]"):
        raise UserError(f"{path} takes the noise level as {kind}; expected a float or a Tensor")
    facts = {"name": Path(path).name, "code_sha256": file_digest(path)}
    return Adapted(net, facts, parameters, tensor_level="Tensor" in kind)
