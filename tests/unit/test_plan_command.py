"""Look before running: the command's table, picture, warnings and refusals, and the parts it is made of."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from psl_flower import cli
from psl_flower.errors import ConfigError
from psl_flower.metrics import schedule_lower_bound
from psl_flower.plan import (
    balanced_labels,
    format_table,
    plan_epoch,
    read_labels,
    read_population,
    save_picture,
    split_labels,
    summarize_epochs,
)
from psl_flower.plan.command import parse_spec
from psl_flower.plan.picture import SpeedGroups, speed_shares
from psl_flower.plan.table import format_seconds
from psl_flower.samplers import AlignedSampler, BatchPlan, Delays, FixedLocalSampler, Population, UniformGlobalSampler

SMALL = ["--num-clients", "8", "--num-examples", "2000", "--batch-size", "32", "--no-picture"]


def run(capsys, *arguments):
    """Return exit status, output and errors of the command."""
    status = cli.main(["plan", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def rows_of(output):
    """Return the cells of the table's lines, keyed by sampler."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---")) + 1
    rows = [re.split(" {2,}", line) for line in lines[start:]]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


class TestCommand:
    def test_compares_samplers_in_an_aligned_table(self, capsys):
        status, output, errors = run(capsys, *SMALL, "ugs", "fls", "lds:delta=0.5")
        assert (status, errors) == (0, "")
        assert output.startswith("8 clients with ")
        rows = rows_of(output)
        assert list(rows) == ["ugs", "fls", "lds:delta=0.5"]
        assert rows["ugs"][0] == "63"
        assert rows["ugs"][1] == "31-32"
        assert "1.000" in rows["ugs"]
        assert int(rows["fls"][0]) > 63
        table = [line for line in output.splitlines() if line.startswith(("sampler", "ugs", "fls", "lds"))]
        assert len({len(line) for line in table if not line.startswith("sampler")}) == 1  # columns line up

    def test_numbers_are_those_of_the_plan(self, capsys, tmp_path):
        (tmp_path / "sizes.csv").write_text("client_id,a,b\n4,10,0\n7,0,30\n", encoding="utf-8")
        (tmp_path / "delays.csv").write_text("client_id,latency,per_sample\n4,1,0\n7,2,0.5\n", encoding="utf-8")
        _, output, _ = run(
            capsys, "--sizes", tmp_path / "sizes.csv", "--delays", f"csv:path={tmp_path / 'delays.csv'}",
            "--batch-size", 8, "fpls", "--no-picture",
        )  # fmt: skip
        # quotas 2 and 6 in each of 5 steps: 2 + 0.5 * 6 = 5 s a step, batches exactly as the whole
        assert rows_of(output)["fpls"][:3] == ["5", "8-8", "25.0 s"]
        assert rows_of(output)["fpls"][4:10] == ["-", "0.000", "0.000", "0.000", "0.000", "2.0"]

    def test_tells_the_least_time_possible_with_a_sampler_s_class_targets(self, capsys):
        _, output, _ = run(capsys, *SMALL, "ugs", "lb", "aligned")
        rows = rows_of(output)
        assert rows["ugs"][4] == "-"
        for name in ("lb", "aligned"):
            assert 0.1 < float(rows[name][4]) <= float(rows[name][3])
        _, output, _ = run(capsys, *SMALL, "lb", "--no-bound")
        assert rows_of(output)["lb"][4] == "-"

    def test_average_over_seeds_and_epochs_is_theirs(self, capsys):
        ratios = []
        for arguments in (["--seeds", 3], *(["--seed", seed] for seed in range(3))):
            _, output, _ = run(capsys, *SMALL, "lds", *arguments)
            ratios.append(float(rows_of(output)["lds"][3]))
        assert len(set(ratios[1:])) > 1
        assert ratios[0] == pytest.approx(np.mean(ratios[1:]), abs=0.001)

    def test_writes_a_picture(self, capsys, tmp_path):
        path = tmp_path / "plan.png"
        arguments = [a for a in SMALL if a != "--no-picture"]
        status, output, _ = run(capsys, *arguments, "ugs", "lds", "--output", path)
        assert status == 0
        assert f"picture: {path}" in output
        assert path.read_bytes().startswith(b"\x89PNG")

    def test_warns_where_classes_are_starved(self, capsys):
        _, output, _ = run(capsys, "--num-clients", 64, "fls", "ugs", "--no-picture")
        warnings = [line for line in output.splitlines() if line.startswith("warning:")]
        assert len(warnings) == 1
        assert warnings[0].startswith("warning: fls: class ")
        assert "in a row" in warnings[0]
        assert warnings[0].endswith("may forget them: choose another sampler, such as ugs")

    def test_warns_where_a_delta_starves_the_stragglers_classes(self, capsys, tmp_path):
        """The worst case: stragglers hold all of two classes, 40 % of the data."""
        sizes = ["client_id,a,b,c,d,e"] + [f"{k},{'200,200,0,0,0' if k < 6 else '0,0,133,133,134'}" for k in range(15)]
        (tmp_path / "sizes.csv").write_text("\n".join(sizes), encoding="utf-8")
        delays = ["client_id,latency,per_sample"] + [f"{k},{10 if k < 6 else 1},0" for k in range(15)]
        (tmp_path / "delays.csv").write_text("\n".join(delays), encoding="utf-8")
        _, output, _ = run(
            capsys, "--sizes", tmp_path / "sizes.csv", "--delays", f"csv:path={tmp_path / 'delays.csv'}",
            "--batch-size", 64, "--no-picture",
            "lds:delta=2", "lds:delta=2,order=natural", "lds:delta=0.1",
            "aligned:targets=stratified,tilt=0.5", "aligned:targets=stratified,tilt=0.1", "aligned", "lb",
        )  # fmt: skip
        warnings = [line for line in output.splitlines() if line.startswith("warning:")]
        starving = ["lds:delta=2", "lds:delta=2,order=natural", "aligned:targets=stratified,tilt=0.5"]
        assert [line.split(": ")[1] for line in warnings] == starving
        assert "of the steps" in warnings[0]
        assert "in a row" in warnings[1]
        remedies = [line.split("forget them: ")[1] for line in warnings]
        other = "choose another sampler, such as ugs"
        assert remedies[0] == f"lower its delta, or {other}"
        assert remedies[1] == f"lower its delta, or shuffle its steps, order=shuffled, or {other}"
        assert remedies[2] == f"lower its tilt, or {other}"

    def test_warns_where_lds_would_leave_clients_out(self, capsys):
        _, output, _ = run(capsys, *SMALL, "lds:sample_size=5", "lds")
        assert output.count("warning: lds:sample_size=5: c * sample_size is below the number of clients, 5 for 8") == 1
        assert "warning: lds: c *" not in output

    def test_without_delays_there_is_nothing_to_compare_times_with(self, capsys):
        _, output, _ = run(capsys, *SMALL, "--delays", "none", "ugs")
        assert rows_of(output)["ugs"][2:4] == ["0 ms", "-"]

    def test_sizes_alone_leave_out_samplers_that_go_by_class(self, capsys, tmp_path):
        path = tmp_path / "sizes.csv"
        path.write_text("client_id,size\n1,10\n2,30\n", encoding="utf-8")
        arguments = ["--sizes", path, "--batch-size", 8, "--no-picture"]
        status, output, _ = run(capsys, *arguments, "ugs", "lds")
        assert status == 0
        assert list(rows_of(output)) == ["ugs"]
        assert "note: lds is left out, it needs the clients' classes" in output
        status, _, errors = run(capsys, *arguments, "lds")
        assert status == 2
        assert "none of the samplers can plan without knowing the clients' classes" in errors

    def test_labels_from_a_file_are_split(self, capsys, tmp_path):
        np.save(tmp_path / "labels.npy", np.repeat(["cat", "dog", "eel"], 200))
        status, output, _ = run(
            capsys, "--labels", tmp_path / "labels.npy", "--num-clients", 5, "--split", "iid", "--batch-size", 16,
            "ugs", "--no-picture",
        )  # fmt: skip
        assert status == 0
        assert output.startswith("5 clients with 120-120 of 600 examples, 3 classes, iid split")

    def test_a_dataset_is_split_as_in_a_run(self, capsys):
        from psl_flower.app.task import split_indices
        from psl_flower.config import RunConfig

        arguments = ["--dataset", "digits", "--num-clients", 6, "--split", "severe", "--seed", 3, "--batch-size", 32]
        status, output, _ = run(capsys, *arguments, "ugs", "--no-picture")
        assert status == 0
        sizes = [len(part) for part in split_indices(RunConfig(partition="severe", seed=3), "train", 6)]
        first = f"6 clients with {min(sizes)}-{max(sizes)} of 1437 examples, 10 classes, severe split of digits;"
        assert output.startswith(first)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--dataset", "digit"], "--dataset must be one of 'digits'"),
            (["--dataset", "digits", "--data-path", "/nowhere"], "takes no data-path"),
            (["--dataset", "digits", "--sizes", "a.csv"], "got --sizes and --dataset: leave one out"),
            (["usg"], "sampler must be one of"),
            (["--alpha", "0"], "--alpha must be greater than 0"),
            (["--classes-per-client", "0"], "--classes-per-client must be at least 1"),
            (["--alpha", "1", "--sizes", "a.csv"], "--classes-per-client and --alpha shape a split, --sizes says who"),
            (["lds:dleta=1"], "did you mean 'delta'"),
            (["lds:delta"], "options are written name:option=value"),
            (["--delays", "slow"], "delays must be one of"),
            (["--delays", "measured"], "measured delays come from a run"),
            (["--delays", "csv:path=/nowhere.csv"], "cannot be read"),
            (["--batch-size", "0"], "--batch-size must be at least 1"),
            (["--batch-size", "2001"], "lower batch_size"),
            (["--epochs", "0"], "--epochs must be at least 1"),
            (["--seeds", "0"], "--seeds must be at least 1"),
            (["--seed", "-1"], "--seed must be at least 0"),
            (["--num-clients", "2", "--split", "severe"], "every class needs a holder"),
            (["--split", "iid", "--alpha", "1"], "shape the splits 'mild' and 'severe'"),
            (["--sizes", "a.csv", "--labels", "b.npy"], "leave one out"),
            (["--sizes", "/nowhere.csv"], "the sizes in /nowhere.csv cannot be read"),
            (["--labels", "/nowhere.npy"], "the labels in /nowhere.npy cannot be read"),
        ],
    )
    def test_refuses_with_a_sentence_and_status_2(self, capsys, arguments, message):
        status, _, errors = run(capsys, *SMALL, *arguments)
        assert status == 2
        assert errors.startswith("psl-flower: ")
        assert message in errors
        assert errors.count("\n") == 1

    def test_json_has_the_numbers_of_the_table(self, capsys):
        status, output, _ = run(capsys, *SMALL, "ugs", "fls", "--json")
        assert status == 0
        told = json.loads(output)
        assert told["about"].startswith("8 clients with ")
        assert [(row["label"], row["steps"] > 60) for row in told["samplers"]] == [("ugs", True), ("fls", True)]
        assert told["samplers"][1]["relative_time"] > 0
        assert told["picture"] is None

    def test_runs_as_a_module(self):
        done = subprocess.run(
            [sys.executable, "-m", "psl_flower", "plan", *SMALL, "ugs"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert list(rows_of(done.stdout)) == ["ugs"]


class TestSpec:
    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            ("ugs", ("ugs", {})),
            ("lds:delta=1,order=natural", ("lds", {"delta": 1, "order": "natural"})),
            ("lds: sample-size = 10 ", ("lds", {"sample_size": 10})),
            ("csv:path=/a/b.csv", ("csv", {"path": "/a/b.csv"})),
            ("x:a=1e-3,b=None,c='1'", ("x", {"a": 1e-3, "b": None, "c": "1"})),
        ],
    )
    def test_reads_names_and_options(self, spec, expected):
        assert parse_spec(spec) == expected

    @pytest.mark.parametrize("spec", ["lds:delta", "lds:delta=1,delta=2", "lds:=,x"])
    def test_refuses_what_is_no_option(self, spec):
        with pytest.raises(ConfigError, match="name:option=value"):
            parse_spec(spec)


