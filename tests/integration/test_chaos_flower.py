"""Chaos in the Ray simulation and in a deployment: every example is used once an epoch, and faults are counted."""

import json
from collections import defaultdict

import pytest
from flower_runs import TESTS, prepared
from support import client_sizes

from psl_flower.app.deployment import LocalDeployment

# slow: that an actor dies in the simulation is in test_exactness_simulation, chaos in one process in test_faults
pytestmark = [pytest.mark.flower, pytest.mark.slow]
K = 6


@pytest.mark.parametrize(("transport", "deaths"), [("messages", 0), ("streams", 1)])
def test_nothing_is_lost_and_nothing_used_twice(superlink, transport, deaths, tmp_path):
    output = superlink.run(
        TESTS / "apps" / "chaos",
        num_supernodes=K,
        run_config=[f"results='{tmp_path}' transport='{transport}' deaths={deaths}"],
        quiet=True,
    )
    assert ("is gone" in output) == bool(deaths)
    assert_nothing_lost(tmp_path, K)


def test_nothing_is_lost_in_a_deployment_whose_clientapps_die(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    with prepared(LocalDeployment(tmp_path / "home", 2, tmp_path)) as deployment:
        config = [f"results='{results}' transport='streams' deaths=2 share=0.1"]
        output = deployment.run(TESTS / "apps" / "chaos", run_config=config, quiet=True)
    assert output.count("The process of 1 clients is gone") == 2
    assert_nothing_lost(results, 2, others=2)  # a client that dies may miss its exchange, and fail to attach at once


def assert_nothing_lost(folder, num_clients, others=0):
    poisoned = len(list((folder / "poisoned").iterdir()))
    assert poisoned > 3
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["refused"].pop("not finite") == poisoned
    assert sum(summary["refused"].values()) <= 2 * others
    assert summary["examples_unseen"] == {}
    assert_used_once(folder, num_clients)


def assert_used_once(folder, num_clients):
    """Assert that committed steps used every example of every client once an epoch."""
    used = defaultdict(list)
    for client, epoch, *rest in json.loads((folder / "committed.json").read_text()):
        name = "-".join(map(str, (client, epoch, *rest)))
        used[epoch, client] += json.loads((folder / "drawn" / name).read_text())
    for epoch in range(3):
        for client, size in enumerate(client_sizes(num_clients)):
            assert sorted(used[epoch, client]) == list(range(size))
