"""What a method must keep to, tried on the demo: python -m gdmpi check --method FILE.py|NAME.

A few small runs of the method are compared, on three MPI processes, each of which plays by itself or with others:

    process 0                       process 1                       process 2                       shows
    4 rounds, written               clients in reverse order        4 rounds, nothing written       order, repeats
    4 rounds on two ranks           with process 0                  rounds 3 and 4, resumed         resume
    4 rounds on three ranks         with process 0                  with process 0                  ranks

No two runs begin with the same state of Python's, numpy's and torch's global generators, and a run is resumed by a
process that did not play its beginning. Without mpirun one process plays all but the runs on several ranks.
"""

import functools
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np

from gdmpi import checkpoint, config as configuration, flat, hosting, launcher, log, method, mpi, results, schedule
from gdmpi.errors import UserError, describe, locate

ROUNDS, STOP = 4, 2  # rounds of a run, and after how many of them it is resumed
LEARNT = 0.95  # of the base's validation loss: what a method must come down to
DEMO = {  # what a method's EXAMPLE and the command line may change
    "clients.count": 3,
    "clients.per_round": 0.67,
    "model.adapter.r": 4,
    "data.validation": 0.03,
    "data.test": 0,
    "data.max_length": 128,
    "train.steps": 2,
    "train.batch_size": 4,
    "train.lr": 0.01,
    "train.dtype": "float32",
    "run.device": "cpu",
}
FIXED = {"run.rounds": ROUNDS, "run.keep": ROUNDS + 1, "run.eval_every": STOP, "run.timeout": 120}
OWN = ("run.name", "run.out", "run.cache", "method.name")
HINTS = {
    "repeats": "a global random generator instead of context.stream, the clock, or something that evaluation changes?",
    "order": "does a client leave something to the next one, in the model, the class or the module?",
    "resume": "is something kept between rounds that is not in state()?",
    "ranks": "do the clients of a rank, or the server and its clients, share something?",
}


def report(names, words, say):
    """Try all properties of some methods and say(line) each as it is known; the exit status, 0 if all hold, else 1.

    words: section.key=value, on top of each method's EXAMPLE. UserError if there is no such method, or a setting that
    the suite decides. One process starts three of them under mpirun; several ranks try it themselves.
    """
    for name in names:
        if not (method.is_file(name) and Path(name).is_file()):
            method.load(name)
    for key in (word.partition("=")[0] for word in words):
        if key in {*FIXED, *OWN}:
            raise UserError(f"{key}: check --method decides it; leave it out")
    mpirun = _mpirun()
    if mpirun and launcher.size() == 1:
        return _start(mpirun, names, words)
    link, found = mpi.start(), []

    def tell(name, holds, text):
        found.append(holds)
        say(f"  {({True: 'ok', False: 'FAILS', None: '-'})[holds]:6}{name:8} {text}")

    with tempfile.TemporaryDirectory(prefix="gdmpi-check-") as folder:
        for name in names:
            say(f"{name}, {ROUNDS} rounds of the demo:")
            examine(link, name, words, link.share(folder), tell if link.is_server else lambda *outcome: None)
        link.wait()
    tried = f"{len(found) - found.count(None)} properties tried"
    say(f"{tried}, {found.count(False)} of them fail" if False in found else f"{tried}, all hold")
    return int(False in found)


def _mpirun():
    """The command that starts MPI processes, or None."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun") or shutil.which("mpiexec")


def _start(mpirun, names, words):
    """Have three processes do the same; their exit status."""
    package = str(Path(__file__).resolve().parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}
    env |= {"OMP_NUM_THREADS": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}  # the latter of Open MPI
    program = [sys.executable, "-m", "gdmpi", "check", *(word for name in names for word in ("--method", name)), *words]
    return subprocess.run([mpirun, "-n", "3", *program], env=env, stdin=subprocess.DEVNULL).returncode


# ---- runs -----------------------------------------------------------------------------------------------------------


def configured(name, words, folder, run):
    """The Config of a run of the suite: the demo's, small, with the method's EXAMPLE, then words."""
    example = getattr(method.load(name), "EXAMPLE", {})
    if not isinstance(example, dict):
        raise UserError('EXAMPLE: give a dict, as in {"train.lr": 0.01}')
    own = dict(zip(OWN, (run, f"{folder}/{name.replace('/', '-')}", f"{folder}/cache", name), strict=True))
    first, last = (
        [f"{key}={json.dumps(value)}" for key, value in tree.items()] for tree in (DEMO | example, FIXED | own)
    )
    return configuration.load(None, [*first, *words, *last])


def _side_by_side(link, make, *jobs):
    """What jobs came to, at all ranks, or in a line why they failed: job i on rank i, or by one rank after another.

    A job is (name of a run, work): work(make(name)) plays it.
    """
    mine = {}
    for i, (name, work) in enumerate(jobs):
        if i % link.size == link.rank:
            config = make(name)
            _scramble()
            try:
                mine[i] = work(config)
            except Exception as error:
                mine[i] = _why(error, link, config)
    link.wait()
    found = {i: result for each in link.agree(mine) for i, result in each.items()}
    return [found[i] for i in range(len(jobs))]


def _scramble():
    """Leave the global generators in states that no other run begins with."""
    import torch

    random.seed(os.urandom(8))
    np.random.seed(np.frombuffer(os.urandom(16), np.uint32))
    torch.manual_seed(int.from_bytes(os.urandom(7), "little"))


def _why(error, link, config):
    """How a run failed, and where in the method's file that was, by the traceback or those that its ranks have kept."""
    path = method.load(config.method.name).__file__
    texts = [*traceback.format_exception(error), *(p.read_text() for p in config.directory.glob("errors/*.txt"))]
    lines = re.findall(rf'File "{re.escape(path)}", line (\d+)', "".join(texts))
    return describe(error, link.place) + (f" ({Path(path).name}, line {lines[-1]})" if lines else "")


