"""Runs in which everything fails and somebody lies, drawn from seeds; see `play`."""

from mayhem.play import play, play_until
from mayhem.scenario import Scenario

__all__ = ["Scenario", "play", "play_until"]
