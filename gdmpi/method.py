"""The interface of a federated method: both halves in one file of gdmpi/methods, called by the schedule, never by MPI.

A round, as the schedule plays it:

    message = server.broadcast(t)                      rank 0, then Bcast
    client.load(t, message)                            every client of the cohort
    update = client.local_update(t)
    server.aggregate(update); server.step(t)           rank 0, once the updates' mean (or each update) is there

Beside Options, Server and Client a method's file may have two more names, for conformance.py alone:

    EXAMPLE = {"train.lr": 0.01, "method.beta": 0.5}   settings, as on the command line, with which the demo learns

    def nbytes(config, schema, row):                   what the method promises to send, by its formula
        return {"up": schema.nbytes, "down": schema.nbytes}

nbytes gives the bytes of a client in a round. config: the run's Config. schema: flat.Schema of what is trained (with
exchange.what merged of the model). row: the round's, as in show --json; of it "round", "clients" (of the cohort),
"steps" and "seen_tokens" may matter. up: the elements of update.mean, 4 bytes each in the sum of up to 64 clients, and
update.individual as it is. down: the message after the round, that of round + 1.
"""

import difflib
import functools
import hashlib
import importlib
import math
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gdmpi import flat, rng
from gdmpi.errors import UserError

FOLDER = Path(__file__).parent / "methods"


@dataclass
class Update:
    """What a client's local training sends, or the sum of several that the network made.

    mean: {name: float32 array} of which only the weighted mean over clients matters; Reduce applies to these.
    individual: {name: array} that the server sees client by client; only for methods with per_client.
    examples: number of rows it was trained on; weighs if method.weighting says so.
    metrics: {name: number} for the log. weight: the weight it was given, or of a sum the sum of weights.
    client: whose it is, None for a sum.
    """

    mean: dict = field(default_factory=dict)
    individual: dict = field(default_factory=dict)
    examples: int = 1
    metrics: dict = field(default_factory=dict)
    weight: int = 1
    client: int | None = None


@dataclass
class Context:
    """What the program lends to a method. On the server model is None, unless the method's Server says that it has one.

    scale: what LoRA multiplies B A by. initial: Flat, the trainable state before round 1, equal on all ranks.
    optimizer: the server's, on flat vectors. model: gdmpi.views.Trainable, shared by all clients of the rank that have
    the same base. train: a train.Trainer; train(t, client, part=0) -> metrics runs local training of the loaded model
    on the client's rows, of one of its parts, and train.descend() steps on any other loss, also of the server's model.
    section: of the configuration, train. weighting: uniform, or examples. examples: {client: rows}. stream:
    stream(purpose, round, client) is a numpy Generator; fork, with the same arguments, a context in which torch's own
    generators begin anew by them, for dropout. public: data.Rows that everybody may see, where the Server says so;
    vocabulary: how many tokens the tokenizer has.
    """

    clients: int
    initial: flat.Flat | None = None
    optimizer: Any = None
    model: Any = None
    train: Any = None
    section: Any = None
    weighting: str = "uniform"
    examples: dict = field(default_factory=dict)
    stream: Any = None
    fork: Any = None
    scale: float = 1.0
    public: Any = None
    vocabulary: int = 0


class Mean:
    """A running weighted mean of updates: a single one, as Reduce makes it, passes through untouched."""

    def __init__(self):
        self.sum, self.weight = None, 0

    def add(self, update):
        """Take in update.mean, a mean over update.weight."""
        arrays = flat.pack(update.mean)
        if self.weight == 0:
            self.first, self.sum, self.weight = arrays, None, update.weight
            return
        if self.sum is None:
            self.sum = self.first.vector.astype(np.float64) * self.weight
        self.sum += arrays.vector.astype(np.float64) * update.weight
        self.weight += update.weight

    def take(self):
        """The mean so far as one float32 vector, and begin anew."""
        vector = self.first.vector if self.sum is None else (self.sum / self.weight).astype(np.float32)
        self.__init__()
        return vector


