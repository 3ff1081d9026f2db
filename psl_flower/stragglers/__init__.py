"""Who is slow, by how much, and what that costs."""

from psl_flower.stragglers.clock import VirtualClock, step_times

__all__ = ["VirtualClock", "step_times"]
