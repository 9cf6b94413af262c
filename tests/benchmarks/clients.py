"""A client's local training, against the Trainers that one would otherwise run, in target tokens a second and memory.

A Llama of 15 million parameters with random weights, LoRA r=64 on all linear layers, 8 rows a step, prompts without
loss. Each contender trains in a process of its own, from the same adapter, on the same rows; they alternate: A B C
A B C ... What is loaded, tokenised and done in the first steps is not timed. With --ranks instead: six ranks on the
cores of this machine against as many single processes of gdmpi as there are cores.
"""

import argparse
import csv
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import common
from contenders import CONTENDERS, LORA, LR

OURS = "gdmpi"
USUAL = [
    "gdmpi",
    "gdmpi float32",
    "Trainer",
    "Trainer, bf16, by length",
    "Trainer, bf16 base, by length",
    "SFTTrainer packing",
    "SFTTrainer packing, one by one",
]
PROGRAM = common.HERE / "contenders.py"
TRAINED = 4000  # entries of a tokenizer trained on the data: Llama 2's 1.3 tokens a word of English


def tokenizer(data, directory):
    """Train a byte-level BPE tokenizer on the texts of a JSONL file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    with open(data, encoding="utf-8") as file:  # noqa: PTH123
        texts = [value for line in file for value in json.loads(line).values() if isinstance(value, str)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=TRAINED, **options))
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    return directory


def call(what, place, *names, threads=1):
    """What contenders.py printed."""
    program = common.start([PROGRAM], [what, place, *names], None, OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1")
    return json.loads(common.finish(program).splitlines()[-1])


def prepare(place, values):
    """Make the rows and the adapter, and say how many rows there are."""
    (place / "settings.json").write_text(json.dumps(values), encoding="utf-8")
    rows = call("prepare", place)
    print(
        f"{rows['rows']} rows of {rows['tokens']:,} tokens, {rows['target']:,} of them with loss; "
        f"padded in batches as they come {rows['padded']:,}"
    )


def compare(place, names, runs, values, unit=1e6, called="MB"):
    """Alternate the contenders and print their table, memory in a unit."""
    (place / "settings.json").write_text(json.dumps(values), encoding="utf-8")
    threads = values["threads"]
    taken = {name: [] for name in names}
    for _ in range(runs):
        for name in list(taken):
            try:
                each = call("train", place, name, threads=threads)
            except SystemExit as error:  # out of memory, say: the others are worth knowing all the same
                print(f"{name} is left out: {str(error).rstrip().splitlines()[-1]}", file=sys.stderr)
                del taken[name]
                continue
            taken[name].append(each)
            print(f"{name}: {each['tokens'] / each['seconds']:.0f} tokens/s; {each}", file=sys.stderr, flush=True)
    losses = call("evaluate", place, "initial", *taken, threads=len(os.sched_getaffinity(0)))
    print(
        f"\n{threads} thread{'s' * (threads > 1)}, {runs} runs of {values['steps']} steps; held-out loss before: ",
        end="",
    )
    print(f"{losses['initial']:.4f}\n")
    table(taken, losses, unit, called)


def table(taken, losses, unit, called):
    """Print the contenders' results; ratios are of the runs that stood beside each other."""
    cells = [
        "target tokens/s",
        "gdmpi is quicker by",
        "in CPU time",
        f"a step takes, {called}",
        "times gdmpi's",
        f"at most, {called}",
    ]
    print(common.head("trained by", "steps", *cells, "held-out loss", "to gdmpi's"))
    ours = taken.get(OURS)
    for contender, runs in taken.items():
        speed = [each["tokens"] / each["seconds"] for each in runs]
        step, whole = ([each[key] / unit for each in runs] for key in ("step_bytes", "bytes"))
        ratios, worse = ["-"] * 3, "-"
        if ours and contender != OURS:
            pairs = list(zip(ours, runs, strict=True))  # of as many tokens
            keys = ("seconds", "cpu", "step_bytes")
            ratios = [common.spread([b[key] / a[key] for a, b in pairs], "{:.2f}") for key in keys]
            worse = f"{100 * (losses[contender] / losses[OURS] - 1):+.3f} %"
        form = "{:.0f}" if unit == 1e6 else "{:.1f}"
        cells = [common.spread(speed, "{:.0f}"), *ratios[:2], common.spread(step, form), ratios[2]]
        cells += [common.spread(whole, form), f"{losses[contender]:.4f}", worse]
        print(common.row(contender, runs[0]["steps"], *cells))


# ---- several ranks --------------------------------------------------------------------------------------------------


