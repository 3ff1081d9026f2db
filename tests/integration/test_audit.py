"""Attacks find what is there, where nothing defends, and nothing where nothing is to be found."""

import json
import re
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from audited import Net, digits, setting, sgd
from torch import nn

from psl_flower.audit import ACTIVE, ATTACKS, TargetEpsilon, audit
from psl_flower.audit.attacks import decoder, inversion
from psl_flower.audit.frontier import draw_frontier
from psl_flower.audit.recording import Recording
from psl_flower.audit.rehearsal import rehearse
from psl_flower.audit.scene import crossing, one_tensor, with_weights
from psl_flower.errors import ConfigError, CutError
from psl_flower.privacy import GaussianNoise
from psl_flower.privacy import audit as audit_of_privacy
from psl_flower.protocol import Kind, Leaf


def recorded(tail=None, **options):
    return rehearse(setting(tail=tail, test=digits("test", 200), **options))


PAGE = Path(__file__).parents[2] / "docs" / "audit.md"


@pytest.fixture(autouse=True)
def _learn_less(monkeypatch):
    monkeypatch.setattr(decoder, "_STEPS", 120)


@pytest.fixture(scope="module")
def plain():
    return recorded()


@pytest.fixture(scope="module")
def u_shaped():
    return recorded("tail")


def scrambled(scene):
    """Return the same with noise in place of all rows that crossed."""
    generator = torch.Generator().manual_seed(2)

    def noise(leaf):
        if leaf.kind is not Kind.ROWS or leaf.value is None:
            return leaf
        tensors = leaf.value if isinstance(leaf.value, tuple) else (leaf.value,)
        made = tuple(
            torch.randn(t.shape, generator=generator)
            if t.is_floating_point()
            else torch.randint(10, t.shape, generator=generator)
            for t in tensors
        )
        return Leaf(leaf.kind, made if isinstance(leaf.value, tuple) else made[0])

    exchanges = [
        replace(
            each,
            sent={name: noise(leaf) for name, leaf in each.sent.items()},
            received={name: noise(leaf) for name, leaf in each.received.items()},
        )
        for each in scene.recording.exchanges
    ]
    return replace(scene, recording=Recording(exchanges, scene.recording.truth))


def figures(scene, attack):
    found = ATTACKS[attack](scene)
    for images in vars(found.gallery).values() if found.gallery else ():  # which stay: nothing else with them
        assert isinstance(images, str) or images.untyped_storage().nbytes() == images.nbytes
    return {(f.attack, f.measure): f for f in found.findings}


# --- what is recorded ------------------------------------------------------------------------------------------------
def test_what_is_recorded_is_what_crossed(plain):
    scene = plain.scene
    assert {each.stage for each in scene.training} == {"forward", "backward"}
    assert {each.order.epoch for each in scene.training} == {2}  # the last round
    assert {epoch for _, test, epoch, *_ in scene.recording.truth if not test} == {2}
    rows = scene.rows("activations")
    assert len(rows) == 640
    assert rows.shadow.sum() == 320
    for exchange in rows.exchanges[:5]:
        head = with_weights(scene.halves.client, exchange.head)
        made = crossing(head, scene.recording.inputs(exchange.order))
        (sent,) = exchange.received["activations"].value
        assert torch.allclose(made, sent, atol=1e-6)
        assert torch.equal(exchange.received["labels"].value, scene.recording.labels(exchange.order))
    assert plain.accuracy > 0.8
    assert plain.bytes_a_round > 640 * 8 * 64 * 4


# --- planted ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("attack", "above"), [("decoder", 0.4), ("inversion", 0.3)])
def test_inputs_are_reconstructed_behind_one_layer(plain, attack, above):
    found = ATTACKS[attack](plain.scene)
    ssim, error = (next(f for f in found.findings if f.measure == name) for name in ("SSIM", "MSE"))
    assert ssim.leaks
    assert ssim.value > ssim.floor + above
    assert error.leaks
    assert error.value < error.floor / 5
    assert found.gallery.originals.shape == found.gallery.reconstructions.shape == found.gallery.floor.shape


def test_activations_depend_on_inputs(plain):
    (finding,) = ATTACKS["dependence"](plain.scene).findings
    assert finding.leaks
    assert finding.value > 0.8