class TestPopulation:
    def test_split_gives_everyone_the_labels_of_its_examples(self):
        labels = balanced_labels(1000, 10)
        rng = np.random.default_rng(0)
        iid, mild, severe = (split_labels(labels, 20, split, rng) for split in ("iid", "mild", "severe"))
        for population in (iid, mild, severe):
            assert (population.label_counts.sum(axis=0) == 100).all()
        assert set(iid.sizes.tolist()) == {50}
        assert (mild.label_counts > 0).sum(axis=1).max() <= 5
        assert (severe.label_counts > 0).sum(axis=1).max() <= 2
        one = split_labels(labels, 20, "severe", rng, classes_per_client=1, alpha=1e6)
        assert ((one.label_counts > 0).sum(axis=1) == 1).all()
        assert set(one.sizes.tolist()) == {50}  # two holders a class, evenly

    def test_made_up_labels_are_balanced(self):
        assert np.bincount(balanced_labels(23, 5)).tolist() == [5, 5, 5, 4, 4]
        with pytest.raises(ConfigError, match="every class needs an example"):
            balanced_labels(4, 5)

    @pytest.mark.parametrize("text", ["b\na\n\na\n", "label\nb\na\na", "Labels\nb\r\na\r\na\r\n"])
    def test_labels_may_be_a_text_file(self, tmp_path, text):
        path = tmp_path / "labels.csv"
        path.write_text(text, encoding="utf-8")
        assert read_labels(path).tolist() == ["b", "a", "a"]

    def test_label_files_that_hold_none_are_refused(self, tmp_path):
        (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
        np.save(tmp_path / "table.npy", np.zeros((2, 2)))
        (tmp_path / "broken.npy").write_bytes(b"no")
        for name, message in (("empty.txt", "one label"), ("table.npy", "one label"), ("broken.npy", "cannot be read")):
            with pytest.raises(ConfigError, match=message):
                read_labels(tmp_path / name)

    def test_sizes_may_come_with_classes_or_without(self, tmp_path):
        path = tmp_path / "sizes.csv"
        path.write_text("client_id, size\n9, 3\n2, 5\n", encoding="utf-8")
        population = read_population(path)
        assert population.client_ids.tolist() == [2, 9]
        assert population.sizes.tolist() == [5, 3]
        assert population.label_counts is None
        path.write_text("client_id,cat,dog\n9,1,2\n2,5,0\n", encoding="utf-8")
        population = read_population(path)
        assert population.label_counts.tolist() == [[5, 0], [1, 2]]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "a header and one a client, got 0"),
            ("client_id,size\n", "a header and one a client, got 1"),
            ("id,size\n1,2\n", "columns client_id and size"),
            ("client_id\n1\n", "columns client_id and size"),
            ("client_id,size\n1,x\n", "2 whole numbers a line"),
            ("client_id,size\n1,2.5\n", "2 whole numbers a line"),
            ("client_id,size\n1,2,3\n", "2 whole numbers a line, got 3"),
            ("client_id,size\n1,2\n2\n", "2 whole numbers a line"),
            ("client_id,size\n1,2\n1,3\n", "unique"),
            ("client_id,size\n1,-2\n", "negative"),
        ],
    )
    def test_size_files_that_make_no_population_are_refused(self, tmp_path, text, message):
        path = tmp_path / "sizes.csv"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            read_population(path)


