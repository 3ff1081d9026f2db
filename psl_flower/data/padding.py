"""Texts of several lengths as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from psl_flower import tree
from psl_flower.checks import check_int
from psl_flower.data.batch import Batch
from psl_flower.data.rows import LABEL_NAMES
from psl_flower.errors import ConfigError

IGNORED = -100  # a label that does not count, as in torch's cross_entropy


class PadTexts:
    """A ``collate_fn`` for texts of several lengths: each batch is padded at the end, to its longest.

    Rows are dicts; what is a list of whole numbers or a (length,) tensor is text, all else is collated as ever. Each
    is padded with what is right for it: labels with -100, which losses of torch ignore, all other columns with 0, but
    for the tokens. An ``attention_mask`` is added to rows that have none. Clients of one process run at once with it,
    whatever the lengths of their batches.

    Parameters
    ----------
    pad_token_id : int
        For ``input_ids``: the tokenizer's ``pad_token_id``.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = check_int(pad_token_id, "pad_token_id", least=0)

    def fill(self, name: str) -> int:
        """Return what a column is padded with."""
        return self.pad_token_id if name == "input_ids" else IGNORED if name in LABEL_NAMES else 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return rows as a batch.

        Raises
        ------
        ConfigError
            If a row is no dict, or has other columns than the first.
        """
        names = list(rows[0]) if isinstance(rows[0], Mapping) else []
        if not names or any(not isinstance(row, Mapping) or row.keys() != rows[0].keys() for row in rows):
            raise ConfigError(f"PadTexts needs rows that are dicts of the same names, got {names or rows[0]!r:.80}")
        batch: dict[str, Any] = {}
        for name in names:
            values = [row[name] for row in rows]
            batch[name] = self._padded(name, values) if _is_text(values[0]) else default_collate(values)
        if "input_ids" in batch and "attention_mask" not in batch:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        return batch

    def _padded(self, name: str, values: Sequence[Any]) -> Tensor:
        texts = [torch.as_tensor(value).long() for value in values]
        return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.fill(name))


def join_batches(batches: Sequence[Batch], padding: PadTexts | None) -> Batch:
    """Return batches as one, those of texts padded to the longest where it is known what with.

    Raises
    ------
    ConfigError
        If they do not fit together.
    """
    inputs, target = ([getattr(batch, name) for batch in batches] for name in ("inputs", "target"))
    size = sum(batch.size for batch in batches)
    if padding is None or not all(isinstance(each, dict) and each.keys() == inputs[0].keys() for each in inputs):
        return Batch(tree.join(inputs, "inputs"), tree.join(target, "target"), size)
    joined = {
        name: tree.join([each[name] for each in inputs], f"inputs[{name!r}]", fill=padding.fill(name))
        for name in inputs[0]
    }
    return Batch(joined, tree.join(target, "target", fill=IGNORED), size)


def _is_text(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 1 and not value.is_floating_point()
    return isinstance(value, list | tuple) and all(isinstance(number, int) for number in value)
