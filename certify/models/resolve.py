"""Resolve model names, and check that weights are available, without importing torch.

Importing timm takes seconds and the hub client retries for 47 s; a mistyped name or a missing network connection should
be reported at once.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import socket
import threading
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from certify.errors import RunFault, UserError, first_line
from certify.models.file_kind import (
    CHECKPOINT,
    ONNX,
    SAFETENSORS,
    TORCHSCRIPT,
    UNKNOWN,
    file_kind,
    require_consent,
    split_part,
    weights_kind,
)
from certify.registry import Registry, unknown_name

BUILT_IN = Registry("model")
BUILT_IN.add("digits", "certify.models.builtin:build_digits", "8x8 handwritten digits, weights in the package")
for _depth in (20, 32, 44, 56, 110):
    BUILT_IN.add(
        f"cifar_resnet{_depth}",
        "certify.models.builtin:build_cifar_resnet",
        "CIFAR-10 (He et al. 2016); needs --weights",
    )

LOCAL = "local-dir:"
"""Prefix for a folder saved by timm, as in timm's own names."""

UNTRAINED = "untrained"
"""Value of ``--weights`` for random weights, to measure speed."""

BUILDERS = Registry("classifier source", "certify.classifiers")
BUILDERS.add("built-in", "certify.models.builtin:build", "an architecture of this package, by its name")
BUILDERS.add("timm", "certify.models.pretrained:build_timm", "timm:NAME")
BUILDERS.add("torchvision", "certify.models.pretrained:build_torchvision", "torchvision:NAME")
BUILDERS.add("torchscript", "certify.models.torchscript:build", "a TorchScript file; with --trust-code")
BUILDERS.add("onnx", "certify.models.onnx_graph:build", "FILE.onnx")
BUILDERS.add("python", "certify.models.callables:build_callable", "package.module:callable")

_LIBRARIES = ("timm", "torchvision")
_BY_FORM = ("built-in", "torchscript", "onnx", "python")
"""Builders chosen by the form of a model name; other builders are chosen by a prefix."""


@dataclass(frozen=True)
class ModelSource:
    """Source of a model: ``kind`` is the builder, ``name`` its argument."""

    kind: str
    name: str


@functools.cache
def library_names(library: str) -> frozenset[str]:
    """Return the architectures that timm or torchvision registers, read from its source text.

    Importing the library takes seconds. A test compares the names with the library's own ``list_models()``.
    """
    return _in_sources(library, r"^@register_model(?:\([^)]*\))?\n(?:@[^\n]+\n)*def (\w+)\(")


@functools.cache
def torchvision_files() -> frozenset[str]:
    """Return the names of the checkpoints that torchvision publishes, such as ``resnet50-0676ba61.pth``."""
    return _in_sources("torchvision", r"https://download\.pytorch\.org/models/([\w.\-]+\.pth)")


def _in_sources(library: str, pattern: str) -> frozenset[str]:
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        return frozenset()
    files = (Path(spec.origin).parent / "models").glob("*.py")
    names = re.compile(pattern, re.MULTILINE)
    return frozenset(name for file in files for name in names.findall(file.read_text(encoding="utf-8")))


def is_file(path: str | Path) -> bool:
    """True if ``path`` is a file; False for a name too long for the file system."""
    try:
        return Path(path).is_file()
    except OSError:
        return False


