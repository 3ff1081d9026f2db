"""Takes a centralised step after every split one, so that both see the same machine, and says what each cost."""

from beside import app_of
from flwr.app import ArrayRecord

from cost.task import BATCH, CUT, model_fn, num_examples, optimizer
from psl_flower import UniformGlobalSampler


def settings(config, num_clients):
    """Return what is trained, and beside what; see `beside.measure`."""
    model = model_fn()
    return {
        "model": model,
        "cut": CUT,
        "sampler": UniformGlobalSampler(BATCH),
        "optimizer": optimizer,
        "arrays": ArrayRecord(model.state_dict()),
        "central": ("cost.task", num_examples(config["steps"], num_clients)),
    }


app = app_of(settings)