def _played(link, config, state=None):
    """Play a run as the command line does; what its rows say, at the server."""
    from gdmpi import run

    link.errors_directory = config.directory / "errors"  # where _why() looks
    voice = log.Log(link.is_server, io.StringIO())
    try:
        book = run.play(link, config, voice, state)
    finally:
        voice.close()
    keys = ("round", "adapter_sha256", "eval_loss", "eval_clients")
    return book and [{key: row[key] for key in keys} for row in book.rows]


def _resumed(link, whole, config):
    """Play the end of a run that was stopped, with what one that was not has in its directory, from the round file."""
    shutil.copytree(whole, config.directory, ignore=shutil.ignore_patterns("log.txt"))
    return _played(link, config, checkpoint.read(config.directory / checkpoint.name(STOP)))


def _rounds(link, kind, config):
    """Play the rounds of a run by a kind of schedule, with nothing around them; the adapters' hashes, in rows."""
    from gdmpi import build, run

    link.errors_directory = config.directory / "errors"
    parts = build.build(link, config)
    server, clients, _ = run.roles(link, parts)
    rounds, found = kind(link, server, clients, parts.config, **run.static(config)), []
    with link.phase(config.run.timeout):
        message = run.follow(parts, clients, 1, rounds.publish(1))
        for client in clients.values():
            if client.personal:
                client.load(1, message)
        for t in range(1, config.run.rounds + 1):
            found.append(_digest(server, clients))
            _, failure = rounds.train_round(t, message, hosting.cohort(config, t), parts.hosts)
            message = run.follow(parts, clients, t + 1, rounds.publish(t + 1, failure))
    try:
        if not hosting.personal(config):
            run.observer(parts).load(t + 1, message)
    except Exception as error:
        locate(error, "a rank without clients, which evaluates as client -1, such as")
        raise
    return [{"adapter_sha256": digest} for digest in (*found, _digest(server, clients))]


def _digest(server, clients):
    own = {client: flat.sha256(half.adapter()) for client, half in clients.items() if half.personal}
    return results.digest(server.adapter(), own)


class Backwards(schedule.Sync):
    """Rounds in which a rank trains its last client first, and none may write into the message."""

    def _train(self, t, message, mine, tally):
        before = flat.sha256(message)
        held, error = super()._train(t, message, mine[::-1], tally)
        if error is None and not self.asks and flat.sha256(message) != before:  # a server that answers may change it
            error = UserError(f"round {t}: a client has written into the message, which others read too")
        return held, error


# ---- properties -----------------------------------------------------------------------------------------------------


def examine(link, name, words, folder, tell):
    """Try all properties of a method, on all ranks of a link; tell(property, holds, text) of each.

    holds: None where that could not be tried.
    """
    say = functools.partial(_say, tell)
    if not say("loads", _loads, name, words, folder):
        return
    make = functools.partial(configured, name, words, folder)
    whole, own, pair = make("whole").directory, link.among([]), link.among([0, 1])
    first, backwards, again = _side_by_side(
        link,
        make,
        ("whole", lambda config: _played(own, config)),
        ("backwards", lambda config: _rounds(own, Backwards, config)),
        ("again", lambda config: _rounds(own, schedule.Sync, config)),
    )
    if not say("runs", _runs, first):
        return
    hashes = _hashes(first)
    say("learns", _learns, first)
    say("repeats", _equal, "repeats", again, hashes, "the same without evaluation and files")
    say("order", _equal, "order", backwards, hashes, "the same with a rank's clients in reverse order")
    if link.is_server:
        say("state", _state, whole)
        say("bytes", _bytes, whole)
    both = ("two", lambda config: _played(pair, config) if link.size > 1 else None)
    on_two, _, resumed = _side_by_side(link, make, both, both, ("resumed", lambda c: _resumed(own, whole, c)))
    say("resume", _equal, "resume", resumed, hashes, f"{STOP} rounds, a stop and {ROUNDS - STOP} more: the same")
    if link.size == 1:
        tell("ranks", None, "not tried: there is no mpirun to start several with")
        return
    found = on_two
    if link.size > 2 and not isinstance(on_two, str) and _hashes(on_two) == hashes:
        found = _side_by_side(link, make, *[("all", lambda config: _played(link, config))] * link.size)[0]
    say("ranks", _equal, "ranks", found, hashes, f"1, 2{f' and {link.size}' * (link.size > 2)} ranks: the same")


