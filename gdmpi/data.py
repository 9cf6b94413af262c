"""Data: read a table, lay each row out by a template, tokenise it, mark the tokens that carry loss, make batches.

What carries loss is found by character offsets, never by looking for token ids: a row is rendered to one text, the
places of its responses in that text are known, and a token is a target if it covers at least one character of a
response. A token that straddles prompt and response is therefore a target: in "Sentiment: {response}" the space
belongs to the first token of the answer, and without it a one-word answer would never be learned.
"""

import glob
import json
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from gdmpi import partition, rng
from gdmpi.config import UserError

DEMO = Path(__file__).parent / "demo" / "data.jsonl"
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
CHUNK = 1000  # rows tokenised at once

NAMES = {  # the columns that are recognised, by the part they play
    "prompt": ("prompt", "question"),
    "response": ("response", "answer"),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
    "messages": ("messages", "conversations"),
    "text": ("text",),
}
# the parts that make a row, in the order they are written; input may be missing
FORMS = (("prompt", "response"), ("instruction", "input", "output"), ("messages",), ("text",))
ROLES = {"prompt": "user", "instruction": "user", "input": "input", "response": "assistant", "output": "assistant"}
ROLES |= {"human": "user", "gpt": "assistant"}  # ShareGPT's words

PLAIN = "{prompt}\n{response}"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n{response}"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n{response}"
)


@dataclass(eq=False)
class Rows:
    """Tokenised rows, one behind the other in flat arrays: quick to cut, to hash and to send."""

    tokens: np.ndarray  # int32, all rows' tokens
    target: np.ndarray  # bool, whether a token carries loss; never a row's first token, which nothing predicts
    starts: np.ndarray  # int64, where each row begins, and the number of tokens last
    index: np.ndarray  # int64, each row's number in the table it was read from

    def __len__(self):
        return len(self.index)

    @property
    def target_tokens(self):
        return int(np.count_nonzero(self.target))

    def row(self, i):
        """The tokens of row i and whether each carries loss."""
        place = slice(self.starts[i], self.starts[i + 1])
        return self.tokens[place], self.target[place]

    def take(self, ids):
        """The rows with these positions, in this order."""
        ids = np.asarray(ids, np.int64)
        lengths = np.diff(self.starts)[ids]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        places = np.repeat(self.starts[ids] - starts[:-1], lengths) + np.arange(starts[-1])
        return Rows(self.tokens[places], self.target[places], starts, self.index[ids])

    def arrays(self):
        """{name: array}, to send or to save; from_arrays is the inverse."""
        return {"tokens": self.tokens, "target": self.target, "starts": self.starts, "index": self.index}

    @classmethod
    def from_arrays(cls, arrays):
        return cls(*(np.array(arrays[name]) for name in ("tokens", "target", "starts", "index")))


@dataclass(eq=False)
class Prepared:
    """Pooled data, ready to train on: train is {client: Rows}; report counts what was read, kept, cut and dropped."""

    train: dict
    validation: Rows
    test: Rows
    report: dict


# ---- from the configuration to rows --------------------------------------------------------------------------------


def prepare(config, tokenizer):
    """Read data.name, cut off validation and test, deal the training rows to the clients, tokenise all: Prepared."""
    with _cache(config) as cache:
        table = read(config.data.name, config, cache)
        generator = rng.stream(config.run.seed, "held-out")
        (train, *held), report, numbers = _prepare(config, tokenizer, table, generator, config.data.name)
    # dealt before rows are dropped for their length: another tokenizer leaves every row with its client
    dealt = partition.iid(len(numbers), config.clients.count, rng.stream(config.run.seed, "partition"))
    clients = {}
    for client, places in enumerate(dealt):
        clients[client] = train.take(np.flatnonzero(np.isin(train.index, numbers[places])))
        if not len(clients[client]):
            raise UserError(
                f"clients.count: none of the rows of client {client} has a response to learn; use fewer clients"
            )
    for number, key in enumerate(("validation", "test")):
        if _is_file(config, key):
            held[number] = prepare_held_out_file(config, tokenizer, key)
            report[key] = _counts(held[number])
    report["clients"] = {client: len(rows) for client, rows in clients.items()}
    return Prepared(clients, *held, report)


