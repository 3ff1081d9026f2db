"""``psl-flower export`` finds a run's model and writes its parts; onnxruntime gives what the model gives."""

import json
import re

import pytest
import torch
import transformer_models
from flwr.app import ArrayRecord
from safetensors.torch import save_file
from test_programs import in_its_own_process
from torch import nn

from psl_flower import InProcessGrid, ParallelSplitLearning, UniformGlobalSampler, cli, split_client_app
from psl_flower.app.task import make_model
from psl_flower.config import RunConfig


class Net(nn.Module):
    """Its features are frozen."""

    def __init__(self):
        super().__init__()
        self.features, self.classifier = nn.Linear(3, 4), nn.Linear(4, 2)
        self.features.requires_grad_(False)
        nn.init.eye_(self.features.weight)
        nn.init.zeros_(self.features.bias)

    def forward(self, x):
        return self.classifier(self.features(x).relu())


def needs_an_argument(width):
    return Net()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that keeps only what trains."""
    folder = tmp_path_factory.mktemp("run")

    def data(context):
        torch.manual_seed(context.node_config["partition-id"])
        return torch.randn(8, 3), torch.randint(2, (8,))

    model = Net()
    strategy = ParallelSplitLearning(
        model, cut="classifier", sampler=UniformGlobalSampler(8), state="trainable", output_dir=folder, device="cpu"
    )
    state = {name: t for name, t in model.state_dict().items() if name.startswith("classifier")}
    grid = InProcessGrid(split_client_app(Net, cut="classifier", data_fn=data, device="cpu"), 2)
    result = strategy.start(grid, ArrayRecord(state), num_rounds=1)
    model.load_state_dict(result.arrays.to_torch_state_dict(), strict=False)
    return folder, model.eval()


MODEL = ["--model", "test_export:Net"]


@pytest.mark.parametrize("source", [".", "checkpoints/round-00001-step-0000002.safetensors"])
def test_the_parts_are_those_of_the_trained_model(source, run, tmp_path, capsys):
    folder, model = run
    command = ["export", str(folder / source), *MODEL, "--example", "x=2,3", "--output", str(tmp_path), "--json"]
    assert cli.main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["client"]["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 3]}]
    client, server = (torch.export.load(tmp_path / told[part]["files"]["pt2"]).module() for part in told)
    x = torch.randn(5, 3)
    torch.testing.assert_close(server(*client(x).values())["server_0"], model(x))


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "the model of .* is not known .* name the function that makes it, --model package.module:function"),
        ([*MODEL], r"give the sizes of the model's inputs \(x\), as in --example x=2,3,32,32"),
        ([*MODEL, "--example", "x:3"], "--example must be like x=2,3,32,32 or input_ids=2,8:int64, got 'x:3'"),
        ([*MODEL, "--example", "x=2,3:flaot32"], "got 'x=2,3:flaot32'"),
        (
            ["--model", "test_export:Nte"],
            r"--model 'test_export:Nte' cannot be imported .*write package.module:function",
        ),
        (["--model", "test_export:needs_an_argument"], "must be a function that needs no argument: .* 'width'"),
        (["--model", "json:dumps"], "must be a function that needs no argument"),
        (["--model", "collections:OrderedDict"], r"must return the model, an nn.Module, got OrderedDict\(\)"),
        ([*MODEL, "--example", "x=2,3", "--cut", "features"], "cut 'features'"),
    ],
)
def test_what_is_missing_is_told(words, what, run, capsys):
    assert cli.main(["export", str(run[0]), *words]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("psl-flower: ")
    assert re.search(what, told), told


def test_a_folder_that_is_no_runs(run, tmp_path, capsys):
    assert cli.main(["export", str(tmp_path)]) == 2
    assert "must hold the model.safetensors of a run, or its checkpoints: there is neither" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "outputs")]) == 2
    assert "there is no run in" in capsys.readouterr().err
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    assert cli.main(["export", str(tmp_path)]) == 2
    assert "must hold model.safetensors and config.json of a run" in capsys.readouterr().err


def test_another_model_is_refused(run, tmp_path, capsys):
    (tmp_path / "config.json").write_text((run[0] / "config.json").read_text())
    for state, what in (
        (
            {"classifier.weight": torch.zeros(2, 4)},
            "1 names of its state differ, 'classifier.bias' is missing in the run",
        ),
        ({"classifier.weight": torch.zeros(3, 4), "classifier.bias": torch.zeros(2)}, "size mismatch"),
    ):
        save_file(state, tmp_path / "model.safetensors")
        assert cli.main(["export", str(tmp_path), *MODEL, "--example", "x=2,3"]) == 2
        assert what in capsys.readouterr().err


@pytest.mark.slow
def test_the_default_apps_model_in_onnx(tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    config = RunConfig(dataset="digits", model="tiny-cnn", tail="head")
    model = make_model(config).eval()
    (tmp_path / "config.json").write_text(
        json.dumps({**config.as_run_config(), "strategy": {"cut": "stage2", "tail": "head"}})
    )
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert cli.main(["export", str(tmp_path), "--format", "pt2", "--format", "onnx"]) == 0
    assert "client.onnx" in capsys.readouterr().out
    images = torch.randn(5, 1, 8, 8)
    wanted, now = model(images).detach(), {"input": images.numpy()}
    told = json.loads((tmp_path / "parts" / "parts.json").read_text())
    for each in told.values():
        session = onnxruntime.InferenceSession(tmp_path / "parts" / each["files"]["onnx"])
        assert [(i.name, i.shape) for i in session.get_inputs()] == [(i["name"], i["shape"]) for i in each["inputs"]]
        now = dict(zip([o["name"] for o in each["outputs"]], session.run(None, now), strict=True))
    torch.testing.assert_close(torch.from_numpy(now["tail_0"]), wanted, rtol=0, atol=1e-5)
    crossing = [images]
    for each in told.values():
        crossing = in_its_own_process(tmp_path / "parts" / each["files"]["pt2"], crossing, tmp_path)
    torch.testing.assert_close(crossing[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "cut", "tail"), [("gpt2", "transformer.h.1", "lm_head"), ("llama", "model.layers.1", "")]
)
def test_language_models_in_onnx(make, cut, tail, tmp_path):
    """Texts of any length, as many as one likes; what the mask hides says nothing."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = getattr(transformer_models, make)().eval()
    (tmp_path / "config.json").write_text(json.dumps({"strategy": {"cut": cut, "tail": tail}}))
    save_file({name: t.clone() for name, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert cli.main(["export", str(tmp_path), "--model", f"transformer_models:{make}", "--format", "onnx"]) == 0
    told = json.loads((tmp_path / "parts" / "parts.json").read_text())
    tokens, hidden, logits = (["batch", "length", *more] for more in ([], [16], [transformer_models.TOKENS]))
    assert [each["shape"] for each in told["server"]["inputs"]] == [tokens, hidden]
    assert [each["shape"] for each in [*told.values()][-1]["outputs"]] == [logits]
    sessions = [onnxruntime.InferenceSession(tmp_path / "parts" / each["files"]["onnx"]) for each in told.values()]
    for size, length in ((1, 5), (3, 9), (2, 32)):
        batch = transformer_models.texts(size, length)
        now = {name: t.numpy() for name, t in batch.items()}
        for each, session in zip(told.values(), sessions, strict=True):
            assert [(i.name, i.shape) for i in session.get_inputs()] == [
                (i["name"], i["shape"]) for i in each["inputs"]
            ]
            now |= zip([o["name"] for o in each["outputs"]], session.run(None, _taken(now, each)), strict=True)
        wanted, hides = model(**batch).logits.detach(), batch["attention_mask"] == 0
        found = torch.from_numpy(now["logits"])
        torch.testing.assert_close(found[~hides], wanted[~hides], rtol=0, atol=1e-5)


def _taken(now, told):
    return {each["name"]: now[each["name"]] for each in told["inputs"]}
