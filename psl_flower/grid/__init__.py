"""Grids of our own."""

from psl_flower.grid.in_process import InProcessGrid

__all__ = ["InProcessGrid"]
