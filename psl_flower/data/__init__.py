"""A client's data: whatever people bring, read as batches of inputs and target. Pure torch and numpy."""

from psl_flower.data.batch import Batch, check_drawn_again, checksum, checksums
from psl_flower.data.binding import bind_inputs, forward_signature, unwrapped
from psl_flower.data.classes import ClassNumbers, agreed
from psl_flower.data.examples import Examples
from psl_flower.data.opening import check_data_fn, open_data
from psl_flower.data.padding import IGNORED, PadTexts, join_batches
from psl_flower.data.together import Seeds, read_together

__all__ = [
    "IGNORED",
    "Batch",
    "ClassNumbers",
    "Examples",
    "PadTexts",
    "Seeds",
    "agreed",
    "bind_inputs",
    "check_data_fn",
    "check_drawn_again",
    "checksum",
    "checksums",
    "forward_signature",
    "join_batches",
    "open_data",
    "read_together",
    "unwrapped",
]
