"""The server's end of a step, without any transport: exact, all or nothing, deterministic."""

import copy

import pytest
import torch
from support import CUT, tiny_resnet
from support import fast_sgd as sgd
from torch import nn
from torch.nn import functional as F

from psl_flower import SplitModel
from psl_flower.errors import ConfigError, LabelError, StepError
from psl_flower.server import LocalBackend
from psl_flower.split import cut_model

CPU = torch.device("cpu")


def backend_of(model, cut=None, **options):
    halves = cut_model(model, cut)
    order = [name for name, _ in model.named_parameters()]
    options = {"optimizer": sgd, "loss": F.cross_entropy, "classification": True, **options}
    parts, places = {"head": halves.client, "body": halves.server}, {"head": "client", "body": "server"}
    return LocalBackend(parts, places, device=CPU, order=order, **options)


def backend(**options):
    return backend_of(tiny_resnet(), CUT, **options)


def batch(n, labels=None, seed=0):
    """Return activations of TinyResNet's cut, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=generator) if labels is None else labels
    return (torch.randn(n, 4, 6, 6, generator=generator),), labels


def run(one, inputs, labels, seed=0):
    return one.part("body", seed).forward_backward(inputs, labels)


def head_gradients(one, scale=1.0):
    return {n: torch.full_like(p, scale) for n, p in one.weights()["head"].parameters.items()}


def commit(one, outcome, head=None):
    one.commit({"head": head_gradients(one) if head is None else head, "body": outcome.parameter_gradients})


def snapshot(one):
    buffers = {n: b.clone() for n, b in one.parts["body"].named_buffers()}
    grads = {n: p.grad for part in one.parts.values() for n, p in part.named_parameters()}
    return one.state(), buffers, grads


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


# --- forward and backward --------------------------------------------------------------------------------------------
def test_it_is_a_step_of_centralised_training_from_the_cut_on():
    one, ((x,), y) = backend(), batch(8)
    reference = copy.deepcopy(one.parts["body"]).train()
    leaf = x.clone().requires_grad_()
    outputs = reference(leaf)
    loss = F.cross_entropy(outputs, y)
    loss.backward()

    outcome = run(one, (x,), y)
    assert (outcome.loss, outcome.weight) == (loss.item(), 8)
    assert outcome.score == (int((outputs.argmax(1) == y).sum()), 8)
    assert outcome.class_counts.tolist() == torch.bincount(y, minlength=4).tolist()
    assert torch.equal(outcome.gradient[0], leaf.grad)
    assert equal(outcome.parameter_gradients, {n: p.grad for n, p in reference.named_parameters()})
    assert equal(dict(one.parts["body"].named_buffers()), dict(reference.named_buffers()))


def test_what_was_received_is_left_alone():
    (x,), y = batch(3)
    before = x.clone()
    run(backend(), (x,), y)
    assert torch.equal(x, before)
    assert not x.requires_grad


def test_the_rows_may_be_a_tree_of_one():
    (x,), y = batch(3)
    bare, nested = run(backend(), x, y), run(backend(), (x,), y)
    assert bare.loss == nested.loss
    assert torch.equal(bare.gradient, nested.gradient[0])


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
    one = backend_of(SplitModel(client=ThreeOut(2, 3), server=ManyInputs()))
    inputs = (torch.randn(5, 3), torch.arange(5), torch.randn(5, 3))
    gradients = run(one, inputs, torch.zeros(5, dtype=torch.int64)).gradient
    assert gradients[0].shape == (5, 3)
    assert gradients[1] is gradients[2] is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_any_integer_dtype(dtype):
    x, y = batch(6)
    expected, outcome = run(backend(), x, y), run(backend(), x, y.to(dtype))
    assert (outcome.loss, outcome.score) == (expected.loss, expected.score)
    assert torch.equal(outcome.gradient[0], expected.gradient[0])


def test_dense_predictions_count_positions():
    model = SplitModel(client=nn.Conv2d(1, 2, 1), server=nn.Conv2d(2, 3, 1))
    outcome = run(backend_of(model), (torch.randn(2, 2, 4, 4),), torch.randint(0, 3, (2, 4, 4)))
    assert outcome.class_counts.sum() == 32
    right, counted = outcome.score
    assert (0 <= right <= 32, counted) == (True, 32)
    assert outcome.accuracy == right / 32


def test_any_loss_without_classification():
    model = SplitModel(client=nn.Linear(2, 3), server=nn.Linear(3, 1))
    one = backend_of(model, loss=F.mse_loss, classification=False)
    targets = torch.tensor([[0.5], [-2.0], [100.0]])
    x = torch.randn(3, 3)
    outcome = run(one, (x,), targets)
    assert outcome.loss == pytest.approx(F.mse_loss(model.server(x), targets).item())
    assert outcome.score is outcome.accuracy is outcome.class_counts is None


# --- randomness ------------------------------------------------------------------------------------------------------
def dropping():
    torch.manual_seed(0)
    return SplitModel(client=nn.Linear(2, 50), server=nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 4)))


def test_dropout_in_the_server_half_follows_the_seed_alone():
    x, y = (torch.randn(6, 50),), torch.zeros(6, dtype=torch.int64)
    model = dropping()
    gradients = []
    for seed in (3, 3, 4):
        torch.rand(7)
        gradients.append(run(backend_of(model), x, y, seed=seed).gradient[0])
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])
    assert (gradients[0] == 0).any()


def test_torchs_generator_is_left_alone():
    x, y = (torch.randn(6, 50),), torch.zeros(6, dtype=torch.int64)
    one = backend_of(dropping())
    state = torch.get_rng_state()
    with one.transaction():
        run(one, x, y, seed=3)
    one.part("body", 0).evaluate(x, y)
    assert torch.equal(torch.get_rng_state(), state)


# --- commit ----------------------------------------------------------------------------------------------------------
def test_one_optimizer_steps_all_parts():
    one = backend()
    before = one.state()
    outcome = run(one, *batch(8))
    commit(one, outcome, head_gradients(one, 3.0))
    after = one.state()
    for name in one.weights()["head"].parameters:
        torch.testing.assert_close(after[name], before[name] - 0.1 * 3)
    for name, gradient in outcome.parameter_gradients.items():
        torch.testing.assert_close(after[name], before[name] - 0.1 * gradient)


def test_gradients_received_are_left_alone():
    one = backend()
    head = head_gradients(one, 2.0)
    for _ in range(2):
        commit(one, run(one, *batch(4)), head)
    assert float(head["stem.bias"][0]) == 2.0


def test_parameters_no_client_used_are_not_touched():
    """As in centralised training: no gradient, so neither momentum nor weight decay moves them."""
    one = backend(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5))
    before = one.state()
    names = list(one.weights()["head"].parameters)
    head = {**dict.fromkeys(names), names[1]: torch.ones_like(before[names[1]])}
    commit(one, run(one, *batch(8)), head)
    after = one.state()
    assert [n for n in names if not torch.equal(after[n], before[n])] == [names[1]]


def test_frozen_parameters_stay():
    model = tiny_resnet()
    model.stem.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    one = backend_of(model, CUT)
    assert "stem.weight" in one.weights()["head"].constants
    before = one.state()
    for _ in range(2):
        commit(one, run(one, *batch(4)))
    after = one.state()
    changed = {n for n in before if not torch.equal(after[n], before[n])}
    assert "stem.bias" in changed
    assert {"stem.weight", "head.bias"}.isdisjoint(changed)


def test_gradients_do_not_pile_up_on_parameters_the_optimizer_leaves_out():
    def biases_only(parameters):
        return torch.optim.SGD([p for p in parameters if p.ndim == 1], lr=0.1)

    one = backend(optimizer=biases_only)
    norms = []
    for _ in range(2):
        commit(one, run(one, *batch(4)))
        norms.append(float(one.parts["head"].get_parameter("stem.weight").grad.abs().max()))
    assert norms == [1.0, 1.0]


def test_a_step_of_nothing_does_not_repeat_the_last():
    one = backend()
    commit(one, run(one, *batch(4)))
    before = one.state()
    one.commit({name: {} for name in one.parts})
    assert all(torch.equal(t, before[name]) for name, t in one.state().items())


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
    one = backend_of(model, "head", optimizer=lambda p: made.append(list(p)) or sgd(made[-1]))
    assert [tuple(p.shape) for p in made[0]] == [tuple(p.shape) for p in model.parameters()]
    before = one.state()
    commit(one, run(one, (torch.randn(3, 4),), torch.zeros(3, dtype=torch.int64)))
    after = one.state()
    for name in ("zebra.weight", "zebra.bias", "ant.weight", "ant.bias"):
        torch.testing.assert_close(after[name], before[name] - 0.1)
    assert torch.equal(after["head.weight"], after["tail.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_the_optimizer_gets_the_models_order():
    made = []
    model = tiny_resnet()
    backend_of(model, CUT, optimizer=lambda p: made.append(list(p)) or sgd(made[-1]))
    assert all(torch.equal(a, b) for a, b in zip(made[0], model.parameters(), strict=True))


def test_a_model_with_nothing_to_train_is_refused():
    model = tiny_resnet().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter to train: set requires_grad on some"):
        backend_of(model, CUT)


def test_weights_are_one_object_until_they_change():
    one, another = backend(), backend()
    first = one.weights()
    assert one.weights() is first
    commit(one, run(one, *batch(4)))
    second = one.weights()
    assert len({w["head"].version for w in (first, second, another.weights())}) == 3
    assert all(len(w["head"].version.rpartition(".")[2]) == 16 for w in (first, second))  # no number of the step
    assert first["head"].constants_version == second["head"].constants_version  # nothing changes them in training
    assert first["head"].constants_version != another.weights()["head"].constants_version


def test_loaded_state_is_new_to_everybody():
    one, another = backend(), backend_of(tiny_resnet(seed=1), CUT)
    commit(another, run(another, *batch(4)))
    before = one.weights()["head"]
    one.load_state_dict(copy.deepcopy(another.state_dict()))
    after = one.weights()["head"]
    assert equal(one.state(), another.state())
    assert after.version != before.version
    assert after.constants_version != before.constants_version
    for each in (one, another):  # with its optimizer
        commit(each, run(each, *batch(4, seed=1)))
    assert equal(one.state(), another.state())


# --- all or nothing --------------------------------------------------------------------------------------------------
def lose_step(one, inputs, labels, error, seed=0):
    """Run the server's end of a step, and then lose a client."""
    before = {n: b.clone() for n, b in one.parts["body"].named_buffers()}
    with one.transaction():
        run(one, inputs, labels, seed)
        assert not equal(dict(one.parts["body"].named_buffers()), before)  # there is something to undo
        raise error


