"""The default app's configuration: `RunConfig` defines its keys, the rest of the package checks and documents them."""

from psl_flower.config.run_config import AUGMENTATIONS, DATASETS, MODELS, OPTIMIZERS, PARTITIONS, RunConfig

__all__ = ["AUGMENTATIONS", "DATASETS", "MODELS", "OPTIMIZERS", "PARTITIONS", "RunConfig"]
