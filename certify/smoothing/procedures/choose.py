"""Choose the procedure that the parameters of a run ask for."""

from __future__ import annotations

from collections.abc import Iterable

from certify.errors import UserError
from certify.smoothing.bounds import BOUNDS
from certify.smoothing.procedures import Accuracy, Certify, Decide, Measure, Predict
from certify.smoothing.rounding import exact
from certify.smoothing.stopping_rules import DEFAULT_CAP, DEFAULT_RULE, MEASURING_BOUND, RULES

AnyProcedure = Accuracy | Certify | Decide | Measure | Predict


def procedure_for(
    *,
    n0: int | None,
    n: int | None,
    alpha: float,
    bound: str | None,
    radius: float | Iterable[float] | None,
    tolerance: float | None,
    rule: str | None,
    default_n0: int = 100,
    default_n: int = 100_000,
    sequential_n: int | None = None,
    statement: str = "certificates",
    draws: int | None = None,
    population: bool = False,
) -> AnyProcedure:
    """Return the procedure that these parameters ask for; None stands for a parameter that is not given.

    Args:
        n0: as for :func:`certify.certify`, and so are those up to ``rule``.
        n: samples, at most so many with a radius or tolerance.
        alpha: failure probability per image.
        bound: confidence bound.
        radius: one or several to decide at.
        tolerance: of a measured radius.
        rule: stopping rule.
        default_n0: n0 unless given.
        default_n: n unless given.
        sequential_n: n unless given with a radius or tolerance; None: :data:`DEFAULT_CAP` with a radius, else
            ``default_n``.
        statement: ``"certificates"``, or ``"accuracy"`` of all images together.
        draws: noisy copies of each image for the accuracy, 1 unless given.
        population: as for :func:`certify.accuracy`.

    Raises:
        UserError: parameters out of range or that contradict each other.
    """
    if statement == "accuracy":
        of_certificates = {"n0": n0, "n": n, "bound": bound, "radius": radius, "tolerance": tolerance, "rule": rule}
        if given := [name for name, value in of_certificates.items() if value is not None]:
            raise UserError(f"--{given[0]} is for certificates; leave it out with --statement accuracy")
        return Accuracy(1 if draws is None else draws, alpha, population)
    if statement != "certificates":
        raise UserError(f"--statement {statement}: expected certificates or accuracy")
    if draws is not None or population:
        raise UserError(f"--{'population' if population else 'draws'} is for --statement accuracy; add it")
    BOUNDS.get(bound or "clopper-pearson")
    RULES.get(rule or DEFAULT_RULE)
    if radius is None and tolerance is None:
        if rule is not None:
            raise UserError(f"--rule {rule} without --radius: there is nothing to stop early; add --radius R")
        return Certify(
            default_n0 if n0 is None else n0, default_n if n is None else n, alpha, bound or "clopper-pearson"
        )
    if radius is not None and tolerance is not None:
        raise UserError("--radius and --tolerance: decide at a radius, or measure it to a tolerance; expected one")
    option = "--radius" if radius is not None else "--tolerance"
    if n0 is not None:
        raise UserError(f"--n0 with {option}: no selection samples are drawn there; leave it out")
    if bound is not None and (radius is not None or bound != MEASURING_BOUND):
        raise UserError(
            f"--bound {bound} with {option}: a bound for a fixed n is invalid under sequential stopping; "
            "leave --bound out" + (" (--rule names the stopping rule)" if radius is not None else "")
        )
    if radius is not None:
        decide = Decide(radius, n or sequential_n or DEFAULT_CAP, alpha, rule or DEFAULT_RULE)  # type: ignore[arg-type]
        if wrong := [exact(r) for r in decide.radii if not 0 <= r < float("inf")]:
            raise UserError(f"--radius {','.join(wrong)}: expected numbers from 0")
        return decide
    if rule not in (None, MEASURING_BOUND):
        raise UserError(
            f"--rule {rule} with --tolerance: expected {MEASURING_BOUND}, the rule that is valid at any time"
        )
    assert tolerance is not None
    return Measure(tolerance, n or sequential_n or default_n, alpha)
