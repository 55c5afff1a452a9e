"""Frozen classifiers: names and files to base classifiers, denoiser pipelines, defences, query access."""
