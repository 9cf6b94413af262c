"""From a configuration to what a run is made of: the data, the model, who hosts whom. All ranks call it together."""

import platform
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from gdmpi import (
    bases,
    data,
    estimate,
    evaluate,
    flat,
    forward,
    hosting,
    landing,
    libraries,
    method,
    model,
    public,
    results,
)
from gdmpi.errors import UserError


@dataclass
class Parts:
    """What this rank has of a run.

    trainable: views.Trainable, on client ranks. server_model: one of its own at the server, for methods that want one
    there. others: {client: views.Trainable} of the clients hosted here that have another base. rows: {client:
    data.Rows} of the clients hosted here. held_out: {"validation" | "test": [(key, Rows, batch numbers)]} that this
    rank evaluates; served: the same that the server evaluates its own model on. public: Rows that everybody has, of
    methods that want them; vocabulary: how many tokens the tokenizer has then. initial: Flat, at the server the adapter
    before round 1. about: what is known of the run beside its configuration, equal on all ranks. reasons: a line on
    every automatic choice.
    """

    config: object
    hosts: list
    trainable: object = None
    server_model: object = None
    others: dict = field(default_factory=dict)
    rows: dict = field(default_factory=dict)
    held_out: dict = field(default_factory=dict)
    served: dict = field(default_factory=dict)
    public: object = None
    vocabulary: int = 0
    initial: object = None
    adapter_config: str = "{}"
    about: dict = field(default_factory=dict)
    reasons: list = field(default_factory=list)

    def model_of(self, client):
        """The Trainable of a client hosted here."""
        return self.others.get(client, self.trainable)


def build(link, config, train=True):
    """Load the data and the model, agree on every automatic choice, and hand each rank its rows: Parts.

    Raises UserError or PeerError on all ranks alike. train False leaves the training rows out (for evaluation).
    """
    libraries.environment(config.run.cache)
    hosts = hosting.hosts(config, link.workers)
    everyone = link.agree((link.host, link.is_worker))
    position = sum(1 for host, worker in everyone[: link.rank] if host == link.host and worker)
    own_files, served = config.clients.split.kind == "files", train and hosting.serves_model(config)
    said = []
    code = method.sha256(config.method.name)
    if code and len(set(link.agree(code))) > 1:
        raise UserError(f"method.name: {config.method.name} is not the same file on all ranks' hosts")

    # rank 0 reads and tokenises while the others load the model
    def work():
        trainable = prepared = tokenizer = None
        light = not (link.is_worker or served or hosting.rebases(config))  # who writes a whole model needs torch for it
        if link.is_worker:
            trainable = _load(config, position, said, makes=link.rank == link.workers[0])
        if link.is_server or own_files:
            tokenizer = model.tokenizer(config.model.name, without_torch=light)
        if link.is_server:
            public.check_tokenizers(config, tokenizer, light)
        if link.is_server and not own_files:
            prepared = data.prepare(config, tokenizer, train)
        return trainable, prepared, tokenizer

    trainable, prepared, tokenizer = link.together(work)
    # a rank without a model has waited for the first client rank to make the base; where that one's cache is not seen,
    # the first of the node makes it; and what cannot be kept, each loads for itself
    for makes, last in ((position == 0 and link.rank != link.workers[0], False), (False, True)):
        waits = link.is_worker and trainable is None
        if any(link.agree(waits)):
            loaded = link.together(partial(_load, config, position, said, makes, last) if waits else lambda: None)
            trainable = trainable or loaded
    if trainable is not None:
        trainable.warnings += said
    sharers = [p for p in range(sum(worker for host, worker in everyone if host == link.host)) if p != position]
    landed = landing.choose(link, config, trainable)  # before it is asked what memory a GPU has left
    resolved, reasons = _resolve(link, config, trainable, tokenizer, position, sharers)
    link.together(lambda: trainable and resolved.train.checkpointing and trainable.forward.checkpoint())
    parts = Parts(resolved, hosts, trainable, reasons=reasons + landed)
    if served:
        # after the others: the base that the ranks of a node share is there by now
        beside = sum(worker and host == link.host for host, worker in everyone)
        load = partial(_load_one, resolved, config.model.name, beside, said)
        parts.server_model = link.together(load if link.is_server else lambda: None)
    if config.model.others:
        parts.others = link.together(partial(_load_others, link, parts, position, said))
    link.together(partial(_sent, parts))
    if own_files:
        report = link.together(lambda: _own_rows(link, parts, tokenizer, train))
    else:
        report = _deal_rows(link, parts, prepared, train)
    if config.data.public and train:
        public.share(link, parts, prepared, tokenizer)
    if hosting.pooled(config) and parts.rows:
        parts.rows = {0: data.Rows.concatenated([parts.rows[client] for client in sorted(parts.rows)])}
    _introduce(link, parts, report, everyone)
    return parts


