"""The mathematics of randomized smoothing: noise, bounds, stopping rules, certificates; pure, in float64."""
