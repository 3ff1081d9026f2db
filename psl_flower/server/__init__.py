"""The server's end of a step: the master copy of the model, the parts that run here, and the one optimizer over all."""

from psl_flower.server.local import LocalBackend, Loss, OptimizerFn, Outcome, ServerPart, run_on_batch

__all__ = ["LocalBackend", "Loss", "OptimizerFn", "Outcome", "ServerPart", "run_on_batch"]
