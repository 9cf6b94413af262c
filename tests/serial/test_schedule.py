"""What a rank holds until the common grid is known; what each method of the folder is."""

import types

import numpy as np
import pytest

from gdmpi import codecs, config as configuration, flat, hosting, method, results, schedule
from gdmpi.config import Config
from gdmpi.errors import Paused


def update(seed, size=5):
    mean = flat.pack({"a": np.random.default_rng(seed).standard_normal(size).astype(np.float32)})
    return method.Update(client=seed), mean


@pytest.mark.parametrize("budget", [0, 45, 10**6])
def test_held_updates_survive_their_memory_in_ram_and_on_disk(budget):
    held, expected = schedule.Held(budget), []
    for seed in range(4):
        sent, mean = update(seed)
        expected.append(mean.vector.copy())
        held.add(sent, mean, codecs.maxima(mean), copy=True)
        mean.vector[:] = np.nan  # the next client writes here
    assert [sent.client for sent in held.items] == [0, 1, 2, 3]
    assert all(np.array_equal(kept.mean.vector, vector) for kept, vector in zip(held.items, expected, strict=True))
    assert held.maxima == np.abs(expected).max()
    buffers = [kept.mean.buffer for kept in held.items]
    on_disk = [isinstance(buffer, np.memmap) or isinstance(buffer.base, np.memmap) for buffer in buffers]
    assert on_disk == {0: [True] * 4, 45: [False, False, True, True], 10**6: [False] * 4}[budget]


def test_updates_of_different_shapes_are_refused():
    held = schedule.Held(10**6)
    held.add(*update(0), np.float32([1]), copy=False)
    with pytest.raises(TypeError, match="different names or shapes"):
        held.add(*update(1, size=6), np.float32([1]), copy=False)


def test_mean_of_several_updates_is_weighted_and_of_one_is_itself():
    mean, vectors = method.Mean(), [np.float32([1, 2]), np.float32([4, 8])]
    mean.add(method.Update(mean={"a": vectors[0]}, weight=3))
    assert np.array_equal(mean.take(), vectors[0])
    mean.add(method.Update(mean={"a": vectors[0]}, weight=3))
    mean.add(method.Update(mean={"a": vectors[1]}, weight=1))
    assert np.array_equal(mean.take(), np.float32([1.75, 3.5]))


@pytest.mark.parametrize("trouble", [None, Paused("SIGTERM"), MemoryError()])
def test_no_round_ends_before_the_last_one_is_saved(trouble):
    """Whoever stops here asks the round files how far the run has come."""

    class Client:
        def load(self, t, message):
            raise trouble

    link = types.SimpleNamespace(
        alone=True, is_server=True, rank=0, alarm=lambda: None, arrive=lambda: None, all_here=lambda request: True
    )
    rounds, waited = schedule.Sync(link, object(), {0: Client()}, Config(), per_client=False, asks=False), []
    rounds.saving = types.SimpleNamespace(failure=lambda wait=False: waited.append(wait))
    _, error = rounds._train(2, None, [0] if trouble else [], schedule.Tally())
    assert error is trouble
    assert waited == [True]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 1.0])
def test_cohorts_are_samples_that_differ_by_round_and_repeat_by_seed(share):
    def drawn(seed):
        words = [f"run.seed={seed}", "clients.count=20", f"clients.per_round={share}"]
        return [hosting.cohort(configuration.load(None, words), t) for t in range(1, 30)]

    cohorts = drawn(3)
    assert cohorts == drawn(3)
    for cohort in cohorts:
        assert cohort == sorted(set(cohort))
        assert len(cohort) == max(1, round(20 * share))
    assert set().union(*cohorts) == set(range(20))
    assert share == 1 or cohorts != drawn(4)


def test_clients_are_dealt_over_the_ranks():
    five, two = (configuration.load(None, [f"clients.count={count}"]) for count in (5, 2))
    assert hosting.hosts(five, [1, 2]) == [1, 2, 1, 2, 1]
    assert hosting.hosts(two, [1, 2, 3]) == [1, 2]


def test_pooled_rows_have_one_host_one_client_and_the_steps_of_a_cohort():
    words = ["method.name=centralized", "clients.count=5", "clients.per_round=0.6", "train.steps=4"]
    config = configuration.load(None, words)
    assert hosting.hosts(config, [1, 2]) == [1] * 5
    assert [hosting.cohort(config, t) for t in range(1, 4)] == [[0]] * 3
    assert hosting.steps(config, 1000) == 3 * 4
    by_epochs = configuration.load(None, [*words[:3], "train.epochs=2", "train.batch_size=8"])
    assert hosting.steps(by_epochs, 41) == 2 * 6


@pytest.mark.parametrize(
    ("words", "rows", "said"),
    [
        (
            [],
            [3, 400, 50],
            "3 to 400 training rows and each counts the same; method.weighting=examples weighs by rows",
        ),
        ([], [30, 301], "30 to 301 training rows"),
        ([], [30, 300], None),
        ([], [7], None),
        (["method.weighting=examples"], [3, 400], None),
        (["method.name=local"], [3, 400], None),
        (["method.name=centralized"], [403], None),
    ],
)
def test_clients_that_are_very_unequal_and_count_the_same_are_said(words, rows, said):
    found = hosting.unequal(configuration.load(None, words), rows)
    assert bool(found) == bool(said) and all(said in line and "\n" not in line for line in found)


@pytest.mark.parametrize("name", method.available())
def test_every_method_has_its_three_classes_and_a_source(name):
    module = method.load(name)
    assert issubclass(module.Server, method.Server)
    assert issubclass(module.Client, method.Client)
    assert "arXiv" in module.__doc__.splitlines()[0]
    assert "sync" in module.Server.schedules


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("method.name=fedavg", "adapter"),
        ("method.name=local", "adapters"),
        ("method.name=flora", "model"),
        ("model.adapter.kind=full", "model"),
        ("exchange.what=merged", "model"),
    ],
)
def test_a_hash_is_said_to_be_of_what_the_run_comes_to(word, said):
    assert results.called(configuration.load(None, [word])) == said
