"""Takes a centralised step of LoRA after every split one, and says what each cost."""

from beside import app_of
from flwr.app import ArrayRecord

from lora.task import BATCH, CUT, LOSS, adapters, make_model, optimizer
from psl_flower import UniformGlobalSampler


def settings(config, num_clients):
    """Return what is trained, and beside what; see `beside.measure`."""
    model = make_model(config["width"], config["layers"])
    return {
        "model": model,
        "cut": CUT,
        "state": "trainable",
        "sampler": UniformGlobalSampler(BATCH),
        "optimizer": optimizer,
        "arrays": ArrayRecord(adapters(model)),
        "central": ("lora.task", config["width"], config["layers"]),
        **LOSS,
    }


app = app_of(settings)
