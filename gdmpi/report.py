"""Reading runs: show (one run's rounds) and verify (what is whole and what is not)."""

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

from gdmpi import checkpoint, config as configuration, flat, generate, hosting, method, record, results, words
from gdmpi.errors import UserError

WORDS = {"eval": "evaluation"}  # parts of a round's time, where a line has room for a word


@dataclass
class Run:
    """A run as it is read. rows: one a round, round 0 first, each with every key of show --json, "sent" and "test"."""

    source: Path
    config: configuration.Config
    about: dict
    rows: list
    adapter_sha256: str


def load(source):
    """(path, Round without the server's state) of a run directory's newest whole round file, or of a round file."""
    if source.is_dir():
        return checkpoint.newest(source, lambda text: None, server=False)
    if not source.exists():
        raise UserError(f"{source}: there is no such run directory or round file")
    return source, checkpoint.read(source, server=False)


def read(source):
    """The Run of a run directory or round file; UserError if there is none."""
    path, state = load(source)
    config = results.configuration_of(state, str(path))
    return Run(source, config, state.about, [record.complete(row) for row in state.metrics], state.adapter_sha256)


def summary(source):
    """A run as show --json gives it: {name, method, ..., rounds: [...]}."""
    return _summary(read(source))


def _summary(run):
    config = run.config
    return {
        "name": config.run.name,
        "method": config.method.name,
        "method_sha256": run.about.get("method_sha256"),
        "clients": config.clients.count,
        "ranks": run.about["ranks"],
        "rounds_planned": config.run.rounds,
        "rounds_done": run.rows[-1]["round"],
        "adapter_sha256": run.adapter_sha256,
        "model": config.model.name,
        "trainable_parameters": run.about["trainable_parameters"],
        "seed": config.run.seed,
        "split": config.clients.split.kind,
        "test": run.rows[-1].get("test"),
        "rounds": [{key: row[key] for key in row if key not in {"sent", "server", "test"}} for row in run.rows],
    }


def as_json(sources):
    """What show --json prints: an object for one run, a list for several."""
    runs = [summary(source) for source in sources]
    return json.dumps(runs[0] if len(runs) == 1 else runs, indent=1)


def show(source, form="text"):
    """A run's rounds, as show prints them. form: text, markdown, csv (as metrics.csv) or json."""
    if form == "json":
        return as_json([source])
    run = read(source)
    if form == "csv":
        return record.metrics(run.rows).rstrip("\n")
    head, columns, rows, foot = _rounds(_summary(run), run.about, run.config)
    return "\n".join([*head, "", *laid_out(form, columns, rows), *notes(form, foot)])


def _rounds(run, about, config):
    head = [
        f"{run['name']}: {method.title(run['method'], run['method_sha256'])} on {run['model']}, "
        f"{clients(config)} ({run['split']}) on "
        f"{run['ranks']} ranks, {run['trainable_parameters']:,} trainable parameters, seed {run['seed']}",
        f"{run['rounds_done']} of {run['rounds_planned']} rounds done",
    ]
    known = any(row["mfu"] is not None for row in run["rounds"])
    answered = any(row["eval_accuracy"] is not None for row in run["rounds"])
    columns = ["round", "train loss", "val loss", "val ppl", *["val acc"] * answered, "clients"]
    columns += ["up/client", "down/client"]
    columns += ["tokens/s", *(["of peak"] if known else [])]
    columns += ["seconds", "train", "exchange", "server", "eval", "save", results.called(config)]
    rows = [
        [
            str(row["round"]),
            number(row["train_loss"], 4),
            number(row["eval_loss"], 4),
            number(row["eval_perplexity"], 2),
            *[_share(row["eval_accuracy"], 1)] * answered,
            str(row["clients"]),
            words.size(row["bytes_up_per_client"]),
            words.size(row["bytes_down_per_client"]),
            number(row["tokens_per_second"], 0),
            *([_share(row["mfu"], 1)] if known else []),
            *(number(row["seconds"][part], 2) for part in record.SECONDS),
            row["adapter_sha256"][:12],
        ]
        for row in run["rounds"]
    ]
    foot = ["train loss: mean over the round's target tokens"]
    foot += [f"val: mean over {held_out(about, 'validation')}; ppl: its exponential"]
    foot += [*_clients(run["rounds"], run["test"]), *_tokens(run["rounds"], run["test"]), *_apart(run["rounds"])]
    foot += ["val acc: share of the validation rows whose true label is likelier than any other"] * answered
    foot += [*_speed(run["rounds"]), *_split(run["rounds"]), *_memory(run["rounds"][-1])]
    test = run["test"]
    if test:
        foot.append(
            f"test loss {test['loss']:.4f}, perplexity {test['perplexity']:.2f}, mean over {held_out(about, 'test')}"
        )
    if test and "accuracy" in test:
        foot.append(f"test accuracy {test['accuracy']:.1%} of {test['answered']:,} rows")
    foot += _generated(run, config)
    foot += [f"warning: round {row['round']}: {text}" for row in run["rounds"] for text in row["warnings"]]
    return head, columns, rows, foot


