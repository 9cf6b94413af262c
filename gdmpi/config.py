"""The configuration: one YAML file of sections, overridden by section.key=value, checked before anything starts."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from gdmpi import method
from gdmpi.errors import UserError


class Section(BaseModel):
    """A part of the configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def refusal(self, config):
        """Of a method's options: what is wrong with them in a whole Config, as 'key: in a line'; None if nothing."""


Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
# a number is meant as it is written; yes and no, which YAML takes for true and false, are refused
Label = Annotated[str, BeforeValidator(lambda label: str(label) if type(label) is int else label), Field(min_length=1)]


class Run(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "demo"  # the run directory is out/name
    out: str = "runs"
    rounds: Annotated[int, Field(ge=0)] = 5
    seed: Annotated[int, Field(ge=0)] = 0
    keep: Positive = 2  # round files kept; older ones go once a newer one is safe
    eval_every: Positive = 1  # rounds between validations; the first and the last round are always validated
    cache: str = "cache"  # hub files and prepared data; never the home directory
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout: Annotated[float, Field(gt=0)] = 3600.0  # seconds in one phase of a round after which a run counts as hung
    time_limit: Annotated[float, Field(gt=0)] | None = None  # seconds; Slurm's own limit is known without it
    grace: Annotated[float, Field(ge=0)] = 30.0  # seconds kept for saving and ending; what a signal leaves to a round
    signal: Annotated[str, Field(pattern=r"^(USR1|USR2|HUP|INT|ALRM|CONT|WINCH|URG)$")] = "USR1"  # beside TERM: pause
    profile: bool = False  # trace a few steps of each rank, in a round of each start, into profile/
    tensorboard: bool = False  # write each round's numbers for TensorBoard too, into tensorboard/


SPLITS = {"iid": (), "by": ("column",), "dirichlet": ("column", "alpha"), "files": ("files",)}  # keys of a kind


class Split(Section):
    kind: Literal["iid", "by", "dirichlet", "files"] = "iid"
    files: str | list[str] | None = None  # kind files: one file a client, a list or a glob
    column: str | None = None  # kinds by and dirichlet: the column whose values decide
    alpha: Annotated[float, Field(gt=0, le=1e9)] | None = None  # kind dirichlet: the smaller, the more clients differ

    @model_validator(mode="after")
    def keys_go_with_their_kinds(self):
        for key in ("files", "column", "alpha"):
            given, kinds = getattr(self, key) is not None, [kind for kind in SPLITS if key in SPLITS[kind]]
            if given and self.kind not in kinds:
                only = f"only with {' and '.join(kinds)}; leave it out, or set it to null"
                raise ValueError(f"the key {key} has no meaning with kind: {self.kind}, {only}")
            if self.kind in kinds and not given:
                raise ValueError(f"kind: {self.kind} needs the key {key} beside it")
        return self


class Clients(Section):
    count: Positive = 5
    per_round: Fraction = 1.0  # share of the clients that take part in a round
    split: Split = Split()
    boundary: Literal["shared", "site"] = "shared"  # site: a client's rows never leave the rank of that site


class Adapter(Section):
    kind: Literal["lora", "full"] = "lora"  # full: no adapter, all weights are trained and travel
    r: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Share = 0.0
    targets: str | list[str] = "all-linear"  # names of modules, or all linear layers but the output head
    rslora: bool = False  # scale by alpha / sqrt(r) instead of alpha / r (arXiv 2312.03732)


class Model(Section):
    name: str = "demo"  # demo, a local directory, or a hub id
    quantize: Literal["none", "nf4"] = "none"  # nf4: 4-bit with double quantisation (QLoRA, arXiv 2305.14314)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    adapter: Adapter = Adapter()
    others: dict[Annotated[int, Field(ge=0)], str] = {}  # {client: another base than name, of the same tokenizer}

    @property
    def form(self):
        """What the base's weights are held in, in words."""
        return self.dtype if self.quantize == "none" else f"4-bit {self.quantize.upper()}"


class Data(Section):
    name: str = "demo"  # demo, a file (.jsonl .json .csv .parquet), a directory, or a hub id; unused with split files
    template: str = "auto"  # auto, chat, alpaca, plain, or a string with {prompt} and {response}
    columns: dict[Literal["prompt", "response", "instruction", "input", "output", "messages", "text"], str] = {}
    max_length: Annotated[int, Field(ge=8)] = 256  # tokens; longer rows are cut at the end
    validation: Share | str = 0.1  # a fraction, a file, or a value of split_column
    test: Share | str = 0.1
    train: str | None = None  # with split_column: the value of the training rows (default train)
    split_column: str | None = None  # a column that says where each row belongs
    group: str | None = None  # rows with the same value here never lie in two of train, validation and test
    public: Share | str = 0.0  # for methods that distil: a fraction of the training rows that no client gets, or a file


def _absolute(name):
    """A method's name; a path to a file such that it leads there from any directory."""
    return str(Path(name).expanduser().absolute()) if method.is_file(name) else name


class Method(BaseModel):
    """The method's name, how its clients are weighted, and the method's own options beside them."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: Annotated[str, AfterValidator(_absolute)] = "gradualdiff"
    weighting: Literal["auto", "uniform", "examples"] = "auto"  # auto: as the method has it


class Train(Section):
    epochs: Positive = 1  # local epochs a round, unless steps is given
    steps: Positive | None = None
    batch_size: Positive = 8  # rows a step
    lr: Annotated[float, Field(ge=0)] = 1.0e-3
    clip_norm: Annotated[float, Field(gt=0)] | None = 0.3  # of the gradient of a step; null: no clipping
    optimizer: Literal["adamw", "adamw8bit", "sgd"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # over all steps of all rounds
    warmup: Annotated[int, Field(ge=0)] = 0  # steps
    keep_optimizer: bool = False  # the optimiser's moments stay with the client from round to round
    threads: Positive = 1  # of torch, per rank, on the CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # that layers compute in; the adapter stays float32
    packing: bool = True  # several rows in one sequence, each on its own; false: padded, like lengths together
    compile: bool = False  # torch.compile: minutes at the start, for long runs on GPUs
    pass_tokens: Positive | Literal["auto"] = "auto"  # in a forward and backward pass; a step's passes add up
    checkpointing: bool | Literal["auto"] = "auto"  # layers keep only their input: less memory, a third more time


class ServerSection(Section):
    optimizer: Literal["sgd"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 1.0


class Evaluation(Section):
    labels: Annotated[list[Label], Field(min_length=2)] | None = None  # every response is one of these: accuracy, too
    by: str | None = None  # a column: held-out losses are given for each of its values, too
    generate: Annotated[int, Field(ge=0)] = 0  # held-out prompts to answer after the last round: BLEU, ROUGE-L, chrF
    new_tokens: Positive = 128  # that an answer has at most

    @model_validator(mode="after")
    def labels_differ(self):
        twice = [label for label in self.labels or () if self.labels.count(label) > 1]
        if twice:
            raise ValueError(f"labels: {twice[0]!r} is there twice")
        return self


class Exchange(Section):
    what: Literal["trained", "merged"] = "trained"  # merged: the model with the adapter merged in, all of its weights
    codec: Literal["exact"] = "exact"
    cuda_aware: Literal["auto", False] = "auto"  # auto: MPI writes into GPU memory, if it says so and is seen to do it
    hold_mb: Positive = 4096  # deltas a rank holds in memory until the common grid is known; more go to disk


class Schedule(Section):
    kind: Literal["sync"] = "sync"


class Config(Section):
    """A whole run's configuration; the defaults are the demo's."""

    run: Run = Run()
    clients: Clients = Clients()
    model: Model = Model()
    data: Data = Data()
    method: Method = Method()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    server: ServerSection = ServerSection()
    exchange: Exchange = Exchange()
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def combinations(self):
        """Refuse settings of different sections that do not go together."""
        if self.clients.boundary == "site" and self.clients.split.kind != "files":
            raise ValueError("clients.boundary: site needs clients.split: {kind: files}, a file for each site")
        for key in ("validation", "test"):
            value = getattr(self.data, key)
            if self.data.split_column and not isinstance(value, str):
                raise ValueError(f"data.{key}: with data.split_column give the column's value, a string")
        full, merged = self.model.adapter.kind == "full", self.exchange.what == "merged"
        setting = "model.adapter.kind full" if full else "exchange.what merged"
        if (full or merged) and self.model.quantize != "none":
            raise ValueError(f"model.quantize: 4-bit weights cannot change; with {setting} say none")
        if (full or merged) and self.model.dtype not in ("auto", "float32"):
            raise ValueError(f"model.dtype: with {setting} all weights change, in float32; say auto")
        if full and merged:
            raise ValueError("exchange.what: with model.adapter.kind full there is no adapter to merge; say trained")
        if merged and self.train.keep_optimizer:
            raise ValueError("train.keep_optimizer: with exchange.what merged the adapter begins each round anew")
        if strangers := [client for client in self.model.others if client >= self.clients.count]:
            raise ValueError(f"model.others: there is no client {strangers[0]}: clients.count is {self.clients.count}")
        if self.clients.split.kind == "files" and isinstance(self.data.public, float) and self.data.public:
            raise ValueError("data.public: with a file a client a fraction would be of a client's rows; give a file")
        if self.data.train is not None and not self.data.split_column:
            raise ValueError("data.train: has a meaning only together with data.split_column")
        if self.evaluation.labels and self.data.validation == self.data.test == 0:
            raise ValueError("evaluation.labels: data.validation and data.test are 0, so there are no rows to answer")
        if self.evaluation.generate and self.data.validation == self.data.test == 0:
            raise ValueError(
                "evaluation.generate: data.validation and data.test are 0, so there are no held-out prompts"
            )
        if self.evaluation.generate and self.clients.boundary == "site":
            raise ValueError("evaluation.generate: answers would leave the sites, which clients.boundary: site forbids")
        return self

    @property
    def directory(self):
        """The run's directory."""
        return Path(self.run.out) / self.run.name

    def plain(self):
        """The configuration as plain dicts, lists, numbers and strings."""
        return self.model_dump(mode="json")

    def to_yaml(self):
        return yaml.safe_dump(self.plain(), sort_keys=False)

    def sha256(self):
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()


def load(path=None, overrides=(), base=None):
    """Read a configuration: base (a plain dict) or defaults, then the YAML file, then key=value overrides.

    Raises UserError, one line, for an unreadable file, an unknown key, a wrong type or an impossible combination.
    """
    where, tree = "the command line", json.loads(json.dumps(base or {}))
    if path is not None:
        where = str(path)
        _merge(tree, _read_yaml(path))
    for text in overrides:
        _merge(tree, _parse_override(text))
    return build(tree, where)


def build(tree, where, saved=False):
    """Check a plain dict and make it a Config with the method's own options filled in; where names it in errors.

    saved: it is that of a run, complete and checked when that began; its method's file may be gone since.
    """
    try:
        config = Config.model_validate(tree)
        if saved and method.is_file(config.method.name) and not Path(config.method.name).is_file():
            return config
        module = method.load(config.method.name)
        options = module.Options
        whole = create_model("MethodSection", __base__=options, name=(str, ...), weighting=(str, ...))
        given = config.method.model_dump()
        if given["weighting"] == "auto":
            given["weighting"] = module.Client.weighting
        checked = whole.model_validate(given)
        config = config.model_copy(update={"method": Method.model_validate(checked.model_dump())})
        _fits_method(config, where)
        return config
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"] if not _is_branch(part))
        if error.title == "MethodSection":
            place = f"method.{place}"
        known = whole.model_fields if error.title == "MethodSection" else None
        raise UserError(f"{where}: {_explain(place, problem, known)}") from None


def _fits_method(config, where):
    """UserError if a setting has no meaning, or is a contradiction, with the method."""
    name, module = config.method.name, method.load(config.method.name)
    client, public = module.Client, module.Server.public
    if bool(config.data.public) != public:
        needed = "needs rows that everybody may see; give a fraction of the training rows, as 0.1, or a file"
        raise UserError(f"{where}: data.public: {name} {needed if public else 'uses none (kd does); leave it 0'}")
    if config.model.others and not client.mixed:
        raise UserError(f"{where}: model.others: with {name} all clients have the same base; leave it out")
    if client.pooled and config.clients.boundary == "site":
        raise UserError(f"{where}: method.name: {name} pools all rows, which clients.boundary: site forbids")
    if (client.pooled or client.personal) and config.server.lr != 1:
        raise UserError(f"{where}: server.lr: {name} has no server that steps; leave it 1")
    if (client.pooled or client.personal) and config.exchange.what != "trained":
        raise UserError(f"{where}: exchange.what: with {name} no weights travel; leave it trained")
    if client.parts != ("",) or client.incremental or public:  # they are about the factors of LoRA
        if config.model.adapter.kind != "lora":
            raise UserError(f"{where}: model.adapter.kind: {name} is a method for LoRA's factors; leave it lora")
        if config.exchange.what != "trained":
            raise UserError(f"{where}: exchange.what: {name} says itself what travels; leave it trained")
    if client.rebases and config.server.lr != 1:
        raise UserError(f"{where}: server.lr: {name} adds to the base what clients learnt, as it is; leave it 1")
    if refusal := method.options(config).refusal(config):
        raise UserError(f"{where}: method.{refusal}")


def changes(old, new):
    """What differs between two configurations: {section.key: (old value, new value)}."""
    old, new = flatten(old.plain()), flatten(new.plain())
    return {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


CHOICES = (
    *(("run", "device"), ("model", "dtype"), ("data", "template")),
    *(("train", "dtype"), ("train", "pass_tokens"), ("train", "checkpointing")),
)


def keep_choices(config, saved):
    """A configuration whose automatic choices are those that a run has already made."""
    for section, key in CHOICES:
        part = getattr(config, section)
        if getattr(part, key) == "auto":
            part = part.model_copy(update={key: getattr(getattr(saved, section), key)})
            config = config.model_copy(update={section: part})
    return config


def movable(config):
    """The configuration for whatever machine this is: a run on GPUs can be looked at without one."""
    device = "auto" if config.run.device == "cuda" else config.run.device
    return config.model_copy(update={"run": config.run.model_copy(update={"device": device})})


def _read_yaml(path):
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the configuration: {getattr(error, 'strerror', None) or error}") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{line} not valid YAML: {getattr(error, 'problem', error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a configuration is sections of keys, as in 'train: {{lr: 1.0e-4}}'")
    return tree


def _parse_override(text):
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{text}: not understood; overrides look like section.key=value, as in train.lr=1e-4")
    try:
        tree = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{text}: the value is not valid YAML") from None
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree


def _merge(tree, update):
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def flatten(tree, prefix=""):
    """A tree of dicts as {section.key: value}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _is_branch(part):
    """Pydantic names the tried alternative of a union (float, str, constrained-int) after the key: not the user's."""
    return isinstance(part, str) and (part in {"str", "int", "float", "[key]"} or "[" in part or "-" in part)


def _explain(place, problem, known=None):
    if problem["type"] == "extra_forbidden":
        section, _, key = place.rpartition(".")
        known = list(known or _keys(section))
        close = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        return f"{place}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{place}: has no default, so give it"
    if problem["type"] == "model_type":
        return f"{place}: holds settings of its own, so give {{key: value, ...}}, not {problem['input']!r}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if problem["type"] == "value_error":
        return f"{place}: {message}" if place else message
    return f"{place}: {message}, not {problem['input']!r}"


def _keys(section):
    model = Config
    for part in filter(None, section.split(".")):
        model = model.model_fields[part].annotation if part in model.model_fields else Section
    return list(model.model_fields)
