"""What a sweep is: a TOML file read into the trainings it asks for."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from psl_flower.checks import check_choice
from psl_flower.config import RunConfig
from psl_flower.errors import ConfigError
from psl_flower.experiments.setting import Setting
from psl_flower.presets import preset_text

ENGINES = ("vectorised", "in-process", "simulation")
FORMS = ("quick", "full")

_TABLES = ("title", "description", "engine", "config", "axes", "methods", "paper", *FORMS)
# The runner's own: where results go, and how an interrupted run goes on.
_TAKEN = ("output-dir", "resume-from", "checkpoint-every", "keep-checkpoints")
_SETTING = {f.name.replace("_", "-"): f.name for f in fields(Setting) if f.name != "config"}
_CONFIG = {key: key.replace("-", "_") for key in RunConfig().as_run_config() if key not in {*_TAKEN, *_SETTING}}
_VECTORISED_ONLY = ("examples", "double", "channels_last")
# What was written before sweeps read the app's `precision`, and what is now.
_FORMER_PRECISIONS = {"float32": "precision = 'full'", "bfloat16": "precision = 'bf16'", "float64": "double = true"}

# Keys that change where or how fast a training runs, not what comes out.
_OUTSIDE = ("output-dir", "data-path", "threads", "loggers")
# What an algorithm does not look at: keys that begin so.
_SAMPLERS = ("sampler",)
_CLIENTS = ("sampler", "partition", "classes-per-client", "dirichlet-alpha", "delays", "simulated-delays")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One combination of a sweep: what it is called there, and the training behind it.

    Parameters
    ----------
    method : str
        Its label in tables and pictures.
    values : dict
        Its place on every axis but "method".
    setting : Setting
        The training, without what it does not depend on: equal settings are trained once.
    engine : str
        One of `ENGINES`.
    """

    method: str
    values: Mapping[str, Any]
    setting: Setting
    engine: str

    @cached_property
    def name(self) -> str:
        """Name of its folder: readable, and unique by a hash of all that its result depends on."""
        setting, config = self.setting, self.setting.config.as_run_config()
        content = {k: v for k, v in config.items() if k not in (*_OUTSIDE, *_TAKEN)}
        content |= {key: getattr(setting, name) for key, name in _SETTING.items()} | {"engine": self.engine}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
        kind = setting.config.sampler if setting.algorithm == "psl" else setting.algorithm
        kind = re.sub(r"[^\w-]+", "-", kind)  # a sampler's own class is written with a colon
        return f"{kind}-k{setting.num_clients}-seed{setting.config.seed}-{digest}"

    @property
    def label(self) -> str:
        """The combination in words."""
        return ", ".join([self.method, *(f"{key} {value}" for key, value in self.values.items())])


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep, with the form that was asked for already applied.

    Parameters
    ----------
    title, description : str
    engine : str
        One of `ENGINES`.
    config : dict
        Keys of all runs.
    axes : dict
        Every axis with its values, without "method".
    methods : dict
        Label to the keys of that method alone.
    paper : dict
        Figures to show beside ours: ``source``, ``conditions`` and ``accuracy``, {label: {value on the axis: percent}}.
    form : str
        "", "quick" or "full".
    """

    title: str
    description: str = ""
    engine: str = "vectorised"
    config: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    form: str = ""

    def experiments(self) -> list[Experiment]:
        """Return every combination, those of the first seed first."""
        keys = sorted(self.axes, key=lambda key: key != "seed")
        return [
            self._experiment(method, {key: values[keys.index(key)] for key in self.axes})
            for values in itertools.product(*(self.axes[key] for key in keys))
            for method in self.methods
        ]

    def _experiment(self, method: str, values: Mapping[str, Any]) -> Experiment:
        keys = {"num-clients": 2, **self.config, **values, **self.methods[method]}
        try:
            if now := _FORMER_PRECISIONS.get(str(keys.get("precision"))):
                raise ConfigError(f"precision is the app's key by now, got {keys['precision']!r}: write {now}")
            config = RunConfig.read({key: value for key, value in keys.items() if key in _CONFIG})
            setting = Setting(config=config, **{name: keys[key] for key, name in _SETTING.items() if key in keys})
            engine = _engine_of(self.engine, setting)
        except ConfigError as exc:
            where = ", ".join([f"method {method!r}", *(f"{key} = {value!r}" for key, value in values.items())])
            raise ConfigError(f"{where}: {exc}") from exc
        return Experiment(method=method, values=dict(values), setting=_essential(setting), engine=engine)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can have it."""
        return asdict(self)


def _engine_of(engine: str, setting: Setting) -> str:
    """Return how a setting is trained: only parallel split learning has clients to be simulated."""
    if engine == "vectorised" or setting.algorithm != "psl":
        return "vectorised"
    for name in _VECTORISED_ONLY:
        default = next(f.default for f in fields(Setting) if f.name == name)
        if getattr(setting, name) != default:
            raise ConfigError(
                f"{name.replace('_', '-')} is for engine 'vectorised', got {getattr(setting, name)!r} with engine "
                f"{engine!r}: leave it out"
            )
    return engine


