"""Certify a frozen classifier that was trained without noise, with and without a denoiser.

Run it with ``python examples/denoised_smoothing.py``.
"""

from __future__ import annotations

import certify

options = {"sigma": 0.25, "n": 1000, "skip": 20}
without = certify.certify("digits", "digits", **options)
denoised = certify.certify("digits", "digits", denoiser="auto", **options)
print(
    f"certified accuracy at 0.25: {without.certified_accuracy(0.25)} without, {denoised.certified_accuracy(0.25)} with"
)
denoised.plot("denoised.png", without)
