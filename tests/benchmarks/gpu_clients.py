"""A model of Llama-2-7B's shape in 4 bits on one GPU: training, a round of five clients, and what travels.

Its weights are random and are made here, in 14 GB of --place; nothing is downloaded. In bfloat16 and rows of 512
tokens: gdmpi's training against the Trainer of transformers with peft; a round of five clients of 20,000 tokens each,
all on this GPU; and the exchange of the adapter against that of all weights (the paper has 4.3 s against 6.7 s a round
for the two). Made for an H100 or H200, in less than nine minutes; anywhere else, with a shape to match,

    python tests/benchmarks/gpu_clients.py --device cpu --layers 2 --hidden 64 --length 64 --tokens 256 --steps 2
"""

import argparse
import csv
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import common
from clients import compare, prepare
from contenders import CONTENDERS, LORA, LR

CLIENTS = 5
CHUNK = 256 << 20  # bytes that travel at once
USUAL = ["gdmpi", "Trainer, bf16", "Trainer, bf16, checkpointing"]
SHM = Path("/dev/shm")


def weights(place, device, shape):
    """Save a Llama with random weights, drawn on the device, a file a layer; prints what it holds."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, max_position_embeddings=4096, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        network = LlamaForCausalLM(config)
    config.dtype = torch.bfloat16
    config.save_pretrained(place)
    torch.manual_seed(0)
    found = {}

    def layer(item):
        return next((part for part in item[0].split(".") if part.isdigit()), "rest")

    for name, entries in itertools.groupby(network.state_dict().items(), layer):
        file, tensors = f"model-{len(set(found.values())):03}-{name}.safetensors", {}
        for key, p in entries:
            drawn = torch.ones if "norm" in key else torch.randn
            tensors[key] = (drawn(p.shape, dtype=torch.bfloat16, device=device) * (1 if p.dim() == 1 else 0.02)).cpu()
            found[key] = file
        save_file(tensors, place / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": found}
    (place / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for path in (common.ROOT / "gdmpi" / "demo" / "model").glob("*token*"):
        shutil.copy(path, place)
    head = network.get_output_embeddings()
    linear = [m for m in network.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    sizes = {
        "base": sum(p.numel() for p in network.parameters()),
        "adapter": LORA["r"] * sum(m.in_features + m.out_features for m in linear),
    }
    print(json.dumps(sizes))


def texts(path, count, length):
    """Write rows of the demo's text that are longer than so many tokens, and are cut there."""
    lines = (common.ROOT / "gdmpi" / "demo" / "data.jsonl").read_text(encoding="utf-8").splitlines()
    pieces = itertools.cycle(" ".join(v for v in json.loads(line).values() if isinstance(v, str)) for line in lines)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            text = ""
            while len(text) < 12 * length:  # no text has more than 12 characters a token
                text += next(pieces) + "\n"
            file.write(json.dumps({"text": text}) + "\n")
    return path


