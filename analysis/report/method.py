"""How an audit's certificates come about, in words: protocol, formulas, what exactly is claimed."""

from __future__ import annotations

from analysis.report.audit_folder import AuditFolder
from analysis.report.verdict import denoiser_of
from certify.smoothing.norms import IN_WORDS
from certify.smoothing.rounding import complement, exact, times

_RADIUS = {
    ("gaussian", "l2"): "sigma times the standard normal quantile of p",
    ("uniform", "l1"): "twice the half-width of the noise (sigma times the root of 3) times (p - 1/2)",
    ("laplace", "l1"): "the scale of the noise (sigma over the root of 2) times minus the logarithm of 2 (1 - p)",
}


_RIVAL = "a p for it and a q for its strongest rival, and errs about either (p too large, q too small)"
_BOUNDED = {"": "a p that exceeds the label's true probability", "runner-up": _RIVAL, "best": _RIVAL}
_OPEN = {"": "whose p is not above one half"} | dict.fromkeys(("runner-up", "best"), "whose p is not above its q")


def method(audit: AuditFolder) -> list[str]:
    """The method, a paragraph each; empty where no run file says which."""
    if audit.run is None:
        return []
    header = audit.run.header
    norm, sure = IN_WORDS[header.get("norm", "l2")], complement(header["alpha"])
    found = [_protocol(audit), _counting(audit)]
    formula = _RADIUS.get((str(header.get("noise")), str(header.get("norm", "l2"))))
    if header["bound"] in ("runner-up", "best") and (header.get("noise"), header.get("norm", "l2")) == (
        "gaussian",
        "l2",
    ):
        found.append(
            "The radius: a label that has at least the probability p under gaussian noise of sigma = "
            f"{header['sigma']:g}, where every other has at most q < p, wins at every image nearer than half of sigma "
            "times the difference of the standard normal quantiles of p and q, in l2 norm, pixels in [0, 1]. That "
            "holds for any function behind the noise, hence for a service that nobody can look into."
        )
    elif formula and header["bound"] not in ("runner-up", "best"):
        found.append(
            f"The radius: a label that has at least the probability p > 1/2 under {header['noise']} noise of sigma = "
            f"{header['sigma']:g} wins at every image nearer than {formula}, in {norm} norm, pixels in [0, 1]. That "
            "holds for any function behind the noise, hence for a service that nobody can look into."
        )
    found.append(
        f"What is claimed, for each image by itself: with probability at least {sure} over the noise draws, either "
        "nothing is certified, or the smoothed service gives the certified label at every point whose "
        f"{norm} distance from the image is below the certified radius. Queries that failed are trials without a "
        "vote, so that they can only shrink a radius; none was drawn again."
    )
    return found


def _protocol(audit: AuditFolder) -> str:
    assert audit.run is not None
    header, about = audit.run.header, audit.about
    denoiser = denoiser_of(audit)
    clean = f", passed through the denoiser {denoiser}" if denoiser else ""
    encoding = about.get("encoding") or "image"
    name = str(encoding.get("name", "image") if isinstance(encoding, dict) else encoding).upper()
    vote = "The vote is the service's first label"
    return (
        f"Each noisy copy is the image plus {header['noise']} noise of sigma = {header['sigma']:g} (in units of the "
        f"full pixel range), drawn independently{clean}, clipped to [0, 1], rounded to 8 bits and sent as {name}. All "
        "of this and the service together are the function that is smoothed, so that none of it weakens the "
        f"certificate. {vote}{' that the class map knows' if about.get('class_map') else ''}."
    )


def _counting(audit: AuditFolder) -> str:
    assert audit.run is not None
    header = audit.run.header
    stopping, alpha, n = header.get("stopping"), exact(header["alpha"]), f"{header['n']:,}"
    if not stopping:
        return (
            f"{header['n0']:,} noisy copies choose a label; {n} fresh ones count its votes. From k votes out of n the "
            f"bound {header['bound']} makes {_BOUNDED.get(header['bound'], _BOUNDED[''])} with probability at most "
            f"{alpha}. An image {_OPEN.get(header['bound'], _OPEN[''])} stays undecided. (Cohen, Rosenfeld and Kolter, "
            "ICML 2019.)"
        )
    if stopping.get("radii"):
        until = (
            "each radius that was asked for is settled: a label has the probability that it needs, or none has (a "
            "query that failed counts as an outcome against every label)"
        )
    else:
        until = f"the radius is known to within {exact(times(stopping['tolerance'], 100))}% of what it can still be"
    return (
        f"Noisy copies are asked about until {until}; at most {n} for each image. The rule {stopping['rule']} looks "
        "after every answer. The probability that it ever settles a wrong side, however often it looks and whichever "
        f"label leads, is at most {alpha}, so that stopping early costs no confidence. (Ville 1939; Voracek, NeurIPS "
        "2024.)"
    )
