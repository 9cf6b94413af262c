"""What federation is compared with: all weights trained, the adapter itself sent, pooled rows, each client alone."""

import io
import math

import numpy as np
import pytest
from conftest import within
from test_equivalence import WHOLE, alone, batch_of, configured, distance, mean_loss, play, rows_of

from gdmpi import checkpoint, config as configuration, export, flat, log, method, model, report, results, run
from gdmpi.errors import UserError

FULL, MERGED = "model.adapter.kind=full", "exchange.what=merged"


def played(tiny, *words):
    """Run a configuration in this process; its directory."""
    config = configured(tiny, *words)
    run.play(alone(), config, log.Log(True, io.StringIO()))
    return config.directory


def own(directory, t):
    """{client: {name: array}} of the adapters that clients have after round t."""
    state = checkpoint.read(directory / checkpoint.name(t))
    _, server = results.server_of(state)
    return {c: dict(adapter) for c, adapter in results.adapters(directory, t, state.clients, server).items()}


# ---- all weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_on_all_weights_are_those_of_a_plain_loop(tiny, tied, optimizer, tmp_path):
    import torch
    import transformers
    from conftest import tiny_model

    place = tiny / "model" if tied else tiny_model(tmp_path / "model", tie=False)
    named = [FULL, f"model.name={place}", "clients.count=1", "run.rounds=1", f"train.optimizer={optimizer}"]
    words = [*WHOLE, *named, "train.steps=3", "train.lr=0.01", "train.clip_norm=null"]
    _, (_, after) = play(tiny, *words)
    plain = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).train()
    make = {"sgd": torch.optim.SGD, "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0)}[optimizer]
    tool = make(plain.parameters(), lr=0.01)
    batch = batch_of(rows_of(tiny, *words).train[0], range(48))
    for _ in range(3):
        tool.zero_grad()
        mean_loss(plain, batch).backward()
        tool.step()
    expected = {name: p.detach().numpy() for name, p in plain.named_parameters()}
    assert list(after) == list(expected)
    # AdamW makes a step of any gradient, so it enlarges what rounding does to small ones
    assert distance(after, expected) < {"sgd": 2e-6, "adamw": 5e-5}[optimizer]
    assert sum(array.size for array in after.values()) == sum(p.numel() for p in plain.parameters())


def test_model_of_a_run_loads_with_transformers_and_scores_the_same(tiny):
    import transformers

    directory = played(tiny, FULL, "run.rounds=1")
    state = checkpoint.read(directory / checkpoint.name(1))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory / "model")
    for name, p in loaded.named_parameters():
        assert np.array_equal(p.detach().numpy(), state.server["weights"][name]), name
    assert transformers.AutoTokenizer.from_pretrained(directory / "model").vocab_size > 0
    assert report.verify(directory)[1]
    told = [*report.verify(directory)[0], *export.export(directory, directory / "again", True)]
    told += [line for line in (directory / "log.txt").read_text().splitlines() if state.adapter_sha256 in line]
    assert all("adapter" not in line for line in told) and told[0].endswith(f"whole, model {state.adapter_sha256[:12]}")
    assert report.show(directory).splitlines()[3].split()[-1] == "model"
    loss = state.metrics[-1]["eval_loss"]
    scored = within(["eval", directory / "model", directory / "config.yaml"]).ok()
    assert f"validation  loss {loss:.6f}" in scored.out
    again = within(["eval", directory]).ok().out
    assert "exactly what the run reported" in again and f"model {state.adapter_sha256}\n" in again
    assert (directory / "again/model.safetensors").read_bytes() == (directory / "model/model.safetensors").read_bytes()


def test_base_is_known_as_the_same_with_an_adapter_and_trained(tiny):
    import torch

    one, other = (model.build(configured(tiny, *words), torch.device("cpu")) for words in ([], [FULL]))
    assert one.base_sha256 == other.base_sha256
    assert other.base_parameters == 0 and other.schema.nbytes // 4 == one.base_parameters


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.quantize=nf4", FULL], "model.quantize: 4-bit weights cannot change; with model.adapter.kind full say"),
        (["model.dtype=bfloat16", FULL], "model.dtype: with model.adapter.kind full all weights change, in float32"),
        (["model.quantize=nf4", MERGED], "model.quantize: 4-bit weights cannot change; with exchange.what merged say"),
        ([FULL, MERGED], "exchange.what: with model.adapter.kind full there is no adapter to merge"),
        (["train.keep_optimizer=true", MERGED], "train.keep_optimizer: with exchange.what merged the adapter begins"),
        (["method.name=local", MERGED], "exchange.what: with local no weights travel"),
        (["method.name=centralized", "server.lr=0.5"], "server.lr: centralized has no server that steps"),
        (["method.name=local", "server.lr=0.5"], "server.lr: local has no server that steps"),
    ],
)
def test_contradictions_are_refused(words, says):
    with pytest.raises(UserError, match=f"^the command line: {says}") as caught:
        configuration.load(None, words)
    assert "\n" not in str(caught.value)


