"""A copy of a user's function computes the same, and what a call changes is the copy's own."""

import functools
import threading

import torch

from psl_flower.server.apart import apart

COUNT = 0
SEEN = []


def counting(x):
    global COUNT
    COUNT += 1
    return helping(x)


def helping(x):
    SEEN.append(x)
    return x + len(SEEN)


def noting(x):
    noting.calls += 1
    return x + noting.calls


noting.calls = 0


class Object:
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x + self.calls

    def method(self, x):
        return self(x)


def closing():
    calls, weights, thing = 0, torch.ones(1), Object()

    def function(x, more=(), *, seen=SEEN):
        nonlocal calls
        calls += 1
        weights.add_(1)
        seen.append(x)
        return float(x + calls + weights + thing(x) + len(more)) + (function(x - 1) if x > 1 else 0)

    return function


def test_what_a_copy_changes_is_its_own():
    makes = lambda: counting, lambda: noting, Object, lambda: Object().method, closing
    for make in (*makes, lambda: functools.partial(closing(), 3)):
        function = make()
        asked = apart(function)
        args = () if isinstance(function, functools.partial) else (3,)
        answers = [asked(*args) for _ in range(3)]
        assert len(set(answers)) == 3
        assert (COUNT, SEEN) == (0, [])
        assert [function(*args) for _ in range(3)] == answers
        globals().update(COUNT=0)
        SEEN.clear()


def test_what_is_torchs_stays_it_and_what_cannot_be_copied_is_not_asked():
    cross_entropy, lock = torch.nn.functional.cross_entropy, threading.Lock()
    assert apart(cross_entropy) is cross_entropy
    assert apart(lambda: cross_entropy)() is cross_entropy
    assert apart(lambda: lock) is None


TEACHER = torch.nn.BatchNorm1d(1)  # in training mode: a call moves its buffers
SCALE, NAMES = 2.0, ("a", "b")


class Distilling(torch.nn.Module):
    def forward(self, x):
        return TEACHER(x).mean()


class Derived(Distilling):
    pass


class Helped(Object):
    def __call__(self, x):
        return helping(x)


class Holding(Object):
    def __init__(self, held):
        self.held = held


class Constant(Object):
    def __call__(self, x):
        return super().__call__(x) * SCALE + len(NAMES) + float(torch.nn.functional.relu(torch.tensor(x)))


class Teaching:
    """Has decorated methods."""

    @torch.no_grad()
    def teach(self, x):
        return TEACHER(x).mean()

    def __call__(self, x):
        return self.teach(x)


@torch.no_grad()
def taught(x):
    SEEN.append(x)
    return TEACHER(x).mean()


class Stepping(Distilling):
    def forward(self, x):
        return super().forward(x)


class Told(Distilling):
    def __init_subclass__(cls):
        SEEN.append(cls)


class Counting:
    """Changes what is global, in all kinds of methods."""

    @property
    def count(self):
        global COUNT
        COUNT += 1
        return COUNT

    @staticmethod
    def see(x):
        SEEN.append(x)

    @classmethod
    def move(cls, x):
        return TEACHER(x).mean()

    def __call__(self, x):
        self.see(x)
        return self.move(x) + self.count


def test_methods_of_a_copied_object_find_copies_of_what_a_call_changes():
    shared, made, x = TEACHER, Distilling(), torch.ones(3, 1)
    for reaching in (
        Distilling(),
        Derived(),
        Distilling().forward,
        Counting(),
        Teaching(),
        taught,
        lambda x: taught(x),
        Helped(),
        Holding(Distilling()).held,
        functools.partial(Distilling()),
        lambda x, inner=made: inner(x),
        lambda x: TEACHER(x).mean(),
        lambda x: shared(x).mean(),
    ):
        asked = apart(reaching)
        assert isinstance(asked, type(reaching))
        asked(x)
        assert (TEACHER.num_batches_tracked, COUNT, SEEN) == (0, 0, [])
    assert apart(Constant())(1) == Constant()(1)
    assert apart(Holding(TEACHER)).held is not TEACHER


def test_an_object_that_shares_what_changes_something_is_not_asked():
    shared = TEACHER
    for reaching in (Stepping(), Holding(lambda x: shared(x)), Holding((Distilling().forward,)), Told()):
        assert apart(reaching) is None
    assert SEEN == []
