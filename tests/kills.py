"""Kill runs at random and resume them until they are done: python tests/kills.py [--kills 100] [--seed 0].

Each run is killed several times, as a whole or one rank of it, and resumed with other numbers of ranks. In the end it
must be the run that nothing happened to: the same bits in every round, the same files, nothing missing, nothing left.
"""

import argparse
import collections
import contextlib
import csv
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import places
from conftest import ROOT, launcher, tiny_model, tiny_rows, write_rows
from places import KEEP, PLACES, ROUNDS
from safetensors.numpy import load_file

from gdmpi import checkpoint, report

# how the names begin of what differs from run to run
TIMES = ("seconds", "peak_memory", "tokens_per_second", "seen_tokens_per_second", "mfu")
RUN = "run"  # every run has this name, in a folder of its own, so that even the configurations are equal
ANY_TIME, IN_ROUNDS = "at any time", "at any time of the rounds"
STARTED = ("\nbefore training:", "\nresumed after round")  # lines that a run says when its rounds begin
LIMIT = 120  # seconds after which a launch counts as hung
RANKS = (1, 2, 3, 4)  # 1: without mpirun
CONFIG = """
run: {{name: {run}, out: ., rounds: {rounds}, keep: {keep}, cache: cache, timeout: 100}}
clients: {{count: 5, per_round: 0.6}}
model: {{name: {place}/model, adapter: {{r: 4, alpha: 8, dropout: 0.1}}}}
data: {{name: {place}/data.jsonl, max_length: 64, validation: 0.25, test: 0.1}}
train: {{batch_size: 4, steps: 4, lr: 1.0e-2, keep_optimizer: true}}
"""


class Failure(Exception):
    """A run is not what it must be."""


@dataclass
class Kill:
    """One kill to come. place: a name of PLACES, or a time's; who: one, all, launcher; moment: a share of the time."""

    place: str
    rank: int
    who: str = "one"
    nth: int = 1
    moment: float = 0.0

    def __str__(self):
        if self.place not in PLACES:
            return f"{self.place} ({self.moment:.0%})"
        return f"{PLACES[self.place].title} ({self.nth})"


@dataclass
class Ended:
    """How a launch ended. killed: whether the kill came before the end; seconds: whole, and since the rounds began."""

    code: int
    killed: bool
    leftover: int
    seconds: float
    in_rounds: float
    output: str


def prepare(place):
    """Make the model, the rows and the configuration of all runs in a folder; returns the configuration's path."""
    tiny_model(place / "model")
    write_rows(place / "data.jsonl", tiny_rows(240))
    path = place / "config.yaml"
    path.write_text(CONFIG.format(run=RUN, rounds=ROUNDS, keep=KEEP, place=place), encoding="utf-8")
    return path


def done(run):
    """The last round of which there is a file; -1 before the first."""
    return max((int(path.stem.removeprefix("round-")) for path in checkpoint.files(run)), default=-1)


# ---- one launch -----------------------------------------------------------------------------------------------------


def launch(folder, words, ranks, kill=None, times=(4.0, 1.0)):
    """Start gdmpi in a folder with so many ranks, kill it as planned, and leave no process of it; an Ended.

    times: seconds that such a launch takes, and from its first round on, which the kill's moment is a share of.
    """
    command, env = launcher(None if ranks == 1 else ranks)
    token, mark, output = os.urandom(8).hex(), folder / "mark", folder / "output.txt"
    program = ["-m", "gdmpi"]
    if kill and kill.place in PLACES:
        program = [ROOT / "tests" / "places.py", kill.place, kill.nth, kill.rank, kill.who, mark]
    began, rounds_began, clock = time.monotonic(), None, time.time()
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, sys.executable, *map(str, [*program, *words])],
            cwd=folder,
            env=env | {places.TOKEN: token},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        struck = False
        while process.poll() is None:
            now = time.monotonic()
            if rounds_began is None and any(said in output.read_text(errors="replace") for said in STARTED):
                rounds_began = now
            if kill and not struck and kill.place not in PLACES:
                start, length = (began, times[0]) if kill.place == ANY_TIME else (rounds_began, times[1])
                if start is not None and now - start >= kill.moment * length:
                    strike(process, token, kill)
                    struck = True
            if now - began > LIMIT:
                raise Failure(f"hangs: nothing ends it within {LIMIT} s")
            time.sleep(0.005)
        seconds = time.monotonic() - began
    finally:
        leftover = sweep(token, patience=5)
        process.wait()
        clear_memory(since=clock)
    struck = (struck and process.returncode != 0) or mark.exists()
    mark.unlink(missing_ok=True)
    in_rounds = began + seconds - rounds_began if rounds_began else 0.0
    return Ended(process.returncode, struck, leftover, seconds, in_rounds, output.read_text(errors="replace"))


