"""What a round's exchange costs on this cluster: gdmpi's whole round without training, bare MPI, and the naive way.

They take turns, so that whatever else the machine does hits all alike; a round takes as long as its slowest rank."""

import functools
import itertools
import os
import sys
import time

import numpy as np

from gdmpi import config as configuration, flat, method, schedule, server_opt
from gdmpi.errors import UserError
from gdmpi.methods import gradualdiff

LAYERS, HIDDEN, WIDE = 6, 288, 768  # a Llama of 15 million parameters
LINEAR = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}  # its linear layers: inputs, outputs
LINEAR |= {"mlp.gate_proj": (HIDDEN, WIDE), "mlp.up_proj": (HIDDEN, WIDE), "mlp.down_proj": (WIDE, HIDDEN)}
PER_RANK = LAYERS * sum(inputs + outputs for inputs, outputs in LINEAR.values())  # parameters of LoRA with r = 1
WARM_UP = 1  # rounds that do not count: names and shapes travel, memory is touched for the first time
BUDGET = 10  # seconds after which a way has shown enough: ranks that spin on shared cores take half a minute a round
TIMEOUT = 600  # seconds after which a round counts as hung


def run(link, parameters, rounds):
    """Time all ways and give the lines of a table. Every rank calls it and draws all lines; rank 0 prints them."""
    if parameters < 1 or rounds < 1:
        raise UserError(f"bench: parameters and rounds are at least 1, not {parameters} and {rounds}")
    schema = adapter(parameters)
    ways = link.together(lambda: {name: setup(link, schema) for name, setup in WAYS.items()})
    seconds = {name: [] for name in ways}
    for t in range(1, WARM_UP + rounds + 1):
        for name in [name for name, taken in seconds.items() if sum(taken) <= BUDGET]:
            with link.phase(TIMEOUT):
                # the barrier that takes no core: in a blocking one, ranks that share cores would spin
                link.wait()
                start = time.perf_counter()
                ways[name](t)
                # all ranks keep the same times, and so leave the same rounds out
                seconds[name].append(max(link.agree(time.perf_counter() - start)))
    yield from table(
        link, schema, link.agree(link.host), {name: taken[WARM_UP:] or taken for name, taken in seconds.items()}
    )


def adapter(parameters):
    """The schema of a Llama's LoRA adapter on all linear layers, its rank such that it has so many parameters."""
    rank, rest = divmod(parameters, PER_RANK)
    entries = []
    for layer, (name, (inputs, outputs)) in itertools.product(range(LAYERS if rank else 0), LINEAR.items()):
        path = f"base_model.model.model.layers.{layer}.{name}"
        entries.append((f"{path}.lora_A.weight", np.float32, (rank, inputs)))
        entries.append((f"{path}.lora_B.weight", np.float32, (outputs, rank)))
    return flat.Schema(entries + ([("rest", np.float32, (rest,))] if rest else []))


def values(schema, seed):
    """Random values of a schema, as a Flat."""
    filled = flat.Flat(schema)
    np.random.default_rng(seed).standard_normal(out=filled.vector, dtype=np.float32)
    return filled


def bare(link, schema, waiting=False):
    """The same bytes through two blocking calls; or through the link, which does not spin, so shared cores get on."""
    down, up = values(schema, 0), np.ones(schema.nbytes // 4, np.int32)

    def play(t):
        if waiting:
            link._bcast_bytes(down.buffer, link.comm)
            link.finish(link.reduce(up))
        else:
            link.comm.Bcast(down.vector)
            link.comm.Reduce(*((None, up) if link.is_server else (up, None)))  # None at the server: in place

    return play


class Untrained:
    """Stands in for views.Trainable: loads and subtracts as it does, but always stands where training left it once."""

    def __init__(self, schema, seed):
        self.schema, self.vector, self.host = schema, values(schema, 0).vector, flat.Flat(schema)
        self.trained = values(schema, seed).vector

    def load(self, message):
        np.copyto(self.vector, message.vector)

    def delta(self, start):
        np.subtract(self.trained, start.vector, out=self.host.vector)
        return self.host


def own(link, schema):
    """gdmpi's synchronous round with its real server and client: all of it but training, evaluation and the files."""
    config, cohort, server, clients, failure = configuration.Config(), range(len(link.workers)), None, {}, None
    if link.is_server:
        context = method.Context(len(cohort), values(schema, 0), server_opt.build(config.server))
        server = gradualdiff.Server(gradualdiff.Options(), context)
    if link.is_worker:
        client = link.workers.index(link.rank)
        context = method.Context(
            len(cohort), model=Untrained(schema, 1 + client), train=lambda *_: {}, examples={client: 1}
        )
        clients = {client: gradualdiff.Client(gradualdiff.Options(), context, client)}
    rounds = schedule.Sync(link, server, clients, config, gradualdiff.Server.per_client, gradualdiff.Client.asks)

    def play(t):
        nonlocal failure
        _, failure = rounds.train_round(t, rounds.publish(t, failure), cohort, link.workers)

    return play


def naive(link, schema):
    """State dicts as they are: pickled, broadcast and gathered, averaged at rank 0; not even loaded into a model."""
    import torch

    mine = {name: torch.tensor(array) for name, array in values(schema, link.rank).items()}

    def play(t):
        link.comm.bcast(mine if link.is_server else None)
        states = link.comm.gather(mine if link.is_worker else None) or ()
        for name in mine if link.is_server else ():
            torch.stack([state[name] for state in states if state]).mean(0)

    return play


WAYS = {
    "bare MPI: Bcast, Reduce": bare,
    "bare MPI, waiting as gdmpi does": functools.partial(bare, waiting=True),
    "gdmpi's round, without training": own,
    "naive: pickled state dicts": naive,
}


def table(link, schema, hosts, seconds):
    """The lines: where it ran, a row for each way, and what follows."""
    library = sys.modules[type(link.comm).__module__].Get_library_version()  # mpi.py alone imports mpi4py
    library = " ".join(library.splitlines()[0].split(",")[0].split())
    size = f"{schema.nbytes // 4:,} parameters in {len(schema.entries)} tensors, {schema.nbytes / 1e6:.1f} MB"
    yield f"{library}; ranks {link.size}, hosts {len(set(hosts))}; {size}"
    yield f"{'a round of':32}{'rounds':>7}{'median ms':>11}{'10-90 %':>18}{'to bare':>9}"
    medians = [1000 * np.median(taken) for taken in seconds.values()]
    for (name, taken), median in zip(seconds.items(), medians, strict=True):
        spread = "{:.2f}-{:.2f}".format(*1000 * np.percentile(taken, (10, 90)))
        ratio = "-" if link.alone else f"{median / min(medians[:2]):.2f}"  # to the quicker of the two
        yield f"{name:32}{len(taken):7}{median:11.2f}{spread:>18}{ratio:>9}"
    yield f"the naive way takes {medians[3] / medians[2]:.1f} times as long as gdmpi's round"
    cores, most = len(os.sched_getaffinity(0)), max(hosts.count(host) for host in hosts)
    if link.alone:
        yield "one process: nothing travels; start it under mpirun -n 6 or srun for numbers that mean something"
    elif most > cores:
        yield f"{most} ranks share {cores} cores: who waits in a blocking call there takes a core from who works"
