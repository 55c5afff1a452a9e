"""Makes weights: classifiers and denoisers. A classifier under attack or certification stays frozen."""