def check_fit(parts, state):
    """UserError if a round file was made with another base model or adapter than what was built from its settings."""
    name, was = parts.config.model.name, state.about
    if parts.about["base_sha256"] != was.get("base_sha256", parts.about["base_sha256"]):
        raise UserError(f"model.name: {name} is not the model that the run began with: its weights are other ones")
    for client, sha256 in was.get("others", {}).items():
        if parts.about["others"].get(client) != sha256:
            place = parts.config.model.others[int(client)]
            raise UserError(f"model.others: client {client}: {place} is not the model that the run began with")
    if parts.initial and parts.initial.schema != flat.Schema(was["schema"]):
        raise UserError(f"model.adapter: the round file's adapter does not fit {name}: names or shapes differ")


def _load(config, position, said, makes=False, last=False):
    """This rank's Trainable; None if its base is one to be shared (see bases.py) and is not there yet.

    makes: make it now; said is a list for the warnings. last: there will be none, so load the model anyway.
    """
    import torch

    torch.set_num_threads(config.train.threads)
    device = model.choose_device(config, position)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.use_deterministic_algorithms(True, warn_only=True)
    entry = model.kept(config, device)
    if entry and makes:
        said += bases.make(entry, partial(model.load_base, config, device, fresh=True))
    if entry and not last and bases.state(entry) != bases.WHOLE:
        libraries.load(config.model.quantize != "none")  # there is time for it now
        return None
    return model.build(config, device)


def _load_one(config, name, position, said):
    """A Trainable with a base of its own, as a resolved configuration says."""
    section = config.model.model_copy(update={"name": name})
    loaded = _load(config.model_copy(update={"model": section}), position, said, last=True)
    if config.train.checkpointing:
        loaded.forward.checkpoint()
    return loaded


def _load_others(link, parts, position, said):
    """{client: Trainable} of this rank's clients of model.others; those with the same base share it."""
    names, made = parts.config.model.others, {}
    for client in sorted(names):
        if parts.hosts[client] == link.rank and names[client] not in made:
            made[names[client]] = _load_one(parts.config, names[client], position, said)
            parts.trainable.warnings += made[names[client]].warnings
    return {client: made[name] for client, name in names.items() if parts.hosts[client] == link.rank}


def _resolve(link, config, trainable, tokenizer, position, others):
    """The configuration with every auto replaced by what the first client rank (template: rank 0) chose, and why.

    Of the tokens of a pass it is the fewest that any rank chose. position: of this client rank among those of its node;
    others: those of the others.
    """

    def choose():
        chosen = {}
        if trainable is not None:
            base = forward.unwrapped(trainable.model)
            chosen = {"device": trainable.device.type, "dtype": str(base.dtype).removeprefix("torch.")}
            if config.model.quantize != "none":
                chosen["dtype"] = model.choose_dtype(config, trainable.device)[0]
            chosen["compute"], compute = model.choose_compute(config, trainable.device, model.width_of(base))
            tokens, checkpointing, room = _choose_pass(config, trainable, chosen, position, others)
            chosen["pass"] = (tokens, not checkpointing, room)
            chosen["why"] = {"dtype": model.choose_dtype(config, trainable.device)[1], "compute": compute}
        if link.is_server:
            chosen["template"] = data.resolve_template(config, tokenizer)[0]
        return chosen

    chosen = link.agree(link.together(choose))
    first, template = chosen[link.workers[0]], chosen[0]["template"]
    others = {(c["device"], c["dtype"], c["compute"]) for c in (chosen[rank] for rank in link.workers)}
    if len(others) > 1:
        found = "; ".join(", ".join(each) for each in sorted(others))
        raise UserError(
            f"run.device: the client ranks' hardware differs ({found}); set run.device, model.dtype and train.dtype"
        )
    tokens, _, first["why"]["pass"] = min(chosen[rank]["pass"] for rank in link.workers)
    plain = all(chosen[rank]["pass"][1] for rank in link.workers)
    train = {"dtype": first["compute"], "pass_tokens": tokens, "checkpointing": not plain}
    resolved = config.model_copy(
        update={
            "run": config.run.model_copy(update={"device": first["device"]}),
            "model": config.model.model_copy(update={"dtype": first["dtype"]}),
            "data": config.data.model_copy(update={"template": template}),
            "train": config.train.model_copy(update=train),
        }
    )
    return resolved, _reasons(config, resolved, first, template)


