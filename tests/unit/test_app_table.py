import csv

from psl_flower.app.table import format_table, save_table

RESULTS = {
    "UGS": [{"accuracy %": 98.0, "time": 10.0, "hidden": 1.5}, {"accuracy %": 99.0, "time": 12.0, "hidden": 2.5}],
    "never there": [
        {"accuracy %": 5.0, "time": float("nan"), "hidden": 3.0},
        {"accuracy %": 5.0, "time": 1.0, "hidden": 0.0},
    ],
}


def test_the_table_shows_mean_and_standard_deviation_and_is_aligned():
    assert format_table(RESULTS, {"accuracy %": 1, "time": 0}).splitlines() == [
        "|             | accuracy % |   time |",
        "| ----------- | ---------: | -----: |",
        "| UGS         | 98.5 ± 0.7 | 11 ± 1 |",
        "| never there |  5.0 ± 0.0 |      - |",
    ]


def test_one_seed_has_no_deviation():
    (line,) = format_table({"a": [{"x": 0.125}]}, {"x": 2}).splitlines()[2:]
    assert line == "| a | 0.12 |"


def test_files_hold_the_table_and_every_number(tmp_path):
    save_table(tmp_path, RESULTS, {"accuracy %": 1})
    assert (tmp_path / "table.md").read_text() == format_table(RESULTS, {"accuracy %": 1}) + "\n"
    with (tmp_path / "table.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["name", "seed", "accuracy %", "time", "hidden"]
    assert lines[1:3] == [["UGS", "0", "98.0", "10.0", "1.5"], ["UGS", "1", "99.0", "12.0", "2.5"]]
    assert lines[3][3] == "nan"
    assert len(lines) == 5
