"""Classifiers that are reached by queries alone: wire formats, transport, budget, ledger, audit."""