class TestMeasure:
    POPULATION = Population([0, 1], [6, 2], [[6, 0], [0, 2]], Delays([1.0, 4.0], [0.5, 0.0]))

    def test_an_epoch_knows_its_times_and_deviations(self):
        epoch = plan_epoch(FixedLocalSampler(4), self.POPULATION, 0)  # {0: 2, 1: 2}, {0: 2}, {0: 2}
        assert epoch.times.tolist() == [4.0, 2.0, 2.0]
        assert epoch.deviation.tolist() == [0.5, 0.5, 0.5]
        assert epoch.build_seconds > 0

    def test_bound_is_that_of_the_plan_s_class_targets(self):
        sampler = AlignedSampler(4)
        epoch = plan_epoch(sampler, self.POPULATION, 0, bound=True)
        targets = [step.class_quotas.sum(axis=0) for step in epoch.plan]
        assert epoch.bound == pytest.approx(schedule_lower_bound(self.POPULATION, targets))
        assert epoch.bound <= epoch.times.sum() + 1e-9
        summary = summarize_epochs("aligned", [epoch, plan_epoch(sampler, self.POPULATION, 1)], [16.0, 8.0])
        assert summary.relative_bound == pytest.approx(epoch.bound / 16)  # over the epochs that have one
        assert plan_epoch(UniformGlobalSampler(4), self.POPULATION, 0, bound=True).bound is None

    def test_summary_averages_epochs(self):
        epochs = [plan_epoch(FixedLocalSampler(size), self.POPULATION, 0) for size in (4, 8)]
        summary = summarize_epochs("fls", epochs, [16.0, 5.0])
        # B = 8: {0: 4, 1: 2}, {0: 2}: 4 s and 2 s
        assert summary.steps == 2.5
        assert (summary.least_batch, summary.largest_batch) == (2, 6)
        assert summary.epoch_time == 7.0
        assert summary.relative_time == pytest.approx((8 / 16 + 6 / 5) / 2)
        assert summary.participation == pytest.approx((4 / 3 + 3 / 2) / 2)
        assert summary.client_mix == pytest.approx((0.5 + (2 * (0.75 - 2 / 3) + 0.5) / 2) / 2)
        assert summary.deviation_weighted == pytest.approx((0.5 + (6 * 2 * (0.75 - 2 / 3) + 2 * 0.5) / 8) / 2)

    def test_unknown_classes_and_idle_clocks_are_left_blank(self):
        population = Population([0], [4], delays=Delays([0], [0]))
        summary = summarize_epochs("x", [plan_epoch(UniformGlobalSampler(2), population, 0)], [0.0])
        assert summary.relative_time is None
        assert summary.deviation is summary.deviation_p95 is summary.deviation_weighted is None
        cells = rows_of(format_table([summary]))["x"]
        assert cells == ["2", "2-2", "0 ms", *"-----", "0.000", "1.0", format_seconds(summary.build_seconds)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"), (0.0004, "0.4 ms"), (0.35, "350 ms"), (12.34, "12.3 s"), (310, "5 min 10 s"),
        (119.6, "2 min 00 s"), (7500, "2 h 05 min"),
    ],
)  # fmt: skip
def test_durations_have_a_suitable_unit(seconds, text):
    assert format_seconds(seconds) == text


