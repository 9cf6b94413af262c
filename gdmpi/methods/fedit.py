"""FedIT (Shepherd, arXiv 2305.05644): both factors of LoRA are averaged, each client weighing by its examples.

    server    broadcast A_t, B_t
    client i  A_i, B_i <- local training from A_t, B_t, on the client's own rows
              send A_i - A_t, B_i - B_t
    server    A_{t+1} = A_t + sum_i n_i/n (A_i - A_t), and likewise B

The product of the means is not the mean of the products: show's aggregation error says how much is lost. The baseline
of this name in FLoRA's code averages nothing but one client (see FLoRA, arXiv 2409.05976, its repository of 2 January
2025); this one averages all.
"""

from gdmpi import method
from gdmpi.config import Section


class Options(Section):
    """The method has no options of its own."""


class Server(method.VectorServer):
    def step(self, t):
        return self.context.optimizer.step(self.weights.vector, self.mean.take())


class Client(method.DeltaClient):
    weighting = "examples"


def nbytes(config, schema, row):
    """A client sends how its factors changed and receives theirs, float32."""
    return {"up": schema.nbytes, "down": schema.nbytes}
