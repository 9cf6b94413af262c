"""MPI: the only file that imports mpi4py. A Link is what a rank knows of the others and how it talks to them.

Rank 0 is the server, the others host clients; a single process is both. The rule that keeps a run from hanging: no
rank leaves a round alone. Whatever can fail is done between collectives, its exception kept, and the next vote()
tells all ranks at once. Behind that stand the abort hook (an exception that nobody voted on) and the watchdog.
"""

import importlib
import os
import pickle
import socket
import sys
import threading
import time
import warnings

import numpy as np

from gdmpi import flat, launcher, node
from gdmpi.errors import Paused, PeerError, UserError, describe
from gdmpi.watchdog import Watchdog

CHUNK = 1 << 22  # bytes a call carries at once: well under 2**31 elements; what MPI buffers stays small
SPINS, NAP = 3, 1e-5  # tests of a request before the first sleep between two tests, and that sleep in seconds
TAG_DATA, TAG_ASK, TAG_ANSWER, TAG_PROGRESS, TAG_ALARM = 1, 2, 3, 4, 5
HEADER = 5  # int64: status, round, bytes of a new schema (0: as before), bytes of the buffer, whether the run pauses
FINE, FAILED, STOPPED, PAUSED = 0, 1, 2, 3  # a rank's status: STOPPED left its training because another did
WORST = (PeerError, UserError, Paused)  # what all ranks raise if some of them end in different ways: the first of these


class Stopped(Exception):
    """Another rank failed or leaves, so this one ends its local training early; the vote says why."""


