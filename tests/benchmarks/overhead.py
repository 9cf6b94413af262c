"""The share of a round that is neither local training nor evaluation, from metrics.csv of runs with six ranks."""

import argparse
import csv
import shutil
import statistics

import common

PARTS = ("total", "train", "eval", "exchange", "server", "checkpoint")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1, help="of each job; all their rounds count")
    args = parser.parse_args()
    print(common.head("job", "rounds", "outside training and evaluation", *(f"{part}, s" for part in PARTS)))
    for name, words in common.jobs().items():
        rounds = []
        for _ in range(args.runs):
            directory, place = common.fresh("overhead")
            few = ["run.rounds=2"] if words else []
            common.finish(common.start(["-m", "gdmpi"], ["run", *words, *place, *few]))
            with (directory / "overhead" / "metrics.csv").open(encoding="utf-8") as file:
                found = [{part: float(line[f"seconds_{part}"]) for part in PARTS} for line in csv.DictReader(file)]
            rounds += found[1:]  # before them only the untrained model was evaluated
            shutil.rmtree(directory)
        shares = [(each["total"] - each["train"] - each["eval"]) / each["total"] for each in rounds]
        medians = [f"{statistics.median(each[part] for each in rounds):.3f}" for part in PARTS]
        share = common.spread([100 * share for share in shares], "{:.2f}")
        print(common.row(name, len(rounds), f"{share} %", *medians), flush=True)


if __name__ == "__main__":
    main()
