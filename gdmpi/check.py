"""What a configuration means, sends and needs, found out without training: sizes from the model's shape alone.

The model is laid out on torch's meta device, where tensors have shapes and no memory, and the adapter is put on it
there: the counts are exact, and no weight is ever read. Memory and time are estimates (see needs.py).
"""

import glob
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from gdmpi import codecs, data, estimate, flat, generate, hosting, libraries, model, needs
from gdmpi.errors import UserError, first_line
from gdmpi.public import described
from gdmpi.report import table as tabulate
from gdmpi.views import peft_name
from gdmpi.words import TAB, answering, how_split, sent, size

SHAPES = Path(__file__).parent / "shapes.yaml"
FETCHED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")  # weights, configuration, tokenizer
LEFT = ("*/*", "consolidated*")  # the same weights in other formats
GATED = "is gated: accept its terms at https://huggingface.co/{} and set HF_TOKEN to a token that may read it"
WIDTH = 108  # of a table
SHOWN, NAME = 16, 14  # clients of a split that have a line, letters of a value that head a column


def report(config):
    """All there is to say of a configuration, as lines. UserError if the model is unknown or the data unreadable."""
    libraries.environment(config.run.cache)
    generate.check(config)
    shape = lay_out(config)
    parts = (_meaning(config), _sizes(config, shape), needs.memory(config, shape), _rows(config, shape))
    return [line for part in (*parts, _to_get(config, shape)) for line in part]


def download(config):
    """Fetch the model and the data set, where they are hub ids, into run.cache; UserError, one line, if that fails."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    libraries.environment(config.run.cache)
    import huggingface_hub.constants
    from huggingface_hub.errors import GatedRepoError

    name = config.model.name
    sets = [table for _, table, state in _tables(config) if state == "hub"]
    wanted = model.locate(name) == name and not Path(name).is_dir()
    if (wanted or sets) and not libraries.hub_answers():
        what = f"model.name: {name}" if wanted else f"data.name: {sets[0]}"
        raise UserError(f"{what}: the hub cannot be reached; --download needs a network, as on a login node")
    if wanted:
        try:
            place = huggingface_hub.snapshot_download(name, allow_patterns=FETCHED, ignore_patterns=LEFT)
        except GatedRepoError:
            raise UserError(f"model.name: {name}: {GATED.format(name)}") from None
        except Exception as error:  # the network's, the hub's and the disk's have nothing in common
            raise UserError(f"model.name: {name}: cannot be downloaded ({first_line(error)})") from None
        if not _weights(place):
            raise UserError(f"model.name: {name}: the hub has no safetensors weights of it; choose another model")
    for table in sets:
        data.read(table, config, str(Path(config.run.cache) / "datasets"))


# ---- the model -----------------------------------------------------------------------------------------------------


def lay_out(config):
    """What can be known of the model and its adapter without weights, as a namespace.

    directory: where it lies, or None. saved: the dtype of its weights. linear: weights of the linear layers apart from
    the head, those that 4-bit applies to. sizes: estimate.Shape. nbytes: of what is trained, in float32; schema: of
    what travels. codec: for the clients of a round.
    """
    torch, transformers, _ = libraries.load()
    settings, directory, origin, gated = _settings(config.model.name, transformers)
    plain = config.model_copy(update={"model": config.model.model_copy(update={"quantize": "none"})})
    with torch.device("meta"), libraries.without_compiler():
        try:
            base = transformers.AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
        except ValueError as error:
            raise UserError(f"model.name: {config.model.name}: {first_line(error)}") from None
        base.requires_grad_(False)
        linear = sum(layer.weight.numel() for _, layer in model.linear_layers(base))
        parameters = sum(p.numel() for p in base.parameters())
        weights = flat.Schema((name, np.float32, p.shape) for name, p in base.named_parameters())
        adapted = model.adapt(plain, base)
    trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    schema = flat.Schema((peft_name(name), np.float32, p.shape) for name, p in trained)
    cohort, merged = hosting.cohort(config, 1), config.exchange.what == "merged"
    return SimpleNamespace(
        directory=directory,
        origin=origin,
        gated=gated,
        saved=str(getattr(settings, "dtype", None) or "float32").removeprefix("torch."),
        parameters=parameters,
        linear=linear,
        sizes=estimate.shape_of(adapted),
        nbytes=schema.nbytes,
        schema=weights if merged else schema,
        codec=codecs.Exact(weights if merged else hosting.sent(config, adapted, schema), len(cohort)),
        warnings=model.misplaced(plain, adapted),
    )


def _settings(name, transformers):
    """(transformers configuration, directory or None, origin, gated) of a model that is here, known or on the hub."""
    import huggingface_hub.constants
    import yaml

    place, origin = model.locate(name), "as in its config.json"
    if not Path(place).is_dir():
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json") if place == name else None
        place = str(Path(cached).parent) if isinstance(cached, str) else place
    known = yaml.safe_load(SHAPES.read_text(encoding="utf-8")).get(name, {})
    here, gated = Path(place).is_dir(), known.get("gated", False)
    if known and not here:
        return transformers.AutoConfig.for_model(**known["config"]), None, "its published shape", gated
    if not here and not libraries.hub_answers():  # the library would try for half a minute
        raise model.unreachable("model.name", name, "the hub cannot be reached")
    try:
        settings = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if not here:
            raise model.unreachable("model.name", name, error) from None
        raise UserError(f"model.name: {place}: cannot read its config.json: {first_line(error)}") from None
    return settings, Path(place) if here else None, origin, gated


def _weights(directory):
    """Bytes of the weights that lie in a model's directory."""
    return sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))


