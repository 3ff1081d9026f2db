"""The stream carrier: one gRPC stream a client process, opened from one Flower message a client and run."""

from psl_flower.exchange.streams.carrier import StreamCarrier
from psl_flower.exchange.streams.options import StreamOptions

__all__ = ["StreamCarrier", "StreamOptions"]
