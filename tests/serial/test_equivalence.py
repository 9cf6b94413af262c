"""A run against the same thing written by hand with transformers, peft and torch: equal to rounding, or to the bit.

The loops below use nothing of gdmpi but the rows' tokens: their batches, loss, clipping and optimiser are their own.
"""

import itertools
import math

import numpy as np
import pytest
from conftest import TIMES

from gdmpi import (
    build,
    checkpoint,
    config as configuration,
    data,
    evaluate,
    flat,
    forward,
    log,
    model,
    mpi,
    rng,
    run,
    train,
)

WHOLE = ["train.batch_size=1000", "run.keep=9"]  # one batch holds all rows of a client, so their order does not matter
NUMBER = itertools.count()


def configured(tiny, *words):
    return configuration.load(tiny / "tiny.yaml", [f"run.name=equal-{next(NUMBER)}", *words])


def alone():
    from mpi4py import MPI

    return mpi.Link(MPI.COMM_SELF)


def play(tiny, *words):
    """Run a configuration in this process; returns (Record, [the adapter after each round as {name: array}])."""
    config = configured(tiny, *words)
    book = run.play(alone(), config, log.Log(False))
    files = reversed(checkpoint.files(config.directory))
    return book, [dict(checkpoint.read(path).server["weights"]) for path in files]


@pytest.fixture(scope="module")
def plain(tiny):
    """The tiny model with a LoRA adapter of the same shape, as peft makes it; its values are set by each loop."""
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    lora = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, lora)


def rows_of(tiny, *words):
    config = configured(tiny, *words)
    return data.prepare(config, model.tokenizer(config.model.name))


def batch_of(rows, ids, extra=0):
    """Tokens, attention mask and labels (-100 where there is no loss) of some rows, padded by hand."""
    import torch

    pieces = [rows.row(i) for i in ids]
    width = max(len(tokens) for tokens, _ in pieces) + extra
    tokens, mask = torch.full((len(pieces), width), 2), torch.zeros((len(pieces), width), dtype=torch.long)
    labels = torch.full((len(pieces), width), -100)
    for i, (row, target) in enumerate(pieces):
        for j, (token, carries) in enumerate(zip(row.tolist(), target.tolist(), strict=True)):
            tokens[i, j], mask[i, j] = token, 1
            if carries:
                labels[i, j] = token
    return tokens, mask, labels


def mean_loss(plain, batch):
    import torch

    tokens, mask, labels = batch
    logits = plain(input_ids=tokens, attention_mask=mask).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100)