# ---- the lines -----------------------------------------------------------------------------------------------------


def _meaning(config):
    train = config.train
    local = f"{train.steps} steps" if train.steps else f"{train.epochs} epoch{'s' * (train.epochs > 1)}"
    how = f"{train.optimizer}, lr {train.lr:g} ({train.schedule}, warm-up {train.warmup}), clip {train.clip_norm}"
    said = "".join(f", {key} {value}" for key, value in config.method.model_dump(exclude={"name", "weighting"}).items())
    yield f"{config.method.name}{said} over {config.run.rounds} rounds, into {config.directory}"
    yield f"  local    {local} of {train.batch_size} rows a step, {how}, weight decay {train.weight_decay:g}"
    if config.evaluation.generate:
        yield f"  answers  {answering(config)}"


def _sizes(config, shape):
    clients, adapter = shape.codec.clients, config.model.adapter
    rounds = [hosting.bytes_of(config, shape.schema, shape.codec, t + 1) for t in range(config.run.rounds or 1)]
    (down, up), total = rounds[0], clients * sum(map(sum, rounds[: config.run.rounds]))
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    count, server = shape.nbytes // 4, config.server
    trained = f"{count:,} trainable parameters ({count / shape.parameters:.2%} of the base)"
    mean = f"{config.method.weighting} mean, server {server.optimizer}, lr {server.lr:g}"
    if hosting.pooled(config):
        yield f"  clients  the rows of all {config.clients.count} are one client's"
    else:
        yield f"  clients  {config.clients.count}{how_split(config)}, {clients} a round, {mean}"
    frozen = "all trained" if adapter.kind == "full" else "frozen"
    yield f"  model    {config.model.name}: {shape.parameters:,} parameters, {frozen} ({shape.origin})"
    scale = f"alpha {adapter.alpha:g}{', rslora' * adapter.rslora}, dropout {adapter.dropout:g}"
    if adapter.kind == "lora":
        yield f"  adapter  LoRA r={adapter.r}, {scale} on {targets}: {trained}"
    yield from (f"  warning  {line}" for line in shape.warnings)
    said = f"{size(total)} in {config.run.rounds} rounds of {clients} clients"
    said = "and, most of it, what clients ask in each step and are answered" if hosting.asks(config) else said
    said = "answers, as below" if config.data.public else f"{sent(config, down, up)}; {said}"
    yield f"  travels  {'nothing' if hosting.alone(config) else said}"
    kept = (config.train.keep_optimizer or hosting.pooled(config)) and config.train.optimizer == "adamw"
    moments = f", {size(2 * shape.nbytes)} a client's moments" * kept
    yield f"  disk     {size(shape.schema.nbytes)} a round file{moments}; the newest {config.run.keep} are kept"


def _rows(config, shape):
    """The data: what is missing, or what is read, dealt, dropped and cut."""
    tables = _tables(config)
    missing = [f"{key}: {name} is not here yet" for key, name, state in tables if state != "here"]
    if config.clients.boundary == "site":
        missing = [f"{config.clients.split.files}: of the sites alone (clients.boundary), so not read here"]
    elif not missing and shape.directory is None:
        missing = [f"{key}: {name}, counted once the model's tokenizer is here too" for key, name, _ in tables]
    if missing:
        yield from (f"  data     {line}" for line in missing)
        return
    tokenizer, cut = model.tokenizer(str(shape.directory)), None
    if config.clients.split.kind == "files":
        files = enumerate(data.client_files(config))
        reports = [data.prepare_client(config, tokenizer, client, path)[3] for client, path in files]
        counts = [each["train"]["kept"] for each in reports]
        for key in ("validation", "test"):
            data.prepare_held_out_file(config, tokenizer, key)  # only to learn whether it can be read
    else:
        prepared = data.prepare(config, tokenizer)
        cut, reports, counts = prepared.public, [prepared.report], list(prepared.report["clients"].values())
    for each in reports:
        used = ", ".join(dict.fromkeys(each["columns"].values()))
        yield f"  data     {each['name']}: {each['rows']:,} rows; columns {used}; template {each['template']}"
        for key in ("train", "validation", "test"):
            part = {"dropped": 0, "truncated": 0} | each[key]
            gone = f"({part['dropped']:,} dropped, {part['truncated']:,} cut)"
            tokens = f"{part['tokens']:,} tokens, loss on {part['target_tokens']:,}"
            answered = f"; accuracy over {part['answered']:,}" if "answered" in part else ""
            yield f"{TAB}{key:10}  {part['kept']:,} rows {gone}: {tokens}{answered}"
    yield from (f"{TAB}{line}" for line in described(config, tokenizer, cut))
    if hosting.pooled(config):
        counts = [sum(counts)]
    steps = [hosting.steps(config, n) for n in counts]
    yield f"{TAB}{_span(counts)} training rows a client, {_span(steps)} steps a round"
    yield from (f"  warning  {line}" for line in hosting.unequal(config, counts))
    yield from _split(reports[0].get("split"))
    yield from needs.time(config, shape, reports, counts, steps)


