"""Data: read a table, cut and deal it by the configuration, and make batches of what encode.py makes of it."""

import glob
import json
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gdmpi import answers, generate, libraries, partition, rng
from gdmpi.encode import Rows, columns, counts, encode, resolve_template
from gdmpi.errors import UserError

DEMO = Path(__file__).parent / "demo" / "data.jsonl"
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(eq=False)
class Prepared:
    """Pooled data, ready to train on: train is {client: Rows}; report counts what was read, kept, cut and dropped.

    public: Rows that no client has, see public_rows(); None if data.public is no fraction.
    """

    train: dict
    validation: Rows
    test: Rows
    report: dict
    public: Rows | None = None


# ---- from the configuration to rows --------------------------------------------------------------------------------


def prepare(config, tokenizer, deal=True):
    """Read data.name, cut off validation and test, deal the training rows to the clients, tokenise all: Prepared.

    deal False leaves the training rows out: for evaluation alone.
    """
    with _cache(config) as cache:
        table = read(config.data.name, config, cache)
        generator = rng.stream(config.run.seed, "held-out")
        (train, *held), report, numbers, public = _prepare(config, tokenizer, table, generator, config.data.name)
        clients, split = _deal(config, train, table, numbers) if deal else ({}, {})
    for number, key in enumerate(("validation", "test")):
        if is_file(config, key):
            held[number] = prepare_held_out_file(config, tokenizer, key)
            report[key] = counts(held[number])
    report["clients"] = {client: len(rows) for client, rows in clients.items()}
    return Prepared(clients, *held, report | split, public)


def _deal(config, train, table, numbers):
    """{client: Rows} of the training rows, and {"split": who has which values of a column} if one decides.

    numbers are the table's training rows before any was dropped for its length. split is partition.tally() of the rows
    kept, with the column's name and each client's tokens, all and those that carry loss.
    """
    split, count, generator = config.clients.split, config.clients.count, rng.stream(config.run.seed, "partition")
    values = split.column and partition.column(table, split.column, numbers, config.data.name)
    # dealt before rows are dropped: another tokenizer leaves every row with its client
    if split.kind == "by":
        dealt = partition.by(values, count)
    elif split.kind == "dirichlet":
        dealt = partition.dirichlet(values, count, split.alpha, generator)
    else:
        dealt = partition.iid(len(numbers), count, generator)
    kept = [places[np.isin(numbers[places], train.index)] for places in dealt]
    clients = {c: train.take(np.flatnonzero(np.isin(train.index, numbers[places]))) for c, places in enumerate(kept)}
    for client, rows in clients.items():
        if not len(rows):
            what = f"none of the rows of client {client} has a response to learn"
            larger = ", or a larger clients.split.alpha" * (split.kind == "dirichlet")
            raise UserError(f"clients.count: {what}; use fewer clients{larger}")
    if not values:
        return clients, {}
    tokens = {"tokens": [len(rows.tokens) for rows in clients.values()]}
    tokens |= {"target_tokens": [rows.target_tokens for rows in clients.values()]}
    return clients, {"split": {"column": split.column} | partition.tally(values, kept) | tokens}


def prepare_client(config, tokenizer, client, path):
    """Read and cut one client's own file, and nothing else: (train, validation, test) Rows and the report.

    A held-out part that the configuration names as a file of its own is empty here: see prepare_held_out_file.
    """
    with _cache(config) as cache:
        table = read(str(path), config, cache, "clients.split.files")
        generator = rng.stream(config.run.seed, "held-out", client=client)
        parts, report, *_ = _prepare(config, tokenizer, table, generator, str(path), client)
    return *parts, report


def prepare_held_out_file(config, tokenizer, key):
    """Rows of the file that data.validation or data.test (the key) names; None if it names a fraction or a split."""
    if not is_file(config, key):
        return None
    name = getattr(config.data, key)
    with _cache(config) as cache:
        table = read(name, config, cache, f"data.{key}")
        template, _ = resolve_template(config, tokenizer)
        roles = columns(config, table, name)
        where = f"data.{key}: {name}"
        rows = encode(table, roles, tokenizer, template, config.data.max_length, where=where)[0]
        rows.answers = answers.candidates(config, table, roles, tokenizer, template, rows, where)
        rows.references = generate.references(config, key, table, roles, rows, where)
        rows.group = _groups(config, table, rows, where)
        return rows


