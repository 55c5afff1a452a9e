"""Audits of black-box APIs: queries, votes and certificates, with a log of every request and reply."""

N0, N, SEQUENTIAL_N = 20, 100, 1000
"""Default noise samples per image: to select the class, to estimate its probability, and the maximum of a sequential
test."""

REPEAT_CLEAN = 3
"""Default number of repeated queries of one clean image at the start."""

RETRIES, TIMEOUT = 4, 60.0
"""Default retries per query and seconds per request."""
