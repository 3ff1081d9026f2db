"""A device's and a server's part of a trained model, each a program in a process of its own, are the whole model."""

import json
import subprocess
import sys

import pytest
import torch
from support import tiny_resnet
from transformer_models import gpt2, texts

from psl_flower import Cut, CutError, SplitModel
from psl_flower.split import export_halves

# What runs where this package is not: it is given a program, and a file with what the program takes.
RUN = """
import sys, torch
program, given, taken = sys.argv[1:]
outputs = torch.export.load(program).module()(*torch.load(given))
torch.save(list(outputs.values()), taken)
assert not any(name.startswith(("psl_flower", "transformers", "flwr")) for name in sys.modules)
"""


def in_its_own_process(program, tensors, folder):
    torch.save(list(tensors), folder / "given.pt")
    subprocess.run([sys.executable, "-c", RUN, program, folder / "given.pt", folder / "taken.pt"], check=True, env={})
    return torch.load(folder / "taken.pt")


@pytest.mark.slow
def test_a_device_and_a_server_give_the_whole_models_outputs(tmp_path):
    model = tiny_resnet().eval()
    files = export_halves(model, tmp_path, Cut("layer2", example={"x": torch.randn(2, 1, 6, 6)}))
    assert [path.name for path in files] == ["client.pt2", "server.pt2"]
    images = torch.randn(5, 1, 6, 6)
    crossing = in_its_own_process(files[0], [images], tmp_path)
    (logits,) = in_its_own_process(files[1], crossing, tmp_path)
    assert torch.allclose(logits, model(images), atol=1e-6)
    told = json.loads((tmp_path / "parts.json").read_text())
    assert told["client"] == {
        "files": {"pt2": "client.pt2"},
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 1, 6, 6]}],
        "outputs": [{"name": "client_0", "dtype": "float32", "shape": ["batch", 4, 6, 6]}],
    }
    assert told["server"]["inputs"] == told["client"]["outputs"]


@pytest.mark.slow
def test_three_parts_of_a_language_model(tmp_path):
    model = gpt2().eval()
    files = export_halves(model, tmp_path, "transformer.h.1", "lm_head")
    head, body, tail = (torch.export.load(path).module() for path in files)
    batch = texts(4, 9)
    crossing = head(*batch.values())
    back = body(*crossing.values())
    assert torch.allclose(tail(*back.values())["logits"], model(**batch).logits, atol=1e-6)
    told = json.loads((tmp_path / "parts.json").read_text())
    assert [each["shape"] for each in told["server"]["inputs"]] == [["batch", "length"], ["batch", "length", 16]]
    assert told["tail"]["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch", "length", 50]}]


class Pair(torch.nn.Module):
    """Its batch is a dict."""

    def __init__(self):
        super().__init__()
        self.embed, self.scale, self.out = torch.nn.Embedding(9, 4), torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, batch):
        return {"logits": self.out(self.embed(batch["words"]).mean(1) + self.scale(batch["sizes"]))}


def run_pt2(path, tensors):
    return torch.export.load(path).module()(*tensors.values())


def run_onnx(path, tensors):
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    given = {name: tensor.numpy() for name, tensor in tensors.items()}
    names = [output.name for output in session.get_outputs()]
    return {name: torch.tensor(found) for name, found in zip(names, session.run(None, given), strict=True)}


@pytest.mark.parametrize(("form", "run"), [("pt2", run_pt2), pytest.param("onnx", run_onnx, marks=pytest.mark.slow)])
def test_a_batch_that_is_a_dict(form, run, tmp_path):
    model = Pair().eval()
    example = {"words": torch.zeros(2, 5).long(), "sizes": torch.zeros(2, 3)}
    client, server = export_halves(model, tmp_path, Cut("out", example=example), formats=(form,))
    told = json.loads((tmp_path / "parts.json").read_text())
    assert [each["name"] for each in told["client"]["inputs"]] == ["words", "sizes"]
    assert [each["name"] for each in told["server"]["outputs"]] == ["logits"]
    batch = {"words": torch.randint(0, 9, (7, 6)), "sizes": torch.randn(7, 3)}
    assert torch.allclose(run(server, run(client, batch))["logits"], model(batch)["logits"], atol=1e-6)


def test_a_model_cut_by_hand(tmp_path):
    split = SplitModel(client=torch.nn.Linear(3, 4), server=torch.nn.Linear(4, 2)).eval()
    with pytest.raises(CutError, match="export_halves needs an example batch"):
        export_halves(split, tmp_path)
    with pytest.raises(CutError, match=r"the client part takes input, the example has \['x'\]: missing"):
        export_halves(split, tmp_path, Cut("", example={"x": torch.randn(2, 3)}))
    files = export_halves(split, tmp_path / "parts", Cut("", example={"input": torch.randn(2, 3)}))
    client, server = (torch.export.load(path).module() for path in files)
    x = torch.randn(7, 3)
    assert torch.allclose(server(*client(x).values())["server_0"], split(x))
