"""The methods about LoRA's two factors: each against what it must be equal to, in dense matrices."""

import re
from fractions import Fraction

import numpy as np
import pytest
from conftest import within
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays
from test_equivalence import alone, configured

from gdmpi import build, checkpoint, config as configuration, log, lowrank, method, report, run
from gdmpi.errors import UserError

A, B = lowrank.A, lowrank.B
UNEQUAL = ["clients.count=5", "run.rounds=3", "run.keep=9"]


class Played:
    """One round of a method, step by step, with what each client had learnt when its training ended."""

    def __init__(self, tiny, *words):
        self.config, link = configured(tiny, *UNEQUAL, *words), alone()
        self.parts = build.build(link, self.config)
        self.server, self.clients, _ = run.roles(link, self.parts)
        self.model, self.learnt, self.updates = self.parts.trainable, [], []
        self.before = {name: p.detach().clone() for name, p in self.model.model.named_parameters()}

    def round(self, t):
        message = self.server.broadcast(t)
        for client, half in self.clients.items():
            half.load(t, message)
            start = self.model.values()
            update = half.local_update(t)
            mean = {name: array.copy() for name, array in update.mean.items()}
            # a delta has taken the place of what was learnt
            learnt = {name: start[name] + mean.get(name, 0) for name in start} if mean else dict(self.model.values())
            self.learnt.append(learnt)
            weight = update.examples if self.config.method.weighting == "examples" else 1
            kept = {name: array.copy() for name, array in update.individual.items()}
            self.updates.append(method.Update(mean, kept, update.examples, update.metrics, weight, client))
        if self.server.per_client:
            for update in self.updates:
                self.server.aggregate(update)
        else:
            total = sum(update.weight for update in self.updates)
            names = self.updates[0].mean
            mean = {n: sum(u.weight / total * u.mean[n].astype(np.float64) for u in self.updates) for n in names}
            mean = {name: array.astype(np.float32) for name, array in mean.items()}
            self.server.aggregate(method.Update(mean, weight=total))
        self.server.step(t)
        return self

    @property
    def shares(self):
        total = sum(update.weight for update in self.updates)
        return [update.weight / total for update in self.updates]

    def layers(self):
        return lowrank.layers(self.learnt[0])

    def mean_product(self, layer):
        """s times the weighted mean of B_i A_i, in float64."""
        products = (each[layer + B].astype(np.float64) @ each[layer + A] for each in self.learnt)
        return self.scale * sum(share * one for share, one in zip(self.shares, products, strict=True))

    @property
    def scale(self):
        return self.config.model.adapter.alpha / self.config.model.adapter.r

    def base(self, layer):
        """What a layer's base weight is now, minus what it was; [outputs, inputs] of a Linear."""
        inner = self.model.model.get_submodule(layer).get_base_layer()
        return (inner.weight.detach() - self.before[f"{layer}.base_layer.weight"]).numpy()


def near(one, other, limit=1e-5):
    return np.linalg.norm(one - other) <= limit * np.linalg.norm(other)


def test_fedit_is_the_mean_by_examples_of_each_factor(tiny):
    played = Played(tiny, "method.name=fedit").round(1)
    assert played.config.method.weighting == "examples" and len({u.weight for u in played.updates}) > 1
    for name, array in played.server.adapter().items():
        mean = sum(
            share * each[name].astype(np.float64) for share, each in zip(played.shares, played.learnt, strict=True)
        )
        assert near(array, mean), name


@pytest.mark.parametrize(("name", "rounds"), [("ffa", 1), ("rolora", 1), ("rolora", 2)])
def test_mean_of_products_is_the_product_of_the_means_where_one_factor_is_shared(tiny, name, rounds):
    played = Played(tiny, f"method.name={name}", "train.lr=0.01")
    initial = {key: array.copy() for key, array in played.server.adapter().items()}
    for t in range(1, rounds + 1):
        before = {key: array.copy() for key, array in played.server.adapter().items()}
        played.learnt, played.updates = [], []
        played.round(t)
    trained = A if (name, rounds) == ("rolora", 2) else B
    after = played.server.adapter()
    for layer in played.layers():
        product = played.scale * after[layer + B].astype(np.float64) @ after[layer + A]
        assert near(product, played.mean_product(layer)), layer
        idle = layer + (B if trained == A else A)
        assert (after[idle] == before[idle]).all() and all((each[idle] == before[idle]).all() for each in played.learnt)
        assert (after[layer + trained] != before[layer + trained]).any()
        if name == "ffa":
            assert (after[layer + A] == initial[layer + A]).all()
    assert all(key.endswith(trained) for update in played.updates for key in update.mean)


