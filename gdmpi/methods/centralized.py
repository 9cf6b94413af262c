"""Centralised training, which federated averaging (arXiv 1602.05629) is measured against: all rows in one place.

    client 0  w_{t+1} <- training from w_t, on the rows of all clients

A round is as many steps as the clients of a federated round do together (train.steps times the cohort, or train.epochs
over all rows), so that equal rounds are equal tokens. It is one long training: the optimiser's moments are kept from
round to round, and no bytes are counted.
"""

from gdmpi import method
from gdmpi.config import Section


class Options(Section):
    """The method has no options of its own."""


class Server(method.VectorServer):
    def step(self, t):
        self.weights.vector[:] = self.mean.take()


class Client(method.Client):
    pooled = True

    def load(self, t, message):
        self.context.model.load(message)

    def local_update(self, t, ask=None):
        metrics = self.context.train(t, self.client)
        return method.Update(mean=self.context.model.leaves(), metrics=metrics)


def nbytes(config, schema, row):
    """Nothing counts: all is in one place."""
    return {"up": 0, "down": 0}