def loop(plain, start, rows, optimizer="sgd", steps=1, lr=0.01, clip=None, extra=0, rates=None, moments=None):
    """Train the plain model from start on all rows at once, steps times; returns the adapter {name: array}.

    rates: the learning rate of each step, else lr. moments: a list that holds the optimiser from one call to the next.
    """
    import peft
    import torch

    peft.set_peft_model_state_dict(plain, {name: torch.from_numpy(np.array(array)) for name, array in start.items()})
    plain.train()
    parameters = [p for p in plain.parameters() if p.requires_grad]
    make = {"sgd": torch.optim.SGD, "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0)}[optimizer]
    tool = moments[0] if moments else make(parameters, lr=lr)
    if moments == []:
        moments.append(tool)
    batch = batch_of(rows, range(len(rows)), extra)
    for step in range(steps):
        tool.param_groups[0]["lr"] = rates[step] if rates else lr
        tool.zero_grad()
        mean_loss(plain, batch).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        tool.step()
    return {name: tensor.numpy().copy() for name, tensor in peft.get_peft_model_state_dict(plain).items()}


def distance(one, two):
    """Largest difference between two adapters {name: array}."""
    assert one.keys() == two.keys()
    return max(np.abs(one[name] - two[name]).max() for name in one)


# ---- a round is a plain loop, or the mean of several ----------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.3, 1e-3])
def test_one_client_and_one_step_of_sgd_is_a_plain_step(tiny, plain, clip):
    limit = "null" if clip is None else clip
    words = [*WHOLE, "clients.count=1", "run.rounds=1", "train.steps=1", "train.optimizer=sgd", "train.lr=0.5"]
    book, (start, end) = play(tiny, *words, f"train.clip_norm={limit}")
    rows = rows_of(tiny, "clients.count=1").train[0]
    by_hand = loop(plain, start, rows, lr=0.5, clip=clip, extra=3)
    assert distance(by_hand, end) < 1e-6
    moved = math.sqrt(sum(np.sum((end[name] - start[name]) ** 2, dtype=np.float64) for name in start))
    if clip == 1e-3:  # well below the gradient's norm
        assert moved == pytest.approx(0.5 * clip, rel=1e-3)
    else:
        assert moved > 0.5 * 2e-3
    first = mean_loss_of(plain, start, rows)
    assert abs(book.rows[1]["train_loss"] - first) < 1e-5


def mean_loss_of(plain, values, rows, batch=7):
    """The mean loss over all target tokens of the rows, some rows at a time; nothing is trained."""
    import peft
    import torch

    peft.set_peft_model_state_dict(plain, {name: torch.from_numpy(np.array(array)) for name, array in values.items()})
    plain.eval()
    total = tokens = 0
    with torch.no_grad():
        for begin in range(0, len(rows), batch):
            padded = batch_of(rows, range(begin, min(begin + batch, len(rows))), extra=2)
            count = int((padded[2][:, 1:] != -100).sum())
            total, tokens = total + float(mean_loss(plain, padded)) * count, tokens + count
    return total / tokens


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_five_clients_give_the_mean_of_five_plain_loops(tiny, plain, optimizer, weighting):
    steps, lr = (1, 0.5) if optimizer == "sgd" else (2, 1e-3)
    words = [*WHOLE, "clients.count=5", "run.rounds=1", f"train.steps={steps}", f"train.optimizer={optimizer}"]
    _, (start, end) = play(tiny, *words, f"train.lr={lr}", "train.clip_norm=null", f"method.weighting={weighting}")
    clients = rows_of(tiny, "clients.count=5").train
    sizes = [len(clients[client]) for client in range(5)]
    assert sorted(set(sizes)) == [9, 10]
    weights = sizes if weighting == "examples" else [1] * 5
    ends = [loop(plain, start, clients[client], optimizer, steps, lr) for client in range(5)]
    mean = {name: np.average([each[name] for each in ends], axis=0, weights=weights) for name in start}
    assert distance(mean, start) > 1e-4
    assert distance(ends[0], ends[1]) > 1e-5
    assert distance(mean, end) < 1e-6


def test_examples_really_weigh(tiny):
    ends = []
    for weighting in ("uniform", "examples"):
        words = [*WHOLE, "clients.count=5", "run.rounds=1", "train.steps=1", "train.optimizer=sgd", "train.lr=5"]
        ends.append(play(tiny, *words, "train.clip_norm=null", f"method.weighting={weighting}")[1][-1])
    assert distance(*ends) > 1e-5


def test_server_learning_rate_scales_the_mean(tiny):
    words = [*WHOLE, "clients.count=2", "run.rounds=1", "train.steps=1", "train.optimizer=sgd"]
    _, (start, full) = play(tiny, *words)
    _, (_, half) = play(tiny, *words, "server.lr=0.5")
    assert distance(half, {name: (start[name] + full[name]) / 2 for name in start}) < 1e-7
    assert distance(start, full) > 1e-5


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_losses_reported_are_those_of_a_plain_loop(tiny, plain):
    words = ["data.validation=0.3", "data.test=0.3", "clients.count=1", "run.rounds=1", "run.keep=9"]
    book, adapters = play(tiny, *words)
    prepared = rows_of(tiny, *words)
    assert len(prepared.validation) == 18  # more than a batch of evaluate.py
    for row, values in zip(book.rows, adapters, strict=True):
        by_hand = mean_loss_of(plain, values, prepared.validation)
        assert abs(row["eval_loss"] - by_hand) < 1e-5
        assert abs(row["eval_perplexity"] - math.exp(by_hand)) < 1e-5 * math.exp(by_hand)
    assert abs(book.rows[0]["eval_loss"] - book.rows[1]["eval_loss"]) > 1e-3
    assert abs(book.rows[-1]["test"]["loss"] - mean_loss_of(plain, adapters[-1], prepared.test)) < 1e-5
    assert book.rows[-1]["test"]["tokens"] == prepared.test.target_tokens
    # a batch of evaluate.py or of another size: the loss is that of the tokens, not of the batches
    losses = [mean_loss_of(plain, adapters[-1], prepared.validation, batch) for batch in (1, 5, 18)]
    assert max(losses) - min(losses) < 1e-5


@pytest.mark.parametrize("batch", [1, 4, 1000])
def test_rows_a_batch_do_not_matter_to_the_loss(tiny, monkeypatch, batch):
    import torch

    config = configured(tiny, "data.validation=0.3")
    rows = rows_of(tiny, "data.validation=0.3").validation
    trainable = model.build(config, torch.device("cpu"))

    def loss():
        return evaluate.total([evaluate.losses(trainable, rows, range(len(evaluate.plan(rows))))])

    expected = loss()
    monkeypatch.setattr(evaluate, "BATCH", batch)
    again = loss()
    assert len(evaluate.plan(rows)) == math.ceil(18 / batch)
    assert again[1] == expected[1] and abs(again[0] - expected[0]) < 1e-5


# ---- the same bits --------------------------------------------------------------------------------------------------


def test_same_seed_same_bits_another_seed_other_bits(tiny):
    import torch

    words = ["run.rounds=2", "model.adapter.dropout=0.1", "clients.per_round=0.67"]
    first, _ = play(tiny, *words)
    torch.manual_seed(12345)  # whatever the process drew in between must not matter
    np.random.seed(1)
    before = torch.random.get_rng_state()
    again, _ = play(tiny, *words)
    assert torch.equal(torch.random.get_rng_state(), before)
    other, _ = play(tiny, *words, "run.seed=1")
    untimed = [
        [{key: value for key, value in row.items() if key not in TIMES} for row in book.rows]
        for book in (first, again, other)
    ]
    assert untimed[0] == untimed[1]
    assert all(a["adapter_sha256"] != b["adapter_sha256"] for a, b in zip(untimed[0], untimed[2], strict=True))
    assert len({row["adapter_sha256"] for row in first.rows}) == 3


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_moments_that_clients_keep_are_resumed_from(tiny, optimizer):
    words = [f"train.optimizer={optimizer}", "train.keep_optimizer=true", "train.steps=2"]
    whole, _ = play(tiny, *words, "run.rounds=2")
    first = configured(tiny, *words, "run.rounds=1")
    run.play(alone(), first, log.Log(False))
    _, state = checkpoint.newest(first.directory, pytest.fail)
    more = first.model_copy(update={"run": first.run.model_copy(update={"rounds": 2})})
    resumed = run.play(alone(), more, log.Log(False), state)
    assert resumed.rows[-1]["adapter_sha256"] == whole.rows[-1]["adapter_sha256"]
    new, _ = play(tiny, *words, "run.rounds=2", "train.keep_optimizer=false")
    assert new.rows[-1]["adapter_sha256"] != whole.rows[-1]["adapter_sha256"]


def updates(tiny, order, *words):
    """{client: (the vector it sends in round 3, its metrics)} of clients trained one after the other on a new rank."""
    link, config = alone(), configured(tiny, *words)
    parts = build.build(link, config)
    server, clients, _ = run.roles(link, parts)
    message, result = flat.pack(server.broadcast(3)), {}
    for client in order:
        clients[client].load(3, message)
        update = clients[client].local_update(3)
        result[client] = (update.mean.vector.copy(), update.metrics)
    return result


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_client_after_another_sends_what_it_sends_alone(tiny, quantize):
    words = ["model.adapter.dropout=0.1", f"model.quantize={quantize}", "train.steps=3"]
    by_itself, after = updates(tiny, [1], *words), updates(tiny, [2, 0, 1], *words)
    assert np.array_equal(by_itself[1][0], after[1][0]) and by_itself[1][1] == after[1][1]
    assert not np.array_equal(after[0][0], after[1][0])


def test_dropout_was_on(tiny):
    (with_it, _), (without, _) = (
        updates(tiny, [1], f"model.adapter.dropout={p}", "train.steps=3")[1] for p in (0.1, 0.0)
    )
    assert not np.array_equal(with_it, without)


def test_an_evaluation_in_between_changes_nothing(tiny):
    import torch

    config = configured(tiny, "model.adapter.dropout=0.1", "train.steps=2")
    rows = rows_of(tiny).train
    ends = []
    for looks in (False, True):
        trainable = model.build(config, torch.device("cpu"))
        trainer = train.Trainer(trainable, config, rows)
        for t in (1, 2):
            trainer(t, 0)
            if looks:
                evaluate.losses(trainable, rows[1], [0])
        ends.append(flat.sha256(trainable.values()))
    assert ends[0] == ends[1]


# ---- learning rates and moments over the rounds ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("linear", 5, [0.2, 0.4, 0.6, 0.8, 1, 1]),
        ("cosine", 0, [1, 0.9330127018922194, 0.75, 0.5, 0.25, 0.0669872981077807]),
        ("cosine", 2, [0.5, 1, 1, 0.8535533905932737, 0.5, 0.1464466094067263]),
        ("cosine", 9, [1 / 9, 2 / 9, 3 / 9, 4 / 9, 5 / 9, 6 / 9]),
    ],
)
def test_learning_rates_are_those_computed_by_hand(schedule, warmup, expected):
    words = [f"train.schedule={schedule}", f"train.warmup={warmup}", "train.lr=0.02"]
    section = configuration.load(overrides=words).train
    rates = [train.rate(section, step, 6) for step in range(6)]
    assert rates == pytest.approx([0.02 * factor for factor in expected], rel=1e-12, abs=0)


