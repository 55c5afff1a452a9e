"""Several noise draws of each image that should get one answer: cross-entropy with a consistency penalty.

A certified radius grows with the share of the noise that agrees, so what pulls an image's draws towards one answer
pushes radii up (Jeong and Shin 2020, "Consistency regularization for certified robustness of smoothed classifiers").
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from certify.errors import UserError
from certify.types import FAILED

ENTROPY = 0.5
"""Weight of the entropy of the mean prediction (Jeong and Shin 2020)."""


def check_draws(draws: int, consistency: float) -> None:
    """Refuse a number of draws and a weight that do not go together.

    Raises:
        UserError: no draws; a negative weight; a weight with one draw, which has nothing to agree with.
    """
    if not (isinstance(draws, int) and 1 <= draws <= 64):
        raise UserError(f"--set draws={draws}: expected a whole number from 1 to 64")
    if not 0 <= consistency < float("inf"):
        raise UserError(f"--set consistency={consistency:g}: expected a number from 0")
    if consistency and draws == 1:
        raise UserError(f"--set consistency={consistency:g}: one draw has nothing to agree with; add --set draws=2")


def agreeing_loss(logits: Tensor, target: Tensor, draws: int = 1, consistency: float = 0.0) -> Tensor:
    """Cross-entropy, plus how far an image's draws are from their mean prediction and how undecided that is.

    With p_i the prediction of draw i and p their mean: consistency * mean_i KL(p || p_i) + 0.5 H(p), averaged over
    images (Jeong and Shin 2020, equation 9).

    Args:
        logits: ``(draws * B, K)``, all images once, then all again.
        target: class indices ``(draws * B,)``; ``FAILED`` ones are left out of the cross-entropy.
        draws: of each image.
        consistency: weight; 0 is the cross-entropy alone.
    """
    loss = cross_entropy(logits, target, ignore_index=FAILED)
    if not consistency:
        return loss
    logs = logits.log_softmax(1).unflatten(0, (draws, -1))
    mean = logs.exp().mean(0)
    log_mean = mean.clamp_min(1e-12).log()
    apart = (mean * (log_mean - logs)).sum(-1).mean()
    entropy = -(mean * log_mean).sum(-1).mean()
    total: Tensor = loss + consistency * apart + ENTROPY * entropy
    return total
