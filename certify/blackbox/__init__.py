"""Audits of black-box APIs: queries, votes and certificates, with a log of every request and reply."""

N0, N, SEQUENTIAL_N = 20, 100, 1000
"""Noise samples per image: those that select the class, those that count, and at most so many for a sequential test."""

REPEAT_CLEAN = 3
"""Repeated queries of one clean image at the start."""

RETRIES, TIMEOUT = 4, 60.0
"""Retries of a query, and seconds per request."""
