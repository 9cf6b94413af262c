"""Where the server's message lies on a rank's GPU: once a round, however many clients of the rank load it.

From host memory it is copied there when the first of them loads it. An MPI that can write into GPU memory does so
itself, and host memory is filled only if somebody reads the message there. Whether MPI can, it is asked first, as one
that cannot crashes at such an address; and then a message is sent, and looked at, before any other goes that way.
"""

import ctypes
import functools
import sys

import numpy as np

from gdmpi import flat, hosting, model

TRIED = 1 << 20  # values of the message that is sent to see whether MPI writes into GPU memory
CUDA = 0  # MPICH's number for that kind of GPU, MPIX_GPU_SUPPORT_CUDA


class Landing:
    """Memory on a rank's GPU for the last message.

    device: torch's; None at a rank without a GPU, which needs to know of direct and limit all the same. limit: bytes of
    the largest message that lands; others stay in host memory. direct: whether MPI writes it there.
    """

    def __init__(self, device, limit):
        self.device, self.limit, self.direct = device, limit, False
        if device is not None:
            import torch

            self.memory = torch.empty(limit, dtype=torch.uint8, device=device)

    def takes(self, schema):
        """Whether a message of this schema lands: then it does at all ranks that have a GPU."""
        return schema.is_vector and schema.nbytes <= self.limit

    def free(self, size):
        """The first bytes of the memory, once the GPU has done with the message that was there."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.memory[:size]

    def message(self, schema, buffer, written):
        """A message in host memory, buffer, as a Flat that lies on the GPU, too.

        written: MPI has put it on the GPU, and not into buffer.
        """
        import torch

        there, here = self.memory[: schema.nbytes], torch.from_numpy(buffer)
        if written:
            return flat.Flat(schema, buffer, lambda end: here.copy_(there), lambda: there.view(torch.float32))
        return flat.Flat(schema, buffer, there=functools.cache(lambda: there.copy_(here).view(torch.float32)))


def gpu_of(trainable):
    """The device of a Trainable or None, if it is a GPU; else None."""
    return trainable.device if trainable is not None and trainable.device.type == "cuda" else None


def lands(config):
    """Whether clients load the message as it is, and it is small beside the model."""
    return not (model.changes_base(config) or hosting.rebases(config))


def choose(link, config, trainable):
    """Give the link its Landing, if clients have GPUs; returns [a line on how messages get there]."""
    device = gpu_of(trainable)
    devices = link.agree(device is not None)
    if not (any(devices) and lands(config)):
        return []
    limit = max(link.agree(0 if trainable is None else trainable.schema.nbytes))
    link.landing = link.together(lambda: Landing(device, limit))
    if link.alone or not config.exchange.cuda_aware:
        return []
    if not (all(devices[rank] for rank in link.workers) and all(link.agree(says_cuda(link)))):
        return ["messages reach the GPUs through host memory (this MPI does not say that it writes there)"]
    if arrives(link):
        return ["messages go straight to the GPUs (this MPI says that it writes there, and did)"]
    return ["messages reach the GPUs through host memory (this MPI says that it writes there, but did not)"]


def says_cuda(link):
    """Whether the MPI library says that it takes addresses of GPU memory as it runs here.

    Open MPI, MPICH and what derives from them answer MPIX_Query_cuda_support or MPIX_GPU_query_support.
    """
    library = ctypes.CDLL(sys.modules[type(link.comm).__module__].__file__)  # mpi.py alone imports mpi4py
    if hasattr(library, "MPIX_Query_cuda_support"):
        return library.MPIX_Query_cuda_support() == 1
    supported = ctypes.c_int(0)
    if hasattr(library, "MPIX_GPU_query_support"):
        library.MPIX_GPU_query_support(CUDA, ctypes.byref(supported))
    return bool(supported.value)


def arrives(link):
    """Send a message straight to the GPUs; whether it came there as it was sent, which decides how others go."""
    link.landing.direct = True
    values = np.random.default_rng(0).standard_normal(min(TRIED, link.landing.limit // 4), np.float32)
    try:
        message = link.bcast(0, {"tried": values} if link.is_server else None)
    except Exception as error:  # others may wait in the same broadcast: no vote can be held, and the job ends
        raise RuntimeError(f"this MPI cannot write into GPU memory, set exchange.cuda_aware=false: {error}") from error
    came = not message.there or np.array_equal(message.there().cpu().numpy(), values)
    link.landing.direct = all(link.agree(came))
    link.schema = None  # the next message's way is chosen anew
    return link.landing.direct
