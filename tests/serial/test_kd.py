"""Knowledge distillation: what travels is the mean of answers, losses are those of a plain loop, and clients gain."""

import io
import json
import stat
import types

import numpy as np
import pytest
from conftest import launch, within, write_rows
from safetensors.numpy import load_file
from test_equivalence import alone, batch_of, configured, distance

from gdmpi import (
    build,
    checkpoint,
    config as configuration,
    data,
    distil,
    log,
    method,
    model,
    report,
    results,
    run,
    train,
    views,
)
from gdmpi.errors import UserError

torch = pytest.importorskip("torch")
LABELS = ["red", "blue", "green", "black"]
WORDS = ["method.name=kd", "run.rounds=2", "run.keep=9"]
COLOURS = [*WORDS, "data.public=0.3", "data.columns={prompt: prompt, response: topic}"]
COLOURS += [f"evaluation.labels=[{','.join(LABELS)}]"]
TEXTS = [*WORDS, "data.public=0.2", "method.top_k=5", "method.positions=3"]


@pytest.fixture(scope="module")
def gpt2(tiny):
    """The directory of a GPT-2 with random weights and the tiny Llama's tokenizer."""
    import transformers

    directory, tokenizer = tiny / "gpt2", transformers.AutoTokenizer.from_pretrained(tiny / "model")
    sizes = {"n_positions": 128, "n_embd": 24, "n_layer": 2, "n_head": 2}
    torch.manual_seed(1)
    # a vocabulary that is padded, as those of many models are
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tokenizer) + 4, **sizes))
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def played(tiny, *words):
    """Run a configuration in this process; its directory."""
    config = configured(tiny, *words)
    run.play(alone(), config, log.Log(False))
    return config.directory


def state_of(directory, t):
    return checkpoint.read(directory / checkpoint.name(t))


def kept(directory, t):
    """{client: its adapter after round t}."""
    clients = state_of(directory, t).clients
    return {
        int(c): checkpoint.read_client(directory / "clients", int(c), t, about["sha256"])["method.weights"]
        for c, about in clients.items()
    }


def network(place, adapter):
    """Transformers' model with an adapter on it, as peft would load it, in evaluation mode."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    whole = peft.get_peft_model(base, lora)
    peft.set_peft_model_state_dict(whole, {name: torch.from_numpy(array.copy()) for name, array in adapter.items()})
    return whole.eval()


# ---- a round --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coloured(tiny, gpt2):
    """The directory of a run with labels, of three clients, of which one has another architecture."""
    return played(tiny, *COLOURS, f"model.others={{1: {gpt2}}}", "method.weighting=examples")


def test_teacher_is_the_mean_of_log_likelihoods(tiny, gpt2, coloured):
    """Of a plain loop with transformers and peft over the public rows' prompts with each label."""
    import transformers

    config = configuration.load(coloured / "config.yaml")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    prepared = data.prepare(config, tokenizer)
    numbers = sorted(set(prepared.public.index.tolist()))
    # which rows are public, told from what is left of the table
    lines = [json.loads(line) for line in (tiny / "data.jsonl").read_text().splitlines()]
    used = [*prepared.train.values(), prepared.validation, prepared.test]
    others = sorted(set(range(60)) - {i for rows in used for i in rows.index.tolist()})
    assert len(others) == len(numbers) == 14
    found = {}
    for client, adapter in kept(coloured, 1).items():
        plain, rows = network(gpt2 if client == 1 else tiny / "model", adapter), []
        for number in others:
            begin = tokenizer(lines[number]["prompt"] + "\n")["input_ids"]
            values = []
            for label in LABELS:
                ids = torch.tensor([begin + tokenizer(label)["input_ids"] + [tokenizer.eos_token_id]])
                with torch.inference_mode():
                    logp = plain(input_ids=ids).logits[0].double().log_softmax(-1)
                values.append(sum(float(logp[i - 1, ids[0, i]]) for i in range(len(begin), ids.shape[1])))
            rows.append(values)
        found[client] = np.array(rows)
    weights = [len(prepared.train[client]) for client in range(3)]
    assert len(set(weights)) > 1
    expected = np.average([found[client] for client in range(3)], 0, weights)
    assert np.abs(state_of(coloured, 1).server["teacher.logits"] - expected).max() < 2e-5


