"""A run's record at the server: its rows, round files, metrics.csv, audit.jsonl, warnings, and what the user reads."""

import concurrent.futures
import csv
import io
import json
import math
import time
import types

from gdmpi import checkpoint, events, generate, hosting, results, starts, words
from gdmpi.errors import PeerError, UserError

SECONDS = ("total", "train", "exchange", "server", "eval", "checkpoint")
COLUMNS = (
    "round train_loss eval_loss eval_perplexity clients bytes_up_per_client bytes_down_per_client".split()
    + [f"seconds_{part}" for part in SECONDS]
    + "tokens steps flops_per_client peak_memory_client peak_memory_server adapter_sha256 warnings".split()
    + "seen_tokens tokens_per_second seen_tokens_per_second mfu peak_memory eval_accuracy".split()
    + "eval_token_accuracy eval_bits_per_byte delta_norm delta_cosine step_norm aggregation_error".split()
    + ["server_idle"]
)
# what rows of older versions of the program lack
LATER = [*COLUMNS[-13:], "eval_clients", "eval_groups", "eval_generated", "eval_clients_accuracy"]
RISING = 3  # validations in a row that rise while the training loss falls, before it is said
DIVERGED = 1.5  # times the lowest loss so far


def open_directory(directory, state, log, go_on=False):
    """Make a new run's directory, or check that a resumed run's can be written; UserError otherwise.

    A directory in which a run was killed before it had saved anything counts as new. The log is opened there and keeps
    other runs out. go_on: starts are counted. Returns the paths that it made, so that a run that never starts leaves
    none behind: files first, then directories, deepest first.
    """
    if state is None and directory.is_dir() and any(directory.iterdir()) and not _holds_no_round(directory):
        raise UserError(
            f"run.name: {directory} exists; go on with it (python -m gdmpi resume {directory}), "
            f"or choose another name (run.name={directory.name}-2)"
        )
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        fresh = not (directory / "log.txt").exists()
        log.open(directory / "log.txt")
    except OSError as error:
        reason = f"cannot write to {directory}: {error.strerror}"
        raise UserError(f"run.out: {reason}; choose another with run.out=DIR") from None
    if go_on:
        starts.count(directory, -1 if state is None else state.round)
    return [directory / "log.txt", *([directory / "starts.json"] if go_on else []), *made] if fresh else made


class Background:
    """One piece of work at a time in a thread of its own; how it failed is kept until it is asked for."""

    def __init__(self):
        self.pool, self.work = concurrent.futures.ThreadPoolExecutor(1, "save"), None

    def start(self, work):
        """Begin work(), which returns None or the exception that it failed with."""
        self.work = self.pool.submit(work)

    def failure(self, wait=False):
        """What the last work failed with; None if all went well, or without wait, if it is not over yet."""
        return self.work.result() if self.work and (wait or self.work.done()) else None


def _holds_no_round(directory):
    """Whether all that lies here is what a run writes before its round 0 is saved."""
    ours = {"log.txt", "starts.json", "config.yaml", "metrics.csv", "errors", "tensorboard", generate.FILE}
    others = {path.name for path in directory.iterdir()} - ours
    metrics = directory / "metrics.csv"
    return (
        (directory / "log.txt").is_file()
        and all(name.endswith(".part") for name in others)
        and not (metrics.is_file() and metrics.read_text(encoding="utf-8", errors="replace").count("\n") > 1)
    )


