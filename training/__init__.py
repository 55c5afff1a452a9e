"""Training of denoisers and classifiers. A classifier under attack or certification stays frozen."""
