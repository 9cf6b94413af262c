"""A model in halves against the model itself, and Split-FedLLM against the methods that it equals when put together."""

import io
import types

import numpy as np
import pytest
import torch
from test_equivalence import alone, configured, play, rows_of as rows_of_clients
from test_forward import lora, made, rows_of

from gdmpi import (
    check,
    checkpoint,
    config as configuration,
    flat,
    forward,
    halves,
    log,
    method,
    model,
    rng,
    run,
    spread,
    train,
    views,
)
from gdmpi.errors import UserError

CPU = torch.device("cpu")
ROWS = rows_of([9, 4, 20, 5, 13])
PLAIN = ["train.optimizer=sgd", "train.lr=1", "train.clip_norm=null"]
split = method.load("split")


def trainable(name, packing=True, checkpointing=False, dtype="float32", **adapter):
    """A small model with LoRA, the same at each call; no dropout but LoRA's."""
    quiet = {f"{where}_pdrop": 0.0 for where in ("attn", "embd", "resid") if name == "gpt2"}
    built = views.Trainable(lora(made(name, **quiet), **adapter), CPU)
    built.forward = forward.Forward(built.model, CPU, dtype, packing)
    built.model.train()
    if checkpointing:
        built.forward.checkpoint()
    return built


def joined(name, count=1, options=(), **how):
    """([clients of one rank], their server) on two models, each client with an ask() that notes what it asked."""
    ours, theirs = trainable(name, **how), trainable(name, **how)
    chosen = split.Options(**dict(options))
    section = configuration.load(None, [*PLAIN]).train
    shared = {"section": section, "fork": lambda purpose, t, client: rng.torch_fork(0, purpose, t, client)}
    server = split.Server(chosen, method.Context(count, initial=theirs.values(), model=theirs, **shared))
    lent = method.Context(count, model=ours, train=types.SimpleNamespace(only=lambda schema: None), **shared)
    lent.examples = dict.fromkeys(range(count), 1)
    clients = [split.Client(chosen, lent, number) for number in range(count)]
    for client in clients:
        client.asked = []

        def ask(question, client=client):
            client.asked.append(flat.pack(question))
            return flat.pack(server.answer(1, client.client, client.asked[-1]))

        client.ask = ask
    return clients, server


def gradient_in_halves(client, server, ids=range(5), count=5):
    """Gradients of a pass, before and behind the cut, and its loss."""
    ours = client.context.model
    ours.gradient.zero_()
    loss = client._pass(ROWS, list(ids), train.Pass(count, 0.0, False))
    before = client.halves.before.nbytes // 4
    assert not ours.gradient[before:].any()
    return torch.cat([ours.gradient[:before], server.parts[client.client].gradient]), loss