def clients(config):
    """How many clients there are, in words."""
    known = method.there(config.method.name)  # the file of a method of one's own may be gone since
    return f"{config.clients.count} clients{' pooled' * (known and hosting.pooled(config))}"


def reports(about):
    """What became of the rows: [report] of pooled data, or of each client's file by ascending client."""
    if "clients" not in about["data"] or "train" in about["data"]:
        return [about["data"]]
    clients = {int(client): report for each in about["data"]["clients"] for client, report in each.items()}
    return [clients[client] for client in sorted(clients)]


def counted(about, part):
    """(rows, response tokens) of a part: train, validation or test."""
    parts = [report.get(part, {}) for report in reports(about)]
    return sum(each.get("kept", 0) for each in parts), sum(each.get("target_tokens", 0) for each in parts)


def held_out(about, part):
    """Which tokens a held-out loss is the mean over, in words."""
    rows, tokens = counted(about, part)
    if not rows:
        return f"the response tokens of all {part} rows"
    return f"the {tokens:,} response tokens of all {rows:,} {part} rows"


def laid_out(form, columns, rows):
    """The lines of a table, as text, markdown or csv."""
    if form == "text":
        return table(columns, rows)
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        return text.getvalue().splitlines()
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in [columns, *rows]]
    return [lines[0], "|:---" + "|---:" * (len(columns) - 1) + "|", *lines[1:]]


def notes(form, lines):
    """Lines that stand below a table: in markdown a list."""
    return ["", *(f"- {line}" if form == "markdown" else line for line in lines)] if lines else []


def table(columns, rows):
    """Lines of a table: headings, then rows; the first column left-aligned, the others right-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]

    def line(cells):
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()

    return [line(columns), *(line(row) for row in rows)]


def pace(rounds, key):
    """Tokens of a key a second of training, over all rounds that say how many; None if none does."""
    rounds = [row for row in rounds if row[key] and row["seconds"]["train"]]
    return sum(row[key] for row in rounds) / sum(row["seconds"]["train"] for row in rounds) if rounds else None


def _clients(rounds, test):
    """Lines on the spread of losses over clients that each have an adapter of their own."""
    last, test = next((row for row in reversed(rounds) if row["eval_clients"]), {}), test or {}
    of_rounds = (last.get(key) for key in ("eval_clients", "eval_loss", "eval_clients_accuracy"))
    of_test = (test.get(key) for key in ("clients", "loss", "clients_accuracy"))
    for title, (losses, loss, shares) in (("validation", of_rounds), ("test", of_test)):
        if losses:
            values, mean = list(losses.values()), math.fsum(losses.values()) / len(losses)
            spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
            between = f"{min(values):.4f} to {max(values):.4f}, standard deviation {spread:.4f}"
            whose = f"mean over the {len(values)} clients' own adapters"
            if loss != mean:
                whose = f"of the server's model; {whose} {mean:.4f}"
            yield f"{title} loss: {whose}, {between}"
        if shares:
            own = ", ".join(f"{client} {_share(share, 1)}" for client, share in shares.items())
            yield f"{title} accuracy by client: {own}"


def _apart(rounds):
    """A line on how far the clients of the last round were apart."""
    row = next((row for row in reversed(rounds) if row["delta_cosine"] is not None), None)
    if row:
        error = ""
        if row["aggregation_error"] is not None:
            error = f"; averaging A and B instead of BA is off by {_share(row['aggregation_error'], 1)}, estimated"
        norms = f"a client moved by {number(row['delta_norm'], 4)}, the server by {number(row['step_norm'], 4)}"
        yield f"round {row['round']}: {norms}; mean cosine between clients {number(row['delta_cosine'], 3)}{error}"


def _tokens(rounds, test):
    """Lines on what else is known of the last validation and the test: token accuracy, bits per byte, groups."""
    last = next((row for row in reversed(rounds) if row["eval_token_accuracy"] is not None), None)
    found = [("validation", last and {k: last[f"eval_{k}"] for k in ("token_accuracy", "bits_per_byte", "groups")})]
    for title, each in [*found, ("test", test)]:
        if each and each.get("token_accuracy") is not None:
            hits, bits = _share(each["token_accuracy"], 1), number(each["bits_per_byte"], 4)
            yield f"{title}: {hits} of the response tokens were likelier than any other; {bits} bits a byte of text"
            for group, loss in (each.get("groups") or {}).items():
                yield f"  {title} loss {number(loss, 4)}  {group}"


def _generated(run, config):
    """Lines on what the last round's answers to held-out prompts came to."""
    for part, scores in record.generated(run["rounds"][-1] | {"test": run["test"]}).items():
        yield generate.said(scores, part, config.evaluation.new_tokens)
        yield f"  scores from 0 to 100; BLEU is sacrebleu's {scores['bleu_signature']}; answers in {generate.FILE}"