def test_sites_that_keep_their_rows_have_no_centralised_baseline():
    sites = ["clients.boundary=site", "clients.split.kind=files", "clients.split.files=x*.jsonl"]
    configuration.load(None, sites)
    with pytest.raises(UserError, match="centralized pools all rows, which clients.boundary: site forbids"):
        configuration.load(None, [*sites, "method.name=centralized"])


def test_settings_of_lora_that_are_not_used_are_named(tiny):
    import torch

    built = model.build(configured(tiny, FULL), torch.device("cpu"))
    assert built.warnings == ["model.adapter: r, alpha have no meaning with kind full"]


# ---- the adapter itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [[], ["method.weighting=examples", "clients.per_round=0.7"], ["server.lr=0.25"]])
def test_sending_the_adapter_gives_what_sending_its_change_gives(tiny, settings):
    words = ["run.rounds=2", "run.keep=9", *settings]
    _, deltas = play(tiny, *words)
    _, values = play(tiny, *words, "method.name=fedavg")
    assert distance(deltas[0], values[0]) == 0
    assert distance(deltas[0], values[2]) > 0
    assert distance(deltas[1], values[1]) < 1e-7
    assert distance(deltas[2], values[2]) < 1e-5  # the last bits of a round become those of a path


@pytest.mark.parametrize("method", ["gradualdiff", "fedavg"])
def test_merged_models_average_to_the_base_and_the_mean_of_the_products(tiny, method):
    import safetensors.numpy

    alone_too = own(played(tiny, "method.name=local", "run.rounds=1", "run.keep=9"), 1)
    _, (start, after) = play(tiny, MERGED, f"method.name={method}", "run.rounds=1", "run.keep=9")
    saved = safetensors.numpy.load_file(tiny / "model" / "model.safetensors")
    assert start.keys() == saved.keys() and distance(start, saved) == 0
    changed = 0
    for name, array in start.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" not in alone_too[0]:
            assert np.abs(after[name] - array).max() < 1e-8, name  # the common grid rounds values of their own size
            continue
        products = [2 * c[f"{layer}.lora_B.weight"] @ c[f"{layer}.lora_A.weight"] for c in alone_too.values()]
        assert np.abs(after[name] - array - np.mean(products, 0)).max() < 1e-7, name
        changed += 1
    assert changed == 14


def test_merged_model_is_a_model_that_loads_and_scores_the_same(tiny):
    import torch
    import transformers

    directory = played(tiny, MERGED, "run.rounds=2")
    state = checkpoint.read(directory / checkpoint.name(2))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory / "model")
    assert all(np.array_equal(p.detach().numpy(), state.server["weights"][n]) for n, p in loaded.named_parameters())
    assert report.verify(directory)[1]
    row = report.summary(directory)["rounds"][-1]
    assert "exactly what the run reported" in within(["eval", directory]).ok().out
    assert row["bytes_up_per_client"] == 4 * sum(p.numel() for p in loaded.parameters())
    assert row["delta_norm"] > 0 and row["aggregation_error"] is None
    built = model.build(configured(tiny, MERGED), torch.device("cpu"))
    built.load(built.values())
    with torch.no_grad():
        built.vector.normal_()
    expected = built.moved()
    change = built.delta(built.loaded).vector
    assert np.linalg.norm(change.astype(np.float64)) == pytest.approx(expected, rel=1e-5)


# ---- pooled rows ----------------------------------------------------------------------------------------------------


def test_rounds_of_pooled_rows_are_one_long_training(tiny):
    words = [*WHOLE, "method.name=centralized", "train.lr=0.01"]
    _, one = play(tiny, *words, "run.rounds=1", "train.steps=4")
    _, two = play(tiny, *words, "run.rounds=4", "train.steps=1")
    assert distance(one[-1], two[-1]) < 1e-6
    _, anew = play(tiny, *words[:-2], "clients.count=1", "run.rounds=4", "train.steps=3", "train.lr=0.01")
    assert distance(anew[-1], two[-1]) > 1e-3  # a federated round begins with fresh moments


def test_pooled_rows_are_those_of_all_clients_and_no_bytes_are_counted(tiny):
    directory = played(tiny, "method.name=centralized", "run.rounds=1", "train.epochs=2")
    row = report.summary(directory)["rounds"][-1]
    rows = rows_of(tiny).train
    assert row["steps"] == 2 * math.ceil(sum(map(len, rows.values())) / 4)
    assert row["tokens"] == 2 * sum(each.target_tokens for each in rows.values())
    assert (row["bytes_up_per_client"], row["bytes_down_per_client"], row["clients"]) == (0, 0, 1)


# ---- each client alone ----------------------------------------------------------------------------------------------


