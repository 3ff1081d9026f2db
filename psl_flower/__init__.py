"""Parallel split learning for Flower."""
