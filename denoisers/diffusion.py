"""One step of a diffusion model as a denoiser (Carlini et al. 2023): one call of the network, and no training.

A diffusion model knows images in [-1, 1] at noise levels of its own: at step t the image is scaled by sqrt(abar_t) and
carries noise of standard deviation sqrt(1 - abar_t). Noise of sigma in [0, 1] is noise of 2 sigma in [-1, 1], so the
step to ask for is the first one whose noise, relative to its image, is at least 2 sigma.

The smoothing noise is added before this module and is exactly sigma; nothing is drawn here. Between two steps the
network is therefore told slightly more noise than there is. That may cost a little accuracy, never soundness: the
certificate is for the sigma that was added and holds for any function of the noisy image. (Where the denoiser draws the
noise itself, at the level of its step, rounding down would be unsound.)
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
"""What a network may have been trained to say: the noise, the image, or the mixture of both called velocity."""

_SCHEDULE = "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr".split()
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_FILES = [f"{f}{name}" for f in ("", "unet/") for name in ("config.json", _WEIGHTS)]
_FILES += [f"{f}scheduler_config.json" for f in ("", "scheduler/")]


def timestep(alphas_cumprod: Sequence[float] | Tensor, sigma: float) -> int:
    """The first step, from 1, whose noise is at least sigma: sqrt(1 - abar_t) / sqrt(abar_t) >= 2 sigma.

    Args:
        alphas_cumprod: abar_t for t = 0, 1, ..., falling.
        sigma: noise level in [0, 1] pixels.

    Returns:
        t, an index into ``alphas_cumprod``; rounded up, never down.

    Raises:
        UserError: no step has that much noise.
    """
    level = 0.0
    for t, kept in enumerate(map(float, alphas_cumprod)):
        if t and kept > 0:  # some schedules end without any image; nothing can be told from that
            level = math.sqrt(1 - kept) / math.sqrt(kept)
            if level >= 2 * sigma:
                return t
    raise UserError(f"sigma {sigma:g} is beyond this diffusion model: its noise ends at {level / 2:.4g}; lower --sigma")


class OneShot(nn.Module):
    """The clean image that a diffusion model expects behind a noisy one, after one call of the network.

    Args:
        network: ``network(x_t, t)`` with t of shape ``(B,)``, giving a tensor or an object with one as ``sample``. Of
            more channels than the images have, the first are used (the others are a learned variance).
        alphas_cumprod: the schedule it was trained with, abar_t for t = 0, 1, ...
        prediction: what the network says, one of ``PREDICTIONS``.
        multiple: the network takes sides that are multiples of this; others are padded by repeating the edge.
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
        self.alphas_cumprod = tuple(map(float, alphas_cumprod))  # not a buffer, which a change of precision would round
        self.prediction = prediction
        self.multiple = multiple
        self.name = name
        self.requires_grad_(False).eval()

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """``(B, C, H, W)`` to the same shape, in [0, 1]; deterministic.

        Args:
            noisy: images in [0, 1] plus noise.
            sigma: the noise's standard deviation in [0, 1] pixels.
            generator: not used.

        Raises:
            UserError: no level, or one beyond the model's.
        """
        if sigma is None:
            raise UserError(f"denoiser {self.name} needs the noise level: forward(noisy, sigma)")
        t = timestep(self.alphas_cumprod, sigma)
        image, noise = math.sqrt(self.alphas_cumprod[t]), math.sqrt(1 - self.alphas_cumprod[t])
        height, width = noisy.shape[-2:]
        margins = (0, -width % self.multiple, 0, -height % self.multiple)
        x_t = image * pad(2 * noisy - 1, margins, mode="replicate")
        said = self.network(x_t, torch.full((len(noisy),), t, device=noisy.device))
        said = (said if isinstance(said, Tensor) else said.sample)[:, : noisy.shape[1]]
        if self.prediction == "epsilon":
            clean = (x_t - noise * said) / image
        elif self.prediction == "sample":
            clean = said
        else:
            clean = image * x_t - noise * said
        cleaned: Tensor = (clean.clamp(-1, 1)[..., :height, :width] + 1) / 2
        return cleaned

    def describe(self) -> dict[str, Any]:
        """Name, kind of prediction and schedule, for the record."""
        return {
            "name": self.name,
            "prediction": self.prediction,
            "timesteps": len(self.alphas_cumprod),
            "schedule_sha256": hashlib.sha256(json.dumps(self.alphas_cumprod).encode()).hexdigest(),
        }