def test_bytes_are_those_of_the_logits_and_nothing_else_travels(coloured):
    rows = report.summary(coloured)["rounds"]
    assert [(row["bytes_up_per_client"], row["bytes_down_per_client"]) for row in rows] == [(0, 0)] + 2 * [(224, 224)]
    assert 224 == 14 * 4 * 4
    assert state_of(coloured, 2).about["travels"] == [224, 224]


def test_server_and_clients_are_evaluated_each_by_itself(tiny, gpt2, coloured):
    """A loss over the held-out rows by hand: the server's own adapter, and each client's on its own base."""
    config = configuration.load(coloured / "config.yaml")
    held = data.prepare(config, model.tokenizer(config.model.name)).validation
    row = report.summary(coloured)["rounds"][-1]

    def loss_of(plain):
        tokens, mask, labels = batch_of(held, range(len(held)))
        with torch.inference_mode():
            logits = plain(input_ids=tokens, attention_mask=mask).logits.float()
        mean = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100)
        return float(mean)

    server = results.server_of(state_of(coloured, 2))[1]
    assert row["eval_loss"] == pytest.approx(loss_of(network(tiny / "model", server.adapter())), abs=1e-5)
    for client, adapter in kept(coloured, 2).items():
        plain = network(gpt2 if client == 1 else tiny / "model", adapter)
        assert row["eval_clients"][str(client)] == pytest.approx(loss_of(plain), abs=1e-5)
    assert list(row["eval_clients_accuracy"]) == ["0", "1", "2"]
    shown = report.show(coloured)
    assert "validation loss: of the server's model; mean over the 3 clients' own adapters" in shown
    assert "test accuracy by client: 0 " in shown


def test_server_learns_and_its_adapter_is_the_run_s(coloured):
    before, after = (results.server_of(state_of(coloured, t))[1].adapter() for t in (0, 2))
    assert distance(before, after) > 1e-4
    assert state_of(coloured, 2).adapter_sha256 == report.summary(coloured)["adapter_sha256"]
    assert report.verify(coloured)[1]
    losses = [row["server"]["distil_loss"] for row in state_of(coloured, 2).metrics if row["server"]]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)


def test_clients_own_adapters_load_and_score_as_in_the_run(gpt2, coloured):
    """With peft, those of another architecture too; export writes them to folders, but merges the server's alone."""
    last = report.summary(coloured)["rounds"][-1]
    said = within(["export", coloured, coloured / "out"]).ok().out
    assert "the clients' own to its folders" in said
    for folder in ("adapter", "out"):
        for client, adapter in kept(coloured, 2).items():
            place = coloured / folder / f"{client:04d}"
            assert stat.S_IMODE(place.stat().st_mode) == 0o700
            peft_config = json.loads((place / "adapter_config.json").read_text())
            assert (peft_config["base_model_name_or_path"] == str(gpt2)) == (client == 1)
            saved = load_file(place / "adapter_model.safetensors")
            assert list(saved) == sorted(adapter) and all((saved[name] == adapter[name]).all() for name in saved)
    for client in (0, 1):
        scored = within(["eval", coloured / "adapter" / f"{client:04d}", coloured / "config.yaml"]).ok()
        assert f"validation  loss {last['eval_clients'][str(client)]:.6f}" in scored.out
    within(["export", coloured, coloured / "merged", "--merge"]).ok()
    assert not [path for path in (coloured / "merged").iterdir() if path.is_dir()]


@pytest.fixture(scope="module")
def texts(tiny):
    """The directory of a run with texts: top-k, weighted by rows."""
    return played(tiny, *TEXTS, "method.weighting=examples")