def test_mean_of_what_clients_learn_alone_is_a_federated_round(tiny):
    _, federated = play(tiny, "run.rounds=1", "run.keep=9")
    directory = played(tiny, "method.name=local", "run.rounds=2", "run.keep=9")
    assert all(distance(adapter, federated[0]) == 0 for adapter in own(directory, 0).values())
    after = own(directory, 1)
    assert list(after) == [0, 1, 2]
    assert distance(after[0], after[1]) > 1e-3
    mean = {name: np.mean([adapter[name] for adapter in after.values()], 0, np.float64) for name in after[0]}
    assert distance(mean, federated[1]) < 1e-7


def test_losses_of_clients_alone_are_those_of_their_adapters(tiny):
    directory = played(tiny, "method.name=local", "run.rounds=1")
    row, test = (report.summary(directory)[key] for key in ("rounds", "test"))
    row = row[-1]
    assert set(row["eval_clients"]) == set(test["clients"]) == {"0", "1", "2"}
    assert row["eval_loss"] == math.fsum(row["eval_clients"].values()) / 3
    assert test["loss"] == math.fsum(test["clients"].values()) / 3
    scored = within(["eval", directory / "adapter" / "0002", directory / "config.yaml"]).ok()
    assert f"validation  loss {row['eval_clients']['2']:.6f}" in scored.out
    assert f"test        loss {test['clients']['2']:.6f}" in scored.out
    shown, said = report.show(directory), (directory / "log.txt").read_text()
    tokens = rows_of(tiny).test.target_tokens
    assert test["tokens"] == tokens and f"mean over the {tokens} response tokens of all 6 test rows" in shown
    assert f": over {tokens} response tokens of rows that nothing before has looked at; the mean of 3 clients" in said
    assert f"  adapters of the clients {row['adapter_sha256']}" in said
    assert shown.splitlines()[3].split()[-1] == "adapters"
    spread = np.std(list(row["eval_clients"].values()), ddof=1)
    assert "validation loss: mean over the 3 clients' own adapters, " in shown and f"deviation {spread:.4f}" in shown
    assert row["bytes_up_per_client"] == row["bytes_down_per_client"] == 0


def test_clients_alone_verify_and_export(tiny):
    directory = played(tiny, "method.name=local", "run.rounds=1")
    assert report.verify(directory)[1]
    within(["export", directory, directory / "out"]).ok()
    assert sorted(path.name for path in (directory / "out").iterdir()) == ["0000", "0001", "0002"]
    refused = within(["export", directory, directory / "merged", "--merge"])
    assert refused.code == 2 and "each client has its own adapter" in refused.err
    refused = within(["eval", directory])
    assert refused.code == 2 and "adapter/0000" in refused.err
    kept = directory / "clients" / "0001" / checkpoint.name(1)
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    lines, whole = report.verify(directory)
    assert not whole and "what client 1 kept" in lines[0]


def test_clients_that_join_late_begin_where_all_began(tiny):
    words = ["method.name=local", "clients.per_round=0.4", "run.rounds=4", "run.keep=9", "data.validation=0"]
    directory = played(tiny, *words)
    cohorts = [set(map(int, row["sent"])) for row in checkpoint.read(directory / checkpoint.name(4)).metrics]
    late = (set.union(*cohorts) - cohorts[1]).pop()
    first = next(t for t in range(1, 5) if late in cohorts[t])
    begin, before, after = (own(directory, t)[late] for t in (0, first - 1, first))
    assert distance(begin, before) == 0 and distance(before, after) > 0


# ---- ranks and resumes ----------------------------------------------------------------------------------------------


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("words", [[FULL, "train.steps=2"], [MERGED]])
def test_any_number_of_ranks_and_a_resume_give_the_same_bits(tiny, words):
    whole, parts = (configured(tiny, f"run.rounds={rounds}").directory for rounds in (2, 1))
    within(["run", tiny / "tiny.yaml", f"run.name={whole.name}", "run.rounds=2", *words]).ok()
    within(["run", tiny / "tiny.yaml", f"run.name={parts.name}", "run.rounds=1", *words], 3).ok()
    within(["resume", parts, "run.rounds=2"], 2).ok()
    one, other = (report.summary(directory) for directory in (whole, parts))
    for key in ("adapter_sha256", "eval_loss", "eval_clients", "train_loss", "tokens"):
        assert [row[key] for row in one["rounds"]] == [row[key] for row in other["rounds"]], key
    # the one test loss that the first part of the run has said, too, is of another round
    assert one["test"] == other["test"]


def test_interface_says_what_a_method_is():
    kinds = {name: method.load(name).Client for name in method.available()}
    assert {name for name, client in kinds.items() if client.pooled} == {"centralized"}
    assert {name for name, client in kinds.items() if client.personal} == {"kd", "local"}
    assert {name for name, client in kinds.items() if client.rebases} == {"fedex", "flora"}
    assert {name for name, client in kinds.items() if client.incremental} == {"fedex", "ffa", "flora", "rolora"}
    assert {name for name, client in kinds.items() if client.asks} == {"split"}
    assert {*kinds} >= {"centralized", "fedavg", "fedit", "gradualdiff", "local"}
    assert flat.sha256(flat.pack({})) == flat.sha256(flat.Flat(flat.Schema([])))
