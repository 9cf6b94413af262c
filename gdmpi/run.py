"""One run, top to bottom: build, rounds, evaluation, round files. Resuming is a run that starts with a state."""

import contextlib
import functools
import gc
import math
import resource
import time

from gdmpi import (
    answers,
    build,
    checkpoint,
    evaluate,
    events,
    flat,
    generate,
    hosting,
    method,
    profiling,
    record,
    results,
    schedule,
    server_opt,
    speed,
    spread,
    stopping,
    train,
)
from gdmpi.errors import Paused, UserError, locate

PROGRESS_EVERY = 0.2  # seconds between a client's notes to the bar
TALK = ("asked", "answered")  # bytes of a client's questions and of their answers, in the note on what it sent


def play(link, config, log, state=None, history=(), go_on=False):
    """Run a configuration from its beginning, or from the state of a round file, to its last round.

    log: log.Log. state: checkpoint.Round to resume from. go_on: this is one of several starts of a run, which a batch
    system repeats until the run is done. Returns the record of the run (record.Record) at the server, None elsewhere.
    Raises UserError, PeerError or Paused on all ranks alike.
    """
    directory = config.directory
    link.clock = stopping.Clock(config.run.grace, config.run.time_limit)
    link.together(lambda: (events.check(config), generate.check(config)) if link.is_server else None)
    made = link.together(lambda: record.open_directory(directory, state, log, go_on) if link.is_server else ())
    try:
        with link.phase(config.run.timeout):
            parts = build.build(link, config)
            generate.fits(link, parts)
            if state:
                link.together(lambda: build.check_fit(parts, state))
            server, clients, trainer = roles(link, parts, state)
    except (UserError, Paused) as early:
        log.close()
        if not (go_on and isinstance(early, Paused)):  # the next start of a batch job counts on what this one left
            for path in made:
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        raise
    link.errors_directory = directory / "errors"
    for key, (old, new) in (item for entry in history for item in entry["changes"].items()):
        log.say(f"changed since round {state.round}: {key} {old} -> {new}")
    for line in parts.reasons:
        log.say(line)
    if state and state.about["processor"] != parts.about["processor"]:
        moved = f"from {state.about['processor']} to {parts.about['processor']}"
        parts.about["warnings"].append(f"resumed on another processor ({moved}): the last bits may differ")
    parts.about["warnings"] += hosting.unequal(parts.config, parts.about["rows"].values())
    config, done = parts.config, state.round if state else 0
    rounds = schedule.Sync(link, server, clients, config, **static(config))
    rounds.on_progress = log.progress if log.interactive else None
    watched = link.share(log.interactive)
    _follow_steps(link, trainer, (log.progress if link.alone else link.progress) if watched else None)
    traced = profiling.round_of(done, config.run.rounds) if config.run.profile else None
    if traced and trainer:
        rounds.around = functools.partial(_trace, trainer, traced, profiling.path(directory, link.rank, traced))
    book = record.Record(config, parts, link.size, state, history, log) if link.is_server else None
    rounds.saving = record.Background() if book else None
    link.together(lambda: book.begin(done if state else None) if book else None)

    gc.freeze()  # what the start made stays, and need not be looked through again
    gc.enable()
    ended = time.perf_counter()
    with link.phase(config.run.timeout):
        message = follow(parts, clients, done + 1, rounds.publish(done + 1))
        if any(client.personal for client in clients.values()):  # who takes part later must know where all began
            for client in clients.values():
                client.load(done + 1, message)
        if state is None:
            row = assess(link, parts, server, clients, message, 0, schedule.Tally(), [])
            kept = _keep_clients(link, directory, clients, trainer, 0, config.run.keep)
            ended = time.perf_counter()
            _commit(rounds, book, row, kept)
    for t in range(done + 1, config.run.rounds + 1):
        link.clock.round_begins()
        cohort = hosting.cohort(config, t)
        if book:
            log.round_bar(t, config.run.rounds, sum(book.steps_of(client) for client in cohort))
        with link.phase(config.run.timeout):
            tally, failure = rounds.train_round(t, message, cohort, parts.hosts)
            published = time.perf_counter()
            message = rounds.publish(t + 1, failure, _why_pause(link) if t < config.run.rounds else None)
            follow(parts, clients, t + 1, message)
            tally.seconds["exchange"] += time.perf_counter() - published
            row = assess(link, parts, server, clients, message, t, tally, cohort, trainer)
            kept = _keep_clients(link, directory, clients, trainer, t, config.run.keep)
        if book:
            # from one round's end to the next: the clients train on while the server writes the round file
            began, ended = ended, time.perf_counter()
            row["seconds"]["total"] = ended - began
        _commit(rounds, book, row, kept)
        if t == traced:
            log.say(f"traced: {profiling.path(directory, '*', t)}, to be opened in https://ui.perfetto.dev")
        if link.pausing:
            break
    why, link.clock = link.pausing, None  # from here on a signal comes too late to change anything
    link.vote(rounds.saving.failure(wait=True) if book else None)
    if why:
        raise Paused(why)
    for client in clients:  # the last round is safe: what only older ones needed can go
        checkpoint.prune_clients(directory, config.run.rounds - config.run.keep + 1, client)
    link.together(lambda: book.end(server, kept) if book else None)
    return book


