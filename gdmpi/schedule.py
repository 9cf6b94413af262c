"""Synchronous rounds, server half and client half side by side: one Bcast, one Reduce, every rank in step.

The calls of a round, in the order in which every rank makes them (the order is what keeps them from deadlock):

    train_round     wait, vote, maxima, Reduce      (per_client: one message a client instead of the last two)
    publish         Bcast of the next round's message, or of the server's failure
"""

import contextlib
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3

from gdmpi import codecs, flat, method, mpi, summing
from gdmpi.errors import PeerError, locate


@dataclass
class Tally:
    """What a round cost and said.

    seconds: by part; at the server answer, too: of the local training's, those in which it answered questions.
    bytes_up: of one client's update. sent: {client: {examples, weight, metrics}} of this rank's clients, of those that
    ask also the bytes that they asked and were answered. step: what server.step returned, at the server.
    """

    seconds: dict = field(default_factory=lambda: dict.fromkeys(("train", "exchange", "server", "answer"), 0.0))
    bytes_up: int = 0
    sent: dict = field(default_factory=dict)
    step: dict = field(default_factory=dict)

    def audit(self, held):
        """Note the hash of what each client sent; when the exchange is over, while the server is busy.

        It is BLAKE3 over the client's weighted update in float32, before the common grid rounds it. Its memory may be
        the model's own, which the next message goes into.
        """
        for update in held.items:
            digest = blake3(update.mean.buffer).update(update.individual.buffer).hexdigest()
            self.sent[update.client]["blake3"] = digest


class Held:
    """Updates of a rank's clients, kept until the common grid is known; beyond a budget of bytes on disk."""

    def __init__(self, budget):
        self.budget, self.used, self.items = budget, 0, []
        self.schema, self.maxima = None, None

    def add(self, update, mean, maxima, copy):
        """Keep an update, its mean as a Flat; copy says that its memory is written again before it is encoded."""
        if self.schema not in (None, mean.schema):
            raise TypeError("the clients of a round sent arrays of different names or shapes")
        self.schema = mean.schema
        self.maxima = maxima if self.maxima is None else np.maximum(self.maxima, maxima)
        update.mean, update.individual = mean, flat.pack(update.individual)
        if copy:
            update.mean, update.individual = self._copy(mean), self._copy(update.individual)
        self.items.append(update)

    def _copy(self, arrays):
        self.used += arrays.buffer.nbytes
        buffer = np.empty_like(arrays.buffer) if self.used <= self.budget else _on_disk(arrays.buffer.size)
        buffer[...] = arrays.buffer
        return flat.Flat(arrays.schema, buffer)


def _send_away(*question):
    raise mpi.Stopped


def _on_disk(size):
    if size == 0:
        return np.empty(0, np.uint8)
    with tempfile.TemporaryFile() as file:  # the mapping keeps the unnamed file alive
        return np.memmap(file, np.uint8, "w+", shape=(size,))