@pytest.mark.parametrize("error", [StepError("a client failed"), KeyboardInterrupt()])
def test_an_error_undoes_the_step(error):
    one = backend()
    commit(one, run(one, *batch(4)))
    state, buffers, _ = snapshot(one)
    version = one.weights()["head"].version
    with pytest.raises(type(error)):
        lose_step(one, *batch(5, seed=1), error)
    after, buffers_after, grads = snapshot(one)
    assert equal(after, state)
    assert equal(buffers_after, buffers)
    assert all(g is None for g in grads.values())
    assert one.weights()["head"].version == version


def test_a_redone_step_gives_what_an_undisturbed_one_gives():
    results = []
    for disturb in (True, False):
        one = backend(optimizer=torch.optim.Adam)
        for step in range(3):
            if disturb:
                with pytest.raises(StepError):
                    lose_step(one, *batch(5, seed=10 + step), StepError("lost"), seed=step)
            with one.transaction():
                commit(one, run(one, *batch(4, seed=step), seed=step), head_gradients(one, 0.5))
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
    one = backend_of(SplitModel(client=nn.Linear(2, 3), server=Rebinds()))
    with pytest.raises(StepError):
        lose_step(one, (torch.randn(2, 3),), torch.tensor([0, 1]), StepError("lost"))
    assert one.state()["server.calls"] == 0


