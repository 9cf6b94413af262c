"""What a step of training takes, by arithmetic on a model's sizes: for gdmpi check, and for choosing what fits."""

from dataclasses import dataclass, replace

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# what kernels.py does at once, by device
TILE = 128  # queries of a row that attend at once on the CPU: their scores fit into its cache
CHUNK = {"cpu": 256, "cuda": 1024}  # target tokens whose logits exist
BLOCK = {"cpu": 16, "cuda": 1024}  # those of them that are in float32
# what malloc takes for a step's tensors, over their own bytes, in float32 and in fewer bits: aligned blocks that are
# freed leave gaps which the next ones do not fit into, and products of fewer bits lay out anew what they multiply
# (glibc 2.36, Llamas with rows of 22 to 512 tokens: in float32 0.7 to 1.5, in bfloat16 0.8 to 2.8, where layers are
# checkpointed 2.6 and 6; 1.0 if every tensor is mapped by itself, which takes a third longer)
GAPS = {"packed": (1.4, 2.1), "padded": (1.5, 2.2), "checkpointed": (2.4, 5.0)}
CUDA_GAPS = 1.1  # torch loses little of a GPU's
LIBRARIES = {"cpu": 375e6, "cuda": 0.6e9}  # bytes of Python, torch and the rest in a client rank; CUDA's context
ONEDNN = 70e6  # bytes of what multiplies in bfloat16 on the CPU: its kernels, as many as are kept, and buffers
SHARE = 0.6  # of a GPU's free memory, that a step may take
PASS = {"cpu": 2048, "least": 512, "most": 16384}  # tokens of a pass


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's layers, in numbers a token; each is a sum over all layers but width, vocabulary and largest.

    width: of the hidden states. shared: inputs of the adapted layers other than a block's last, one that feeds several
    counted once; own: counted for each. last: inputs of the blocks' last layers. ranks: of the adapters. inner: what
    lies between the layers of the feed-forward blocks. queries, keys: widths of attention. largest: weights of the
    largest layer, the head aside. sides: (inputs, outputs, number of such layers).
    """

    layers: int
    width: int
    vocabulary: int
    shared: int
    own: int
    last: int
    ranks: int
    inner: int
    queries: int
    keys: int
    heads: int
    largest: int
    sides: tuple


def shape_of(model):
    """The Shape of a model with an adapter on it, or that is itself trained; its weights may be on the meta device.

    A block is what the linear layers of one module are: its last reads what the others have led to, and these read one
    input together. That is so of Llamas and their like, of GPT-2 and of GPT-NeoX.
    """
    from gdmpi import forward, model as models

    base, blocks, whole = forward.unwrapped(model), {}, not hasattr(model, "peft_config")
    config = base.config.get_text_config()
    for name, layer in models.linear_layers(base):
        if ".lora_" not in name:
            adapted, name = whole or name.endswith(".base_layer"), name.removesuffix(".base_layer")
            blocks.setdefault(name.rpartition(".")[0], []).append((*_sizes(layer), adapted))
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    sums = dict.fromkeys(("shared", "own", "last", "ranks", "inner"), 0)
    for name, block in blocks.items():
        *first, last = block
        inputs = [inputs for inputs, _, adapted in first if adapted]
        sums["shared"] += max(inputs, default=0)
        sums["own"] += sum(inputs)
        sums["last"] += last[0] * last[2]
        if not whole:
            sums["ranks"] += model.peft_config["default"].r * sum(adapted for *_, adapted in block)
        if "att" not in name.rpartition(".")[2]:  # with a gate, its activation is kept too
            sums["inner"] += sum(outputs for _, outputs, _ in first) + last[0] * (len(first) > 1)
    sides = [each[:2] for block in blocks.values() for each in block]
    return Shape(
        layers=layers,
        width=config.hidden_size,
        vocabulary=base.get_output_embeddings().weight.shape[0],
        queries=layers * heads * head,
        keys=layers * (getattr(config, "num_key_value_heads", None) or heads) * head,
        heads=layers * heads,
        largest=max(inputs * outputs for inputs, outputs in sides),
        sides=tuple((*each, sides.count(each)) for each in sorted(set(sides))),
        **sums,
    )


def _sizes(layer):
    """(inputs, outputs) of a linear layer, which may be 4-bit or GPT-2's Conv1D."""
    if hasattr(layer, "out_features"):
        return layer.in_features, layer.out_features
    return tuple(layer.weight.shape)


@dataclass(frozen=True)
class Step:
    """How a step is computed. compute, base: names of the dtypes of layers and of weights. length: of a row, tokens."""

    compute: str
    base: str
    length: int
    dropout: bool = False
    device: str = "cpu"
    packed: bool = True
    checkpointing: bool = False
    quantized: bool = False

    @property
    def gaps(self):
        """What the allocator takes over the tensors' own bytes."""
        if self.device == "cuda":
            return CUDA_GAPS
        how = "checkpointed" if self.checkpointing else "packed" if self.packed else "padded"
        return GAPS[how][self.compute != "float32"]