def gradient_of_whole(built, ids=range(5), count=5):
    losses = built.forward.losses(ROWS, list(ids))
    (losses.sum() / count).backward()
    return built.gradient, float(losses.detach().sum())


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llama", {}),
        ("llama", {"packing": False}),
        ("llama", {"checkpointing": True}),
        ("mistral", {}),
        ("qwen2", {"packing": False}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("bloom", {}),  # its blocks return tuples, and it is padded
        ("gemma2", {}),  # its masks differ from block to block, and its head cannot be split off
    ],
)
def test_gradients_are_those_of_the_unsplit_model(name, how, labels):
    if name == "gemma2" and labels == "client":
        with pytest.raises(UserError, match=r"method\.labels: .* say server"):
            joined(name, options={"labels": labels}, **how)
        return
    whole = trainable(name, **how)
    (client,), server = joined(name, options={"labels": labels}, **how)
    expected, loss_of_whole = gradient_of_whole(whole)
    found, loss = gradient_in_halves(client, server)
    assert float(expected.abs().max()) > 1e-2
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert loss == pytest.approx(loss_of_whole, rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_halves_of_one_model_have_its_dropout(checkpointing):
    """One generator drives both halves, as it does the whole: the same tokens are dropped in the same layers."""
    how = {"checkpointing": checkpointing, "lora_dropout": 0.3}
    whole, parted, other = trainable("llama", **how), trainable("llama", **how), trainable("llama", **how)
    cut = halves.Halves(parted, 1)
    torch.manual_seed(3)
    expected, _ = gradient_of_whole(whole)
    torch.manual_seed(3)
    tokens, lengths, places, targets = parted.forward.lay(ROWS, range(5))
    first = cut.first(tokens, lengths)
    hidden = first.detach().requires_grad_()
    (parted.forward.losses_at(cut.rest(hidden, lengths), places, targets).sum() / 5).backward()
    first.backward(hidden.grad)
    assert torch.allclose(parted.gradient, expected, rtol=1e-5, atol=1e-6)
    torch.manual_seed(4)
    assert not torch.allclose(gradient_of_whole(other)[0], expected, rtol=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("labels", ["server", "client"])
def test_answers_do_not_depend_on_who_asks_in_between(labels, checkpointing):
    """Two clients' steps of two passes, one client after the other or in turns: values, gradients and dropout."""
    draw = np.random.default_rng(0)
    hidden, gradients = draw.standard_normal((2, 2, 2, 1, 20, 32)).astype(np.float32)
    places, targets, lengths = np.int32([3, 8, 18]), np.int32([5, 6, 7]), np.int32([4, 16])

    def asked(client, number, kind):
        last = {"step": np.float64([3, 2.0, number == 1, 1])}
        if kind == "gradient":
            return last | {"gradient": gradients[client, number]}
        question = {"hidden": hidden[client, number], "lengths": lengths}
        return question | (last | {"places": places, "targets": targets} if labels == "server" else {})

    def answers(in_turns):
        _, server = joined("llama", 2, {"labels": labels}, checkpointing=checkpointing, lora_dropout=0.3)
        kinds = ["hidden"] + ["gradient"] * (labels == "client")
        steps = [(number, kind) for _ in range(2) for number in range(2) for kind in kinds]
        order = [(client, *step) for step in steps for client in range(2)]
        if not in_turns:
            order.sort(key=lambda each: each[0])
        found = {0: [], 1: []}
        for client, number, kind in order:
            found[client].append(flat.pack(server.answer(1, client, flat.pack(asked(client, number, kind)))))
        assert not torch.equal(server.parts[0].vector, server.parts[1].vector)
        return found

    one, two = answers(True), answers(False)
    assert all(a.buffer.tobytes() == b.buffer.tobytes() for c in range(2) for a, b in zip(one[c], two[c], strict=True))


def test_in_the_u_shape_no_label_is_sent():
    (client,), server = joined("llama", options={"labels": "client"})
    gradient_in_halves(client, server)
    assert [set(question) for question in client.asked] == [{"hidden", "lengths"}, {"gradient", "step"}]
    (other,), server = joined("llama")
    gradient_in_halves(other, server)
    assert [set(question) for question in other.asked] == [{"hidden", "lengths", "places", "targets", "step"}]


def test_what_crosses_the_cut_in_bfloat16_has_two_bytes_and_nearly_the_same_gradient():
    expected, _ = gradient_of_whole(trainable("llama", dtype="bfloat16"))
    (client,), server = joined("llama", dtype="bfloat16")
    found, _ = gradient_in_halves(client, server)
    assert client.asked[0]["hidden"].dtype == np.uint16 and client.asked[0]["hidden"].shape == (1, 51, 32)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_sketches_of_the_first_half_tell_the_error_of_averaging_it():
    built = trainable("llama")
    before, bank, full = halves.Halves(built, 1).before, spread.bank(built.trained), []
    for seed in range(3):
        torch.manual_seed(seed)
        built.vector.normal_()
        full.append(spread.sketch(built, bank))
        first = spread.sketch(built, bank, before)
        assert np.array_equal(first, full[-1][: len(first)]) and len(first) == len(full[-1]) / 2
    firsts = [each[: len(first)] for each in full]
    error = spread.aggregation_error(built.trained, firsts, [1, 2, 3])
    assert (
        error
        == spread.aggregation_error(before, firsts, [1, 2, 3])
        != spread.aggregation_error(built.trained, full, [1, 2, 3])
    )


# ---- rounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "labels"),
    [([], "client"), (["method.weighting=examples", "clients.count=5"], "server"), (["model.quantize=nf4"], "server")],
)
def test_a_server_half_for_each_client_is_federated_averaging(tiny, more, labels):
    words = [*PLAIN, "run.rounds=2", "run.keep=9", *more]
    _, expected = play(tiny, *words)
    book, found = play(tiny, *words, "method.name=split", f"method.labels={labels}")
    for one, two in zip(expected, found, strict=True):
        assert list(one) == list(two)
        assert max(np.abs(one[name] - two[name]).max() for name in one) < 2e-6
    assert max(np.abs(found[0][name] - found[-1][name]).max() for name in found[0]) > 1e-3
    assert book.rows[-1]["eval_loss"] < book.rows[0]["eval_loss"]


def test_a_shared_server_half_goes_from_client_to_client(tiny):
    """By hand: each client begins with the first half of the round and the second half of the client before it."""
    words = [*PLAIN, "run.rounds=1", "run.keep=9"]
    _, (_, found) = play(tiny, *words, "method.name=split", "method.server=shared")
    config = configured(tiny, *words)
    built = model.build(config, CPU)
    trainer = train.Trainer(built, config, rows_of_clients(tiny, *words).train)
    start, front = built.values(), halves.before(built.model, built.schema, 1).nbytes // 4
    rest, firsts = start.vector[front:], []
    for client in range(3):
        built.load(flat.Flat(built.schema, np.concatenate([start.vector[:front], rest])))
        trainer(1, client)
        values = built.values().vector
        rest = values[front:]
        firsts.append(values[:front])
    expected = flat.Flat(built.schema, np.concatenate([np.mean(firsts, 0), rest]))
    assert max(np.abs(expected[name] - found[name]).max() for name in found) < 2e-6
    _, (_, apart) = play(tiny, *words, "method.name=split")
    assert max(np.abs(apart[name] - found[name]).max() for name in found) > 1e-4


@pytest.mark.parametrize("options", [[], ["method.server=shared"]])
def test_resumed_with_moments_on_both_sides(tiny, options):
    words = ["method.name=split", "train.keep_optimizer=true", "model.adapter.dropout=0.1", *options]
    whole, _ = play(tiny, *words, "run.rounds=2")
    first = configured(tiny, *words, "run.rounds=1")
    run.play(alone(), first, log.Log(False))
    _, state = checkpoint.newest(first.directory, pytest.fail)
    clients = [str(split.SHARED)] if options else ["0", "1", "2"]
    assert {name.split(".")[1] for name in state.server if name.startswith("moments.")} == set(clients)
    more = first.model_copy(update={"run": first.run.model_copy(update={"rounds": 2})})
    resumed = run.play(alone(), more, log.Log(False), state)
    assert resumed.rows[-1]["adapter_sha256"] == whole.rows[-1]["adapter_sha256"]
    anew, _ = play(tiny, *words, "run.rounds=2", "train.keep_optimizer=false")
    assert anew.rows[-1]["adapter_sha256"] != whole.rows[-1]["adapter_sha256"]


@pytest.mark.parametrize("labels", ["server", "client"])
def test_bytes_are_tokens_times_width_each_way_and_the_halves_of_the_adapter(tiny, labels):
    """Rows are packed, so there is no padding; 32 hidden units in float32."""
    words = ["method.name=split", f"method.labels={labels}", "run.rounds=1"]
    book, _ = play(tiny, *words)
    row, trained = book.rows[-1], book.parts.about
    seen, steps, crossings = row["seen_tokens"], row["steps"], 2 if labels == "client" else 1
    rows = sum(map(len, rows_of_clients(tiny, *words).train.values()))
    beside = 4 * rows + 4 * 8 * steps + 2 * 4 * row["tokens"] * (labels == "server")  # lengths, steps, labels
    assert trained["sent_parameters"] * 2 == trained["trainable_parameters"]  # the first of two equal blocks
    asked = (crossings * seen * 32 * 4 + beside) / 3
    answered = (crossings * seen * 32 * 4 + 8 * steps * (labels == "server")) / 3
    assert row["bytes_up_per_client"] == 4 * trained["sent_parameters"] + round(asked)
    assert row["bytes_down_per_client"] == 4 * trained["trainable_parameters"] + round(answered)
    assert 0 < row["server_idle"] < 1 and book.rows[0]["server_idle"] is None
    parameters = 2 * (32 * 32 + 32 * 16) + 3 * 32 * 64 + 2 * 32  # of a block: attention, feed-forward, two norms
    embedding = 300 * 32
    flops = train.flops(parameters + embedding, trained["sent_parameters"], 1)
    assert row["flops_per_client"] == flops * max(each["metrics"]["seen"] for each in row["sent"].values())


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["method.cut=0"], "method.cut: "),
        (["method.server=both"], "method.server: "),
        (["model.adapter.kind=full"], "method.name: split trains an adapter, by halves; leave model.adapter.kind out"),
        (["exchange.what=merged"], "method.name: split trains an adapter, by halves; leave exchange.what out"),
        (["train.compile=true"], "method.name: "),
        (["clients={boundary: site, count: 2, split: {kind: files, files: [a, b]}}"], "method.labels: "),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words, says):
    with pytest.raises(UserError) as caught:
        configuration.load(None, ["method.name=split", *words])
    assert str(caught.value).startswith(f"the command line: {says}") and "\n" not in str(caught.value)


