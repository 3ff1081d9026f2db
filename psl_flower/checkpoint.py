"""Checkpoints: one file each, written atomically, read without running anything that is in it.

A checkpoint is a tree of dicts, lists, tuples, numbers, strings, arrays and tensors. The tensors make a safetensors
file; the rest of the tree, and the format's version, is JSON in that file's metadata. No pickle.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from psl_flower.errors import ConfigError
from psl_flower.files import written

log = logging.getLogger("flwr.psl_flower")

VERSION = 5  # of the format: how a tree is written, and what a run puts into it; another one is refused
FOLDER = "checkpoints"
_NAME = re.compile(r"round-(\d+)-step-(\d+)\.safetensors")
_TREE = "psl_flower"  # the metadata's key


class VersionError(ConfigError):
    """A checkpoint is in another version of the format."""


def write(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a checkpoint so that it is there as a whole or not at all, even if the machine stops.

    Raises
    ------
    ConfigError
        If the tree holds something that is neither data nor a tensor.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps({**_encode_items(tree, "", tensors), "version": VERSION})
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as unfinished:
        save_file(tensors, unfinished, metadata={_TREE: text})
        _flush(unfinished)
    _flush(path.parent)


def write_state(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a state dict as safetensors, and what is said of it."""
    # tensors that share memory, or are not contiguous, cannot be written as they are
    copies = {name: t.detach().cpu().clone().contiguous() for name, t in state.items()}
    with written(path) as unfinished:
        save_file(copies, unfinished, metadata)


def check(tree: Mapping[str, Any]) -> None:
    """Raise ConfigError if a checkpoint cannot hold this."""
    _encode_items(tree, "", {})


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote.

    Raises
    ------
    ConfigError
        If it is not there, or no checkpoint, or damaged; `VersionError` if it is in another version of the format.
    """
    if not path.is_file():
        inside = [*path.glob("round-*.safetensors"), *path.glob(f"{FOLDER}/round-*.safetensors")]
        remedy = f"one in that folder is {max(inside)}" if inside else "pass 'latest', or the path of one"
        raise ConfigError(f"resume_from: there is no checkpoint {path}: {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            if _TREE not in (metadata := file.metadata() or {}):
                raise ConfigError(
                    f"resume_from: {path} is no checkpoint, it holds tensors only: pass those of a model as "
                    "initial_arrays, or the path of a file in a run's folder of checkpoints"
                )
            tree = json.loads(metadata[_TREE])
            version = tree.pop("version")
            if version != VERSION:
                raise VersionError(
                    f"{path} is a checkpoint in version {version} of the format, this psl_flower reads version "
                    f"{VERSION}: resume with the psl_flower that wrote it, or start anew without resume_from"
                )
            # Copied into memory of torch's own: what is read lies as the file has it, aligned to fewer bytes, and some
            # processors then add in another order, so that a resumed run would differ in the last bit.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        found: dict[str, Any] = _decode(tree, tensors)
    except ConfigError:
        raise
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OSError) as exc:
        raise ConfigError(f"{path} is no checkpoint, or damaged: {type(exc).__name__}: {exc}") from exc
    return found


def dumps(tree: Mapping[str, Any]) -> tuple[str, bytes]:
    """Return a tree as text and tensors, to be kept elsewhere than in a file."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode_items(tree, "", tensors))
    return text, save(tensors)


def loads(text: str, tensors: bytes) -> dict[str, Any]:
    """Return what `dumps` was given."""
    found: dict[str, Any] = _decode(json.loads(text), {name: t.clone() for name, t in load(tensors).items()})
    return found


class Checkpoints:
    """The checkpoints of a run in a folder, of which the last few are kept.

    Parameters
    ----------
    folder : path
        Made with the first checkpoint.
    keep : int
        How many, at least 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def save(self, server_round: int, step: int, tree: Mapping[str, Any]) -> Path:
        """Write a checkpoint; return where it is."""
        path = self.folder / f"round-{server_round:05}-step-{step:07}.safetensors"
        write(path, tree)
        for old in [*self.all()[: -self._keep], *self.folder.glob("*.unfinished")]:
            old.unlink()
        return path

    def all(self) -> list[Path]:
        """Return the checkpoints, the oldest first."""
        found = [(match, path) for path in self.folder.glob("*") if (match := _NAME.fullmatch(path.name))]
        return [path for match, path in sorted(found, key=lambda item: tuple(map(int, item[0].groups())))]

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the last one that can be read, and where it is; None if there is none at all.

        Raises
        ------
        ConfigError
            If there are some and none can be read, or one is in another version of the format.
        """
        found = self.all()
        for path in reversed(found):
            try:
                return path, read(path)
            except VersionError:
                raise
            except ConfigError as error:
                log.warning("%s; going on to the one before", error)
        if found:
            raise ConfigError(
                f"resume_from: none of the {len(found)} checkpoints in {self.folder} can be read: give the path of "
                "another one, or start anew without resume_from"
            )
        return None

    def keep_aside(self, resumed: Path) -> None:
        """Move checkpoints that a run which goes on from `resumed` would mix with its own to a folder beside.

        They are those written after it, of another branch of the run; all, if it lies in another folder.
        """
        mine, others = self.all(), self.all()
        here = [i for i, path in enumerate(mine) if path.samefile(resumed)]
        if here:
            others = mine[here[0] + 1 :]
        if not others:
            return
        aside = new_folder(self.folder.with_suffix(".aside"))
        for path in reversed(others):  # were this interrupted, what is left would be the nearest to `resumed`
            os.replace(path, aside / path.name)
        names = ", ".join(path.name for path in others)
        log.warning("Going on from %s: the checkpoints of another branch are kept in %s: %s", resumed, aside, names)


def new_folder(path: Path) -> Path:
    """Make a folder that was not there, with a number behind its name if need be; return which."""
    for number in itertools.count(1):
        chosen = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            chosen.mkdir(parents=True)
        except FileExistsError:
            continue
        return chosen
    raise AssertionError  # numbers do not end


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Values that JSON has not are lists whose first item tells what they are; so a list begins with its kind, too.
def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        tensors[path] = torch.tensor(value)
        return ["array", path]
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return ["tensor", path]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, *(_encode(v, f"{path}/{i}", tensors) for i, v in enumerate(value))]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return _encode_items(value, path, tensors)
        items = ([_encode(key, path, tensors), _encode(v, f"{path}/{key}", tensors)] for key, v in value.items())
        return ["dict", *items]
    raise ConfigError(
        f"a checkpoint holds numbers, strings and tensors only, {path.lstrip('/')!r} is a {type(value).__name__}: "
        "choose another optimizer or scheduler, or keep_checkpoints=0 for none"
    )


def _encode_items(values: Mapping[str, Any], path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {key: _encode(v, f"{path}/{key}", tensors) for key, v in values.items()}


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _decode(v, tensors) for key, v in value.items()}
    if not isinstance(value, list):
        return value
    kind, *items = value
    if kind == "tensor":
        return tensors[items[0]]
    if kind == "array":
        return tensors[items[0]].numpy()
    if kind == "dict":
        return {_decode(key, tensors): _decode(v, tensors) for key, v in items}
    if kind not in ("list", "tuple"):
        raise ValueError(f"unknown kind {kind!r:.40}")
    decoded = [_decode(v, tensors) for v in items]
    return decoded if kind == "list" else tuple(decoded)
