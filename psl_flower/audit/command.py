"""``psl-flower audit``: attack what the server receives of the default app's models and data, and report what leaks."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from psl_flower.app.datasets import SPECS
from psl_flower.app.models import build_model
from psl_flower.app.task import load_images, make_optimizer
from psl_flower.audit.attacks import ATTACKS
from psl_flower.audit.auditing import audit
from psl_flower.audit.presets import PRESETS
from psl_flower.audit.report import save_report
from psl_flower.checks import check_int
from psl_flower.config import RunConfig
from psl_flower.config.run_config import DATASETS, MODELS
from psl_flower.errors import ConfigError
from psl_flower.experiments.provenance import provenance

_DESCRIPTION = """\
Train a model split at each cut, with and without defences, by the package's own clients and strategy, record what the
server receives, attack it, and report: how well inputs are reconstructed, labels inferred, members found.
docs/audit.md says how to read the report, and what not to conclude from it.
"""
_EXAMPLES = """\
examples:
  psl-flower audit
  psl-flower audit --cuts stage2 stage3 --seeds 3
  psl-flower audit --cuts stage2 --tail head --secure-aggregation
  psl-flower audit --preset cifar10 --data-path ~/data/cifar10
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 where an argument is refused."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    parser.set_defaults(**PRESETS[parser.parse_args(words).preset])
    options = parser.parse_args(words)
    logging.getLogger("flwr").setLevel(logging.WARNING)  # the runs' own log
    try:
        _audit(options, words)
    except ConfigError as exc:
        print(f"psl_flower.audit: {exc}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m psl_flower audit",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="digits", help="options by name (default: digits)")
    task = parser.add_argument_group("what is trained (default: the preset's)")
    task.add_argument("--dataset", choices=DATASETS, help="the default app's")
    task.add_argument("--data-path", default="", metavar="DIR", help="where the dataset's files are, as in the app")
    task.add_argument("--examples", type=int, default=2000, metavar="N", help="training examples used, at most")
    task.add_argument("--model", choices=MODELS, help="the default app's")
    task.add_argument("--cuts", nargs="+", metavar="NAME", help="first modules on the server")
    task.add_argument("--tail", default="", metavar="NAME", help="first module that is back on the clients")
    task.add_argument("--secure-aggregation", action="store_true", help="clients mask their sums")
    task.add_argument("--num-clients", type=int, default=8, metavar="K", help="half are the attacker's (default: 8)")
    task.add_argument("--rounds", type=int, metavar="N", help="of training; the last is attacked")
    task.add_argument("--batch-size", type=int, default=64, metavar="B", help="over all clients (default: 64)")
    task.add_argument("--learning-rate", type=float, default=0.02, help="of SGD with momentum 0.9 (default: 0.02)")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, metavar="NAME", help=f"{', '.join(ATTACKS)}")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="trainings of each combination (default: 1)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/audit"), metavar="DIR", help="(default: outputs/audit)"
    )
    return parser


def _audit(options: argparse.Namespace, words: Sequence[str]) -> None:
    check_int(options.seeds, "--seeds", least=1)
    data_path = str(Path(options.data_path).expanduser().resolve()) if options.data_path else ""
    config = RunConfig(
        dataset=options.dataset,
        data_path=data_path,
        model=options.model,
        learning_rate=options.learning_rate,
        augment="none",
    )
    result = audit(
        lambda seed: _model(config, seed),
        load_images(config, "train"),
        load_images(config, "test"),
        cuts=options.cuts,
        tail=options.tail or None,
        attacks=options.attacks,
        num_clients=options.num_clients,
        num_rounds=options.rounds,
        batch_size=options.batch_size,
        optimizer=partial(make_optimizer, config),
        secure_aggregation=options.secure_aggregation,
        examples=options.examples,
        seeds=range(options.seeds),
    )
    result.settings.update(dataset=options.dataset, provenance=provenance(words, 1, "psl_flower audit"))
    paths = save_report(result, options.output)
    print(result.markdown())
    for path in paths:
        print(path)


def _model(config: RunConfig, seed: int) -> nn.Module:
    spec = SPECS[config.dataset]
    return build_model(config.model, in_channels=spec.shape[0], num_classes=spec.num_classes, seed=seed)
