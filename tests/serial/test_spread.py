"""How far clients are apart, against the products and deltas themselves."""

import numpy as np
import pytest
from test_equivalence import alone, configured, play

from gdmpi import checkpoint, flat, log, lowrank, model, report, run, server_opt, spread

LAYERS, R = 30, 4


class Made:
    """What sketch() wants of a Trainable, with given factors [(A, B)] of each layer."""

    def __init__(self, layers):
        import torch

        arrays = {}
        for i, (a, b) in enumerate(layers):
            arrays |= {f"l{i}{lowrank.A}": a.astype(np.float32), f"l{i}{lowrank.B}": b.astype(np.float32)}
        self.schema = self.trained = flat.Schema.of(arrays)
        self.device = torch.device("cpu")
        self.parameters = [torch.from_numpy(array) for array in arrays.values()]


def factors(draw, common_a=None):
    shapes = [((R, 20 + i), (30 - i // 2, R)) for i in range(LAYERS)]
    return [
        (draw.standard_normal(a) if common_a is None else common_a[i][0], draw.standard_normal(b))
        for i, (a, b) in enumerate(shapes)
    ]


def exactly(clients, weights):
    """The ratio by its definition."""
    shares, difference, whole = np.array(weights) / sum(weights), 0.0, 0.0
    for i in range(LAYERS):
        products = sum(p * (b @ a) for p, (a, b) in zip(shares, (each[i] for each in clients), strict=True))
        a, b = (sum(p * each[i][k] for p, each in zip(shares, clients, strict=True)) for k in (0, 1))
        difference += ((products - b @ a) ** 2).sum()
        whole += (products**2).sum()
    return np.sqrt(difference / whole)


@pytest.mark.parametrize("weights", [[1, 1, 1], [5, 1, 2]])
@pytest.mark.parametrize("apart", [1.0, 0.1])
def test_aggregation_error_is_about_what_the_products_say(weights, apart):
    draw = np.random.default_rng(len(weights) * weights[0])
    start = factors(draw)
    clients = [
        [(a + apart * da, b + apart * db) for (a, b), (da, db) in zip(start, factors(draw), strict=True)]
        for _ in weights
    ]
    made = [Made(each) for each in clients]
    bank = spread.bank(made[0].schema)
    found = spread.aggregation_error(made[0].schema, [spread.sketch(each, bank) for each in made], weights)
    assert found == pytest.approx(exactly(clients, weights), rel=0.15)


def test_nothing_is_lost_where_one_factor_is_the_same():
    draw = np.random.default_rng(0)
    start = factors(draw)
    made = [Made(factors(draw, common_a=start)) for _ in range(3)]
    sketches = [spread.sketch(each, spread.bank(made[0].schema)) for each in made]
    assert len(sketches[0]) == 2 * spread.SIZE * R * LAYERS
    assert spread.aggregation_error(made[0].schema, sketches, [1, 2, 3]) < 1e-6


def test_cosine_is_the_mean_over_pairs_by_their_norms():
    draw, weights = np.random.default_rng(1), [1, 2, 4]
    deltas = draw.standard_normal((3, 50)) + 0.7
    norms, shares = np.linalg.norm(deltas, axis=1), np.array(weights) / 7
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    over = sum(shares[i] * shares[j] * (deltas[i] @ deltas[j]) for i, j in pairs)
    expected = over / sum(shares[i] * shares[j] * norms[i] * norms[j] for i, j in pairs)
    found = spread.cosine(norms.tolist(), weights, float(np.linalg.norm(shares @ deltas)))
    assert found == pytest.approx(expected, rel=1e-9)
    assert spread.cosine([3.0], [1], 3.0) is None
    assert spread.cosine([2.0, 2.0], [1, 1], 0.0) == pytest.approx(-1)


def test_norm_by_pieces():
    draw = np.random.default_rng(2)
    one, other = draw.standard_normal((2, server_opt.PIECE + 5)).astype(np.float32)
    assert server_opt.norm(one) == pytest.approx(np.linalg.norm(one.astype(np.float64)), rel=1e-12)
    difference = one.astype(np.float64) - other
    assert server_opt.norm(one, other) == pytest.approx(np.linalg.norm(difference), rel=1e-12)


@pytest.mark.parametrize("method", ["gradualdiff", "fedavg"])
def test_round_says_how_far_clients_and_server_moved(tiny, method):
    book, adapters = play(tiny, f"method.name={method}", "run.rounds=2", "run.keep=9", "server.lr=0.5")
    for t in (1, 2):
        vectors = [np.concatenate([a.reshape(-1) for a in adapters[k].values()]).astype(np.float64) for k in (t - 1, t)]
        row = book.rows[t]
        assert row["step_norm"] == pytest.approx(np.linalg.norm(vectors[1] - vectors[0]), rel=1e-4)
        assert row["delta_norm"] >= 2 * row["step_norm"] * (1 - 1e-6)  # the mean is no longer than what it is of
        assert -0.5 <= row["delta_cosine"] <= 1
        assert 0 < row["aggregation_error"] < 1
    assert book.rows[0]["delta_cosine"] is None and book.rows[0]["step_norm"] is None
    assert "mean cosine between clients" in report.show(book.directory)


def test_clients_with_the_same_rows_are_not_apart(tiny):
    """One row each, of one text: without dropout they learn the same."""
    import json

    lines = [json.loads(line) for line in (tiny / "data.jsonl").read_text().splitlines()][:1] * 3
    (tiny / "same.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"data.name={tiny / 'same.jsonl'}", "data.validation=0", "data.test=0", "run.rounds=1"]
    book, _ = play(tiny, *words)
    row = book.rows[1]
    assert row["delta_cosine"] == pytest.approx(1, abs=1e-5)
    assert row["aggregation_error"] < 1e-3
    assert row["delta_norm"] == pytest.approx(row["step_norm"], rel=1e-5)


@pytest.mark.parametrize("words", [["clients.count=1"], ["method.name=local"], ["method.name=centralized"]])
def test_where_nobody_is_averaged_nothing_is_said(tiny, words):
    config = configured(tiny, "run.rounds=1", *words)
    book = run.play(alone(), config, log.Log(False))
    assert book.rows[1]["delta_cosine"] is None and book.rows[1]["aggregation_error"] is None
    assert checkpoint.read(config.directory / checkpoint.name(1)).metrics[1]["delta_norm"] > 0


def test_sites_show_no_norms_and_no_sketches(tiny):
    import torch

    from gdmpi import train

    config = configured(tiny)
    built = model.build(config, torch.device("cpu"))
    site = config.model_copy(update={"clients": config.clients.model_copy(update={"boundary": "site"})})
    assert train.Trainer(built, config, {}).sketches == {}
    assert train.Trainer(built, site, {}).sketches is None
