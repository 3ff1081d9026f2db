"""The server: one training for each case, all in one run; the weights go to the folder `results`."""

from pathlib import Path

import support
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import ServerApp
from safetensors.torch import save_file

from psl_flower import ParallelSplitLearning

app = ServerApp()


@app.main()
def main(grid, context):
    num_clients = len(list(grid.get_node_ids()))
    for name, case in support.exactness_cases(num_clients).items():
        model = support.tiny_resnet(case.dtype)
        strategy = ParallelSplitLearning(
            model,
            cut=support.CUT,
            sampler=case.sampler,
            optimizer=case.optimizer,
            min_available_nodes=num_clients,
            transport=str(context.run_config["transport"]),
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
