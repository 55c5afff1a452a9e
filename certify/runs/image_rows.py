"""One image's line of the run file from its answer: pure, for live and recomputed runs alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from certify.errors import UserError
from certify.smoothing.noise import make_noise
from certify.smoothing.norms import in_norm
from certify.smoothing.procedures import Answer, procedure_of
from certify.types import Certificate, Decision, Prediction, Radii, Votes


def answer_row(answer: Answer) -> dict[str, Any]:
    """Return the keys of an image's line that its answer determines."""
    if isinstance(answer, Decision):
        return decided_row(answer)
    return predicted_row(answer) if isinstance(answer, Prediction) else certified_row(answer)


def certified_row(certificate: Certificate) -> dict[str, Any]:
    """The keys of a certificate."""
    return {
        "prediction": certificate.prediction,
        "radius": certificate.radius,
        "p_lower": certificate.p_lower,
        "p_other": certificate.p_other,
        **_stages(certificate.selection, certificate.estimation),
    }


def decided_row(decision: Decision) -> dict[str, Any]:
    """The keys of a decision; its radius is the largest that was settled as robust."""
    return {
        "prediction": decision.prediction,
        "radius": decision.radius,
        "p_lower": None,
        **_stages(Votes(()), decision.votes),
        "decisions": [
            {"radius": radius, "outcome": outcome, "look": list(look)}
            for radius, outcome, look in zip(decision.radii, decision.outcomes, decision.looks, strict=True)
        ],
        "drawn": decision.drawn,
    }


def predicted_row(predicted: Prediction) -> dict[str, Any]:
    """The keys of a prediction."""
    return {
        "prediction": predicted.prediction,
        "radius": None,
        "p_lower": None,
        **_stages(Votes(()), predicted.votes),
        "p_value": predicted.p_value,
    }


def unusable_row(procedure: str, reason: str) -> dict[str, Any]:
    """An image that could not be used: an abstention without trials."""
    nothing = None if procedure == "predict" else 0.0
    empty = {"prediction": -1, "radius": nothing, "p_lower": nothing, **_stages(Votes(()), Votes(()))}
    return {**empty, "base": None, "image": None, "error": reason}


def _stages(selection: Votes, estimation: Votes) -> dict[str, Any]:
    return {
        "votes": estimation.as_dict(),
        "selection": selection.as_dict(),
        "trials": estimation.trials,
        "failures": estimation.failures,
        "selection_failures": selection.failures,
    }


def noise_of(header: Mapping[str, Any], values: int | None) -> Radii:
    """What the noise of a run certifies, stated in the run's norm for images of so many values.

    Raises:
        UserError: an implied norm, and a line that does not say how many values its image has.
    """
    noise = make_noise(header["noise"], header["sigma"], rounded=bool(header.get("rounded")))
    norm = header.get("norm", noise.norm)
    if norm != noise.norm and values is None:
        raise UserError(f"a line without `values` in a run whose norm {norm} is implied: its radius cannot be stated")
    return in_norm(noise, norm, values or 1)


def recomputed_row(header: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of an image's line that follow from its votes and the header alone.

    Raises:
        UserError: the header's bound needs what the votes do not have.
    """
    return answer_row(procedure_of(header).recompute(row, noise_of(header, row.get("values"))))
