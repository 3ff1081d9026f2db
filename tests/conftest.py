"""Settings of all tests."""

import gc
import os
import signal
import sys
import time
from importlib.metadata import version

import pytest
from hypothesis import HealthCheck, settings
from leftovers import pytest_configure  # noqa: F401 (a hook)
from packaging.version import Version

# How long an example takes says more of the machine than of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Several processes, each with as many torch threads as there are cores, take five times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# Files, and tests of other files, that share what takes long to make: pytest-xdist runs them in one process, all others
# one by one.
TOGETHER = {
    "test_chaos_flower.py": "simulation",
    "test_exactness_simulation.py": "simulation",
    "test_shutdown_flower.py": "simulation",
    "test_flwr_run_trains_on_the_simulation_as_in_one_process": "simulation",
    "test_deployment.py": "deployment",
    "test_bad_replies.py": "bad replies",
    "test_audit.py": "audit",  # two trainings
    "test_transformers.py": "transformers",  # the import of transformers
    "test_cut_exported.py": "transformers",
    "test_the_app_of_steps_with_lora_sends_the_bytes_of_splitlora": "transformers",
    "test_run_folder.py": "forked",  # processes that are forked from one, see warm.py
    "test_the_same_over_streams_of_several_processes": "forked",
    "test_clients_scale_their_gradients_down_as_the_server_would": "forked",
    "test_a_client_whose_process_is_killed_is_back_in_the_next_round": "forked",
    "test_stream_failures.py": "forked",
    "test_sweep.py": "forked",
    "test_sweep_runner.py": "forked",
}


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell's background jobs; what tests start inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Return how many processes ``-n auto`` means: one a core, and one that waits for Flower, which all do for long.

    A container's quota is what counts, and each needs memory.
    """
    from psl_flower.threads import available_cores

    return min(available_cores() + 1, 4)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Return what hands tests to processes; pytest-xdist's own "loadgroup" does nothing with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, *_, test = nodeid.split("::")
            return TOGETHER.get(file.split("/")[-1]) or TOGETHER.get(test.split("[")[0], nodeid)

    return Together(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Keep what is imported from the garbage collector, which would go through millions of objects again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup(item):
    """Skip what the installed torch cannot do, and what would start later than the environment allows.

    Slow tests run as far as somebody's time goes.
    """
    for mark in item.iter_markers("torch"):
        if Version(version("torch")) < Version(mark.args[0]):
            pytest.skip(f"needs torch {mark.args[0]}")
    until = os.environ.get("PSL_TESTS_UNTIL")  # seconds since 1970
    if until and time.time() > float(until):
        pytest.skip("no time is left")


@pytest.fixture(autouse=True)
def _no_pictures(request):
    """Have runs draw no curves, which takes longer than many of them, but where a test looks at these."""
    if "curves" in request.keywords or "psl_flower.strategy" not in sys.modules:
        yield
        return
    from psl_flower.strategy import recorder

    with pytest.MonkeyPatch.context() as patch:  # not that of the test, which may undo its own
        patch.setattr(recorder, "save_curves", lambda path, steps, rounds: None)
        yield


@pytest.fixture(scope="session")
def superlink(tmp_path_factory):
    """Return a SuperLink in simulation mode that is everybody's; see TOGETHER."""
    from flower_runs import prepared  # imports torch, which reads the variable above

    from psl_flower.app.local import LocalSuperLink

    folder = tmp_path_factory.mktemp("superlink")
    with prepared(LocalSuperLink(folder / "home", folder)) as link:
        yield link
