"""What the command audits by name: options that need not be given then."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What is trained and attacked; the names are those of the command's options."""

    dataset: str
    model: str = "cnn"
    cuts: tuple[str, ...] = ("stage2", "stage3", "head")
    defences: tuple[str, ...] = ("none",)
    attacks: tuple[str, ...] = ()  # all
    num_clients: int = 8
    rounds: int
    examples: int
    batch_size: int = 64
    learning_rate: float = 0.02
    momentum: float = 0.9
    seeds: int = 1


# One after the other, weak to strong; at the default learning rate and for the CNN's activations, which are about 1.
_STRENGTHS = (
    "none",
    *(f"GaussianNoise({sigma})" for sigma in (0.5, 1, 2)),
    *(f"Quantize({bits})" for bits in (3, 2)),
    *(f"TopK({kept})" for kept in (64, 16)),
    "DistanceCorrelation(5)",
    "RandomizedResponse(4, 10)",
)
_PRICED = ("decoder", "labels", "membership")

PRESETS = {
    "digits": Preset(dataset="digits", rounds=3, examples=2000),
    "fashion-mnist": Preset(dataset="fashion-mnist", rounds=5, examples=4000),
    "cifar10": Preset(dataset="cifar10", rounds=8, examples=8000),
    "privacy": Preset(
        dataset="digits",
        cuts=("stage2", "head"),
        defences=_STRENGTHS,
        attacks=_PRICED,
        num_clients=4,
        rounds=5,
        examples=2000,
        seeds=3,
    ),
    # What noise costs depends on the batch, and momentum would carry it on: DP-SGD is trained in its own way.
    "privacy-epsilon": Preset(
        dataset="digits",
        cuts=("stage2",),
        defences=("none", *(f"TargetEpsilon({epsilon})" for epsilon in (8, 4, 2, 1))),
        attacks=_PRICED,
        num_clients=4,
        rounds=5,
        examples=2000,
        batch_size=256,
        learning_rate=0.3,
        momentum=0.0,
        seeds=3,
    ),
}
for _dataset in ("cifar10", "fashion-mnist"):
    PRESETS[f"privacy-{_dataset}"] = replace(PRESETS["privacy"], dataset=_dataset, rounds=10, examples=10_000)
