"""What a run comes to: its adapter, the clients' own adapters, or the whole model; their hash, and their folders."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from gdmpi import checkpoint, config as configuration, flat, hosting, method

REBASED = "gdmpi_rebased"  # the key that marks an adapter's configuration
RESULTS = {  # the files that a run comes to, and what loads them
    "adapter": ("adapter_model.safetensors", "adapter_config.json", "peft"),
    "model": ("model.safetensors", "config.json", "transformers"),
}
BESIDE = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja", "generation_config.json")


def digest(adapter, own):
    """The SHA-256 that a round is known by: of the global adapter, or of those of the clients' own, {client: SHA-256}.

    That is over their hashes as text, by ascending client.
    """
    if adapter is not None:
        return flat.sha256(adapter)
    return hashlib.sha256("".join(own[client] for client in sorted(own)).encode()).hexdigest()


def adapters(directory, t, kept, server):
    """{None: adapter} after round t, or where each client has its own {client: adapter}, from their files.

    kept: {client: {"file", "sha256"}}. UserError if a client's file is missing or another one.
    """
    return {None: server.adapter()} if server.adapter() is not None else own(directory, t, kept)


def own(directory, t, kept):
    """{client: adapter} of clients that have one each, from their files; see adapters()."""
    files, found = Path(directory) / "clients", {}
    for client in sorted(map(int, kept)):
        found[client] = checkpoint.read_client(files, client, t, kept[str(client)]["sha256"])["method.weights"]
    return found


def everyone(found, directory, t, kept, config):
    """What adapters() found, and beside the server's those that clients have of their own."""
    return found | own(directory, t, kept) if None in found and hosting.personal(config) else found


def newest(source):
    """(path, checkpoint.Round, warnings) of a run directory's newest whole round file, or of the file itself."""
    source, said = Path(source), []
    if source.is_dir():
        path, state = checkpoint.newest(source, lambda text: said.append(f"warning: {text}"))
    else:
        path, state = source, checkpoint.read(source)
    return path, state, said


def folder(client):
    """The name of a client's own folder; none where there is one adapter for all."""
    return "" if client is None else f"{client:04d}"


def kind_of(adapter_config):
    """What a run comes to, and the folder that it lies in: an adapter, or a model of which more than that changed."""
    return "adapter" if "peft_type" in json.loads(adapter_config) and not rebased(adapter_config) else "model"


def rebased(adapter_config):
    """Whether the base has changed beside the adapter: what is known of the run is not the model, but added to it."""
    return REBASED in json.loads(adapter_config)


def mark_rebased(adapter_config):
    """The adapter's configuration, with a note that the base changes, too."""
    return json.dumps(json.loads(adapter_config) | {REBASED: True}, indent=2, sort_keys=True)


def called(config):
    """What a round's hash is of, in a word: adapter, or model if more changes; adapters where each client has one."""
    known = method.there(config.method.name)  # the file of a method of one's own may be gone since
    whole = config.model.adapter.kind == "full" or config.exchange.what == "merged" or known and hosting.rebases(config)
    return ("model" if whole else "adapter") + "s" * (known and hosting.personal(config))


def write_all(directory, found, about, adapter_config, config):
    """Write what everyone() or adapters() found: each client's in a folder within, by its base; see write().

    about: what a run is made of, as a round file has it. A client's own has learnt from that client's rows alone: its
    folder is the owner's alone, as what lies in clients/ is.
    """
    configs = about.get("adapter_configs", {})
    for client, adapter in found.items():
        place = Path(directory) / folder(client)
        place.mkdir(0o777 if client is None else 0o700, parents=True, exist_ok=True)
        write(place, adapter, configs.get(str(client), adapter_config), config)


def write(directory, adapter, adapter_config, config):
    """Write an adapter (Flat, names as in peft) as a directory that peft.PeftModel.from_pretrained loads.

    A whole model (names as in transformers) becomes one that transformers.AutoModelForCausalLM.from_pretrained loads;
    with its tokenizer, if the model that it was trained from lies in a directory. Where the base has changed, it is
    loaded as the run's Config names it, and what was added to it and the adapter are merged in.
    """
    directory = Path(directory)
    if rebased(adapter_config):
        _write_rebased(directory, adapter, json.loads(adapter_config), config)
    else:
        _write(directory, adapter, adapter_config)


def _write_rebased(directory, values, peft_config, config):
    from gdmpi import adapters, lowrank

    changes = {name.removesuffix(lowrank.DELTA): array for name, array in values.items() if lowrank.DELTA in name}
    adapter = {name: array for name, array in values.items() if lowrank.DELTA not in name}
    for layer, change in changes.items() if not adapter else ():  # one that begins anew in each round: it adds nothing
        adapter[layer + lowrank.A] = np.zeros((peft_config["r"], change.shape[1]), np.float32)
        adapter[layer + lowrank.B] = np.zeros((change.shape[0], peft_config["r"]), np.float32)
    del peft_config[REBASED]
    _write(directory, adapter, json.dumps(peft_config))
    cpu = config.model_copy(update={"run": config.run.model_copy(update={"device": "cpu"})})  # it may be the server's
    adapters.merge(cpu, directory, changes)


def _write(directory, adapter, adapter_config):
    from safetensors.numpy import save_file

    kind = kind_of(adapter_config)
    weights, config = (directory / name for name in RESULTS[kind][:2])
    if kind == "model":
        _copy_beside(json.loads(adapter_config).get("_name_or_path"), directory)
    part = weights.with_name(f"{weights.name}.part")
    save_file({name: array.copy() for name, array in adapter.items()}, part, {"format": "pt"})
    part.replace(weights)
    checkpoint.write_text(config, adapter_config)
    # safetensors writes for the owner alone; an adapter is as readable as what lies beside it
    weights.chmod(config.stat().st_mode & 0o777)


def _copy_beside(source, directory):
    """Copy what lies beside the weights of a model that is in a directory: its tokenizer, how it generates."""
    if source and Path(source).is_dir():
        for path in (path for pattern in BESIDE for path in Path(source).glob(pattern)):
            shutil.copyfile(path, directory / path.name)


def server_of(state):
    """The server of a round file, without MPI or a model: (Config, Server).

    UserError if the method's own file is not the one that the run was played with.
    """
    from gdmpi import server_opt

    config = configuration_of(state)
    method.same(config.method.name, state.about.get("method_sha256"))
    initial = flat.Flat(flat.Schema(state.about["schema"]))
    lent = method.context(config, initial=initial, optimizer=server_opt.build(config.server))
    server = method.load(config.method.name).Server(method.options(config), lent)
    server.restore(state.server)
    return config, server


def configuration_of(state, where="the round file"):
    """The Config of a round file, also where the file of a method of one's own is gone; where names it in errors."""
    import yaml

    return configuration.build(yaml.safe_load(state.config), where, saved=True)
