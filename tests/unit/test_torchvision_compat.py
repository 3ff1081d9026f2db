"""torchvision is imported even where its compiled operators do not fit torch, and only then tampered with."""

import subprocess
import sys

import pytest

from psl_flower.torchvision_compat import import_torchvision

SYMPTOM = 'raise RuntimeError("operator torchvision::nms does not exist")'


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a make-believe torchvision first on the path; the argument is what its registrations do."""

    def make(registrations, package="from torchvision import extension, _meta_registrations, models\n"):
        folder = tmp_path / "torchvision"
        folder.mkdir()
        (folder / "__init__.py").write_text(package)
        (folder / "extension.py").write_text("")
        (folder / "models.py").write_text("")
        (folder / "_meta_registrations.py").write_text(f"loaded = True\n{registrations}\n")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


def test_a_fitting_torchvision_is_left_alone(fake):
    fake("")
    package = import_torchvision()
    assert package._meta_registrations.loaded
    assert import_torchvision() is package


def test_missing_operators_are_stepped_over(fake):
    fake(SYMPTOM)
    package = import_torchvision()
    assert sys.modules["torchvision.models"] is package.models
    assert not hasattr(sys.modules["torchvision._meta_registrations"], "loaded")
    assert import_torchvision() is package


@pytest.mark.parametrize(
    ("registrations", "error"),
    [('raise RuntimeError("CUDA driver too old")', RuntimeError), ("import no_such_module_at_all", ImportError)],
)
def test_other_failures_are_passed_on(fake, registrations, error):
    fake(registrations)
    with pytest.raises(error, match=r"too old|no_such_module_at_all"):
        import_torchvision()
    assert "torchvision._meta_registrations" not in sys.modules


def test_importing_it_is_enough_for_the_installed_torchvision_and_nothing_else_imports_that():
    program = """
import sys, psl_flower.split, psl_flower.app.task
assert "torchvision" not in sys.modules
import psl_flower.torchvision_compat
from torchvision.models import resnet18
from torchvision.transforms import RandomCrop
resnet18()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
