"""Simulate: what a deployment would reach on hardware that is not here, from formulas and frozen constants."""
