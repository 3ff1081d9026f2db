"""What README and docs/ show works: Python blocks run, in order, in one namespace a file; links lead somewhere."""

import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import psl_flower
from psl_flower.config import RunConfig
from psl_flower.experiments.sweep import read_sweep
from psl_flower.methods import METHODS, ParallelSplit

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))


def blocks(path, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def run_blocks(path):
    """Run a file's blocks and return their namespace."""
    namespace = {"__name__": path.stem}
    for block in blocks(path):
        exec(compile(block, str(path), "exec"), namespace)
    return namespace


def test_python_blocks_run(capsys):
    assert len(blocks(README)) == 2
    run_blocks(README)
    assert 0.9 < float(capsys.readouterr().out) < 0.99


def test_the_tutorials_diff_is_that_of_the_quickstart():
    (diff,) = blocks(ROOT / "docs" / "tutorial.md", "diff")
    app = ROOT / "examples" / "quickstart"
    for sign, folder in (("-", app / "fedavg" / "quickstart"), ("+", app / "quickstart")):
        text = "".join((folder / name).read_text() for name in ("client_app.py", "server_app.py"))
        lines = [line[1:].removesuffix(" ...") for line in diff.splitlines() if line.startswith(sign)]
        assert len(lines) >= 5
        assert [line for line in lines if f"{line}\n" not in text] == []


def test_the_sampler_of_the_docs_keeps_every_promise(capsys):
    namespace = run_blocks(ROOT / "docs" / "samplers.md")
    told, first, last = capsys.readouterr().out.splitlines()
    assert told.startswith("16 [125, 125")
    assert first.startswith("[0 1 2] ")
    steps, clients = last.split()
    assert (int(steps), 1 <= float(clients) < 2) == (16, True)
    plan = namespace["EndToEndSampler"](7, seed=1).plan(namespace["Population"]([3, 5, 8, 9], [10, 0, 1, 30]), epoch=2)
    plan.validate()
    assert plan.batch_sizes().tolist() == [7, 7, 7, 7, 7, 6]


def test_the_method_of_the_docs_is_that_of_the_package():
    shown = run_blocks(ROOT / "docs" / "architecture.md")["ParallelSplit"]
    assert shown.parts == ParallelSplit.parts
    for name, stage in ParallelSplit.stages().items():
        assert replace(shown.stages()[name], function=None) == replace(stage, function=None)
    for name in ("forward", "backward", "step", "evaluate"):
        assert getattr(shown, name).__code__.co_names == getattr(ParallelSplit, name).__code__.co_names


def test_the_cuts_of_the_docs_are_as_they_say(capsys):
    run_blocks(ROOT / "docs" / "cutting.md")
    candidates, shape, first, second, by_hand, predicted, crossing = capsys.readouterr().out.splitlines()
    assert predicted == "(20, 10) [0 1 2]"
    text = (ROOT / "docs" / "cutting.md").read_text(encoding="utf-8")
    assert f"# {candidates}\n" in text
    assert f"what each example sends: {shape}\n" in text
    assert (first[:9], second[:9]) == ("GroupNorm", "BatchNorm")
    assert by_hand == "torch.Size([2, 10]) client.0.weight"
    assert "'dtype': 'float32', 'shape': ['batch', " in crossing


def test_what_the_docs_bring_trains():
    result = run_blocks(ROOT / "docs" / "data.md")["result"]
    told = result.evaluate_metrics_clientapp[4]
    assert told["num_examples"] == 60
    assert 0.6 < told["known"] < 0.8
    assert told["accuracy"] > 0.7
    assert told["loss"] < result.evaluate_metrics_clientapp[1]["loss"]


def test_the_methods_of_the_docs_train_as_called(capsys):
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    run_blocks(ROOT / "docs" / "methods.md")
    accuracy = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert accuracy.keys() == METHODS.keys() == set(re.findall(r"^\| `([\w-]+)`", text, re.MULTILINE))
    assert all(float(value) > 0.25 for value in accuracy.values())
    for words in re.findall(r'^flwr run .* -c "(.*)"$', text, re.MULTILINE):
        keys = tomllib.loads(words.replace("' ", "'\n"))
        assert RunConfig.read(keys).method in METHODS


@pytest.mark.slow
def test_the_transformers_of_the_docs_are_split_and_trained():
    namespace = run_blocks(ROOT / "docs" / "transformers.md")
    assert namespace["losses"][-1] < 4.5 < namespace["losses"][0]
    model = namespace["model"]
    optimizer = namespace["optimizer"]([(name, p) for name, p in model.named_parameters() if p.requires_grad])
    assert namespace["averaged"].keys() == namespace["adapters"].keys()
    assert namespace["scheduler"](optimizer)["scheduler"].get_last_lr() == pytest.approx([1e-4, 1e-4])


def test_the_deployment_guide_begins_with_a_training_that_works():
    result = run_blocks(ROOT / "docs" / "deployment.md")["result"]
    assert result.train_metrics_clientapp[1]["num_examples"] == 1437


def test_the_experiments_guide_shows_a_sweep_and_a_callback_that_work(tmp_path):
    (text,) = blocks(ROOT / "docs" / "experiments.md", "toml")
    (tmp_path / "sweep.toml").write_text(text)
    assert len(read_sweep(str(tmp_path / "sweep.toml"), "quick").experiments()) == 2 * 2 * 4
    run_blocks(ROOT / "docs" / "experiments.md")


def test_the_privacy_of_the_docs_is_that_which_it_says(capsys):
    run_blocks(ROOT / "docs" / "privacy.md")
    assert float(capsys.readouterr().out) == pytest.approx(8.0)


@pytest.mark.parametrize("path", [README, *DOCS], ids=lambda path: path.name)
def test_linked_files_exist(path):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("http") and not (path.parent / t).exists()]
    assert not missing


def test_the_audit_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_blocks(ROOT / "docs" / "audit.md")
    assert 0.2 < float(capsys.readouterr().out) < 1
    assert (tmp_path / "outputs" / "audit" / "audit.json").exists()


def test_no_doc_is_left_out_here():
    tested = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert [path.name for path in DOCS if blocks(path) and path.name not in tested] == []


@pytest.mark.slow
def test_the_docs_make_a_site_without_a_warning(tmp_path):
    words = ["-m", "sphinx", "-W", "--keep-going", "-b", "html", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in psl_flower.__all__:
        assert f'id="psl_flower.{name}"' in page or f'id="psl_flower.errors.{name}"' in page, name
