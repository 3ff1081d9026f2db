"""Train over a deployment of its own, by streams and by messages, and compare.

    python examples/deployment/compare.py [--num-supernodes 2] [--batch-size 512]

Starts a SuperLink and SuperNodes on this machine, with TLS, and stops them at the end. One epoch each: a step takes
milliseconds by streams and ten seconds by messages, so the batches are large.
"""

import argparse
import json
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from psl_flower.app.deployment import LocalDeployment

APP = Path(__file__).parent


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-supernodes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="psl-flower-") as temporary:
        folder = Path(temporary)
        with LocalDeployment(folder / "home", options.num_supernodes, tls=True) as deployment:
            for transport in ("streams", "messages"):
                print(f"--- {transport} ---", flush=True)
                config = f"transport='{transport}' batch-size={options.batch_size} num-server-rounds=1"
                deployment.run(APP, run_config=[f"{config} output-dir='{folder / transport}'"])
        print("\n| transport | steps | seconds a step | accuracy |\n|---|---|---|---|")
        for transport in ("streams", "messages"):
            lines = (folder / transport / "metrics.jsonl").read_text().splitlines()
            (epoch,) = (line for line in map(json.loads, lines) if line["kind"] == "round")
            seconds = epoch["seconds_real"] / epoch["num_steps"]
            accuracy = epoch["evaluate_serverapp"]["accuracy"]
            print(f"| {transport} | {epoch['num_steps']} | {seconds:.3f} | {accuracy:.4f} |")
        one, two = (load_file(folder / transport / "model.safetensors") for transport in ("streams", "messages"))
        difference = max(float((one[name].double() - two[name].double()).abs().max()) for name in one)
        print(f"\nLargest difference between the two models' weights: {difference:.1e}")


if __name__ == "__main__":
    main()
