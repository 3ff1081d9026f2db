"""Attacks, each a function of what the server has seen; or, where it departs from the protocol, of what it trains."""

from psl_flower.audit.attacks.answers import read_labels
from psl_flower.audit.attacks.base import ActiveAttack, Attack
from psl_flower.audit.attacks.decoder import decode_inputs
from psl_flower.audit.attacks.dependence import measure_dependence
from psl_flower.audit.attacks.gradients import cluster_outputs, read_gradients
from psl_flower.audit.attacks.head_gradients import read_inputs
from psl_flower.audit.attacks.hijacking import hijack
from psl_flower.audit.attacks.inversion import invert_inputs
from psl_flower.audit.attacks.membership import recognise_members
from psl_flower.audit.attacks.tail import count_classes, try_labels

# In the order in which they are run.
ATTACKS: dict[str, Attack] = {
    "dependence": measure_dependence,
    "decoder": decode_inputs,
    "inversion": invert_inputs,
    "head-gradients": read_inputs,
    "labels": read_labels,
    "gradients": read_gradients,
    "outputs": cluster_outputs,
    "tail-labels": try_labels,
    "tail-counts": count_classes,
    "membership": recognise_members,
}

# Those that depart from the protocol: each has a training of its own.
ACTIVE: dict[str, ActiveAttack] = {"hijacking": hijack}

__all__ = ["ACTIVE", "ATTACKS", "ActiveAttack", "Attack"]
