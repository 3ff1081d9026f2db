"""The client half at work, in pure torch: a forward pass, and the backward pass through its graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from psl_flower.errors import ConfigError
from psl_flower.protocol import Weights

# What a client's own code calls to run the client half on a batch: takes the inputs, returns the activations.
Half = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Graph:
    """A forward pass that can be differentiated.

    Parameters
    ----------
    activations : tuple of Tensor
        What crosses the cut, attached to the graph.
    labels : Tensor
        Of the same batch.
    parameters : dict of str to Tensor
        The leaves to return gradients for.
    """

    activations: tuple[Tensor, ...]
    labels: Tensor
    parameters: Mapping[str, Tensor]

    def num_bytes(self) -> int:
        """Return the bytes of the activations: a lower bound of what the graph holds."""
        return sum(t.numel() * t.element_size() for t in self.activations)

    def backward(self, cut_gradients: Sequence[Tensor | None]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Back-propagate the gradients of the activations.

        Parameters
        ----------
        cut_gradients : sequence of Tensor or None
            One for each activation tensor, of its shape; None for those that are not differentiable. Missing trailing
            ones are None.

        Returns
        -------
        gradients : dict of str to Tensor
            On the CPU.
        unused : tuple of str
            Parameters that took no part in the forward pass.
        """
        given = [*cut_gradients, *[None] * (len(self.activations) - len(cut_gradients))]
        if len(given) > len(self.activations):
            raise ConfigError(f"{len(self.activations)} tensors crossed the cut, got {len(given)} gradients")
        outputs, gradients = [], []
        for i, (activation, gradient) in enumerate(zip(self.activations, given, strict=True)):
            if gradient is None or not activation.requires_grad:
                continue
            if gradient.shape != activation.shape or gradient.dtype != activation.dtype:
                raise ConfigError(
                    f"gradient {i} must be {activation.dtype} {tuple(activation.shape)}, "
                    f"got {gradient.dtype} {tuple(gradient.shape)}"
                )
            outputs.append(activation)
            gradients.append(gradient.to(activation.device))
        names = list(self.parameters)
        if not outputs:
            return {}, tuple(names)
        found = torch.autograd.grad(outputs, list(self.parameters.values()), gradients, allow_unused=True)
        used = {name: g.cpu() for name, g in zip(names, found, strict=True) if g is not None}
        return used, tuple(name for name in names if name not in used)


class Worker:
    """Runs the client half with weights that came from the server; keeps none of them.

    Parameters
    ----------
    half : nn.Module
        Returns a tuple of tensors. Its own weights are never read.
    device : torch.device
        Where it runs.
    """

    def __init__(self, half: nn.Module, device: torch.device) -> None:
        self.device = device
        self._half = half.to(device)
        self._buffers = {name for name, _ in half.named_buffers()}
        self._shapes = {name: t.shape for name, t in (*half.named_parameters(), *half.named_buffers())}

    @contextmanager
    def bound(self, weights: Weights, *, training: bool) -> Iterator[tuple[Half, dict[str, Tensor]]]:
        """Give the half bound to `weights`, in training or evaluation mode, and the leaves it reads.

        Raises
        ------
        ConfigError
            If the weights are not this half's, or its forward pass changes a buffer or parameter (the change would be
            lost, for clients keep no state).
        """
        parameters = {name: self._leaf(t, training) for name, t in weights.parameters.items()}
        constants = {name: t.to(self.device) for name, t in weights.constants.items()}
        self._check({**parameters, **constants})
        # a buffer may be a view of the immutable bytes it came in: a forward pass that writes must not reach them
        buffers = {name: t.clone() for name, t in constants.items() if name in self._buffers}
        state = {**constants, **parameters, **buffers}
        before = {name: (t, t._version) for name, t in state.items()}

        def half(*inputs: Tensor) -> tuple[Tensor, ...]:
            outputs: Any = functional_call(self._half, state, inputs)
            return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)

        self._half.train(training)
        with torch.set_grad_enabled(training):
            yield half, parameters
        # written to in place, or (functional_call tells by changing `state`) another tensor put in its place
        changed = {name for name, (t, version) in before.items() if state[name] is not t or t._version != version}
        if not training:
            changed -= self._buffers  # evaluation needs no state afterwards
        if changed:
            name = min(changed)
            kind = "buffer" if name in self._buffers else "parameter"
            raise ConfigError(
                f"the client half's forward pass changes its {kind} {name!r}, but clients keep no state between "
                "steps: replace that layer (see replace_batch_norm), or cut the model before it"
            )

    def _leaf(self, tensor: Tensor, training: bool) -> Tensor:
        return tensor.to(self.device).detach().requires_grad_(training)

    def _check(self, given: Mapping[str, Tensor]) -> None:
        rule = "server and client must cut the same model in the same place"
        if different := sorted(given.keys() ^ self._shapes.keys()):
            where = "the server's" if different[0] in given else "the client's"
            raise ConfigError(
                f"{rule}: {len(different)} names of the client half differ, {different[0]!r} is only in {where}"
            )
        for name, shape in self._shapes.items():
            if (other := given[name].shape) != shape:
                raise ConfigError(
                    f"{rule}: shape of {name!r}: the client's is {tuple(shape)}, the server's {tuple(other)}"
                )
