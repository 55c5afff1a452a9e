"""One step of a diffusion model as a denoiser (Carlini et al. 2023): one forward pass, no training.

A diffusion model works on images in [-1, 1] at its own noise levels: at step t the image is scaled by sqrt(abar_t) and
has noise of standard deviation sqrt(1 - abar_t). Noise of sigma on [0, 1] is noise of 2 sigma on [-1, 1], so the
matching step is the first whose noise, relative to its image, is at least 2 sigma.

The smoothing noise is added before this module and is exactly sigma; nothing is drawn here. Between two steps the
network is therefore given a slightly higher level than the actual one. That may cost some accuracy but never soundness:
the certificate is for the sigma that was added, and holds for any function of the noisy image. (If the denoiser drew
the noise itself, at the level of its step, rounding down would be unsound.)
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from certify.errors import RunFault, UserError, first_line
from certify.models import resolve as hub

PREDICTIONS = ("epsilon", "sample", "v_prediction")
"""Possible outputs of a network: the noise, the image, or the combination of both called velocity."""

_SCHEDULE = "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr".split()
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_FILES = [f"{f}{name}" for f in ("", "unet/") for name in ("config.json", _WEIGHTS)]
_FILES += [f"{f}scheduler_config.json" for f in ("", "scheduler/")]


def timestep(alphas_cumprod: Sequence[float] | Tensor, sigma: float) -> int:
    """Return the first step t >= 1 whose noise is at least sigma: sqrt(1 - abar_t) / sqrt(abar_t) >= 2 sigma.

    Args:
        alphas_cumprod: abar_t for t = 0, 1, ..., decreasing.
        sigma: noise level in [0, 1] pixels.

    Returns:
        An index into ``alphas_cumprod``.

    Raises:
        UserError: no step has that much noise.
    """
    level = 0.0
    for t, kept in enumerate(map(float, alphas_cumprod)):
        if t and kept > 0:  # some schedules end in pure noise
            level = math.sqrt(1 - kept) / math.sqrt(kept)
            if level >= 2 * sigma:
                return t
    raise UserError(f"sigma {sigma:g}: this diffusion model covers noise up to {level / 2:.4g}; use a lower --sigma")


class OneShot(nn.Module):
    """A diffusion model's estimate of the clean image from one forward pass.

    Args:
        network: ``network(x_t, t)`` with t of shape ``(B,)``, returning a tensor or an object with a tensor ``sample``.
            Extra output channels (a learned variance) are dropped.
        alphas_cumprod: schedule of its training, abar_t for t = 0, 1, ...
        prediction: output of the network, one of ``PREDICTIONS``.
        multiple: sides are padded to multiples of this by repeating the edge.
        name: for the record.

    Raises:
        UserError: an unknown kind of prediction.
    """

    def __init__(
        self,
        network: nn.Module,
        alphas_cumprod: Sequence[float] | Tensor,
        prediction: str = "epsilon",
        *,
        multiple: int = 1,
        name: str = "diffusion",
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise UserError(f"{name} has prediction_type {prediction!r}; expected one of {', '.join(PREDICTIONS)}")
        self.network = network
        self.alphas_cumprod = tuple(map(float, alphas_cumprod))  # not a buffer, which a cast would round
        self.prediction = prediction
        self.multiple = multiple
        self.name = name
        self.requires_grad_(False).eval()

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Denoise ``(B, C, H, W)``; the result is in [0, 1], deterministic.

        Args:
            noisy: images in [0, 1] plus noise.
            sigma: standard deviation of the noise in [0, 1] pixels.
            generator: not used.

        Raises:
            UserError: no level, or one above the model's.
        """
        if sigma is None:
            raise UserError(f"denoiser {self.name} needs the noise level: forward(noisy, sigma)")
        t = timestep(self.alphas_cumprod, sigma)
        image, noise = math.sqrt(self.alphas_cumprod[t]), math.sqrt(1 - self.alphas_cumprod[t])
        height, width = noisy.shape[-2:]
        margins = (0, -width % self.multiple, 0, -height % self.multiple)
        x_t = image * pad(2 * noisy - 1, margins, mode="replicate")
        output = self.network(x_t, torch.full((len(noisy),), t, device=noisy.device))
        output = (output if isinstance(output, Tensor) else output.sample)[:, : noisy.shape[1]]
        if self.prediction == "epsilon":
            clean = (x_t - noise * output) / image
        elif self.prediction == "sample":
            clean = output
        else:
            clean = image * x_t - noise * output
        cleaned: Tensor = (clean.clamp(-1, 1)[..., :height, :width] + 1) / 2
        return cleaned

    def describe(self) -> dict[str, Any]:
        """Return name, kind of prediction and schedule, for the record."""
        return {
            "name": self.name,
            "prediction": self.prediction,
            "timesteps": len(self.alphas_cumprod),
            "schedule_sha256": hashlib.sha256(json.dumps(self.alphas_cumprod).encode()).hexdigest(),
        }