def words(args, model, out, name, clients, steps):
    """The command line of a run of gdmpi that does what a contender does."""
    return [
        "run",
        f"run.out={out}",
        f"run.name={name}",
        f"run.cache={out / 'cache'}",
        f"run.rounds={args.rounds + 2}",
        "run.device=cpu",
        f"model.name={model}",
        f"model.adapter.r={LORA['r']}",
        f"model.adapter.alpha={LORA['alpha']}",
        f"data.name={args.data}",
        f"data.max_length={args.max_length}",
        "data.validation=0",
        "data.test=0",
        f"clients.count={clients}",
        f"train.batch_size={args.batch}",
        f"train.lr={LR}",
        f"train.steps={steps}",
    ]


def rounds(out, name):
    """(target tokens a second of training, and of the whole round) of a run's rounds, but its first and its last."""
    with (out / name / "metrics.csv").open(encoding="utf-8") as file:
        found = [
            [float(line[f"{key}"]) for key in ("tokens", "seconds_train", "seconds_total")]
            for line in csv.DictReader(file)
        ]
    # a round's total is missing before the next one has begun; and in the last one of a process, others may have ended
    return [(tokens / train, tokens / total) for tokens, train, total in found[2:-1]]


def ranks(args, model):
    """Six ranks for five clients against a process a core, each with a client of its own: alternating."""
    cores = len(os.sched_getaffinity(0))
    alone = -(-args.steps * 5 // cores)  # as many steps on each core, and so about as long a round
    together, apart = [], []
    for _ in range(args.runs):
        out = Path(tempfile.mkdtemp(prefix="gdmpi-bench-"))
        common.finish(
            common.start(["-m", "gdmpi"], words(args, model, out, "ranks", 5, args.steps), 6, OMP_NUM_THREADS="1")
        )
        together += rounds(out, "ranks")
        names = [f"alone-{number}" for number in range(cores)]
        running = [
            common.start(["-m", "gdmpi"], words(args, model, out, name, 1, alone), None, OMP_NUM_THREADS="1")
            for name in names
        ]
        for process in running:
            common.finish(process)
        apart += [
            tuple(map(sum, zip(*each, strict=True))) for each in zip(*(rounds(out, n) for n in names), strict=True)
        ]
        shutil.rmtree(out)
    print(common.head("target tokens/s", "rounds", "in training", "in whole rounds"))
    for name, found in {"6 ranks, 5 clients": together, f"{cores} processes, a client each, summed": apart}.items():
        print(common.row(name, len(found), *(common.spread(each, "{:.0f}") for each in zip(*found, strict=True))))
    middles = [[statistics.median(each) for each in zip(*found, strict=True)] for found in (together, apart)]
    ratios = [ours / theirs for ours, theirs in zip(*middles, strict=True)]
    print(f"\nsix ranks reach {ratios[0]:.3f} of the processes in training, {ratios[1]:.3f} in whole rounds (medians)")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="of each, alternating (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="timed (default: %(default)s)")
    parser.add_argument("--warm", type=int, default=2, help="steps before them (default: %(default)s)")
    parser.add_argument("--held", type=int, default=64, help="rows to evaluate with (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows a step (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--data", default="demo", help="a JSONL file (default: the demo's)")
    parser.add_argument("--tokenizer", help="a model's directory, or trained: on the data (default: the demo's)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--rows", default="text", help="text, or fixed128: pieces of 128 tokens, all with loss")
    parser.add_argument("--contenders", nargs="+", default=USUAL, choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--ranks", action="store_true", help="six ranks against single processes instead")
    parser.add_argument("--rounds", type=int, default=3, help="timed in a run, with --ranks (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gdmpi-clients-") as directory:
        place = Path(directory)
        source = args.tokenizer
        if source == "trained":
            source = tokenizer(
                common.ROOT / "gdmpi/demo/data.jsonl" if args.data == "demo" else args.data, place / "words"
            )
        model = common.llama(place / "model", source)
        if args.ranks:
            return ranks(args, model)
        names = args.contenders
        if importlib.util.find_spec("trl") is None:
            names = [name for name in names if "SFT" not in name]
            print("without the SFTTrainer: trl is not installed")
        values = {"model": str(model), "data": args.data, "max_length": args.max_length, "batch": args.batch}
        values |= {"steps": args.steps, "warm": args.warm, "held": args.held, "quantize": "none", "device": "cpu"}
        values["cut"] = 0 if args.rows == "text" else int(args.rows.removeprefix("fixed"))
        prepare(place, values | {"threads": 1})
        for threads in args.threads:
            compare(place, names, args.runs, values | {"threads": threads})
    return None


if __name__ == "__main__":
    main()
