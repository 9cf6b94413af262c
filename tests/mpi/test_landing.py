"""Messages on GPUs, with a part of this machine's own memory for a GPU's: real MPI writes there."""

import ctypes
import types

import faults
import numpy as np
import pytest
import torch
from conftest import within

from gdmpi import config as configuration, landing, mpi, report

several = pytest.mark.mpi(min_size=3)
VALUES = {"a": (3, 5), "b": (7,)}


def drawn(seed, shapes=VALUES):
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def with_gpus(link, monkeypatch, says=True):
    """What landing.choose() needs to take the CPU of client ranks for a GPU: (configuration, Trainable or None)."""
    monkeypatch.setattr(landing, "says_cuda", lambda link: says)
    monkeypatch.setattr(landing, "gpu_of", lambda trainable: trainable and trainable.device)
    schema = types.SimpleNamespace(nbytes=4 * 22)
    trainable = types.SimpleNamespace(device=torch.device("cpu"), schema=schema) if link.is_worker else None
    return configuration.Config(), trainable


def check_messages(link, direct):
    """Broadcast what lands and what does not, in turn, and look at both places where it lies."""
    larger, other = {"a": (99,)}, {"rows": np.arange(9)}
    messages = [drawn(0), drawn(1), drawn(2, {"b": (7,)}), drawn(3, larger), drawn(4), other, drawn(5)]
    for t, sent in enumerate(messages):
        got = link.bcast(t, sent if link.is_server else None)
        fits = sent is not other and sent is not messages[3]
        assert bool(got.there) == (fits and link.is_worker)
        assert link.direct == (direct and fits)
        if got.there:
            together = np.concatenate([array.reshape(-1) for array in sent.values()])
            assert got.there().dtype == torch.float32
            assert np.array_equal(got.there().numpy(), together)
            assert got.there().data_ptr() == link.landing.memory.data_ptr()
            assert np.array_equal(got.vector, together)
        assert all(np.array_equal(got[name], sent[name]) for name in sent)


@several
def test_mpi_writes_where_it_says_and_shows_that_it_can(link, monkeypatch):
    monkeypatch.setattr(mpi, "CHUNK", 16)
    lines = landing.choose(link, *with_gpus(link, monkeypatch))
    assert lines == ["messages go straight to the GPUs (this MPI says that it writes there, and did)"]
    check_messages(link, direct=True)


@several
def test_mpi_that_does_not_say_so_is_not_tried(link, monkeypatch):
    config, trainable = with_gpus(link, monkeypatch)
    monkeypatch.setattr(landing, "says_cuda", lambda link: link.rank != 2)  # a library of its own on one node
    monkeypatch.setattr(landing, "arrives", None)
    assert landing.choose(link, config, trainable) == [
        "messages reach the GPUs through host memory (this MPI does not say that it writes there)"
    ]
    check_messages(link, direct=False)


@several
def test_mpi_that_writes_something_else_is_not_used(link, monkeypatch):
    arguments = with_gpus(link, monkeypatch)
    free = landing.Landing.free
    with monkeypatch.context() as broken:
        if link.rank == 2:
            broken.setattr(landing.Landing, "free", lambda self, size: free(self, size).clone())
        lines = landing.choose(link, *arguments)
    assert lines == ["messages reach the GPUs through host memory (this MPI says that it writes there, but did not)"]
    check_messages(link, direct=False)


def test_mpi_that_fails_says_which_setting_leaves_it_out():
    def fail(*_):
        raise ValueError("MPI_ERR_BUFFER: invalid buffer pointer")

    link = types.SimpleNamespace(landing=landing.Landing(torch.device("cpu"), 88), bcast=fail, is_server=False)
    with pytest.raises(RuntimeError, match="set exchange.cuda_aware=false: MPI_ERR_BUFFER"):
        landing.arrives(link)


@several
def test_setting_and_lack_of_gpus_leave_it_out(link, monkeypatch):
    config, trainable = with_gpus(link, monkeypatch)
    monkeypatch.setattr(landing, "arrives", None)
    off = config.model_copy(update={"exchange": configuration.Exchange(cuda_aware=False)})
    assert landing.choose(link, off, trainable) == []
    check_messages(link, direct=False)
    link.landing = None
    for words in (["exchange.what=merged"], ["model.adapter.kind=full"], ["method.name=flora"]):
        whole = configuration.load(None, words)
        assert landing.choose(link, whole, trainable) == [] and link.landing is None
    monkeypatch.setattr(landing, "gpu_of", lambda trainable: None)
    assert landing.choose(link, config, trainable) == [] and link.landing is None


@pytest.mark.parametrize(
    ("functions", "says"),
    [
        ({"MPIX_Query_cuda_support": lambda: 1}, True),
        ({"MPIX_Query_cuda_support": lambda: 0, "MPIX_GPU_query_support": None}, False),
        ({"MPIX_GPU_query_support": lambda kind, found: exec("found._obj.value = 1 - kind")}, True),
        ({"MPIX_GPU_query_support": lambda kind, found: 0}, False),
        ({}, False),
    ],
)
def test_libraries_are_asked_what_they_take(monkeypatch, functions, says):
    from mpi4py import MPI

    link = mpi.Link(MPI.COMM_SELF)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: types.SimpleNamespace(**functions))
    assert landing.says_cuda(link) == says


@pytest.mark.skipif(torch.cuda.is_available(), reason="here MPI may well take GPU memory")
def test_mpi_without_gpus_says_so():
    from mpi4py import MPI

    assert not landing.says_cuda(mpi.Link(MPI.COMM_SELF))


@several
@pytest.mark.parametrize("name", ["gradualdiff", "rolora"])  # sends all; only what was trained last
def test_runs_give_the_same_bits_whichever_way_messages_take(tiny, name):
    seen = {}
    for fault, way in (
        ("nothing", ""),
        ("lands_from_host_memory", "messages reach the GPUs through host memory"),
        ("lands_by_mpi", "messages go straight to the GPUs"),
    ):
        words = [f"run.name=landing-{name}-{fault}", "run.rounds=2", f"method.name={name}"]
        with faults.within(fault):
            result = within(["run", tiny / "tiny.yaml", *words], 3).ok()
        assert way in result.out and ("the GPUs" in result.out) == bool(way)
        rows = report.summary(tiny / "runs" / f"landing-{name}-{fault}")["rounds"]
        seen[fault] = [(row["adapter_sha256"], row["eval_loss"], row["train_loss"]) for row in rows]
    assert seen["nothing"] == seen["lands_from_host_memory"] == seen["lands_by_mpi"]


def test_a_process_alone_loads_what_its_server_says(tiny):
    seen = []
    for fault in ("nothing", "lands_by_mpi"):
        with faults.within(fault):
            within(["run", tiny / "tiny.yaml", f"run.name=landing-alone-{fault}", "run.rounds=2"]).ok()
        rows = report.summary(tiny / "runs" / f"landing-alone-{fault}")["rounds"]
        seen.append([row["adapter_sha256"] for row in rows])
    assert seen[0] == seen[1]
