"""The base model, frozen and maybe 4-bit, the adapter on it, and the flat vector that is trained, sent and hashed."""

import functools
import hashlib
import itertools
import math
from pathlib import Path

import numpy as np

from gdmpi import bases, flat, forward, libraries, lowrank, method, rng
from gdmpi.errors import UserError, first_line

DEMO = Path(__file__).parent / "demo"
WIDE = 128  # hidden units from which bfloat16 is quicker than float32 on a CPU that has it (measured: 96 even, 192 1.4)
PART = 1 << 20  # elements that leave a GPU at once: so many are read while the next are on their way
PEFT = "base_model.model."  # what peft puts before the names of a base's parameters
SAMPLED = 64  # values of each tensor of a base model that its fingerprint looks at


def locate(name):
    """Where a model is: the demo's folder, a local directory, the cache of the hub; else the name itself, a hub id."""
    if name == "demo":
        return str(DEMO / "model")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model.name: {path} holds no config.json: not a model in the format of transformers")
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"model.name: there is no directory {path.absolute()}")
    import huggingface_hub

    # by its directory: by its id, each file that the cache lacks would be asked for over the network
    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return str(Path(cached).parent) if isinstance(cached, str) else name


def fetchable(name):
    """Where a model is, as locate() says; UserError if that is the hub and the hub cannot be reached."""
    place = locate(name)
    if place == name and not Path(name).is_dir() and not libraries.hub_answers():
        raise unreachable("model.name", name, "the hub cannot be reached")
    return place


def unreachable(key, name, error):
    """The UserError for a hub id that is neither here nor to be had, with the path that was looked for first."""
    return UserError(
        f"{key}: {name}: there is no directory {Path(name).absolute()}, and as a hub id it cannot be loaded "
        f"({first_line(error)}); stage it where there is a network with 'python -m gdmpi check CONFIG --download'"
    )


