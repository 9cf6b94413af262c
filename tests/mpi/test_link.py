"""The ways in which buffers travel, and how one rank's failure reaches all."""

import numpy as np
import pytest

from gdmpi import codecs, flat, mpi, node, summing
from gdmpi.errors import UserError, locate


def arrays(seed, shapes=((3, 5), (7,), ())):
    draw = np.random.default_rng(seed)
    return {f"t{i}": draw.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}


@pytest.mark.mpi(min_size=3)
def test_broadcast_reaches_all_and_follows_a_new_schema(link, monkeypatch):
    monkeypatch.setattr(mpi, "CHUNK", 8)  # many chunks, the last one shorter
    for t, shapes in enumerate([((3, 5), (7,)), ((3, 5), (7,)), ((2, 2),)]):
        sent = arrays(t, shapes)
        got = link.bcast(t, sent if link.is_server else None)
        assert list(got) == list(sent)
        assert all(np.array_equal(got[name], sent[name]) for name in sent)


@pytest.mark.mpi(min_size=3)
def test_broadcast_carries_other_types(link):
    sent = {"a": np.arange(5), "b": np.float32([1.5]), "c": np.array([True, False]), "d": np.float64([2.5])}
    got = link.bcast(1, sent if link.is_server else None)
    assert all(np.array_equal(got[name], sent[name]) and got[name].dtype == sent[name].dtype for name in sent)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(("nodes", "joins"), [("aaaa", True), ("abab", True), ("abcd", True), ("aabb", False)])
def test_ranks_of_a_node_read_one_message(link, monkeypatch, nodes, joins):
    monkeypatch.setattr(mpi, "CHUNK", 16)

    def refuse(*handle_and_size):
        raise OSError("processes may not look into each other here")

    if not joins and link.rank == 3:
        monkeypatch.setattr(node, "join", refuse)
    link.host = nodes[link.rank]
    for t in range(1, 6):  # later ones write over the first, or need another memory
        sent = arrays(t) if t < 4 else {"other": np.arange(1000 * t)}
        got = link.bcast(t, sent if link.is_server else None)
        assert all(np.array_equal(got[name], sent[name]) for name in sent)
        if link.shared and not link.is_server and nodes.index(link.host) != link.rank:
            with pytest.raises(ValueError, match="read-only"):
                got.buffer[0] = 1
    assert link.shared == joins


def summed(link, codec, mine, exponents, shared):
    """The mean at the server, NaN elsewhere, of all ranks' vectors, after the same memory has been used three times."""
    total = summing.Sum(link, codec.empty().size, codec.dtype)
    assert (total.shared is not None) == shared
    for _ in range(3):
        result = np.full(codec.schema.blocks[-1], np.nan, np.float32)
        total.reduce(
            [chunk.span.stop - chunk.span.start for chunk in codec.chunks],
            lambda k, part: codec.encode(mine, exponents, codec.chunks[k], part),
            lambda k, part: codec.decode(part, exponents, codec.clients, codec.chunks[k], result),  # noqa: B023
        )
        assert link.is_server or np.isnan(result).all()
    return result


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("nodes", ["aaaa", "abab", "abbb", None])
def test_exact_sum_does_not_depend_on_who_hosts_whom(link, monkeypatch, nodes):
    """nodes: which ranks share a node; None: none can share memory."""

    def refuse(*handle_and_size):
        raise OSError("processes may not look into each other here")

    if nodes is None:
        monkeypatch.setattr(node, "join", refuse)
    else:
        link.host = nodes[link.rank]
    monkeypatch.setattr(codecs, "PIECE", 3)
    monkeypatch.setattr(codecs, "CHUNK", 5)
    clients, schema = 5, flat.pack(arrays(0)).schema
    vectors = [flat.pack(arrays(seed)).vector for seed in range(clients)]
    codec = codecs.Exact(schema, clients)
    results = []
    for hosts in ([1, 2, 3, 1, 2], [3, 3, 3, 3, 3], [2, 1, 3, 2, 1]):
        mine = [vectors[c] for c in range(clients) if hosts[c] == link.rank]
        maxima = np.zeros(codec.blocks, np.float32)
        for vector in mine:
            maxima = np.maximum(maxima, codecs.maxima(flat.Flat(schema, vector)))
        result = summed(link, codec, mine, codec.exponents(link.maxima(maxima)), shared=nodes is not None)
        results.append(result)
    if link.is_server:
        assert np.array_equal(results[0], results[1])
        assert np.array_equal(results[0], results[2])
        assert np.allclose(
            results[0], np.mean(vectors, axis=0, dtype=np.float64), rtol=0, atol=2e-7
        )  # half a float32 step at 2


