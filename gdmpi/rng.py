"""Random streams by (seed, purpose, round, client): nothing to save, so a resumed or moved client draws the same."""

import hashlib
from contextlib import contextmanager

import numpy as np


def key(seed, purpose, round=0, client=0):
    """The 128-bit key of a stream, from SHA-256 over all that tells it apart; an int."""
    text = f"gdmpi/{seed}/{purpose}/{round}/{client}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def stream(seed, purpose, round=0, client=0):
    """A numpy Generator over Philox, which is counter-based: equal arguments give equal numbers on every machine."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, round, client)))


@contextmanager
def torch_fork(seed, purpose, round=0, client=0):
    """Run a block under torch's global generators reseeded from the stream, and put their states back afterwards.

    For what takes no generator: dropout, the adapter's initialisation.
    """
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(key(seed, purpose, round, client) & (2**63 - 1))
        yield