def _choose_pass(config, trainable, chosen, position, others):
    """(tokens of a pass, whether layers are checkpointed, reason) for this rank; others: see _resolve()."""
    import torch

    asked, device = config.train, trainable.device
    if device.type == "cpu":
        return estimate.on_cpu(asked.pass_tokens), asked.checkpointing is True, "the CPU is no quicker with more"
    if "auto" not in (asked.pass_tokens, asked.checkpointing):
        return asked.pass_tokens, asked.checkpointing, ""
    count = torch.cuda.device_count()
    sharing = 1 + sum(each % count == position % count for each in others)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    moments = 2 * trainable.gradient.nbytes * (asked.optimizer == "adamw")
    step = estimate.Step(
        compute=chosen["compute"],
        base=chosen["dtype"],
        length=config.data.max_length,
        dropout=config.model.adapter.dropout > 0,
        device="cuda",
        packed=trainable.forward.packed,
        quantized=config.model.quantize != "none",
    )
    shape = estimate.shape_of(trainable.model)
    return estimate.choose_pass(shape, step, free / sharing - moments, asked.pass_tokens, asked.checkpointing)


def _reasons(config, resolved, first, template):
    """A line on every automatic choice: what was chosen and why."""
    lines = []
    if config.run.device == "auto":
        why = "a GPU is there" if first["device"] == "cuda" else "torch sees no CUDA device"
        lines.append(f"device {first['device']} ({why})")
    if config.model.dtype == "auto":
        lines.append(f"base in {first['dtype']} ({first['why']['dtype']})")
    if config.train.dtype == "auto":
        lines.append(f"computing in {first['compute']} ({first['why']['compute']})")
    if config.train.pass_tokens == "auto":
        lines.append(f"passes of {resolved.train.pass_tokens} tokens ({first['why']['pass']})")
    if config.train.checkpointing == "auto" and resolved.train.checkpointing:
        lines.append(f"layers checkpointed, as otherwise they need too much memory ({first['why']['pass']})")
    if config.data.template == "auto":
        lines.append(f"template {template} (the tokenizer has {'a' if template == 'chat' else 'no'} chat template)")
    return lines


def _sent(parts):
    """Find out how much a client sends as its update; UserError if the method's options do not fit the model."""
    if parts.trainable:
        whole, sent = parts.trainable.schema, hosting.sent(parts.config, parts.trainable.model, parts.trainable.schema)
        parts.about["sent_parameters"] = parts.trainable.travelling if sent == whole else sent.nbytes // 4
        merged = parts.config.exchange.what == "merged"
        parts.about["travels"] = None if merged else hosting.promised(parts.config, whole, 1)


def _own_rows(link, parts, tokenizer, train):
    """Split files: each rank reads the files of its own clients, and nobody else's; returns a report."""
    config, report = parts.config, {"clients": {}}
    paths = data.client_files(config)
    parts.held_out = {"validation": [], "test": []}
    for client in (c for c, host in enumerate(parts.hosts) if host == link.rank):
        rows, *own_held, report["clients"][client] = data.prepare_client(config, tokenizer, client, paths[client])
        if train:
            parts.rows[client] = rows
        for kind, held in zip(("validation", "test"), own_held, strict=True):
            if held.group is None:
                held.group = np.full(len(held), f"client {client}")
            if len(held):
                parts.held_out[kind].append((client, held, range(len(evaluate.plan(held)))))
    for kind in ("validation", "test"):
        wanted = link.is_worker or parts.server_model and hosting.personal(config)
        held = data.prepare_held_out_file(config, tokenizer, kind) if wanted else None
        if held is not None and parts.server_model and hosting.personal(config):
            parts.served[kind] = [("file", held, range(len(evaluate.plan(held))))]
        if held is not None and link.is_worker:
            mine = link.workers.index(link.rank)
            parts.held_out[kind].append(("file", held, range(mine, len(evaluate.plan(held)), len(link.workers))))
    return report


def _deal_rows(link, parts, prepared, train):
    """Pooled data: rank 0 has read it, and sends each rank its clients' rows and all the held-out rows."""
    report = link.share(prepared and prepared.report)
    for kind in ("validation", "test"):
        held = getattr(prepared, kind) if prepared else None
        held = data.Rows.from_arrays(_copied(link.bcast(0, None if held is None else held.arrays())))
        if parts.server_model and hosting.personal(parts.config):
            parts.served[kind] = [("pool", held, range(len(evaluate.plan(held))))]
        if link.is_worker:
            mine = link.workers.index(link.rank)
            parts.held_out[kind] = [("pool", held, range(mine, len(evaluate.plan(held)), len(link.workers)))]
    if not train:
        return report
    for client, host in enumerate(parts.hosts):  # the same order at both ends
        if host == link.rank:
            arrays = prepared.train[client].arrays() if prepared else link.recv(0)[0]
            parts.rows[client] = data.Rows.from_arrays(_copied(arrays))
        elif link.is_server:
            link.send(prepared.train[client].arrays(), host)
    return report