def _essential(setting: Setting) -> Setting:
    """Return the setting with defaults in place of all that its algorithm does not look at."""
    if setting.algorithm in ("psl", "centralised"):
        setting = replace(setting, local_batch_size=0, local_epochs=1)
    if setting.algorithm == "psl":
        return setting
    unread = _CLIENTS if setting.algorithm == "centralised" else _SAMPLERS
    defaults = RunConfig()
    changes = {
        f.name: getattr(defaults, f.name) for f in fields(RunConfig) if f.name.replace("_", "-").startswith(unread)
    }
    if setting.algorithm == "centralised":
        setting = replace(setting, num_clients=1)
    return replace(setting, config=replace(setting.config, **changes))


# --- reading ---------------------------------------------------------------------------------------------------------
def read_sweep(source: str, form: str = "", overrides: Mapping[str, Any] | None = None) -> Sweep:
    """Read a preset or a TOML file.

    Parameters
    ----------
    source : str
        A preset's name, or a path that ends in ``.toml``.
    form : str
        "quick" or "full": apply that table. "": quick where the file has both, else the file as it stands.
    overrides : dict
        Keys with values that replace those of the file, for all runs; a list of values makes an axis.

    Raises
    ------
    ConfigError
        If the file cannot be read, or a key or a value is refused.
    """
    text = _text(source)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{source} is no TOML: {exc}") from exc
    try:
        sweep = _sweep({"title": Path(source).stem, **table}, form, overrides or {})
        sweep.experiments()  # refuses what does not go together
        return sweep
    except ConfigError as exc:
        raise ConfigError(f"{source}: {exc}") from exc


def _text(source: str) -> str:
    if not source.endswith(".toml"):
        return preset_text(source, "experiments", "a sweep (a preset, or a path that ends in .toml)")
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the sweep {source} cannot be read: {exc}") from exc


def _sweep(table: Mapping[str, Any], form: str, overrides: Mapping[str, Any]) -> Sweep:
    for key in table:
        check_choice(key, "a key of a sweep", _TABLES)
    if not form and all(name in table for name in FORMS):
        form = "quick"
    if form and form not in table:
        raise ConfigError(
            f"there is no form {form!r}: add a table [{form}.config] with what it changes, or leave it out"
        )
    for name in FORMS:
        for key in _as_table(table.get(name, {}), name):
            check_choice(key, f"a key of [{name}]", [t for t in _TABLES if t not in (*FORMS, "title")])
    merged = _merge({k: v for k, v in table.items() if k not in FORMS}, table.get(form, {}))
    _check_tables(merged)
    config, axes, methods = (dict(merged.get(name, {})) for name in ("config", "axes", "methods"))
    for key, value in overrides.items():
        check_choice(key, "a key to set", {"method": "", **_CONFIG, **_SETTING})
        methods = {label: {k: v for k, v in its.items() if k != key} for label, its in methods.items()}
        if isinstance(value, list) or key in ("method", "seed") or key in axes:
            axes[key] = value if isinstance(value, list) else [value]
        else:
            config[key] = value
    methods = methods or {config.get("sampler", RunConfig().sampler): {}}
    chosen = axes.pop("method", list(methods))
    _check_axes({**axes, "method": chosen}, methods)
    axes.setdefault("seed", [config.pop("seed", 0)])
    return Sweep(
        title=merged["title"],
        description=merged.get("description", "").strip(),
        engine=check_choice(merged.get("engine", "vectorised"), "engine", ENGINES),
        config=config,
        axes=axes,
        methods={label: methods[label] for label in chosen},
        paper=merged.get("paper", {}),
        form=form,
    )


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with what `over` has in place of it, table by table."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _as_table(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"[{name}] must be a table of keys and values, got {value!r}")
    return value


def _check_tables(table: Mapping[str, Any]) -> None:
    for key in ("title", "description", "engine"):
        if not isinstance(table.get(key, ""), str):
            raise ConfigError(f"{key} must be a string, got {table[key]!r}")
    methods, axes = (_as_table(table.get(name, {}), name) for name in ("methods", "axes"))
    tables = {"config": table.get("config", {}), "axes": axes}
    tables |= {f"methods.{label}": its for label, its in methods.items()}
    for name, content in tables.items():
        for key in _as_table(content, name):
            if key in _TAKEN:
                raise ConfigError(f"{key} is the runner's own, it cannot stand in [{name}]: leave it out")
            if key in (*axes, "seed") and name.startswith("methods."):  # seed is one always
                raise ConfigError(f"{key} is an axis, and set in [{name}]: leave one of the two out")
            check_choice(key, f"a key of [{name}]", [*(["method"] if name == "axes" else []), *_CONFIG, *_SETTING])
    paper = _as_table(table.get("paper", {}), "paper")
    for key in paper:
        check_choice(key, "a key of [paper]", ("source", "conditions", "accuracy"))
    for label, figures in _as_table(paper.get("accuracy", {}), "paper.accuracy").items():
        check_choice(label, "a method of [paper.accuracy]", methods)
        _as_table(figures, f"paper.accuracy.{label}")


def _check_axes(axes: Mapping[str, Any], methods: Mapping[str, Any]) -> None:
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"axis {key} must be a list of at least one value, got {values!r}")
        if len({json.dumps(value, default=str) for value in values}) < len(values):
            raise ConfigError(f"axis {key} must name each value once, got {values!r}")
    for label in axes["method"]:
        check_choice(label, "a value of axis method", methods)


def distinct(experiments: Sequence[Experiment]) -> Iterator[Experiment]:
    """Yield one experiment of each training, in order."""
    seen: set[str] = set()
    for experiment in experiments:
        if experiment.name not in seen:
            seen.add(experiment.name)
            yield experiment
