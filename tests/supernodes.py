"""A deployment whose SuperNodes can be killed and started again, and frozen for a while."""

import os
import signal
import subprocess
import threading

from psl_flower.app.deployment import LocalDeployment


class FragileDeployment(LocalDeployment):
    """A deployment to be disturbed; a node is named by its partition."""

    def restart(self, node):
        """Kill a SuperNode and its ClientApp, and start it again: Flower knows it by another id from then on."""
        old = self.supernodes[node]
        os.killpg(old.pid, signal.SIGCONT)
        os.killpg(old.pid, signal.SIGKILL)
        old.wait()
        with (self.home / f"supernode-{node}.log").open("ab") as log:
            self.supernodes[node] = subprocess.Popen(
                old.args,
                cwd=self._folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def freeze(self, node, seconds):
        """Stop a SuperNode and its ClientApp for some seconds."""
        group = self.supernodes[node].pid
        os.killpg(group, signal.SIGSTOP)
        timer = threading.Timer(seconds, self._thaw, [group])
        timer.daemon = True
        timer.start()

    def _thaw(self, group):
        if any(each.pid == group and each.poll() is None for each in self.supernodes):
            os.killpg(group, signal.SIGCONT)