def _copied(arrays):
    return {name: np.array(array) for name, array in arrays.items()}


def _introduce(link, parts, report, everyone):
    """Tell the server the adapter's first values, and all ranks what the run is made of."""
    trainable = parts.trainable
    me = None
    if trainable is not None:
        initial = trainable.values()
        me = {
            "adapter": flat.sha256(initial),
            "base": trainable.base_sha256,
            "others": {str(client): other.base_sha256 for client, other in parts.others.items()},
            "adapter_configs": {str(client): other.adapter_config() for client, other in parts.others.items()},
            "processor": _processor(trainable.device),
            "warnings": trainable.warnings,
            "device": str(trainable.device),
            "unused": _unused_gpus(parts.config),
            "rows": {client: len(rows) for client, rows in parts.rows.items()},
            "report": report if parts.config.clients.split.kind == "files" else None,
            "base_parameters": trainable.base_parameters,
            "trainable_parameters": len(trainable.gradient),
            "travelling_parameters": trainable.travelling,
            "sent_parameters": parts.about["sent_parameters"],
            "travels": parts.about["travels"],
        }
        if link.rank == link.workers[0]:
            parts.adapter_config = trainable.adapter_config()
            if hosting.rebases(parts.config):
                parts.adapter_config = results.mark_rebased(parts.adapter_config)
            if not link.is_server:
                link.send(initial, 0, note=parts.adapter_config)
    if link.is_server:
        parts.initial, parts.adapter_config = (
            (initial, parts.adapter_config) if link.is_worker else link.recv(link.workers[0])
        )
    known = [me for me in link.agree(me) if me]
    warnings = list(dict.fromkeys(line for each in known for line in each["warnings"]))
    processors = sorted({each["processor"] for each in known})
    if len(processors) > 1:
        warnings.append(
            f"the client ranks run on different processors ({'; '.join(processors)}): "
            "results depend on which client is trained where"
        )
    if len({each["base"] for each in known}) > 1:
        raise UserError(f"model.name: {parts.config.model.name}: the client ranks loaded different base models")
    if len({each["adapter"] for each in known}) > 1:
        warnings.append("the client ranks drew different initial adapters; the first client rank's is used")
    crowded = _crowded(everyone, known)
    parts.about = {
        "model": parts.config.model.name,
        "base_sha256": known[0]["base"],
        "others": {client: each["others"][client] for each in known for client in sorted(each["others"])},
        "adapter_configs": {client: text for each in known for client, text in each["adapter_configs"].items()},
        "base_parameters": known[0]["base_parameters"],
        "trainable_parameters": known[0]["trainable_parameters"],
        "travelling_parameters": known[0]["travelling_parameters"],
        "sent_parameters": known[0]["sent_parameters"],
        "processor": "; ".join(processors),
        "method_sha256": method.sha256(parts.config.method.name),
        "rows": {str(c): n for each in known for c, n in each["rows"].items()},
        "data": report if known[0]["report"] is None else {"clients": [each["report"]["clients"] for each in known]},
        "warnings": warnings + crowded + _unused(everyone, known),
        "travels": public.travels(parts.config, parts.public, parts.vocabulary) or known[0]["travels"],
        "public": parts.public and public.counted(parts.public),
    }


def _crowded(everyone, known):
    """A line for every node where several client ranks share a GPU."""
    workers = [host for host, worker in everyone if worker]
    placed = [(host, each["device"]) for host, each in zip(workers, known, strict=True) if "cuda" in each["device"]]
    shared = {place for place in placed if placed.count(place) > 1}
    return [f"{placed.count(place)} client ranks share {place[1]} on {place[0]}" for place in sorted(shared)]


def _unused_gpus(config):
    import torch

    return torch.cuda.device_count() if config.run.device == "cpu" else 0


def _unused(everyone, known):
    """A line if the configuration says CPU where there are GPUs."""
    workers = [host for host, worker in everyone if worker]
    hosts = sorted({host for host, each in zip(workers, known, strict=True) if each["unused"]})
    return [f"run.device is cpu: the GPUs of {', '.join(hosts)} are not used"] if hosts else []


def _processor(device):
    """What decides the last bits of a result: the GPU's model, or the CPU's instruction set as torch uses it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