def prepare_client(config, tokenizer, client, path):
    """Read and cut one client's own file, and nothing else: (train, validation, test) Rows and the report.

    A held-out part that the configuration names as a file of its own is empty here: see prepare_held_out_file.
    """
    with _cache(config) as cache:
        table = read(str(path), config, cache, "clients.split.files")
        generator = rng.stream(config.run.seed, "held-out", client=client)
        parts, report, _ = _prepare(config, tokenizer, table, generator, str(path))
    return *parts, report


def prepare_held_out_file(config, tokenizer, key):
    """Rows of the file that data.validation or data.test (the key) names; None if it names a fraction or a split."""
    if not _is_file(config, key):
        return None
    name = getattr(config.data, key)
    with _cache(config) as cache:
        table = read(name, config, cache, f"data.{key}")
        template, _ = resolve_template(config, tokenizer)
        roles = columns(config, table, name)
        return encode(table, roles, tokenizer, template, config.data.max_length, where=f"data.{key}: {name}")[0]


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


def _is_file(config, key):
    """Whether data.validation or data.test (the key) names a file of its own: it has a slash or a known ending."""
    value = getattr(config.data, key)
    named = isinstance(value, str) and not config.data.split_column
    return named and ("/" in value or Path(value).suffix in FORMATS)


def _prepare(config, tokenizer, table, generator, name):
    """What pooled data and a client's file share: ([train, validation, test], report, numbers of the training rows)."""
    template, _ = resolve_template(config, tokenizer)
    roles = columns(config, table, name)
    held = {key: None if _is_file(config, key) else getattr(config.data, key) for key in ("validation", "test")}
    ids, groups = partition.parts(config, table, held, generator, name)
    report = {"name": name, "rows": len(table), "left_out": len(table) - sum(map(len, ids)), "groups": groups}
    report |= {"columns": roles, "template": template}
    parts = []
    for key, part in zip(("train", "validation", "test"), ids, strict=True):
        where = f"data.name: {name}: {key}"
        rows, report[key] = encode(table, roles, tokenizer, template, config.data.max_length, part, where)
        parts.append(rows)
    return parts, report, ids[0]


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
    if not _hub_answers():
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(name, cache_dir=cache)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        unreachable = isinstance(error, ConnectionError)
        what = "the hub cannot be reached" if unreachable else "the hub has no such data set, or not for you"
        raise UserError(f"{missing}, and {what}; give a local path") from None


def _hub_answers():
    import socket
    import urllib.request

    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True  # a proxy's business; only trying would tell
    address = urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


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


# ---- laying out ----------------------------------------------------------------------------------------------------


def columns(config, table, name):
    """Which column of the table plays which part, {part: column}: configured in data.columns, or known by its name."""
    there, named = table.column_names, config.data.columns
    for part, column in named.items():
        if column not in there:
            raise UserError(f"data.columns.{part}: {name} has no column {column!r}; it has {', '.join(there)}")
    roles = {part: column for part, known in NAMES.items() for column in reversed(known) if column in there} | named
    for form in FORMS:
        if set(named) <= set(form) and all(part in roles for part in form if part != "input"):
            return {part: roles[part] for part in form if part in roles}
    raise UserError(
        f"data.columns: the columns of {name} are not recognised ({', '.join(there)}); name them, as in "
        "data.columns.prompt=COLUMN data.columns.response=COLUMN, or data.columns.text=COLUMN"
    )


