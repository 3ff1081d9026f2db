"""A run that ends where it is, as one that is killed: what it leaves is resumed from."""

from psl_flower.server import LocalBackend


class Killed(BaseException):
    """Ends a run as a signal would: nothing handles it."""


def dying_after(commits):
    """Return a kind of LocalBackend that ends the run at the commit after so many."""

    class Dies(LocalBackend):
        left = commits

        def commit(self, gradients):
            Dies.left -= 1
            if Dies.left < 0:
                raise Killed
            super().commit(gradients)

    return Dies
