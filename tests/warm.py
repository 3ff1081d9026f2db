"""Processes for tests that are there at once: forked from one that has imported torch, Flower and psl_flower.

A new interpreter takes five seconds for that. The one that they are forked from, made once a session, has done nothing
but import: gRPC does not survive a fork once it is in use.
"""

import multiprocessing

WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["psl_flower.experiments.trial", "torch._dynamo", "sklearn.datasets"])
