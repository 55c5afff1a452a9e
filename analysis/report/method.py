"""The report's method section: protocol, formulas, and the exact claim."""

from __future__ import annotations

from analysis.report.audit_folder import AuditFolder
from certify.runs.records import RunHeader
from certify.smoothing.norms import IN_WORDS
from certify.smoothing.rounding import complement, exact, times

_NOISES = {"gaussian": "Gaussian", "laplace": "Laplace"}
_RADIUS = {
    ("gaussian", "l2"): "sigma times the standard normal quantile of p",
    ("uniform", "l1"): "twice the half-width of the noise (sigma times the square root of 3) times (p - 1/2)",
    (
        "laplace",
        "l1",
    ): "minus sigma over the square root of 2 (the scale of the noise) times the logarithm of 2 (1 - p)",
}


def method(audit: AuditFolder) -> list[str]:
    """Return the paragraphs of the method section; none without a run file."""
    if audit.run is None:
        return []
    header = audit.run.header
    norm = IN_WORDS[header.norm]
    paragraphs = [_protocol(audit), _counting(header), *_radius(header, norm)]
    paragraphs.append(
        "The claim, for each image separately: with probability at least "
        f"{complement(header.alpha)} over the noise draws, either nothing is certified, or the smoothed service "
        f"returns the certified label at every point whose {norm} distance from the image is below the certified "
        "radius. Failed queries are trials without a vote, so they can only reduce a radius; they were not replaced by "
        "new noise draws."
    )
    return paragraphs


def _protocol(audit: AuditFolder) -> str:
    header, about = audit.header, audit.about
    denoised = f", passed through the denoiser {audit.denoiser}" if audit.denoiser else ""
    encoding = about.get("encoding") or "image"
    name = str(encoding.get("name", "image") if isinstance(encoding, dict) else encoding).upper()
    return (
        f"Each noisy copy is the image plus {_noise(header)} (in units of the "
        f"full pixel range), drawn independently{denoised}, clipped to [0, 1], rounded to 8 bits and sent as {name}. "
        "The function that is smoothed consists of all these steps and the service, so none of them weakens the "
        f"certificate. The vote is the service's first label{' in the class map' if about.get('class_map') else ''}."
    )


def _noise(header: RunHeader) -> str:
    return f"{_NOISES.get(header.noise, header.noise)} noise of sigma = {header.sigma:g}"


def _compares_rival(header: RunHeader) -> bool:
    """True if the bound also uses the votes of the strongest other class."""
    return header.bound in ("runner-up", "best")


def _counting(header: RunHeader) -> str:
    stopping, alpha, n = header.stopping, exact(header.alpha), f"{header.n:,}"
    rival = _compares_rival(header)
    if stopping is None:
        bounds = f"a lower bound p, which exceeds the label's true probability with probability at most {alpha}"
        if rival:
            bounds = (
                "a lower bound p for the label's probability and an upper bound q for its strongest rival's; p is too "
                f"large or q too small with probability at most {alpha}"
            )
        return (
            f"{header.n0:,} noisy copies choose a label; its votes are counted on {n} new ones. From k votes out of "
            f"n, the bound {header.bound} computes {bounds}. An image is undecided if p is at most "
            f"{'q' if rival else 'one half'}. (Cohen, Rosenfeld and Kolter, ICML 2019.)"
        )
    if stopping.radii:
        until = (
            "each requested radius is decided: some label has the required probability, or no label has it (a failed "
            "query counts against every label)"
        )
    else:
        share = exact(times(stopping.tolerance or 0.0, 100))
        until = f"the certified radius is within {share}% of the largest that is still possible"
    return (
        f"Noisy copies are sent until {until}; at most {n} per image. The rule {stopping.rule} is evaluated after "
        "every answer. The probability that it ever decides wrongly, over all evaluations and labels, is at most "
        f"{alpha}, so stopping early costs no confidence. (Ville 1939; Voracek, NeurIPS 2024.)"
    )


def _radius(header: RunHeader, norm: str) -> list[str]:
    """Return the paragraph on the formula of the radius, where there is one."""
    setting = header.noise, header.norm
    formula = _RADIUS.get(setting)
    condition = "that has at least probability p > 1/2"
    if _compares_rival(header):
        condition = "that has at least probability p, while every other has at most q < p,"
        formula = "half of sigma times the difference of the standard normal quantiles of p and q"
    if formula is None or (_compares_rival(header) and setting != ("gaussian", "l2")):
        return []
    return [
        f"The radius: a label {condition} under {_noise(header)} wins at every image closer than {formula}, "
        f"in {norm} norm, pixels in [0, 1]. This holds for any function behind the noise, "
        "and therefore for a black-box service."
    ]