# --- refusals --------------------------------------------------------------------------------------------------------
def test_labels_out_of_range_name_their_rows():
    with pytest.raises(LabelError, match=r"labels must be class indices from 0 to 3, .*, got -1, 4: ") as caught:
        run(backend(), *batch(6, torch.tensor([0, 3, 1, 4, -1, 2])))
    assert caught.value.rows == (3, 4)


def test_dense_labels_out_of_range_name_their_rows():
    labels = torch.zeros(3, 4, 4, dtype=torch.int64)
    labels[1, 2, 3], labels[1, 3, 3] = 7, 9
    model = SplitModel(client=nn.Conv2d(1, 2, 1), server=nn.Conv2d(2, 3, 1))
    with pytest.raises(LabelError, match=r"from 0 to 2, .* got 7, 9: ") as caught:
        run(backend_of(model), (torch.randn(3, 2, 4, 4),), labels)
    assert caught.value.rows == (1,)


@pytest.mark.parametrize("labels", [torch.zeros(4), torch.zeros(4, dtype=torch.bool)])
def test_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(
        ConfigError, match=r"labels (float32|bool) \(4,\)\. Class indices must be integers, labels.long"
    ):
        run(backend(), *batch(4, labels))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(value):
    one = backend(loss=lambda outputs, labels: F.cross_entropy(outputs, labels) * value)
    with pytest.raises(StepError, match=f"the loss is {value}: training diverges, lower the learning rate"):
        run(one, *batch(4))
    assert all(p.grad is None for p in one.parts["body"].parameters())