class Record:
    """What rank 0 writes down. rows: one a round, round 0 first, as in show --json and with what each client sent."""

    def __init__(self, config, parts, ranks, state, history, log):
        self.config, self.parts, self.ranks, self.log = config, parts, ranks, log
        self.directory = config.directory
        self.rows = [complete(row) for row in state.metrics] if state else []
        self.events = None
        self.history = [*(state.history if state else []), *history]
        self.origin = (checkpoint.creator(), config.sha256())
        # who played the last round that is there: its line in audit.jsonl may never have been written
        self.played = (state.creator, results.configuration_of(state).sha256()) if state else self.origin

    def begin(self, done):
        """Say what is about to run, and bring all files to the state that is resumed from.

        done: rounds done, or None for a new run.
        """
        checkpoint.write_text(self.directory / "config.yaml", self.config.to_yaml())
        self.bring_back(-1 if done is None else done)
        for line in words.introduction(self.config, self.parts.about, self.ranks):
            self.log.say(line)
        for line in self.parts.about["warnings"]:
            self.log.warn(line)
        if self.rows:
            self.log.say(f"resumed after round {done} of {self.config.run.rounds}")

    def bring_back(self, done):
        """Drop what is newer than round done or half-written; complete metrics.csv and audit.jsonl up to that round.

        The newest round file goes first: killed in between, the run is that of the newest one left.
        """
        for path in checkpoint.files(self.directory):
            if checkpoint.round_of(path) > done:
                self.log.say(f"{path} is dropped: resuming after round {done} takes the run back")
                path.unlink()
        for path in checkpoint.clients_files(self.directory):
            if checkpoint.round_of(path) > done:  # of a round whose server's file was never written
                path.unlink()
        for path in checkpoint.half_written(self.directory):
            path.unlink()
        if not any(generated(row) for row in self.rows):
            (self.directory / generate.FILE).unlink(missing_ok=True)
        if self.config.run.tensorboard:
            self.events = events.Events(self.directory / "tensorboard", self.rows)
        self._write_metrics()
        audit = self.directory / "audit.jsonl"
        if self.rows:
            text = audit.read_text(encoding="utf-8", errors="replace") if audit.exists() else ""
            lines = {_round_of(line): line for line in text.splitlines()}
            made = {row["round"]: json.dumps(self._audit(row, *self.played)) for row in self.rows}
            checkpoint.write_text(audit, "".join(f"{lines.get(t, line)}\n" for t, line in made.items()))

    def steps_of(self, client):
        """Optimiser steps of a client in a round."""
        return hosting.steps(self.config, self.parts.about["rows"][str(client)])

    def add(self, row):
        """Take in a round's row and say its line."""
        if not row["warnings"]:
            known = self.parts.about["warnings"] if row["round"] == 0 else []
            row["warnings"] = known + warnings(self.rows, row, results.called(self.config))
        self.rows.append(row)
        self.log.close_bar()
        self.log.say(words.line(row, self.config.run.rounds))
        for text in row["warnings"] if row["round"] else ():
            self.log.warn(f"round {row['round']}: {text}")

    def save(self, server_state, kept):
        """Write the last row's round file, then metrics.csv and audit.jsonl; returns what that failed with, or None.

        After a failure nothing of the round is on the disk but what a resume will drop. It may run in a thread while
        the next round trains, as long as nothing changes the server's state.
        """
        row, began = self.rows[-1], time.perf_counter()
        try:
            self._save(row, began, server_state, kept)
        except Exception as error:
            left = checkpoint.files(self.directory)
            whole = f"round {checkpoint.round_of(left[0])} is whole" if left else "there are no round files any more"
            failure = PeerError(f"round {row['round']}: cannot save it: {error}; {whole}")
            failure.__cause__ = error
            return failure
        return None

    def _save(self, row, began, server_state, kept):
        state = checkpoint.Round(
            round=row["round"],
            adapter_sha256=row["adapter_sha256"],
            config=self.config.to_yaml(),
            server=server_state,
            metrics=self.rows,
            history=self.history,
            about=self.parts.about | {"ranks": self.ranks, "schema": json.loads(self.parts.initial.schema.to_json())},
            adapter_config=self.parts.adapter_config,
            clients=kept,
        )
        checkpoint.write(self.directory, state)
        row["seconds"]["checkpoint"] = time.perf_counter() - began
        if self.events:
            self.events.add(row)
        self._write_metrics()
        with (self.directory / "audit.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._audit(row, *self.origin)) + "\n")
        checkpoint.prune(self.directory, self.config.run.keep)

    def tidy(self, done):
        """Delete what only rounds before the newest run.keep needed, of all clients."""
        keep = self.config.run.keep
        checkpoint.prune(self.directory, keep)
        checkpoint.prune_clients(self.directory, done - keep + 1)

    def end(self, server, kept):
        """Write the adapter's or the model's directory and say where everything is.

        kept: {client: {"file", "sha256"}} of what clients keep after the last round.
        """
        kind = results.kind_of(self.parts.adapter_config)
        last, here = self.rows[-1], self.directory
        found = results.adapters(here, last["round"], kept, server)
        found = results.everyone(found, here, last["round"], kept, self.config)
        results.write_all(here / kind, found, self.parts.about, self.parts.adapter_config, self.config)
        if last.get("test"):
            test = last["test"]
            self.log.say(
                f"test loss {test['loss']:.4f}, perplexity {test['perplexity']:.2f}: "
                f"over {test['tokens']:,} response tokens of rows that {self._looked_at()}"
                + words.by_themselves(test["loss"], test.get("clients"))
            )
            if "accuracy" in test:
                self.log.say(f"test accuracy {test['accuracy']:.1%}: the likeliest label of {test['answered']:,} rows")
        for part, scores in generated(last).items():
            said = generate.said(scores, part, self.config.evaluation.new_tokens)
            self.log.say(f"{said}; to be read in {here / generate.FILE}")
        alone = server.adapter() is None
        self.log.say(f"{results.called(self.config)}{' of the clients' * alone} {last['adapter_sha256']}")
        where = f"{kind}/ loads" if None in found else f"{kind}/0000/ and so on, one a client, load"
        if None in found and len(found) > 1:
            where = f"{kind}/, the server's, and {kind}/0000/ and so on, the clients' own, load"
        self.log.say(f"results in {here} ({where} with {results.RESULTS[kind][2]}); worth typing next:")
        self.log.say(f"  python -m gdmpi show {here}")
        self.log.say(
            f"  mpirun -n {self.ranks} python -m gdmpi resume {here} run.rounds={2 * self.config.run.rounds or 5}"
        )
        if kind == "adapter" and not alone:
            self.log.say(f"  python -m gdmpi export {here} merged --merge")

    def _looked_at(self):
        before = [str(row["round"]) for row in self.rows[:-1] if row.get("test")]
        return f"were looked at after round {', '.join(before)}, too" if before else "nothing before has looked at"

    def _audit(self, row, code, config_sha256):
        return {
            "round": row["round"],
            "cohort": sorted(int(client) for client in row["sent"]),
            "sent": {client: note.get("blake3") for client, note in row["sent"].items()},
            "bytes_up_per_client": row["bytes_up_per_client"],
            "bytes_down_per_client": row["bytes_down_per_client"],
            "adapter_sha256": row["adapter_sha256"],
            "code": code,
            "config_sha256": config_sha256,
            "method_sha256": self.parts.about.get("method_sha256"),
        }

    def _write_metrics(self):
        checkpoint.write_text(self.directory / "metrics.csv", metrics(self.rows))


def metrics(rows):
    """The text of metrics.csv: a line a round, with an empty cell for what is not known."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for row in rows:
        cells = row | {f"seconds_{part}": f"{value:.4f}" for part, value in row["seconds"].items()}
        cells["warnings"] = "; ".join(row["warnings"])
        digits = {"tokens_per_second": 1, "seen_tokens_per_second": 1, "mfu": 4, "server_idle": 4}
        cells |= {key: f"{row[key]:.{digits[key]}f}" for key in digits if row[key] is not None}
        if row["peak_memory"]:
            cells["peak_memory"] = "; ".join(f"{rank}: {memory}" for rank, memory in row["peak_memory"].items())
        table.writerow(["" if cells[column] is None else cells[column] for column in COLUMNS])
    return text.getvalue()


def finish(config, state, log):
    """The end of a run whose last round is saved: what it was killed before. Needs neither model nor other ranks."""
    events.check(config)
    open_directory(config.directory, state, log)
    parts = types.SimpleNamespace(about=state.about, adapter_config=state.adapter_config)
    book = Record(config, parts, state.about["ranks"], state, (), log)
    book.bring_back(state.round)
    book.tidy(state.round)
    log.say(f"all {state.round} rounds were done, but not what follows them: that is done now")
    book.end(results.server_of(state)[1], state.clients)


def complete(row):
    """A round's row, with None for what older versions of the program did not note."""
    return row | {key: None for key in LATER if key not in row}


def generated(row):
    """{"test" or "validation": what generate.scores() gave} of a round's row; empty if nothing was generated."""
    parts = {"test": row.get("test"), "validation": row.get("eval_generated")}
    return {part: scores for part, scores in parts.items() if scores and scores.get("generated")}


def _round_of(line):
    try:
        return json.loads(line)["round"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut off by a crash


def warnings(rows, row, trained):
    """Lines on what looks wrong with a round, given the rounds before it. trained: results.called()."""
    found = []
    if row["round"] == 0:
        return found
    for key, what in (("train_loss", "training"), ("eval_loss", "validation")):
        best = min((r[key] for r in rows if r[key] is not None), default=None)
        if best is not None and row[key] is not None and row[key] > DIVERGED * best:
            found.append(f"{what} loss {row[key]:.3g} is diverging (it was {best:.3g}): lower train.lr")
    if rows and row["adapter_sha256"] == rows[-1]["adapter_sha256"]:
        found.append(f"the {trained} did not change: nothing is being learnt (train.lr, server.lr?)")
    seen = [r for r in [*rows, row] if r["eval_loss"] is not None and r["train_loss"] is not None][-RISING - 1 :]
    pairs = list(zip(seen, seen[1:], strict=False))
    if len(pairs) == RISING and all(
        b["eval_loss"] > a["eval_loss"] and b["train_loss"] < a["train_loss"] for a, b in pairs
    ):
        found.append(f"validation loss has risen for {RISING} rounds while training loss falls: overfitting")
    return found
