"""What torch.fx cannot trace is cut with torch.export: transformers, and what of them crosses."""

import copy
import pickle
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformer_models import TOKENS, bert, gpt2, lora_llama, texts, vit

from psl_flower.errors import CutError
from psl_flower.split import Cut, cut_candidates, cut_model, find_mixing, input_names, split_module

pytestmark = pytest.mark.torch("2.10")


def leaves(tensors):
    return [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]


def gradients_through(parts, batch):
    """Return the output of the parts in turn, and all their parameters' gradients, none of which crosses unseen."""
    parts = [part.train() for part in parts]
    torch.manual_seed(0)
    sent, kept = parts[0](**batch) if len(parts) == 3 else (parts[0](**batch), ())
    received, at_tail = leaves(sent), leaves(kept)
    if len(parts) == 3:
        back = parts[1](*received)
        arrived = leaves(back)
        output = parts[2](*arrived, *at_tail)
        score(output).backward()
        go_back([*back, *kept], [*arrived, *at_tail])
        go_back(sent, received, keep=bool(kept))
    else:
        output = parts[1](*received)
        score(output).backward()
        go_back(sent, received)
    found = {}
    for part in parts:
        for name, parameter in part.named_parameters(remove_duplicate=False):
            found[name] = parameter.grad
    return output, found


def go_back(sent, received, keep=False):
    pairs = [(s, r.grad) for s, r in zip(sent, received, strict=True) if r.grad is not None and s.requires_grad]
    torch.autograd.backward([s for s, _ in pairs], [gradient for _, gradient in pairs], retain_graph=keep)


def score(output):
    return output.logits.square().sum()


CASES = [
    (gpt2, "transformer.h.1", "lm_head", [(3, 7), (3, 7, 16)]),
    pytest.param(bert, "bert.encoder.layer.1", None, [(3, 7), (3, 7, 16)], marks=pytest.mark.slow),
    (vit, "vit.layers.1", None, [(3, 5, 16)]),
]


@pytest.mark.parametrize(("make", "cut", "tail", "shapes"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_parts_are_the_whole_model(make, cut, tail, shapes):
    model = make().double()
    parts = split_module(model, cut, tail) if tail else split_module(model, cut)
    for mode in (True, False):
        for part in (model, *parts):
            part.train(mode)
        for rows, length in ((3, 7), (1, 4), (6, 2)):
            batch = inputs(make, rows, length)
            torch.manual_seed(0)
            expected = model(**batch)
            torch.manual_seed(0)
            sent, kept = parts[0](**batch) if tail else (parts[0](**batch), ())
            output = parts[2](*parts[1](*sent), *kept) if tail else parts[1](*sent)
            assert type(output) is type(expected)
            assert torch.equal(output.logits, expected.logits)
    assert parts[1].takes == (() if make is vit else (True, True))
    assert parts[0].gives == parts[1].takes
    assert parts[1].longest == (None if make is vit else 32)
    batch = inputs(make, 3, 7)
    sent = parts[0](**batch)
    assert [tuple(tensor.shape) for tensor in (sent[0] if tail else sent)] == shapes
    model.train()
    output, found = gradients_through(parts, batch)
    torch.manual_seed(0)
    score(model(**batch)).backward()
    reference = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}
    assert found.keys() <= reference.keys()
    left_out = reference.keys() - found.keys()
    assert all(reference[name] is None for name in left_out)
    for name, gradient in found.items():
        assert torch.allclose(gradient, reference[name], rtol=1e-9, atol=1e-12), name


def inputs(make, rows, length):
    if make is vit:
        return {"pixel_values": torch.randn(rows, 3, 8, 8, dtype=torch.float64)}
    return texts(rows, length)


@pytest.mark.slow
def test_adapters_with_dropout_train_as_in_the_whole_model():
    model = lora_llama()
    halves = cut_model(model, "base_model.model.model.layers.1", "base_model.model.model.norm")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    trainable = [{n for n, p in part.named_parameters() if p.requires_grad} for part in halves.parts]
    assert set.union(*trainable) == names
    assert [len(some) for some in trainable] == [4, 4, 0]
    batch = texts(3, 7)
    _, found = gradients_through(pickle.loads(pickle.dumps(halves.parts)), batch)
    model.train()
    torch.manual_seed(0)
    score(model(**batch)).backward()
    for name, parameter in model.named_parameters():
        assert (found[name] is None) == (parameter.grad is None) == (name not in names)
        if name in names:
            assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-6), name


