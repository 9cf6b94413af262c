"""Run gdmpi and kill it at an exact place: python tests/places.py PLACE NTH RANK WHO MARK run ... (kills.py starts it).

The rank kills itself with SIGKILL when it passes the place for the n-th time; with WHO all it first kills every process
of its job, the launcher too. Before that it makes the file MARK. Names of gdmpi that a place needs and that are gone
end the program with an AttributeError, so no place is lost unnoticed.
"""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from faults import before

from gdmpi import build, checkpoint, data, forward, launcher, libraries, mpi, record, results, schedule, summing, train
from gdmpi.__main__ import main
from gdmpi.methods import gradualdiff

TOKEN = "GDMPI_KILLS_JOB"  # an environment variable that every process of a job carries, whatever its session
ROUNDS, KEEP = 5, 2  # of the runs that are killed

PLACES = {}


@dataclass(frozen=True)
class Place:
    """Where to kill: what is there, which ranks pass it (server, client, any), when, how often a round, and its hook.

    when: always; start, if rounds are left; resume, if clients' state is put back; back, if an older round file is
    resumed; round; end.
    """

    title: str
    role: str
    when: str
    often: int
    install: callable


def place(title, role, when, often=1):
    """Enter a function that takes hit() and sees to it that hit is called whenever the place is passed."""

    def enter(install):
        PLACES[install.__name__] = Place(title, role, when, often, install)
        return install

    return enter


def after(owner, name, action):
    """Have action(*args) happen after each call of owner.name."""
    real = getattr(owner, name)

    def call(*args, **kwargs):
        result = real(*args, **kwargs)
        action(*args, **kwargs)
        return result

    setattr(owner, name, call)


def on(hit, wanted=lambda *args, **kwargs: True):
    """An action that hits if the call's arguments are the wanted ones."""

    def action(*args, **kwargs):
        if wanted(*args, **kwargs):
            hit()

    return action


def of_server(path, *args):
    """Whether a path is that of a round file, or of one that is being written."""
    return path.name.startswith("round-") and path.parent.parent.name != "clients"


def of_client(path, *args):
    """Whether a path is that of a client's file, or of one that is being written."""
    return path.name.startswith("round-") and path.parent.parent.name == "clients"


def called(name):
    """A test whether a path has this name."""
    return lambda path, *args: path.name == name


def beginning():
    """A list that holds something while a resume brings the run's files back."""
    inside = []
    before(record.Record, "bring_back", lambda *args: inside.append(True))
    after(record.Record, "bring_back", lambda *args: inside.clear())
    return inside


def in_file(which):
    """A test whether checkpoint._put(group, ...) writes into such a file."""
    return lambda group, *args: which(Path(group.file.filename))


# ---- startup --------------------------------------------------------------------------------------------------------


@place("startup: before MPI starts", "any", "always")
def before_mpi(hit):
    before(mpi, "start", on(hit))


@place("startup: MPI has started", "any", "always")
def after_mpi(hit):
    after(mpi, "start", on(hit))


@place("startup: before torch and transformers are imported", "client", "start")
def before_imports(hit):
    before(libraries, "load", on(hit))


@place("startup: they are imported", "client", "start")
def after_imports(hit):
    after(libraries, "load", on(hit))


@place("startup: the directory is made", "server", "start")
def directory_made(hit):
    after(record, "open_directory", on(hit))


@place("startup: preparing the data", "server", "start")
def data_prepared(hit):
    after(data, "read", on(hit))


@place("startup: all is built", "any", "start")
def built(hit):
    after(build, "build", on(hit))


@place("resume: a client's state is read", "client", "resume")
def client_read(hit):
    after(checkpoint, "read_client", on(hit))


@place("resume: before metrics.csv and audit.jsonl are brought back", "server", "always")
def begin_before(hit):
    before(record.Record, "bring_back", on(hit))


@place("resume: between metrics.csv and audit.jsonl", "server", "always")
def begin_between(hit):
    inside = beginning()
    after(Path, "replace", on(hit, lambda path, *args: inside and path.name == "metrics.csv.part"))


@place("resume: before audit.jsonl is renamed", "server", "resume")
def begin_audit(hit):
    inside = beginning()
    before(Path, "replace", on(hit, lambda path, *args: inside and path.name == "audit.jsonl.part"))


@place("resume: newer round files are being dropped", "server", "back")
def begin_dropping(hit):
    inside = beginning()
    before(Path, "unlink", on(hit, lambda path, *args, **kwargs: inside and of_server(path)))


@place("resume: all is brought back", "server", "always")
def begin_after(hit):
    after(record.Record, "bring_back", on(hit))


# ---- rounds: training, evaluation, exchange -------------------------------------------------------------------------


@place("training: a step", "client", "round", 3)
def step(hit):
    before(train.AdamW, "step", on(hit))


@place("evaluation: a batch", "client", "round")
def evaluation(hit):
    before(forward.Forward, "losses", on(hit, lambda self, rows, ids: not self.model.training))


@place("exchange: before the maxima", "any", "round")
def maxima(hit):
    before(mpi.Link, "maxima", on(hit))


@place("exchange: before Reduce", "any", "round")
def reduce(hit):
    before(summing.Sum, "reduce", on(hit))