class Link(Watchdog):
    """One rank's view of the job: who it is, and the few ways in which buffers travel."""

    def __init__(self, comm):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.alone = self.size == 1
        self.is_server = self.rank == 0
        self.is_worker = self.alone or not self.is_server
        self.workers = [0] if self.alone else list(range(1, self.size))  # ranks that host clients
        self.host = socket.gethostname()
        self.place = f"rank {self.rank} @ {self.host}"
        self.schema, self.buffer = None, None  # of the last broadcast: they rarely change
        self.shared = False  # whether the ranks of a node share that buffer
        self.landing, self.direct = None, False  # landing.Landing of GPUs; whether MPI writes that message there
        self.node, self.leaders = [self.rank], None  # ranks of this node; communicator of all nodes' first ranks
        self.sent, self.notes_sent = 0, []  # progress notes sent to the server: their number, those under way
        self.waiting_since = time.monotonic()
        self.received = 0  # progress notes received by the server in this round
        self.alarms = []
        self.bytes_down = 0
        self.clock = None  # stopping.Clock, once a run has begun: then votes and steps heed signals
        self.wishes = False  # whether some rank wants the run to pause at the end of the round
        self.pausing = None  # why the run pauses after this round, once the server has said so

    def among(self, ranks):
        """A Link of some of the ranks, with the first of them as its server; elsewhere one of the rank by itself."""
        return Link(self.comm.Split(0 if self.rank in ranks else 1 + self.rank, self.rank))

    # ---- everyone together ------------------------------------------------------------------------------------

    def bcast(self, t, message=None, error=None, pausing=None):
        """The server's {name: array} for round t, at all ranks, as a Flat; read only, and valid until the exchange.

        The server passes message, or error when it failed: clients are already waiting here, so this is where
        they must learn of it. Raises PeerError at all ranks in that case. pausing, the server's too: why round t will
        not be played by this start; all ranks have it afterwards.
        """
        header, new = np.zeros(HEADER, np.int64), b""
        if self.shared:
            self.finish(self.comm.Ibarrier())  # nobody reads the last message any more: it is written over below
        if self.is_server and error is None:
            message = flat.pack(message)
            if message.schema != self.schema:
                self.schema, new = message.schema, message.schema.to_json().encode()
            header[:] = FINE, t, len(new), message.schema.nbytes, pausing is not None
        elif self.is_server:
            header[0] = FAILED
        self.finish(self.comm.Ibcast(header))
        if header[0] == FAILED:
            raise PeerError(self.share(describe(error, self.place) if self.is_server else None))
        if header[2]:
            text = np.frombuffer(new, np.uint8) if self.is_server else np.empty(header[2], np.uint8)
            self._bcast_bytes(text, self.comm)
            if not self.is_server:
                self.schema = flat.Schema.from_json(text.tobytes())
            self.direct = bool(self.landing and self.landing.direct and self.landing.takes(self.schema))
            memory = None if self.direct else self.common_memory(self.schema.nbytes)
            self.shared = memory is not None
            self.buffer = memory if self.shared else np.empty(0 if self.is_server else self.schema.nbytes, np.uint8)
        if header[4]:
            self.pausing = self.share(pausing)
        self._distribute(message.buffer if self.is_server else self.buffer)
        self.bytes_down = int(header[3])
        if self.landing and self.landing.device and self.landing.takes(self.schema):
            return self.landing.message(self.schema, message.buffer if self.alone else self.buffer, self.direct)
        return message if self.is_server else flat.Flat(self.schema, self.buffer)

    def common_memory(self, size, writable=False):
        """Bytes that the ranks of a node share, made by its first rank; None, at all ranks, if some node cannot."""
        hosts, memory, handle = self.agree(self.host), None, None
        self.node = [rank for rank, host in enumerate(hosts) if host == self.host]
        leads = self.rank == self.node[0]
        try:
            if leads and size:
                memory, handle = node.create(size)
        except OSError:
            pass
        handles = self.agree(handle)
        try:
            if not leads and handles[self.node[0]]:
                memory = node.join(handles[self.node[0]], size, writable)
        except OSError:
            pass
        everywhere = all(self.agree(memory is not None))
        if handle:
            node.close(handle)
        if self.leaders is None and len(set(hosts)) > 1:
            self.leaders = self.comm.Split(int(not leads), self.rank)
        return memory if everywhere else None

    def scratch(self, size):
        """Bytes at the server that the next broadcast writes over: the last one's memory, where ranks share that."""
        return self.buffer if self.shared and self.buffer.size == size else np.empty(size, np.uint8)

    def _distribute(self, data):
        """Bring the server's bytes to all ranks; of a node that shares memory, the first rank takes them."""
        if not self.shared:
            lands = self.direct and self.landing.device
            self._bcast_bytes(self.landing.free(len(data)) if lands else data, self.comm)
            return
        if self.is_server and len(self.node) > 1:
            np.copyto(self.buffer, data)
        if self.leaders is not None and self.rank == self.node[0]:
            self._bcast_bytes(data, self.leaders)
        self.finish(self.comm.Ibarrier())

    def vote(self, error=None, numbers=(0, 0)):
        """Tell all ranks whether this one failed and a few int64 numbers; returns [ranks, numbers] of all.

        Raises, at every rank, UserError if all who failed blame the input, else PeerError, with the first message;
        Paused if nobody failed and some rank was told by a signal to leave.
        """
        if error is None:
            error = self._told_to_leave()
        kinds = {type(None): FINE, Stopped: STOPPED, Paused: PAUSED}
        status = kinds.get(type(error), FAILED)
        mine = np.array([status, bool(self.clock and self.clock.finishing), *numbers], np.int64)
        everyone = np.empty((self.size, mine.size), np.int64)
        self.finish(self.comm.Iallgather(mine, everyone))
        if everyone[:, 0].any():
            # all ranks saw the same, so all of them come here: nobody waits in vain
            if (
                status == FAILED
                and not isinstance(error, UserError)
                and (type(error) is not PeerError or error.__cause__)
            ):
                self.on_failure(error)
            kind = Paused if status == PAUSED else UserError if isinstance(error, UserError) else PeerError
            blames = None if status in (FINE, STOPPED) else (WORST.index(kind), describe(error, self.place))
            failures = [blame for blame in self.agree(blames) if blame is not None]
            self._drain_alarms()
            worst = min(kind for kind, _ in failures)
            raise WORST[worst](next(text for kind, text in failures if kind == worst))
        self.wishes = self.wishes or everyone[:, 1].any()
        return everyone[:, 2:]

    def _told_to_leave(self):
        """A Paused if a signal has told this rank to leave the round at once."""
        name = self.clock and self.clock.leaving()
        return Paused(f"{name} at {self.place}") if name else None

    def together(self, work):
        """Do something that may fail on every rank, then vote; returns what work() returned here."""
        result = error = None
        try:
            result = work()
        except Exception as problem:
            error = problem
        self.wait()
        self.vote(error)
        return result

    def alarm(self):
        """Tell the others at once that this rank failed or leaves: they need not finish a long local training first."""
        if not self.alarms:  # one each: _drain_alarms counts on it
            self.alarms = [self.comm.isend(None, rank, TAG_ALARM) for rank in range(self.size) if rank != self.rank]

    def check(self):
        """Raise Paused if this rank is to leave, Stopped if another failed or leaves; cheap enough for every step."""
        from mpi4py import MPI

        if leave := self._told_to_leave():
            raise leave
        if not self.alone and self.comm.Iprobe(MPI.ANY_SOURCE, TAG_ALARM):
            raise Stopped

    def _drain_alarms(self):
        """Receive all alarms: none may be under way when MPI ends. How many there are, the ranks tell each other."""
        from mpi4py import MPI

        raised = self.agree(bool(self.alarms))
        for _ in range(sum(raised) - raised[self.rank]):
            self.comm.recv(None, MPI.ANY_SOURCE, TAG_ALARM)

    def maxima(self, values):
        """Element-wise maximum over all ranks of a float32 vector, in place."""
        from mpi4py import MPI

        self.finish(self.comm.Iallreduce(MPI.IN_PLACE, values, op=MPI.MAX))
        return values

    def reduce(self, part, comm=None):
        """Begin the sum over all ranks of an integer vector, at the server in place; finish() what it returns.

        The server passes zeros, or alone the sum of the clients that it hosts itself. comm: instead of all ranks.
        """
        from mpi4py import MPI

        ends = (MPI.IN_PLACE, part) if self.is_server else (part, None)
        return (comm or self.comm).Ireduce(*ends, op=MPI.SUM)

    def agree(self, thing):
        """A few hundred bytes from every rank, at every rank."""
        mine = np.frombuffer(pickle.dumps(thing), np.uint8)
        sizes = np.empty(self.size, np.int64)
        self.finish(self.comm.Iallgather(np.array([mine.size]), sizes))
        everyone = np.empty(sizes.sum(), np.uint8)
        self.finish(self.comm.Iallgatherv(mine, (everyone, sizes)))
        return [pickle.loads(part) for part in np.split(everyone, np.cumsum(sizes)[:-1])]

    def gather(self, thing):
        """A few hundred bytes from every rank, as a list at the server; None elsewhere."""
        mine = np.frombuffer(pickle.dumps(thing), np.uint8)
        sizes = np.empty(self.size, np.int64) if self.is_server else None
        self.finish(self.comm.Igather(np.array([mine.size]), sizes))
        everyone = np.empty(sizes.sum(), np.uint8) if self.is_server else None
        self.finish(self.comm.Igatherv(mine, (everyone, sizes) if self.is_server else None))
        return [pickle.loads(part) for part in np.split(everyone, np.cumsum(sizes)[:-1])] if self.is_server else None

    def share(self, thing=None):
        """A few hundred bytes from the server to all."""
        data = np.frombuffer(pickle.dumps(thing), np.uint8)
        size = np.array([data.size])
        self.finish(self.comm.Ibcast(size))
        data = data if self.is_server else np.empty(size[0], np.uint8)
        self.finish(self.comm.Ibcast(data))
        return pickle.loads(data)

    def _bcast_bytes(self, buffer, comm):
        for start in range(0, len(buffer), CHUNK):
            self.finish(comm.Ibcast(buffer[start : start + CHUNK]))
        return buffer

    def finish(self, request):
        """Complete a call without holding on to the core.

        MPI's blocking calls poll at full speed. Where ranks share cores, with each other or with a neighbour's job, a
        polling rank keeps the core from the one it waits for: a Reduce then takes a hundred times as long.
        """
        spins = 0
        while not request.Test():
            spins += 1
            if spins > SPINS:
                time.sleep(NAP)

    # ---- one to one -------------------------------------------------------------------------------------------

    def send(self, arrays, dest, tag=TAG_DATA, note=None):
        """Send {name: array} and a small note to a rank; returns the bytes of the arrays."""
        message = flat.pack(arrays)
        self.finish(self.comm.isend((message.schema.to_json(), note), dest, tag))
        for start in range(0, message.buffer.size, CHUNK):
            self.finish(self.comm.Isend(message.buffer[start : start + CHUNK], dest, tag))
        return message.buffer.size

    def recv(self, source, tag=TAG_DATA):
        """Receive what send() sent: (Flat, note)."""
        self.waiting_since = time.monotonic()
        while not self.comm.Iprobe(source, tag):
            self.doze()
        schema, note = self.comm.recv(None, source, tag)
        message = flat.Flat(flat.Schema.from_json(schema))
        for start in range(0, message.buffer.size, CHUNK):
            self.finish(self.comm.Irecv(message.buffer[start : start + CHUNK], source, tag))
        return message, note

    def asker(self, t, client):
        """The ask(question) -> answer of a client that talks to the server while it trains; ask(None) is its last."""

        def ask(question):
            self.send({} if question is None else question, 0, TAG_ASK, (t, client, question is None))
            self.waiting_since = time.monotonic()
            while not self.comm.Iprobe(0, TAG_ANSWER):
                if self._told_to_leave():
                    self.alarm()  # the server hears of it and sends everyone away
                self.doze()
            answer, error = self.recv(0, TAG_ANSWER)
            if error is not None:
                self.check()
                raise PeerError(error) if error else Stopped
            return answer

        return ask

    def answer(self, reply, source=None):
        """Serve a waiting question, of a rank or any, by reply(t, client, question or None); whether there was one."""
        from mpi4py import MPI

        status = MPI.Status()
        if not self.comm.Iprobe(MPI.ANY_SOURCE if source is None else source, TAG_ASK, status):
            return False
        question, (t, client, ended) = self.recv(status.source, TAG_ASK)
        try:
            self.send(reply(t, client, None if ended else question), status.source, TAG_ANSWER)
        except Exception as error:
            # the client waits for an answer: it gets the failure, and the vote at the round's end stops everyone
            self.send({}, status.source, TAG_ANSWER, "" if isinstance(error, Stopped) else describe(error, self.place))
            raise
        return True

    def progress(self, note):
        """A worker's small note on how far it is, for the server's bar; never waits."""
        # MPI reads the pickled note until the request is done, so requests are kept until then
        self.notes_sent = [request for request in self.notes_sent if not request.Test()]
        self.notes_sent.append(self.comm.isend(note, 0, TAG_PROGRESS))
        self.sent += 1

    def notes(self):
        """The progress notes that have arrived at the server."""
        from mpi4py import MPI

        while self.comm.Iprobe(MPI.ANY_SOURCE, TAG_PROGRESS):
            self.received += 1
            yield self.comm.recv(None, MPI.ANY_SOURCE, TAG_PROGRESS)

    def last_notes(self, count):
        """Receive what is still under way of the round's count notes: none may be left when MPI ends."""
        from mpi4py import MPI

        for _ in range(count - self.received):
            self.comm.recv(None, MPI.ANY_SOURCE, TAG_PROGRESS)
        self.received = 0

    # ---- waiting and stopping ---------------------------------------------------------------------------------

    def arrive(self):
        """Tell the others that this rank is here; all_here() of what it returns says whether they all are.

        The first collective after training is this barrier, tested between sleeps that grow with the wait: the
        calls behind it then find everyone there.
        """
        self.waiting_since = time.monotonic()
        return self.comm.Ibarrier()

    def all_here(self, request):
        """Whether every rank has arrived."""
        return request.Test()

    def doze(self, busy=False):
        """Sleep a moment between two tests: at most a twentieth of the time waited so far, and at most 5 ms."""
        if not busy:
            time.sleep(min(0.005, max(NAP, (time.monotonic() - self.waiting_since) / 20)))

    def wait(self):
        """Wait until every rank is here, without taking a core from them."""
        request = self.arrive()
        while not self.all_here(request):
            self.doze()