def test_teacher_of_texts_is_the_mean_of_the_likeliest(tiny, texts):
    """Probabilities at the temperature before three tokens of each response, from transformers and peft alone."""
    config = configuration.load(texts / "config.yaml")
    prepared = data.prepare(config, model.tokenizer(config.model.name))
    received = []
    for client, adapter in kept(texts, 1).items():
        plain, ids, shares = network(tiny / "model", adapter), [], []
        for i in range(len(prepared.public)):
            tokens, target = prepared.public.row(i)
            places = np.flatnonzero(target)
            with torch.inference_mode():
                logits = plain(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
            # the first target, the last, and one halfway
            for place in (places[0], places[(len(places) - 1) // 2], places[-1]):
                own = (logits[place - 1] / 2).softmax(-1).topk(5)
                ids.append(own.indices.numpy())
                shares.append(own.values.numpy())
        arrays = {"ids": np.array(ids), "shares": np.array(shares).astype(np.float16)}
        received.append((len(prepared.train[client]), arrays))
    expected, found = distil.mean(received, 5), state_of(texts, 1).server
    assert found["teacher.ids"].shape == (3 * len(prepared.public), 5)
    same = found["teacher.ids"] == expected["ids"]
    assert same.mean() > 0.98  # two tokens that are as likely may change places
    assert np.abs(found["teacher.shares"].astype(float) - expected["shares"])[same].max() < 1e-3
    rows = report.summary(texts)["rounds"]
    nbytes = 4 * 5 * 3 * len(prepared.public)
    assert [(row["bytes_up_per_client"], row["bytes_down_per_client"]) for row in rows[1:]] == 2 * [(nbytes, nbytes)]


# ---- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "alpha"), [(COLOURS, 0.3), (TEXTS, 0.3), (TEXTS, 1.0), (COLOURS, 1.0)])
@pytest.mark.parametrize("limit", [10, 2048])
def test_a_step_is_that_of_a_plain_loop(tiny, words, alpha, limit):
    """One step of SGD on all public rows and all own rows: (1 - alpha) CE + alpha tau^2 KL, in peft and torch."""
    more = ["train.batch_size=1000", "train.optimizer=sgd", "train.lr=0.5", "clients.count=1", "train.clip_norm=null"]
    config = configured(tiny, *words, *more, f"train.pass_tokens={limit}")
    parts, options = build.build(alone(), config), method.options(config)
    public = distil.spaced(parts.public, 3) if options.top_k else parts.public
    trainer = train.Trainer(parts.trainable, parts.config, parts.rows)
    start, draw = parts.trainable.values().copy(), np.random.default_rng(0)
    # another teacher than the model itself
    parts.trainable.vector += torch.from_numpy(draw.standard_normal(len(start.vector)).astype(np.float32))
    teacher = distil.respond(trainer, 0, public, 2.0, options.top_k, parts.vocabulary)
    parts.trainable.load(start)
    loss, seen = distil.steps(trainer, 1, 0, public, teacher, 2.0, 1, alpha)

    plain = network(tiny / "model", dict(start))
    tokens, mask, labels = batch_of(public, range(len(public)))
    logits = plain(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    wanted = labels[:, 1:] != -100
    if options.top_k:
        ids, shares = (torch.from_numpy(teacher[name].astype(kind)) for name, kind in (("ids", int), ("shares", float)))
        p = (logits[wanted].double() / 2).log_softmax(-1)
        own = p.gather(1, ids)
        rest, tail = 1 - shares.sum(-1), (1 - own.exp().sum(-1)).log()
        divergence = (shares * (shares.log() - own)).sum(-1) + rest * (rest.log() - tail)
    else:
        logp = logits.double().log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[:, :, None])[:, :, 0]
        z = (logp * wanted).sum(1).view(-1, 4)
        q = (torch.from_numpy(teacher["logits"]).double() / 2).softmax(-1)
        divergence = (q * (q.log() - (z / 2).log_softmax(-1))).sum(-1)
    tokens, mask, labels = batch_of(parts.rows[0], range(len(parts.rows[0])))
    logits = plain(input_ids=tokens, attention_mask=mask).logits[:, :-1].double()
    ce = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100)
    expected = (1 - alpha) * ce + alpha * 4 * divergence.mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    gradients = {views.peft_name(name): p.grad for name, p in plain.named_parameters() if p.requires_grad}
    after = parts.trainable.values()
    moved = np.abs(after.vector - start.vector).max()
    assert moved > 1e-4
    for name, array in after.items():
        assert np.allclose(array - start[name], -0.5 * gradients[name].numpy(), atol=2e-3 * moved), name
    assert seen == len(public.tokens) + (alpha < 1) * len(parts.rows[0].tokens)


def test_an_epoch_is_every_public_row_once_in_an_order_of_the_round(tiny):
    config = configured(tiny, *COLOURS, "train.batch_size=4")
    parts, seen = build.build(alone(), config), []
    fake = types.SimpleNamespace(
        config=parts.config,
        of=lambda client: types.SimpleNamespace(device="cpu"),
        descend=lambda t, client, batches, backward, purpose: seen.append([list(units) for units, _ in batches]),
    )
    teacher = {"logits": np.zeros((14, 4), np.float32)}
    for t in (1, 2, 1):
        distil.steps(fake, t, 0, parts.public, teacher, 2.0, 2)
    assert seen[0] == seen[2] != seen[1]
    assert [len(batch) for batch in seen[0]] == [4, 4, 4, 2] * 2
    assert sorted(sum(seen[0][:4], [])) == sorted(sum(seen[0][4:], [])) == list(range(14))


# ---- learning -------------------------------------------------------------------------------------------------------


def test_clients_of_two_architectures_learn_what_only_the_other_has_rows_of(tmp_path):
    """Letters stand for one of four words; each client has rows with half of the letters, and the server has none.

    By itself a client is right about its half and guesses the rest: 5 of 8 rows, and the server 1 of 4. Both have rows
    with all words: about letters that it does not know a client shall be unsure, for its logits are in the mean, too.
    """
    import transformers
    from conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer(tmp_path / "llama", ["a b c d e f g h W X Y Z 0 1 2 3 4 5 6 7 8 9"] * 20)
    tokenizer.save_pretrained(tmp_path / "gpt2")
    # weights that are large enough for an adapter to make a sure answer of
    common = {"vocab_size": len(tokenizer), "initializer_range": 0.4, "bos_token_id": 1, "eos_token_id": 2}
    common |= {"tie_word_embeddings": False}
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    gpt2 = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    for name, kind, sizes in (("llama", "Llama", llama), ("gpt2", "GPT2", gpt2)):
        torch.manual_seed(0)
        settings = getattr(transformers, f"{kind}Config")(**common, **sizes)
        network = {"Llama": transformers.LlamaForCausalLM, "GPT2": transformers.GPT2LMHeadModel}[kind]
        network(settings).save_pretrained(tmp_path / name)
    pairs = [(letter, "WXYZ"[i % 4], "first" if i < 4 else "second") for i, letter in enumerate("abcdefgh")]
    rows = [{"prompt": f"{n % 10} {g}", "response": word, "half": half} for g, word, half in pairs for n in range(24)]
    words = [f"model.name={tmp_path}/llama", f"model.others={{1: {tmp_path}/gpt2}}", "model.adapter.r=16"]
    words += [f"data.name={write_rows(tmp_path / 'rows.jsonl', rows)}", "data.public=0.4", "data.validation=0.3"]
    words += ["data.test=0", "data.max_length=16", "clients.count=2", "clients.split={kind: by, column: half}"]
    words += ["method.name=kd", "method.server_epochs=4", "method.temperature=1", "evaluation.labels=[W, X, Y, Z]"]
    words += ["model.adapter.alpha=32", "train.lr=5e-3", "train.batch_size=4", "train.clip_norm=1"]
    words += ["train.dtype=float32", "run.rounds=8", "run.eval_every=8", "run.seed=2"]
    config = configuration.load(None, [*words, f"run.out={tmp_path}", f"run.cache={tmp_path}/cache"])
    run.play(alone(), config, log.Log(False))
    state = checkpoint.newest(config.directory, pytest.fail)[1]
    has, last = np.array(state.about["data"]["split"]["rows"]) > 0, state.metrics[-1]
    assert has.sum(0).tolist() == [1, 1]
    assert last["eval_accuracy"] > 0.75
    assert np.mean(list(last["eval_clients_accuracy"].values())) > 0.75


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.public=0.1"], "data.public: gradualdiff uses none"),
        (["method.name=kd", "method.top_k=4"], "data.public: kd needs rows that everybody may see"),
        (["method.name=kd", "data.public=0.1"], "method.top_k: without evaluation.labels there are no classes"),
        ([*COLOURS, "method.top_k=4"], "method.top_k: with evaluation.labels the logits of all labels travel"),
        ([*COLOURS, "method.positions=4"], "method.positions: with evaluation.labels the logits"),
        ([*TEXTS, "model.adapter.kind=full"], "model.adapter.kind: kd is a method for LoRA"),
        ([*TEXTS, "exchange.what=merged"], "exchange.what: with kd no weights travel"),
        ([*TEXTS, "server.lr=0.5"], "server.lr: kd has no server that steps"),
        ([*TEXTS, "method.alpha=0"], "method.alpha: input should be greater than 0"),
        ([*TEXTS, "model.others={7: x}"], "model.others: there is no client 7"),
        (["model.others={1: x}"], "model.others: with gradualdiff all clients have the same base"),
        (
            [*TEXTS, "clients.split={kind: files, files: 'x*'}"],
            "data.public: with a file a client a fraction would be of a client's rows",
        ),
    ],
)
def test_contradictions_are_refused(words, says):
    with pytest.raises(UserError) as caught:
        configuration.load(None, words)
    assert str(caught.value).startswith(f"the command line: {says}") and "\n" not in str(caught.value)


