"""Server optimisers: how the mean of the clients' deltas moves the global state (Reddi et al., arXiv 2003.00295)."""

import math

import numpy as np

PIECE = 1 << 15  # elements worked on at a time


class SGD:
    """w += lr * delta. The delta points towards improvement, so there is no minus; lr 1 is federated averaging."""

    def __init__(self, lr):
        self.lr = np.float32(lr)

    def step(self, weights, delta):
        """Move weights (float32 vector, in place) by the mean delta (same length); returns lengths for the log."""
        # lr 1 must stay exact: multiplying first and adding then rounds once, as the plain sum does
        weights += delta if self.lr == 1 else self.lr * delta
        return self._lengths(norm(delta))

    def towards(self, weights, goal):
        """Move weights (float32 vector, in place) to a goal of the same length; with lr 1 they become it."""
        length = norm(goal, weights)
        if self.lr == 1:
            weights[:] = goal
        else:
            weights += self.lr * (goal - weights)
        return self._lengths(length)

    def _lengths(self, length):
        """Norms of the mean delta and of the step that was made of it."""
        return {"mean_norm": length, "step_norm": float(self.lr) * length}

    def state(self):
        return {}

    def restore(self, arrays):
        if arrays:
            raise ValueError("plain SGD keeps no state")


def norm(vector, start=None):
    """Euclidean norm of a float32 vector, or of its difference to another; in float64, by pieces that stay in cache."""
    total = 0.0
    for first in range(0, len(vector), PIECE):
        piece = vector[first : first + PIECE].astype(np.float64)
        if start is not None:
            piece -= start[first : first + PIECE]
        total += float(piece @ piece)
    return math.sqrt(total)


def build(section):
    """The optimiser that the configuration's server section names."""
    return {"sgd": SGD}[section.optimizer](section.lr)