def strike(process, token, kill):
    """SIGKILL from outside: for a rank, for the launcher alone, or for all processes of the job."""
    if kill.who == "launcher":
        places.kill([process.pid])
        return
    job = places.processes(token)
    ranks = [number for number, line in sorted(job.items()) if " -m gdmpi " in line and number != process.pid]
    if kill.who == "all" or kill.rank >= len(ranks):
        places.kill([process.pid, *job])
    else:
        places.kill([ranks[kill.rank]])


def sweep(token, patience):
    """Wait until no process of a job is left; after so many seconds kill those that are. Returns how many were."""
    end = time.monotonic() + patience
    while (left := places.processes(token)) and time.monotonic() < end:
        time.sleep(0.02)
    killed = len(left)
    while left:
        places.kill(left)
        time.sleep(0.02)
        left = places.processes(token)
    return killed


def clear_memory(since):
    """Delete shared memory that MPICH's killed processes left: made since that time, and mapped by no process now."""
    made = {path for path in Path("/dev/shm").glob("mpich_shm_*") if path.stat().st_mtime >= since}
    for entry in Path("/proc").glob("[0-9]*/maps") if made else ():
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours
            mapped = entry.read_text(errors="replace")
            made = {path for path in made if str(path) not in mapped}
    for path in made:
        path.unlink(missing_ok=True)


# ---- what a run must be ---------------------------------------------------------------------------------------------


def facts(run):
    """All of a finished run that must not depend on what happened to it, as {what: value}."""
    lines, whole = report.verify(run)
    found = {"verify": (whole, lines), "config.yaml": (run / "config.yaml").read_text(encoding="utf-8")}
    found["files"] = sorted(
        str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.parent.name != "errors"
    )
    for path in checkpoint.files(run):
        state = checkpoint.read(path)
        rows = [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in state.metrics]
        # a file's bytes need not repeat, what is in it must
        kept = {
            c: checkpoint.read_client(run / "clients", int(c), state.round, state.clients[c]["sha256"])
            for c in state.clients
        }
        found[path.name] = (state.round, state.adapter_sha256, state.history, digest(state.server), rows)
        found[f"{path.name}: clients"] = {client: digest(arrays) for client, arrays in kept.items()}
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        found["metrics.csv"] = [
            {k: v for k, v in row.items() if not k.startswith(TIMES)} for row in csv.DictReader(file)
        ]
    audit = [json.loads(line) for line in (run / "audit.jsonl").read_text(encoding="utf-8").splitlines()]
    found["audit.jsonl"] = [{k: v for k, v in line.items() if k != "code"} for line in audit]  # a tree may be edited
    found["adapter"] = exported(run / "adapter")
    return found


def exported(directory):
    """The hashes of an adapter directory's tensors, and its configuration."""
    tensors = load_file(directory / "adapter_model.safetensors")
    return digest(tensors), (directory / "adapter_config.json").read_text(encoding="utf-8")


def digest(arrays):
    """{name: SHA-256 of the values} of what a server or a client keeps."""
    return {
        name: digest(dict(array)) if hasattr(array, "items") else hashlib.sha256(array.tobytes()).hexdigest()
        for name, array in sorted(arrays.items())
    }


