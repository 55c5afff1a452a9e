"""Whether stopping early changes decisions: runs of `certify --radius` against a run of the same images at a fixed n.

    python benchmarks/decisions.py FIXED.jsonl DECIDED.jsonl...

An image is certified at r by the fixed run if its radius is at least r, and by the other if r was settled as robust;
undecided counts as not certified, like a radius below r. Printed for each radius: images with the same answer, samples
that were labelled on average and in the median (all that were drawn, also those after the decision), and how often the
outcomes were.
"""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np

from certify import read_run


def compare(fixed_path: str, decided_path: str) -> None:
    """Print how one run's decisions compare with the fixed run."""
    fixed, decided = read_run(fixed_path), read_run(decided_path)
    radius_of = {row["id"]: (row["prediction"], row["radius"]) for row in fixed.usable}
    rows = decided.usable
    drawn = np.array([row["drawn"] for row in rows])
    n = fixed.header["n"]
    print(f"{decided_path}: {decided.header['bound']}, n = {decided.header['n']:,} at most, {len(rows)} images")
    for place, radius in enumerate(decided.header["stopping"]["radii"]):
        outcomes = Counter(row["decisions"][place]["outcome"] for row in rows)
        same, used = 0, []
        for row in rows:
            prediction, reached = radius_of[row["id"]]
            decision = row["decisions"][place]
            leader, _, samples = decision["look"]
            certified = decision["outcome"] == "robust"
            same += certified == (reached >= radius and prediction >= 0) and (not certified or leader == prediction)
            used.append(samples)
        print(
            f"  r = {radius:g}: same answer on {same} of {len(rows)}; settled after {np.mean(used):,.1f} samples on "
            f"average, {np.median(used):g} in the median; {dict(outcomes)}"
        )
    fewer = f"{n / drawn.mean():.1f} times fewer"
    print(f"  drawn: {drawn.mean():,.1f} on average ({fewer}), {np.median(drawn):g} in the median")


if __name__ == "__main__":
    for path in sys.argv[2:]:
        compare(sys.argv[1], path)
