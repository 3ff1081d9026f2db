"""The server's part of a step, without any transport: exact, all or nothing, deterministic."""

import copy

import pytest
import torch
from psl_flower.strategy.server_step import SplitTrainer
from support import CUT, tiny_resnet
from torch import nn
from torch.nn import functional as F

from psl_flower import SplitModel
from psl_flower.errors import ConfigError, StepError
from psl_flower.protocol import Activations, Gradients
from psl_flower.split import cut_model

CPU = torch.device("cpu")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def trainer_of(model, cut=None, **options):
    halves = cut_model(model, cut)
    order = [name for name, _ in model.named_parameters()]
    options = {"optimizer": sgd, "loss": F.cross_entropy, "classification": True, **options}
    return SplitTrainer(halves.client, halves.server, device=CPU, order=order, **options)


def trainer(**options):
    return trainer_of(tiny_resnet(), CUT, **options)


def batch(counts, labels=None, seed=0):
    """Return activations of TinyResNet's cut for each client."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for client, n in counts.items():
        targets = torch.randint(0, 4, (n,), generator=generator) if labels is None else labels[client]
        parts[client] = Activations((torch.randn(n, 4, 6, 6, generator=generator),), targets, 0)
    return parts


def gradients_of(a_trainer, scale=1.0):
    return Gradients({n: torch.full_like(p, scale) for n, p in a_trainer.weights().parameters.items()}, (), 0)


def snapshot(a_trainer):
    buffers = {n: b.clone() for n, b in a_trainer.server.named_buffers()}
    grads = {n: p.grad for half in (a_trainer.client, a_trainer.server) for n, p in half.named_parameters()}
    return a_trainer.state(), buffers, grads


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


# --- forward and backward --------------------------------------------------------------------------------------------
def test_one_global_batch_in_client_order():
    one, parts = trainer(), batch({2: 3, 5: 1, 9: 4})
    reference = copy.deepcopy(one.server).train()
    x = torch.cat([p.tensors[0] for p in parts.values()]).requires_grad_()
    y = torch.cat([p.labels for p in parts.values()])
    outputs = reference(x)
    loss = F.cross_entropy(outputs, y)
    loss.backward()

    outcome = one.forward_backward(parts, seed=0)
    assert outcome.loss == loss.item()
    assert (outcome.correct, outcome.predictions) == (int((outputs.argmax(1) == y).sum()), 8)
    assert outcome.class_counts.tolist() == torch.bincount(y, minlength=4).tolist()
    assert list(outcome.cut_gradients) == [2, 5, 9]
    found = torch.cat([g for (g,) in outcome.cut_gradients.values()])
    assert torch.equal(found, x.grad)
    for name, p in one.server.named_parameters():
        assert torch.equal(p.grad, reference.get_parameter(name).grad), name
    assert equal(
        dict(one.server.named_buffers()), dict(reference.named_buffers())
    )  # the batch norm saw the whole batch


def test_the_activations_received_are_left_alone():
    parts = batch({0: 3})
    before = parts[0].tensors[0].clone()
    trainer().forward_backward(parts, seed=0)
    assert torch.equal(parts[0].tensors[0], before)
    assert not parts[0].tensors[0].requires_grad


class ManyInputs(nn.Module):
    """Takes floats, integers, and floats it does not use."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(5, 3), nn.Linear(3, 4)

    def forward(self, x, token, spare):
        return self.linear(x + self.embedding(token))


class ThreeOut(nn.Linear):
    def forward(self, x):
        h = super().forward(x)
        return h, h.argmax(1), h


def test_what_is_not_differentiable_gets_no_gradient():
    one = trainer_of(SplitModel(client=ThreeOut(2, 3), server=ManyInputs()))
    tensors = (torch.randn(5, 3), torch.arange(5), torch.randn(5, 3))
    outcome = one.forward_backward({7: Activations(tensors, torch.zeros(5, dtype=torch.int64), 0)}, seed=0)
    gradients = outcome.cut_gradients[7]
    assert gradients[0].shape == (5, 3)
    assert gradients[1] is gradients[2] is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_any_integer_dtype(dtype):
    expected = trainer().forward_backward(batch({0: 6}), seed=0)
    parts = {0: Activations(batch({0: 6})[0].tensors, batch({0: 6})[0].labels.to(dtype), 0)}
    outcome = trainer().forward_backward(parts, seed=0)
    assert (outcome.loss, outcome.correct) == (expected.loss, expected.correct)
    assert torch.equal(outcome.cut_gradients[0][0], expected.cut_gradients[0][0])