def compare(run, wanted):
    """Failure if a finished run differs from what is wanted of it."""
    try:
        found = facts(run)
    except Exception as error:
        raise Failure(f"cannot be read: {type(error).__name__}: {error}") from error
    if not found["verify"][0]:
        raise Failure("verify: " + "; ".join(found["verify"][1]))
    for what in sorted(found.keys() | wanted.keys()):
        if found.get(what) != wanted.get(what):
            raise Failure(f"{what} differs:\n  {found.get(what)}\n  instead of\n  {wanted.get(what)}")


# ---- a run and its kills --------------------------------------------------------------------------------------------


class Harness:
    """Plays runs in a folder and remembers what a run must be, how long launches take, and what was killed."""

    def __init__(self, folder, seed=0, say=print):
        self.folder, self.seed, self.say = folder, seed, say
        self.config = prepare(folder)
        self.times = {}  # {ranks: (seconds of a launch, seconds of its rounds)}
        self.kills, self.missed, self.leftovers = collections.Counter(), collections.Counter(), 0
        home = folder / "reference"
        home.mkdir()
        ended = launch(home, ["run", self.config], 3)
        if ended.code:
            raise SystemExit(f"the run that nothing happens to fails with {ended.code}\n{ended.output}")
        self.times = dict.fromkeys(RANKS, (ended.seconds, ended.in_rounds))
        self.wanted = facts(home / RUN)
        if not self.wanted["verify"][0]:
            raise SystemExit(f"the run that nothing happens to is not whole: {self.wanted['verify'][1]}")

    def play(self, number, plan):
        """Run number: kill it as plan(attempt, rounds done) says, (words, ranks, Kill or None), until it is done."""
        home = self.folder / f"run-{number}"
        home.mkdir()
        run = home / RUN
        for attempt in range(20):
            before = done(run)
            again, ranks, kill = plan(attempt, run)
            words = ["run", self.config] if before < 0 else ["resume", again or RUN]
            ended = launch(home, words, ranks, kill, self.times[ranks])
            self.leftovers += ended.leftover
            if ended.killed:
                self.kills[kill.place] += 1
                who = {"one": f"rank {kill.rank}", "all": "all", "launcher": "launcher"}[kill.who]
                self.say(
                    f"kill {self.kills.total():3d}  run {number:2d}.{attempt}  {str(kill):62s}  {who:8s} of {ranks}  "
                    f"{words[0]:6s}  rounds {shown(before)} -> {shown(done(run))}"
                    + (f"  ({ended.leftover} processes outlived the launcher)" if ended.leftover else "")
                )
                continue
            if ended.code:
                raise Failure(
                    f"attempt {attempt} ({' '.join(map(str, words))}, {ranks} ranks): exit {ended.code}\n{ended.output}"
                )
            if kill and kill.place in PLACES:
                self.missed[kill.place] += 1
            if not kill:
                self.times[ranks] = tuple(map(max, self.times[ranks], (ended.seconds, ended.in_rounds)))
            compare(run, self.wanted)
            shutil.rmtree(home)
            return
        raise Failure("is not done after 20 launches")


def shown(t):
    return "-" if t < 0 else str(t)


def random_plan(seed, number):
    """A plan of two to five kills, all of it drawn from the seed and the run's number."""
    draw, cards = random.Random(f"{seed}/{number}"), hand(seed, number)
    kills = len(cards)

    def plan(attempt, run):
        ranks, files = draw.choice(RANKS), checkpoint.files(run)
        older = f"{RUN}/{files[1].name}" if len(files) > 1 else None
        if attempt >= kills:
            return None, ranks, None
        fitting = [name for name in cards if fits(PLACES[name], done(run), older)]
        if not fitting or draw.random() < 0.2:
            return None, ranks, draw_time(draw, ranks)
        name = fitting[0]
        cards.remove(name)
        again = older if PLACES[name].when == "back" or draw.random() < 0.1 else None
        left = ROUNDS - done(run) + bool(again)
        return again, ranks, draw_place(draw, name, ranks, math.ceil(left / (kills - attempt)))

    return plan