def _split(split):
    """The training rows of each client and value of the column that decides: a table, cut to what fits a terminal."""
    if not split:
        return
    names = [" ".join(value.split()) for value in split["values"]]
    names = [name if len(name) <= NAME else f"{name[: NAME - 2]}.." for name in names]
    own = list(zip(split["rows"], split["tokens"], split["target_tokens"], strict=True))
    rows, tokens, target = zip(*own, strict=True)
    everyone = ([sum(column) for column in zip(*rows, strict=True)], sum(tokens), sum(target))
    listed = own if len(own) <= SHOWN + 1 else own[:SHOWN]

    def lines(shown):
        head = ["client", "rows", "tokens", "loss on", *names[:shown], *["the others"] * (shown < len(names))]
        cells = []
        for who, (counts, *seen) in zip([*range(len(listed)), "all"], [*listed, everyone], strict=True):
            numbers = [sum(counts), *seen, *counts[:shown], *[sum(counts[shown:])] * (shown < len(names))]
            cells.append([str(who), *(f"{number:,}" if number else "-" for number in numbers)])
        return tabulate(head, cells)

    fitting = (lines(shown) for shown in range(len(names), 0, -1))
    body = next(body for body in fitting if len(body[0]) <= WIDTH)
    if len(own) > len(listed):
        body.insert(-1, f"{len(own) - len(listed):,} more, of {_span([sum(counts) for counts in rows[SHOWN:]])} rows")
    yield f"  split    training rows of each value of {split['column']}, the commonest first"
    yield from (f"{TAB}{line}" for line in body)


def _to_get(config, shape):
    """What has to be downloaded, from where and into where."""
    from huggingface_hub import constants

    name, wanted = config.model.name, []
    if shape.directory is None:
        weights = size(shape.parameters * estimate.BYTES[shape.saved])
        wanted.append(f"{weights} of {constants.ENDPOINT}/{name} into {constants.HF_HUB_CACHE}")
        wanted += [f"{name} {GATED.format(name)}"] * shape.gated
    elif not _weights(shape.directory):
        wanted.append(f"the weights: {shape.directory} holds no safetensors file")
    for key, table, state in _tables(config):
        if state == "hub":
            wanted.append(f"{constants.ENDPOINT}/datasets/{table} into {Path(config.run.cache) / 'datasets'}")
        elif state == "missing" and config.clients.boundary != "site":
            wanted.append(f"{key}: {table}, a local path, so only you can put it there")
    if any(constants.ENDPOINT in line for line in wanted):
        wanted.append("'python -m gdmpi check CONFIG --download' fetches what is on the hub, where there is a network")
    yield from (f"  to get   {line}" for line in wanted)
    if not wanted:
        yield f"  to get   nothing: the model is here, {size(_weights(shape.directory))} of weights"


def _span(numbers):
    return f"{min(numbers):,}" if min(numbers) == max(numbers) else f"{min(numbers):,} to {max(numbers):,}"


def _tables(config):
    """(key, name, state) of every table that is named; its state is here, hub (it may be an id there) or missing."""
    files = config.clients.split.files or []
    named = [("clients.split.files", name) for name in ([files] if isinstance(files, str) else files)]
    named = named or [("data.name", config.data.name)]
    held = [key for key in ("validation", "test") if data.is_file(config, key)]
    named += [(f"data.{key}", getattr(config.data, key)) for key in held]
    return [(key, name, _state(config, key, name)) for key, name in named]


def _state(config, key, name):
    cached = Path(config.run.cache, "datasets", name.replace("/", "___"))
    if name == "demo" or Path(name).exists() or glob.glob(name) or cached.is_dir():  # noqa: PTH207
        return "here"
    local = name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).suffix in data.FORMATS
    return "missing" if local or key != "data.name" else "hub"