def test_dense_predictions_count_positions():
    model = SplitModel(client=nn.Conv2d(1, 2, 1), server=nn.Conv2d(2, 3, 1))
    parts = {0: Activations((torch.randn(2, 2, 4, 4),), torch.randint(0, 3, (2, 4, 4)), 0)}
    outcome = trainer_of(model).forward_backward(parts, seed=0)
    assert outcome.predictions == 32
    assert outcome.class_counts.sum() == 32
    assert 0 <= outcome.correct <= 32


def test_any_loss_without_classification():
    model = SplitModel(client=nn.Linear(2, 3), server=nn.Linear(3, 1))
    one = trainer_of(model, loss=F.mse_loss, classification=False)
    targets = torch.tensor([[0.5], [-2.0], [100.0]])
    x = torch.randn(3, 3)
    outcome = one.forward_backward({0: Activations((x,), targets, 0)}, seed=0)
    assert outcome.loss == pytest.approx(F.mse_loss(model.server(x), targets).item())
    assert outcome.correct is outcome.class_counts is None


# --- randomness ------------------------------------------------------------------------------------------------------
def dropping():
    torch.manual_seed(0)
    return SplitModel(client=nn.Linear(2, 50), server=nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 4)))


def test_dropout_in_the_server_half_follows_the_seed_alone():
    parts = {0: Activations((torch.randn(6, 50),), torch.zeros(6, dtype=torch.int64), 0)}
    model = dropping()
    outcomes = []
    for seed in (3, 3, 4):
        torch.rand(7)
        outcomes.append(trainer_of(model).forward_backward(parts, seed=seed))
    assert torch.equal(outcomes[0].cut_gradients[0][0], outcomes[1].cut_gradients[0][0])
    assert not torch.equal(outcomes[0].cut_gradients[0][0], outcomes[2].cut_gradients[0][0])
    assert (outcomes[0].cut_gradients[0][0] == 0).any()


def test_torchs_generator_is_left_alone():
    parts = {0: Activations((torch.randn(6, 50),), torch.zeros(6, dtype=torch.int64), 0)}
    one = trainer_of(dropping())
    state = torch.get_rng_state()
    with one.transaction():
        one.forward_backward(parts, seed=3)
    one.evaluate(parts[0], 0)
    assert torch.equal(torch.get_rng_state(), state)


# --- commit ----------------------------------------------------------------------------------------------------------
def test_client_gradients_are_summed_and_one_optimizer_steps_both_halves():
    one = trainer()
    before = one.state()
    one.forward_backward(batch({0: 4, 1: 4}), seed=0)
    server = {n: p.grad.clone() for n, p in one.server.named_parameters()}
    one.commit([gradients_of(one, 1.0), gradients_of(one, 2.0)])
    after = one.state()
    for name in one.weights().parameters:
        torch.testing.assert_close(after[name], before[name] - 0.1 * 3)
    for name, grad in server.items():
        torch.testing.assert_close(after[name], before[name] - 0.1 * grad)


def test_gradients_received_are_left_alone():
    one = trainer()
    parts = [gradients_of(one, 1.0), gradients_of(one, 2.0)]
    one.forward_backward(batch({0: 4}), seed=0)
    one.commit(parts)
    assert [float(p.tensors["stem.bias"][0]) for p in parts] == [1.0, 2.0]


def test_parameters_no_client_used_are_not_touched():
    """As in centralised training: no gradient, so neither momentum nor weight decay moves them."""
    one = trainer(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5))
    before = one.state()
    one.forward_backward(batch({0: 4, 1: 4}), seed=0)
    names = list(one.weights().parameters)
    half_used = Gradients({names[1]: torch.ones_like(before[names[1]])}, tuple(names[:1] + names[2:]), 0)
    one.commit([half_used, Gradients({}, tuple(names), 0)])
    after = one.state()
    assert [n for n in names if not torch.equal(after[n], before[n])] == [names[1]]


