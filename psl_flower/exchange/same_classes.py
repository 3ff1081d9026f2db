"""Whether clients give their classes the same numbers: what most say counts, and first what members say."""

from __future__ import annotations

from collections.abc import Mapping

from psl_flower.data.classes import REMEDY, UNSURE, ClassNumbers, difference, doubt, most_common

Told = Mapping[str, ClassNumbers]  # by who tells it


def numbered_otherwise(new: Told, members: Told) -> dict[str, str]:
    """Return which of the new ones surely give a class another number, and what to say of each."""
    fresh, settled = ({who: t.numbers for who, t in told.items() if t.sure} for told in (new, members))
    right = most_common(fresh.values()) | most_common(settled.values())
    refused = {}
    for who, numbers in fresh.items():
        if (name := difference(numbers, right)) is not None:
            others = {o: told for o, told in (settled | fresh).items() if told.get(name) == right[name]}
            first, theirs = next(iter(others.items()))
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            refused[who] = (
                f"a class must have the same number on all clients: one that is {numbers[name]} here, of "
                f"{len(numbers)} classes, is {right[name]} on {first}{more}, of {len(theirs)}: {REMEDY}"
            )
    return refused


def maybe_otherwise(new: Told, members: Told) -> str | None:
    """Say what makes it uncertain that all mean the same by a number; None if nothing does.

    Parameters are those of `numbered_otherwise`, without those it has found.
    """
    seen: dict[str, int] = {}
    whose: dict[str, str] = {}
    for who, told in (*members.items(), *new.items()):
        if (name := difference(told.numbers, seen)) is not None:
            what = f"a class that is {told.numbers[name]} on {who} is {seen[name]} on {whose[name]}"
        elif (number := doubt(told.numbers, seen)) is not None:
            other = next(whose[name] for name, n in seen.items() if n == number)
            what = f"class {number} has another name on {who} than on {other}"
        else:
            seen |= told.numbers
            whose = dict.fromkeys(told.numbers, who) | whose
            continue
        return f"{what}, as their data name them. {UNSURE}"
    return None