def resolve_template(config, tokenizer):
    """The template to use, chat, alpaca, plain or the user's own text, and the reason for it in words."""
    template, has_chat = config.data.template, bool(getattr(tokenizer, "chat_template", None))
    if template == "auto" and has_chat:
        return "chat", "the tokenizer has a chat template"
    if template == "auto":
        return "plain", "the tokenizer has no chat template"
    if template == "chat" and not has_chat:
        raise UserError(
            "data.template: chat, but the tokenizer has no chat template; use plain, alpaca or your own text"
        )
    if template not in {"chat", "alpaca", "plain"}:
        head, response, _ = template.partition("{response}")
        if not response or "{prompt}" not in head:
            raise UserError(
                f"data.template: {template!r} is not auto, chat, alpaca or plain, "
                "nor a text with {prompt} and then {response}"
            )
    return template, "as configured"


def turns(row, where):
    """A row {part: value} as [(role, content)]: roles are text, input (Alpaca's, after user), or a conversation's."""
    if "text" in row:
        return [("text", _text(row["text"], where))]
    if "messages" in row:
        try:
            said = [(message.get("role") or message["from"], message) for message in row["messages"] or ()]
            said = [(role, message["content"] if "content" in message else message["value"]) for role, message in said]
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{where}: messages must be a list of {{role, content}} or {{from, value}}") from None
        return [(ROLES.get(role, role), _text(content, where)) for role, content in said]
    return [(ROLES[part], _text(value, where)) for part, value in row.items()]


def _text(value, where):
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, (bool, int, float)):
        return str(value)  # a class label
    raise UserError(f"{where}: holds a {type(value).__name__} where text is expected")


def render(said, template, tokenizer, where):
    """Lay out turns [(role, content)]: the text, and the places [(begin, end)] in it that carry loss.

    Those are the responses with what ends them (the template's words after {response} and the end-of-sequence
    token, or a chat template's end-of-turn marker), or a text as a whole. Blank responses carry none, nor does an
    assistant's turn that opens a conversation: it answers nothing.
    """
    if template == "chat" and said and said[0][0] != "text":
        return _render_chat(said, tokenizer, where)
    text, spans, prompt, extra, end = "", [], [], "", tokenizer.eos_token or ""
    for position, (role, content) in enumerate(said):
        if role == "input":
            extra = content
        elif role not in {"assistant", "text"}:
            prompt.append(content)
        else:
            head, tail = ("", "") if role == "text" else _layout(template, "\n".join(filter(None, prompt)), extra)
            begin, text = len(text + head), text + head + content + tail
            text += "" if end and text.endswith(end) else end
            if content.strip() and (position or role == "text"):
                spans.append((begin, len(text)))
            prompt, extra = [], ""
    return text, spans


def _layout(template, prompt, extra):
    """What comes before and after the response."""
    if template == "alpaca":
        head, _, tail = (ALPACA_INPUT if extra else ALPACA).partition("{response}")
        before, _, after = head.partition("{prompt}")
        return before + prompt + after.replace("{input}", extra), tail
    head, _, tail = (PLAIN if template == "plain" else template).partition("{response}")
    return head.replace("{prompt}", f"{prompt}\n{extra}" if extra else prompt), tail


def _render_chat(said, tokenizer, where):
    messages = []
    for role, content in said:
        if role == "input":
            messages[-1]["content"] += f"\n{content}" if content else ""
        else:
            messages.append({"role": role, "content": content})

    def written(count, **options):
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, **options)
        except Exception as error:  # a template may raise anything, and some do on purpose
            raise UserError(f"{where}: the chat template refuses it ({error}); use another data.template") from None

    text, spans = written(len(messages)), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        before = written(i, add_generation_prompt=True)
        after = text if i + 1 == len(messages) else written(i + 1)
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                f"{where}: the tokenizer's chat template is unusable for training, it writes a turn differently "
                "once more follows; use another data.template"
            )
        # the line break after an end-of-turn marker is never generated; without a marker it is the marker
        stripped, content = after.rstrip(), message["content"].rstrip()
        if content:
            spans.append((len(before), len(after) if stripped.endswith(content) else len(stripped)))
    return text, spans


# ---- tokenising ----------------------------------------------------------------------------------------------------


