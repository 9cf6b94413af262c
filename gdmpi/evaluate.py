"""Held-out loss, sharded over the ranks in fixed batches and summed exactly: the same for any number of ranks."""

import math

BATCH, TOKENS = 16, 2048  # rows, and tokens in a pass; constants of the result's last bits, so no settings


def plan(rows):
    """The batches of held-out rows, in order: [list of row ids]. Rows keep their order; a batch never changes."""
    return [list(range(start, min(start + BATCH, len(rows)))) for start in range(0, len(rows), BATCH)]


def losses(model, rows, wanted):
    """{batch number: (sum of losses, target tokens)} for the wanted batches of plan(rows).

    Each row's loss is that of its target tokens; a batch's is their sum in float64.
    """
    import torch

    model.model.eval()
    result, batches = {}, plan(rows)
    with torch.inference_mode():
        for number in wanted:
            parts = [model.forward.losses(rows, ids) for ids in model.forward.groups(rows, batches[number], TOKENS)]
            result[number] = (sum(float(part.double().sum()) for part in parts), sum(len(part) for part in parts))
    return result


def total(parts):
    """The mean loss per target token over all batches, from the ranks' {batch key: (sum, tokens)}; (loss, tokens)."""
    merged = {}
    for part in parts:
        merged.update(part)
    # fsum is exact, so the order in which ranks answered cannot matter
    tokens = sum(count for _, count in merged.values())
    return (math.fsum(value for value, _ in merged.values()) / tokens if tokens else math.nan), tokens


def perplexity(loss):
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
