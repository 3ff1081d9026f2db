"""A member that lies: what is false in its replies."""

from dataclasses import replace

from mayhem.task import CLASSES
from psl_flower import tree
from psl_flower.client.runtime import CannotJoinError
from psl_flower.methods import METHODS
from psl_flower.protocol import Kind, Leaf


def lies_of(method, transport, secure):
    """Return the lies that a method's stages allow, and that can be seen.

    Over streams all clients are in one process here: where it adds up what each gives by itself, only values may lie.
    """
    found = []
    for each in METHODS[method].stages().values():
        kinds = {name: kind for name, kind in each.outputs.items() if name != "score"}
        added_up = transport == "streams" and each.own and set(kinds.values()) == {Kind.SUM}
        if kinds and not added_up:
            found += [(each.name, lie) for lie in ("another name", "another step", "nothing")]
        if Kind.ROWS in kinds.values():
            found += [(each.name, lie) for lie in ("a row too few", "not finite", "far too large", "another dtype")]
        elif kinds and not secure:
            found += [(each.name, lie) for lie in ("not finite", "far too large")]
            found += [] if added_up else [(each.name, "another dtype")]
        if "labels" in kinds:
            found.append((each.name, "labels out of range"))
    return found


def lied(part, lie, rows):
    """Return a part of a reply as a liar has it, whose rows are those."""
    if lie == "another step":
        return replace(part, step=(part.step or 0) + 1)
    name, leaf = next(iter(part.outputs.items()))
    rest = {n: each for n, each in part.outputs.items() if n != name}
    if lie == "nothing":
        return replace(part, outputs=rest)
    if lie == "another name":
        return replace(part, outputs={**rest, "weights": leaf})
    if lie == "labels out of range":
        name, leaf, rest = "labels", part.outputs["labels"], part.outputs
    where = rows if leaf.kind is Kind.ROWS else slice(None)
    changes = {
        "a row too few": lambda t: t[1:],
        "another dtype": lambda t: t.float(),
        "not finite": lambda t: _in(t, where, lambda r: r * float("nan")),
        "far too large": lambda t: _in(t, where, lambda r: r * 1e30),
        "labels out of range": lambda t: _in(t, where, lambda r: r + CLASSES),
    }
    return replace(part, outputs={**part.outputs, name: _changed(leaf, changes[lie])})


def _changed(leaf, change):
    return Leaf(leaf.kind, tree.map_leaves(change, leaf.value), leaf.exact)


def _in(tensor, rows, change):
    tensor = tensor.clone()
    if tensor.ndim:
        tensor[rows] = change(tensor[rows])
    return tensor


def lying(scenario, honest):
    """Return what a process does in place of a stage, where a member lies."""

    def do(work, request, some):
        orders, lies = request.orders, scenario.lies_in(request.stage, request.orders)
        if lies and len(orders) > 1 and scenario.lie[1] == "another dtype":  # one part has one: the liar's is its own
            raise CannotJoinError("a client lies", lasting=False)
        part = honest(work, request, some)
        if not lies:
            return part
        scenario.found[f"lie: {scenario.lie[1]}"] += 1
        at = orders.clients.tolist().index(scenario.liar)
        begin = int(orders.counts[:at].sum())
        return lied(part, scenario.lie[1], slice(begin, begin + int(orders.counts[at])))

    return do
