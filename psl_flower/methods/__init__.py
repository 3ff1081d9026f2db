"""Ways of splitting: each is one file that holds both ends of a step."""

from psl_flower.methods.base import CLIENT, EACH, ROWS, SERVER, SHARED, SUM, SplitMethod, Stage, stage
from psl_flower.methods.parallel import ParallelSplit
from psl_flower.methods.private import check_options
from psl_flower.methods.registry import METHODS, make_method
from psl_flower.methods.sequential import SequentialSplit
from psl_flower.methods.splitfed import SplitFedV1, SplitFedV2
from psl_flower.methods.u_shaped import UShapedSplit

__all__ = [
    "CLIENT",
    "EACH",
    "METHODS",
    "ROWS",
    "SERVER",
    "SHARED",
    "SUM",
    "ParallelSplit",
    "SequentialSplit",
    "SplitFedV1",
    "SplitFedV2",
    "SplitMethod",
    "Stage",
    "UShapedSplit",
    "check_options",
    "make_method",
    "stage",
]
