"""Local training alone, which federated averaging (arXiv 1602.05629) must beat: each client by itself, nothing travels.

    client i  w_i <- training from w_i, on the client's own rows          w_i = w_0 before its first round

Each client's adapter is evaluated on all held-out rows, or with files of its own on its own; a round's losses are the
means over the clients.
"""

from gdmpi import flat, method
from gdmpi.config import Section


class Options(Section):
    """The method has no options of its own."""


class Server(method.Server):
    def broadcast(self, t, client=None):
        return self.context.initial if t == 1 else {}

    def aggregate(self, update):
        """There is nothing in it."""

    def step(self, t):
        """There is nothing to step."""

    def adapter(self):
        """There is none."""


class Client(method.PersonalClient):
    weights = None

    def load(self, t, message):
        if self.weights is None:
            self.weights = flat.pack(message).copy()
        self.context.model.load(self.weights)

    def local_update(self, t, ask=None):
        metrics = self.context.train(t, self.client)
        self.weights = self.context.model.values()
        return method.Update(examples=self.context.examples[self.client], metrics=metrics)


def nbytes(config, schema, row):
    """Nothing travels once all have begun."""
    return {"up": 0, "down": 0}