class Server(ABC):
    """The half on rank 0. It never sees a row of the clients'."""

    schedules = ("sync",)  # those under which the method is correct; the program refuses others at the start
    models = False  # True: the server has a model, context.model, of its own also where clients share its process
    public = False  # True: there are public rows, context.public, that the server and all clients see: data.public
    per_client = False  # True: updates arrive one by one (gathered), not as the mean that Reduce makes; or f(options)
    in_turn = False  # True: answer() has all questions of a client before the first of the next, in ascending order

    def __init__(self, options, context):
        self.options, self.context = options, context

    @staticmethod
    def travels(options, public, vocabulary):
        """(down, up): bytes of a client in a round, if they follow from the public rows and the size of the vocabulary.

        None where what travels is what is trained.
        """

    @abstractmethod
    def broadcast(self, t, client=None):
        """{name: array}: what a client needs to begin round t."""

    @abstractmethod
    def aggregate(self, update):
        """Take in an Update: the mean over the cohort, or with per_client each one, by ascending client."""

    @abstractmethod
    def step(self, t):
        """Fold what was aggregated into the global state; returns {name: number} for the log, or None."""

    def answer(self, t, client, question):
        """Reply {name: array} to a client's question {name: array}; only for clients with asks."""

    @abstractmethod
    def adapter(self):
        """Flat: the global adapter as it stands; hashed every round, exported at the end."""

    def state(self):
        """{name: array or Flat}: all that a resumed run needs to give the same bits."""
        return {}

    def restore(self, arrays):
        """Put back what state() gave."""


class VectorServer(Server):
    """A server whose global state is what is trained, as one flat vector: a method of one step() for the rest."""

    def __init__(self, options, context):
        super().__init__(options, context)
        self.weights, self.mean = context.initial, Mean()

    def broadcast(self, t, client=None):
        return self.weights

    def aggregate(self, update):
        self.mean.add(update)

    def adapter(self):
        return self.weights

    def state(self):
        return {"weights": self.weights, **self.context.optimizer.state()}

    def restore(self, arrays):
        arrays = dict(arrays)
        self.weights.buffer[:] = arrays.pop("weights").buffer
        self.context.optimizer.restore(arrays)


class Client(ABC):
    """The half of one client. Several may live on a rank; they share context.model, so load() must set all of it."""

    weighting = "uniform"  # what method.weighting: auto means: every client counts the same; or "examples", by its rows
    parts = ("",)  # what is trained apart: weights whose names hold such a text; what holds none of them is frozen
    rebases = False  # True: the base changes, so what comes out is a whole model; adapter() has LAYER.delta for it
    incremental = False  # True: a message only says what changed since the last, so each rank loads every one, in order
    asks = False  # True: local_update() asks the server, whose answer() replies while the clients train
    pooled = False  # True: one client has the rows of all, and as many steps as all together; others there are none
    # True: each client has a model of its own, adapter(), which is evaluated by itself. With Server.models there is a
    # global one too: what the server's model holds between rounds, and adapter() gives, is evaluated at the server
    personal = False
    mixed = False  # True: clients may have different base models with one tokenizer, model.others

    def __init__(self, options, context, client):
        self.options, self.context, self.client = options, context, client

    @staticmethod
    def sends(options, model, schema):
        """Schema of what an update holds, for a model of any weights and the schema of what is trained in it.

        Raises UserError if the options do not fit the model.
        """
        return schema

    @abstractmethod
    def load(self, t, message):
        """Put the global state into the model; evaluation uses it too.

        The message is read only, others' too, and gone once local_update() has returned.
        """

    @abstractmethod
    def local_update(self, t, ask=None):
        """Train and return an Update; ask(question) -> answer talks to the server, where the method does."""

    def adapter(self):
        """Flat: the client's own adapter as it stands; only of methods that are personal.

        Their state() has it as weights, where it is read when the run is over; PersonalClient keeps it so.
        """

    def state(self):
        """{name: array or Flat}: what the client keeps between rounds, saved by the rank that hosts it."""
        return {}

    def restore(self, arrays):
        """Put back what state() gave."""