def hand(seed, number):
    """The places for a run: all are dealt before one comes again. The end comes last: it takes the rounds along."""
    first = sum(size(seed, earlier) for earlier in range(number))
    cards = []
    for position in range(first, first + size(seed, number)):
        deal, place = divmod(position, len(PLACES))
        pack = sorted(PLACES)
        random.Random(f"{seed}/deal/{deal}").shuffle(pack)
        cards.append(pack[place])
    return sorted(cards, key=lambda name: PLACES[name].when == "end")


def size(seed, number):
    """How often a run is to be killed."""
    return random.Random(f"{seed}/size/{number}").randint(2, 5)


def fits(place, last, older):
    """Whether a launch after round last passes a place."""
    if place.when in {"start", "round"}:
        return last < ROUNDS
    return {"always": True, "end": True, "resume": 0 < last < ROUNDS, "back": older}[place.when]


def draw_time(draw, ranks):
    """A kill at some time: half of them from the first round on, which is the smaller part of so small a run."""
    who = draw.choices(["one", "all", "launcher"], [5, 3, 2])[0] if ranks > 1 else "all"
    return Kill(draw.choice((ANY_TIME, IN_ROUNDS)), draw.randrange(ranks), who, moment=draw.random())


def draw_place(draw, name, ranks, rounds):
    """A kill at a place, of a rank that passes it, within so many rounds."""
    place = PLACES[name]
    first = {"server": 0, "client": min(1, ranks - 1), "any": 0}[place.role]
    rank = 0 if place.role == "server" else draw.randrange(first, ranks)
    nth = draw.randint(1, place.often * rounds) if place.when == "round" else 1
    return Kill(name, rank, draw.choices(["one", "all"], [2, 1])[0], nth)


def table(harness, runs, differences, seconds):
    """Lines on what was done: kills by place, and the sums."""
    titles = {ANY_TIME: ANY_TIME, IN_ROUNDS: IN_ROUNDS} | {name: place.title for name, place in PLACES.items()}
    yield "| killed | kills |"
    yield "|---|---:|"
    for name, title in titles.items():
        missed = f" (and {harness.missed[name]} times not passed)" if harness.missed[name] else ""
        yield f"| {title}{missed} | {harness.kills[name]} |"
    yield f"| **all** | **{harness.kills.total()}** |"
    yield f"{runs} runs completed, {differences} differences, {harness.leftovers} processes outlived their launcher"
    yield f"{seconds / max(1, harness.kills.total()):.1f} s a kill"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="what all is drawn from (default: %(default)s)")
    parser.add_argument("--only", type=int, metavar="RUN", help="only the run with this number")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    folder, began = Path(tempfile.mkdtemp(prefix="gdmpi-kills-")), time.monotonic()
    harness, runs, differences, number = Harness(folder, args.seed), 0, 0, args.only or 0
    while harness.kills.total() < args.kills:
        try:
            harness.play(number, random_plan(args.seed, number))
            runs += 1
        except Failure as problem:
            differences += 1
            print(f"DIFFERENCE in run {number}: {problem}")
            print(f"  its files: {folder / f'run-{number}'}")
            print(f"  again: python tests/kills.py --seed {args.seed} --only {number}")
        number += 1
        if args.only is not None:
            break
    print("\n".join(table(harness, runs, differences, time.monotonic() - began)))
    lost = [name for name, times in harness.missed.items() if times > 2 and not harness.kills[name]]
    for name in lost:
        print(f"never passed: {PLACES[name].title}: does gdmpi still do this there?")
    if not differences:
        shutil.rmtree(folder)
    return 1 if differences or lost else 0


if __name__ == "__main__":
    sys.exit(main())
