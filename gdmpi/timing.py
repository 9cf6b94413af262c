"""How long training takes on the machine where it is asked: some products and sums are timed, the rest reckoned."""

import time

from gdmpi import estimate

ROWS, SECONDS = 1024, 0.15  # tokens of a product that is timed; seconds for each thing that is timed
# all of a step but its products with weights (attention, norms, rotations, activations, casts, gradients) takes as
# long as adding two float32 vectors in the cache with this many times the bytes that the step keeps for its backward
# pass (measured on Llamas of 0.8 to 25 million weights in their layers, float32 and bfloat16: 42 to 61)
MOVES = 50


def seconds(shape, step, rows, threads=1):
    """Of training: rows are (tokens, target tokens) that pass through. On this machine, and on its GPU if step says so.

    Three parts: the products of the layers, 4 operations a weight and token and 6 if it is the adapter's; those of the
    head, 4 a weight and target token; and moving MOVES times what a token keeps for the backward pass.
    """
    import torch

    torch.set_num_threads(threads)
    tokens, targets = rows
    dtype = getattr(torch, step.compute)
    layers = _products(shape.sides, dtype, step.device)
    head = _products([(shape.width, shape.vocabulary, 1)], dtype, step.device, rows=estimate.CHUNK[step.device])
    moved = estimate.activations(shape, step, tokens) / step.gaps
    again = 1.5 if step.checkpointing else 1.0  # a second forward pass
    return again * 2 * tokens * layers + 2 * targets * head + MOVES * moved * _adding(step.device)


def _products(sides, dtype, device, rows=ROWS):
    """Seconds of the products of one token with the matrices of these (inputs, outputs, number)."""
    import torch

    total = 0.0
    for inputs, outputs, number in sides:
        x = torch.ones(rows, inputs, dtype=dtype, device=device)
        w = torch.ones(outputs, inputs, dtype=dtype, device=device)
        total += number * _timed(lambda x=x, w=w: x @ w.t(), device, SECONDS / len(sides)) / rows
    return total


def _adding(device):
    """Seconds that adding two vectors takes for a byte of the result."""
    import torch

    x, y = torch.ones(2**20, device=device), torch.ones(2**20, device=device)
    return _timed(lambda: x + y, device, SECONDS) / (4 * 2**20)


def _timed(action, device, limit):
    """Seconds of an action, the least of some; on the CPU in this process's own time, others may be busy there."""
    import torch

    if device == "cuda":
        clock, wait = time.perf_counter, torch.cuda.synchronize
    else:
        clock, wait = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter, lambda: None
    action()
    wait()
    found, end = [], time.perf_counter() + limit
    while len(found) < 3 or (time.perf_counter() < end and len(found) < 100):
        begin = clock()
        action()
        wait()
        found.append(clock() - begin)
    return min(found)