def roles(link, parts, state=None):
    """This rank's server or None, its {id: Client}, and its Trainer or None, with a round's state put back.

    Raises at all ranks what a method says against the settings or the state.
    """
    return link.together(functools.partial(_roles, link, parts, state))


def _roles(link, parts, state):
    config, module, options = parts.config, method.load(parts.config.method.name), method.options(parts.config)
    server, clients, trainer = None, {}, None
    shared = {"public": parts.public, "vocabulary": parts.vocabulary}
    if link.is_server:
        own = parts.server_model and train.Trainer(parts.server_model, config, {})
        lent = {"optimizer": server_opt.build(config.server), "model": parts.server_model, "train": own}
        server = module.Server(options, method.context(config, initial=parts.initial, **lent, **shared))
    if link.is_worker:
        trainer = train.Trainer(parts.trainable, config, parts.rows, parts.others)
        examples = {client: len(rows) for client, rows in parts.rows.items()}
        for client in (c for c, host in enumerate(parts.hosts) if host == link.rank):
            lent = {"model": parts.model_of(client), "train": trainer, "examples": examples}
            clients[client] = module.Client(options, method.context(config, **lent, **shared), client)
    if state is None:
        return server, clients, trainer
    if server:
        server.restore(state.server)
    for client, about in state.clients.items():
        if int(client) not in clients:
            continue
        arrays = checkpoint.read_client(config.directory / "clients", int(client), state.round, about["sha256"])
        own = {name.removeprefix("method."): a for name, a in arrays.items() if name.startswith("method.")}
        clients[int(client)].restore(own)
        moments = {name.removeprefix("train."): a for name, a in arrays.items() if name.startswith("train.")}
        if moments:
            trainer.moments[int(client)] = moments
    return server, clients, trainer


def static(config):
    """What a schedule must know of the method before the first message, as its arguments."""
    return {"per_client": hosting.gathers(config), "asks": method.load(config.method.name).Client.asks}


def _trace(trainer, traced, target, t):
    """What round t's local training runs in: a trace that goes to target in round traced, else nothing."""
    return profiling.traced(trainer, target) if t == traced else contextlib.nullcontext()


def _follow_steps(link, trainer, tell):
    """After each step look whether another rank has failed, and tell(note) the bar, if there is one, how far we are."""
    last = 0.0

    def on_step(client, done, steps, tokens):
        nonlocal last
        link.check()
        now = time.monotonic()
        if tell and (now - last > PROGRESS_EVERY or done == steps):
            last = now
            tell((client, done, steps, tokens))

    if trainer:
        trainer.on_step = on_step


def score(link, parts, clients, message, t, kind, measure=None, total=evaluate.total):
    """evaluate.Score on the held-out rows of a kind, at the server; None elsewhere. All ranks call it.

    measure: instead of evaluate.losses, what gives the ranks' parts; total: what it comes to.
    """
    measure = measure or evaluate.losses

    def work():
        held = parts.held_out.get(kind, ())
        if hosting.personal(parts.config):
            return _score_each(parts, clients, message, t, held, measure) | _score_served(parts, kind, measure)
        mine = [(key, rows, wanted) for key, rows, wanted in held if len(wanted)]
        part = {}
        if mine:
            loader = next(iter(clients.values()), None) or observer(parts)
            loader.load(t, message)
        for key, rows, wanted in mine:
            for number, value in measure(parts.trainable, rows, wanted).items():
                part[f"{key}/{number}"] = value
        return part

    parts_of_all = link.gather(link.together(work))
    return total(parts_of_all) if link.is_server else None


