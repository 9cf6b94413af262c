"""gdmpi check's estimates of a client rank's memory and of a round's time, against a run of one client.

Time is estimated right before and right after the run: the mean of both, against the median of its rounds. The server
has a core of its own, so that the client has one, too. Without the texts and the model of configs/ beside the project
it is the demo alone; the Llama of 15 million parameters has random weights.
"""

import argparse
import csv
import re
import statistics
import sys
import tempfile
from pathlib import Path

import common
from conftest import SHARED

SCALE = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
TEXTS = SHARED / "data" / "counsel_chat_100k.jsonl"
SENTENCES = ["configs/frameworks/fedllm.yaml"]
ANSWERS = ["configs/counsel-chat.yaml", f"data.name={TEXTS}"]
LARGER = [
    "model.name={llama}",
    f"data.name={TEXTS}",
    "model.adapter.r=64",
    "model.adapter.alpha=128",
    "train.batch_size=8",
]
CASES = {
    "656,000 parameters, sentences of 22 tokens": SENTENCES,
    "the same, answers of up to 512": ANSWERS,
    "the demo's": [],
    "15 million parameters, rows of up to 128": [*LARGER, "data.max_length=128"],
    "the same, of up to 512": [*LARGER, "data.max_length=512"],
    "the same, padded": [*LARGER, "data.max_length=512", "train.packing=false"],
    "the same, layers checkpointed": [*LARGER, "data.max_length=512", "train.checkpointing=true"],
}


def gdmpi(ranks, command, *words):
    """What a command of gdmpi prints."""
    return common.finish(common.start(["-m", "gdmpi"], [command, *words], ranks))


def estimated(words):
    """(bytes, seconds) of a client rank and its round, as check says."""
    said = gdmpi(None, "check", *words)
    number, unit = re.search(r"([\d.]+) ([kMG]B)  together", said).groups()
    return float(number) * SCALE[unit], float(re.search(r"takes about ([\d.e+]+) s", said)[1])


def compare(place, words, rounds, seconds):
    """(estimated, measured) bytes and (estimated, measured) seconds of a round; rounds take about so many seconds."""
    words = [*words, f"run.out={place}", "run.name=run", f"run.cache={place / 'cache'}", f"run.rounds={rounds}"]
    _, some = estimated([*words, "train.steps=10"])
    words += [f"train.steps={max(5, round(10 * seconds / some))}"]
    memory, before = estimated(words)
    gdmpi(2, "run", *words)
    _, after = estimated(words)  # the machine is not as quick in every minute
    with (place / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    peak = max(int(text.partition(":")[2]) for text in rows[-1]["peak_memory"].split(";") if not text.startswith("0:"))
    # in the first round memory is touched for the first time, and kernels are made
    return (memory, peak), ((before + after) / 2, statistics.median(float(row["seconds_train"]) for row in rows[2:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="of a run, the first not timed (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="that a round takes, about (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    args = parser.parse_args()
    cells = ["held by the rank, MB", "estimated", "ratio", "trained for, s", "estimated", "ratio"]
    print(common.head("trained", "computed in", *cells))
    with tempfile.TemporaryDirectory(prefix="gdmpi-estimates-") as directory:
        if SHARED.is_dir():
            model, cases = common.llama(Path(directory) / "model", SHARED / "models" / "tinystories-656k"), CASES
        else:
            model, cases = None, {"the demo's": CASES["the demo's"]}
        for name, words in cases.items():
            known = [word.format(llama=model) for word in words]
            for dtype in args.dtypes:
                how = [f"train.dtype={dtype}", "clients.count=1"]
                with tempfile.TemporaryDirectory(dir=directory) as place:
                    memory, seconds = compare(Path(place), [*known, *how], args.rounds, args.seconds)
                (guess, held), (told, took) = memory, seconds
                numbers = [f"{held / 1e6:.0f}", f"{guess / 1e6:.0f}", f"{guess / held:.2f}"]
                numbers += [f"{took:.1f}", f"{told:.1f}", f"{told / took:.2f}"]
                print(common.row(name, dtype, *numbers))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
