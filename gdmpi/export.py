"""What becomes of a run: its adapter as a PEFT directory, the merged model, and its loss on held-out rows."""

import dataclasses
import functools
import json
import os
import shutil
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gdmpi import adapters, checkpoint, config as configuration, flat, generate, results
from gdmpi.errors import UserError

KINDS = ("validation", "test")
BOUND = ("method", "model.adapter")  # what a run's state has no meaning without
# by which a directory is known, and its key for the model that this came from
BASES = {"adapter": ("adapter_config.json", "base_model_name_or_path"), "model": ("config.json", "_name_or_path")}


def export(source, out, merge):
    """Write the adapter of a run directory or round file to out, or with merge the whole model; lines to print."""
    path, state, lines = results.newest(source)
    config, server = results.server_of(state)
    lines.append(f"round {state.round} of {path.parent}, {results.called(config)} {state.adapter_sha256}")
    found = results.adapters(path.parent, state.round, state.clients, server)
    own = {client: flat.sha256(adapter) for client, adapter in found.items()}
    if results.digest(found.get(None), own) != state.adapter_sha256:
        raise UserError(f"{path}: what it holds does not have the hash that it was saved with")
    if merge and None not in found:
        raise UserError(f"{path}: each client has its own adapter: there is no one model; export without --merge")
    if not merge:
        found = results.everyone(found, path.parent, state.round, state.clients, config)
    with _aside(out) as part:
        results.write_all(part, found, state.about, state.adapter_config, config)
        if results.kind_of(state.adapter_config) == "adapter" and not merge:
            base = json.loads(state.adapter_config)["base_model_name_or_path"]
            form = "" if config.model.quantize == "none" else f" in {config.model.quantize}, as in training"
            folder = str(Path(out) / results.folder(next(iter(found))))
            how = f"peft.PeftModel.from_pretrained(model, {folder!r}), the model being {base}{form}"
            beside = ", the clients' own to its folders" if None in found and len(found) > 1 else ""
            return [*lines, f"adapter written to {out}{beside}; load it with", f"  {how}"]
        if results.kind_of(state.adapter_config) == "adapter":
            lines += adapters.merge(configuration.movable(config), part)
    how = f"transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"
    return [*lines, f"model written to {out}; load it with", f"  {how}"]