def _speed(rounds):
    """A line on the tokens a second, if there was a round."""
    target, seen = pace(rounds, "tokens"), pace(rounds, "seen_tokens")
    if target is not None:
        passed = f", {seen:,.0f} passed through the model" if seen is not None else ""
        yield f"tokens/s: target tokens of all clients over the slowest rank's training; {target:,.0f} overall{passed}"
    if any(row["mfu"] is not None for row in rounds):
        yield "of peak: 4 operations a frozen and 6 a trained parameter and token, to the devices' peak in 16 bits"


def _split(rounds):
    """A line on where the time of all rounds went, if there was one."""
    parts = {part: sum(row["seconds"][part] for row in rounds if row["round"]) for part in record.SECONDS}
    total, saving = parts.pop("total"), parts.pop("checkpoint")
    if total:
        parts["other"] = max(0.0, total - sum(parts.values()))
        shares = ", ".join(f"{WORDS.get(part, part)} {_share(value / total)}" for part, value in parts.items())
        yield f"time: {total:.1f} s, of which {shares}; beside the next round saving {_share(saving / total)}"
    idle = [row["server_idle"] for row in rounds if row["server_idle"] is not None]
    if idle:
        yield f"while clients train, the server answers them; for {_share(sum(idle) / len(idle), 1)} of it it is idle"


def _memory(row):
    """A line on the most memory that ranks have held."""
    client, server = (words.size(row[f"peak_memory_{kind}"]) for kind in ("client", "server"))
    of_clients = {rank: held for rank, held in (row["peak_memory"] or {}).items() if held == row["peak_memory_client"]}
    where = f" (rank {next(iter(of_clients))})" if of_clients else ""
    yield f"memory: at most {client} on a rank with clients{where}, {server} on the server"


def _share(value, digits=0):
    return "-" if value is None else f"{value:.{digits}%}"


def number(value, digits, comma=""):
    """A number for people; - for one that is not there, nan for one that is none."""
    return "-" if value is None else f"{value:{comma}.{digits}f}"


def verify(directory):
    """(lines, whether all that a resume or a reader needs is whole) for a run directory: every hash is recomputed."""
    if not directory.is_dir():
        raise UserError(f"{directory}: there is no such run directory")
    if not checkpoint.files(directory):
        raise UserError(f"{directory}: no round files here; a run directory holds files like {checkpoint.name(5)}")
    lines, good, newest = [], True, None
    for path in checkpoint.files(directory):
        try:
            state = checkpoint.read(path)
            problem = _round_problem(directory, state)
        except UserError as error:
            state, problem = None, str(error).removeprefix(f"{path}: ")
        lines.append(f"{path.name}: {problem or 'whole, ' + _contents(state)}")
        good = good and not problem
        newest = newest or (state if not problem else None)
    if newest is None:
        return [*lines, "no whole round file: this run cannot be resumed"], False
    asked = results.configuration_of(newest).evaluation.generate
    for name, check in {**CHECKS, **({generate.FILE: _generated_problem} if asked else {})}.items():
        problem = check(directory, newest)
        agrees = f"agrees with {checkpoint.name(newest.round)}"
        if name == "adapter":
            name = results.kind_of(newest.adapter_config)
            if results.rebased(newest.adapter_config):
                agrees = "is there; its base would be needed to compare it"
        lines.append(f"{name}: {problem or agrees}")
        good = good and (not problem or problem.startswith("not there yet"))
    return lines, good