def activations(shape, step, tokens):
    """Bytes that a pass of so many tokens keeps for its backward pass.

    A token keeps in each layer, in the dtype of computing where nothing else is said:

        two hidden states in float32                        what the norms read
        the inputs of the adapted layers, and r of each     one that several layers read once, if it need not be cast
                                                            to the dtype of computing; with dropout for each layer,
                                                            with the noise: a byte on CUDA, else of its own dtype
        between gate, activation, up and down: three        two layers and an activation, or one without a gate
        queries, keys, values and result of attention       keys and values for all heads, on CUDA for their own
        (length + TILE) / 2 shares of each head             on the CPU, packed: half the row and half a tile

    With checkpointing a token keeps the input of each layer, and all of this of one layer at a time.
    """
    compute, stream = BYTES[step.compute], BYTES[step.base]
    inside = min(compute, stream)  # layers give their results in the narrower of the two
    if step.dropout:
        on_gpu = step.device == "cuda"
        kept = shape.own * (compute + (1 if on_gpu else stream)) + shape.last * (compute + (1 if on_gpu else inside))
    else:
        kept = (shape.shared if compute == stream else shape.own) * compute + shape.last * compute
    kept += 2 * 4 * shape.width * shape.layers + shape.ranks * compute + shape.inner * inside
    if step.device == "cuda":
        kept += 2 * (shape.queries + shape.keys) * inside
    else:
        kept += 4 * shape.queries * inside
        if step.packed:
            kept += shape.heads * (step.length + TILE) / 2 * inside
    if step.checkpointing:
        kept = kept / shape.layers + shape.layers * shape.width * stream
    return tokens * kept * step.gaps


def loss(shape, step, tokens):
    """Bytes for head and loss: a chunk of logits, a block of them in float32, the head and a layer cast if need be.

    And a token's hidden state with its gradient.
    """
    compute, stream = BYTES[step.compute], BYTES[step.base]
    inside = min(compute, stream)
    logits = shape.vocabulary * (CHUNK[step.device] * inside + BLOCK[step.device] * 4)
    head = shape.vocabulary * shape.width * inside * (inside != stream)
    layer = shape.largest * compute * (step.quantized or compute != stream)
    return (logits + head + 2 * tokens * shape.width * inside) * step.gaps + layer


def _block(shape, step):
    """Bytes a token of the largest block of one layer, where nothing is kept."""
    inside = min(BYTES[step.compute], BYTES[step.base])
    return (shape.inner / shape.layers + shape.queries / shape.layers) * inside + 3 * 4 * shape.width


def evaluation(shape, step, tokens):
    """Bytes of a forward pass that keeps nothing: the largest block of one layer, and head and loss."""
    return tokens * _block(shape, step) * step.gaps + loss(shape, step, tokens)


def cache(shape, step, tokens):
    """Bytes of the keys and values of so many tokens that answers are generated with.

    Keys have gone through their rotation, whose tables are of the base's dtype, so they are in the wider of base's and
    computing's; and transformers keeps values as it keeps keys.
    """
    return tokens * 2 * shape.keys * max(BYTES[step.compute], BYTES[step.base])


def generation(shape, step, tokens):
    """Bytes of answering prompts: the cache of all tokens, one layer of it twice as it grows, and a pass over them."""
    grown = (1 + 1 / shape.layers) * cache(shape, step, tokens)
    return (grown + tokens * _block(shape, step)) * step.gaps


def tokens_of_pass(batch_size, max_length, pass_tokens):
    """Tokens of the largest pass: a step's rows at full length, cut into passes of at least a row."""
    return min(batch_size * max_length, max(pass_tokens, max_length))


def on_cpu(pass_tokens):
    """Tokens of a pass where a GPU's memory does not decide: as asked for, or for auto what the CPU is quick with."""
    return PASS["cpu"] if pass_tokens == "auto" else pass_tokens


def choose_pass(shape, step, free, pass_tokens="auto", checkpointing="auto"):
    """(pass_tokens, checkpointing, reason) where a GPU has so many bytes free after base, adapter and optimiser.

    What is not auto is kept as it is. A step may take SHARE of the memory; the pass has the largest power of two of
    tokens that fits.
    """
    room = SHARE * free

    def fits(tokens, checkpointed):
        how = replace(step, checkpointing=checkpointed)
        return activations(shape, how, tokens) + loss(shape, how, tokens) <= room

    said = f"{free / 1e9:.1f} GB of the GPU are free for this rank, {SHARE:.0%} of them for a step"
    if checkpointing == "auto":
        least = step.length if pass_tokens == "auto" else max(step.length, pass_tokens)
        checkpointing = not fits(least, False)
    if pass_tokens == "auto":
        pass_tokens = PASS["most"]
        while pass_tokens > PASS["least"] and not fits(pass_tokens, checkpointing):
            pass_tokens //= 2
    return pass_tokens, checkpointing, said