class Sync:
    """Plays rounds in step. server is None on client ranks; clients is {id: Client} of this rank, maybe none."""

    def __init__(self, link, server, clients, config, per_client, asks):
        self.link, self.server, self.clients = link, server, clients
        self.weighting, self.budget = config.method.weighting, config.exchange.hold_mb << 20
        self.per_client, self.asks = per_client, asks  # static, from the classes: never decided by a first message
        self.codec, self.sum, self.mean = None, None, None  # kept over rounds: fresh memory costs page faults
        self.on_progress = None  # the server's callback for workers' notes
        self.turns, self.hosts = [], []  # clients elsewhere whose questions are to come, in turn; every client's rank
        self.around = contextlib.nullcontext  # around(t): what this rank's training of round t runs in
        self.saving = None  # the server's record.Background: the last round on its way to the disk

    def publish(self, t, error=None, pausing=None):
        """Broadcast what clients need to begin round t and return it; a server's failure reaches all here.

        pausing: why this start of the run ends before round t, if the server decides so.
        """
        message = None
        if self.server and error is None:
            try:
                message = self.server.broadcast(t)
            except Exception as problem:
                error = problem
                self._note_failure(t, error)
        return self.link.bcast(t, message, error, pausing)

    def train_round(self, t, message, cohort, hosts):
        """Train the cohort, bring the updates to the server and step it; returns (Tally, the server's failure).

        cohort: client ids, ascending. hosts: rank of each client. Raises at all ranks if any failed in saving the last
        round or in local training, or was told to leave; a failure of the server after the exchange is returned, for
        publish() to announce.
        """
        tally, start = Tally(), time.perf_counter()
        mine = [client for client in cohort if hosts[client] == self.link.rank]
        self.turns, self.hosts = [client for client in cohort if hosts[client] != self.link.rank], hosts
        held, error = self._train(t, message, mine, tally)
        arrived = time.perf_counter()
        tally.seconds["train"] = arrived - start
        weight = sum(update.weight for update in held.items)
        fingerprint = int(held.schema.sha256[:15], 16) if held.schema else 0
        votes = self.link.vote(error, (weight, fingerprint))
        exchange = self._gather if self.per_client else self._reduce
        failure = exchange(held, cohort, hosts, votes, tally)
        exchanged = time.perf_counter()
        tally.seconds["exchange"] = exchanged - arrived
        if self.server and failure is None:
            try:
                tally.step = self.server.step(t) or {}
            except Exception as problem:
                failure = problem
        if failure is not None:
            self._note_failure(t, failure)
        tally.seconds["server"] = time.perf_counter() - exchanged
        tally.audit(held)
        return tally, failure

    # ---- local training ---------------------------------------------------------------------------------------

    def _train(self, t, message, mine, tally):
        """Train this rank's clients, then wait for the others; returns (Held, the exception if one failed)."""
        held, error, where = Held(self.budget), None, f"round {t}: before local training on"
        try:
            with self.around(t):
                for client in mine:
                    where = f"round {t}: client {client} on"
                    self._train_one(t, client, message, held, tally, copy=len(mine) > 1)
                where = f"round {t}: after local training on"
        except Exception as problem:
            # kept, not raised: the others are on their way to the vote, and would wait there for ever
            locate(problem, where)
            error = problem
        if error is not None and not isinstance(error, mpi.Stopped):
            self.link.alarm()
        request = self.link.arrive()
        while not self.link.all_here(request):
            try:
                busy = self._serve(error, tally)
            except Exception as problem:
                if error is None:
                    locate(problem, f"round {t}: server on")
                    error = problem  # the barrier must still be completed before the vote tells the others
                    if not isinstance(error, mpi.Stopped):
                        self.link.alarm()
            else:
                self.link.doze(busy)
        if self.saving:  # the step writes over what is being saved; and who stops here wants it to be saved
            failure = self.saving.failure(wait=True)
            error = error or failure
        return held, error

    def _train_one(self, t, client, message, held, tally, copy):
        self.clients[client].load(t, message)
        note = {"asked": 0, "answered": 0} if self.asks else {}
        ask = self._asker(t, client, note, tally) if self.asks else None
        update = self.clients[client].local_update(t, ask)
        if self.asks:
            ask(None)
        update.client = client
        update.weight = update.examples if self.weighting == "examples" else 1
        mean = flat.pack(update.mean)
        maxima = None
        if not self.per_client:
            maxima = codecs.maxima(mean, update.weight)
            finite = np.isfinite(maxima).all()
        else:
            arrays = [*update.mean.values(), *update.individual.values()]
            finite = all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f")
        if not finite:
            raise FloatingPointError("the update is not finite; a lower train.lr or train.clip_norm may help")
        held.add(update, mean, maxima, copy)
        tally.sent[client] = {"examples": update.examples, "weight": update.weight, "metrics": update.metrics, **note}

    def _asker(self, t, client, note, tally):
        """The ask(question) -> answer of a client, that counts the bytes of both in note; ask(None) ends its turn."""
        elsewhere = None if self.link.is_server else self.link.asker(t, client)

        def ask(question):
            if question is None:
                return elsewhere and elsewhere(None)
            question = flat.pack(question)
            if elsewhere:
                answer = elsewhere(question)
            else:
                began = time.perf_counter()
                answer = flat.pack(self.server.answer(t, client, question))
                tally.seconds["answer"] += time.perf_counter() - began
            note["asked"] += question.schema.nbytes
            note["answered"] += answer.schema.nbytes
            return answer

        return ask

    def _serve(self, error, tally):
        """What a rank does while others train; returns whether it did something.

        It looks whether it should leave, and, being the server, whether the last round is saved; it moves the bar and
        replies to a question, or after an error sends away who asks: he may wait for one who will never come.
        """
        if error is None:
            self.link.check()
            if self.saving and (failure := self.saving.failure()):
                raise failure
        if self.link.alone or not self.server:
            return False
        if self.on_progress:
            for note in self.link.notes():
                self.on_progress(note)
        if not self.asks:
            return False
        in_turn = error is None and self.server.in_turn and self.turns
        began = time.perf_counter()
        # a rank trains its clients in ascending order too, so that it asks for the one whose turn it is
        source = self.hosts[self.turns[0]] if in_turn else None
        answered = self.link.answer(self._answer if error is None else _send_away, source)
        tally.seconds["answer"] += (time.perf_counter() - began) * answered
        return answered

    def _answer(self, t, client, question):
        if question is None:
            self.turns.remove(client)
            return {}
        return self.server.answer(t, client, question)

    # ---- the exchange -----------------------------------------------------------------------------------------

    def _reduce(self, held, cohort, hosts, votes, tally):
        """The exact sum of all updates at the server, decoded to their mean and aggregated."""
        codec = self._agree(held, votes, len(cohort))
        maxima = np.zeros(codec.blocks, np.float32) if held.maxima is None else held.maxima
        exponents = codec.exponents(self.link.maxima(maxima))
        vectors, weight = [update.mean.vector for update in held.items], int(votes[:, 0].sum())
        self.sum.reduce(
            [chunk.span.stop - chunk.span.start for chunk in codec.chunks],
            encode=lambda k, part: codec.encode(vectors, exponents, codec.chunks[k], part),
            decode=lambda k, part: codec.decode(part, exponents, weight, codec.chunks[k], self.mean.vector),
        )
        tally.bytes_up = codec.nbytes()
        if not self.server:
            return None
        try:
            self.server.aggregate(method.Update(mean=self.mean, weight=weight))
        except Exception as problem:
            return problem
        return None

    def _agree(self, held, votes, participants):
        """The codec for this round's arrays, and the buffers for it; made anew only when names or shapes change."""
        fingerprints = set(votes[votes[:, 1] != 0, 1].tolist())
        known = self.codec and int(self.codec.schema.sha256[:15], 16)
        if fingerprints == {known} and self.codec.clients == participants:
            return self.codec
        # all ranks saw the same votes and keep the same codec, so all of them come here together
        texts = self.link.agree(held.schema and held.schema.to_json())
        schemas = {text for text in texts if text}
        if len(schemas) != 1:
            raise PeerError("the clients of a round sent arrays of different names or shapes")
        self.codec = codecs.Exact(flat.Schema.from_json(schemas.pop()), participants)
        self.sum = summing.Sum(self.link, self.codec.empty().size, self.codec.dtype)
        # the message that this round began with is read by nobody any more: its memory is the mean's
        self.mean = flat.Flat(self.codec.schema, self.link.scratch(self.codec.schema.nbytes)) if self.server else None
        return self.codec

    def _gather(self, held, cohort, hosts, votes, tally):
        """One message a client, ascending: each rank sends in the order in which the server receives."""
        failure, mine = None, {update.client: update for update in held.items}
        for client in cohort:
            if client in mine:
                update = mine[client]
                arrays = flat.pack(
                    {f"mean/{name}": array for name, array in update.mean.items()}
                    | {f"individual/{name}": array for name, array in update.individual.items()}
                )
                note = {"examples": update.examples, "weight": update.weight, "metrics": update.metrics}
                tally.bytes_up = arrays.schema.nbytes
                if not self.link.is_server:
                    self.link.send(arrays, 0, note=note)
            if not self.server:
                continue
            if hosts[client] != self.link.rank:
                arrays, note = self.link.recv(hosts[client])
                tally.bytes_up = arrays.schema.nbytes
            if failure is None:  # after a failure the rest is received all the same: the senders wait for it
                failure = self._take(client, arrays, note)
        return failure

    def _take(self, client, arrays, note):
        parts = {"mean": {}, "individual": {}}
        for name, array in arrays.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = array
        try:
            self.server.aggregate(method.Update(**parts, **note, client=client))
        except Exception as problem:
            return problem
        return None

    def _note_failure(self, t, error):
        locate(error, f"round {t}: server on")
        self.link.on_failure(error)