def _score_each(parts, clients, message, t, held, measure):
    """The sums of this rank's clients, each with its own adapter: on all batches, or on those of its own file."""
    part = {}
    for number, client in clients.items():
        client.load(t, message)
        for key, rows, _ in held:
            if key in ("pool", "file", number):
                batches = measure(parts.model_of(number), rows, range(len(evaluate.plan(rows))))
                part |= {f"{number}/{key}/{batch}": value for batch, value in batches.items()}
    return {"clients": part}


def _score_served(parts, kind, measure):
    """The sums of the global model beside the clients' own, at the server that has it: of all batches."""
    part = {}
    for key, rows, wanted in parts.served.get(kind, ()):
        part |= {f"{key}/{batch}": value for batch, value in measure(parts.server_model, rows, wanted).items()}
    return {"served": part}


def follow(parts, clients, t, message):
    """Load a message that builds on those before it, also where it is not needed yet; returns it."""
    if parts.trainable and method.load(parts.config.method.name).Client.incremental:
        (next(iter(clients.values()), None) or observer(parts)).load(t, message)
    return message


def observer(parts):
    """A client that only loads, for ranks that evaluate but host nobody."""
    lent = method.context(parts.config, model=parts.trainable)
    return method.load(parts.config.method.name).Client(method.options(parts.config), lent, -1)


def assess(link, parts, server, clients, message, t, tally, cohort, trainer=None):
    """Evaluate the state after round t and gather what the ranks have to say: the round's row, at the server."""
    begin, config = time.perf_counter(), parts.config
    evaluated = t % config.run.eval_every == 0 or t == config.run.rounds
    validation = score(link, parts, clients, message, t + 1, "validation") if evaluated else None
    test = score(link, parts, clients, message, t + 1, "test") if t == config.run.rounds else None
    due = ["validation"] * evaluated + ["test"] * (t == config.run.rounds) if config.evaluation.labels else []
    answered = {kind: score(link, parts, clients, message, t + 1, kind, answers.right, answers.share) for kind in due}
    generated = None
    if config.evaluation.generate and t == config.run.rounds:
        # before the round is saved: a run that is killed here comes back to here
        ask, path = functools.partial(score, link, parts, clients, message, t + 1), config.directory / generate.FILE
        generated = generate.held_out(link, config, ask, path)
    of_test = generate.part(config) == "test"
    device = parts.trainable.device if parts.trainable else None
    notes = link.gather(
        {
            "sent": tally.sent,
            "own": {client: flat.sha256(half.adapter()) for client, half in clients.items() if half.personal},
            "sketches": (trainer and trainer.sketches) or {},
            "train": trainer.seconds if trainer else 0.0,
            "notes": link.sent,
            "memory": train.peak_memory(device),
            "peak": speed.peak(device),
        }
    )
    link.sent = 0
    if trainer:
        trainer.seconds = 0.0
        trainer.sketches = None if trainer.sketches is None else {}
    if not link.is_server:
        return None
    sent = {client: note for each in notes for client, note in each["sent"].items()}
    link.last_notes(sum(each["notes"] for each in notes))
    own = {client: digest for each in notes for client, digest in each["own"].items()}
    adapter = results.digest(server.adapter(), own)
    metrics = [note["metrics"] for note in sent.values()]
    tokens = sum(m["tokens"] for m in metrics)
    base, trained = parts.about["base_parameters"], parts.about["trainable_parameters"]
    travels = not hosting.pooled(config)
    talked = [round(sum(note.get(key, 0) for note in sent.values()) / max(1, len(cohort))) for key in TALK]
    slowest = max(each["train"] for each in notes)
    loss = validation.loss if validation and validation.tokens else None
    return {
        "round": t,
        "train_loss": math.fsum(m["loss"] * m["tokens"] for m in metrics) / tokens if tokens else None,
        "eval_loss": loss,
        "eval_perplexity": None if loss is None else evaluate.perplexity(loss),
        "eval_clients": validation.clients if validation else None,
        "eval_clients_accuracy": answered.get("validation", [None])[-1],
        "eval_groups": validation.groups if validation else None,
        "eval_token_accuracy": None if loss is None else validation.accuracy,
        "eval_bits_per_byte": None if loss is None else validation.bits_per_byte,
        "eval_accuracy": None if loss is None else answered.get("validation", [None])[0],
        "eval_generated": None if of_test else generated,
        "clients": len(cohort),
        "bytes_up_per_client": tally.bytes_up * travels + talked[0],
        "bytes_down_per_client": link.bytes_down * travels + talked[1] if t else 0,
        "seconds": {
            "total": 0.0,
            "train": slowest,
            "exchange": tally.seconds["exchange"],
            "server": tally.seconds["server"],
            "eval": time.perf_counter() - begin,
            "checkpoint": 0.0,
        },
        "tokens": tokens,
        "steps": sum(m["steps"] for m in metrics),
        **speed.of_round(notes, slowest, base, trained),
        "flops_per_client": max((train.counted(m, base, trained) for m in metrics), default=0.0),
        "server_idle": 1 - tally.seconds["answer"] / tally.seconds["train"] if any(talked) else None,
        "peak_memory_client": max(notes[rank]["memory"] for rank in link.workers),
        "peak_memory_server": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_memory": {str(rank): each["memory"] for rank, each in enumerate(notes)},
        **_apart(parts.initial.schema, notes, tally.step or {}),
        "adapter_sha256": adapter,
        "warnings": [],
        "server": tally.step,
        "test": _scores(test, answered.get("test"), of_test and generated) if test and test.tokens else None,
        "sent": {str(client): sent[client] for client in sorted(sent)},
    }


