"""The server: one training for each case, all in one run; the weights go to the folder `results`."""

from dataclasses import replace
from pathlib import Path

import support
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import ServerApp
from safetensors.torch import save_file
from traps import Freezing, Trapped

from psl_flower import FaultPolicy, ParallelSplitLearning

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    results = Path(str(config["results"]))
    num_clients = len(list(grid.get_node_ids()))
    for transport, some in (word.split("/") for word in str(config["trainings"]).split()):
        for name, case in support.exactness_cases(num_clients, transport).items():
            if some in name:
                train(grid, case, num_clients, transport, results / transport / name)
    name = "UniformGlobalSampler-sgd-64"
    for end in str(config["traps"]).split():  # a process dies or stops while it works on the 8th step
        folder, case = results / end, support.exactness_cases(num_clients)[name]
        kind, trap = {"die": Trapped, "freeze": Freezing}[end], folder / "trap"
        case = replace(case, optimizer=lambda p, kind=kind, trap=trap: kind(p, trap, at=[7]))
        options = {"output_dir": folder}
        if end == "freeze":
            options["faults"] = FaultPolicy(step_timeout=10.0, min_batch_fraction=0.0)
        folder.mkdir(parents=True)
        train(grid, case, num_clients, "streams", folder / name, {"trap": str(trap), "end": end}, **options)


def train(grid, case, num_clients, transport, file, train_config=None, **options):
    model = support.tiny_resnet(case.dtype)
    strategy = ParallelSplitLearning(
        model,
        cut=support.CUT,
        sampler=case.sampler,
        optimizer=case.optimizer,
        delays=case.delays,
        min_available_nodes=num_clients,
        transport=transport,
        **options,
    )
    train_config = {"dtype": str(case.dtype).removeprefix("torch."), "trap": "", **(train_config or {})}
    arrays = ArrayRecord(model.state_dict())
    result = strategy.start(grid, arrays, num_rounds=1, train_config=ConfigRecord(train_config))
    weights = {key: value.contiguous() for key, value in result.arrays.to_torch_state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file.with_suffix(".safetensors"))
