"""What a node demands of a run, whoever submits it: protection that its own configuration asks for.

The keys are those of the run: ``--node-config "secure-aggregation=true defences='GaussianNoise(0.5)'"``. A run may ask
for more, not for less.
"""

from __future__ import annotations

from flwr.app import Context

from psl_flower.app.datasets import SPECS
from psl_flower.checks import check_float, check_int
from psl_flower.config import RunConfig
from psl_flower.errors import ConfigError
from psl_flower.privacy import DPSGD, Defence, LabelNoise, parse_defences


def secure_aggregation(context: Context) -> bool:
    """Return whether sums leave masked: as the run has it, which must be so if the node demands it."""
    run, demanded = RunConfig.read(context.run_config).secure_aggregation, context.node_config.get("secure-aggregation")
    if demanded not in (None, True, False):
        raise ConfigError(f"secure-aggregation of the node's configuration must be true or false, got {demanded!r:.80}")
    if demanded and not run:
        raise ConfigError(
            "this node demands secure aggregation (secure-aggregation in its own configuration), the run has none: "
            'submit it with -c "secure-aggregation=true"'
        )
    return run


def defences(context: Context) -> tuple[Defence, ...]:
    """Return the node's own defences, then those of the run that are not among them."""
    written = context.node_config.get("defences", "")
    if not isinstance(written, str):
        raise ConfigError(f"defences of the node's configuration must be text, got {written!r:.80}")
    own = parse_defences(written)
    return own + tuple(d for d in parse_defences(RunConfig.read(context.run_config).defences) if d not in own)


def label_noise(context: Context) -> LabelNoise | None:
    """Return how class counts are told, if at all: with the smaller epsilon of the run's and the node's."""
    config, most = RunConfig.read(context.run_config), _epsilon(context, "label-epsilon")
    if not config.label_epsilon:
        return None
    epsilon = config.label_epsilon if most is None else min(config.label_epsilon, most)
    return LabelNoise(epsilon=epsilon, classes=SPECS[config.dataset].num_classes)


def private(context: Context) -> DPSGD | None:
    """Return how the model is trained with differential privacy: as the run has it, within what the node allows."""
    config, most = RunConfig.read(context.run_config), _epsilon(context, "target-epsilon")
    if most is not None and not 0 < config.target_epsilon <= most:
        has = f"has {config.target_epsilon:g}" if config.target_epsilon else "has none"
        raise ConfigError(
            f"this node demands differential privacy with an epsilon of at most {most:g} (target-epsilon in its own "
            f'configuration), the run {has}: submit it with -c "target-epsilon={most:g}"'
        )
    found, known = config.private(), context.node_config.get("dp-examples")
    if most is not None and found is not None and found.examples is not None:
        most_examples = 0 if known is None else check_int(known, "dp-examples of the node's configuration", least=1)
        if found.examples > most_examples:
            has = f"says {most_examples}" if most_examples else "does not say"
            raise ConfigError(
                "the more examples a run says there are, the less noise it needs for its target-epsilon with batches "
                f"drawn by chance: it says dp-examples={found.examples}, this node, which demands one, {has}. Give the "
                "node dp-examples in its own configuration, those of all clients together, and the run no more"
            )
    return found


def _epsilon(context: Context, name: str) -> float | None:
    value = context.node_config.get(name)
    return None if value is None else check_float(value, f"{name} of the node's configuration", above=0)
