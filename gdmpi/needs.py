"""What a configuration needs of a client rank's memory and time, estimated: lines of check."""

from pathlib import Path
from types import SimpleNamespace

from gdmpi import bases, estimate, evaluate, generate, hosting, landing, model, summing, timing
from gdmpi.words import TAB, size

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a weight; an 8-bit scale for 64 of them, a 32-bit one for 256 scales


def memory(config, shape):
    """Memory of a client rank and of the server, as lines.

    Base: linear layers at NF4_BITS a weight if 4-bit, the rest in dtype. On the CPU all ranks of a node map it from the
    same files; these are made if it is not used as it is saved (see bases.py). Adapter, or model if all is trained:
    parameters, gradient, AdamW's two moments in float32, half of it as computed with; on a GPU the last message, too;
    keep_optimizer holds a client's moments of the last round. Host: of a client the last message, and of one on a GPU
    its delta; of the server the adapter and the last message, whose memory takes the mean. The wire: two chunks of
    integers a rank. A pass: what its tokens keep for the backward pass, and head and loss (see estimate.py), or an
    evaluation or the answers to prompts if these take more. Libraries: what a client rank has before it has a model.
    """
    step, reason = _step(config, shape)
    four_bit = shape.linear if config.model.quantize == "nf4" else 0
    whole = config.model.adapter.kind == "full"
    packed, rest = four_bit * NF4_BITS / 8, (shape.parameters - four_bit) * estimate.BYTES[step.base] * (not whole)
    moments = 2 * shape.nbytes * (config.train.optimizer == "adamw")
    kept = moments * (config.train.keep_optimizer or hosting.pooled(config))
    landed = shape.schema.nbytes * (step.device == "cuda" and landing.lands(config))
    adapter = 2.5 * shape.nbytes + moments + kept + landed
    wire = summing.LANES * shape.codec.empty().nbytes
    host = (2 if step.device == "cuda" else 1) * shape.schema.nbytes + wire
    length = config.data.max_length
    tokens = estimate.tokens_of_pass(config.train.batch_size, length, estimate.on_cpu(config.train.pass_tokens))
    trained = [what(shape.sizes, step, tokens) for what in (estimate.activations, estimate.loss)]
    evaluated = estimate.evaluation(shape.sizes, step, max(evaluate.TOKENS, length))
    answers = generate.largest_pass(config) * bool(config.evaluation.generate)
    answered, cached = (what(shape.sizes, step, answers) for what in (estimate.generation, estimate.cache))
    in_bfloat16 = step.device == "cpu" and step.compute == "bfloat16"
    libraries_too = estimate.LIBRARIES[step.device] + estimate.ONEDNN * in_bfloat16
    four = f"{size(packed)} in 4-bit NF4 ({NF4_BITS:.3f} bits a weight), " * bool(four_bit)
    changes = model.changes_base(config)
    own = adapter + max(sum(trained), evaluated, answered) + libraries_too + (host if step.device == "cpu" else 0)
    mapped, more, shared = "", "", packed + rest
    if step.device == "cpu" and changes:
        own, shared = own + shared, 0
    elif step.device == "cpu":
        mapped = ", mapped: once a node"
    if step.device == "cpu":
        more = f"; {size(own)} for every further rank of the node"
    auto = ", supposed: a run goes by the GPU's free memory" * (
        step.device == "cuda" and config.train.pass_tokens == "auto"
    )
    layers = ", layers checkpointed" * step.checkpointing
    yield f"  memory   of a client rank, estimated, on {reason}"
    yield f"{TAB}{size(packed + rest):>9}  base: {four}{size(rest)} in {step.base}{mapped}"
    what = "model" if whole else "adapter"
    held = f"{what}, gradient{', moments' * bool(moments)}{', kept moments' * bool(kept)}{', message' * bool(landed)}"
    yield f"{TAB}{size(adapter):>9}  {held}"
    if kept:
        yield f"{TAB}{'':>9}  ({size(kept)} more for each further client of the rank)"
    if answered > max(sum(trained), evaluated):
        yield f"{TAB}{size(answered):>9}  answering prompts, {size(cached)} of it keys and values; more than a step"
    elif evaluated > sum(trained):
        yield f"{TAB}{size(evaluated):>9}  evaluating rows of full length, more than a step takes"
    else:
        yield f"{TAB}{size(trained[0]):>9}  activations of a pass of {tokens:,} tokens in {step.compute}{layers}{auto}"
        yield f"{TAB}{size(trained[1]):>9}  head and loss"
    delta = "delta, message and wire, in host memory" if step.device == "cuda" else "message and wire"
    yield f"{TAB}{size(host):>9}  {delta}"
    what = "Python, torch and the other libraries" if step.device == "cpu" else "CUDA itself"
    yield f"{TAB}{size(libraries_too):>9}  {what}"
    yield f"{TAB}{size(shared + own):>9}  together{' on the GPU' * (step.device == 'cuda')}{more}"
    more, held = (shared + own) * hosting.serves_model(config), f"{'model' if changes else 'adapter'}, message and wire"
    held += f"; {'a model of its own, on a GPU if it has one' if more else 'it needs no GPU'}"
    yield f"{TAB}{size(2 * shape.schema.nbytes + wire + more):>9}  the server's, for any number of clients: {held}"
    if step.device == "cpu" and not changes and _is_made(config, shape):
        made = f"{size(packed + rest)} in {Path(config.run.cache) / 'bases'}"
        yield f"  disk     {made}: the base as it is used, made by the first run and mapped by all ranks"