def test_weight_decay_leaves_the_idle_factor_alone(tiny):
    played = Played(tiny, "method.name=rolora", "train.weight_decay=0.5").round(1)
    for layer in played.layers():
        assert all((each[layer + A] == played.learnt[0][layer + A]).all() for each in played.learnt)


@pytest.mark.parametrize("words", [[], ["method.ranks=[4, 2, 1]"], ["method.weighting=uniform"]])
def test_flora_adds_the_mean_of_the_products_to_the_base(tiny, words):
    played = Played(tiny, "method.name=flora", "train.lr=0.01", *words).round(1)
    assert len({u.weight for u in played.updates}) == (1 if "uniform" in "".join(words) else 2)
    for update, rank in zip(played.updates, [4, 2, 1, 4, 2] if "ranks" in "".join(words) else [4] * 5, strict=True):
        assert {array.shape[0] for key, array in update.individual.items() if key.endswith(A)} == {rank}
        assert {array.shape[1] for key, array in update.individual.items() if key.endswith(B)} == {rank}
    message = played.server.broadcast(2)
    assert all(key.endswith(lowrank.STACK) for key in message)
    played.clients[0].load(2, message)
    for layer in played.layers():
        assert near(played.base(layer), played.mean_product(layer)), layer
        assert (played.server.adapter()[layer + lowrank.DELTA] == played.model.kept[1][layer + lowrank.DELTA]).all()
        assert not played.model.values()[layer + B].any()
        assert (played.model.values()[layer + A] != played.learnt[0][layer + A]).any()  # drawn anew
    before = played.base(played.layers()[0]).copy()
    played.clients[1].load(2, message)  # another client of the rank: the base must not gain twice
    assert (played.base(played.layers()[0]) == before).all()


def test_clients_of_lower_rank_train_only_their_rank(tiny):
    played = Played(tiny, "method.name=flora", "method.ranks=[4, 2, 1]", "train.weight_decay=0.1").round(1)
    for each, rank in zip(played.learnt, [4, 2, 1, 4, 2], strict=True):
        for layer in played.layers():
            assert not each[layer + A][rank:].any() and not each[layer + B][:, rank:].any()
            assert each[layer + A][:rank].all() and each[layer + B][:, :rank].any()


@pytest.mark.parametrize("words", [[], ["method.weighting=examples", "model.adapter.alpha=3"]])
def test_fedex_model_is_the_mean_of_the_clients_models(tiny, words):
    played = Played(tiny, "method.name=fedex", "train.lr=0.01", *words).round(1)
    played.clients[0].load(2, played.server.broadcast(2))
    adapter, values = played.server.adapter(), played.model.values()
    lost = 0.0
    for layer in played.layers():
        for factor in (A, B):
            mean = sum(
                s * e[layer + factor].astype(np.float64) for s, e in zip(played.shares, played.learnt, strict=True)
            )
            assert near(adapter[layer + factor], mean)
            assert (values[layer + factor] == adapter[layer + factor]).all()
        own = played.scale * values[layer + B].astype(np.float64) @ values[layer + A]
        whole = played.mean_product(layer)
        assert near(played.base(layer) + own, whole), layer
        lost = max(lost, np.linalg.norm(own - whole) / np.linalg.norm(whole))
    assert lost > 0.02  # what plain averaging would have lost: the residual has something to do


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_a_restored_server_tells_new_clients_the_same_base(tiny, name):
    played = Played(tiny, f"method.name={name}").round(1)
    played.learnt, played.updates = [], []
    played.round(2)
    message = played.server.broadcast(3)
    played.clients[0].load(3, message)
    other = Played(tiny, f"method.name={name}")
    other.server.restore(played.server.state())
    other.clients[0].load(3, other.server.broadcast(3))
    for (one, mine), (two, its) in zip(
        played.model.model.named_parameters(), other.model.model.named_parameters(), strict=True
    ):
        assert one == two and (mine == its).all(), one


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_gain_of_a_4_bit_base_lies_beside_it_in_bfloat16(tiny, name):
    import torch

    played = Played(tiny, f"method.name={name}", "model.quantize=nf4", "train.lr=0.01").round(1)
    packed = {key: p.clone() for key, p in played.model.model.named_parameters() if p.dtype == torch.uint8}
    assert packed
    layer = played.layers()[0]
    module = played.model.model.get_submodule(layer)
    given, plain = torch.randn(3, 32), module.get_base_layer()
    with torch.inference_mode():
        before, alone_before = plain(given), module(given)
        played.clients[0].load(2, played.server.broadcast(2))
        after, alone_after = plain(given), module(given)
    assert all((p == packed[key]).all() for key, p in played.model.model.named_parameters() if key in packed)
    change = torch.from_numpy(played.server.adapter()[layer + lowrank.DELTA]).bfloat16().float()
    assert near((after - before).numpy(), (given @ change.T).numpy(), 1e-4)
    values = {key: torch.from_numpy(array) for key, array in played.model.values().items()}
    adapter = played.scale * given @ values[layer + A].T @ values[layer + B].T
    assert near((alone_after - before).numpy(), (given @ change.T + adapter).numpy(), 1e-2)
    assert (alone_before != alone_after).any()


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_result_is_a_model_that_loads_and_scores_as_the_run_said(tiny, name):
    config = configured(tiny, *UNEQUAL, f"method.name={name}", "train.lr=0.01", "run.rounds=2")
    run.play(alone(), config, log.Log(False))
    directory = config.directory
    assert not (directory / "adapter").exists() and (directory / "model/model.safetensors").is_file()
    row = checkpoint.read(directory / checkpoint.name(2)).metrics[-1]
    scored = within(["eval", directory / "model", directory / "config.yaml"]).ok()
    assert abs(float(re.search(r"validation +loss (\S+)", scored.out)[1]) - row["eval_loss"]) < 1e-4
    assert "exactly what the run reported" in within(["eval", directory]).ok().out
    lines, good = report.verify(directory)
    assert good and any("its base would be needed" in line for line in lines)
    exported = within(["export", directory, directory / "again"]).ok()
    assert "AutoModelForCausalLM" in exported.out
    assert (directory / "again/model.safetensors").read_bytes() == (directory / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["method.name=ffa", "model.adapter.kind=full"], "model.adapter.kind: ffa is a method for LoRA's factors"),
        (["method.name=flora", "exchange.what=merged"], "exchange.what: flora says itself what travels"),
        (["method.name=fedex", "server.lr=0.5"], "server.lr: fedex adds to the base what clients learnt"),
        (["method.name=flora", "method.ranks=[9]"], "method.ranks: 9 is not between 1 and model.adapter.r, 8"),
        (["method.name=flora", "method.ranks=[0]"], "method.ranks: 0 is not between 1 and"),
        (["method.name=flora", "method.ranks=[]"], "method.ranks: .*at least 1"),
    ],
)
def test_contradictions_are_refused(words, says):
    with pytest.raises(UserError, match=f"^the command line: {says}") as caught:
        configuration.load(None, words)
    assert "\n" not in str(caught.value)


