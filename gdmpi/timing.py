"""How long training takes on the machine where it is asked: some products and sums are timed, the rest reckoned."""

import time
from dataclasses import replace

from gdmpi import estimate

ROWS, SECONDS = 1024, 0.4  # tokens of a product that is timed; seconds for each thing that is timed
# all of a step but its products with weights (attention, norms, rotations, activations, casts, gradients) takes as
# long as adding two float32 vectors in the cache with this many times the bytes that the step would keep for its
# backward pass in float32; computed in float32, and in fewer bits (measured on Llamas of 0.4 to 6 million weights in
# their layers, on rows of 22 to 250 tokens: 33 to 64 and 44 to 58, and 80 to 95 with what is padded)
MOVES = {"packed": (43, 52), "padded": (87, 87)}
# seconds a layer and pass, however few its tokens: a new shape costs a new kernel in fewer bits; not measured on a GPU
CALLS = {"cpu": (4e-3, 5.5e-3), "cuda": (0.0, 0.0)}


def seconds(shape, step, rows, passes, threads=1):
    """Of training: rows are (tokens, target tokens) that go through in so many passes; step.length is the mean of rows.

    On this machine, and on its GPU if step says so. The products of the layers are 4 operations a weight and token and
    6 if it is the adapter's; those of the head 4 a weight and target token; then there is what MOVES and CALLS say.
    """
    import torch

    torch.set_num_threads(threads)
    tokens, targets = rows
    dtype = getattr(torch, step.compute)
    layers = _products(shape.sides, dtype, step.device)
    head = _products([(shape.width, shape.vocabulary, 1)], dtype, step.device, rows=estimate.CHUNK[step.device])
    plain = replace(step, compute="float32", checkpointing=False)
    kept = estimate.activations(shape, plain, tokens) / plain.gaps
    fewer = step.compute != "float32"
    moved = MOVES["packed" if step.packed else "padded"][fewer] * kept * _adding(step.device)
    calls = passes * shape.layers * CALLS[step.device][fewer]
    again = 1.5 if step.checkpointing else 1.0  # a second forward pass
    return again * (2 * tokens * layers + moved) + 2 * targets * head + calls


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
