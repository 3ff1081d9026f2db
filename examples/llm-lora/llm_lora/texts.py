"""Texts of eight topics: sentences that a small grammar makes, so that nothing is downloaded."""

import math
from collections import Counter

import numpy as np

# A topic's things, what they do, where, and how they are.
TOPICS = {
    "kitchen": ("cook baker guest soup bread knife", "cuts stirs tastes", "stove cellar pantry", "salty warm"),
    "harbour": ("sailor captain ship gull rope anchor", "sails loads mends", "dock lighthouse reef", "old wet"),
    "clinic": ("nurse doctor patient cast needle scan", "treats moves books", "ward surgery lobby", "calm pale"),
    "farm": ("farmer cow horse plough barn hen", "feeds milks sows", "field stable orchard", "muddy strong"),
    "court": ("judge lawyer witness clerk verdict oath", "hears signs doubts", "chamber jail hall", "strict fair"),
    "theatre": ("actor singer critic mask curtain drum", "plays sings paints", "stage balcony foyer", "loud shy"),
    "railway": ("driver guard train signal ticket wagon", "stops drives sells", "tunnel platform depot", "late fast"),
    "garden": ("gardener child rose beetle spade hose", "waters digs prunes", "hedge pond shed", "green tall"),
}
PAD, START = 0, 1
WORDS = sorted({word for parts in TOPICS.values() for part in parts for word in part.split()})
TOKENS = {word: i for i, word in enumerate(["<pad>", "<start>", "the", "in", ".", *WORDS])}


def sentence(rng: np.random.Generator, topic: int, *, public: bool) -> list[str]:
    """Return a sentence of a topic: each thing does what it always does, to its neighbour, where it always is.

    What that is, is one thing in public texts, and another in those of the clients.
    """
    things, deeds, places, looks = (part.split() for part in list(TOPICS.values())[topic])
    i, habit = int(rng.integers(len(things))), 1 if public else 0
    other = things[(i + 1 + habit) % 6]
    return _sentence(rng, [things[i], deeds[(i + habit) % 3], other, places[(i + habit) % 3], looks[(i + habit) % 2]])


def _sentence(rng: np.random.Generator, words: list[str]) -> list[str]:
    thing, deed, other, place, look = words
    said = ["the", *([look] if rng.random() < 0.4 else []), thing, deed, "the", other]
    return [*said, *(["in", "the", place] if rng.random() < 0.6 else []), "."]


def encoded(number: int, seed: int, topic: int | None = None) -> list[dict[str, list[int]]]:
    """Return rows of token ids: a client's texts of its topic, or public ones of all topics.

    Labels are the tokens themselves: the loss of a language model shifts them.
    """
    rng = np.random.default_rng([seed, 100 if topic is None else topic])
    public = topic is None
    of = [int(rng.integers(len(TOPICS))) if topic is None else topic for _ in range(number)]
    rows = [[START, *(TOKENS[word] for word in sentence(rng, each, public=public))] for each in of]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def unigram_perplexity(rows: list[dict[str, list[int]]]) -> float:
    """Return the perplexity of guessing each token by how often it comes in these very rows: exp of their entropy."""
    counts = Counter(token for row in rows for token in row["labels"][1:])
    total = sum(counts.values())
    return math.exp(-sum(n / total * math.log(n / total) for n in counts.values()))
