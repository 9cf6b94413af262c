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


def rounds(program, words, count, steps):
    """(seconds, seconds outside training and evaluation) of each round of a run but the first two, which start up."""
    directory, place = common.fresh("saving")
    size = [f"run.rounds={count + 2}", f"train.steps={steps}", "run.eval_every=1000"]
    common.finish(common.start(program, [*words, *KEPT, *ADAPTER, *size, *place, "data.validation=0", "data.test=0"]))
    with (directory / "saving" / "metrics.csv").open(encoding="utf-8") as file:
        parts = [
            [float(line[f"seconds_{part}"]) for part in ("total", "train", "eval")] for line in csv.DictReader(file)
        ]
    shutil.rmtree(directory)
    return [(total, total - train - rest) for total, train, rest in parts[3:]]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2, help="of each, alternating (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="timed in a run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="of a client in a round (default: %(default)s)")
    args = parser.parse_args()
    programs = {"with round files": ["-m", "gdmpi", "run"], "without": [__file__, "without"]}
    taken = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as place:
        words = [f"model.name={common.llama(Path(place))}"]
        for _ in range(args.runs):
            for name, program in programs.items():
                taken[name] += rounds(program, words, args.rounds, args.steps)
    print(common.head("rounds", "number", "seconds", "of which outside training and evaluation"))
    for name, seconds in taken.items():
        print(common.row(name, len(seconds), *(common.spread(each, "{:.2f}") for each in zip(*seconds, strict=True))))
    (total, outside), (bare, bare_outside) = (
        [statistics.median(each) for each in zip(*seconds, strict=True)] for seconds in taken.values()
    )
    print(f"\nround files make a round {100 * (total / bare - 1):+.1f} % longer (medians)")
    print(f"what is added outside training is {100 * (outside - bare_outside) / bare:.2f} % of a round")


if __name__ == "__main__":
    if sys.argv[1:2] == ["without"]:
        sys.exit(without_files(sys.argv[2:]))
    main()
