"""What the benchmarks share: starting programs under mpirun and printing rows of Markdown."""

import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from conftest import SHARED, launcher  # noqa: E402

COUNSEL = ROOT / "configs" / "counsel-chat.yaml"


def jobs():
    """{name: words of the command line}: the demo, and the real texts where they lie beside the project."""
    found = {"demo": []}
    if SHARED.is_dir():
        model, data = SHARED / "models" / "tinystories-656k", SHARED / "data" / "counsel_chat.jsonl"
        found["counsel-chat"] = [str(COUNSEL), f"model.name={model}", f"data.name={data}"]
    return found


def fresh(name):
    """(directory, words) for a run that finds nothing in its cache."""
    directory = Path(tempfile.mkdtemp(prefix="gdmpi-bench-"))
    return directory, [f"run.out={directory}", f"run.name={name}", f"run.cache={directory / 'cache'}"]


def start(program, arguments, ranks=6, mpi="mpich", **environment):
    """Start a Python program under mpirun; a Popen whose output is piped."""
    command, env = launcher(ranks, mpi)
    return subprocess.Popen(
        [*command, sys.executable, *map(str, program), *map(str, arguments)],
        env=env | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """What a started program printed; SystemExit with its error if it failed."""
    out, err = process.communicate()
    if process.returncode:
        sys.exit(f"failed with {process.returncode}\n{out}\n{err}")
    return out


def llama(directory, tokenizer=None):
    """Save a Llama of 15 million parameters with random weights and the tokenizer of a model, else the demo's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    for path in Path(tokenizer or ROOT / "gdmpi" / "demo" / "model").glob("*token*"):
        shutil.copy(path, directory)
    return directory


def row(*cells):
    """A row of a Markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def head(*cells):
    """The first two rows of a Markdown table."""
    return f"{row(*cells)}\n{row(*['---'] * len(cells))}"


def spread(values, form="{:.1f}"):
    """Median and range of a few numbers."""
    low, high = form.format(min(values)), form.format(max(values))
    return f"{form.format(statistics.median(values))} ({low}-{high})"