class TestPicture:
    def test_shares_are_those_of_the_groups_fastest_first(self):
        population = Population([3, 5], [3, 4], delays=Delays([9, 1], [0, 0]))
        plan = BatchPlan(population, [0, 2, 3, 4], [3, 5, 3, 5], [2, 2, 1, 2])
        groups = SpeedGroups.of(population, batch_size=4)
        assert groups.labels == ["1 client, 1.0 s a step", "1 client, 9.0 s a step"]
        assert speed_shares(plan, groups).tolist() == [[0.5, 0, 1], [0.5, 1, 0]]

    def test_clients_of_one_speed_are_one_group_and_many_speeds_are_three(self):
        seconds = np.full(1000, 1.0)
        for latency, counts in ((seconds, [1000]), (seconds + np.arange(1000), [500, 400, 100])):
            population = Population(np.arange(1000), np.full(1000, 10), delays=Delays(latency, 0 * latency))
            groups = SpeedGroups.of(population, batch_size=10)
            assert np.bincount(groups.group).tolist() == counts
            assert len(set(groups.colors)) == len(groups.labels) == len(counts)
            shares = speed_shares(UniformGlobalSampler(10).plan(population), groups)
            assert shares.shape == (len(counts), 100)
            assert shares.mean(axis=1) == pytest.approx(np.array(counts) / 1000, abs=0.02)

    @pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
    def test_draws_populations_without_classes_or_delays(self, tmp_path, suffix):
        population = Population([0], [4], delays=Delays([0], [0]))
        path = tmp_path / f"p.{suffix}"
        save_picture(path, [("ugs", plan_epoch(UniformGlobalSampler(2), population, 0))])
        assert path.stat().st_size > 1000

    @pytest.mark.parametrize("name", ["missing/p.png", "p.nonsense"])
    def test_refuses_a_file_it_cannot_write(self, tmp_path, name):
        epoch = plan_epoch(UniformGlobalSampler(2), Population([0], [4], delays=Delays([0], [0])), 0)
        with pytest.raises(ConfigError, match="cannot be written"):
            save_picture(tmp_path / name, [("ugs", epoch)])
