"""Both halves of a cut model compute what the whole model computes, and name things as it does."""

import copy
import functools
import pickle
import threading

import cloudpickle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psl_flower.split import cut_candidates, split_module
from psl_flower.torchvision_compat import import_torchvision

models = import_torchvision().models
IMAGE = (3, 32, 32)


# The structures of torchvision's models, narrower and less deep; at full size below, without numbers
def resnet():
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def densenet():
    return models.DenseNet(8, (2, 4, 2, 2), 16, num_classes=10)


def mobilenet():
    return models.mobilenet_v2(inverted_residual_setting=[[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 2, 2]], num_classes=10)


def vgg11():
    with torch.device("meta"):  # 100 million parameters less
        widths = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]
        model = models.VGG(models.vgg.make_layers(widths), num_classes=10)
        model.classifier[0] = nn.Linear(64 * 7 * 7, 16)
        model.classifier[3] = nn.Linear(16, 16)
        model.classifier[6] = nn.Linear(16, 10)
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def vit():
    model = models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=0.1
    )
    nn.init.normal_(model.heads.head.weight)  # torchvision makes it zero, and the comparison empty
    return model


def small_mobilenet():
    return models.mobilenet_v2(inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]])


class SmallCNN(nn.Module):
    """A residual network with functional dropout, a flatten by batch size and a layer nobody calls."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))
        self.last = nn.Conv2d(8, 4, 3, stride=4)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.dropout(x, 0.3, training=self.training)
        x = x + self.block(x)
        x = self.last(x)
        x = F.dropout(x, 0.3, self.training)
        return self.head(x.view(x.size(0), -1))


@functools.cache
def built(make):
    torch.manual_seed(1)
    return make().double()


CUTS = [
    (resnet, "relu"),
    (resnet, "layer1.0.conv2"),
    (resnet, "layer2"),
    (resnet, "layer2.0.downsample"),
    (resnet, "fc"),
    pytest.param(models.resnet34, "layer3.4", marks=pytest.mark.slow),  # resnet has all it has, less often
    (mobilenet, "features.1"),
    (mobilenet, "features.5.conv.1"),
    (mobilenet, "classifier"),
    (densenet, "features.denseblock1"),
    (densenet, "features.denseblock2.denselayer3"),
    (densenet, "features.denseblock2.denselayer3.relu1"),
    (densenet, "classifier"),
    (vgg11, "features.1"),
    (vgg11, "features.11"),
    (vgg11, "classifier.6"),
    (vit, "encoder"),
    (vit, "encoder.layers.encoder_layer_1"),
    (vit, "encoder.layers.encoder_layer_1.mlp"),
    (vit, "heads"),
    (SmallCNN, "norm"),
    (SmallCNN, "block"),
    (SmallCNN, "block.1"),
    (SmallCNN, "head"),
]


def run_halves(client, server, *inputs):
    """Run both halves as split learning does: the server gets leaf tensors, the client their gradients."""
    activations = client(*inputs)
    received = [a.detach().clone().requires_grad_(a.requires_grad) for a in activations]
    output = server(*received)
    output.square().sum().backward()
    pairs = [(a, r.grad) for a, r in zip(activations, received, strict=True) if r.grad is not None]
    torch.autograd.backward([a for a, _ in pairs], [gradient for _, gradient in pairs])
    return output


def assert_same_step(model, client, server, *inputs):
    """Assert that outputs, buffers and gradients of one training step are the whole model's."""
    whole = copy.deepcopy(model).train()
    client, server = copy.deepcopy(client).train(), copy.deepcopy(server).train()
    torch.manual_seed(0)
    expected = whole(*inputs)
    expected.square().sum().backward()
    torch.manual_seed(0)
    assert torch.equal(run_halves(client, server, *inputs), expected)
    parts = {**client.state_dict(), **server.state_dict()}
    assert all(torch.equal(parts[name], value) for name, value in whole.state_dict().items() if name in parts)
    parameters = {
        name: parameter
        for half in (client, server)
        for name, parameter in half.named_parameters(remove_duplicate=False)
    }
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        if parameter.grad is None:
            assert name not in parameters or parameters[name].grad is None
        else:
            torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=1e-9, atol=1e-9)