def _say(tell, name, work, *arguments):
    """Tell what work(...) finds of a property, as (holds, text), or that it fails; whether it holds."""
    try:
        holds, text = work(*arguments)
    except Exception as error:
        holds, text = False, f"{'' if isinstance(error, UserError) else f'{type(error).__name__}: '}{error}"
    tell(name, holds, text)
    return holds


def _loads(name, words, folder):
    config = configured(name, words, folder, "loads")
    module, options = method.load(config.method.name), method.options(config)
    for half in ("Server", "Client"):
        if not issubclass(getattr(module, half), getattr(method, half)):
            return False, f"{half} does not extend method.{half}"
    said = ", ".join(f"{key} {value}" for key, value in options.model_dump().items())
    return True, said or "no options of its own"


def _runs(rows):
    if isinstance(rows, str):
        return False, rows
    if len(set(_hashes(rows))) == 1:
        return False, "the adapter is the same after all rounds"
    return True, f"adapter {rows[-1]['adapter_sha256']}"


def _learns(rows):
    """Whether validation loss has fallen; for personal methods that of each client."""
    first, last = rows[0], rows[-1]
    if last["eval_loss"] is None:
        return None, "not tried: there are no validation rows"
    pairs, whose = [(first["eval_loss"], last["eval_loss"])], "validation loss"
    if last["eval_clients"]:
        pairs = [(first["eval_clients"][client], loss) for client, loss in last["eval_clients"].items()]
        whose = "validation loss of the client that learns least"
    before, after = max(pairs, key=lambda pair: pair[1] / pair[0])
    text = f"{whose} {before:.3f} -> {after:.3f}"
    if after <= LEARNT * before:
        return True, text
    return False, f"{text}, not {1 - LEARNT:.0%} less; does it need another train.lr or train.steps (EXAMPLE)?"


def _hashes(rows):
    return [row["adapter_sha256"] for row in rows]


def _equal(name, found, hashes, text):
    """Whether a run's rows have the hashes of the first run's; found may be why it failed."""
    if isinstance(found, str):
        return False, found
    for t, (one, other) in enumerate(zip(_hashes(found), hashes, strict=True)):
        if one != other:
            what = text.replace("the same", f"another adapter after round {t}")
            return False, f"{what} ({one[:12]}, not {other[:12]}); {HINTS[name]}"
    return True, text


def _state(directory):
    """Whether the server comes back from the last round file without a model, as export and eval want it."""
    state = checkpoint.read(directory / checkpoint.name(ROUNDS))
    _, server = results.server_of(state)
    again, saved = ({n: _buffer(a) for n, a in arrays.items()} for arrays in (server.state(), state.server))
    other = sorted(name for name in {*again, *saved} if again.get(name) != saved.get(name))
    if other:
        return False, f"restore() does not bring back what state() gave: {', '.join(other)}"
    found = results.adapters(directory, state.round, state.clients, server)
    own = {client: flat.sha256(adapter) for client, adapter in found.items()}
    if results.digest(found.get(None), own) != state.adapter_sha256:
        return False, "a restored server has another adapter than the one that was saved"
    kept = [*saved, *([f"what {len(state.clients)} clients keep"] if state.clients else [])]
    return True, f"restored from its file: {', '.join(kept) or 'nothing is kept'}"


def _buffer(array):
    return array.buffer.tobytes() if isinstance(array, flat.Flat) else np.asarray(array).tobytes()


def _bytes(directory):
    """Whether each round sent as many bytes as the method's formula says."""
    state = checkpoint.read(directory / checkpoint.name(ROUNDS), server=False)
    config, rows = results.configuration_of(state), state.metrics[1:]
    formula = getattr(method.load(config.method.name), "nbytes", None)
    last = f"{rows[-1]['bytes_up_per_client']:,} up and {rows[-1]['bytes_down_per_client']:,} down a client"
    if formula is None:
        return None, f"states no formula (nbytes, see method.py); {last} in the last round"
    for row in rows:
        for way, stated in formula(config, flat.Schema(state.about["schema"]), row).items():
            if stated != (sent := row[f"bytes_{way}_per_client"]):
                return False, f"round {row['round']}: {sent:,} {way}, where the formula says {stated:,}"
    return True, f"as the formula says; {last} in the last round"
