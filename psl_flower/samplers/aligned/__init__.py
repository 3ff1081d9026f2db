"""Aligned: slow clients' examples packed into as few steps of the epoch as their classes allow."""

from psl_flower.samplers.aligned.sampler import AlignedSampler

__all__ = ["AlignedSampler"]