def exchange(device, sizes, runs):
    """Two ranks, a server and a client with the GPU: what is broadcast goes to the device, what comes off it is summed.

    Both go through the same memory in chunks, pinned at the client: kinder to a large exchange than one buffer is.
    """
    import numpy as np
    import torch
    from mpi4py import MPI

    comm, taken = MPI.COMM_WORLD, {}
    # whole numbers of the same width: MPI cannot add bfloat16, and the adapter travels as sums of integers
    for name, (count, dtype) in {"adapter": (sizes["adapter"], "int32"), "model": (sizes["base"], "int16")}.items():
        width = np.dtype(dtype).itemsize
        host = torch.zeros(min(CHUNK // width, count), dtype=getattr(torch, dtype), pin_memory=device == "cuda")
        there = torch.zeros_like(host, device=device if comm.rank else "cpu")
        for run in range(runs + 1):
            comm.Barrier()
            began = time.perf_counter()
            for way in ("down", "up"):
                for start in range(0, count, len(host)):
                    part = slice(0, min(len(host), count - start))
                    if way == "down":
                        comm.Bcast(host[part].numpy())
                        if comm.rank:
                            there[part].copy_(host[part])
                    else:
                        if comm.rank:
                            host[part].copy_(there[part])
                        mine = host[part].numpy()
                        comm.Reduce(*((MPI.IN_PLACE, mine) if comm.rank == 0 else (mine, None)))
            comm.Barrier()
            if run:  # the first touches the memory
                taken.setdefault(name, []).append(time.perf_counter() - began)
    if comm.rank == 0:
        print(json.dumps(taken))


def play(args, model, data, out):
    """Rounds of gdmpi with all clients on one rank and its GPU: their rows of metrics.csv, but the untrained one's."""
    words = [f"run.out={out}", "run.name=round", f"run.cache={out / 'cache'}", f"run.rounds={args.rounds + 1}"]
    words += [f"run.device={args.device}", f"model.name={model}", f"model.quantize={args.quantize}"]
    words += [f"model.adapter.r={LORA['r']}", f"model.adapter.alpha={LORA['alpha']}", f"clients.count={CLIENTS}"]
    words += [f"data.name={data}", f"data.max_length={args.length}", "data.validation=0", "data.test=0"]
    words += [f"train.batch_size={args.batch}", f"train.lr={LR}"]
    common.finish(common.start(["-m", "gdmpi"], ["run", *words], 2))
    with (out / "round" / "metrics.csv").open(encoding="utf-8") as file:
        return [{key: float(line[key] or 0) for key in COLUMNS} for line in csv.DictReader(file)][1:]


PARTS = ("total", "train", "exchange", "server", "eval", "checkpoint")
COLUMNS = [f"seconds_{part}" for part in PARTS] + ["tokens", "peak_memory_client"]


def tell(rows, taken, sizes):
    """Print a round's parts, and what the exchange of all weights would add to it."""
    rows = rows[1:]  # the first round sets up what the others find
    total, train, evaluation = ([row[f"seconds_{part}"] for row in rows] for part in ("total", "train", "eval"))
    print(common.head("a round of", "rounds", "target tokens/s in training", *(f"{part}, s" for part in PARTS)))
    cells = [common.spread([row[f"seconds_{part}"] for row in rows], "{:.3f}") for part in PARTS]
    speed = common.spread([row["tokens"] / row["seconds_train"] for row in rows], "{:.0f}")
    print(common.row(f"{CLIENTS} clients, {rows[0]['tokens']:,.0f} tokens", len(rows), speed, *cells))
    outside = [100 * (a - b - c) / a for a, b, c in zip(total, train, evaluation, strict=True)]
    busy = [100 * (row["seconds_exchange"] + row["seconds_checkpoint"]) / row["seconds_total"] for row in rows]
    print(f"\noutside training and evaluation: {common.spread(outside, '{:.2f}')} % of a round")
    print(f"exchange and checkpoint, most of which training hides: {common.spread(busy, '{:.2f}')} % of a round")
    print(f"GPU memory (without a GPU: resident): {max(row['peak_memory_client'] for row in rows) / 1e9:.1f} GB\n")
    print(common.head("exchanged between two ranks", "bytes each way", "seconds", "a round with it, s"))
    middle = statistics.median(train)
    for name, key, width in (("the adapter, float32", "adapter", 4), ("all weights, bfloat16", "base", 2)):
        seconds = taken["adapter" if width == 4 else "model"]
        both = middle + statistics.median(seconds)
        print(common.row(name, f"{width * sizes[key]:,}", common.spread(seconds, "{:.3f}"), f"{both:.2f}"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--place", type=Path, help="where the weights go (default: /dev/shm if there is room, else /tmp)"
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--quantize", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="rows a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="timed (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=20000, help="of a client in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="timed (default: %(default)s)")
    parser.add_argument("--contenders", nargs="+", default=USUAL, choices=CONTENDERS, metavar="NAME")
    args = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # a Trainer would take all GPUs, gdmpi's rank takes one
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device here")
        return
    # Llama-2-7B's, and smaller ones like it
    shape = {"vocab_size": args.vocabulary, "hidden_size": args.hidden, "num_hidden_layers": args.layers}
    shape |= {"intermediate_size": -(-172 * args.hidden // 4096) * 64}  # the kernels for 4 bits on CPUs want 64s
    shape |= {"num_attention_heads": max(1, args.hidden // 128)}
    roomy = SHM.is_dir() and shutil.disk_usage(SHM).free > 30e9
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gdmpi-gpu-", dir=args.place or (SHM if roomy else None)) as directory:
        place = Path(directory)
        model = place / "model"
        model.mkdir()
        say("weights", began)
        made = common.start([__file__], ["weights", model, args.device, json.dumps(shape)], None)
        sizes = json.loads(common.finish(made).splitlines()[-1])
        print(f"{sizes['base']:,} parameters, {sizes['adapter']:,} trainable, {args.quantize} on {args.device}")
        rows = -(-args.tokens // args.length)
        data = texts(place / "rows.jsonl", CLIENTS * rows, args.length)
        values = {"model": str(model), "data": str(data), "max_length": args.length, "batch": args.batch, "cut": 0}
        values |= {"steps": args.steps, "warm": 2, "held": 16, "quantize": args.quantize, "device": args.device}
        values |= {"threads": 1}
        say("the rows", began)
        prepare(place, values)
        say("training", began)
        compare(place, args.contenders, 1, values, 1e9, "GB")
        say("the round", began)
        played = play(args, model, data, place)
        say("the exchange", began)
        words = ["exchange", args.device, json.dumps(sizes), 3]
        taken = json.loads(common.finish(common.start([__file__], words, 2)).splitlines()[-1])
        print()
        tell(played, taken, sizes)
        say("done", began)


def say(what, began):
    print(f"{time.perf_counter() - began:.0f} s: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["weights"]:
        weights(Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
    elif sys.argv[1:2] == ["exchange"]:
        exchange(sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
