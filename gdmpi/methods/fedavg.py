"""Federated averaging (McMahan et al., arXiv 1602.05629): what is trained travels itself, not what changed in it.

    server    broadcast w_t
    client i  w_i <- local training from w_t, on the client's own rows
              send w_i
    server    w_{t+1} = sum_i p_i w_i          p_i = 1/K, or n_i/n with method.weighting: examples as in the paper

w is the LoRA adapter (FedIT, arXiv 2305.05644), or with model.adapter.kind: full the whole model. Up to rounding it is
what gradualdiff gives, since the mean of w_t + delta_i is w_t plus the mean of delta_i; server.lr moves only a part of
the way.
"""

from gdmpi import method
from gdmpi.config import Section


class Options(Section):
    """The method has no options of its own."""


class Server(method.VectorServer):
    def step(self, t):
        return self.context.optimizer.towards(self.weights.vector, self.mean.take())


class Client(method.Client):
    def load(self, t, message):
        self.context.model.load(message)

    def local_update(self, t, ask=None):
        metrics = self.context.train(t, self.client)
        return method.Update(
            mean=self.context.model.leaves(), examples=self.context.examples[self.client], metrics=metrics
        )


def nbytes(config, schema, row):
    """A client sends and receives w, float32."""
    return {"up": schema.nbytes, "down": schema.nbytes}