def load_diffusers(where: str) -> OneShot:
    """Load an unconditional pixel-space diffusion model in the format of diffusers.

    Args:
        where: a folder with ``unet`` and ``scheduler``, or with ``config.json`` and ``scheduler_config.json``; or
            OWNER/NAME on the model hub. The weights must be safetensors.

    Raises:
        UserError: diffusers is not installed, no such folder, or a model of another kind.
        RunFault: the files cannot be fetched from the hub.
    """
    try:
        from diffusers import DDPMScheduler, UNet2DModel
    except ImportError:
        raise UserError("a diffusion model needs diffusers: pip install 'certify-toolkit[denoisers]'") from None
    folder = Path(where) if Path(where).is_dir() else _fetch(where)
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    config, schedule = _read_json(unet / "config.json"), _read_json(scheduler / "scheduler_config.json")
    kind = config.get("_class_name")
    if kind != "UNet2DModel" or config.get("class_embed_type") or config.get("num_class_embeds"):
        got = "a class-conditional model" if kind == "UNet2DModel" else kind
        raise UserError(f"{where} holds {got}; expected an unconditional UNet2DModel on pixels")
    if "beta_schedule" not in schedule:
        got = schedule.get("_class_name")
        raise UserError(f"{where} has a {got} without beta_schedule; expected one like DDPMScheduler")
    try:
        network, report = UNet2DModel.from_pretrained(
            unet, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
        abar = DDPMScheduler(**{key: schedule[key] for key in _SCHEDULE if key in schedule}).alphas_cumprod
    except Exception as error:  # diffusers raises many types
        raise UserError(
            f"cannot load diffusion model {where}: {first_line(error)}; "
            f"expected {_WEIGHTS} next to its config.json, as save_pretrained writes it"
        ) from error
    mismatches = [f"{kind.replace('_', ' ')} {', '.join(map(str, k[:3]))}" for kind, k in report.items() if k]
    if mismatches:
        raise UserError(
            f"the weights of {where} do not fit its config.json: {'; '.join(mismatches)}; save them together"
        )
    return OneShot(
        network.float(),
        abar,
        schedule.get("prediction_type", "epsilon"),
        multiple=2 ** (len(network.config.block_out_channels) - 1),
        name=f"diffusers:{where}",
    )


def _fetch(where: str) -> Path:
    """Fetch files from the hub into its cache; use the cache alone if the hub is unreachable."""
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", where):
        raise UserError(f"no folder {where!r}; expected one saved by diffusers, or a name on the model hub: OWNER/NAME")
    from huggingface_hub import snapshot_download

    offline = hub.offline() or not hub.reachable(hub.hub_address())
    try:
        return Path(snapshot_download(where, allow_patterns=_FILES, local_files_only=offline))
    except Exception as error:  # of the hub client or its HTTP library
        reason = f"{hub.hub_address()} is unreachable" if offline else first_line(error)
        raise RunFault(
            f"no folder {where!r}, and the model could not be fetched: {reason}; pass a folder saved by diffusers"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError:
        raise UserError(
            f"no {path}; expected a folder saved by diffusers, with unet and scheduler, or with config.json "
            "and scheduler_config.json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({first_line(error)}); save the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; expected an object, as diffusers writes")
    return content
