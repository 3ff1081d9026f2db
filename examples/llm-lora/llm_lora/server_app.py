"""The server: it has the base model, and runs its middle layers on hidden states; texts and labels it never sees."""

import math

import psl_flower.torchvision_compat  # noqa: F401 # isort: skip  (transformers' models import torchvision)
import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from peft import PeftModel

from llm_lora.model import CUT, TAIL, make_base, pretrain, with_adapters
from llm_lora.texts import PAD, TOPICS, encoded, unigram_perplexity
from psl_flower import PadTexts, ParallelSplitLearning, UniformGlobalSampler, causal_lm_loss
from psl_flower.threads import set_threads

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Make a base model, fine-tune its adapters over the clients, and load them again."""
    config = context.run_config
    set_threads()  # clients of a simulation compute on the same cores
    torch.manual_seed(0)
    base = make_base()
    pretrain(base)
    base_weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = with_adapters(base)
    # what the clients have, generated here too, to say at the end what came of it
    tests = [row for topic in range(len(TOPICS)) for row in encoded(30, seed=3, topic=topic)]
    before = perplexity(model, tests)
    adapters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    result = ParallelSplitLearning(
        model,
        cut=CUT,
        tail=TAIL,
        state="trainable",  # only the adapters are given, returned and saved
        sampler=UniformGlobalSampler(batch_size=config["batch-size"]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=config["learning-rate"]),
        min_available_nodes=len(TOPICS),
        output_dir="outputs",
    ).start(grid, ArrayRecord(adapters), num_rounds=config["num-server-rounds"])

    model.load_state_dict(result.arrays.to_torch_state_dict(), strict=False)
    model.save_pretrained("outputs/adapters")
    print(f"Perplexity on the clients' test texts: {unigram_perplexity(tests):.1f} by the frequency of words alone,")
    print(f"  {before:.1f} with the base model, {perplexity(model, tests):.1f} with the adapters.")
    fresh = make_base()
    fresh.load_state_dict(base_weights)
    print(f"  {perplexity(PeftModel.from_pretrained(fresh, 'outputs/adapters'), tests):.1f} once peft has loaded them.")


@torch.no_grad()
def perplexity(model: torch.nn.Module, rows: list[dict[str, list[int]]]) -> float:
    """Return a model's perplexity on texts."""
    batch = PadTexts(PAD)(rows)
    labels = batch.pop("labels")
    return math.exp(causal_lm_loss(model.eval()(**batch), labels).item())