def load_diffusers(where: str) -> OneShot:
    """An unconditional diffusion model of pixels, as diffusers saves it.

    Args:
        where: a folder with ``unet`` and ``scheduler`` in it, or with ``config.json`` and ``scheduler_config.json``
            side by side; or the name of one on the model hub, OWNER/NAME. The weights must be safetensors.

    Raises:
        UserError: diffusers is missing, no such folder, or a model of another kind.
        RunFault: the hub's files cannot be had.
    """
    try:
        from diffusers import DDPMScheduler, UNet2DModel
    except ImportError:
        raise UserError("a diffusion model needs diffusers: pip install 'certify-toolkit[denoisers]'") from None
    folder = Path(where) if Path(where).is_dir() else _fetched(where)
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    config, schedule = _config(unet / "config.json"), _config(scheduler / "scheduler_config.json")
    kind = config.get("_class_name")
    if kind != "UNet2DModel" or config.get("class_embed_type") or config.get("num_class_embeds"):
        what = "a class-conditional model" if kind == "UNet2DModel" else kind
        raise UserError(f"{where} holds {what}; expected a UNet2DModel that takes pixels and nothing else")
    if "beta_schedule" not in schedule:
        found = schedule.get("_class_name")
        raise UserError(f"{where} has a {found} without beta_schedule; expected one like DDPMScheduler's")
    try:
        network, report = UNet2DModel.from_pretrained(
            unet, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
        abar = DDPMScheduler(**{key: schedule[key] for key in _SCHEDULE if key in schedule}).alphas_cumprod
    except Exception as error:  # diffusers raises many types
        raise UserError(
            f"cannot load diffusion model {where}: {first_line(error)}; "
            f"expected {_WEIGHTS} beside its config.json, as save_pretrained writes it"
        ) from error
    misfits = [f"{kind.replace('_', ' ')} {', '.join(map(str, keys[:3]))}" for kind, keys in report.items() if keys]
    if misfits:
        raise UserError(f"the weights of {where} do not fit its config.json: {'; '.join(misfits)}; save them together")
    return OneShot(
        network.float(),
        abar,
        schedule.get("prediction_type", "epsilon"),
        multiple=2 ** (len(network.config.block_out_channels) - 1),
        name=f"diffusers:{where}",
    )


def _fetched(where: str) -> Path:
    """The hub's files in the client's cache; from there alone when the hub is out of reach."""
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", where):
        raise UserError(f"no folder {where!r}; expected one saved by diffusers, or a name on the model hub: OWNER/NAME")
    from huggingface_hub import snapshot_download

    away = hub.offline() or not hub.reachable(hub.hub_address())
    try:
        return Path(snapshot_download(where, allow_patterns=_FILES, local_files_only=away))
    except Exception as error:  # the hub client and its HTTP library have their own trees of errors
        why = f"{hub.hub_address()} is out of reach" if away else first_line(error)
        raise RunFault(
            f"no folder {where!r}, and no such model could be fetched: {why}; pass a folder saved by diffusers"
        ) from error


def _config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError:
        raise UserError(
            f"no {path}; expected a folder saved by diffusers: unet and scheduler in it, or config.json and "
            "scheduler_config.json side by side"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({first_line(error)}); save the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; expected an object, as diffusers writes it")
    return content
