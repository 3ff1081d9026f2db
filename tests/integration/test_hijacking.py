"""A server that departs from the protocol sees inputs; clients that look notice, and stay with one that does not."""

import pytest
from audited import digits, setting

from psl_flower.audit.attacks import hijacking as attack
from psl_flower.audit.attacks.hijacking import HijackingServer, hijack
from psl_flower.audit.rehearsal import rehearse
from psl_flower.errors import StepError
from psl_flower.privacy import GradientScrutiny
from psl_flower.split.model import cut_model


def hijacking(of):
    return HijackingServer(cut_model(of.model, of.cut).client, digits("train", 320)[0], seed=0)


def test_it_sees_the_inputs_and_clients_notice(monkeypatch):
    monkeypatch.setattr(attack, "_ROUNDS", 3)
    found = {finding.measure: finding for finding in hijack(setting()).findings}
    assert found["SSIM"].leaks
    assert found["SSIM"].value > found["SSIM"].floor + 0.3
    noticed = found["clients that notice; of an honest server"]
    assert (noticed.value, noticed.floor) == (1.0, 0.0)
    assert not noticed.leaks


@pytest.mark.parametrize("tail", [None, "tail"])
def test_clients_stay_with_an_honest_server(tail):
    run = rehearse(setting(tail=tail, defences=(GradientScrutiny(10, share=0.15),)))
    assert run.accuracy > 0.4


def test_clients_leave_one_that_hijacks():
    of = setting(defences=(GradientScrutiny(10, share=0.15),))
    with pytest.raises(StepError, match="do not follow the labels"):
        rehearse(of, hijacking(of))
