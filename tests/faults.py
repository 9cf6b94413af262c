"""Run gdmpi with one fault built in: python tests/faults.py FAULT run CONFIG ..., or within(FAULT) (the tests do)."""

import contextlib
import os
import shutil
import signal
import sys
import time

import numpy as np

from gdmpi import bases, build, checkpoint, evaluate, landing, launcher, mpi, schedule, train
from gdmpi.__main__ import main
from gdmpi.methods import gradualdiff, split

RANK = launcher.rank()
told = []  # signals already sent


@contextlib.contextmanager
def within(name):
    """One fault in this process, for the time of a with block."""
    classes = (gradualdiff.Client, gradualdiff.Server, schedule.Sync, train.Trainer)
    saved = [(owner, vars(owner).copy()) for owner in (bases, build, checkpoint, evaluate, landing, *classes)]
    told.clear()
    globals()[name]()
    try:
        yield
    finally:
        for owner, attributes in saved:
            for key, value in vars(owner).copy().items():
                if key not in attributes:  # it was inherited
                    delattr(owner, key)
                elif value is not attributes[key]:
                    setattr(owner, key, attributes[key])


def before(owner, name, action):
    """Have action(*args) happen before each call of owner.name."""
    real = getattr(owner, name)

    def call(*args, **kwargs):
        action(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, call)


def nothing():
    """No fault."""


def lands_from_host_memory():
    """Clients' own memory is taken for that of a GPU."""
    landing.gpu_of = lambda trainable: trainable and trainable.device
    landing.says_cuda = lambda link: False


def lands_by_mpi():
    lands_from_host_memory()
    landing.says_cuda = lambda link: True


def client_raises():
    def action(trainer, t, client, *more, **named):
        if (t, client) == (2, 1):
            raise MemoryError("no memory left on the device")

    before(train.Trainer, "__call__", action)


def client_out_of_memory():
    """torch has no type of its own for memory that the CPU lacks."""

    def action(trainer, t, client, *more, **named):
        if (t, client) == (2, 1):
            import torch

            torch.empty(1 << 60, dtype=torch.uint8)

    before(train.Trainer, "__call__", action)


def client_raises_early():
    """Client 1 fails at once; the others would train for minutes."""

    def slow(trainer, t, client, *more, **named):
        if client == 1:
            raise MemoryError("no memory left on the device")
        for _ in range(6000):
            time.sleep(0.01)
            trainer.on_step(client, 1, 2, 10)

    before(train.Trainer, "__call__", slow)


def server_raises():
    def action(server, t):
        if t == 2:
            raise ArithmeticError("cannot step")

    before(gradualdiff.Server, "step", action)


def answer_raises():
    def action(server, t, client, question):
        if (t, client) == (2, 1):
            raise ArithmeticError("no answer to this")

    before(split.Server, "answer", action)


def broadcast_raises():
    def action(server, t, client=None):
        if t == 3:
            raise KeyError("weights")

    before(gradualdiff.Server, "broadcast", action)


def evaluation_raises():
    real = evaluate.losses
    calls = []

    def losses(*args):
        calls.append(1)
        if RANK == 1 and len(calls) == 2:
            raise RuntimeError("cannot evaluate")
        return real(*args)

    evaluate.losses = losses


def nan_in_delta():
    real = gradualdiff.Client.local_update

    def local_update(client, t, ask=None):
        update = real(client, t, ask)
        if (t, client.client) == (2, 2):
            update.mean.vector[5] = np.nan
        return update

    gradualdiff.Client.local_update = local_update


def outside_any_vote():
    def action(*args, **kwargs):
        if RANK == 1:
            raise ZeroDivisionError("nobody votes on this")

    before(schedule.Sync, "_agree", action)


def hang():
    """Client 1 hangs in round 2; the timeout of the start, which may be slow, does not hold for rounds."""
    phase = mpi.Link.phase
    mpi.Link.phase = lambda link, seconds: phase(link, seconds if link.clock is None or not link.clock.began else 5)

    def action(trainer, t, client, *more, **named):
        if (t, client) == (2, 1):
            time.sleep(1000)

    before(train.Trainer, "__call__", action)


def killed():
    def action(trainer, t, client, *more, **named):
        if (t, client) == (2, 1):
            os.kill(os.getpid(), signal.SIGKILL)

    before(train.Trainer, "__call__", action)


def told_to_leave():
    """Rank 1 is told as it begins to train in round 2; alone, the one process is."""

    def action(trainer, t, client, *more, **named):
        if t == 2 and RANK <= 1 and told == []:
            told.append(os.kill(os.getpid(), signal.SIGUSR1))

    before(train.Trainer, "__call__", action)


def server_told_to_leave():
    """The server is told while the others train."""

    def action(rounds, error, tally):
        if RANK == 0 and told == [] and rounds.link.clock.taken:
            told.append(os.kill(os.getpid(), signal.SIGTERM))

    before(schedule.Sync, "_serve", action)


def told_at_the_start():
    def action(link, config, train=True):
        os.kill(os.getpid(), signal.SIGUSR1)

    before(build, "build", action)


def directory_vanishes():
    def action(directory, state):
        if state.round == 2:
            shutil.rmtree(directory)

    before(checkpoint, "write", action)


def client_disk_full():
    def action(directory, client, t, arrays, over):
        if (t, client) == (2, 1):
            raise OSError(28, "No space left on device")

    before(checkpoint, "write_client", action)


def disk_full():
    def action(directory, state):
        if state.round == 2:
            raise OSError(28, "No space left on device")

    before(checkpoint, "write", action)


def base_maker_killed():
    """Who makes the base is killed when all of it is written and it has no name yet."""
    before(bases, "_rename", lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def base_maker_raises():
    def action(*_):
        raise ArithmeticError("cannot write")

    before(bases, "_write", action)


def own_caches():
    """Of four ranks, the last two are on a second node, which has a cache of its own."""
    node = RANK // 2
    mpi.socket.gethostname = lambda: f"node{node}"
    real = bases.find
    bases.find = lambda cache, *rest: real(f"{cache}-{node}", *rest)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
