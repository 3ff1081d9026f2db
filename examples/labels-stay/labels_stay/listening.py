"""A Grid that keeps every byte that comes back from the clients."""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from psl_flower.exchange.records import content_to_frame


class ListeningGrid(Grid):
    """Passes everything on to another grid, and writes what comes back into ``received.bin``; a context manager.

    Parameters
    ----------
    grid : Grid
    folder : str
        For the file.
    """

    own_nodes = True  # a mistake ends the run, as in any simulation: the nodes are this program's

    def __init__(self, grid: Grid, folder: str) -> None:
        self._grid, self.path = grid, Path(folder) / "received.bin"
        self.replies, self.bytes = 0, 0
        self.leaves: dict[tuple[str, str], list[Any]] = {}  # by stage and name: kind, how often, bytes
        self.counts_of_classes = 0
        self.last: dict[int, Any] = {}  # by node: the sum that it sent last, of the tail's gradients

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return what has come back, once it is on the disk."""
        messages = list(self._grid.pull_messages(message_ids))
        for message in messages:
            if not message.has_error():
                self._keep(message)
        return messages

    def _keep(self, message: Message) -> None:
        self.replies += 1
        for record in message.content.array_records.values():
            self.bytes += sum(self._file.write(array.data) for array in record.values())
        frame = content_to_frame(message.content)
        header, buffers = frame.header, [data for (data,) in frame.buffers]
        self.counts_of_classes += sum("counts" in each for each in header.get("descriptions", {}).values())
        at, stage = iter(buffers), message.metadata.message_type
        for part in header.get("parts", []):
            for name, leaf in part["outputs"].items():
                data = b"".join(next(at) for _ in range(_tensors(leaf["tree"])))
                if data:
                    found = self.leaves.setdefault((stage, name), [_kind(leaf), 0, 0])
                    found[1:] = found[1] + 1, found[2] + len(data)
                if (stage, name) == ("train.tail_loss", "tail"):
                    self.last[message.metadata.src_node_id] = np.frombuffer(data, dtype=np.int64)

    def told(self) -> str:
        """Return what was received, in words."""
        lines = [f"What the registry has received, in {self.replies} replies of {self.bytes:,} bytes ({self.path}):"]
        for (stage, name), (kind, count, size) in sorted(self.leaves.items()):
            lines.append(f"  {stage:22} {name:12} {kind:18} {count:5} times {size:10,} bytes")
        labels = sum(count for (_, name), (_, count, _) in self.leaves.items() if "label" in name)
        lines.append(f"  labels: {labels} times; how many there are of each class: {self.counts_of_classes} times")
        lines.append("The last gradients of the last layer in the last step, as each hospital sent them:")
        lines += [_row(numbers) for numbers in self.last.values()]
        lines.append("and their sum (modulo 2^64, in fixed point), in which the masks cancel:")
        return "\n".join([*lines, _row(sum(self.last.values()))])

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    # --- the same as the grid's -------------------------------------------------------------------------------------
    def set_run(self, run: Any) -> None:
        """Set the run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run."""
        return self._grid.run

    def create_message(self, *arguments: Any, **options: Any) -> Message:
        """Create a message."""
        return self._grid.create_message(*arguments, **options)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages."""
        return self._grid.push_messages(messages)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for the replies."""
        return self._grid.send_and_receive(messages, timeout=timeout)


def _kind(leaf: dict[str, Any]) -> str:
    if leaf["kind"] == "rows":
        return "a row an example"
    return "sum, masked" if "present" in leaf["tree"].get("keys", ()) else "sum, as it is"


def _row(numbers: Any) -> str:
    return "  " + " ".join(f"{number:21d}" for number in numbers[-3:].tolist())


def _tensors(tree: Any) -> int:
    """Return how many tensors a description is of: null, a list, keys and values, or a tensor's dtype and shape."""
    if tree is None:
        return 0
    if isinstance(tree, list):
        return sum(map(_tensors, tree))
    return sum(map(_tensors, tree["values"])) if "values" in tree else 1
