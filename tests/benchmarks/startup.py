"""Seconds from mpirun to the moment when the last client rank has made its first optimiser step.

gdmpi against a plain program for the same job: every rank imports the libraries, loads the model and the tokenizer,
tokenises the data and makes a step. Both start with empty caches; the runs alternate: A B A B ...
"""

import argparse
import re
import shutil
import statistics
import sys
import time

import common

MARK, RATED = "first step at", "evaluated for"


def gdmpi(words):
    """Run gdmpi, saying when each rank has made its first step, and how long the untrained model was evaluated."""
    from gdmpi import run, train
    from gdmpi.__main__ import main

    real_call, real_assess = train.Trainer.__call__, run.assess

    def call(trainer, t, client):
        told = trainer.on_step

        def on_step(client, done, *more):
            if done == 1:
                print(f"{MARK} {time.time()}\n", end="", flush=True)
            if told:
                told(client, done, *more)

        trainer.on_step = on_step
        return real_call(trainer, t, client)

    def assess(link, parts, server, clients, message, t, *rest, **kwargs):
        began = time.time()
        row = real_assess(link, parts, server, clients, message, t, *rest, **kwargs)
        if link.is_server and t == 0:
            print(f"{RATED} {time.time() - began}\n", end="", flush=True)
        return row

    train.Trainer.__call__, run.assess = call, assess
    return main(["run", *words])


def plain(model, data, template, r, alpha, length, batch, lr):
    """What a program looks like that does not care how long it takes to start."""
    import datasets
    import torch
    from mpi4py import MPI
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rank, clients = MPI.COMM_WORLD.rank, max(1, MPI.COMM_WORLD.size - 1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lora = LoraConfig(r=int(r), lora_alpha=float(alpha), target_modules="all-linear", task_type="CAUSAL_LM")
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    rows = datasets.load_dataset("json", data_files=data, split="train")

    def encode(row):
        text = template.format(prompt=row.get("prompt", row.get("question")), response=row["response"])
        return tokenizer(text, truncation=True, max_length=int(length))

    rows = rows.map(encode, remove_columns=rows.column_names, keep_in_memory=True)
    if rank == 0:
        return
    mine = rows.shard(clients, rank - 1)
    batch = tokenizer.pad(mine[: int(batch)], return_tensors="pt")
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), lr=float(lr))
    network(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    print(f"{MARK} {time.time()}\n", end="", flush=True)


def measure(what, words):
    """(seconds to the last rank's first step, seconds of evaluation in them)."""
    directory, place = common.fresh("startup")
    home = {"HF_HOME": str(directory / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    # gdmpi sets its own home of the libraries; one step is enough
    if what == "gdmpi":
        words, home = [*words, *place, "run.rounds=1", "train.steps=1"], {}
    began = time.time()
    out = common.finish(common.start([__file__, what], words, **home))
    shutil.rmtree(directory)
    steps = [float(at) - began for at in re.findall(rf"{MARK} ([\d.]+)", out)]
    if len(steps) != 5:
        sys.exit(f"{len(steps)} ranks made a step, not 5\n{out}")
    return max(steps), sum(float(each) for each in re.findall(rf"{RATED} ([\d.]+)", out))


def job(words):
    """The same job for the plain program, as arguments."""
    from gdmpi import config as configuration, data, model

    config = configuration.load(words[0] if words else None, words[1:])
    source = data.DEMO if config.data.name == "demo" else config.data.name
    adapter, train = config.model.adapter, config.train
    place, text = model.locate(config.model.name), "{prompt}\n{response}"
    return [place, source, text, adapter.r, adapter.alpha, config.data.max_length, train.batch_size, train.lr]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="of each program, alternating (default: %(default)s)")
    args = parser.parse_args()
    sys.path.insert(0, str(common.ROOT))
    print(common.head("job", "gdmpi, s", "of which evaluation, s", "plain program, s", "ratio of medians"))
    for name, words in common.jobs().items():
        programs = {"gdmpi": words, "plain": job(words)}
        for what, arguments in programs.items():
            measure(what, arguments)  # the first reads everything from the disk
        taken = {what: [] for what in programs}
        for _ in range(args.runs):
            for what, arguments in programs.items():
                taken[what].append(measure(what, arguments))
        ours, rated = zip(*taken["gdmpi"], strict=True)
        theirs, _ = zip(*taken["plain"], strict=True)
        ratio = statistics.median(theirs) / statistics.median(ours)
        cells = [common.spread(each) for each in (ours, rated, theirs)]
        print(common.row(name, *cells, f"{ratio:.1f}"), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["gdmpi"]:
        sys.exit(gdmpi(sys.argv[2:]))
    elif sys.argv[1:2] == ["plain"]:
        plain(*sys.argv[2:])
    else:
        main()