def public_rows(config, tokenizer, table, roles, numbers, where):
    """The public rows of a table: with evaluation.labels each with every label, as answers.tried() gives them.

    Else with their responses, whose target tokens are then places to look at: nothing learns that they are right.
    """
    template, _ = resolve_template(config, tokenizer)
    if config.evaluation.labels:
        orders = [config.evaluation.labels] * len(numbers)
        rows = answers.tried(config, table, roles, tokenizer, template, numbers, orders, where)
        rows.index = numbers[rows.index]
        return rows
    return encode(table, roles, tokenizer, template, config.data.max_length, numbers, where)[0]


def prepare_public_file(config, tokenizer):
    """The public_rows() of the file that data.public names; None if it names a fraction."""
    name = config.data.public
    if not isinstance(name, str):
        return None
    with _cache(config) as cache:
        table = read(name, config, cache, "data.public")
        numbers = np.arange(len(table))
        return public_rows(config, tokenizer, table, columns(config, table, name), numbers, f"data.public: {name}")


def client_files(config):
    """The clients' files, one each: the configured list in its order, or what the pattern matches, sorted."""
    given = config.clients.split.files
    paths = given
    if isinstance(given, str):
        paths = sorted(glob.glob(given)) if glob.has_magic(given) else [given]  # noqa: PTH207 (absolute patterns)
    if len(paths) != config.clients.count:
        raise UserError(
            f"clients.split.files: {len(paths)} files for clients.count {config.clients.count}; make them equal"
        )
    # a site's file need not be visible elsewhere: there each rank finds out about its own when it reads it
    missing = [path for path in paths if config.clients.boundary != "site" and not Path(path).exists()]
    if missing:
        raise UserError(f"clients.split.files: {missing[0]}: no such file or directory ({Path(missing[0]).absolute()})")
    return [Path(path) for path in paths]


def is_file(config, key):
    """Whether data.validation or data.test (the key) names a file of its own: it has a slash or a known ending."""
    value = getattr(config.data, key)
    named = isinstance(value, str) and not config.data.split_column
    return named and ("/" in value or Path(value).suffix in FORMATS)


def _prepare(config, tokenizer, table, generator, name, client=None):
    """What pooled data and a client's file share: (parts, report, numbers of the training rows, public rows or None).

    parts: [train, validation, test].
    """
    template, _ = resolve_template(config, tokenizer)
    roles = columns(config, table, name)
    held = {key: None if is_file(config, key) else getattr(config.data, key) for key in ("validation", "test")}
    ids, groups = partition.parts(config, table, held, generator, name)
    report = {"name": name, "rows": len(table), "left_out": len(table) - sum(map(len, ids)), "groups": groups}
    report |= {"columns": roles, "template": template}
    parts, public = [], None
    if isinstance(config.data.public, float) and config.data.public:
        ids[0], numbers = partition.set_aside(config, table, ids[0], rng.stream(config.run.seed, "public"))
        public = public_rows(config, tokenizer, table, roles, numbers, f"data.name: {name}: public")
    for key, part in zip(("train", "validation", "test"), ids, strict=True):
        where = f"data.name: {name}: {key}"
        rows, report[key] = encode(table, roles, tokenizer, template, config.data.max_length, part, where)
        if key != "train":
            rows.answers = answers.candidates(config, table, roles, tokenizer, template, rows, where)
            rows.references = generate.references(config, key, table, roles, rows, where, client)
            rows.group = _groups(config, table, rows, name)
            report[key] |= counts(rows)
        parts.append(rows)
    return parts, report, ids[0], public


def _groups(config, table, rows, name):
    """Rows.group of held-out rows, as evaluation.by says; None without."""
    by = config.evaluation.by
    return np.array(partition.column(table, by, rows.index, name, "evaluation.by")) if by and len(rows) else None


@contextmanager
def _cache(config):
    """Where the library keeps its copy of what it reads; of a site's rows, a private place that is deleted at once."""
    if config.clients.boundary == "site":
        with tempfile.TemporaryDirectory(prefix="gdmpi-", ignore_cleanup_errors=True) as directory:
            yield directory
    else:
        yield str(Path(config.run.cache) / "datasets")


