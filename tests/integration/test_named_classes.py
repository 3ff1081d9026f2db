"""Clients whose data number their classes otherwise: nobody trains on another's numbers without a word."""

import datasets
import pytest
import torch
from flwr.app import ArrayRecord
from PIL import Image
from torch import nn

from psl_flower import InProcessGrid, ParallelSplitLearning, UniformGlobalSampler, split_client_app
from psl_flower.errors import MembershipError
from psl_flower.exchange import clients
from psl_flower.privacy import RandomizedResponse
from psl_flower.torchvision_compat import import_torchvision

import_torchvision()
from torchvision.datasets import ImageFolder  # noqa: E402
from torchvision.transforms.functional import to_tensor  # noqa: E402

ALL, LACKING = ("cat", "dog", "owl"), ("cat", "owl")
REFUSED = r"client 2 \(node \d+\): a class must have the same number .* is 1 here, .* is 2 on client 0 .* and 1 more"


@pytest.fixture
def folders(tmp_path):
    """Return what opens the folders of three clients; the last lacks a class."""
    for client, names in enumerate((ALL, ALL, LACKING)):
        for name in names:
            (tmp_path / f"{client}" / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (2, 2), (40 * i, 0, 0)).save(tmp_path / f"{client}" / name / f"{i}.png")
    return lambda **options: [ImageFolder(tmp_path / f"{client}", to_tensor, **options) for client in range(3)]


@pytest.fixture
def told(monkeypatch):
    """Return a list of those that tell the server of their classes."""
    heard, found = [], clients.numbered_otherwise

    def listen(new, members):
        heard.extend(new)
        return found(new, members)

    monkeypatch.setattr(clients, "numbered_otherwise", listen)
    return heard


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.SiLU(), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 3))


def run(parts, tail=None, **client):
    """Train for a round; return how many examples were used."""
    app = split_client_app(
        net, cut="3", tail=tail, data_fn=lambda context: parts[context.node_config["partition-id"]], **client
    )
    strategy = ParallelSplitLearning(net(), cut="3", tail=tail, sampler=UniformGlobalSampler(8))
    result = strategy.start(InProcessGrid(app, len(parts)), ArrayRecord(net().state_dict()), num_rounds=1, timeout=30)
    return result.train_metrics_clientapp[1]["num_examples"]


def test_a_folder_that_lacks_a_class_is_refused(folders):
    with pytest.raises(MembershipError, match=REFUSED):
        run(folders())


def test_a_column_that_lacks_a_class_is_refused():
    def rows(names):
        made = datasets.Dataset.from_dict({"x": [[0.5] * 12] * len(names), "label": list(range(len(names)))})
        return made.cast_column("label", datasets.ClassLabel(names=list(names))).with_format("torch")

    with pytest.raises(MembershipError, match=REFUSED):
        run([rows(ALL), rows(ALL), rows(LACKING)])
    assert run([rows(ALL), rows(ALL), rows(ALL).select([0, 2])]) == 8


def test_what_the_message_advises_helps(folders, tmp_path):
    renumbered = folders()
    renumbered[2].target_transform = (0, 2).__getitem__
    assert run(renumbered) == 32
    (tmp_path / "2" / "dog").mkdir()
    assert run(folders(allow_empty=True)) == 32


@pytest.mark.parametrize(
    "options", [{"tail": "5"}, {"defences": [RandomizedResponse(1, classes=3)]}], ids=["U shape", "replaced labels"]
)
def test_where_labels_are_not_sent_the_server_is_told_nothing_of_classes(options, folders, told):
    with pytest.raises(MembershipError):
        run(folders())
    assert len(told) == 3
    told.clear()
    assert run(folders(), **options) == 32
    assert not told


def test_in_a_u_shape_data_of_one_client_that_contradict_each_other_are_refused_without_their_names(folders, caplog):
    complete, _, lacking = folders()
    with pytest.raises(MembershipError, match="a class must have one number in all of a client's data") as raised:
        run([(complete, lacking)] * 2, tail="5")
    assert "owl" not in str(raised.value)
    assert "class 'owl' is 1 in the test data, 2 in the training data" in caplog.text
