"""Samplers by name."""

import pytest

from psl_flower import samplers
from psl_flower.errors import ConfigError
from psl_flower.samplers import make_sampler
from psl_flower.samplers.registry import NAMED


@pytest.mark.parametrize(
    ("short", "long", "cls"),
    [
        ("fls", "fixed-local", samplers.FixedLocalSampler),
        ("fpls", "fixed-proportional", samplers.FixedProportionalSampler),
        ("ugs", "uniform-global", samplers.UniformGlobalSampler),
        ("lds", "latent-dirichlet", samplers.LatentDirichletSampler),
        ("lb", "latency-budgeted", samplers.LatencyBudgetedSampler),
        ("aligned", "aligned", samplers.AlignedSampler),
        ("poisson", "poisson-global", samplers.PoissonGlobalSampler),
    ],
)
def test_short_and_long_names(short, long, cls):
    for name in (short, long):
        sampler = make_sampler(name, 32, seed=5)
        assert type(sampler) is cls
        assert (sampler.batch_size, sampler.seed) == (32, 5)


def test_every_exported_sampler_has_a_name():
    exported = {getattr(samplers, name) for name in samplers.__all__ if name.endswith("Sampler")} - {samplers.Sampler}
    assert exported == set(NAMED.values())


def test_options_reach_the_sampler():
    sampler = make_sampler("lds", 8, delta=0.5, order="natural")
    assert (sampler.delta, sampler.order) == (0.5, "natural")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("usg", {}, r"sampler must be one of 'fls'.*'uniform-global'.*got 'usg' \(did you mean 'ugs'\?\)"),
        (None, {}, "sampler must be one of"),
        ("ugs", {"delta": 1}, "sampler 'ugs' has no options, got 'delta'"),
        ("lds", {"dleta": 1}, r"an option of sampler 'lds' must be one of 'delta'.*did you mean 'delta'"),
        ("lds", {"delta": "much"}, "delta must be a number"),
    ],
)
def test_refuses_unknown_names_and_options(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_sampler(name, 8, **options)


def test_a_class_of_ones_own_is_named_by_its_module(tmp_path, monkeypatch):
    code = "from psl_flower.samplers import UniformGlobalSampler\nclass Mine(UniformGlobalSampler):\n    pass\n"
    (tmp_path / "my_samplers.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    sampler = make_sampler("my_samplers:Mine", 32, seed=5)
    assert (type(sampler).__name__, sampler.batch_size, sampler.seed) == ("Mine", 32, 5)
    for name, message in (
        ("my_samplers:Yours", "sampler 'my_samplers:Yours' cannot be imported .*write package.module:Class"),
        ("not_there:Mine", "cannot be imported"),
        (":Mine", "cannot be imported"),
        ("psl_flower.samplers:Population", "must be a subclass of psl_flower.samplers.Sampler"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_sampler(name, 32)