@pytest.mark.parametrize("keep", ["true", "false"])
def test_moments_and_rates_go_on_over_the_rounds(tiny, plain, keep):
    """Three rounds of one client are one long loop of torch's AdamW, or three with new moments; the rates go on."""
    words = [*WHOLE, "clients.count=1", "run.rounds=3", "train.steps=2", "train.lr=2e-3", "train.clip_norm=null"]
    words += ["train.schedule=linear", "train.warmup=2", f"train.keep_optimizer={keep}"]
    _, adapters = play(tiny, *words)
    rows = rows_of(tiny, "clients.count=1").train[0]
    rates = [1e-3, 2e-3, 2e-3, 1.5e-3, 1e-3, 0.5e-3]
    ends, moments = {}, {"true": [], "false": []}
    for kind in ("true", "false"):
        ends[kind] = [adapters[0]]
        for t in range(3):
            held = moments[kind] if kind == "true" else None
            two = rates[2 * t : 2 * t + 2]
            ends[kind].append(loop(plain, ends[kind][-1], rows, "adamw", 2, rates=two, moments=held))
    for mine, by_hand in zip(adapters, ends[keep], strict=True):
        assert distance(mine, by_hand) < 2e-6
    assert distance(ends["true"][-1], ends["false"][-1]) > 1e-4


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own(tiny, monkeypatch):
    seen, real = [], forward.Forward.losses
    note = lambda self, rows, ids: (seen.append(list(map(int, ids))), real(self, rows, ids))[1]  # noqa: E731
    config = configured(tiny, "train.epochs=2", "train.batch_size=5")
    rows = rows_of(tiny).train
    import torch

    trainer = train.Trainer(model.build(config, torch.device("cpu")), config, rows)
    monkeypatch.setattr(forward.Forward, "losses", note)
    said = []
    trainer.on_step = lambda *note: said.append(note)
    count = len(rows[0])
    steps = math.ceil(count / 5)
    metrics = trainer(1, 0)
    epochs = [sum(seen[:steps], []), sum(seen[steps:], [])]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs) and epochs[0] != epochs[1]
    assert metrics["steps"] == len(seen) == 2 * steps
    assert metrics["tokens"] == 2 * rows[0].target_tokens
    assert [note[:3] for note in said] == [(0, done, 2 * steps) for done in range(1, 2 * steps + 1)]
    tokens = [note[3] for note in said]
    assert tokens == sorted(tokens) and tokens[-1] == metrics["tokens"]
    first = list(seen)
    seen.clear()
    trainer(2, 0)
    assert seen != first
    seen.clear()
    trainer(1, 0)
    assert seen == first
    assert rng.key(0, "order", 1, 0) != rng.key(0, "order", 1, 1)
