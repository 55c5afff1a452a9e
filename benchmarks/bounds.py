"""Where each bound wins, and how often it is wrong: summed exactly, nothing sampled.

    python benchmarks/bounds.py

The first table holds radii over sigma at the expected counts for a class of probability p_A whose strongest rival has
p_B, the rest being spread over other classes; for the randomized bound the mean over its uniform draw. The second holds
the largest probability, over a grid of p and just beside every value that the bound can take, that the bound is wrong.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from analysis.tables import render
from certify import Gaussian
from certify.smoothing.bounds import BOUNDS, Evidence
from certify.smoothing.rounding import ceil_to, floor_to

NAMES = ("clopper-pearson", "randomized", "runner-up", "best", "betting")
DRAWS = (np.arange(50) + 0.5) / 50


def radius(name: str, k: int, others: int, n: int, alpha: float) -> float:
    """Radius over sigma, averaged over the bound's uniform draw if it has one."""
    bound, noise = BOUNDS.get(name), Gaussian(1.0)
    draws = DRAWS if bound.randomized else (1.0,)
    found = [bound(Evidence(k, others, n, float(w)), alpha) for w in draws]
    return float(np.mean([noise.radius(i.lower, i.upper) for i in found]))


def radii(alpha: float = 0.001) -> str:
    """The first table."""
    rows = []
    for n in (1_000, 100_000):
        for p, rival in [
            (1.0, 0.0),
            (0.999, 0.001),
            (0.99, 0.002),
            (0.9, 0.1),
            (0.9, 0.02),
            (0.6, 0.1),
            (0.45, 0.2),
            (0.2, 0.05),
        ]:
            found = [radius(name, round(n * p), round(n * rival), n, alpha) for name in NAMES]
            best = max(found)
            cells = ["abstains" if not r else f"**{floor_to(r, 3)}**" if r == best else floor_to(r, 3) for r in found]
            rows.append([f"{n:,}", f"{p:g}", f"{rival:g}", *cells])
    return render(["n", "p_A", "p_B", *NAMES], rows, "markdown")


def chance_above(name: str, k: int, n: int, alpha: float, p: float) -> float:
    """The uniform draw below which a randomized bound exceeds p, by bisection: it falls as the draw grows."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        above = BOUNDS.get(name)(Evidence(k, n - k, n, middle), alpha).lower > p
        low, high = (middle, high) if above else (low, middle)
    return low


def worst_error(name: str, n: int, alpha: float) -> float:
    """The largest P(bound wrong) over p, for one class against all others together."""
    bound = BOUNDS.get(name)
    k = np.arange(n + 1)
    if bound.randomized:
        grid = np.linspace(0.02, 0.98, 49)
        return max(float(stats.binom.pmf(k, n, p) @ [chance_above(name, int(j), n, alpha, p) for j in k]) for p in grid)
    found = [bound(Evidence(int(j), int(n - j), n), alpha) for j in k]
    lower, upper = np.array([i.lower for i in found]), np.array([i.upper for i in found])
    edges = np.concatenate([lower[lower > 0], 1 - upper[upper < 1]])
    grid = np.concatenate([np.linspace(0.001, 0.999, 999), np.nextafter(edges, 0), edges])
    wrong = (lower[:, None] > grid) | (upper[:, None] < 1 - grid - 1e-15)
    return float((stats.binom.pmf(k[:, None], n, grid) * wrong).sum(axis=0).max())


def errors() -> str:
    """The second table."""
    rows = [
        [f"{alpha:g}", f"{n}", *(ceil_to(worst_error(name, n, alpha), 5) for name in NAMES)]
        for alpha in (0.05, 0.001)
        for n in (20, 60)
    ]
    return render(["alpha", "n", *NAMES], rows, "markdown")


if __name__ == "__main__":
    print("radius / sigma at alpha = 0.001 (the largest in bold)\n")
    print(radii())
    print("\nlargest probability of being wrong\n")
    print(errors())