def assert_same_evaluation(model, client, server, *inputs):
    model, client, server = model.eval(), client.eval(), server.eval()
    with torch.no_grad():
        activations = client(*inputs)
        assert isinstance(activations, tuple)
        assert all(len(activation) == len(inputs[0]) for activation in activations)
        assert torch.equal(server(*activations), model(*inputs))


def assert_names(model, client, server, unused=()):
    names = {*model.state_dict()}
    ours, theirs = {*client.state_dict()}, {*server.state_dict()}
    assert not ours & theirs
    assert names - ours - theirs == {*unused}
    assert ours | theirs <= names
    assert {*map(id, client.parameters())}.isdisjoint(map(id, server.parameters()))


@pytest.mark.parametrize(("make", "cut"), CUTS, ids=lambda value: getattr(value, "__name__", value))
def test_halves_reproduce_the_model(make, cut):
    model = built(make)
    before = copy.deepcopy(model.state_dict())
    client, server = split_module(model, cut)
    assert_names(model, client, server, ("unused.weight", "unused.bias") if make is SmallCNN else ())
    assert_same_step(model, client, server, torch.randn(2, *IMAGE, dtype=torch.float64))
    for batch in (1, 5):
        assert_same_evaluation(model, client, server, torch.randn(batch, *IMAGE, dtype=torch.float64))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "cut", "shapes"),
    [
        (models.vit_b_16, "encoder.layers.encoder_layer_6", [(2, 197, 768)]),
        (models.densenet121, "features.denseblock2.denselayer3", [(2, 128, 28, 28), (2, 32, 28, 28), (2, 32, 28, 28)]),
        (models.vgg11, "features.16", [(2, 512, 14, 14)]),
    ],
)
def test_shapes_at_full_size(make, cut, shapes):
    with torch.device("meta"):  # shapes without numbers
        model = make()
        client, server = split_module(model, cut)
        activations = client(torch.empty(2, 3, 224, 224))
        assert [tuple(activation.shape) for activation in activations] == shapes
        assert server(*activations).shape == (2, 1000)
    assert_names(model, client, server)


def test_no_parameter_of_the_model_is_touched_or_shared():
    model = SmallCNN()
    client, server = split_module(model, "block")
    originals = {*map(id, model.modules()), *map(id, model.parameters()), *map(id, model.buffers())}
    for half in (client, server):
        assert originals.isdisjoint([*map(id, half.modules()), *map(id, half.parameters()), *map(id, half.buffers())])


@pytest.mark.parametrize("flag", [True, False])
def test_training_flags_come_from_the_model(flag):
    model = SmallCNN().train(flag)
    model.norm.eval()
    client, server = split_module(model, "block")
    assert client.training == server.training == flag
    assert not client.get_submodule("norm").training
    assert model.training == flag
    assert not model.norm.training


