"""Do two ways of running one classifier certify alike? A paired test on the counts of two run files.

    certify --model M --weights F --data D --sigma 0.12 --n 1000 --out fast.jsonl
    certify --model M --weights F --data D --sigma 0.12 --n 1000 --precision float32 --compile off --out plain.jsonl
    python benchmarks/paired.py fast.jsonl plain.jsonl

Both saw the same noise, so their counts differ only where labels moved. Printed are the votes that moved, the change of
the radii, and two tests: whether the differences are larger than fresh noise would explain (chi-squared: the difference
of an image's counts would have variance 2 n p (1 - p)), and whether they have a direction (sign test over the images
whose leading class gained or lost votes).
"""

from __future__ import annotations

import sys

from scipy.stats import binomtest, chi2

from certify import UserError, read_run


def main() -> None:
    """Compare and print."""
    first, second = (read_run(path) for path in sys.argv[1:3])
    other = {row["id"]: row for row in second.usable}
    total, freedom, moved, samples, radii, predictions, gained, lost = 0.0, 0, 0, 0, [], 0, 0, 0
    for row in first.usable:
        twin = other.get(row["id"], {})
        if row["image"] != twin.get("image") or row["radius"] is None or not row["votes"]:
            raise UserError(f"image {row['id']}: expected certificates of the same pixels in both runs")
        classes = row["votes"].keys() | twin["votes"].keys()
        moved += sum(abs(row["votes"].get(c, 0) - twin["votes"].get(c, 0)) for c in classes) // 2
        samples += row["trials"]
        predictions += row["prediction"] != twin["prediction"]
        radii.append(abs(row["radius"] - twin["radius"]))
        leader = max(row["votes"], key=row["votes"].__getitem__)
        n, a, b = row["trials"], row["votes"][leader], twin["votes"].get(leader, 0)
        gained, lost = gained + (b > a), lost + (b < a)
        p = (a + b) / (2 * n)
        if 0 < p < 1:
            total += (a - b) ** 2 / (2 * n * p * (1 - p))
            freedom += 1
    for name, run in (("first", first), ("second", second)):
        how = {k: run.header[k] for k in ("precision", "folded", "compiled", "batch_size")}
        print(f"{name:<7} {how}")
    print(f"{len(radii)} images, {samples:,} samples: {moved} votes moved; {predictions} predictions differ")
    print(f"largest difference of radii {max(radii):.6f}, mean {sum(radii) / len(radii):.6f}")
    print(f"more than fresh noise? chi-squared {total:.3f}, {freedom} images: p = {chi2.sf(total, freedom):.4f}")
    if gained + lost:
        p_value = binomtest(gained, gained + lost).pvalue
        print(f"in one direction? leader gained in {gained}, lost in {lost} images: p = {p_value:.4f}")


if __name__ == "__main__":
    main()