def encode(table, roles, tokenizer, template, max_length, ids=None, where="data.name"):
    """Tokenise rows of a table (all, or those numbered ids): (Rows, {what: count}).

    roles come from columns(), the template from resolve_template(). Rows are cut at max_length tokens; those that then
    hold no target are dropped.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "model.name: its tokenizer has no fast version, hence no character offsets; give a tokenizer.json"
        )
    ids = np.arange(len(table)) if ids is None else np.asarray(ids, np.int64)
    # a chat template writes all special tokens the model expects; other texts get the tokenizer's own, such as bos
    options = {"add_special_tokens": template != "chat" or "text" in roles, "verbose": False}
    table, known, kept, truncated = table.select_columns(list(set(roles.values()))), {}, [], 0
    for begin in range(0, len(ids), CHUNK):
        numbers = ids[begin : begin + CHUNK].tolist()
        got = table[numbers]
        laid = []
        for i, number in enumerate(numbers):
            row = {part: got[column][i] for part, column in roles.items()}
            place = f"{where}: row {number + 1}"
            laid.append(render(turns(row, place), template, tokenizer, place))
        for number, (tokens, target) in zip(numbers, _tokenise(laid, tokenizer, options, known), strict=True):
            if target[:max_length].any():
                kept.append((number, tokens[:max_length], target[:max_length]))
                truncated += len(tokens) > max_length
    if len(ids) and not kept:
        raise UserError(f"{where}: no row has a response within data.max_length {max_length} tokens; raise it")
    numbers, tokens, targets = zip(*kept, strict=True) if kept else ((), (), ())
    rows = Rows(
        np.concatenate([np.zeros(0, np.int32), *tokens]),
        np.concatenate([np.zeros(0, bool), *targets]),
        np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        np.array(numbers, np.int64),
    )
    cut = {"rows": len(ids), "dropped": len(ids) - len(rows), "truncated": truncated}
    return rows, cut | _counts(rows)


def _counts(rows):
    return {"kept": len(rows), "tokens": len(rows.tokens), "target_tokens": rows.target_tokens}


def _tokenise(laid, tokenizer, options, known):
    """Yield the tokens and targets of each (text, spans)."""
    options = options | {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    encoded = tokenizer([text for text, _ in laid], **options)
    for i, (text, spans) in enumerate(laid):
        ids, added = encoded["input_ids"][i], np.array(encoded["special_tokens_mask"][i], bool)
        offsets = encoded["offset_mapping"][i]
        lost = {character for character in set(text) if _is_lost(character, tokenizer, known)}
        if lost:
            # Lost characters shift the offsets of all that follows. Without them the same tokens have right ones.
            places = np.cumsum([0, *(character not in lost for character in text)])
            again = tokenizer("".join(character for character in text if character not in lost), **options)
            if again["input_ids"] == ids:
                offsets, spans = again["offset_mapping"], [(places[a], places[b]) for a, b in spans]
        first, last = np.array(offsets, np.int64).reshape(-1, 2).T
        first = np.where(first == last, first - 1, first)  # a space whose offsets were trimmed stands before its place
        target = np.zeros(len(ids), bool)
        for begin, end in spans:
            target |= (last > begin) & (first < end)
        target &= ~added
        # the text may begin or end with the special token that the tokenizer also adds there
        twice = [len(ids) > 1 and added[a] and ids[a] == ids[b] == token for a, b, token in _ends(tokenizer)]
        keep = slice(int(twice[0]), len(ids) - int(twice[1]))
        target[keep][:1] = False
        yield np.array(ids[keep], np.int32), target[keep]


def _ends(tokenizer):
    return (0, 1, tokenizer.bos_token_id), (-1, -2, tokenizer.eos_token_id)


def _is_lost(character, tokenizer, known):
    """Whether the tokenizer drops a character without a trace: its vocabulary lacks it and has no unknown token."""
    if character not in known:
        once, twice = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (character, character * 2))
        known[character] = not character.isspace() and once == twice and tokenizer.unk_token_id not in once
    return known[character]


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
