"""The server: it trains a base model on public digits, then what is above the cut on the clients' hidden states."""

import psl_flower.torchvision_compat  # noqa: F401 # isort: skip  (transformers' models import torchvision)
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from peft import PeftModel

from psl_flower import ParallelSplitLearning, UniformGlobalSampler
from psl_flower.threads import set_threads
from vit_finetune.digits import public_data, test_data
from vit_finetune.model import CUT, make_base, pretrain, with_adapters

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Make a base model, fine-tune it over the clients, and load the adapters again."""
    config = context.run_config
    set_threads()  # clients of a simulation compute on the same cores
    torch.manual_seed(0)
    base = make_base()
    pretrain(base, *public_data())
    base_weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = with_adapters(base)
    images, digits = test_data()

    def accuracy(model: torch.nn.Module) -> float:
        with torch.no_grad():
            predicted = model.eval()(pixel_values=images).logits.argmax(1)
        return float((predicted == digits).float().mean())

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict(), strict=False)
        return MetricRecord({"accuracy": accuracy(model)})

    result = ParallelSplitLearning(
        model,
        cut=CUT,
        state="trainable",
        sampler=UniformGlobalSampler(batch_size=config["batch-size"]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=config["learning-rate"]),
        min_available_nodes=2,
        evaluate_every=0,
        output_dir="outputs",
    ).start(
        grid,
        ArrayRecord({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}),
        num_rounds=config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
    model.load_state_dict(result.arrays.to_torch_state_dict(), strict=False)
    model.save_pretrained("outputs/adapters")
    fresh = make_base()
    fresh.load_state_dict(base_weights)
    print(f"Accuracy on all ten digits: {accuracy(fresh):.2f} with the base model, {accuracy(model):.2f} fine-tuned,")
    print(f"  {accuracy(PeftModel.from_pretrained(fresh, 'outputs/adapters')):.2f} once peft has loaded the adapters.")