def test_ranks_above_a_layers_size_are_refused_before_anything_starts(tiny):
    config = configured(tiny, "method.name=flora", "model.adapter.r=40", "method.ranks=[40, 4]")
    with pytest.raises(UserError, match=r"^method.ranks: 40 is above the size of \S+, 32 x 32$"):
        run.play(alone(), config, log.Log(False))
    assert not (config.directory / "config.yaml").exists()


def test_who_says_nothing_of_weights_gets_the_methods_own():
    for name in method.available():
        example = getattr(method.load(name), "EXAMPLE", {})  # of settings without which it is refused
        words = [f"method.name={name}", *(f"{key}={value}" for key, value in example.items())]
        config = configuration.load(None, words)
        assert config.method.weighting == ("examples" if name in {"fedit", "flora"} else "uniform")
        assert configuration.load(None, [*words, "method.weighting=uniform"]).method.weighting == "uniform"


finite = st.floats(-1e3, 1e3, width=32)


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(1, 6), st.integers(1, 40), st.integers(1, 6))
def test_products_on_the_grid_are_exact_whatever_their_order(data, rows, rank, columns):
    outer = data.draw(arrays.arrays(np.float32, (rows, rank), elements=finite))
    inner = data.draw(arrays.arrays(np.float32, (rank, columns), elements=finite))
    (left, right), *_ = lowrank.stack({"layer": ([outer], [inner])}).values()
    assert np.abs(left - outer).max() <= np.abs(outer).max() * 2.0**-20
    product = lowrank.product(left, right)
    order = data.draw(st.permutations(range(rank)))
    assert (lowrank.product(left[:, order], right[order]) == product).all()
    i, j = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    exact = sum(
        (Fraction(float(x)) * Fraction(float(y)) for x, y in zip(left[i], right[:, j], strict=True)), Fraction()
    )
    assert product[i, j] == np.float32(float(exact))


@pytest.mark.parametrize("name", ["flora", "fedex", "ffa"])
def test_what_a_run_came_to_can_be_put_on_a_model_at_once(tiny, name):
    played = Played(tiny, f"method.name={name}").round(1)
    played.clients[0].load(2, played.server.broadcast(2))
    other = Played(tiny, f"method.name={name}")
    other.model.put(played.server.adapter())
    for (key, mine), its in zip(other.model.model.named_parameters(), played.model.model.parameters(), strict=True):
        assert (mine == its).all() or (name == "flora" and key.endswith("lora_A.default.weight")), key
