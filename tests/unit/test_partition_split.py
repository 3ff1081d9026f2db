"""The splits as arrays of indices: covers, the distributions they are drawn from, scarce data, and every error."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from psl_flower.errors import ConfigError
from psl_flower.partition import extended_dirichlet_split, iid_split
from psl_flower.partition.split import _fill_empty

LABELS = np.repeat(np.arange(10), 500)


def split(labels=LABELS, num_partitions=16, num_classes=2, alpha=3.0, seed=0):
    return extended_dirichlet_split(labels, num_partitions, num_classes, alpha, seed)


def assert_cover(parts, num_examples):
    """Check that ascending, non-empty parts hold every index once."""
    assert all(len(part) and (np.diff(part) > 0).all() for part in parts)
    assert sorted(itertools.chain.from_iterable(part.tolist() for part in parts)) == list(range(num_examples))


class TestIidSplit:
    @pytest.mark.parametrize(("num_examples", "num_partitions"), [(1, 1), (10, 1), (10, 3), (10, 10), (1000, 7)])
    def test_covers_in_nearly_equal_parts(self, num_examples, num_partitions):
        parts = iid_split(num_examples, num_partitions, np.random.default_rng(0))
        assert len(parts) == num_partitions
        assert_cover(parts, num_examples)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1

    def test_every_example_goes_anywhere_with_equal_chance(self):
        rng = np.random.default_rng(0)
        firsts = np.zeros(12)
        for _ in range(2000):
            firsts[iid_split(12, 3, rng)[0]] += 1
        assert stats.chisquare(firsts).pvalue > 1e-4

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                (3, 4),
                r"every partition \(client\) needs at least one example, got 3 examples for 4 partitions: take fewer",
            ),
            ((0, 1), "num_examples must be at least 1, got 0"),
            ((3, 0), "num_partitions must be at least 1, got 0"),
        ],
    )
    def test_refuses(self, arguments, message):
        with pytest.raises(ConfigError, match=message):
            iid_split(*arguments, np.random.default_rng(0))


class TestExtendedDirichletSplit:
    @pytest.mark.parametrize(("num_partitions", "num_classes"), [(1, 10), (5, 2), (10, 1), (16, 2), (64, 5), (500, 3)])
    def test_covers_with_so_many_classes_each(self, num_partitions, num_classes):
        for seed in range(5):
            parts = split(num_partitions=num_partitions, num_classes=num_classes, seed=seed)
            assert len(parts) == num_partitions
            assert_cover(parts, len(LABELS))
            held = [len(set(LABELS[part])) for part in parts]
            assert max(held) == num_classes
            # with little data to a holder, a share may round to nothing
            assert np.mean(held) > 0.9 * num_classes

    def test_is_a_function_of_the_generator(self):
        one, same, other = split(seed=1), split(seed=1), split(seed=2)
        assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

    @pytest.mark.parametrize(
        "names",
        [
            [f"class {c}" for c in range(10)],
            [-5, 0, 7, 9, 100, 101, 2**40, 2**41, 2**42, 2**43],
            np.array([f"class {c}" for c in range(10)], dtype=object),
            np.linspace(0, 1, 10),
        ],
    )
    def test_label_values_do_not_matter(self, names):
        for part, expected in zip(split(np.asarray(names)[LABELS]), split(), strict=True):
            np.testing.assert_array_equal(part, expected)

    def test_two_truth_values_are_two_classes(self):
        parts = split(np.arange(20) % 3 == 0, num_partitions=4, num_classes=1)
        assert_cover(parts, 20)
        assert all(len(set((part % 3 == 0).tolist())) == 1 for part in parts)

    def test_order_of_examples_does_not_matter(self):
        labels = np.random.default_rng(0).permutation(LABELS)
        parts = split(labels)
        assert_cover(parts, len(labels))
        assert {len(set(labels[part])) for part in parts} == {2}

    def test_which_examples_of_a_class_a_holder_gets_is_random(self):
        # one class, two holders: each example is as likely to be the first's as any other
        rng = np.random.default_rng(0)
        firsts = np.zeros(20)
        for _ in range(2000):
            firsts[extended_dirichlet_split(np.zeros(20, int), 2, 1, 3.0, rng)[0]] += 1
        assert stats.chisquare(firsts).pvalue > 1e-4

    def test_classes_have_almost_equally_many_holders(self):
        for seed in range(20):
            parts = split(num_partitions=64, num_classes=2, seed=seed)
            holders = np.bincount([label for part in parts for label in set(LABELS[part].tolist())])
            assert holders.min() >= 12
            assert holders.max() <= 14

    @pytest.mark.parametrize(("num_classes", "num_partitions", "per_partition"), [(3, 4, 1), (3, 3, 2), (2, 3, 1)])
    def test_choice_of_classes_has_the_probabilities_of_the_definition(
        self, num_classes, num_partitions, per_partition
    ):
        exact = class_choices(num_classes, num_partitions, per_partition)
        labels, num_splits = np.repeat(np.arange(num_classes), 30), 2000
        rng = np.random.default_rng(0)
        seen = Counter()
        for _ in range(num_splits):
            parts = extended_dirichlet_split(labels, num_partitions, per_partition, 100.0, rng)
            seen[tuple(frozenset(labels[part].tolist()) for part in parts)] += 1
        assert set(seen) <= set(exact)
        expected = num_splits * np.array(list(exact.values()))
        observed = np.array([seen[choice] for choice in exact])
        rare = expected < 5
        if rare.any():
            expected, observed = (
                np.r_[expected[~rare], expected[rare].sum()],
                np.r_[observed[~rare], observed[rare].sum()],
            )
        assert stats.chisquare(observed, expected).pvalue > 1e-4
        uniform = np.full(len(observed), observed.mean())
        assert stats.chisquare(observed, uniform).pvalue < 1e-9  # the test would notice equal probabilities

    @pytest.mark.parametrize("alpha", [0.5, 3.0, 20.0])
    def test_shares_of_a_class_are_dirichlet(self, alpha):
        rng = np.random.default_rng(0)
        labels = np.zeros(5000, int)
        shares = [len(extended_dirichlet_split(labels, 4, 1, alpha, rng)[1]) / len(labels) for _ in range(1000)]
        assert stats.kstest(shares, stats.beta(alpha, 3 * alpha).cdf).pvalue > 1e-4
        assert stats.kstest(shares, stats.beta(2 * alpha, 6 * alpha).cdf).pvalue < 1e-4

    @pytest.mark.parametrize("alpha", [1e-300, 1e-3, 0.1])
    def test_no_partition_is_empty_however_uneven_the_shares(self, alpha):
        for seed in range(5):
            assert_cover(split(num_partitions=1000, alpha=alpha, seed=seed), len(LABELS))

    def test_as_many_partitions_as_examples(self):
        for seed in range(20):
            parts = split(np.repeat(np.arange(4), 5), num_partitions=20, num_classes=2, seed=seed)
            assert [len(part) for part in parts] == [1] * 20

    def test_a_class_of_one_example(self):
        labels = np.r_[np.zeros(999, int), 1]
        for seed in range(10):
            parts = split(labels, num_partitions=10, num_classes=2, seed=seed)
            assert_cover(parts, 1000)

    def test_thousands_of_classes_do_not_underflow(self):
        labels = np.repeat(np.arange(2000), 3)
        parts = split(labels, num_partitions=1000, num_classes=2)  # exp(-2000) is 0: every class has one holder
        assert [len(part) for part in parts] == [6] * 1000

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_partitions": 0}, "num_partitions must be at least 1, got 0"),
            ({"num_partitions": 2.0}, "num_partitions must be a whole number, got 2.0"),
            ({"num_classes": 0}, "num_classes_per_partition must be at least 1, got 0"),
            ({"alpha": 0}, "alpha must be greater than 0, got 0"),
            ({"alpha": float("nan")}, "alpha must be finite, got nan"),
            ({"num_classes": 11}, "must not exceed the number of classes, got 11 for 10 classes"),
            (
                {"num_partitions": 4},
                "4 partitions of 2 classes each hold at most 8 of 10 classes: take more partitions",
            ),
            (
                {"num_partitions": 5001},
                "at least one example, got 5000 examples for 5001 partitions: take fewer",
            ),
            ({"labels": []}, r"labels must be one value an example, got shape \(0,\)"),
            ({"labels": np.array([], dtype=object)}, r"labels must be one value an example, got shape \(0,\)"),
            ({"seed": -1}, "rng must be at least 0, got -1"),
            ({"labels": [[1], [2]]}, r"labels must be one value an example, got shape \(2, 1\)"),
            ({"labels": [[1], [2, 3]]}, "labels must be comparable with each other"),
            ({"labels": np.array(["a", 1], dtype=object)}, "labels must be comparable with each other"),
            ({"labels": ["a", None, "b", None]}, "needs a label, got None for 2 of 4, first at index 1: leave those"),
            ({"labels": [1.0, 2.0, np.nan]}, "needs a label, got nan for 1 of 3, first at index 2"),
            ({"labels": np.array(["a", np.nan], dtype=object)}, "needs a label, got nan for 1 of 2, first at index 1"),
        ],
    )
    def test_refuses(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            split(**changes)

    def test_says_which_classes_are_too_small_for_their_holders(self):
        labels = np.array(["common"] * 95 + ["rare"] * 5)
        message = r"(\d+) partitions drew only classes 'rare', which have 5 examples: lower num_partitions or raise"
        with pytest.raises(ConfigError, match=message):
            split(labels, num_partitions=20, num_classes=1)
        assert_cover(split(labels, num_partitions=20, num_classes=2), 100)


class TestFillEmpty:
    def fill(self, chosen, counts):
        chosen, counts = np.array(chosen), np.array(counts)
        holders = [np.flatnonzero(chosen.ravel() == c) for c in range(chosen.max() + 1)]
        _fill_empty(chosen, counts, holders, np.arange(len(holders)))
        return counts.tolist()

    def test_takes_from_the_holder_that_has_most(self):
        assert self.fill([[0], [0], [0]], [[0], [2], [5]]) == [[1], [2], [4]]

    def test_takes_along_a_chain_where_all_holders_have_one(self):
        # 0 needs an example of class 0 or 1, held one each by 1 and 2; 1 can take one of class 2 from 3 in exchange
        chosen = [[0, 1], [0, 2], [1, 3], [2, 4], [3, 4]]
        counts = [[0, 0], [1, 0], [1, 0], [4, 0], [0, 1]]
        assert self.fill(chosen, counts) == [[1, 0], [0, 1], [1, 0], [3, 0], [0, 1]]

    @given(st.integers(1, 12), st.integers(1, 5), st.data())
    def test_fails_only_where_no_assignment_exists(self, num_partitions, num_classes, data):
        per_partition = data.draw(st.integers(1, num_classes))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        chosen = np.array([rng.permutation(num_classes)[:per_partition] for _ in range(num_partitions)])
        num_classes = chosen.max() + 1
        holders = [np.flatnonzero(chosen.ravel() == c) for c in range(num_classes)]
        sizes = rng.integers(0, 5, size=num_classes) * [len(entries) > 0 for entries in holders]
        counts = np.zeros(chosen.shape, dtype=np.int64)
        for entries, size in zip(holders, sizes, strict=True):
            if len(entries):
                counts.flat[entries] = rng.multinomial(size, rng.dirichlet(np.full(len(entries), 0.2)))
        try:
            _fill_empty(chosen, counts, holders, np.arange(num_classes))
            filled = True
        except ConfigError:
            filled = False
        assert filled == self.is_feasible(chosen, sizes)
        by_class = np.bincount(chosen.ravel(), weights=counts.ravel(), minlength=num_classes)
        assert by_class.tolist() == sizes.tolist()  # no example is lost or made, either way
        assert counts.min() >= 0
        if filled:
            assert counts.sum(axis=1).min() > 0

    @staticmethod
    def is_feasible(chosen, sizes):
        """Return whether each partition can have an example of its own: a flow source -> class -> partition -> sink."""
        num_partitions, num_classes = len(chosen), len(sizes)
        source, sink = num_classes + num_partitions, num_classes + num_partitions + 1
        capacity = np.zeros((sink + 1, sink + 1), dtype=np.int32)
        capacity[source, :num_classes] = sizes
        for k, classes in enumerate(chosen):
            capacity[classes, num_classes + k] = 1
        capacity[num_classes:source, sink] = 1
        return maximum_flow(csr_array(capacity), source, sink).flow_value == num_partitions


def class_choices(num_classes, num_partitions, per_partition):
    """Return the exact probability of every choice of classes, given that every class has a holder."""
    states = {((), (0,) * num_classes): 1.0}
    for _ in range(num_partitions):
        following = Counter()
        for (choice, times), probability in states.items():
            for draws in itertools.permutations(range(num_classes), per_partition):
                weights = np.exp(-num_classes * np.array(times, dtype=float))
                chance = probability
                for c in draws:  # without replacement: the weights of those drawn fall away
                    chance *= weights[c] / weights.sum()
                    weights[c] = 0
                now = tuple(n + (c in draws) for c, n in enumerate(times))
                following[(*choice, frozenset(draws)), now] += chance
        states = following
    complete = {choice: probability for (choice, times), probability in states.items() if all(times)}
    total = sum(complete.values())
    return {choice: probability / total for choice, probability in complete.items()}


def test_a_seed_stands_for_its_generator():
    by_seed, by_generator = iid_split(12, 3, 7), iid_split(12, 3, np.random.default_rng(7))
    np.testing.assert_array_equal(by_seed, by_generator)
    assert [part.tolist() for part in split(seed=7)] == [part.tolist() for part in split(seed=np.random.default_rng(7))]