def test_other_threads_run_their_modules_while_one_traces():
    model, x = SmallCNN().eval(), torch.randn(2, *IMAGE)
    expected, failures, stop = model(x), [], threading.Event()

    def run():
        while not stop.is_set():
            torch.rand(3)
            try:
                if not torch.equal(model(x), expected):
                    failures.append("another result")
            except BaseException as error:
                failures.append(repr(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(20):
            split_module(SmallCNN(), "block.1")
    finally:
        stop.set()
        thread.join()
    assert failures == []


def test_functional_dropout_follows_the_mode():
    torch.manual_seed(0)
    client, server = split_module(SmallCNN(), "block")
    x = torch.randn(4, *IMAGE)
    for half, arguments in ((client, (x,)), (server, client.eval()(x))):
        half.train()
        assert not torch.equal(*(half(*arguments)[0] for _ in range(2)))
        half.eval()
        assert torch.equal(*(half(*arguments)[0] for _ in range(2)))


class Branching(nn.Module):
    """One set of layers in training, another in evaluation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.only_training = nn.Linear(6, 6)
        self.only_evaluation = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.full((6,), 2.0))
        self.middle = nn.Linear(6, 6)
        self.auxiliary = nn.Linear(6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        x = self.only_training(x) if self.training else self.only_evaluation(x) * self.scale
        y = self.head(self.middle(x))
        if self.training:
            y = y + self.auxiliary(x)
        return y


def test_branches_by_mode():
    model = Branching()
    client, server = split_module(model, "middle")
    assert_names(model, client, server)
    assert {"only_training.weight", "only_evaluation.weight", "scale"} <= {*client.state_dict()}
    assert "auxiliary.weight" in server.state_dict()
    x = torch.randn(3, 4)
    assert_same_step(model, client, server, x)
    assert_same_evaluation(model, client, server, x)
    copies = [pickle.loads(pickle.dumps(half)) for half in (client, server)]
    assert_same_step(model, *copies, x)
    assert_same_evaluation(model, *copies, x)


class Frozen(nn.Module):
    """Keeps its batch norm in evaluation, as fine-tuning code does."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.stem(x)))

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


def test_overridden_train_is_respected():
    model = Frozen()
    model.norm.running_mean.fill_(3.0)
    client, server = split_module(model, "head")
    assert not client.train().get_submodule("norm").training
    assert_same_step(model, client, server, torch.randn(3, 4))


class Blocked(nn.Module):
    """Anything goes inside a module that does not contain the cut."""

    class Wild(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            x = self.layer(x) if x.sum() > 0 else -self.layer(x)
            return x + torch.randn(4).mean() if len(x) > 1 else x

    def __init__(self):
        super().__init__()
        self.one, self.two = self.Wild(), self.Wild()

    def forward(self, x):
        return self.two(self.one(x))


def test_only_the_modules_around_the_cut_are_traced():
    model = Blocked()
    client, server = split_module(model, "two")
    for x in (torch.ones(3, 4), -torch.ones(3, 4)):
        assert_same_step(model, client, server, x)
    assert isinstance(server.get_submodule("two"), Blocked.Wild)


class ClassToken(nn.Module):
    """Parameters, constants and sizes named early and used late."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("position", torch.randn(1, 4, 8))
        self.register_buffer("mask", torch.tensor([1.0, 0.0] * 4), persistent=False)
        self.factor = torch.tensor(3.0)
        self.block = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        n, _length, _width = x.shape
        token = self.token.expand(n, -1, -1)
        shift = self.position * self.factor
        x = self.embed(x) * self.mask
        x = self.block(x)
        x = torch.cat([token, x], 1) + shift
        x = self.norm(x) * self.mask
        return self.head(x.reshape(n, -1, 8).mean(1))


@pytest.mark.parametrize(
    ("cut", "ours"),
    [
        ("block", {"embed.weight", "embed.bias"}),
        ("norm", {"embed.weight", "embed.bias", "block.weight", "block.bias", "token", "position"}),
    ],
)
def test_parameters_and_sizes_live_where_they_are_used(cut, ours):
    model = ClassToken()
    client, server = split_module(model, cut)
    assert {*client.state_dict()} == ours
    assert_names(model, client, server)
    assert_same_step(model, client, server, torch.randn(2, 3, 5))
    for batch in (1, 4):
        x = torch.randn(batch, 3, 5)
        assert_same_evaluation(model, client, server, x)
        assert len(client(x)) == 1


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x, y, scale=None, power=1):
        z = self.left(x) + self.right(y) ** power
        if scale is not None:
            z = z * scale
        return self.head(z)


def test_two_inputs_and_defaults():
    model = TwoInputs()
    client, server = split_module(model, "head")
    inputs = torch.randn(5, 3), torch.randn(5, 2)
    assert_same_step(model, client, server, *inputs)
    with pytest.raises(TypeError):
        client(inputs[0])


def test_structured_outputs():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 4)

        def forward(self, x):
            x = self.stem(x)
            return {"one": self.one(x), "rest": [self.two(x), x]}

    model = Heads()
    client, server = split_module(model, "one")
    x = torch.randn(2, 3)
    expected, found = model(x), server(*client(x))
    assert torch.equal(found["one"], expected["one"])
    assert all(torch.equal(*pair) for pair in zip(found["rest"], expected["rest"], strict=True))


def test_a_server_half_leaves_its_inputs_alone():
    client, server = split_module(SmallCNN(), "block.1")  # an activation in place
    activations = client(torch.randn(2, *IMAGE))
    before = [activation.detach().clone() for activation in activations]
    server(*(activation.detach().requires_grad_() for activation in activations)).sum().backward()
    assert all(torch.equal(*pair) for pair in zip(activations, before, strict=True))


def test_a_layer_without_state_may_be_called_on_both_sides():
    model = models.resnet18().double()
    client, server = split_module(model, "layer1.0.conv2")
    ours, theirs = client.get_submodule("layer1.0.relu"), server.get_submodule("layer1.0.relu")
    assert ours is not theirs


class Tied(nn.Module):
    """Two names for one weight, both after the cut; and a layer that is an alias of another."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(4, 4)
        self.stem = nn.Linear(4, 4)
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.spare.weight = self.stem.weight
        self.again = self.one

    def forward(self, x):
        return self.two(self.one(self.stem(x)))


@pytest.mark.parametrize("cut", ["one", "again"])
def test_tied_names_on_one_side_stay_tied(cut):
    model = Tied()
    client, server = split_module(model, cut)
    assert_names(model, client, server, ["spare.bias"])
    assert {"one.weight", "two.weight", "again.weight", "again.bias"} <= {*server.state_dict()}
    assert "spare.weight" in client.state_dict()
    assert_same_step(model, client, server, torch.randn(3, 4))
    parameters = dict(server.named_parameters(remove_duplicate=False))
    assert parameters["one.weight"] is parameters["two.weight"] is parameters["again.weight"]


def test_a_layer_called_twice_after_the_cut():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.cell = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.cell(self.cell(self.stem(x)))

    model = Twice()
    assert_same_step(model, *split_module(model, "cell"), torch.randn(2, 4))


def test_buffers_updated_in_forward():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            self.seen.add_(x.shape[0])
            x = self.stem(x)
            y = self.head(x)
            self.mean.mul_(0.9).add_(y.detach().mean(0))
            return y - self.mean

    model = Counting()
    client, server = split_module(model, "head")
    assert {*client.state_dict()} == {"seen", "stem.weight", "stem.bias"}
    x = torch.randn(3, 4)
    for _ in range(2):
        assert torch.equal(server(*client(x)), model(x))
    assert client.get_buffer("seen") == 6
    assert torch.equal(server.get_buffer("mean"), model.mean)


def test_hooks_are_kept():
    model = SmallCNN().eval()
    model.stem.register_forward_hook(lambda module, arguments, output: output * 2)
    model.register_forward_hook(lambda module, arguments, output: output + 1)
    client, server = split_module(model, "block")
    assert_same_evaluation(model, client, server, torch.randn(2, *IMAGE))


@pytest.mark.parametrize("cut", ["block", "block.1"])
def test_functional_call_with_the_models_names(cut):
    model = SmallCNN().eval()
    client, server = split_module(model, cut)
    torch.manual_seed(5)
    other = SmallCNN().eval()
    x = torch.randn(3, *IMAGE)
    ours, theirs = (
        {name: value for name, value in other.state_dict().items() if name in half.state_dict()}
        for half in (client, server)
    )
    activations = torch.func.functional_call(client, ours, (x,))
    assert torch.equal(torch.func.functional_call(server, theirs, activations), other(x))
    assert torch.equal(server(*client(x)), model(x))


@pytest.mark.parametrize("cut", ["block", "norm"])
@pytest.mark.parametrize("dump", [pickle.dumps, cloudpickle.dumps])
def test_halves_pickle(dump, cut):
    model = ClassToken()
    halves = split_module(model, cut)
    copies = [pickle.loads(dump(half)) for half in halves]
    x = torch.randn(3, 3, 5)
    assert_same_step(model, *copies, x)
    with torch.no_grad():
        copies[0].get_parameter("embed.weight").zero_()
    assert halves[0].get_parameter("embed.weight").any()


def test_halves_move_between_dtypes_with_their_constants():
    model = ClassToken()
    client, server = (half.to(torch.bfloat16) for half in split_module(model, "block"))
    assert server(*client(torch.randn(2, 3, 5, dtype=torch.bfloat16))).dtype == torch.bfloat16


@pytest.mark.parametrize(("make", "least"), [(SmallCNN, 6), (vit, 20), (small_mobilenet, 40)])
def test_every_candidate_can_be_cut(make, least):
    model = make().eval()
    candidates = cut_candidates(model)
    assert len(candidates) >= least
    assert len({*candidates}) == len(candidates)
    assert cut_candidates(model, depth=1) == [name for name in candidates if "." not in name]
    x = torch.randn(2, *IMAGE)
    for cut in candidates[:: max(1, len(candidates) // 12)]:
        assert_same_evaluation(model, *split_module(model, cut), x)


def test_candidates_are_those_that_split_module_accepts():
    model = SmallCNN()
    assert cut_candidates(model) == ["norm", "block", "block.0", "block.1", "block.2", "last", "head"]
