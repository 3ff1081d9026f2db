"""What clients do to what leaves them: noise, clipping, compression, a penalty on the loss, labels told with chance."""

from psl_flower.privacy.defences.base import Defence, OutgoingRows
from psl_flower.privacy.defences.compression import Quantize, TopK
from psl_flower.privacy.defences.correlation import DistanceCorrelation
from psl_flower.privacy.defences.cut_gradient import ClipCutGradient
from psl_flower.privacy.defences.labels import RandomizedResponse
from psl_flower.privacy.defences.noise import GaussianNoise, LaplaceNoise
from psl_flower.privacy.defences.scrutiny import GradientScrutiny
from psl_flower.privacy.defences.written import DEFENCES, parse_defences

__all__ = [
    "DEFENCES",
    "ClipCutGradient",
    "Defence",
    "DistanceCorrelation",
    "GaussianNoise",
    "GradientScrutiny",
    "LaplaceNoise",
    "OutgoingRows",
    "Quantize",
    "RandomizedResponse",
    "TopK",
    "parse_defences",
]
