"""How many samples each stopping rule needs until it settles, summed exactly over all paths of votes.

    python benchmarks/rules.py

For a class of probability p and a radius that needs p0: the expected samples at alpha = 0.001, at most 10,000.
"""

from __future__ import annotations

import numpy as np

from analysis.tables import render
from certify.smoothing.stopping_rules import RULES

CASES = {
    0.8413447460685429: (0.999, 0.99, 0.95, 0.9, 0.8, 0.7, 0.4),  # one sigma
    0.9772498680518208: (0.999, 0.99, 0.96, 0.9, 0.7, 0.4),  # two sigma
}


def expected_samples(rule: str, p0: float, p: float, alpha: float = 0.001, n: int = 10_000) -> float:
    """The sum over T of the chance that T votes have not settled it; counts that hardly ever occur are left out."""
    found = RULES.get(rule)
    at = found(p0, found.level(alpha, [p0]), np.arange(n + 1))
    alive, first, total = np.array([1.0]), 0, 0.0  # chances of the counts first, first + 1, ...
    for t in range(1, n + 1):
        total += float(alive.sum())
        alive = np.convolve(alive, [1 - p, p])
        count = first + np.arange(len(alive))
        alive[(count >= at.up[t]) | (count <= at.low[t])] = 0.0
        kept = np.flatnonzero(alive > 1e-15)
        if not len(kept):
            break
        alive, first = alive[kept[0] : kept[-1] + 1], first + int(kept[0])
    return total


def main() -> None:
    """Print the table."""
    rows = []
    for p0, ps in CASES.items():
        for p in ps:
            found = [expected_samples(rule, p0, p) for rule in RULES]
            ratio = found[list(RULES).index("one-sided")] / found[list(RULES).index("betting")]
            rows.append([f"{p0:.4f}", f"{p:g}", *(f"{value:,.1f}" for value in found), f"{ratio:.2f}"])
    print(render(["p0", "p", *RULES, "one-sided / betting"], rows, "markdown"))


if __name__ == "__main__":
    main()