def test_a_loss_that_is_no_mean_is_refused():
    one = backend(loss=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(
        ConfigError, match=r"the loss must be the mean over the batch, a tensor of one number, got shape \(4,\)"
    ):
        run(one, *batch(4))


def test_activations_the_server_half_cannot_take_are_a_step_error():
    with pytest.raises(StepError, match=r"server half or the loss failed on 2 rows of activations float32 \(5, 6, 6\)"):
        run(backend(), (torch.randn(2, 5, 6, 6),), torch.tensor([0, 1]))


# --- evaluation ------------------------------------------------------------------------------------------------------
def test_evaluation_changes_nothing():
    one = backend()
    state, buffers, _ = snapshot(one)
    (x,), y = batch(7)
    outcome = one.part("body", 0).evaluate((x,), y)
    outputs = copy.deepcopy(one.parts["body"]).eval()(x)
    assert outcome.loss == pytest.approx(F.cross_entropy(outputs, y).item())
    assert outcome.weight == 7
    assert outcome.score == (int((outputs.argmax(1) == y).sum()), 7)
    assert outcome.gradient is outcome.parameter_gradients is None
    after, buffers_after, grads = snapshot(one)
    assert equal(after, state)
    assert equal(buffers_after, buffers)
    assert all(g is None for g in grads.values())


def test_evaluation_names_the_row_of_a_bad_label():
    with pytest.raises(LabelError, match=r"from 0 to 3, .* got 4: ") as caught:
        backend().part("body", 0).evaluate(*batch(2, torch.tensor([0, 4])))
    assert caught.value.rows == (1,)


def test_evaluation_without_classification_has_no_score():
    model = SplitModel(client=nn.Linear(2, 3), server=nn.Linear(3, 1))
    one = backend_of(model, loss=F.mse_loss, classification=False)
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    outcome = one.part("body", 0).evaluate((x,), y)
    assert outcome.loss * outcome.weight == pytest.approx(4 * F.mse_loss(model.server(x), y).item(), rel=1e-5)
    assert outcome.score is None


# --- dtypes ----------------------------------------------------------------------------------------------------------
def test_a_bfloat16_model_trains():
    one = backend_of(tiny_resnet().bfloat16(), CUT)
    (x,), y = batch(6)
    before = one.state()
    outcome = run(one, (x.bfloat16(),), y)
    assert outcome.gradient[0].dtype == torch.bfloat16
    commit(one, outcome)
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
    one = backend_of(model, "norm")
    body = one.parts["body"]
    run(one, (torch.randn(9, 6),), torch.arange(9) % 4)
    before = {n: b.clone() for n, b in body.named_buffers()}
    x, label = torch.randn(1, 6), torch.tensor([3])
    outcome = run(one, (x,), label)
    assert all(torch.equal(b, before[n]) for n, b in body.named_buffers())
    assert all(m.training for m in body.modules())
    # as the whole model's tail does in evaluation
    reference = copy.deepcopy(model).eval()
    reference.load_state_dict({**reference.state_dict(), **before})
    leaf = x.clone().requires_grad_()
    y = reference.head(reference.second(reference.norm(leaf)[:, :, None, None]).flatten(1))
    loss = F.cross_entropy(y, label)
    loss.backward()
    assert outcome.loss == pytest.approx(loss.item())
    assert torch.allclose(outcome.gradient[0], leaf.grad)
    for name, gradient in outcome.parameter_gradients.items():
        assert torch.allclose(gradient, reference.get_parameter(name).grad)


def test_one_example_with_statistics_of_its_own_uses_them():
    """Batch norm over an image: what centralised training does with a last batch of one."""
    (x,), y = batch(1)
    outcome = run(backend(), (x,), y)
    server = copy.deepcopy(cut_model(tiny_resnet(), CUT).server).train()
    assert outcome.loss == pytest.approx(F.cross_entropy(server(x), y).item())


def test_of_one_example_each_layer_uses_what_statistics_there_are():
    """Over an image they are its own, as in centralised training; behind the pooling there are none."""
    server = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    model = SplitModel(client=nn.Conv2d(1, 4, 1), server=copy.deepcopy(server))
    one, x = backend_of(model), torch.randn(1, 4, 3, 3)
    outcome = run(one, (x,), torch.tensor([3]))
    server.train()[3].eval()
    assert outcome.loss == pytest.approx(F.cross_entropy(server(x), torch.tensor([3])).item())
    tracked = {n.removeprefix("server."): b for n, b in one.parts["body"].named_buffers()}
    for name, buffer in server.named_buffers():
        assert torch.equal(tracked[name], buffer), name
    assert not any(m._forward_pre_hooks for m in one.parts["body"].modules())


def test_other_value_errors_of_one_example_are_not_hidden():
    class Refuses(nn.Module):
        def forward(self, x):
            raise ValueError("not today")

    model = SplitModel(client=nn.Linear(3, 6), server=nn.Sequential(nn.BatchNorm1d(6), Refuses(), nn.Linear(6, 4)))
    with pytest.raises(StepError, match="ValueError: not today"):
        run(backend_of(model), (torch.randn(1, 6),), torch.tensor([3]))
