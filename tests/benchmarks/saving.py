"""What round files cost: rounds that save the server's state and five clients' Adam state, against rounds that do not.

A Llama of 15 million parameters with random weights, LoRA r=64 on all linear layers (2.1 million parameters), the
demo's texts. The runs alternate: A B A B ...
"""

import argparse
import csv
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import common

KEPT = ["train.keep_optimizer=true", "run.keep=2"]
ADAPTER = ["model.adapter.r=64", "model.adapter.alpha=64"]


def without_files(words):
    """Run gdmpi as it is, only that no round file and no client's file is written."""
    from gdmpi import checkpoint
    from gdmpi.__main__ import main

    checkpoint.write = lambda directory, state: None
    checkpoint.write_client = lambda directory, client, t, arrays: ""
    return main(["run", *words])


def model(directory):
    """Save a Llama of 15 million parameters with random weights and the demo's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gdmpi.model import DEMO

    config = LlamaConfig(
        vocab_size=32000, hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    for path in (DEMO / "model").glob("*token*"):
        shutil.copy(path, directory)
    return directory


def rounds(program, words, count, steps):
    """Seconds of each round of a run, the first two left out: nothing is on its way to the disk yet in the first."""
    directory, place = common.fresh("saving")
    size = [f"run.rounds={count + 2}", f"train.steps={steps}", "run.eval_every=1000"]
    common.finish(common.start(program, [*words, *KEPT, *ADAPTER, *size, *place, "data.validation=0", "data.test=0"]))
    with (directory / "saving" / "metrics.csv").open(encoding="utf-8") as file:
        found = [float(line["seconds_total"]) for line in csv.DictReader(file)][3:]
    shutil.rmtree(directory)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="of each, alternating (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="timed in a run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="of a client in a round (default: %(default)s)")
    args = parser.parse_args()
    sys.path.insert(0, str(common.ROOT))
    programs = {"with round files": ["-m", "gdmpi", "run"], "without": [__file__, "without"]}
    taken = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as place:
        words = [f"model.name={model(Path(place))}"]
        for _ in range(args.runs):
            for name, program in programs.items():
                taken[name] += rounds(program, words, args.rounds, args.steps)
    print(common.head("rounds", "number", "seconds"))
    for name, seconds in taken.items():
        print(common.row(name, len(seconds), common.spread(seconds, "{:.2f}")))
    more = statistics.median(taken["with round files"]) / statistics.median(taken["without"]) - 1
    print(f"\nround files make a round {100 * more:+.1f} % longer (medians)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["without"]:
        sys.exit(without_files(sys.argv[2:]))
    main()
