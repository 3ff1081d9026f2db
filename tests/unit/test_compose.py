"""The containers of examples/deployment are given the commands of its README, which are tested without containers."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "deployment"
SERVICES = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))["services"]


def options(text):
    """Return the options of a command, by name."""
    _, *words = shlex.split(text)
    return dict(zip(words[::2], words[1::2], strict=True))


def by_hand(what):
    """Return the options of each such command in the README."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    return [options(command) for command in re.findall(rf"^ *(flower-{what} .*)$", text, re.MULTILINE)]


def test_the_superlink_is_the_readmes_but_can_be_reached():
    (told,) = by_hand("superlink")
    paths = {name: f"certificates/{told[name]}" for name in ("--ssl-ca-certfile", "--ssl-certfile", "--ssl-keyfile")}
    assert SERVICES["superlink"]["command"].startswith("flower-superlink ")
    assert options(SERVICES["superlink"]["command"]) == told | paths | {"--host": "0.0.0.0"}
    assert told["--port"] in SERVICES["superlink"]["healthcheck"]["test"][-1]
    assert SERVICES["superlink"]["ports"] == [f"127.0.0.1:{told['--port']}:{told['--port']}"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_supernode_is_the_readmes_with_the_superlinks_name(number):
    told = by_hand("supernode")[number]
    named = {"--superlink": "superlink:9093", "--root-certificates": "certificates/ca.crt", "--port": "9096"}
    assert SERVICES[f"supernode-{number}"]["command"].startswith("flower-supernode ")
    assert options(SERVICES[f"supernode-{number}"]["command"]) == told | named


def test_all_are_the_one_image_whose_user_may_read_the_key_that_is_for_the_superlinks_name():
    for service in SERVICES.values():
        assert service["build"] == SERVICES["superlink"]["build"]
        assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).samefile(FOLDER / "Dockerfile")
        assert service["image"] == "psl-flower-deployment"
    made = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    for words in re.findall(r"^COPY (.*) \S+$", made, re.MULTILINE):
        assert all((ROOT / word).exists() for word in words.split())
    guide = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (user,) = re.findall(r"useradd --uid (\d+) ", made)
    assert f"sudo chown -R {user}:{user} certificates " in guide
    assert "psl_flower.app.certificates superlink 127.0.0.1 --folder certificates\n" in guide
