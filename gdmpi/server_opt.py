"""Server optimisers: how the mean of the clients' deltas moves the global state (Reddi et al., arXiv 2003.00295)."""

import numpy as np


class SGD:
    """w += lr * delta. The delta points towards improvement, so there is no minus; lr 1 is federated averaging."""

    def __init__(self, lr):
        self.lr = np.float32(lr)

    def step(self, weights, delta):
        """Move weights (float32 vector, in place) by the mean delta (same length)."""
        # lr 1 must stay exact: multiplying first and adding then rounds once, as the plain sum does
        weights += delta if self.lr == 1 else self.lr * delta

    def towards(self, weights, goal):
        """Move weights (float32 vector, in place) to a goal of the same length; with lr 1 they become it."""
        if self.lr == 1:
            weights[:] = goal
        else:
            weights += self.lr * (goal - weights)

    def state(self):
        return {}

    def restore(self, arrays):
        if arrays:
            raise ValueError("plain SGD keeps no state")


def build(section):
    """The optimiser that the configuration's server section names."""
    return {"sgd": SGD}[section.optimizer](section.lr)