class DeltaClient(Client):
    """A client that trains what it is sent and sends how that has changed, start being what it was."""

    def load(self, t, message):
        self.start = message
        self.context.model.load(message)

    def local_update(self, t, ask=None):
        metrics = self.context.train(t, self.client)
        delta = self.context.model.delta(self.start)
        return Update(mean=delta, examples=self.context.examples[self.client], metrics=metrics)


class PersonalClient(Client):
    """A client whose own adapter, weights, outlives the rounds."""

    personal = True

    def adapter(self):
        return self.weights

    def state(self):
        return {"weights": self.weights}

    def restore(self, arrays):
        self.weights = arrays["weights"]


def options(config):
    """The method's own options, as its Options, from a whole Config."""
    own = {name: value for name, value in config.method.model_dump().items() if name not in {"name", "weighting"}}
    return load(config.method.name).Options.model_validate(own)


def context(config, **lent):
    """The Context of a run's Config, with what else is lent."""

    def stream(purpose, round=0, client=0):
        return rng.stream(config.run.seed, f"method/{purpose}", round, client)

    def fork(purpose, round=0, client=0):
        return rng.torch_fork(config.run.seed, f"method/{purpose}", round, client)

    adapter = config.model.adapter
    scale = adapter.alpha / (math.sqrt(adapter.r) if adapter.rslora else adapter.r)
    about = {"section": config.train, "weighting": config.method.weighting}
    return Context(config.clients.count, stream=stream, fork=fork, scale=scale, **about, **lent)


def available():
    """Names of the methods: the files of the folder."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def is_file(name):
    """Whether method.name is a path to a file of one's own, rather than the name of a method of this package."""
    return name.endswith(".py")


def there(name):
    """Whether a method's file is there; that of a run may be gone since."""
    return not is_file(name) or Path(name).is_file()


def load(name):
    """The module of a method, which defines Options, Server and Client: of this package, or a path to a file NAME.py.

    Raises UserError for an unknown name or a file that cannot be loaded.
    """
    if is_file(name):
        return _load_file(str(Path(name).absolute()))[0]
    if name not in available():
        close = difflib.get_close_matches(name, available(), 1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(available())}, or a path to a file"
        raise UserError(f"method.name: unknown method {name!r}; {hint}")
    return importlib.import_module(f"gdmpi.methods.{name}")


@functools.cache
def _load_file(path):
    """(module, SHA-256 of the very bytes that run: no bytecode of an older version is looked at)."""
    if not Path(path).is_file():
        raise UserError(f"method.name: there is no file {path}")
    module = types.ModuleType(f"gdmpi_method_{Path(path).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # where dataclasses and pydantic look up what annotations name
    try:
        source = Path(path).read_bytes()
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:
        raise UserError(f"method.name: {path} cannot be loaded: {type(error).__name__}: {error}") from None
    missing = [name for name in ("Options", "Server", "Client") if not hasattr(module, name)]
    if missing:
        raise UserError(f"method.name: {path} does not define {' and '.join(missing)}")
    return module, hashlib.sha256(source).hexdigest()


def sha256(name):
    """SHA-256 of the file of a method of one's own, as it was loaded; None for a method of this package."""
    return _load_file(str(Path(name).absolute()))[1] if is_file(name) else None


def same(name, began):
    """UserError if the file of a method is not the one, by its SHA-256 or None, that a run began with."""
    if began and sha256(name) != began:
        raise UserError(
            f"method.name: {name} is not the file that the run began with (its SHA-256 was {began[:12]}, now it is "
            f"{str(sha256(name))[:12]}); put that one back, or start a new run"
        )


def title(name, digest):
    """A method's name for people; of a file of one's own with the beginning of its SHA-256."""
    return f"{Path(name).name} (SHA-256 {digest[:12]})" if digest else name