# --- code of one's own -----------------------------------------------------------------------------------------------
class Base(nn.Module):
    """What torch.fx refuses: something computed without gradient beside the way that is cut."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]), persistent=False)
        self.seen = None

    def forward(self, x, shift=None):
        if x.dim() > 2:  # which torch.fx cannot record
            x = x.flatten(1)
        with torch.no_grad():
            size = x.abs().mean(1, keepdim=True)
        if shift is not None:
            x = x + shift
        mask = torch.zeros(x.shape[0], 4)
        mask[:, 1:] = 1.0
        h = torch.nn.functional.dropout(self.inner(self.a(x)), 0.5, self.training)
        return {"y": self.c(self.norm(self.b(h * self.scale * mask)) * mask + size)}

    def inner(self, h):
        return h


EXAMPLE = {"x": torch.randn(3, 4), "shift": torch.randn(3, 4)}


def test_code_of_ones_own():
    model = Base()
    halves = cut_model(model, Cut("b", example=EXAMPLE))
    assert input_names(halves.client) == ("x", "shift")
    halves = copy.deepcopy(halves)
    batch = {"x": torch.randn(5, 4), "shift": torch.randn(5, 4)}
    for mode in (True, True, False):  # the second time, batch norm must have seen the first
        for part in (model, *halves.parts):
            part.train(mode)
        torch.manual_seed(1)
        expected = model(**batch)
        torch.manual_seed(1)
        assert torch.equal(halves.server(*halves.client(**batch))["y"], expected["y"])
    client = halves.client.train()
    assert find_mixing(lambda inputs: client(**inputs), batch, module=client) is None  # its dropout is known as such
    assert torch.equal(halves.server.get_buffer("norm.running_mean"), model.norm.running_mean)
    assert list(halves.merge(model.state_dict())) == list(model.state_dict())
    with pytest.raises(CutError, match="'shift' is None or left out, but the model was cut with it"):
        halves.client(batch["x"])


class Asking(Base):
    def inner(self, h):
        plain = type(h) is torch.Tensor and type(self.a.weight) is nn.Parameter
        return h * (2 if plain and not torch.compiler.is_compiling() else 3)


def test_code_that_asks_whether_it_is_recorded_is_told_that_it_is_run():
    model = Asking().eval()
    halves = cut_model(model, Cut("b", example=EXAMPLE))
    for part in halves.parts:
        part.eval()
    assert torch.equal(halves.server(*halves.client(**EXAMPLE))["y"], model(**EXAMPLE)["y"])


def test_without_an_argument_the_example_leaves_out():
    halves = cut_model(Base(), Cut("b", example={"x": EXAMPLE["x"]}))
    with pytest.raises(CutError, match=r"'shift' was given, but the model was cut without it: put it into the example"):
        halves.client(**EXAMPLE)


class Entries(Base):
    """Takes its batch as one dict, of which another module takes all entries."""

    def __init__(self):
        super().__init__()
        self.embed, self.pool = nn.Embedding(TOKENS, 4), nn.Linear(4, 2)

    def forward(self, batch: dict):
        return self.read(**batch)

    def read(self, input_ids, attention_mask):
        if input_ids.dim() > 2:  # which torch.fx cannot record
            input_ids = input_ids.flatten(1)
        with torch.no_grad():
            mask = attention_mask.float()[..., None]
        return self.pool(self.b(self.embed(input_ids)).mul(mask).sum(1) / mask.sum(1))


def test_a_batch_that_is_one_dict(monkeypatch):
    names = ("attention_mask", "input_ids")
    model, batch = Entries(), texts(4, 6)
    halves = cut_model(model, Cut("b", example={name: texts(3, 5)[name] for name in names}))
    crossing = halves.client(batch)
    assert [tuple(tensor.shape) for tensor in crossing] == [(4, 6), (4, 6, 4)]
    assert torch.equal(crossing[0], batch["attention_mask"])
    assert halves.server.takes == (True, True)
    assert torch.equal(halves.server(*crossing), model(batch))
    with pytest.raises(CutError, match="'batch' must be a tensor, got a dict: put its entries into the example"):
        cut_model(model, Cut("b", example={"batch": batch}))
    monkeypatch.setattr(Entries.forward, "__annotations__", {})
    with pytest.raises(CutError, match="if 'batch' is the row's whole dict, annotate it, batch: dict"):
        cut_model(model, Cut("b", example=batch))


class Outputs(nn.Module):
    """Returns what is no tensor, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return SimpleNamespace(last=self.layer(x), states=None)


