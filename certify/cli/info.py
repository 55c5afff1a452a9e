"""``certify list`` and ``certify doctor``: available components, and a self-test of the installation."""

from __future__ import annotations

import functools
import importlib.util
import json
import pkgutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from certify.cli.console import tell
from certify.cli.option_groups import JsonOptions
from certify.cli.options import command
from certify.errors import RunFault

if TYPE_CHECKING:
    from certify.registry import Registry

EXTRAS = {
    "onnx": ("onnxruntime",),
    "train": ("accelerate", "skimage", "tensorboard"),
    "denoisers": ("deepinv", "diffusers"),
    "attacks": ("art", "multiprocess", "foolbox"),
    "audit": ("aiolimiter", "httpx2", "jinja2", "jmespath", "stamina"),
    "aws": ("boto3",),
    "cluster": ("ray", "grpc"),
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
    "docs": ("mkdocs", "material", "mkdocstrings"),
    "test": ("pytest", "flint"),
    "dev": ("coverage", "pre_commit"),
}


def _registered(where: str) -> Callable[[], Registry]:
    """Return a loader of the registry ``package.module:NAME``; some import torch."""
    return functools.partial(pkgutil.resolve_name, where)


def _registries() -> dict[str, Callable[[], Registry]]:
    return {
        "datasets": _registered("certify.images.sources:DATASETS"),
        "denoisers": _denoisers,
        "architectures": _registered("denoisers:ARCHITECTURES"),
        "defences": _registered("denoisers:DEFENCES"),
        "attacks": _registered("analysis.attacks:ATTACKS"),
        "objectives": _objectives,
        "noises": _registered("certify.smoothing.noise:NOISES"),
        "bounds": _registered("certify.smoothing.bounds:BOUNDS"),
        "rules": _registered("certify.smoothing.stopping_rules:RULES"),
        "sources": _registered("certify.models.resolve:BUILDERS"),
        "protocols": _registered("certify.blackbox.protocols:FORMATS"),
    }


def _objectives() -> Registry:
    """Return the values of ``certify train --objective``."""
    from certify.registry import Registry
    from training.losses import OBJECTIVES, PHASES

    objectives = Registry("objective")
    for name in OBJECTIVES:
        objectives.add(name, "", OBJECTIVES.note(name))
    for name, parts in PHASES.items():
        objectives.add(name, "", f"{parts[0]}, then fine-tuned for {parts[1]}")
    return objectives


def _denoisers() -> Registry:
    """Return the values of ``--denoiser``: denoisers without weights, those shipped, and every other form."""
    from certify.registry import Registry
    from denoisers import DENOISERS
    from denoisers.find import shipped

    denoisers = Registry("denoiser")
    for name in DENOISERS:
        denoisers.add(name, "", DENOISERS.note(name))
    for name, card in shipped().items():
        size = "x".join(map(str, card.image))
        through = f" through {', '.join(c['name'] for c in card.classifiers)}" if card.classifiers else ""
        use = f", for the defence {card.purifier}" if card.purifier else ""
        levels = f"sigma {card.levels()}" if card.sigmas else "no noise"
        denoisers.add(name, "", f"{card.architecture} for {size}, {levels}: {card.objective}{through}{use}")
    for form, note in FORMS.items():
        denoisers.add(form, "", note)
    return denoisers


FORMS = {
    "auto": "the best shipped denoiser for these images, noise and classifier",
    "FILE.safetensors": "weights written by `certify train`",
    "ARCH=CHECKPOINT": "weights without a card: dncnn=FILE, memnet=FILE, ...",
    "FILE.pt": "TorchScript",
    "module:callable": "any Python function or module",
    "deepinv:NAME[=FILE]": "a model of deepinv, such as deepinv:DRUNet (extra: denoisers)",
    "diffusers:FOLDER": "a diffusion model as one-shot denoiser (extra: denoisers)",
}
"""Values of ``--denoiser`` besides names."""


@command("List models, datasets, denoisers, objectives, ...", name="list")
@click.argument("kind", required=False)
@click.argument("pattern", required=False)
def list_(kind: str | None, pattern: str | None) -> None:
    """List the available components of a KIND: models, datasets, denoisers, architectures, defences, attacks, ...

    Without KIND: all kinds with their names. PATTERN filters by part of the name.
    """
    from certify.registry import unknown_name

    if kind is None:
        for name, load_registry in _registries().items():
            tell(f"{name:<13} {', '.join(load_registry())}")
        tell("models        see `certify list models [PATTERN]`")
        return
    if kind in ("models", "model"):
        _list_models(pattern or "")
        return
    registries = _registries()
    load = registries.get(kind) or registries.get(kind + "s")
    if load is None:
        raise unknown_name("kind", kind, ["models", *registries])
    registry = load()
    shown = [name for name in registry if (pattern or "") in name]
    if pattern and not shown:
        raise unknown_name(registry.kind, pattern, registry)
    width = max([20, *map(len, shown)])
    for name in shown:
        tell(f"{name:<{width}} {registry.note(name)}")


