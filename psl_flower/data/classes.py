"""Which number a dataset gives to each class, where it says so by name.

Numbers that follow from what a folder happens to hold are others where a class is missing, and nothing in a batch shows
it. `difference` finds what cannot be right, `doubt` what may be: a class may have another name elsewhere.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from psl_flower.data.rows import INPUT, label_name
from psl_flower.data.telling import tell_once
from psl_flower.errors import ConfigError

MAX_NAMED = 256  # classes that are told of; of more, those with the smallest digests, which are the same everywhere
DIGEST = 12  # characters of the digest of a name

REMEDY = (
    "number all classes on each client, also those that it lacks: ImageFolder(..., allow_empty=True) with an empty "
    "folder for such a class, or a target_transform; of Hugging Face, ClassLabel(names=[...]) with the names of all"
)
UNSURE = f"If labels do not mean the same everywhere, {REMEDY}"


@dataclass(frozen=True)
class ClassNumbers:
    """What data say of their classes.

    Parameters
    ----------
    numbers : dict of str to int
        By name, or by digest of the name.
    sure : bool
        Whether labels are surely these numbers: no code of one's own can give them others on the way.
    """

    numbers: Mapping[str, int]
    sure: bool = True

    def digests(self) -> ClassNumbers:
        """Return them by digests of the names, of at most `MAX_NAMED` classes."""
        found = sorted((hashlib.sha256(name.encode()).hexdigest()[:DIGEST], n) for name, n in self.numbers.items())
        return ClassNumbers(dict(found[:MAX_NAMED]), self.sure)


def class_numbers(dataset: Any, target: str, *, sure: bool = True) -> list[ClassNumbers]:
    """Return what a dataset, or each dataset that it is made of, says of its classes; empty where it says nothing.

    A ``target_transform`` gives other numbers than the dataset has, so nothing is said with one.

    Parameters
    ----------
    dataset : map-style dataset
    target : str
        See `Examples`.
    sure : bool
        Whether labels stay what the dataset gives.
    """
    if target == INPUT:
        return []
    try:
        return [found for found in _told(dataset, target, sure) if found.numbers]
    except Exception:  # whatever an attribute of somebody's class does: then nothing is known
        return []


def difference(mine: Mapping[str, int], theirs: Mapping[str, int]) -> str | None:
    """Return a class that has another number on the other side, or None."""
    return next((name for name, number in mine.items() if theirs.get(name, number) != number), None)


def doubt(mine: Mapping[str, int], theirs: Mapping[str, int]) -> int | None:
    """Return a number whose class has another name on the other side, or None."""
    ours, yours = _names(mine), _names(theirs)
    return next((number for number in ours if number in yours and not ours[number] & yours[number]), None)


def agreed(told: Iterable[tuple[str, ClassNumbers]]) -> ClassNumbers | None:
    """Return what all the data of one client say together; of what is sure and what is not, the former.

    Parameters
    ----------
    told : iterable of (str, ClassNumbers)
        With the name of the data.

    Raises
    ------
    ConfigError
        If a class surely has two numbers.
    """
    told = sorted(told, key=lambda pair: not pair[1].sure)
    seen: dict[str, int] = {}
    where: dict[str, str] = {}
    for data, each in told:
        numbers = each.numbers
        if (name := difference(numbers, seen)) is not None:
            text = f"class {name!r:.80} is {numbers[name]} in the {data}, {seen[name]} in the {where[name]}"
            if each.sure:
                raise ConfigError(f"a class must have one number in all of a client's data: {text}; {REMEDY}")
            tell_once(f"{text}. {UNSURE}")
        elif (number := doubt(numbers, seen)) is not None:
            here, there = (next(name for name, n in side.items() if n == number) for side in (numbers, seen))
            tell_once(f"class {number} is {here!r:.80} in the {data}, {there!r:.80} in the {where[there]}. {UNSURE}")
        seen = {**numbers, **seen}
        where = dict.fromkeys(numbers, data) | where
    if not told:
        return None
    best = [each for _, each in told if each.sure == told[0][1].sure]
    return ClassNumbers(most_common(each.numbers for each in best), best[0].sure)


def most_common(told: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the number that each class has most often; of several, that which comes first."""
    votes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for numbers in told:
        for name, number in numbers.items():
            votes[name][number] += 1
    return {name: counted.most_common(1)[0][0] for name, counted in votes.items()}


def _names(numbers: Mapping[str, int]) -> dict[int, set[str]]:
    names: defaultdict[int, set[str]] = defaultdict(set)
    for name, number in numbers.items():
        names[number].add(name)
    return names


# --- what datasets say -----------------------------------------------------------------------------------------------
def _told(dataset: Any, target: str, sure: bool) -> Iterator[ClassNumbers]:
    if getattr(dataset, "target_transform", None) is not None:
        return
    if isinstance(dataset, Subset):
        yield from _told(dataset.dataset, target, sure and type(dataset) is Subset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _told(part, target, sure and type(dataset) is ConcatDataset)
    elif hasattr(dataset, "features") and hasattr(dataset, "with_format"):  # Hugging Face
        yield ClassNumbers(_of_column(dataset, target), sure and dataset.format["type"] != "custom")
    elif isinstance(numbers := getattr(dataset, "class_to_idx", None), Mapping):
        folder = _is_folder(dataset)
        if not folder or _is_kept_to(numbers, dataset):
            numbers = {name: number for name, number in numbers.items() if type(name) is str and type(number) is int}
            yield ClassNumbers(numbers, sure and folder and _reads_as_torchvision(dataset))
    elif (inner := getattr(dataset, "dataset", None)) is not None:  # a wrapper of one's own
        yield from _told(inner, target, False)


def _of_column(dataset: Any, target: str) -> dict[str, int]:
    """Return the names of the label column's classes; of a list of labels (a tag a word), those of its entries."""
    name = label_name(dataset.column_names, target)
    feature = None if name is None else dataset.features[name]
    while (inner := getattr(feature, "feature", None)) is not None:
        feature = inner
    return {str(each): number for number, each in enumerate(getattr(feature, "names", None) or ())}


def _is_folder(dataset: Any) -> bool:
    """Return whether this is torchvision's `DatasetFolder`, which `ImageFolder` is one of."""
    folder = ("torchvision.datasets.folder", "DatasetFolder")
    return any((cls.__module__, cls.__qualname__) == folder for cls in type(dataset).__mro__)


def _reads_as_torchvision(dataset: Any) -> bool:
    """Return whether items are read by torchvision's own code."""
    reading = next(cls for cls in type(dataset).__mro__ if "__getitem__" in vars(cls))
    return reading.__module__.startswith("torchvision.")


def _is_kept_to(numbers: Mapping[str, int], dataset: Any) -> bool:
    """Return whether samples have the numbers of their folders still, and were not numbered anew; one of each tells."""
    firsts = {number: path for path, number in reversed(dataset.samples)}
    return all(numbers.get(Path(path).relative_to(dataset.root).parts[0]) == n for n, path in firsts.items())