class Passing(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.head = Outputs(), nn.Linear(4, 2)

    def forward(self, x):
        outputs = self.base(x)
        return {"logits": self.head(outputs.last), "states": outputs.states}


def test_what_is_no_tensor_cannot_cross_but_what_is_in_it_can():
    model, x = Passing(), torch.randn(5, 4)
    with pytest.raises(CutError, match=r"'base.states' is a NoneType: cut elsewhere, give the cut an example batch"):
        cut_model(model, "head").client(x)
    halves = cut_model(model, Cut("head", example={"x": torch.randn(2, 4)}))
    assert torch.equal(halves.server(*halves.client(x))["logits"], model(x)["logits"])


class Biased(nn.Module):
    """T5's way: a bias is computed of the positions, in place, and its layers may share it."""

    def __init__(self, shared):
        super().__init__()
        self.shared, self.embed, self.bias = shared, nn.Embedding(9, 3), nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)

    def forward(self, input_ids):
        length = input_ids.shape[1]
        if length < 2:  # which torch.fx cannot record
            length = 2
        places = torch.zeros(length, dtype=torch.long)
        places += torch.arange(length).clamp(max=4)
        bias = self.bias(places)[None]
        h = self.body(self.embed(input_ids) + bias)
        return h + bias if self.shared else h * torch.arange(length)[None, :, None]


def test_what_all_examples_share_cannot_cross():
    ids = torch.randint(0, 9, (3, 5))
    with pytest.raises(CutError, match=r"would cross, but its first dimension is not the batch, its shape is \(1, s"):
        cut_model(Biased(shared=True), Cut("body", example={"input_ids": ids}))


def test_a_length_that_a_tensor_changed_in_place_has_is_no_secret():
    model, ids = Biased(shared=False), torch.randint(0, 9, (4, 7))
    halves = cut_model(model, Cut("body", example={"input_ids": ids[:3, :5]}))
    assert torch.equal(halves.server(*halves.client(ids)), model(ids))


class Scanning(nn.Module):
    """Mamba's way: position by position."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.out = nn.Embedding(9, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, input_ids):
        h, state = self.embed(input_ids), 0.0
        for i in range(input_ids.shape[1]):
            state = 0.5 * state + h[:, i]
        return self.out(self.body(state))


def test_a_length_that_is_a_constant_of_the_code_must_be_kept():
    """In a longer text the rest would be overlooked without a word."""
    model, ids = Scanning(), torch.randint(0, 9, (5, 7))
    halves = cut_model(model, Cut("body", example={"input_ids": ids[:2, :6]}))
    assert torch.equal(halves.server(*halves.client(ids[:, :6])), model(ids[:, :6]))
    with pytest.raises(CutError, match=r"'input_ids' has shape \(5, 7\), but the model was cut for \(any, 6\)"):
        halves.client(ids)


class Windowed(Scanning):
    def forward(self, input_ids):
        if input_ids.shape[1] > 4:
            input_ids = input_ids[:, -4:]
        h = self.embed(input_ids)
        if input_ids.sum().dim():  # which torch.fx cannot record
            h = h + 1
        return self.body(h)


def test_a_length_by_which_the_code_decides_is_looked_at():
    model, ids = Windowed(), torch.randint(0, 9, (5, 8))
    halves = cut_model(model, Cut("body", example={"input_ids": ids[:2, :6]}))
    halves = copy.deepcopy(halves)
    for length in (5, 7):
        assert torch.equal(halves.server(*halves.client(ids[:, :length])), model(ids[:, :length]))
    with pytest.raises(CutError, match=r"it was so that .*input_ids.shape\[1\]"):
        halves.client(ids[:, :3])


class Lifted(nn.Module):
    """DeBERTa's way: a module within makes a constant of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = Halved(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.inner(x))