def tokenizer(name, without_torch=False):
    """The tokenizer of a model; UserError if there is none. without_torch: this process will never need a model."""
    transformers = libraries.load_for_tokens() if without_torch else libraries.load()[1]
    place = fetchable(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        if place == name:
            raise unreachable("model.name", name, error) from None
        raise UserError(f"model.name: {place}: cannot load the tokenizer: {first_line(error)}") from None


def choose_device(config, position):
    """The torch device of a client rank, by its position among the client ranks of its node."""
    import torch

    if config.run.device == "cpu" or (config.run.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError("run.device: cuda was asked for, and torch sees no CUDA device here")
    return torch.device("cuda", position % count)


def choose_dtype(config, device):
    """(torch dtype name or "auto", reason): what the base model's weights are kept in."""
    if config.model.dtype != "auto":
        return config.model.dtype, "as configured"
    if changes_base(config):
        return "float32", "all weights change, in it"
    if config.model.quantize != "none":
        if device.type == "cuda":
            return "bfloat16", "4-bit weights are computed with in bfloat16 on CUDA"
        return "float32", "4-bit weights are computed with in float32 on the CPU"
    return "auto", "as saved, so that the ranks of a node share one memory-mapped copy"


def changes_base(config):
    """Whether the weights of the base change, because all are trained or the merged model travels."""
    return config.model.adapter.kind == "full" or config.exchange.what == "merged"


def choose_compute(config, device, width):
    """(torch dtype name, reason): what layers of a width compute in; the adapter itself is float32 always."""
    import torch

    if config.train.dtype != "auto":
        return config.train.dtype, "as configured"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU computes in it"
        return "float32", "the GPU does not compute in bfloat16"
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "float32", "the processor has no instructions for bfloat16"
    if width < WIDE:
        return "float32", f"the model's {width} hidden units are too few to gain from bfloat16"
    return "bfloat16", "the processor has instructions for it"


def passes(config, model, device):
    """The forward.Forward of a model as train.dtype, packing and compile say."""
    compute, _ = choose_compute(config, device, width_of(model))
    return forward.Forward(model, device, compute, config.train.packing, config.train.compile)


def width_of(model):
    """How many hidden units a model has, by its embedding."""
    return model.get_input_embeddings().weight.shape[1]


def build(config, device):
    """Load the base, quantise it if asked, put the adapter on and flatten what is trained: a Trainable.

    The adapter's initial values come from run.seed alone. UserError if the model cannot be had or does not take the
    adapter that was asked for.
    """
    from gdmpi import merged

    model = adapt(config, load_base(config, device))
    if config.exchange.what == "merged":
        trainable = merged.Merged(model, device)
    else:
        trainable = Trainable(model, device, method.load(config.method.name).Client.parts)
    trainable.forward = passes(config, model, device)
    trainable.warnings = misplaced(config, model) + trainable.forward.notes
    return trainable


def adapt(config, base):
    """The base with the configured adapter on it, initialised from run.seed; UserError if it does not fit.

    With kind full it is the base itself, of which all is trained.
    """
    _, _, peft = libraries.load(config.model.quantize != "none")
    section = config.model.adapter
    if section.kind == "full":
        return base.requires_grad_(True)
    lora = peft.LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.targets if section.targets == "all-linear" else _names(section.targets),
        use_rslora=section.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    linear = sorted({name.rpartition(".")[2] for name, _ in linear_layers(base)})
    try:
        with rng.torch_fork(config.run.seed, "adapter"):
            return peft.get_peft_model(base, lora)
    except ValueError as error:
        what = f"model.adapter.targets: {section.targets}: {first_line(error)}"
        raise UserError(f"{what} This model's linear layers are {', '.join(linear)}") from None


def kept(config, device):
    """The bases.Entry from which ranks on this device share the base; None if they need none, or cannot."""
    if device.type != "cpu" or changes_base(config):
        return None
    dtype, _ = choose_dtype(config, device)
    return bases.find(config.run.cache, fetchable(config.model.name), dtype, config.model.quantize)


def load_base(config, device, fresh=False):
    """The frozen base model on its device, as model.name, quantize and dtype say; fresh: from its own files."""
    torch, transformers, _ = libraries.load(config.model.quantize != "none")
    place = fetchable(config.model.name)
    dtype, _ = choose_dtype(config, device)
    entry = None if fresh else kept(config, device)
    ready = entry is not None and bases.state(entry) == bases.WHOLE
    source, extra = str(entry.path) if ready else place, {}
    if config.model.quantize == "nf4":
        extra["device_map"] = {"": device}
    if config.model.quantize == "nf4" and not ready:
        compute = getattr(torch, dtype)
        extra["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    try:
        with libraries.reading_weights():
            base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **extra)
    except (OSError, ValueError) as error:
        if source == config.model.name:
            raise unreachable("model.name", place, error) from None
        raise UserError(f"model.name: {source}: cannot load the model: {first_line(error)}") from None
    base.name_or_path = base.config._name_or_path = place  # what peft notes as the adapter's base
    if config.model.quantize == "none":
        base = base.to(device)
    else:
        for layer in four_bit_layers(base):
            # bitsandbytes' AVX512-BF16 path repacks the weights in place in eval mode: training after an evaluation
            # would give other bits, and layers whose input is not a multiple of 64 would crash
            layer.support_avx512bf16_for_cpu = False
    base.config.use_cache = False
    base.requires_grad_(False)
    return base


def four_bit_layers(model):
    """The layers whose weights bitsandbytes keeps in 4 bits."""
    import bitsandbytes

    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def linear_layers(model):
    """(name, module) of the linear layers apart from the output head: what all-linear and nf4 mean."""
    import torch

    head = model.get_output_embeddings()
    return [
        (name, module)
        for name, module in model.named_modules()
        # Linear4bit is a torch.nn.Linear; GPT-2 keeps its linear layers in transformers' Conv1D
        if module is not head and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
    ]


def misplaced(config, model):
    """Warnings where what was asked for of quantisation or LoRA is not there; a list of lines, normally empty."""
    if config.model.adapter.kind == "full":
        plain = type(config.model.adapter)()
        unused = [key for key, value in config.model.adapter if key != "kind" and value != getattr(plain, key)]
        return [f"model.adapter: {', '.join(unused)} have no meaning with kind full"] if unused else []
    base, found = forward.unwrapped(model), []
    adapted = {name for name, module in base.named_modules() if hasattr(module, "lora_A")}
    layers = {name.removesuffix(".base_layer"): module for name, module in linear_layers(base) if ".lora_" not in name}
    targets = config.model.adapter.targets
    if targets == "all-linear":
        bare = [name for name in layers if name not in adapted]
        if bare:
            found.append(f"LoRA is missing on {len(bare)} of {len(layers)} linear layers, such as {bare[0]}")
    else:
        for target in _names(targets):
            if not any(name == target or name.endswith(f".{target}") for name in adapted):
                found.append(f"LoRA is not on {target}: this model has no such linear layer")
    if config.model.quantize == "nf4":
        plain = [name for name, module in layers.items() if module not in four_bit_layers(base)]
        if plain:
            found.append(f"{len(plain)} of {len(layers)} linear layers are not 4-bit, such as {plain[0]}")
    return found


def _names(targets):
    return [targets] if isinstance(targets, str) else list(targets)


def peft_name(name):
    """A parameter's name as peft saves it: without the adapter's own name."""
    return name.replace(".default.", ".").removesuffix(".default")


class Trainable:
    """A model whose trainable parameters are views into one float32 vector, and their gradients into another.

    Loading, the delta, clipping and hashing are single operations on these vectors; nothing is copied tensor by
    tensor. trained: schema of the vector, names as peft saves them, in the model's order. schema: of what travels, as a
    Flat; the same here, and its vector too, but not where something else travels than what is trained (merged.py).

    parts: texts that names hold. What holds the first comes first in the vector, and so on, each a stretch that can be
    trained and sent by itself; what holds none comes last and is frozen. kept: what a method's clients on this rank
    know together.
    """

    def __init__(self, model, device, parts=("",)):
        import torch

        self.model, self.device, self.warnings, self.kept = model, device, [], None
        self.origins = {}  # {layer: its weight as it was loaded, where the base has changed}
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise UserError("model.adapter: nothing is trainable")
        by_part = [[pair for pair in named if text in pair[0]] for text in parts]
        named = [*itertools.chain(*by_part), *(pair for pair in named if not any(text in pair[0] for text in parts))]
        self.parameters = [p for _, p in named]
        self.schema = self.trained = flat.Schema((peft_name(name), np.float32, p.shape) for name, p in named)
        size = self.trained.nbytes // 4
        self.vector = torch.empty(size, dtype=torch.float32, device=device)
        ends = [0, *itertools.accumulate(sum(p.numel() for _, p in own) for own in by_part)]
        self.parts, end = [slice(*pair) for pair in itertools.pairwise(ends)], ends[-1]
        self.gradient = torch.zeros(end, dtype=torch.float32, device=device)
        for p, start in zip(self.parameters, self.trained.blocks, strict=False):
            place = slice(int(start), int(start) + p.numel())
            self.vector[place] = p.detach().reshape(-1).to(torch.float32)
            p.data = self.vector[place].view(p.shape)
            p.grad = self.gradient[place].view(p.shape) if place.stop <= end else None
        self.travels, self.loaded = self.vector, None  # what leaves; what load() was last given
        self.host, self.copying = None, None  # where what leaves a GPU goes to, and the stream in which it does
        self.base_parameters = sum(_count(p) for p in model.parameters() if not p.requires_grad)
        self.base_sha256 = fingerprint(model)
        self.whole = not hasattr(model, "peft_config")  # no adapter: the model itself is trained
        self.travelling = max(place.stop - place.start for place in self.parts)  # values that a client sends
        self.train_only(0)

    def train_only(self, k):
        """Let part k be trained, and nothing else."""
        place, self.active = self.parts[k], []
        for p, start in zip(self.parameters, self.trained.blocks, strict=False):
            p.requires_grad_(bool(place.start <= start < place.stop))
            self.active += [p] * p.requires_grad

    def load(self, values):
        """Set the trainable parameters to a Flat of this schema, or those of a part of it."""
        import torch

        self.travels[self._place(values)].copy_(torch.from_numpy(values.vector))
        self.loaded = values

    def _place(self, values):
        """Where a Flat's values are in what travels; ValueError if they are another model's."""
        place = self.schema.place_of(values.schema)
        return slice(place.start // 4, place.stop // 4)

    def moved(self):
        """Norm of what the parameters that load() was last given have changed by since, in float64."""
        import torch

        start = torch.from_numpy(self.loaded.vector)
        parts = zip(self.vector[self._place(self.loaded)].split(PART), start.split(PART), strict=True)
        squares = [((part - other.to(self.device)).double() ** 2).sum() for part, other in parts]
        return math.sqrt(float(torch.stack(squares).sum()))

    def values(self):
        """A copy of what travels as a Flat, as it was loaded or trained."""
        result = flat.Flat(self.schema)
        result.vector[:] = self.travels.detach().cpu().numpy()
        return result

    def complete(self):
        """Bring what was learnt into what travels; nothing to do where that is what is trained."""

    def delta(self, start):
        """What travels minus start (a Flat of it, or of a part of it), as what leaves().

        It becomes its own difference, in the model's memory: what a full model has learnt takes no second copy.
        """
        import torch

        self.complete()
        place = self._place(start)
        self.travels[place].sub_(torch.from_numpy(start.vector).to(self.device))
        return self._on_its_way(start.schema, place)

    def leaves(self):
        """What travels as a Flat that the caller may overwrite; only load() makes the model whole again.

        On the CPU it is the parameters' own memory. From a GPU they go to pinned memory part by part, while who reads
        the Flat works on the parts that are there.
        """
        self.complete()
        return self._on_its_way(self.schema, slice(0, len(self.travels)))

    def _on_its_way(self, schema, place):
        import torch

        travels = self.travels[place]
        if self.device.type == "cpu":
            return flat.Flat(schema, travels.numpy())
        if self.host is None:
            self.host = torch.empty(len(self.travels), dtype=torch.float32, pin_memory=True)
            self.copying = torch.cuda.Stream(self.device)
        self.copying.wait_stream(torch.cuda.current_stream(self.device))
        under_way = []
        with torch.cuda.stream(self.copying):
            for first in range(0, len(travels), PART):
                own = slice(first, min(first + PART, len(travels)))
                self.host[own].copy_(travels[own], non_blocking=True)
                under_way.append((4 * first, self.copying.record_event()))
        return flat.Flat(schema, self.host[: len(travels)].numpy(), functools.partial(_arrived, under_way))

    def put(self, values):
        """Set the model to what a run came to: an adapter's values, and what its base has gained, if it has."""
        gained = {name: array for name, array in values.items() if name.endswith(lowrank.DELTA)}
        if gained:
            self.rebase(None, gained)
            values = flat.pack({name: array for name, array in values.items() if name not in gained})
        if len(values):
            self.load(values)

    def rebase(self, t, message):
        """Add to the base what a round's message says (see lowrank.py); once, however often the message is loaded."""
        known, changes = self.kept or (-1, lowrank.nothing(self.schema))
        if known != t:
            self.kept = t, lowrank.follow(changes, message)
            for layer in lowrank.layers(self.schema.places) if len(message) else ():
                self._add_to_base(layer, changes[layer + lowrank.DELTA])

    def _add_to_base(self, layer, change):
        """Let a layer's weight be what it was when it was loaded, plus a change [outputs, inputs].

        In float32 that is a sum. Of fewer bits most of a change would be rounded away, so it stays beside them.
        """
        import torch

        inner = self.model.get_submodule(layer).get_base_layer()
        change = torch.from_numpy(change).to(self.device)
        if inner.weight.dtype != torch.float32:
            if not hasattr(inner, "beside"):
                inner.register_forward_hook(_beside)
            inner.beside = change.to(torch.bfloat16)
            return
        if layer not in self.origins:  # it may lie in a file that the ranks of a node share
            self.origins[layer] = inner.weight.data
            inner.weight.data = torch.empty_like(inner.weight.data)
        # GPT-2's Conv1D keeps [inputs, outputs]
        torch.add(self.origins[layer], change.T if type(inner).__name__ == "Conv1D" else change, out=inner.weight.data)

    def check_views(self):
        """Fail if a parameter or gradient no longer lies in the vectors (model.zero_grad() detaches them, say)."""
        if {id(p) for p in self.model.parameters() if p.requires_grad} != {id(p) for p in self.active}:
            raise RuntimeError("the model's trainable parameters are no longer those of the flat vector")
        for p, start in zip(self.parameters, self.trained.blocks, strict=False):
            offset = 4 * int(start)
            if start >= len(self.gradient):
                break
            if p.data_ptr() != self.vector.data_ptr() + offset:
                raise RuntimeError("a trainable parameter is no longer a view into the flat vector")
            if p.grad is None or p.grad.data_ptr() != self.gradient.data_ptr() + offset:
                raise RuntimeError("a gradient is no longer a view into the flat gradient")

    def adapter_config(self):
        """The text of peft's adapter_config.json for this adapter; of transformers' config.json for a whole model."""
        import json

        if self.whole:
            return self.model.config.to_json_string(use_diff=False)
        config = self.model.peft_config["default"].to_dict() | {"inference_mode": True}
        return json.dumps(
            config, indent=2, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v)
        )


def _beside(layer, given, out):
    """A hook for a linear layer: what lies beside its weight adds to its output."""
    import torch

    return out + torch.nn.functional.linear(given[0], layer.beside.to(given[0].dtype)).to(out.dtype)


def _arrived(under_way, end):
    """Wait for those parts [(place of the first byte, event)] that begin before a place, and forget them."""
    while under_way and under_way[0][0] < end:
        under_way.pop(0)[1].synchronize()


def fingerprint(model):
    """A hash that tells base models apart without reading all of them: of names, shapes and some first values.

    Of weights in 4 bits only the name counts: devices may round them differently. To be taken before training, if the
    model has no adapter but is itself trained; it is then the same as with one.
    """
    import torch

    digest, whole = hashlib.sha256(), not hasattr(model, "peft_config")
    for name, p in model.named_parameters():
        if p.requires_grad and not whole:
            continue
        digest.update((PEFT * whole + name.replace(".base_layer", "")).encode())
        if p.dtype != torch.uint8 and p.device.type != "meta":
            first = p.detach().reshape(-1)[:SAMPLED].to("cpu", torch.float32)
            digest.update(f"{tuple(p.shape)}".encode() + first.numpy().tobytes())
    return digest.hexdigest()


def _count(parameter):
    """Elements of a weight; one in 4 bits reports two elements a byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return int(np.prod(shape)) if shape is not None else parameter.numel()
