"""A base that is cast or quantised lies in a node's memory once, and whoever fails while it is made hurts no one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, first, launch, launcher, within
from test_runs import play, shown

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import memory

FAULTS = ROOT / "tests" / "faults.py"
NF4, CAST = "model.quantize=nf4", "model.dtype=bfloat16"

# for each case, the words of a configuration: what every rank maps and has of its own
MEASURE = """
import gc, json, sys
from pathlib import Path
from gdmpi import build, config as configuration, libraries, mpi

def own():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

def mapped(cache):
    found, counts = {"Rss:": 0, "Pss:": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            counts = f"{cache}/bases/" in line
        elif counts and first in found:
            found[first] += 1024 * int(rest[0])
    return list(found.values())

link, found = mpi.start(), []
for words in json.loads(sys.argv[1]):
    config = configuration.load(None, words)
    before = own()
    parts = build.build(link, config)
    after = own()
    link.agree(None)
    if link.is_worker:
        for p in parts.trainable.model.parameters():
            p.data.view(-1)[::64].clone()  # a touch of each page
    link.agree(None)  # all have touched them
    found.append(link.agree((*mapped(config.run.cache), after - before)))
    parts = p = None
    gc.collect()
if link.is_server:
    print(json.dumps(found))
"""


@pytest.mark.skipif(not memory.ROLLUP.exists(), reason="needs /proc/PID/smaps")
def test_the_ranks_of_a_node_map_the_same_pages(tmp_path):
    cases = []
    for word, shape in ((CAST, (1024, 1, 14000)), (NF4, (512, 2, 2000))):
        place = tmp_path / word
        memory.base(place / "model", *shape)
        rows = memory.write_rows(place / "rows.jsonl", memory.tiny_rows(60))
        words = [f"model.name={place / 'model'}", f"run.cache={place / 'cache'}", f"data.name={rows}", word]
        words += ["clients.count=3", "model.adapter.r=1", "model.adapter.targets=[q_proj]", "run.device=cpu"]
        cases.append(words)
    found = json.loads(launch([json.dumps(cases)], 4, program=("-c", MEASURE)).ok().out)
    for word, everyone in zip((CAST, NF4), found, strict=True):
        (file,) = memory.made(tmp_path / word)
        size = file.stat().st_size
        assert everyone[0][:2] == [0, 0], "the server has no base"
        for resident, _, _ in everyone[1:]:
            assert resident == pytest.approx(size, rel=0.05), word
        # as many copies as there are ranks, if the pages were each rank's own
        assert sum(share for _, share, _ in everyone) == pytest.approx(size, rel=0.05), word
        if word == CAST:
            assert size > 50e6
            assert everyone[1][2] - everyone[2][2] < 0.5 * size, "who made it has kept a copy"


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("word", [CAST, NF4])
def test_a_run_without_a_cache_for_bases_gives_the_same_bits_and_a_line(link, tiny, tmp_path, word):
    settings = [word, "run.rounds=1", f"run.cache={tmp_path}"]
    kept = play(tiny, f"kept-{word[-3:]}", *settings, ranks=2)
    assert len(list((tmp_path / "bases").iterdir())) == 1
    link.wait()  # all have looked
    if first():
        (tmp_path / "bases").rename(tmp_path / "aside")
        (tmp_path / "bases").write_text("in the way")
    name = f"copied-{word[-3:]}"
    out = within(["run", tiny / "tiny.yaml", f"run.name={name}", *settings], 3).ok().out
    assert [line.startswith("warning: run.cache: no base can be kept in") for line in out.splitlines()].count(True) == 1
    copied = shown(tiny / "runs" / name)
    for row in copied["rounds"]:
        row["warnings"] = []
    assert copied == shown(kept)


def test_two_jobs_at_once_and_a_third_share_what_one_of_them_makes(tiny, tmp_path):
    command, env = launcher(2)
    jobs = []
    for name in ("at-once-1", "at-once-2"):
        words = ["run", tiny / "tiny.yaml", f"run.name={name}", NF4, "run.rounds=1", f"run.cache={tmp_path}"]
        jobs.append(subprocess.Popen([*command, sys.executable, "-m", "gdmpi", *map(str, words)], env=env))
    assert [job.wait(timeout=120) for job in jobs] == [0, 0]
    (entry,) = (tmp_path / "bases").iterdir()
    before = {path: path.stat().st_mtime_ns for path in entry.iterdir()}
    third = play(tiny, "at-once-3", NF4, "run.rounds=1", f"run.cache={tmp_path}")
    assert shown(third) == shown(tiny / "runs" / "at-once-1") == shown(tiny / "runs" / "at-once-2")
    assert {path: path.stat().st_mtime_ns for path in entry.iterdir()} == before


def fail(tiny, cache, fault, ranks):
    words = ["run", tiny / "tiny.yaml", f"run.name={fault}", CAST, "run.rounds=1", f"run.cache={cache}"]
    return launch([fault, *words], ranks, program=(FAULTS,), timeout=100)


def test_a_maker_that_is_killed_leaves_nothing_that_confuses_the_next(tiny, tmp_path):
    assert fail(tiny, tmp_path, "base_maker_killed", 2).code != 0
    left = [path.name for path in (tmp_path / "bases").iterdir()]
    assert len(left) == 2 and all(name.startswith(".") for name in left), left
    run = play(tiny, "after-the-kill", CAST, "run.rounds=1", f"run.cache={tmp_path}")
    (entry,) = (tmp_path / "bases").iterdir()
    assert not entry.name.startswith(".")
    assert shown(run)["rounds"][-1]["warnings"] == []


def test_a_maker_that_fails_ends_all_ranks_at_once(tiny, tmp_path):
    result = fail(tiny, tmp_path, "base_maker_raises", 3)
    assert result.code == 1, result.out + result.err
    assert "rank 1 @ " in result.err and "ArithmeticError: cannot write" in result.err
    assert list((tmp_path / "bases").iterdir()) == []


def test_a_node_with_a_cache_of_its_own_makes_its_own(tiny, tmp_path):
    result = fail(tiny, tmp_path / "cache", "own_caches", 4).ok()
    assert "no base can be kept" not in result.out
    one, two = ([path.name for path in Path(f"{tmp_path}/cache-{n}/bases").iterdir()] for n in (0, 1))
    assert one == two and len(one) == 1
    alone = play(tiny, "one-cache", CAST, "run.rounds=1", f"run.cache={tmp_path}/cache-0")
    assert shown(alone) == shown(tiny / "runs" / "own_caches")
