"""Plot certified accuracy for three noise levels: a larger sigma certifies larger radii for fewer images.

Run it with ``python examples/three_sigmas.py``.
"""

from __future__ import annotations

import certify

sigmas = (0.12, 0.25, 0.5)
runs = [certify.certify("digits", "digits", sigma=s, denoiser="auto", n=1000, skip=20) for s in sigmas]
runs[0].plot("sigmas.png", *runs[1:])
for run in runs:
    print(run)
