"""Every command that the examples' READMEs give is run, with small numbers; what they say will be seen is checked."""

import csv
import difflib
import importlib
import importlib.util
import json
import logging
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from psl_flower.grid import InProcessGrid

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PYTHON = ".venv/bin/python "
RUN = ".venv/bin/psl-flower run "
# What the READMEs say beside those commands: psl-flower run, which is run below, runs flwr the same way.
FLWR = re.compile(
    r"cd examples/[\w-]+|export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 .*"
    r'|flwr run \. --stream --federation-config "num-supernodes=\d+ client-resources-num-cpus=1"'
)


def shell_lines(example):
    blocks = re.findall(r"^```bash\n(.*?)^```", (EXAMPLES / example / "README.md").read_text(), re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def commands(kind):
    """Return the (example, command) pairs of all READMEs whose command begins with `kind`, without that."""
    return [
        (path.parent.name, line.removeprefix(kind))
        for path in sorted(EXAMPLES.glob("*/README.md"))
        for line in shell_lines(path.parent.name)
        if line.startswith(kind)
    ]


APPS = commands(RUN)
SCRIPTS = commands(PYTHON)
TUNED = ("llm-lora", "vit-finetune")  # tested by what they print
LONG = re.compile("/fedavg|examples/quickstart --num-supernodes 10$")  # FedAvg is Flower's; the skewed split tells more


def test_there_are_no_commands_in_the_readmes_but_those_tested_here():
    assert len(APPS) >= 7
    assert len(SCRIPTS) >= 9
    tested = {RUN + command for _, command in APPS} | {PYTHON + command for _, command in SCRIPTS}
    for example in (
        "quickstart",
        "custom-model",
        "labels-stay",
        "llm-lora",
        "vit-finetune",
        "compare-samplers",
        "stragglers",
        "split-inference",
    ):
        lines = shell_lines(example)
        assert lines
        assert [line for line in lines if line not in tested and not FLWR.fullmatch(line)] == []


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to run in, in which the examples are where they are in a clone."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def settings():
    """Put back what scripts set for their own process."""
    threads, level = torch.get_num_threads(), logging.getLogger("flwr").level
    yield
    torch.set_num_threads(threads)
    logging.getLogger("flwr").setLevel(level)


# --- apps: in this process, and two of them as they stand ------------------------------------------------------------
@contextmanager
def modules_of(app):
    """Make an app's modules importable for a while; those of both quickstarts have the same names."""
    sys.path.insert(0, str(app))
    before = set(sys.modules)
    try:
        yield
    finally:
        sys.path.remove(str(app))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(EXAMPLES)):
                del sys.modules[name]


