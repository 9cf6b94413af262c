"""The base model, frozen and maybe 4-bit, and the adapter on it."""

from pathlib import Path

from gdmpi import bases, forward, libraries, method, rng, views
from gdmpi.errors import UserError, first_line

DEMO = Path(__file__).parent / "demo"
WIDE = 128  # hidden units from which bfloat16 is quicker than float32 on a CPU that has it (measured: 96 even, 192 1.4)


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
    """Load the base, quantise it if asked, put the adapter on and flatten what is trained: a views.Trainable.

    The adapter's initial values come from run.seed alone. UserError if the model cannot be had or does not take the
    adapter that was asked for.
    """
    from gdmpi import merged

    model = adapt(config, load_base(config, device))
    if config.exchange.what == "merged":
        trainable = merged.Merged(model, device)
    else:
        trainable = views.Trainable(model, device, method.load(config.method.name).Client.parts)
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
