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
    num_clients = len(list(grid.get_node_ids()))
    trap = str(context.run_config["trap"])
    some = str(context.run_config["cases"])
    transport = str(context.run_config["transport"])
    cases = {name: case for name, case in support.exactness_cases(num_clients, transport).items() if some in name}
    faults, kind = FaultPolicy(), Trapped
    if context.run_config["freeze"]:
        faults, kind = FaultPolicy(step_timeout=2.0, min_batch_fraction=0.0), Freezing
    if trap:  # in this one, a process dies or stops while it works on the 8th step
        name = "UniformGlobalSampler-sgd-64"
        cases = {name: replace(cases[name], optimizer=lambda p: kind(p, Path(trap), at=[7]))}
    for name, case in cases.items():
        model = support.tiny_resnet(case.dtype)
        strategy = ParallelSplitLearning(
            model,
            cut=support.CUT,
            sampler=case.sampler,
            optimizer=case.optimizer,
            delays=case.delays,
            min_available_nodes=num_clients,
            transport=transport,
            faults=faults,
            output_dir=Path(trap).parent if trap else None,
        )
        result = strategy.start(
            grid,
            ArrayRecord(model.state_dict()),
            num_rounds=1,
            train_config=ConfigRecord({"dtype": str(case.dtype).removeprefix("torch.")}),
        )
        folder = Path(str(context.run_config["results"]))
        folder.mkdir(parents=True, exist_ok=True)
        weights = {key: value.contiguous() for key, value in result.arrays.to_torch_state_dict().items()}
        save_file(weights, folder / f"{num_clients}-{name}.safetensors")
