"""Accuracy on exact posteriors, calibration with trained priors, and speed."""
