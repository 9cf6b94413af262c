"""Runs that nobody has trained: round files with rows as wanted, for what only reads runs."""

import json

import numpy as np

from gdmpi import checkpoint, config as configuration, evaluate, flat, record

SECONDS = {"total": 2.0, "train": 1.25, "exchange": 0.25, "server": 0.125, "eval": 0.25, "checkpoint": 0.5}


def row(t, loss, clients=2, size=1000, test=None, **others):
    """A round's row: clients that send and receive size bytes each, 100 response tokens and 2 seconds a round."""
    trained = t > 0
    made = {
        "round": t,
        "train_loss": loss if trained else None,
        "eval_loss": loss,
        "eval_perplexity": None if loss is None else evaluate.perplexity(loss),
        "clients": clients * trained,
        "bytes_up_per_client": size * trained,
        "bytes_down_per_client": size * trained,
        "seconds": {part: value * trained for part, value in SECONDS.items()},
        "tokens": 100 * trained,
        "steps": 4 * trained,
        "seen_tokens": 150 * trained,
        "tokens_per_second": 80.0 if trained else None,
        "seen_tokens_per_second": 120.0 if trained else None,
        "mfu": None,
        "flops_per_client": 1e6 * trained,
        "peak_memory_client": 10**8,
        "peak_memory_server": 10**8,
        "peak_memory": {"0": 10**8},
        "adapter_sha256": f"{t:064x}",
        "warnings": [],
        "server": None,
        "test": None if test is None else {"loss": test, "perplexity": evaluate.perplexity(test), "tokens": 300},
        "sent": {str(c): {"blake3": "0" * 64, "metrics": {"loss": loss}} for c in range(clients * trained)},
    }
    return record.complete(made) | others


def about(rows=(30, 20), **others):
    """What a run knows of itself: rows per client of training, 10 validation and 10 test rows."""
    parts = {"train": sum(rows), "validation": 10, "test": 10}
    counts = {part: {"kept": n, "tokens": 50 * n, "target_tokens": 30 * n} for part, n in parts.items()}
    known = {
        "model": "demo",
        "base_sha256": "a" * 64,
        "base_parameters": 1000,
        "trainable_parameters": 4,
        "processor": "x86_64 AVX512",
        "rows": {str(client): n for client, n in enumerate(rows)},
        "data": {"name": "demo", "rows": sum(parts.values()), **counts},
        "warnings": [],
        "ranks": 3,
    }
    return known | others


def write_run(directory, rows, *words, known=None):
    """Write the directory of a run with these rows, its settings the demo's and words; returns the directory."""
    directory.mkdir(parents=True)
    weights = flat.pack({"w": np.zeros(4, np.float32)})
    digest = flat.sha256(weights)
    rows = [*rows[:-1], rows[-1] | {"adapter_sha256": digest}]
    words = [f"run.name={directory.name}", f"run.out={directory.parent}", f"run.rounds={rows[-1]['round']}", *words]
    known = (known or about()) | {"schema": json.loads(weights.schema.to_json())}
    text = configuration.load(None, words).to_yaml()
    state = checkpoint.Round(rows[-1]["round"], digest, text, {"weights": weights}, rows, about=known)
    checkpoint.write(directory, state)
    (directory / "metrics.csv").write_text(record.metrics(rows))
    lines = [
        {
            "round": r["round"],
            "adapter_sha256": r["adapter_sha256"],
            "sent": {c: n["blake3"] for c, n in r["sent"].items()},
        }
        for r in rows
    ]
    (directory / "audit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory
