"""How often the base model lies in the memory of a node: the ranks' proportional set sizes, added up.

Pss counts a page that n processes share as 1/n in each, so the sum over the ranks is what they really take. Against
the same job with a small base it must grow by about one copy of the larger one, however many ranks there are.
"""

import argparse
import tempfile
import time
from pathlib import Path

import common
import psutil
from conftest import tiny_rows, tiny_tokenizer, write_rows

ROLLUP = Path("/proc/self/smaps_rollup")


def base(directory, hidden, layers, vocabulary):
    """Save a Llama with random weights; returns its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny_tokenizer(directory, [row["prompt"] + row["response"] for row in tiny_rows(60)])
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return (directory / "model.safetensors").stat().st_size


def peak(model, directory, ranks, settings=(), mpi="mpich"):
    """Largest sum of Pss over the ranks, in bytes, while gdmpi builds and plays round 1 on a base."""
    rows = write_rows(directory / "rows.jsonl", tiny_rows(60))
    words = ["run", f"run.out={directory}", f"run.name={model.name}-run", f"run.cache={directory / 'cache'}"]
    words += ["run.rounds=1", "train.steps=2", "train.batch_size=1", "data.max_length=32", f"data.name={rows}"]
    # what each rank has of its own is not what is measured: the smallest adapter, and no layers cast to compute with
    words += [f"model.name={model}", "model.adapter.r=1", "model.adapter.targets=[q_proj]", "run.device=cpu"]
    words += ["train.dtype=float32"]
    process = common.start(["-m", "gdmpi"], [*words, *settings, f"clients.count={ranks - 1}"], ranks, mpi)
    most = 0
    while process.poll() is None:
        most = max(most, sum(pss(child) for child in psutil.Process(process.pid).children(recursive=True)))
        time.sleep(0.05)
    common.finish(process)
    return most


def pss(process):
    """A process's proportional set size in bytes; 0 if it has just ended."""
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0


def growth(ranks, large, small, settings=(), mpi="mpich"):
    """(bytes of the large base, of the small one, sums of Pss with each): both are (hidden, layers, vocabulary).

    settings that convert the base: its bytes are those of what a first job, which is not measured, has made of it.
    """
    with tempfile.TemporaryDirectory(prefix="gdmpi-memory-") as directory:
        places = [Path(directory) / name for name in ("large", "small")]
        sizes, sums = [base(place, *shape) for place, shape in zip(places, (large, small), strict=True)], []
        for number, place in enumerate(places):
            if settings:
                before = made(directory)
                peak(place, Path(directory), 2, (*settings, f"run.name=first-{number}"), mpi)
                (new,) = made(directory) - before
                sizes[number] = new.stat().st_size
            sums.append(peak(place, Path(directory), ranks, settings, mpi))
        return *sizes, *sums


def made(directory):
    """The files of the bases that lie in a folder's cache."""
    return set(Path(directory, "cache", "bases").glob("*/model.safetensors"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 6])
    parser.add_argument("settings", nargs="*", help="of every run, such as model.dtype=bfloat16")
    args = parser.parse_args()
    print(common.head("ranks", "base, MB", "Pss, MB", "Pss with a small base, MB", "growth, copies of the base"))
    for ranks in args.ranks:
        for _ in range(args.runs):
            size, little, most, least = growth(ranks, (1536, 4, 8000), (32, 2, 300), args.settings)
            cells = [f"{each / 1e6:.0f}" for each in (size, most, least)]
            print(common.row(ranks, *cells, f"{(most - least) / (size - little):.2f}"), flush=True)


if __name__ == "__main__":
    main()