def test_frozen_parameters_stay():
    model = tiny_resnet()
    model.stem.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    one = trainer_of(model, CUT)
    assert "stem.weight" in one.weights().constants
    before = one.state()
    for _ in range(2):
        one.forward_backward(batch({0: 4}), seed=0)
        one.commit([gradients_of(one)])
    after = one.state()
    changed = {n for n in before if not torch.equal(after[n], before[n])}
    assert "stem.bias" in changed
    assert {"stem.weight", "head.bias"}.isdisjoint(changed)


def test_gradients_do_not_pile_up_on_parameters_the_optimizer_leaves_out():
    def biases_only(parameters):
        return torch.optim.SGD([p for p in parameters if p.ndim == 1], lr=0.1)

    one, parts = trainer(optimizer=biases_only), batch({0: 4})
    norms = []
    for _ in range(2):
        one.forward_backward(parts, seed=0)
        one.commit([gradients_of(one)])
        norms.append(float(one.client.get_parameter("stem.weight").grad.abs().max()))
    assert norms == [1.0, 1.0]


class ZebraFirst(nn.Module):
    """Two tied layers in the client half, of which the later name in the alphabet comes first."""

    def __init__(self):
        super().__init__()
        self.zebra, self.ant, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.ant.weight = self.zebra.weight
        self.tail = nn.Linear(4, 4)
        self.tail.weight = self.head.weight

    def forward(self, x):
        return self.tail(torch.relu(self.head(torch.relu(self.ant(torch.relu(self.zebra(x)))))))