def _list_models(pattern: str) -> None:
    from certify.models import resolve as hub

    timm, torchvision = hub.library_names("timm"), hub.library_names("torchvision")
    rows = [(name, hub.BUILT_IN.note(name)) for name in hub.BUILT_IN]
    rows += [
        (name, " and ".join(lib for lib, has in (("timm", timm), ("torchvision", torchvision)) if name in has))
        for name in sorted(timm | torchvision)
    ]
    shown = [(name, note) for name, note in rows if pattern in name]
    if not shown:
        from certify.registry import unknown_name

        raise unknown_name("model", pattern, [name for name, _ in rows])
    for name, note in shown:
        tell(f"{name:<40} {note}")


@command("Show versions, devices, extras; test the mathematics.")
def doctor(output: JsonOptions) -> None:
    """Show versions, devices, extras and the model hub, and test the mathematics against known values."""
    from certify.models import resolve as hub

    start = time.perf_counter()
    report: dict[str, Any] = {"hub": _hub(hub)}
    import torch

    from certify.engine.hardware import in_threads, machine_name
    from certify.runs.config import versions

    report["versions"] = versions()
    report["devices"] = [f"cpu ({in_threads(torch.get_num_threads())}, {machine_name(torch.device('cpu'))})"]
    report["devices"] += [
        f"cuda:{i} ({machine_name(torch.device('cuda', i))})" for i in range(torch.cuda.device_count())
    ]
    report["extras"] = {extra: all(_installed(package) for package in packages) for extra, packages in EXTRAS.items()}
    report["checks"] = self_test()
    report["seconds"] = round(time.perf_counter() - start, 1)
    if output.as_json:
        tell(json.dumps(report))
    else:
        _print(report)
    failed = [name for name, passed in report["checks"].items() if not passed]
    if failed:
        raise RunFault(f"self-test failed: {'; '.join(failed)}; do not use results of this installation")


def _installed(package: str) -> bool:
    """Return True if the package is installed; imports nothing but the parents of a dotted name."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _hub(hub: Any) -> str:
    if hub.offline():
        return "not contacted (HF_HUB_OFFLINE is set)"
    address = hub.hub_address()
    return f"{address} answers" if hub.reachable(address) else f"{address} does not answer; use --weights FILE"


def _print(report: dict[str, Any]) -> None:
    tell("versions   " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    tell("devices    " + ", ".join(report["devices"]))
    tell("extras     " + ", ".join(f"{k}: {'yes' if v else 'no'}" for k, v in report["extras"].items()))
    tell("model hub  " + report["hub"])
    for name, passed in report["checks"].items():
        tell(f"{'ok  ' if passed else 'FAIL'}       {name}")
    tell(f"({report['seconds']} s)")


def self_test() -> dict[str, bool]:
    """Check known values of bound, radius and noise, and one certificate of a classifier whose radius is known."""
    import torch

    from certify.smoothed_classifier import SmoothedClassifier
    from certify.smoothing.bounds import clopper_pearson_lower
    from certify.smoothing.noise import Gaussian
    from certify.smoothing.rng import block_generator, stream_key

    bound = clopper_pearson_lower(990, 1000, 0.001)
    radius = Gaussian(1.0).radius(clopper_pearson_lower(100, 100, 0.001))
    key = stream_key(0, "doctor", "estimation")
    noise = torch.randn(100_000, generator=block_generator(key, 0))
    again = torch.randn(100_000, generator=block_generator(key, 0))
    other = torch.randn(100_000, generator=block_generator(key, 1))

    class HalfSpace:
        num_classes = 2

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return (images.mean(dim=(1, 2, 3)) > 0.5).long()

        def describe(self) -> dict[str, Any]:
            return {"name": "half space"}

    image = torch.full((1, 4, 4), 0.6)  # its distance from the boundary is 0.1 * sqrt(16) = 0.4
    certificate = SmoothedClassifier(HalfSpace(), 0.25).certify(image, n=10_000)
    return {
        "Clopper-Pearson bound of 990 in 1,000 at alpha 0.001 is 0.976036": abs(bound - 0.976036187) < 1e-9,
        "largest radius at n = 100, alpha 0.001 is 1.5005 sigma": abs(radius - 1.5005) < 1e-4,
        "noise is reproducible, standard normal, and differs between blocks": bool(
            (noise == again).all()
            and abs(noise.mean()) < 0.015
            and abs(noise.std() - 1) < 0.01
            and (noise != other).any()
        ),
        "certificate of a half-space is below its true radius 0.4 and near it": 0.36 < certificate.radius <= 0.4,
    }