@contextmanager
def _aside(out):
    """An empty directory beside out that becomes out when all goes well, and vanishes otherwise."""
    whole = Path(out).resolve()
    if whole.exists() and not (whole.is_dir() and not any(whole.iterdir())):
        raise UserError(f"{out}: exists and is not an empty directory; remove it or choose another")
    part = whole.with_name(f".{whole.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        yield part
        readable = part.stat().st_mode & 0o666
        for file in (path for path in part.rglob("*") if path.is_file()):
            file.chmod(readable)  # safetensors lets only the owner read what it writes
        part.replace(whole)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ---- evaluating ----------------------------------------------------------------------------------------------------


def evaluate(link, source, path, overrides, texts=None):
    """Score a run, a round file, a PEFT adapter or a model on held-out rows; lines to print, at the server.

    path: a configuration file or None. texts: a file for what is generated, or None. All ranks call it; UserError or
    PeerError on all ranks alike.
    """
    title, config, scores, notes = score(link, source, path, overrides, texts)
    if not link.is_server:
        return []
    from gdmpi.evaluate import perplexity

    lines = [title, f"  model    {config.model.name}, {config.model.form} on {config.run.device}"]
    for kind, (found, rows, answered, generated) in scores.items():
        numbers = f"loss {found.loss:.6f}  perplexity {perplexity(found.loss):.4f}" if found.tokens else "no rows"
        over = f"mean over {found.tokens:,} response tokens of {rows:,} rows: {_of(config, kind)}"
        lines.append(f"  {kind:10}  {numbers}  {over}")
        if found.tokens:
            shares = f"token accuracy {found.accuracy:.2%}  bits per byte {found.bits_per_byte:.4f}"
            lines.append(f"  {'':10}  {shares}  of the responses' text")
        lines += [f"  {'':10}  loss {loss:.6f}  {group}" for group, loss in (found.groups or {}).items()]
        if answered:
            lines.append(f"  {'':10}  accuracy {answered[0]:.2%}  the likeliest label of {answered[1]:,} rows")
        if generated:
            lines.append(f"  {'':10}  {generate.said(generated, kind, config.evaluation.new_tokens)}")
            lines.append(f"  {'':10}  BLEU is sacrebleu's {generated['bleu_signature']}")
    return lines + [f"  {note}" for note in notes]


def score(link, source, path, overrides, texts=None):
    """What evaluate() prints: (title, resolved Config, _scores(), notes)."""
    found = link.together(lambda: _look(source) if link.is_server else None)
    # the global state stays at the server; the others need the configuration and what the adapter looks like
    kind, state = link.share(found and (found[0], found[1] and dataclasses.replace(found[1], server={})))
    if kind == "run":
        return _score_run(link, found, state, source, path, overrides, texts)
    return _score_directory(link, kind, Path(source), path, overrides, texts)


def _look(source):
    """What source is: ("run", checkpoint.Round, warnings), or ("adapter" | "model", None, [])."""
    place = Path(source)
    if place.is_dir() and not checkpoint.files(place):
        for kind, (mark, _) in BASES.items():
            if (place / mark).is_file():
                return kind, None, []
        raise UserError(f"{source}: no run, adapter or model: no round files, adapter_config.json or config.json in it")
    return "run", *results.newest(place)[1:]


def _score_run(link, found, state, source, path, overrides, texts):
    from gdmpi import build, hosting

    saved, config = link.together(lambda: _config_of_run(state, path, overrides))
    if hosting.personal(saved):
        one, folder = ("one", "adapter/0000") if hosting.scattered(saved) else ("the server's", "adapter")
        first = f"eval {source}/{folder} {source}/config.yaml"
        raise UserError(f"{source}: each client has its own adapter; score {one}, as in '{first}'")
    server = link.together(lambda: results.server_of(found[1])[1] if link.is_server else None)
    with link.phase(config.run.timeout):
        parts = build.build(link, config, train=False)
        link.together(lambda: _check_schema(parts, state))
        message = link.together(lambda: server.broadcast(state.round + 1) if server else None)
        message = link.bcast(state.round + 1, message)
        scores = _scores(link, parts, {}, message, state.round + 1, texts)
    if not link.is_server:
        return None, parts.config, None, []
    notes = [*found[2], *(f"warning: {line}" for line in parts.about["warnings"])]
    if saved.run.device == "cuda" and parts.config.run.device == "cpu":
        notes.append("device cpu (the run used cuda, which torch does not see here)")
    if all(getattr(saved, part) == getattr(config, part) for part in ("data", "clients", "model")):
        notes += _differences(state, scores)
    title = f"{source}: round {state.round} of {saved.run.rounds}, {results.called(saved)} {state.adapter_sha256}"
    return title, parts.config, scores, notes


def _config_of_run(state, path, overrides):
    """(the run's Config, the one to evaluate with); of a file count only what says whose rows and labels."""
    saved = results.configuration_of(state)
    tree = configuration.movable(saved).plain()
    if path is not None:
        given = configuration.load(path).plain()
        tree |= {section: given[section] for section in ("data", "clients", "evaluation")}
        tree["run"]["seed"] = given["run"]["seed"]
    if any(text.startswith("data.name=") for text in overrides) and tree["clients"]["split"]["kind"] == "files":
        # other rows than the clients' own: everybody scores them together
        tree["clients"] |= {"split": {"kind": "iid"}, "boundary": "shared"}
    config = configuration.load(overrides=overrides, base=tree)
    for key in configuration.changes(saved, config):
        if key.startswith(tuple(f"{part}." for part in BOUND)):
            raise UserError(f"{key}: belongs to the run, an evaluation cannot change it")
    _check_held_out(config)
    return saved, config


def _check_held_out(config):
    generate.check(config)
    if all(getattr(config.data, kind) == 0 for kind in KINDS):
        raise UserError(
            "data.validation, data.test: both are 0, so no rows are held out; to score all rows of a file say "
            "data.validation=FILE"
        )


def _check_schema(parts, state):
    if parts.trainable is not None and parts.trainable.schema != flat.Schema(state.about["schema"]):
        raise UserError(f"model.name: {parts.config.model.name} is not the model that the run began with")


def _scores(link, parts, clients, message, t, texts):
    """{kind: (evaluate.Score, rows, answered, generated)} at the server, of the kinds there are; None elsewhere.

    answered is (accuracy, rows), or None without evaluation.labels and rows; generated what generate.scores() gives, or
    None. texts: see evaluate().
    """
    from gdmpi import answers, run
    from gdmpi.evaluate import plan

    scores, of, generated = {}, generate.part(parts.config), None
    if texts is not None and not parts.config.evaluation.generate:
        raise UserError(f"--texts {texts}: nothing is generated; give evaluation.generate=50, or another number")
    if texts is not None and not Path(texts).absolute().parent.is_dir():
        raise UserError(f"--texts {texts}: there is no directory {Path(texts).absolute().parent}")
    generate.fits(link, parts)
    if parts.config.evaluation.generate:
        ask = functools.partial(run.score, link, parts, clients, message, t)
        generated = generate.held_out(link, parts.config, ask, texts and Path(texts))
    for kind in KINDS:
        if getattr(parts.config.data, kind) == 0:
            continue
        result = run.score(link, parts, clients, message, t, kind)
        mine = sum(len(plan(rows)[number]) for _, rows, wanted in parts.held_out.get(kind, ()) for number in wanted)
        counts = link.gather(mine)
        labels = parts.config.evaluation.labels
        answered = run.score(link, parts, clients, message, t, kind, answers.right, answers.share) if labels else None
        answered = answered if answered and answered[1] else None
        scores[kind] = (result, sum(counts), answered, generated if kind == of else None) if link.is_server else None
    return scores if link.is_server else None


def _differences(state, scores):
    """What to say of the same rows' scores when the run was there: they are the same bits on the same processor."""
    row = state.metrics[-1]
    reported = {"validation": row["eval_loss"], "test": (row.get("test") or {}).get("loss")}
    known = {kind: loss for kind, loss in reported.items() if loss is not None and kind in scores}
    if known and all(scores[kind][0].loss == loss for kind, loss in known.items()):
        return [f"exactly what the run reported ({' and '.join(known)})"]
    return [f"the run reported {kind} loss {loss:.6f}" for kind, loss in known.items() if scores[kind][0].loss != loss]


def _score_directory(link, kind, source, path, overrides, texts):
    """An adapter or a model that need not come from this program, on the rows that the configuration names."""
    from gdmpi import build, hosting, libraries, model

    config = link.together(lambda: _config_of_directory(kind, source, path, overrides))
    libraries.environment(config.run.cache)
    everyone = link.agree((link.host, link.is_worker))
    position = sum(1 for host, worker in everyone[: link.rank] if host == link.host and worker)
    own_files = config.clients.split.kind == "files"

    def work():
        loaded = prepared = tokenizer = None
        if link.is_worker:
            loaded = _load(config, source if kind == "adapter" else None, position)
        if link.is_server or own_files:
            tokenizer = model.tokenizer(config.model.name)
        if link.is_server and not own_files:
            prepared = _prepare(config, tokenizer)
        return loaded, prepared, tokenizer

    with link.phase(config.run.timeout):
        loaded, prepared, tokenizer = link.together(work)
        chosen = link.agree(loaded and (loaded.device.type, str(loaded.model.dtype).removeprefix("torch.")))
        used = sorted({each for each in chosen if each})
        if len(used) > 1:
            raise UserError(f"run.device: the ranks disagree ({used}): set run.device and model.dtype")
        resolved = config.model_copy(
            update={
                "run": config.run.model_copy(update={"device": used[0][0]}),
                "model": config.model.model_copy(update={"dtype": used[0][1]}),
            }
        )
        parts = build.Parts(resolved, hosting.hosts(config, link.workers), loaded)
        if own_files:
            link.together(lambda: build._own_rows(link, parts, tokenizer, False))
        else:
            parts.held_out = _deal(link, prepared)
        ready = types.SimpleNamespace(load=lambda t, message: None)  # nothing to load before scoring
        scores = _scores(link, parts, {0: ready}, None, 0, texts)
    return f"{source}: {'an adapter on a model' if kind == 'adapter' else 'a model'}", resolved, scores, []


def _config_of_directory(kind, source, path, overrides):
    """The configuration, with the model that the directory names; data.name is empty if only held-out files count."""
    from gdmpi import data, model

    file, key = BASES[kind]
    try:
        base = json.loads((source / file).read_text("utf-8")).get(key) or ""
    except (OSError, ValueError) as error:
        raise UserError(f"{source}/{file}: cannot be read: {error}") from None
    name = base if kind == "adapter" else str(source)
    config = configuration.load(path, overrides, base={"model": {"name": name}, "data": {"name": ""}})
    # of a run whose clients have different bases, what is scored names its own
    if kind == "model" or base in config.model.others.values():
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": name})})
    if not config.model.name:
        raise UserError(f"{source}/adapter_config.json: names no base model; give it with model.name=DIRECTORY")
    updates = {"method": configuration.Method()}  # whoever trained it, it is scored as one
    if config.clients.split.kind != "files":
        updates["clients"] = configuration.Clients(count=1)  # nobody trains: few rows are enough
        places = (Path(place).resolve() for place in (model.locate(config.model.name), base))
        if not config.data.name and (model.DEMO / "model").resolve() in places:
            updates["data"] = config.data.model_copy(update={"name": "demo"})
        elif not config.data.name:
            kept = {key: getattr(config.data, key) if data.is_file(config, key) else 0.0 for key in KINDS}
            if not any(kept.values()):
                runs = (up / "config.yaml" for up in (source.parent, source.parent.parent))
                run = next((f", as in 'eval {source} {place}'" for place in runs if place.is_file()), "")
                raise UserError(
                    f"data.name: which rows is {source} to be scored on? Give data.name=FILE for its held-out parts, "
                    f"data.validation=FILE for all rows of a file, or a configuration{run}"
                )
            updates["data"] = config.data.model_copy(update=kept)
    config = config.model_copy(update=updates)
    _check_held_out(config)
    return config


def _load(config, adapter, position):
    """A model, maybe with an adapter directory's adapter on it, as what evaluate.losses wants of a Trainable."""
    from gdmpi import libraries, model

    torch, _, _ = libraries.load(config.model.quantize != "none")
    torch.set_num_threads(config.train.threads)
    device = model.choose_device(config, position)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    base = model.load_base(config, device)
    whole = adapters.adapted(base, adapter) if adapter else base
    return types.SimpleNamespace(model=whole, device=device, forward=model.passes(config, whole, device))


def _deal(link, prepared):
    """Parts.held_out of this rank, from what the server has read."""
    from gdmpi import data
    from gdmpi.evaluate import plan

    held_out, workers = {}, len(link.workers)
    for kind in KINDS:
        rows = data.Rows.from_arrays(link.bcast(0, getattr(prepared, kind).arrays() if prepared else None))
        if link.is_worker:
            held_out[kind] = [("pool", rows, range(link.workers.index(link.rank), len(plan(rows)), workers))]
    return held_out


def _prepare(config, tokenizer):
    """The held-out rows, as data.Prepared without training rows where no table is named."""
    from gdmpi import data

    if config.data.name:
        return data.prepare(config, tokenizer)
    nothing = data.Rows(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), np.zeros(0, np.int64))
    held = [data.prepare_held_out_file(config, tokenizer, kind) or nothing for kind in KINDS]
    return data.Prepared({}, *held, {})


# ---- words ---------------------------------------------------------------------------------------------------------


def _of(config, kind):
    """Which rows a score is over, in words."""
    from gdmpi import data

    value, files = getattr(config.data, kind), config.clients.split.kind == "files"
    if data.is_file(config, kind):
        return f"all of {value}"
    table = "the clients' files" if files else config.data.name
    if isinstance(value, str):
        return f"{config.data.split_column or 'split'} {value} of {table}"
    return f"{value:.0%} of {table}, held out by run.seed {config.run.seed}"