def is_folder(path: str) -> bool:
    """True if ``path`` is a folder; False for a name too long for the file system."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False


def model_names() -> list[str]:
    """Return every name that ``--model`` accepts without a prefix."""
    return [*BUILT_IN, *sorted(library_names("timm") | library_names("torchvision"))]


def find_source(model: str, weights: str | Path | None = None) -> ModelSource:  # noqa: PLR0911 - one return per form
    """Find the source of the model given as ``--model``.

    A name in both timm and torchvision means timm's, unless ``weights`` is a checkpoint that torchvision publishes: the
    two libraries crop and resize differently.

    Raises:
        UserError: an unknown name (the message suggests the nearest), or a file that does not exist.
    """
    if model in BUILT_IN:
        return ModelSource("built-in", model)
    if re.fullmatch(r"hf[-_]hub:[^/]+/[^/]+", model):
        return ModelSource("timm", "hf-hub:" + model[7:])
    library, _, rest = model.partition(":")
    if library in _LIBRARIES and rest:
        if rest.split(".")[0] not in library_names(library):
            raise unknown_name("model", rest, library_names(library), f"not in {library}")
        return ModelSource(library, rest)
    if rest and library not in _BY_FORM and library in BUILDERS:
        return ModelSource(library, rest)
    file, _, output = model.partition("::")
    if is_file(file):
        return _file_source(file, output)
    if is_folder(model) and (model not in model_names() or "/" in model):
        return _folder_source(model)
    if Path(model).suffix.lower() in (".onnx", ".pt", ".ts", ".torchscript"):
        raise UserError(f"no model file {model!r}; expected an existing TorchScript or ONNX file")
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", model):
        return ModelSource("python", model)
    architecture = model.split(".", maxsplit=1)[0]
    of_torchvision = weights is not None and split_part(weights)[0].name in torchvision_files()
    for library in reversed(_LIBRARIES) if of_torchvision else _LIBRARIES:
        if architecture in library_names(library):
            return ModelSource(library, model)
    raise unknown_name("model", model, model_names(), "or a TorchScript or ONNX file, or package.module:callable")


def _file_source(model: str, output: str) -> ModelSource:
    """Return the source of a model file, recognised by content."""
    kind = file_kind(model)
    if kind in (CHECKPOINT, SAFETENSORS):
        raise UserError(f"{model} contains weights alone; pass the architecture as --model and --weights {model}")
    if kind == UNKNOWN:
        raise UserError(
            f"{model} is neither TorchScript nor ONNX (.onnx); expected a model file, or NAME --weights FILE"
        )
    if output and kind != ONNX:
        raise UserError(f"{model}::{output}: only an ONNX file has outputs by name; write {model}")
    if kind == TORCHSCRIPT:
        return ModelSource("torchscript", model)
    return ModelSource("onnx", f"{model}::{output}" if output else model)


def _folder_source(folder: str) -> ModelSource:
    """Return the source of a folder in the model hub's layout, from its ``config.json``.

    Raises:
        UserError: no such file, or a model of a library other than timm.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder} is a folder without a readable config.json ({first_line(error)}); expected a model file, or "
            "a folder saved by timm"
        ) from None
    if isinstance(config, dict) and isinstance(config.get("architecture"), str):
        return ModelSource("timm", LOCAL + folder)
    if isinstance(config, dict) and "_class_name" in config:
        raise UserError(f"{folder} contains a diffusers network, not a classifier; pass --denoiser diffusers:{folder}")
    kinds = config.get("architectures") if isinstance(config, dict) else None
    which = f" ({', '.join(map(str, kinds[:3]))})" if isinstance(kinds, list) else ""
    raise UserError(
        f"{folder} contains a transformers model{which}, not a timm one; load it in your own function that returns it "
        "and pass that: --model package.module:function"
    )


def require_weights(source: ModelSource, weights: str | Path | None, *, trust_code: bool = False) -> None:
    """Check that the weights are available or can be downloaded, and that running the model is allowed.

    Raises:
        RunFault: weights that cannot be downloaded.
        UserError: no such file, a built-in architecture without published weights, or TorchScript without consent.
    """
    if source.kind == "torchscript":
        require_consent(source.name, trust_code=trust_code)
    if weights == UNTRAINED and source.kind in ("built-in", *_LIBRARIES):
        return
    if weights is not None:
        if not is_file(split_part(weights)[0]):
            raise UserError(
                f"no weights file {str(weights)!r}; expected an existing .pth, .pt, .th, .tar or .safetensors file"
            )
        weights_kind(weights)
        return
    if source.kind == "built-in" and source.name != "digits":
        raise UserError(f"model {source.name!r} has no weights of its own; pass a checkpoint: --weights FILE")
    if source.kind not in _LIBRARIES or source.name.startswith(LOCAL):
        return
    address = hub_address() if source.kind == "timm" else "https://download.pytorch.org"
    out_of_reach = offline() or not reachable(address)
    if out_of_reach and cached(source):
        os.environ["HF_HUB_OFFLINE"] = "1"  # otherwise the hub client retries for 47 s before it uses its cache
    elif out_of_reach:
        why = "HF_HUB_OFFLINE is set" if offline() else f"{address} does not answer"
        raise RunFault(cannot_fetch(source.name, why))


def cannot_fetch(name: str, why: str) -> str:
    """Return the error message for weights that could not be downloaded."""
    return f"could not fetch the pretrained weights of {name!r}: {why}; pass a local checkpoint with --weights FILE"


def hub_address() -> str:
    """Return the model hub's URL."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def offline() -> bool:
    """True if the user has set the hub client to offline mode."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def cached(source: ModelSource) -> bool:
    """True if the cache of the hub client or of torch may contain weights of this model."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    hub_cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    torch_home = Path(os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch")
    if source.kind == "torchvision":
        names = {file.name for file in (torch_home / "hub" / "checkpoints").expanduser().glob("*.pth")}
        if not names:
            return False
        from torchvision.models import get_model_weights  # takes seconds, but only torchvision knows its file names

        return Path(get_model_weights(source.name).DEFAULT.url).name in names
    if source.name.startswith("hf-hub:"):
        folder = f"models--{source.name[7:].partition('@')[0].replace('/', '--')}"
    else:
        folder = f"models--timm--{source.name}" + ("" if "." in source.name else ".*")
    files = (file for suffix in ("safetensors", "bin") for file in hub_cache.glob(f"{folder}/snapshots/*/*.{suffix}"))
    return any(file.exists() for file in files)


def reachable(address: str) -> bool:
    """True if the address or its proxy accepts a connection within one second, DNS included."""
    seconds = 1.0
    parts = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else "//" + proxy)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    opened: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((parts.hostname, port), timeout=seconds).close()
            opened.append(True)
        except OSError:
            pass

    probe = threading.Thread(target=connect, daemon=True)  # name resolution has no timeout of its own
    probe.start()
    probe.join(seconds)
    return bool(opened)