class Halved(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            scale = torch.sqrt(torch.tensor(x.size(-1), dtype=torch.float))
        return self.second(self.first(x) / scale)


@torch.library.custom_op("psl_flower_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


doubled.register_fake(torch.empty_like)
doubled.register_autograd(lambda ctx, gradient: gradient * 2)


class Named(Base):
    """An operator with a name keeps its backward, as those do that mixtures of experts call."""

    def inner(self, h):
        return doubled(h)


@pytest.mark.parametrize(("make", "cut"), [(Lifted, "inner.second"), (Named, "b")])
def test_constants_of_modules_within_and_operators_with_a_name(make, cut):
    model, x = make().eval(), torch.randn(5, 4)
    batch = {"x": x} if make is Lifted else {"x": x, "shift": torch.randn(5, 4)}
    halves = cut_model(model, Cut(cut, example=batch))
    expected = model(**batch)
    expected = expected if make is Lifted else expected["y"]
    output = halves.server(*halves.client(**batch))
    output = output if make is Lifted else output["y"]
    assert torch.equal(output, expected)
    expected.sum().backward()
    output.sum().backward()
    for part in halves.parts:
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter.grad, model.get_parameter(name).grad), name


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


reverse = Reverse.apply


class Reversed(Base):
    def inner(self, h):
        return reverse(h)


class Remembering(Base):
    def inner(self, h):
        h = h if self.seen is None else h + self.seen.mean()
        self.seen = h.detach()
        return h


class Caching(Base):
    """Keeps keys and values as transformers do, in a list, where its configuration asks for it."""

    def __init__(self):
        super().__init__()
        self.config, self.past = SimpleNamespace(use_cache=True), []

    def inner(self, h):
        if not self.config.use_cache:
            return h
        self.past.append(h.detach())
        return h + torch.cat(self.past).mean()


class CachingAlways(Caching):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(use_cache="always")


class Deciding(Base):
    def inner(self, h):
        return h * 2 if h.sum() > 0 else h


class OneSize(Base):
    def inner(self, h):
        return h.view(3, 4)


class ByRows(Base):
    def inner(self, h):
        return h * 2 if h.numel() > 16 else h


class ByOneRow(Base):
    def inner(self, h):
        return h * 2 if h.size(0) == 1 else h


class Drawing(Base):
    def inner(self, h):
        return h * random.random()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (ByRows, r"decides by the number of rows \(.*x.shape\[0\].*\)"),
        (ByOneRow, r"decides by the number of rows \(x.shape\[0\] != 1\)"),
        (Drawing, "draws random numbers in Python, and torch.export would record one draw"),
        (Reversed, r"its backward would be lost: .*Reverse\)"),
        (Remembering, r"forward changes 'seen'.*keeps a state between calls"),
        (CachingAlways, r"assigned during export.*keeps a state between calls"),
        (Deciding, "depends on the values of tensors"),
        (OneSize, r"Constraints violated"),
    ],
)
def test_what_torch_export_cannot_see_is_told(model, said):
    before = dict(vars(model := model()))
    with pytest.raises(CutError, match=said) as told:
        split_module(model, Cut("b", example=EXAMPLE))
    assert "cut by hand: SplitModel(client=..., server=...)" in str(told.value)
    assert vars(model) == before


def test_a_cache_of_keys_and_values_is_switched_off():
    """In the parts; the model, which may generate with it, is left as it was."""
    model = Caching()
    halves = cut_model(model, Cut("b", example=EXAMPLE)).parts
    assert (model.config.use_cache, model.past) == (True, [])
    model.config.use_cache = False
    for part in (model, *halves):
        part.eval()
    for _ in range(2):
        assert torch.equal(halves[1](*halves[0](**EXAMPLE))["y"], model(**EXAMPLE)["y"])


def test_no_example():
    with pytest.raises(CutError, match=r"control flow.* Or let torch.export record it: it needs an example batch"):
        split_module(Base(), "b")
    with pytest.raises(CutError, match=r"'x' must have at least two rows"):
        split_module(Base(), Cut("b", example={"x": torch.randn(1, 4)}))
    with pytest.raises(CutError, match=r"takes no 'z': the example's names must be those of its arguments"):
        split_module(Base(), Cut("b", example={"x": torch.randn(3, 4), "z": torch.randn(3, 4)}))


class Reuses(nn.Module):
    """Token ids that are needed behind the cut, too."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, input_ids):
        h = self.body(self.embed(input_ids))
        return self.out(h.masked_fill(input_ids.eq(0)[..., None], 0.0))


def test_raw_inputs_cross_only_if_told():
    model, ids = Reuses(), torch.randint(0, 9, (2, 5))
    with pytest.raises(CutError, match=r"'input_ids' is used after the cut.*Cut\(name, share=\('input_ids',\)\)"):
        split_module(model, "body")
    client, server = split_module(model, Cut("body", share=("input_ids",)))
    assert server.takes == ()  # torch.fx knows no lengths
    assert torch.equal(server(*client(ids)), model(ids))


@pytest.mark.slow
def test_tied_weights_over_a_cut():
    with pytest.raises(CutError, match=r"needed on the client and on the server.*by naming a tail") as told:
        split_module(gpt2(), "transformer.h.1")
    assert "GPT2LMHeadModel can be cut at" not in str(told.value)


@pytest.mark.slow
def test_names_that_can_be_cut_at():
    names = cut_candidates(bert())
    assert "bert.encoder.layer.1" in names
    assert "bert.encoder.layer.1.attention.output" in names
    assert "bert.embeddings.word_embeddings" not in names


def test_a_torch_that_cannot_do_it_is_told(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(CutError, match=r"needs torch 2\.10 or later, this is 2\.9\.1"):
        split_module(Remembering(), Cut("b", example=EXAMPLE))


def test_a_module_of_torch_jit_would_lose_gradients():
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.ReLU(), nn.Softplus())), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    split_module(model, Cut("2", example={"input": x}))  # torch.fx calls it whole

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            return self.layers[2](self.layers[1](self.layers[0](x if x.dim() == 2 else x.flatten(1))))

    with pytest.raises(CutError, match=r"'layers.1' is a module of torch.jit.*: use the nn.Module that it was made of"):
        split_module(Branching(), Cut("layers.2", example={"x": x}))