def test_labels_are_read_where_they_are_sent_and_solved_for_where_they_stay(plain, u_shaped):
    assert figures(plain.scene, "labels")["labels", "as they are sent, share that is right"].value == 1.0
    assert not figures(plain.scene, "tail-labels")
    assert ("labels", "as they are sent, share that is right") not in figures(u_shaped.scene, "labels")
    assert figures(u_shaped.scene, "labels")["labels", "the model's own answers, share that is right"].value > 0.8
    assert figures(u_shaped.scene, "tail-labels")["labels by trying each", "share that is right"].value == 1.0


def test_gradients_at_both_cuts_show_labels(u_shaped):
    found = figures(u_shaped.scene, "gradients")
    assert {attack for attack, _ in found} == {
        "labels from gradients (tail_loss)",
        "labels from gradients (head_backward)",
    }
    direction = found["labels from gradients (tail_loss)", "direction AUC"]
    assert direction.value > 0.95
    assert direction.leaks
    assert found["labels from gradients (tail_loss)", "k-means, share named right"].value > 0.9
    assert found["labels from gradients (head_backward)", "classifier AUC"].value > 0.7
    (named,) = figures(u_shaped.scene, "outputs").values()
    assert named.leaks
    assert named.value > 0.6


def turned(scene):
    """Return the same with the gradients that clients gave pointing the other way for every second row."""
    exchanges = []
    for each in scene.recording.exchanges:
        received = dict(each.received)
        if "gradient" in received and received["gradient"].value is not None:
            value = one_tensor(received["gradient"].value)
            signs = torch.where(torch.arange(len(value)) % 2 == 0, 1.0, -1.0)
            received["gradient"] = Leaf(Kind.ROWS, value * signs.reshape(-1, *[1] * (value.dim() - 1)))
        exchanges.append(replace(each, received=received))
    return replace(scene, recording=Recording(exchanges, scene.recording.truth))


def test_gradients_that_are_turned_round_show_labels_still(u_shaped):
    found = figures(turned(u_shaped.scene), "gradients")
    assert found["labels from gradients (tail_loss)", "direction AUC"].value > 0.95
    assert found["labels from gradients (tail_loss)", "classifier AUC"].value > 0.95


def test_class_counts_are_read_from_the_tail_unless_sums_are_masked(u_shaped):
    (alone,) = figures(u_shaped.scene, "tail-counts").values()
    assert alone.value < 1e-3
    masked = recorded("tail", secure_aggregation=True, num_rounds=1)
    (together,) = figures(masked.scene, "tail-counts").values()
    assert together.value > 0.1
    assert (
        figures(masked.scene, "tail-labels")["labels by trying each", "share that is right"].value == 1.0
    )  # rows are rows