def refused(tiny, *words):
    """The line that a run is refused with; nothing is left of it."""
    config = configured(tiny, *words)
    with pytest.raises(UserError) as caught:
        run.play(alone(), config, log.Log(True, io.StringIO()))
    assert "\n" not in str(caught.value) and not config.directory.exists()
    return str(caught.value)


def test_more_tokens_than_there_are_is_refused(tiny):
    says = refused(tiny, *TEXTS, "method.top_k=5000")
    assert says.startswith("method.top_k: 5,000 tokens a position are more than the 3")


def test_other_tokenizers_are_refused_even_of_the_same_size(tiny, gpt2, tmp_path):
    import shutil

    other = shutil.copytree(gpt2, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    core = json.loads(text)
    vocabulary = core["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(core))
    says = refused(tiny, *TEXTS, f"model.others={{2: {other}}}")
    assert says.startswith(f"model.others: client 2: {other}: another tokenizer: 2 tokens differ, such as {one!r}, ")
    missing = refused(tiny, *TEXTS, f"model.others={{2: {tmp_path}/nothing}}")
    assert missing.startswith(f"model.others: client 2: {tmp_path}/nothing: there is no directory")


# ---- ranks and resumes ----------------------------------------------------------------------------------------------


def test_any_number_of_ranks_and_a_resume_give_the_same_bits_with_two_architectures(tiny, gpt2, coloured):
    name = f"{coloured.name}-ranks"
    words = [*COLOURS, f"model.others={{1: {gpt2}}}", "method.weighting=examples", f"run.name={name}"]
    launch(["run", tiny / "tiny.yaml", *words, "run.rounds=1"], 3).ok()
    whole, parts = coloured, coloured.with_name(name)
    config = configuration.load(tiny / "tiny.yaml", words)
    run.play(alone(), config, log.Log(False), state_of(parts, 1))
    one, other = (report.summary(directory) for directory in (whole, parts))
    for key in ("adapter_sha256", "eval_loss", "eval_clients", "train_loss", "tokens", "flops_per_client"):
        assert [row[key] for row in one["rounds"]] == [row[key] for row in other["rounds"]], key
    assert one["test"] == other["test"]
    assert all(distance(kept(whole, 2)[client], kept(parts, 2)[client]) == 0 for client in range(3))