@pytest.mark.mpi(min_size=3)
def test_vote_tells_all_ranks_of_one_failure(link, capfd):
    error = None
    if link.rank == 2:
        error = ValueError("too hot")
        locate(error, "round 7: client 3 on")
    with pytest.raises(mpi.PeerError, match="round 7: client 3 on rank 2 @ .*: ValueError: too hot"):
        link.vote(error)
    assert link.vote(None, (link.rank, 1)).tolist() == [[0, 1], [1, 1], [2, 1]]


@pytest.mark.mpi(min_size=3)
def test_vote_keeps_the_users_fault_apart(link, capfd):
    with pytest.raises(UserError, match="no such file"):
        link.vote(UserError("no such file") if link.rank == 1 else None)
    # a real failure beside it matters more
    with pytest.raises(mpi.PeerError, match="boom"):
        link.vote({1: UserError("no such file"), 2: RuntimeError("boom")}.get(link.rank))


@pytest.mark.mpi(min_size=3)
def test_servers_failure_reaches_those_who_wait_in_the_broadcast(link):
    with pytest.raises(mpi.PeerError, match="rank 0 @ .*: KeyError"):
        link.bcast(3, error=KeyError("x") if link.is_server else None)
    got = link.bcast(4, {"a": np.float32([1])} if link.is_server else None)
    assert got["a"] == 1


@pytest.mark.mpi(min_size=3)
def test_alarm_stops_others_and_leaves_nothing_under_way(link, capfd):
    error = None
    if link.rank == 1:
        error = RuntimeError("boom")
        link.alarm()
    elif link.rank == 2:
        try:
            while True:
                link.check()
        except mpi.Stopped as stopped:
            error = stopped
    link.wait()
    with pytest.raises(mpi.PeerError, match="boom"):
        link.vote(error)
    link.check()  # nothing is left


@pytest.mark.mpi(min_size=3)
def test_together_gives_each_its_result_or_all_the_failure(link, capfd):
    assert link.together(lambda: 10 * link.rank) == 10 * link.rank

    def work():
        if link.rank == 2:
            raise OSError("disk full")

    with pytest.raises(mpi.PeerError, match="OSError: disk full"):
        link.together(work)


@pytest.mark.mpi(min_size=2)
def test_questions_are_answered_while_clients_train(link, capfd):
    if link.is_server:
        request, served = link.arrive(), 0
        while not link.all_here(request):
            served += link.answer(lambda t, client, question: {"twice": 2 * question["x"] + t + client})
        assert served == 3
    else:
        ask = link.asker(t=5, client=7)
        for i in range(3):
            assert ask({"x": np.float32([i])})["twice"] == 2 * i + 12
        link.wait()


@pytest.mark.mpi(min_size=2)
def test_a_failed_answer_reaches_the_one_who_asked(link):
    def refuse(t, client, question):
        raise ValueError("no answer")

    if link.is_server:
        with pytest.raises(ValueError, match="no answer"):
            while True:
                link.answer(refuse)
    else:
        with pytest.raises(mpi.PeerError, match="no answer"):
            link.asker(1, 1)({"x": np.float32([0])})


@pytest.mark.mpi(min_size=2)
def test_progress_notes_all_arrive(link):
    if link.is_server:
        link.wait()
        seen = list(link.notes())
        link.last_notes(50)
        assert len(seen) <= 50
        assert link.received == 0
    else:
        for done in range(50):
            link.progress((0, done, 50))
        assert link.sent == 50
        link.wait()