def _apart(schema, notes, step):
    """How far the clients of a round were apart, as keys of its row; None for what is not known."""
    sent = {client: note for each in notes for client, note in each["sent"].items()}
    sketches = {client: sketch for each in notes for client, sketch in each["sketches"].items()}
    clients, mean = sorted(sketches), step.get("mean_norm")
    norms = [sent[client]["metrics"]["delta_norm"] for client in clients]
    found = {
        "delta_norm": math.fsum(norms) / len(norms) if norms else None,
        "delta_cosine": None,
        "step_norm": step.get("step_norm"),
        "aggregation_error": None,
    }
    if len(clients) > 1 and mean is not None:
        weights = [sent[client]["weight"] for client in clients]
        found["delta_cosine"] = spread.cosine(norms, weights, mean)
        found["aggregation_error"] = spread.aggregation_error(schema, [sketches[c] for c in clients], weights)
    return found


def _scores(test, answered, generated):
    more = {"accuracy": answered[0], "answered": answered[1]} if answered else {}
    more |= {"clients_accuracy": answered[2]} if answered and answered[2] else {}
    more |= {key: value for key in ("clients", "groups") if (value := getattr(test, key))} | (generated or {})
    of_tokens = {"token_accuracy": test.accuracy, "bits_per_byte": test.bits_per_byte}
    return {"loss": test.loss, "perplexity": evaluate.perplexity(test.loss), "tokens": test.tokens, **of_tokens, **more}


def _keep_clients(link, directory, clients, trainer, t, keep):
    """Write what this rank's clients keep, one at a time; at the server {client: {"file", "sha256"}} of all."""

    def work():
        kept = {}
        for client, half in clients.items():
            arrays = {f"method.{name}": array for name, array in half.state().items()}
            arrays |= {f"train.{name}": array for name, array in trainer.moments.get(client, {}).items()}
            if arrays:
                try:
                    over = checkpoint.unneeded(directory, t - keep, client)
                    digest = checkpoint.write_client(directory / "clients", client, t, arrays, over)
                    checkpoint.prune_clients(directory, t - keep, client)
                except OSError as error:
                    locate(error, f"round {t}: client {client} on")
                    raise
                kept[str(client)] = {"file": f"clients/{client:04d}/{checkpoint.name(t)}", "sha256": digest}
        return kept

    gathered = link.gather(link.together(work))
    return {client: about for each in gathered for client, about in each.items()} if gathered else {}


def _commit(rounds, book, row, kept):
    """Begin to write the round at the server: what a resume begins with, as soon as it is on the disk."""
    if not book:
        return
    book.add(row)
    # the state is not copied: until it is written, rounds lets the server change nothing of it
    rounds.saving.start(functools.partial(book.save, rounds.server.state(), kept))
    if rounds.asks:
        rounds.saving.failure(wait=True)  # such a server may change while clients train; the failure is asked for later


def _why_pause(link):
    """Why the server ends this start of the run after the round that is being played, in words, or None."""
    if not link.is_server:
        return None
    return (stopping.heard or "a signal at another rank") if link.wishes else link.clock.out_of_time()