def test_labels_may_stay_at_a_site():
    words = ["clients={boundary: site, count: 2, split: {kind: files, files: [a, b]}}", "method.labels=client"]
    assert configuration.load(None, ["method.name=split", *words]).clients.boundary == "site"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["method.cut=2"], "method.cut: 2: the model has 2 blocks, .* say 1 to 1"),
        (["model.adapter.targets=[layers.0.mlp.up_proj]"], "method.cut: 1: nothing is trained on one of its sides"),
    ],
)
def test_a_cut_that_the_model_does_not_have_is_refused_by_runs_and_by_check(tiny, words, says):
    config = configured(tiny, "method.name=split", *words)
    with pytest.raises(UserError, match=says):
        run.play(alone(), config, log.Log(True, io.StringIO()))
    assert not config.directory.exists()
    with pytest.raises(UserError, match=says):
        check.report(config)


def test_check_knows_what_travels(tiny):
    lines = check.report(configured(tiny, "method.name=split"))
    both = "16.4 kB down and 8.2 kB up"
    assert [line for line in lines if both in line and "what clients ask in each step" in line], lines


def test_blocks_that_cannot_be_found_and_halves_that_do_not_run_are_refused(monkeypatch):
    built = trainable("llama")
    built.forward.base.config.num_hidden_layers = 3
    with pytest.raises(UserError, match="the blocks of a llama model cannot be found"):
        halves.Halves(built, 1)
    built = trainable("llama")
    real = halves.Halves.rest
    monkeypatch.setattr(halves.Halves, "rest", lambda self, hidden, lengths: real(self, 1.1 * hidden, lengths))
    with pytest.raises(UserError, match="do not run by themselves"):
        halves.Halves(built, 1)