@place("exchange: before the server steps", "server", "round")
def server_step(hit):
    before(gradualdiff.Server, "step", on(hit))


@place("exchange: before Bcast", "any", "round")
def publish(hit):
    before(schedule.Sync, "publish", on(hit))


# ---- rounds: what is written ----------------------------------------------------------------------------------------


@place("client's file: between two data sets", "client", "round", 3)
def client_inside(hit):
    before(checkpoint, "_put", on(hit, in_file(of_client)))


@place("client's file: complete, not synced", "client", "round")
def client_unsynced(hit):
    before(checkpoint, "sync", on(hit, lambda path: of_client(path)))


@place("client's file: an old one renamed, to be written over", "client", "round")
def client_reused(hit):
    after(Path, "replace", on(hit, lambda path, *args: of_client(path) and path.suffix == ".h5"))


@place("client's file: before its rename", "client", "round")
def client_unnamed(hit):
    before(Path, "replace", on(hit, lambda path, *args: of_client(path) and path.suffix == ".part"))


@place("client's file: after its rename", "client", "round")
def client_renamed(hit):
    after(Path, "replace", on(hit, lambda path, *args: of_client(path) and path.suffix == ".part"))


@place("between the clients' files and the server's", "server", "round")
def between(hit):
    before(checkpoint, "write", on(hit))


@place("round file: between two data sets", "server", "round", 20)
def round_inside(hit):
    before(checkpoint, "_put", on(hit, in_file(of_server)))


@place("round file: complete, not synced", "server", "round")
def round_unsynced(hit):
    before(checkpoint, "sync", on(hit, of_server))


@place("round file: before its rename", "server", "round")
def round_unnamed(hit):
    before(Path, "replace", on(hit, of_server))


@place("round file: after its rename", "server", "round")
def round_renamed(hit):
    after(Path, "replace", on(hit, of_server))


@place("between round file and metrics row", "server", "round")
def round_written(hit):
    after(checkpoint, "write", on(hit))


@place("metrics.csv: before its rename", "server", "round")
def metrics_unnamed(hit):
    inside = beginning()
    before(Path, "replace", on(hit, lambda path, *args: not inside and path.name == "metrics.csv.part"))


@place("between metrics.csv and audit.jsonl", "server", "round")
def metrics_renamed(hit):
    inside = beginning()
    after(Path, "replace", on(hit, lambda path, *args: not inside and path.name == "metrics.csv.part"))


class Torn:
    """A file whose first write stops in the middle."""

    def __init__(self, file, hit):
        self.file, self.hit = file, hit

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, text):
        """Write the first half, which is on the disk when hit() comes, then the rest."""
        half = len(text) // 2
        self.file.write(text[:half])
        self.file.flush()
        self.hit()
        self.file.write(text[half:])


@place("audit.jsonl: in the middle of a line", "server", "round")
def audit_torn(hit):
    real = Path.open

    def opened(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        return Torn(file, hit) if path.name == "audit.jsonl" and mode == "a" else file

    Path.open = opened


@place("before old round files are deleted", "server", "round")
def prune(hit):
    before(checkpoint, "prune", on(hit))


@place("an old round file is deleted", "server", "round")
def pruned(hit):
    inside = beginning()
    after(Path, "unlink", on(hit, lambda path, **kwargs: not inside and of_server(path) and path.suffix == ".h5"))


# ---- the end --------------------------------------------------------------------------------------------------------


@place("end: what only older rounds needed is deleted", "client", "end")
def last_prune(hit):
    before(checkpoint, "prune_clients", on(hit, lambda directory, oldest, client: oldest > ROUNDS - KEEP))


@place("end: before the adapter's directory", "server", "end")
def export_before(hit):
    before(results, "write", on(hit))


@place("end: the adapter's weights before their rename", "server", "end")
def export_unnamed(hit):
    before(Path, "replace", on(hit, called("adapter_model.safetensors.part")))


@place("end: between the adapter's weights and its configuration", "server", "end")
def export_between(hit):
    after(Path, "replace", on(hit, called("adapter_model.safetensors.part")))


@place("end: after the adapter's directory", "server", "end")
def export_after(hit):
    after(results, "write", on(hit))


# ---- killing --------------------------------------------------------------------------------------------------------


def processes(token):
    """{process id: command line} of the job with this token, without the caller."""
    found, mark = {}, f"{TOKEN}={token}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # gone meanwhile, or not ours
    return found


def kill(numbers):
    """SIGKILL for these processes; those that are gone are fine."""
    for number in numbers:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue


def install(name, nth, who, mark):
    """Have this process kill itself, or its job, when it passes a place for the n-th time."""
    passed = 0

    def hit():
        nonlocal passed
        passed += 1
        if passed != nth:
            return
        Path(mark).touch()
        if who == "all":
            kill(processes(os.environ[TOKEN]))
        os.kill(os.getpid(), signal.SIGKILL)

    PLACES[name].install(hit)


if __name__ == "__main__":
    name, nth, rank, who, mark, *words = sys.argv[1:]
    if launcher.rank() == int(rank):
        install(name, int(nth), who, mark)
    sys.exit(main(words))
