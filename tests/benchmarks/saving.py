"""What round files cost: rounds that save the server's state and five clients' Adam state, against rounds that do not.

A Llama of 15 million parameters with random weights, LoRA r=64 on all linear layers (2.1 million parameters), the
demo's texts. Rounds with and without files alternate within one run, in blocks.
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
BLOCK = 3  # rounds
PARTS = ("total", "train", "eval")


def alternating(words):
    """Run gdmpi as it is, only that in every other block of rounds no round file and no client's file is written."""
    from gdmpi import checkpoint
    from gdmpi.__main__ import main

    write, write_client = checkpoint.write, checkpoint.write_client
    checkpoint.write = lambda directory, state: with_files(state.round) and write(directory, state)
    checkpoint.write_client = lambda directory, client, t, arrays, over: (
        write_client(directory, client, t, arrays, over) if with_files(t) else ""
    )
    return main(["run", *words])


def with_files(t):
    """Whether a round is one that is saved."""
    return t // BLOCK % 2 == 0


def rounds(words, count, steps):
    """{whether with files: [(seconds, seconds outside training and evaluation)]} of the rounds of one run.

    The first of each block is left out: what is written in the background belongs to the block before.
    """
    directory, place = common.fresh("saving")
    size = [f"run.rounds={count}", f"train.steps={steps}", "run.eval_every=100000"]
    words = [*words, *KEPT, *ADAPTER, *size, *place, "data.validation=0", "data.test=0"]
    common.finish(common.start([__file__, "alternating"], words))
    found = {True: [], False: []}
    with (directory / "saving" / "metrics.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            t, total, train, rest = (float(line[k]) for k in ("round", *(f"seconds_{k}" for k in PARTS)))
            if t >= BLOCK and t % BLOCK:
                found[with_files(int(t))].append((total, total - train - rest))
    shutil.rmtree(directory)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="of the run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="of a client in a round (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = rounds([f"model.name={common.llama(Path(place))}"], args.rounds, args.steps)
    print(common.head("rounds", "number", "seconds", "of which outside training and evaluation"))
    for saved, seconds in found.items():
        name = "with round files" if saved else "without"
        print(common.row(name, len(seconds), *(common.spread(each, "{:.2f}") for each in zip(*seconds, strict=True))))
    (total, outside), (bare, bare_outside) = (
        [statistics.median(each) for each in zip(*found[saved], strict=True)] for saved in (True, False)
    )
    print(f"\nround files make a round {100 * (total / bare - 1):+.1f} % longer (medians)")
    print(f"what is added outside training is {100 * (outside - bare_outside) / bare:.2f} % of a round")


if __name__ == "__main__":
    if sys.argv[1:2] == ["alternating"]:
        sys.exit(alternating(sys.argv[2:]))
    main()