def time(config, shape, reports, counts, steps):
    """How long the client with the most rows trains in a round, if that can be told here."""
    import torch

    part = reports[counts.index(max(counts)) if len(reports) > 1 else 0]["train"]
    train = config.train
    rows = hosting.steps(config, 1) * train.batch_size if train.steps else train.epochs * max(counts)
    tokens, targets = (rows / part["kept"] * part[key] for key in ("tokens", "target_tokens"))
    step, _ = _step(config, shape, tokens / rows)
    if step.device == "cuda" and not torch.cuda.is_available():
        return
    passes = max(tokens / estimate.on_cpu(train.pass_tokens), rows / train.batch_size)
    seconds = timing.seconds(shape.sizes, step, (tokens, targets), passes, train.threads)
    cores = f"this machine, with {train.threads} core{'s' * (train.threads > 1)} to itself"
    where = "this machine's GPU" if step.device == "cuda" else cores
    what = "round, but for distillation," if config.data.public else "round"
    yield f"  time     a client's {what} takes about {seconds:.2g} s on {where}; a rank's clients train in turn"


def _step(config, shape, length=None):
    """(estimate.Step for rows of a length, the longest if none is given; on what device and why)."""
    import torch

    device, reason = _device(config)
    dtype, _ = model.choose_dtype(config, SimpleNamespace(type=device))
    if device == "cuda" and not torch.cuda.is_available():
        compute = "bfloat16" if config.train.dtype == "auto" else config.train.dtype
    else:
        compute, _ = model.choose_compute(config, SimpleNamespace(type=device), shape.sizes.width)
    step = estimate.Step(
        compute=compute,
        base=shape.saved if dtype == "auto" else dtype,
        length=length or config.data.max_length,
        dropout=config.model.adapter.dropout > 0,
        device=device,
        packed=config.train.packing,
        checkpointing=config.train.checkpointing is True,
        quantized=config.model.quantize != "none",
    )
    return step, reason


def _device(config):
    """(cuda or cpu, reason). Where the job will run is not known: auto takes a 4-bit base for the sign of a GPU."""
    import torch

    if config.run.device != "auto":
        return config.run.device, f"run.device {config.run.device}"
    if torch.cuda.is_available():
        return "cuda", "a GPU, as here"
    if config.model.quantize != "none":
        return "cuda", "a GPU, supposing that a 4-bit base gets one (run.device=cpu for the other)"
    return "cpu", "the CPU, as torch sees no GPU here (run.device=cuda for the other)"


def _is_made(config, shape):
    """Whether a base on the CPU is another than the saved one, so that the first run has to make it."""
    dtype, quantize = model.choose_dtype(config, SimpleNamespace(type="cpu"))[0], config.model.quantize
    if shape.directory is not None:
        return bases.converted(shape.directory, dtype, quantize) is not None
    return quantize != "none" or dtype not in ("auto", shape.saved)