def _contents(state):
    clients = f", {len(state.clients)} clients' files" if state.clients else ""
    return f"{results.called(results.configuration_of(state))} {state.adapter_sha256[:12]}{clients}"


def _round_problem(directory, state):
    for client, about in state.clients.items():
        path = Path(directory) / about["file"]
        if not path.is_file():
            return f"{about['file']}, what client {client} kept, is missing"
        if checkpoint.file_sha256(path) != about["sha256"]:
            return f"{about['file']}, what client {client} kept, is not the file that the round was committed with"
    found = results.adapters(directory, state.round, state.clients, results.server_of(state)[1])
    own = {client: flat.sha256(adapter) for client, adapter in found.items()}
    if results.digest(found.get(None), own) != state.adapter_sha256:
        return "what it holds does not have the hash that it records"
    return None


def _metrics_problem(directory, state):
    try:
        with (directory / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (ValueError, csv.Error):
        return "is not a table of text; a resume mends it"
    if not rows or not {"round", "adapter_sha256"} <= rows[0].keys():
        return "lacks its columns or rows; a resume mends it"
    numbers = [str(row["round"]) for row in rows]
    if numbers != [str(t) for t in range(state.round + 1)]:
        return f"has the rounds {', '.join(numbers)} where 0 to {state.round} are done; a resume mends it"
    wrong = [r["round"] for r, m in zip(rows, state.metrics, strict=True) if r["adapter_sha256"] != m["adapter_sha256"]]
    return f"has another adapter hash in round {wrong[0]}" if wrong else None


def _audit_problem(directory, state):
    try:
        lines = [json.loads(line) for line in (directory / "audit.jsonl").read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError:
        return "has a line that is not JSON; a resume mends it"
    if any(not isinstance(line, dict) or not {"round", "adapter_sha256", "sent"} <= line.keys() for line in lines):
        return "has a line that says nothing of a round; a resume mends it"
    if [line["round"] for line in lines] != list(range(state.round + 1)):
        return f"does not have each of the rounds 0 to {state.round} once; a resume mends it"
    for line, row in zip(lines, state.metrics, strict=True):
        sent = {client: note.get("blake3") for client, note in row["sent"].items()}
        if line["adapter_sha256"] != row["adapter_sha256"] or line["sent"] != sent:
            return f"says something else of round {line['round']} than the round file"
    return None


def _result_problem(directory, state):
    from safetensors.numpy import load_file

    kind = results.kind_of(state.adapter_config)
    for client, mine in results.adapters(directory, state.round, state.clients, results.server_of(state)[1]).items():
        path, config = (directory / kind / results.folder(client) / name for name in results.RESULTS[kind][:2])
        if not path.exists() or not config.exists():
            return "not there yet: written after the last round"
        try:
            tensors = load_file(path)
        except Exception as error:
            return f"cannot be read: {error}"
        if results.rebased(state.adapter_config):
            continue
        if tensors.keys() != mine.keys() or not all((tensors[name] == mine[name]).all() for name in tensors):
            return f"holds other values than {checkpoint.name(state.round)}"
    return None


def _generated_problem(directory, state):
    scores = record.generated(record.complete(state.metrics[-1]))
    if not scores:
        return "not there yet: written after the last round"
    try:
        with (directory / generate.FILE).open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]  # splitlines() would part texts, too
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError:
        return "has a line that is not JSON"
    if any(not isinstance(line, dict) or not {"prompt", "answer", "reference", "row"} <= line.keys() for line in lines):
        return "has a line without prompt, answer, reference and row"
    (answered,) = (each["generated"] for each in scores.values())
    if len(lines) != answered:
        return f"has {len(lines):,} lines, and {answered:,} prompts were answered"
    return None


CHECKS = {"metrics.csv": _metrics_problem, "audit.jsonl": _audit_problem, "adapter": _result_problem}


def unfinished(directory, state, keep):
    """Whether a run whose newest round is its last lacks something of its end, or holds what its end deletes."""
    files, clients = checkpoint.files(directory), checkpoint.clients_files(directory)
    if not files or checkpoint.round_of(files[0]) != state.round:
        return False  # an older round was asked for
    return bool(
        len(files) > keep
        or any(not 0 <= state.round - checkpoint.round_of(path) < keep for path in clients)
        or checkpoint.half_written(directory)
        or any(check(directory, state) for check in CHECKS.values())
    )