def linear_first(batch_size, **options):
    """Train a model whose head is a linear layer and a ReLU; return what its gradients show."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(flat=nn.Flatten(), stem=nn.Linear(64, 32), act=nn.ReLU(), body=nn.Linear(32, 10)))
    small = {"train": digits("train", 64), "num_rounds": 1, "optimizer": partial(torch.optim.SGD, lr=1e-3)}
    run = rehearse(setting(model=model, batch_size=batch_size, **small, **options))
    return figures(run.scene, "head-gradients")


def test_a_client_of_one_example_a_step_gives_it_with_its_gradients_whatever_is_done_to_rows():
    found = linear_first(1, defences=(GaussianNoise(5.0),))
    error = found["inputs from head gradients", "MSE"]
    assert error.value < 1e-6 * error.floor
    assert error.leaks
    assert found["inputs from head gradients", "SSIM"].value > 0.999


def test_gradients_of_many_examples_show_less_and_masked_sums_of_one_client_nothing():
    many = linear_first(64)["inputs from head gradients", "SSIM"].value
    assert many < 0.9
    assert linear_first(64, secure_aggregation=True) == {}


def test_members_are_recognised_in_a_u_shape_too(plain, u_shaped, monkeypatch):
    monkeypatch.setattr(decoder, "_STEPS", 2)  # the match looks at activations as they are
    decoder.LEARNED.clear()
    for run in (plain, u_shaped):
        match = figures(run.scene, "membership")["membership", "match AUC"]
        assert match.value > 0.99
        assert match.low > 0.9
    decoder.LEARNED.clear()


# --- nothing to be found ---------------------------------------------------------------------------------------------
def test_nothing_is_found_in_noise(u_shaped, plain, monkeypatch):
    monkeypatch.setattr(inversion, "_STEPS", 100)  # there is nothing to come nearer to
    outside, intervals = [], 0
    for scene in (scrambled(plain.scene), scrambled(u_shaped.scene)):
        for attack in ATTACKS:
            for finding in ATTACKS[attack](scene).findings:
                if finding.attack in {"class counts from the tail", "inputs from head gradients"}:
                    continue  # of sums, which are not scrambled
                if finding.measure == "loss AUC":
                    continue  # of the final weights, which are no rows
                assert not finding.leaks, finding
                if finding.measure.endswith("AUC"):
                    intervals += 1
                    outside += [] if finding.low <= 0.5 <= finding.high else [finding]
    assert intervals == 13
    assert len(outside) <= 2  # they are intervals of 95 %, some of the same numbers


# --- the whole -------------------------------------------------------------------------------------------------------
class Set(torch.utils.data.Dataset):
    def __init__(self, inputs, labels):
        self.rows = list(zip(inputs, labels.tolist(), strict=True))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_an_audit_leaves_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(inversion, "_STEPS", 150)  # behind one layer it finds as much; all of them are taken above
    lines = []
    result = audit_of_privacy(
        lambda seed: Net(),
        Set(*digits("train", 200)),
        Set(*digits("test", 60)),
        cuts=["body", "tail"],
        attacks=["dependence", "labels", "inversion"],
        num_clients=2,
        num_rounds=1,
        optimizer=sgd,
        seeds=(0, 1),
        output_dir=tmp_path,
        say=lines.append,
    )
    assert len(result.cases) == 4
    assert len(lines) == 4 * 4
    assert "ETA" in lines[-1]
    content = json.loads((tmp_path / "audit.json").read_text())
    assert [(c["cut"], c["seed"]) for c in content["cases"]] == [("body", 0), ("body", 1), ("tail", 0), ("tail", 1)]
    assert content["cases"][0]["findings"][0]["leaks"] is True
    table = (tmp_path / "audit.md").read_text()
    assert "| labels | server | as they are sent, share that is right | 1.000 | ± 0.000 |" in table
    for name in ("images-body-none", "images-tail-none", "cuts"):
        assert f"![{name}]({name}.png)" in table
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    near, far = (result.value("inversion", "SSIM", cut=cut) for cut in ("body", "tail"))
    assert near > far + 0.3
    with pytest.raises(KeyError, match="no 'SSIM' of 'decoder'"):
        result.value("decoder", "SSIM")


def test_privacy_of_the_model_is_a_defence_like_others_and_what_repeats_is_said_once(caplog):
    result = audit_of_privacy(
        lambda seed: Net(),
        Set(*digits("train", 200)),
        Set(*digits("test", 60)),
        cuts=["body"],
        defences={"epsilon": (TargetEpsilon(6), GaussianNoise(0.1)), "noise": (GaussianNoise(0.2),)},
        attacks=["labels"],
        num_clients=2,
        num_rounds=1,
        optimizer=sgd,
        say=lambda line: None,
    )
    assert result.value("any", "epsilon, at most", defence="epsilon") == pytest.approx(6, rel=1e-3)
    with pytest.raises(KeyError):
        result.value("any", "epsilon, at most", defence="noise")
    assert draw_frontier(result).axes[-1].get_ylabel() == "the model: epsilon"
    assert [r.levelname for r in caplog.records if "defences of rows do nothing" in r.getMessage()] == ["WARNING"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuts": ["body", "tail"], "tail": "tail"}, "tail"),
        ({"defences": {"two": (TargetEpsilon(1), TargetEpsilon(2))}}, "a model has one epsilon"),
        ({"attacks": ["decodr"]}, "did you mean 'decoder'"),
        ({"cuts": []}, "at least one cut"),
        ({"num_clients": 100}, "at least 16 training examples a client, got 200 for 100 clients"),
        (
            {"train": Set(digits("train", 200)[0].long(), digits("train", 200)[1])},
            "inputs that are one tensor of floats",
        ),
    ],
)
def test_what_cannot_be_audited_is_refused_before_anything_runs(options, message):
    given = {"train": Set(*digits("train", 200)), "test": Set(*digits("test", 60)), "cuts": "body", **options}
    with pytest.raises((ConfigError, CutError), match=message):
        audit(Net(), given.pop("train"), given.pop("test"), say=lambda line: pytest.fail(line), **given)


def test_the_page_on_audits_names_all_attacks():
    table = PAGE.read_text(encoding="utf-8").split("## Who attacks")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE) == [*ATTACKS, *ACTIVE]
