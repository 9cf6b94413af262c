"""A base model and an adapter made one: put on it, or added to its weights."""

import warnings

from gdmpi.errors import UserError


def merge(config, directory, changes=None):
    """Replace an adapter's directory by that of the merged model, with its tokenizer; lines to print.

    changes: {layer: float32 array [outputs, inputs]}, what else is added to the base's weights.

    A 4-bit base is quantised as in training and then written out in full: these are the weights that the adapter was
    trained against. To quantise the sum again would round most of the adapter away.
    """
    from gdmpi import libraries, model

    libraries.environment(config.run.cache)
    torch, transformers, peft = libraries.load(config.model.quantize != "none")
    # what is kept of it, if it is in 4 bits, transformers can load but not save again
    base = model.load_base(config, model.choose_device(config, 0), fresh=True)
    if config.model.quantize != "none":
        base = base.dequantize()
    wrapped = adapted(base, directory)
    layers = {name: each for name, each in wrapped.named_modules() if isinstance(each, peft.tuners.lora.LoraLayer)}
    with torch.no_grad():
        for name, layer in layers.items():
            inner = layer.get_base_layer()
            total = inner.weight.float() + layer.get_delta_weight("default").float()
            if changes:
                change = torch.from_numpy(changes[name]).to(total.device)
                total += change.T if type(inner).__name__ == "Conv1D" else change
            # a new parameter: the old one may lie in the base's mapped file, or be the other end of tied embeddings
            inner.weight = torch.nn.Parameter(total.to(inner.weight.dtype), requires_grad=False)
    merged = wrapped.unload()
    with torch.device("meta"):
        plain = type(merged)(merged.config)
    for name, module in plain.named_modules():
        # in 4 bits the transposed weights of GPT-2's Conv1D had become those of a linear layer
        if type(module).__name__ == "Conv1D" and isinstance(inner := merged.get_submodule(name), torch.nn.Linear):
            inner.weight = torch.nn.Parameter(inner.weight.T.contiguous(), requires_grad=False)
    ends = merged.get_input_embeddings(), merged.get_output_embeddings()
    if ends[1] is not None and ends[0].weight is not ends[1].weight:
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
    place = model.locate(config.model.name)
    # training had turned it off
    merged.config.use_cache = getattr(transformers.AutoConfig.from_pretrained(place), "use_cache", True)
    for file in list(directory.iterdir()):
        file.unlink()
    merged.save_pretrained(directory)
    model.tokenizer(config.model.name).save_pretrained(directory)
    dtype = str(merged.dtype).removeprefix("torch.")
    lines = [f"{len(layers)} layers merged in float32, saved in {dtype}"]
    if config.model.quantize != "none":
        lines.append(f"the base's weights are those of its {config.model.quantize} form, which was trained against")
    return lines


def adapted(base, directory):
    """A base model with the adapter of a PEFT directory on it; UserError if they do not belong together."""
    from gdmpi import libraries

    _, _, peft = libraries.load()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            wrapped = peft.PeftModel.from_pretrained(base, str(directory))
    except Exception as error:  # peft raises whatever its parts raise: a KeyError, a SafetensorError, ...
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{directory}: this adapter cannot be put on {base.config._name_or_path}: {reason}") from None
    if any("missing adapter keys" in str(warning.message) for warning in said):
        raise UserError(f"{directory}: this adapter lacks values for some layers of {base.config._name_or_path}")
    return wrapped
