"""Import this, and ``import torchvision`` works, also next to a CPU-only torch: the one place that knows about it.

::

    import psl_flower.torchvision_compat  # isort: skip
    from torchvision.models import resnet18

It comes before the process's first import of torchvision: the comment keeps tools that sort imports from moving it.

The package index's torchvision is built against CUDA torch. Beside a CPU-only torch its compiled operators do not load,
and ``import torchvision`` stops at ``torchvision._meta_registrations``, which describes those operators::

    RuntimeError: operator torchvision::nms does not exist

Models, datasets and transforms are pure Python and need none of them. With an empty module standing in for
``torchvision._meta_registrations`` the import succeeds; only the compiled operators (nms, roi_align, ...) stay absent.
"""

import importlib
import sys
from types import ModuleType

_PACKAGE = "torchvision"
_STAND_IN = "torchvision._meta_registrations"
_SYMPTOM = "operator torchvision::nms does not exist"


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators do not fit the installed torch.

    Importing this module has called it. Afterwards plain imports of torchvision and its submodules work as usual.
    Nothing is touched unless the plain import fails in exactly the way described above.

    Returns
    -------
    module
        The ``torchvision`` package.

    Raises
    ------
    Exception
        Whatever the plain import raises for any other reason.
    """
    try:
        return importlib.import_module(_PACKAGE)
    except RuntimeError as error:
        if _SYMPTOM not in str(error):
            raise
    for name in [name for name in sys.modules if name == _PACKAGE or name.startswith(_PACKAGE + ".")]:
        del sys.modules[name]  # what the failed import left half done
    sys.modules[_STAND_IN] = ModuleType(_STAND_IN, "Stand-in: the operators it would describe did not load.")
    return importlib.import_module(_PACKAGE)


import_torchvision()