def start():
    """Start MPI and return the Link of this rank; UserError if launcher and library do not know each other."""
    import mpi4py

    mpi4py.rc.thread_level = "serialized"  # once it is initialised, only the main thread calls MPI
    with warnings.catch_warnings():
        # mpi4py warns when launcher and library do not match; below it is said in one line, as an error
        warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
        if launcher.speaks_pmi():
            # MPICH with UCX tells its address with what lies behind it in memory, 4 KiB in all, and packs zeros; lines
            # that are long for want of them are too long for Slurm's PMI, and the ranks wait for ever. A new thread's
            # memory, malloc's arena of its own, is zeros still.
            thread = threading.Thread(target=importlib.import_module, args=("mpi4py.MPI",))
            thread.start()
            thread.join()
        from mpi4py import MPI

    comm, told = MPI.COMM_WORLD, launcher.size()
    if told > 1 and comm.size == 1:
        raise UserError(
            f"launched as {told} tasks, MPI sees 1: use srun --mpi=pmix|pmi2, or reinstall mpi4py against the loaded "
            f"MPI module (this one uses {MPI.Get_library_version().splitlines()[0].split(',')[0].strip()})"
        )
    link = Link(comm)
    sys.excepthook = _abort_hook(link, comm)
    return link


def _abort_hook(link, comm):
    """An exception that nobody voted on would leave the others waiting for ever in MPI_Finalize: Abort ends them."""

    def hook(kind, error, trace):
        if issubclass(kind, KeyboardInterrupt):
            print(f"{link.place}: interrupted", file=sys.stderr, flush=True)
        else:
            print(f"gdmpi: {describe(error, link.place)}", file=sys.stderr, flush=True)
            link.on_failure(error.with_traceback(trace))
        sys.stdout.flush()
        if link.alone:
            os._exit(1)
        comm.Abort(1)

    return hook
