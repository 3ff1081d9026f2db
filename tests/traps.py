"""A client process that kills or stops itself in the middle of a step, at a step of the server's choice."""

import contextlib
import os
import signal

import torch


class Deadly:
    """A dataset; the first process to read a batch while the file `trap` is there takes it away, and dies.

    Or, with SIGSTOP as its end, it stops; a file next to the trap then holds its process id.
    """

    def __init__(self, data, trap, end=signal.SIGKILL):
        self.data, self.trap, self.end = data, trap, end

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]

    def get_batch(self, indices):
        with contextlib.suppress(FileNotFoundError):  # no trap, or another process was faster
            self.trap.unlink()
            self.trap.with_suffix(".pid").write_text(str(os.getpid()))
            os.kill(os.getpid(), self.end)
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


class Freezing(Trapped):
    """The process that stops in the trap goes on after two more steps, which it takes no part in."""

    since = 0

    def step(self, closure=None):
        super().step(closure)
        stopped = self.trap.with_suffix(".pid")
        if stopped.exists():
            self.since += 1
            if self.since == 2:
                os.kill(int(stopped.read_text()), signal.SIGCONT)
                stopped.rename(self.trap.with_suffix(".went-on"))