# ---- reading -------------------------------------------------------------------------------------------------------


def read(name, config, cache, where="data.name"):
    """Read a table, a datasets.Dataset: of a file, a directory (of files, or made by save_to_disk), a hub id, or demo.

    Of a data set with several splits it is the one called train. If data.validation or data.test name others, these
    come along, told apart by the column partition.SPLIT. where names the configuration's key in errors.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    where, path = f"{where}: {name}", DEMO if name == "demo" else Path(name)
    try:
        if path.is_file():
            if path.suffix not in FORMATS:
                raise UserError(f"{where}: unknown kind of file; known are {' '.join(FORMATS)}")
            # without the option a csv's cell "NA" would be no text but a missing value
            options = {"keep_default_na": False} if path.suffix == ".csv" else {}
            files = {"train": str(path)}
            table = datasets.load_dataset(
                FORMATS[path.suffix], data_files=files, cache_dir=cache, split="train", **options
            )
        elif path.is_dir():
            saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
            table = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path), cache_dir=cache)
        else:
            table = _read_hub(name, path, cache, where)
        for part in table.values() if isinstance(table, dict) else [table]:
            part.data.validate(full=True)  # text that is not UTF-8 would fail only later, and in a traceback
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: {_reason(path, error)}") from None
    if isinstance(table, dict):
        table = _choose_splits(table, config, where)
    if len(table) == 0:
        raise UserError(f"{where}: holds no rows")
    return table


def _read_hub(name, path, cache, where):
    """Load a hub id; without a network only what the cache holds, since the library would retry for half a minute."""
    import datasets
    import huggingface_hub

    missing = f"{where}: no such file or directory ({path.absolute()})"
    if path.suffix in FORMATS or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(missing)
    if not libraries.hub_answers():
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(name, cache_dir=cache)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        unreachable = isinstance(error, ConnectionError)
        what = "the hub cannot be reached" if unreachable else "the hub has no such data set, or not for you"
        raise UserError(f"{missing}, and {what}; give a local path") from None


def _reason(path, error):
    """Why a file could not be read, in a few words: the library's errors do not name the line."""
    if path.suffix in {".jsonl", ".json"} and path.is_file():
        with path.open("rb") as file:
            pieces = enumerate(file, 1) if path.suffix == ".jsonl" else [(0, file.read())]
            for line, piece in pieces:
                try:
                    json.loads(piece) if piece.strip() else None
                except ValueError as problem:
                    what = getattr(problem, "msg", "not UTF-8 text")
                    line = line or getattr(problem, "lineno", 1)
                    return f"line {line} is not valid JSON ({what}); correct or remove it"
    if isinstance(error, StopIteration) or "no data" in str(error) or (path.is_file() and path.stat().st_size == 0):
        return "holds no rows"
    return f"cannot be read: {(str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]}"


def _choose_splits(splits, config, where):
    import datasets

    if len(splits) == 1:
        return next(iter(splits.values()))
    if "train" not in splits:
        raise UserError(
            f"{where}: has the splits {', '.join(splits)} but none called train; give one of them as a file"
        )
    data = config.data
    wanted = [] if data.split_column else [name for name in (data.validation, data.test) if name in splits]
    if not wanted:
        return splits["train"]
    names = dict.fromkeys(["train", *wanted])
    return datasets.concatenate_datasets(
        [splits[name].add_column(partition.SPLIT, [name] * len(splits[name])) for name in names]
    )


# ---- batches -------------------------------------------------------------------------------------------------------


def batches(rows, batch_size, generator):
    """One epoch: the row positions in random order, cut into arrays of batch_size, the last one maybe smaller."""
    order = generator.permutation(len(rows))
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]


def pad(rows, ids):
    """A batch of rows: (tokens int64, attention mask int64, target bool), each [rows, longest], zeros at the right."""
    pieces = [rows.row(i) for i in ids]
    shape = len(pieces), max(len(tokens) for tokens, _ in pieces)
    tokens, attention, target = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
    for i, (row, carries) in enumerate(pieces):
        tokens[i, : len(row)], attention[i, : len(row)], target[i, : len(row)] = row, 1, carries
    return tokens, attention, target