def run_in_process(command):
    """Do what the command does, but with an InProcessGrid; return the app's place and its partition, if it has one."""
    words = shlex.split(command)
    place = "." if words[0].startswith("-") else words[0]
    num_nodes = int(words[words.index("--num-supernodes") + 1])
    app = tomllib.loads((ROOT / place / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    overrides = shlex.split(words[words.index("-c") + 1], posix=False) if "-c" in words else []
    config = tomllib.loads("\n".join(overrides))
    assert config.keys() <= app["config"].keys()
    config = app["config"] | config | SHORTER.get(place, {})
    with modules_of(ROOT / place):
        components = (app["components"][part].split(":") for part in ("serverapp", "clientapp"))
        server, client = (getattr(importlib.import_module(module), name) for module, name in components)
        grid = InProcessGrid(client, num_nodes=num_nodes, run_config=config)
        server(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config))
    return place, config.get("partition")


SHORTER = {
    "examples/quickstart": {"num-server-rounds": 4},
    "examples/quickstart/fedavg": {"num-server-rounds": 2},
    "examples/custom-model": {"num-server-rounds": 1},
    "examples/stragglers": {"num-server-rounds": 1, "delays-latency": 0.0002},
    "examples/compare-samplers": {"num-server-rounds": 1},
}
# accuracy on the server's test data, both ends; of custom-model, the share of the variance explained
SCORES = {
    ("examples/quickstart", "iid"): (0.88, 0.99),
    ("examples/quickstart", "skewed"): (0.84, 0.99),
    ("examples/quickstart/fedavg", "iid"): (0.5, 0.95),
    ("examples/quickstart/fedavg", "skewed"): (0.05, 0.8),  # 24 runs: 0.11 to 0.55, 0.37 ± 0.12; split learning: 0.89
    ("examples/custom-model", None): (0.2, 0.7),
    ("examples/labels-stay", None): (0.92, 1.0),
    ("examples/stragglers", "severe"): (0.7, 0.995),
    ("examples/compare-samplers", "severe"): (0.3, 0.995),
}


def score_of(place, folder):
    if "quickstart" in place:
        with modules_of(ROOT / place):
            task = importlib.import_module("quickstart.task")
            model = task.Net()
            model.load_state_dict(torch.load(folder / "final_model.pt"))
            return task.test(model, task.load_server_test_data())[1]
    record = json.loads((folder / "outputs" / "metrics.jsonl").read_text().splitlines()[-1])
    last = record["evaluate_serverapp"] or record["evaluate_clientapp"]
    return last.get("r2", last.get("accuracy"))


@pytest.mark.parametrize(
    ("example", "command"),
    [
        pytest.param(*app, marks=pytest.mark.slow if LONG.search(app[1]) else ())
        for app in APPS
        if app[0] not in ("llm-lora", "vit-finetune")
    ],
)
def test_apps_reach_what_their_readme_says(example, command, folder):
    place, partition = run_in_process(command)
    low, high = SCORES[place, partition]
    assert low <= score_of(place, folder) <= high


def test_labels_stay_tells_what_the_registry_has_received(folder, capfd):
    """From the bytes themselves: neither the rows of a hospital nor its sums are what they were computed from."""
    (command,) = (command for name, command in APPS if name == "labels-stay")
    run_in_process(command)
    told = capfd.readouterr().out
    received = (folder / "outputs" / "received.bin").read_bytes()
    assert f"replies of {len(received):,} bytes (outputs/received.bin)" in told
    assert "labels: 0 times; how many there are of each class: 0 times" in told
    assert re.search(r"train.head_forward +activations +a row an example +108 times", told)
    assert set(re.findall(r"sum, \w+(?: it is)?", told)) == {"sum, masked"}
    rows = re.findall(r"^((?: +-?\d+){3})$", told, re.M)
    *hospitals, total = ([int(number) for number in row.split()] for row in rows)
    assert len(hospitals) == 3
    assert max(map(abs, total)) < 2**50 < min(max(map(abs, each)) for each in hospitals)
    for numbers in zip(*hospitals, total, strict=True):
        assert (sum(numbers[:3]) - numbers[3]) % 2**64 == 0
    with modules_of(EXAMPLES / "labels-stay"):
        client_app = importlib.import_module("labels_stay.client_app")
        for place in range(3):
            context = Context(1, 1, {"partition-id": place, "num-partitions": 3}, RecordDict(), {})
            for data in client_app.load_data(context):
                measurements, diagnoses = data.tensors
                assert diagnoses[:8].numpy().tobytes() not in received
                assert not any(row.numpy().tobytes() in received for row in measurements)


@pytest.mark.slow
def test_llm_lora_says_what_the_adapters_are_good_for(folder, capfd):
    """Perplexities in descending order, and the same one again of what peft has loaded."""
    (command,) = (command for name, command in APPS if name == "llm-lora")
    run_in_process(command)
    told = capfd.readouterr().out
    counted, base, adapted, loaded = map(float, re.findall(r"(\d+\.\d) (?:by the|with|once)", told))
    assert counted == 31.0
    assert 7 < base < 18  # processors round differently, and 200 steps make much of it
    assert 2.2 < adapted < 3.6
    assert loaded == adapted
    adapters = load_file(folder / "outputs" / "adapters" / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in adapters)
    assert len(load_file(folder / "outputs" / "model.safetensors")) == len(adapters) == 2 * 7 * 4


@pytest.mark.slow
def test_vit_finetune_asks_for_no_gradients(folder, capfd):
    (command,) = (command for name, command in APPS if name == "vit-finetune")
    run_in_process(command)
    told = capfd.readouterr().out
    base, tuned, loaded = map(float, re.findall(r"(\d\.\d\d) (?:with|fine-tuned|once)", told))
    assert base <= 0.5
    assert base + 0.15 < tuned < 0.95
    assert loaded == tuned
    lines = [json.loads(line) for line in (folder / "outputs" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step" in line]
    assert len(steps) > 100
    for step in steps:  # hidden states of 16 patches and a token, labels, checksums
        assert 0 <= step["bytes_received"] - step["batch_size"] * (17 * 48 * 4 + 8) < 1000


@pytest.mark.flower
@pytest.mark.slow  # in one process above; the default app is run on the simulation in test_default_app
@pytest.mark.parametrize("example", ["quickstart", "custom-model"])
def test_apps_run_on_the_simulation_as_their_readme_says(example, folder):
    command = next(command for name, command in APPS if name == example)
    words = [*shlex.split(command), "-c", "num-server-rounds=1"]
    done = subprocess.run(
        [sys.executable, "-m", "psl_flower", "run", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Finished 1 round in" in done.stdout
    assert 0.2 <= score_of(f"examples/{example}", folder) <= 0.8
    if example == "custom-model":
        assert (folder / "outputs" / "curves.png").stat().st_size > 10_000
        names = load_file(folder / "outputs" / "model.safetensors")
        assert {name.split(".")[0] for name in names} == {"client", "server"}


def test_the_quickstarts_readme_shows_what_changes():
    files = ("quickstart/client_app.py", "quickstart/server_app.py", "pyproject.toml")
    diff = []
    for name in files:
        before, after = (
            (EXAMPLES / "quickstart" / where / name).read_text().splitlines(keepends=True) for where in ("fedavg", "")
        )
        diff += difflib.unified_diff(before, after, f"fedavg/{name}", name, n=2)
    (shown,) = re.findall(r"^```diff\n(.*?)^```", (EXAMPLES / "quickstart" / "README.md").read_text(), re.M | re.S)
    assert shown == "".join(diff)
    names = (
        path.relative_to(EXAMPLES / "quickstart") for path in (EXAMPLES / "quickstart" / "quickstart").glob("*.py")
    )
    same = {str(name) for name in names} - set(files)
    assert same == {"quickstart/__init__.py", "quickstart/task.py"}  # with load_data, as Flower's quickstart has it
    for name in same:
        assert (EXAMPLES / "quickstart" / "fedavg" / name).read_text() == (EXAMPLES / "quickstart" / name).read_text()


# --- scripts ---------------------------------------------------------------------------------------------------------
def run_script(words, monkeypatch):
    """Run a script as a command does, in this process, and return its exit status."""
    monkeypatch.setattr(sys, "argv", list(words))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(words[0], run_name="__main__")
    return end.value.code


def results_of(command, short, folder, monkeypatch, capsys):
    """Run a README's command with smaller numbers and return the lines of the table it writes."""
    words = [*shlex.split(command), *short.split(), "--output", "results"]
    assert run_script(words, monkeypatch) == 0
    printed = capsys.readouterr()
    assert (folder / "results" / "table.md").read_text() in printed.out
    assert "ETA 0:00" in printed.err.splitlines()[-1]
    (picture,) = (folder / "results").glob("*.png")
    assert picture.stat().st_size > 30_000
    with (folder / "results" / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        name, seed = line["name"], line["seed"]
        if name != "centralised":
            assert (folder / "results" / "runs" / f"{name}-{seed}" / "metrics.jsonl").exists()
    return lines


def script_of(example):
    """Return where the script of an example is."""
    return f"examples/{example}/{example.replace('-', '_')}.py"


def script(example, *flags):
    """Return the README's command of a script with exactly these flags."""
    path = script_of(example)
    (command,) = [c for name, c in SCRIPTS if name == example and c.split()[1:] == [*flags]]
    assert shlex.split(command)[0] == path
    return command


def means(lines, column):
    """Return the mean over the seeds of a column, by name."""
    values = {}
    for line in lines:
        values.setdefault(line["name"], []).append(float(line[column]))
    return {name: sum(seeds) / len(seeds) for name, seeds in values.items()}


def test_compare_samplers(folder, monkeypatch, capsys):
    command = script("compare-samplers")
    lines = results_of(command, "--epochs 1 --num-clients 16 --seeds 2", folder, monkeypatch, capsys)
    assert [line["seed"] for line in lines] == ["0", "1"] * 4
    assert " ± " in (folder / "results" / "table.md").read_text()
    accuracy, steps, deviation = (means(lines, c) for c in ("accuracy %", "steps an epoch", "deviation"))
    assert list(accuracy) == ["fls", "fpls", "ugs", "centralised"]
    assert 85 <= accuracy["ugs"] <= 98
    assert 85 <= accuracy["centralised"] <= 98
    assert 8 <= accuracy["fls"] <= accuracy["ugs"] - 20
    assert steps["ugs"] == steps["centralised"] == 23
    assert steps["fls"] > steps["fpls"] > steps["ugs"]
    assert means(lines, "smallest batch")["ugs"] == 62
    assert deviation["fls"] > 1.5 * deviation["ugs"]
    assert deviation["ugs"] == pytest.approx(deviation["centralised"], rel=0.2)


def test_stragglers(folder, monkeypatch, capsys):
    lines = results_of(script("stragglers"), "--epochs 1 --num-clients 16", folder, monkeypatch, capsys)
    accuracy, time, deviation = (means(lines, column) for column in ("accuracy %", "vs UGS", "deviation"))
    assert list(accuracy) == ["UGS", "LDS", "LB", "Aligned", "Aligned, tilt 0.1"]
    assert all(75 <= value <= 98 for value in accuracy.values())
    assert time["UGS"] == 1
    assert means(lines, "target vs UGS")["UGS"] == 1
    assert 0.1 < time["LDS"] < time["Aligned"] <= time["LB"] < 0.7
    assert deviation["Aligned, tilt 0.1"] < 0.5 * deviation["UGS"]
    assert deviation["LDS"] > deviation["UGS"]


@pytest.mark.slow
def test_split_inference(folder):
    words = shlex.split(script("split-inference"))
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=True)
    right, of = map(int, re.findall(r"strategy.predict: (\d+) of (\d+) test images", done.stdout)[0])
    assert of == 360
    assert 0.9 * of < right < of
    assert "100 images stayed here" in done.stdout
    assert float(re.findall(r"outputs: (\S+)", done.stdout)[-1]) <= 1e-5


@pytest.mark.slow
def test_stragglers_in_the_worst_case(folder, monkeypatch, capsys):
    command = script("stragglers", "--worst-case", "--output", "outputs/worst-case")
    short = "--epochs 1 --num-clients 16 --samplers LDS Aligned"
    time = means(results_of(command, short, folder, monkeypatch, capsys), "vs UGS")
    assert list(time) == ["UGS", "LDS", "Aligned"]
    assert 0.9 <= time["Aligned"] <= 1  # every batch needs the two classes, and so a slow client
    assert 0.3 <= time["LDS"] <= 0.9
    with (folder / "results" / "delays-0.csv").open(newline="") as file:
        slow = [float(line["latency"]) == 10 for line in csv.DictReader(file)]
    assert len(slow) == 16
    assert 2 <= sum(slow) <= 10


@pytest.mark.parametrize(("example", "command"), [pair for pair in SCRIPTS if len(pair[1].split()) > 1])
def test_the_other_commands_of_a_script_are_understood(example, command):
    path, *flags = shlex.split(command)
    assert path == script_of(example)
    spec = importlib.util.spec_from_file_location(example, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = module.parser().parse_args(flags)
    assert options.epochs >= 1


@pytest.mark.parametrize("example", ["compare-samplers", "stragglers"])
def test_a_scripts_bad_setting_is_refused_in_one_line(example, folder, monkeypatch, capsys):
    words = [script_of(example), "--learning-rate", "-1"]
    assert run_script(words, monkeypatch) == 2
    assert capsys.readouterr().err == "learning-rate must be greater than 0, got -1.0\n"
