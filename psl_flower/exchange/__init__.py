"""How requests and replies travel: one interface, a file for each carrier."""

from psl_flower.exchange.base import Carrier
from psl_flower.exchange.clients import Clients, Member
from psl_flower.exchange.messages import MessageCarrier

__all__ = ["Carrier", "Clients", "Member", "MessageCarrier"]