def test_tied_weights_inside_a_half_are_trained_once():
    model = ZebraFirst()
    made = []
    one = trainer_of(model, "head", optimizer=lambda p: made.append(list(p)) or sgd(made[-1]))
    assert [tuple(p.shape) for p in made[0]] == [tuple(p.shape) for p in model.parameters()]
    before = one.state()
    one.forward_backward({0: Activations((torch.randn(3, 4),), torch.zeros(3, dtype=torch.int64), 0)}, seed=0)
    one.commit([gradients_of(one)])
    after = one.state()
    for name in ("zebra.weight", "zebra.bias", "ant.weight", "ant.bias"):
        torch.testing.assert_close(after[name], before[name] - 0.1)
    assert torch.equal(after["head.weight"], after["tail.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_the_optimizer_gets_the_models_order():
    made = []
    model = tiny_resnet()
    trainer_of(model, CUT, optimizer=lambda p: made.append(list(p)) or sgd(made[-1]))
    assert all(torch.equal(a, b) for a, b in zip(made[0], model.parameters(), strict=True))


def test_a_model_with_nothing_to_train_is_refused():
    model = tiny_resnet().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter to train: set requires_grad on some"):
        trainer_of(model, CUT)


def test_weights_are_one_object_until_they_change():
    one, another = trainer(), trainer()
    first = one.weights()
    assert one.weights() is first
    one.forward_backward(batch({0: 4}), seed=0)
    one.commit([gradients_of(one)])
    second = one.weights()
    assert len({first.version, second.version, another.weights().version}) == 3


# --- all or nothing --------------------------------------------------------------------------------------------------
def lose_step(one, parts, error, seed=0):
    """Run the server's part of a step, and then lose a client."""
    before = {n: b.clone() for n, b in one.server.named_buffers()}
    with one.transaction():
        one.forward_backward(parts, seed=seed)
        assert not equal(dict(one.server.named_buffers()), before)  # there is something to undo
        raise error


@pytest.mark.parametrize("error", [StepError("a client failed"), KeyboardInterrupt()])
def test_an_error_undoes_the_step(error):
    one = trainer()
    one.forward_backward(batch({0: 4}), seed=0)
    one.commit([gradients_of(one)])
    state, buffers, _ = snapshot(one)
    version = one.weights().version
    with pytest.raises(type(error)):
        lose_step(one, batch({0: 5}, seed=1), error)
    after, buffers_after, grads = snapshot(one)
    assert equal(after, state)
    assert equal(buffers_after, buffers)
    assert all(g is None for g in grads.values())
    assert one.weights().version == version


def test_a_redone_step_gives_what_an_undisturbed_one_gives():
    results = []
    for disturb in (True, False):
        one = trainer(optimizer=torch.optim.Adam)
        for step in range(3):
            if disturb:
                with pytest.raises(StepError):
                    lose_step(one, batch({0: 5}, seed=10 + step), StepError("lost"), seed=step)
            with one.transaction():
                one.forward_backward(batch({0: 4}, seed=step), seed=step)
                one.commit([gradients_of(one, 0.5)])
        results.append(one.state())
    assert equal(*results)


class Rebinds(nn.Module):
    """Puts another tensor in the place of its buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.linear(x)


def test_assigned_buffers_are_undone_too():
    one = trainer_of(SplitModel(client=nn.Linear(2, 3), server=Rebinds()))
    parts = {0: Activations((torch.randn(2, 3),), torch.tensor([0, 1]), 0)}
    with pytest.raises(StepError):
        lose_step(one, parts, StepError("lost"))
    assert one.state()["server.calls"] == 0


# --- refusals --------------------------------------------------------------------------------------------------------
def test_labels_out_of_range_name_their_clients():
    labels = {2: torch.tensor([0, 3]), 5: torch.tensor([1, 4, 9]), 9: torch.tensor([-1])}
    with pytest.raises(StepError) as caught:
        trainer().forward_backward(batch({2: 2, 5: 3, 9: 1}, labels), seed=0)
    assert caught.value.failures == {
        5: "labels: expected integers from 0 to 3, got 4",
        9: "labels: expected integers from 0 to 3, got -1",
    }


@pytest.mark.parametrize("labels", [torch.zeros(4), torch.zeros(4, dtype=torch.bool)])
def test_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(ConfigError, match=r"integer labels, got outputs .* pass classification=False"):
        trainer().forward_backward(batch({0: 4}, {0: labels}), seed=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(value):
    one = trainer(loss=lambda outputs, labels: F.cross_entropy(outputs, labels) * value)
    with pytest.raises(StepError, match=f"the loss is {value}: training diverges, lower the learning rate"):
        one.forward_backward(batch({0: 4}), seed=0)
    assert all(p.grad is None for p in one.server.parameters())


def test_a_loss_that_is_no_mean_is_refused():
    one = trainer(loss=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ConfigError, match=r"the loss must be the mean over the batch, got shape \(4,\)"):
        one.forward_backward(batch({0: 4}), seed=0)


def test_activations_the_server_half_cannot_take_are_a_step_error():
    parts = {3: Activations((torch.randn(2, 5, 6, 6),), torch.tensor([0, 1]), 0)}
    with pytest.raises(StepError, match=r"server half failed on activations float32 \(5, 6, 6\)"):
        trainer().forward_backward(parts, seed=0)


# --- evaluation ------------------------------------------------------------------------------------------------------
def test_evaluation_changes_nothing_and_sums_over_examples():
    one = trainer()
    state, buffers, _ = snapshot(one)
    part = batch({4: 7})[4]
    loss, correct, predictions = one.evaluate(part, 4)
    outputs = copy.deepcopy(one.server).eval()(part.tensors[0])
    assert loss == pytest.approx(F.cross_entropy(outputs, part.labels, reduction="sum").item())
    assert (correct, predictions) == (int((outputs.argmax(1) == part.labels).sum()), 7)
    after, buffers_after, grads = snapshot(one)
    assert equal(after, state)
    assert equal(buffers_after, buffers)
    assert all(g is None for g in grads.values())


def test_evaluation_names_the_client_of_a_bad_label():
    part = batch({4: 2}, {4: torch.tensor([0, 4])})[4]
    with pytest.raises(StepError) as caught:
        trainer().evaluate(part, 4)
    assert caught.value.failures == {4: "labels: expected integers from 0 to 3, got 4"}


def test_evaluation_without_classification_has_no_score():
    model = SplitModel(client=nn.Linear(2, 3), server=nn.Linear(3, 1))
    one = trainer_of(model, loss=F.mse_loss, classification=False)
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    loss, correct, _ = one.evaluate(Activations((x,), y), 0)
    assert loss == pytest.approx(4 * F.mse_loss(model.server(x), y).item(), rel=1e-5)
    assert correct is None


# --- dtypes ----------------------------------------------------------------------------------------------------------
def test_a_bfloat16_model_trains():
    one = trainer_of(tiny_resnet().bfloat16(), CUT)
    parts = {k: Activations((p.tensors[0].bfloat16(),), p.labels, 0) for k, p in batch({0: 4, 1: 2}).items()}
    before = one.state()
    outcome = one.forward_backward(parts, seed=0)
    assert outcome.cut_gradients[1][0].dtype == torch.bfloat16
    one.commit([gradients_of(one)])
    after = one.state()
    assert after["head.weight"].dtype == torch.bfloat16
    assert not torch.equal(after["head.weight"], before["head.weight"])


# --- a batch of one example ------------------------------------------------------------------------------------------
class NormedHead(nn.Module):
    """Batch norm on what has no more than one value a channel and example."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.head(self.second(x[:, :, None, None]).flatten(1))


def test_one_example_is_normalised_by_running_statistics_where_it_has_none_of_its_own():
    torch.manual_seed(0)
    model = NormedHead()
    a_trainer = trainer_of(model, "norm")
    many = {0: Activations((torch.randn(9, 6),), torch.arange(9) % 4, 0)}
    a_trainer.forward_backward(many, 0)
    before = {n: b.clone() for n, b in a_trainer.server.named_buffers()}
    one = {2: Activations((torch.randn(1, 6),), torch.tensor([3]), 0)}
    outcome = a_trainer.forward_backward(one, 0)
    gradients = {n: p.grad.clone() for n, p in a_trainer.server.named_parameters()}
    assert all(torch.equal(b, before[n]) for n, b in a_trainer.server.named_buffers())
    assert all(m.training for m in a_trainer.server.modules())
    # as the whole model's tail does in evaluation
    reference = copy.deepcopy(model).eval()
    reference.load_state_dict({**reference.state_dict(), **before})
    x = one[2].tensors[0].clone().requires_grad_()
    y = reference.head(reference.second(reference.norm(x)[:, :, None, None]).flatten(1))
    loss = F.cross_entropy(y, one[2].labels)
    loss.backward()
    assert outcome.loss == pytest.approx(loss.item())
    assert torch.allclose(outcome.cut_gradients[2][0], x.grad)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, reference.get_parameter(name).grad)


def test_one_example_with_statistics_of_its_own_uses_them():
    """Batch norm over an image: what centralised training does with a last batch of one."""
    a_trainer, one = trainer(), batch({0: 1})
    outcome = a_trainer.forward_backward(one, 0)
    server = copy.deepcopy(cut_model(tiny_resnet(), CUT).server).train()
    loss = F.cross_entropy(server(*one[0].tensors), one[0].labels)
    assert outcome.loss == pytest.approx(loss.item())


def test_of_one_example_each_layer_uses_what_statistics_there_are():
    """Over an image they are its own, as in centralised training; behind the pooling there are none."""
    server = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    model = SplitModel(client=nn.Conv2d(1, 4, 1), server=copy.deepcopy(server))
    a_trainer, x = trainer_of(model), torch.randn(1, 4, 3, 3)
    outcome = a_trainer.forward_backward({0: Activations((x,), torch.tensor([3]), 0)}, 0)
    server.train()[3].eval()
    assert outcome.loss == pytest.approx(F.cross_entropy(server(x), torch.tensor([3])).item())
    tracked = {n.removeprefix("server."): b for n, b in a_trainer.server.named_buffers()}
    for name, buffer in server.named_buffers():
        assert torch.equal(tracked[name], buffer), name
    assert not any(m._forward_pre_hooks for m in a_trainer.server.modules())


def test_other_value_errors_of_one_example_are_not_hidden():
    class Refuses(nn.Module):
        def forward(self, x):
            raise ValueError("not today")

    model = SplitModel(client=nn.Linear(3, 6), server=nn.Sequential(nn.BatchNorm1d(6), Refuses(), nn.Linear(6, 4)))
    a_trainer = trainer_of(model)
    with pytest.raises(StepError, match="ValueError: not today"):
        a_trainer.forward_backward({0: Activations((torch.randn(1, 6),), torch.tensor([3]), 0)}, 0)
