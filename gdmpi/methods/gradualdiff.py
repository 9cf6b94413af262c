"""GradualDiff-Fed (Faiyaz and Salman, arXiv 2506.19164): only what changed in the adapter travels.

    server    broadcast w_t
    client i  w_i <- local training from w_t, on the client's own rows
              send delta_i = w_i - w_t
    server    w_{t+1} = w_t + lr * sum_i p_i delta_i          p_i = 1/K in the paper; lr 1

w is the LoRA adapter alone, float32, one flat vector; the base model is frozen and never travels.
"""

from gdmpi import method
from gdmpi.config import Section


class Options(Section):
    """The method has no options of its own."""


class Server(method.VectorServer):
    def step(self, t):
        return self.context.optimizer.step(self.weights.vector, self.mean.take())


class Client(method.DeltaClient):
    """Trains from w_t and sends delta_i, as it stands in method.py."""


def nbytes(config, schema, row):
    """A client sends its delta and receives w, both float32."""
    return {"up": schema.nbytes, "down": schema.nbytes}
