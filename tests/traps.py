"""A client process that kills itself in the middle of a step, at a step of the server's choice."""

import contextlib
import os
import signal

import torch


class Deadly:
    """A dataset; the first process to read a batch while the file `trap` is there takes it away, and dies."""

    def __init__(self, data, trap):
        self.data, self.trap = data, trap

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]

    def get_batch(self, indices):
        with contextlib.suppress(FileNotFoundError):  # no trap, or another process was faster
            self.trap.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.data[torch.from_numpy(indices)]


class Trapped(torch.optim.SGD):
    """Sets the trap after some steps: the next forward exchange is the one it goes off in."""

    def __init__(self, parameters, trap, at):
        super().__init__(parameters, lr=0.02, momentum=0.9)
        self.trap, self.left = trap, list(at)
        self.done = 0

    def step(self, closure=None):
        super().step(closure)
        self.done += 1
        if self.left and self.done == self.left[0]:
            self.left.pop(0)
            self.trap.touch()
