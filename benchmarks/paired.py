"""Do two ways of running one classifier certify alike? A paired test on the counts of two run files.

    certify --model M --weights F --data D --sigma 0.12 --n 1000 --out fast.jsonl
    certify --model M --weights F --data D --sigma 0.12 --n 1000 --precision float32 --compile off --out plain.jsonl
    python benchmarks/paired.py fast.jsonl plain.jsonl

Both saw the same noise. If the two runs were different draws from one classifier, the difference of an image's counts
would have variance 2 n p (1 - p), and the sum of the squared standardised differences would be chi-squared with one
degree of freedom an image. Equal noise makes the differences far smaller than that, so a small p-value can only come
from a real difference between the two functions.
"""

from __future__ import annotations

import sys

from scipy.stats import chi2

from certify import read_run


def main() -> None:
    """Compare and print."""
    first, second = (read_run(path) for path in sys.argv[1:3])
    other = {row["id"]: row for row in second.usable}
    total, freedom, moved, samples, radii, predictions = 0.0, 0, 0, 0, [], 0
    for row in first.usable:
        twin = other[row["id"]]
        assert row["image"] == twin["image"], f"{row['id']}: other pixels"
        classes = row["votes"].keys() | twin["votes"].keys()
        moved += sum(abs(row["votes"].get(c, 0) - twin["votes"].get(c, 0)) for c in classes) // 2
        samples += row["trials"]
        predictions += row["prediction"] != twin["prediction"]
        radii.append(abs(row["radius"] - twin["radius"]))
        leader = max(row["votes"], key=row["votes"].__getitem__)
        n, a, b = row["trials"], row["votes"][leader], twin["votes"].get(leader, 0)
        p = (a + b) / (2 * n)
        if 0 < p < 1:
            total += (a - b) ** 2 / (2 * n * p * (1 - p))
            freedom += 1
    for name, run in (("first", first), ("second", second)):
        how = {k: run.header[k] for k in ("precision", "folded", "compiled", "batch_size")}
        print(f"{name:<7} {how}")
    print(f"{len(radii)} images, {samples:,} samples: {moved} votes moved; {predictions} predictions differ")
    print(f"largest difference of radii {max(radii):.6f}, mean {sum(radii) / len(radii):.6f}")
    print(f"chi-squared {total:.3f} with {freedom} degrees of freedom: p = {chi2.sf(total, freedom):.4f}")


if __name__ == "__main__":
    main()
