"""What is said of a run while it is played, in lines for people."""

from gdmpi import evaluate, generate, hosting, method

TAB = " " * 11  # before what belongs to the line above


def introduction(config, about, ranks):
    """What is about to run, as lines."""
    adapter, train = config.model.adapter, config.train
    trained, base = about["trainable_parameters"], about["base_parameters"]
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    four_bit = ", 4-bit NF4" if config.model.quantize == "nf4" else ""
    what = f"LoRA r={adapter.r} on {targets}: {trained:,} trainable parameters"
    what = f"{what} ({trained / base:.2%})" if base else "none: all weights are trained"
    down = about.get("travelling_parameters", trained)
    down, up = about.get("travels") or (4 * down, 4 * about.get("sent_parameters", down))
    talk = "; and what clients ask in each step, and are answered" * hosting.asks(config)
    merged = ": the model with the adapter merged in" * (config.exchange.what == "merged")
    cohort = len(hosting.cohort(config, 1))
    steps = hosting.steps(config, 1)
    local = f"{steps} steps" if train.steps else f"{train.epochs} epoch{'s' * (train.epochs > 1)}"
    source = "a file a client" if config.clients.split.kind == "files" else config.data.name
    on = min(max(1, ranks - 1), config.clients.count)
    ranks_of = "1 rank" if on == 1 else f"{on} ranks"
    weighting = config.method.weighting
    step = f"{train.batch_size} rows a step, {train.optimizer}, lr {train.lr:g}, clip {train.clip_norm}"
    name = method.title(config.method.name, about.get("method_sha256"))
    yield f"{name} over {config.run.rounds} rounds, into {config.directory}"
    for title, text in {
        "model": f"{config.model.name}: {base or trained:,} parameters{four_bit}, {config.model.dtype} on "
        f"{config.run.device}",
        "adapter": what,
        "data": f"{source}: {held_out(about['data'])}",
        "clients": f"the rows of all {config.clients.count} are one client's, on 1 rank"
        if hosting.pooled(config)
        else f"{config.clients.count} on {ranks_of}{how_split(config)}, {cohort} a round, {weighting} mean",
        "local": f"{local} of {step}",
        "answers": answering(config),
        "public": about.get("public") and f"{about['public']:,} rows that everybody sees and no client trains on",
        "travels": "nothing" if hosting.alone(config) else f"{sent(config, down, up)}{merged}{talk}",
    }.items():
        if text:
            yield f"  {title:8} {text}"


def sent(config, down, up):
    """How many bytes travel, and how."""
    how = "one by one" if hosting.gathers(config) else "as exact sums"
    return f"{size(down)} down and {size(up)} up per client and round, {how}"


def answering(config):
    """What will be generated, in words; nothing if nothing is."""
    asked, part = config.evaluation, generate.part(config)
    if not asked.generate:
        return ""
    why = "" if part == "test" else " (there are no test rows)"
    return f"to {asked.generate:,} {part} prompts{why} after the last round, of at most {asked.new_tokens} tokens each"


def how_split(config):
    """What decides who has which rows, in words to go on with; nothing for rows dealt at random and files."""
    split = config.clients.split
    said = {"by": f", split by {split.column}", "dirichlet": f", split by Dirichlet({split.alpha}) over {split.column}"}
    return said.get(split.kind, "")


def held_out(report):
    """What became of the rows, in words; report: of the pooled data, or {"clients": [{client: report}]} of files."""
    parts = [report] if "train" in report else [r for each in report["clients"] for r in each.values()]

    def count(key, kinds=("train", "validation", "test")):
        return sum(part[kind].get(key, 0) for part in parts for kind in kinds)

    text = ", ".join(f"{count('kept', (kind,)):,} {kind}" for kind in ("train", "validation", "test")) + " rows"
    if count("dropped"):
        text += f"; {count('dropped'):,} rows dropped: no response token within data.max_length"
    if count("truncated"):
        text += f"; {count('truncated'):,} cut at data.max_length"
    if count("answered"):
        kinds = [f"{count('answered', (kind,)):,} {kind}" for kind in ("validation", "test")]
        text += f"; accuracy over {' and '.join(kinds)} rows"
    return text


def line(row, rounds):
    """A round in a line."""
    validation = ""
    if row["eval_loss"] is not None:
        validation = f"  validation {row['eval_loss']:.4f}  perplexity {row['eval_perplexity']:.2f}"
        if row["eval_accuracy"] is not None:
            validation += f"  accuracy {row['eval_accuracy']:.1%}"
        if row["eval_clients"] and row["eval_loss"] != (own := evaluate.mean(row["eval_clients"])):
            validation += f"  clients {own:.4f}"
            if row["eval_clients_accuracy"]:
                validation += f" {evaluate.mean(row['eval_clients_accuracy']):.1%}"
    if row["round"] == 0:
        return f"before training:{validation or '  no validation rows'}"
    sent = f"up {size(row['bytes_up_per_client'])}  down {size(row['bytes_down_per_client'])}"
    name = f"round {row['round']:{len(str(rounds))}d}/{rounds}"
    speed = f"  {row['tokens_per_second']:,.0f} tokens/s" if row["tokens_per_second"] is not None else ""
    return f"{name}  train {row['train_loss']:.4f}{validation}  {sent}{speed}  {row['seconds']['total']:.1f} s"


def by_themselves(loss, clients):
    """What a loss is of, in words to go on with, where clients have models of their own."""
    if not clients:
        return ""
    if loss == (own := evaluate.mean(clients)):
        return f"; the mean of {len(clients)} clients, each by itself"
    return f"; of the server's model, where the {len(clients)} clients' own have {own:.4f} on average"


def size(count):
    """Bytes for people: 155.6 kB, 639.6 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return None
