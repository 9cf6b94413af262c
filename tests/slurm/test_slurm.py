"""slurm/run.sh and slurm/sweep.sh on a real Slurm of three nodes, which the tests start on this machine."""

import concurrent.futures
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cluster
import pytest
from conftest import ROOT, launch

from gdmpi import report

RUN, SWEEP = ROOT / "slurm" / "run.sh", ROOT / "slurm" / "sweep.sh"
ROUNDS = 10
TWO_NODES = ("--nodes=2", "--ntasks=2")
AT_ONCE = 4  # jobs that tests have in hand at a time: mostly they wait for Slurm or sleep, but their starts compute
GOING_ON = {"PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING"}


class Bench:
    """Submits runs of the tiny model, slowed down, and looks at what has become of them."""

    def __init__(self, slurm, tiny):
        self.slurm, self.folder = slurm, tiny
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = {"PYTHONPATH": str(ROOT), "PATH": path}

    def words(self, name, *settings):
        """The arguments of a run: configuration and settings."""
        slow = ROOT / "tests" / "methods" / "slow.py"
        settings = [f"run.name={name}", f"run.rounds={ROUNDS}", f"method.name={slow}", *settings]
        return [str(self.folder / "tiny.yaml"), *settings]

    def submit(self, name, *settings, options=TWO_NODES, env=None):
        """The number of a job for a run."""
        words = ["sbatch", "--parsable", *options, str(RUN), *self.words(name, *settings)]
        return self.slurm.call(*words, env=self.env | (env or {}), cwd=self.folder)

    def directory(self, name):
        return self.folder / "runs" / name

    def in_mid_run(self, name, job):
        """Wait until a job's run has done some of its rounds, not all."""

        def there():
            done = max((int(path.stem[-6:]) for path in self.directory(name).glob("round-*.h5")), default=-1)
            assert done >= 2 or self.slurm.state(job)[0] in GOING_ON, f"{name} has ended before its third round"
            return done >= 2

        self.until(job, there, f"{name} is in its third round")

    def until(self, job, true, what, seconds=240):
        """Wait for something; on failure, say how a job stands, what it logged and who is running."""
        try:
            self.slurm.until(true, what, seconds)
        except AssertionError as error:
            stand = self.slurm.call("scontrol", "show", "job", job) + self.slurm.call("sinfo", "-N", "-l")
            pytest.fail(f"{error}\n{stand}\n{self.log(job)}\n{self.slurm.processes()}")

    def log(self, job):
        path = self.folder / f"gdmpi-{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def ended(self, job, state="COMPLETED"):
        """Wait until a job, however often it starts again, ends for good."""
        self.until(job, lambda: self.slurm.state(job)[0] not in GOING_ON, f"job {job} has ended")
        assert self.slurm.state(job)[0] == state, self.log(job)

    def shown(self, name):
        return json.loads(report.as_json([self.directory(name)]))


@pytest.fixture(scope="session")
def slurm():
    """A running cluster, or a skip that says why there is none."""
    try:
        with cluster.running() as started:
            yield started
    except cluster.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def bench(slurm, tiny):
    return Bench(slurm, tiny)


@pytest.fixture(scope="session")
def limited(bench):
    """A job that takes longer than its limit of a minute, Slurm's least; it runs beside all other tests."""
    # no signal: the run has to know by itself
    options = ("--ntasks=2", "--time=1", "--signal=USR1@0")
    return bench.submit("limited", "method.seconds=2", "run.grace=5", options=options)


@pytest.fixture(scope="session")
def scenarios(request, bench, tmp_path_factory):
    """{test: Future} of all scenarios whose tests are to run."""
    wanted = [item.name for item in request.session.items]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        bench.undisturbed = pool.submit(undisturbed, bench)
        yield {
            name: pool.submit(scenario, bench, tmp_path_factory.mktemp("scenario"))
            for name, scenario in SCENARIOS.items()
            if name in wanted
        }
        bench.slurm.over.set()
        pool.shutdown(cancel_futures=True)


SCENARIOS = {}


def beside_others(scenario):
    """Make a test of scenario(bench, folder), which runs beside the others, as they mostly wait for Slurm."""
    name = scenario.__name__
    SCENARIOS[name] = scenario

    @pytest.mark.slurm
    def test(scenarios):
        scenarios[name].result()

    return test


def undisturbed(bench):
    """The rounds of the same run under mpirun: (round, adapter's hash)."""
    launch(["run", *bench.words("undisturbed", "method.seconds=0")], ranks=2).ok()
    return rounds(bench.shown("undisturbed"))


def rounds(shown):
    return [(row["round"], row["adapter_sha256"]) for row in shown["rounds"]]


def same(bench, name):
    """A run came to the same adapter in every round as undisturbed, and has each round once in its metrics."""
    assert rounds(bench.shown(name)) == bench.undisturbed.result()
    with (bench.directory(name) / "metrics.csv").open() as file:
        assert [int(row["round"]) for row in csv.DictReader(file)] == list(range(ROUNDS + 1))


def starts(bench, name):
    """How often a run began or went on, by its log."""
    return bench.directory(name).joinpath("log.txt").read_text().count(" rounds, into ")


# ---- one job --------------------------------------------------------------------------------------------------------


@beside_others
def test_two_nodes_give_the_bits_of_mpirun(bench, folder):
    job = bench.submit("plain")
    bench.ended(job)
    same(bench, "plain")
    assert bench.slurm.call("squeue", "-h", "-t", "all", "-j", job, "-o", "%N") == "n[1-2]"


@beside_others
def test_mpi_starts_whatever_lies_in_memory(bench, folder):
    """A heap of text with holes, as large programs have it when MPI starts: ranks waited for ever, or failed."""
    text = "text = [f'{i} some words that are no zeros ' * (20 + i % 90) for i in range(60000)]; del text[::2]"
    words = ["-c", f"{text}; from gdmpi import mpi; print(mpi.start().agree(1))"]
    said = bench.slurm.call("srun", *TWO_NODES, "--mpi=pmi2", sys.executable, *words, env=bench.env, cwd=folder)
    assert said.splitlines() == ["[1, 1]"] * 2


@beside_others
def test_requeued_in_mid_run(bench, folder):
    job = bench.submit("requeued")
    bench.in_mid_run("requeued", job)
    bench.slurm.call("scontrol", "requeue", job)
    bench.ended(job)
    same(bench, "requeued")
    assert "which was Slurm's or your decision" in bench.log(job)


@beside_others
def test_requeued_after_a_kill(bench, folder):
    job = bench.submit("killed", options=("--nodes=1", "--ntasks=2"))  # ranks that share memory, by name
    bench.in_mid_run("killed", job)
    bench.slurm.call("scancel", "--signal=KILL", f"{job}.0")
    bench.ended(job, "FAILED")
    bench.slurm.call("scontrol", "requeue", job)
    bench.ended(job)
    same(bench, "killed")


@beside_others
def test_usr1_in_mid_run(bench, folder):
    job = bench.submit("signalled")
    bench.in_mid_run("signalled", job)
    bench.slurm.call("scancel", "--signal=USR1", job)
    bench.ended(job)
    same(bench, "signalled")
    assert f"job {job} is in the queue again" in bench.log(job)


@beside_others
def test_node_down_in_mid_run(bench, folder):
    job = bench.submit("lost", options=(*TWO_NODES, "--partition=frail"))
    bench.in_mid_run("lost", job)
    bench.slurm.call("scontrol", "update", "nodename=n3", "state=down", "reason=test")
    bench.until(job, lambda: bench.slurm.state(job)[0] != "RUNNING", "the job has lost its node")
    bench.slurm.call("scontrol", "update", "nodename=n3", "state=resume")
    bench.ended(job)
    same(bench, "lost")


@beside_others
def test_cancelled_job_stays_cancelled(bench, folder):
    job = bench.submit("cancelled")
    bench.in_mid_run("cancelled", job)
    bench.slurm.call("scancel", job)
    bench.ended(job, "CANCELLED")
    assert bench.slurm.call("squeue", "-h", "-t", "all", "-n", "gdmpi", "-o", "%i").split().count(job) == 1
    assert f"job {job} stops here" in bench.log(job)


LAYOUTS = {
    # sbatch's options; of scancel, whom it tells; nodes and cores of each part of the job
    "plain": (TWO_NODES, ["--batch", "--signal=TERM"], ["2 2"]),  # what only the batch shell is told is passed on
    "heterogeneous": (("--ntasks=1", ":", "--ntasks=1", "--cpus-per-task=2"), ["--signal=USR1"], ["1 1", "1 2"]),
}


@beside_others
def test_submits_again_where_requeueing_is_refused(bench, folder):
    refused(bench, folder, "plain")


@beside_others
def test_submits_a_heterogeneous_job_again_where_requeueing_is_refused(bench, folder):
    refused(bench, folder, "heterogeneous")


def refused(bench, folder, layout):
    options, told, size = LAYOUTS[layout]
    name = f"refused-{layout}"
    fake(folder / "scontrol", "echo refused >&2; exit 1")
    job = bench.submit(name, options=options, env={"PATH": f"{folder}:{bench.env['PATH']}"})
    bench.in_mid_run(name, job)
    bench.slurm.call("scancel", *told, job)
    bench.ended(job, "FAILED")
    assert bench.slurm.state(job)[1] == 75
    (following,) = re.findall(r"goes on as job (\d+)", bench.log(job))
    bench.ended(following)
    same(bench, name)
    assert bench.slurm.call("squeue", "-h", "-t", "all", "-j", following, "-o", "%D %C").split("\n") == size


@pytest.mark.slurm
@pytest.mark.early
def test_wrong_input_ends_at_once(bench, limited):
    job = bench.slurm.call("sbatch", "--parsable", str(RUN), "nowhere.yaml", env=bench.env, cwd=bench.folder)
    bench.ended(job, "FAILED")
    assert bench.slurm.state(job)[1] == 2
    assert len(bench.log(job).splitlines()) == 1


# ---- many jobs ------------------------------------------------------------------------------------------------------


def sweep(folder, *words, env):
    words = [str(SWEEP), *map(str, words)]
    return subprocess.run(words, env=dict(os.environ, **env), cwd=folder, capture_output=True, text=True)


@beside_others
def test_sweep_gives_all_runs_and_one_comparison(bench, folder):
    words = [*TWO_NODES, "--time=5", *bench.words("sweep", "run.seed=0,1")]
    done = sweep(bench.folder, *words, env=bench.slurm.env | bench.env)
    assert done.returncode == 0, done.stderr
    array, last = re.findall(r"^job (\d+)", done.stdout, re.M)
    names = ["sweep-seed0", "sweep-seed1"]
    bench.in_mid_run(names[1], f"{array}_1")
    bench.slurm.call("scancel", "--signal=USR1", f"{array}_1")  # a task that starts again leaves the others alone
    bench.ended(last)
    text = (bench.directory("sweep-sweep") / "comparison.txt").read_text()
    assert "sweep-seed*" in text  # runs that differ in the seed are one line
    assert re.search(rf"\s2 +\S+ +\d+ +{ROUNDS}/{ROUNDS}\s", text)
    assert [starts(bench, name) for name in names] == [1, 2]
    assert [bench.shown(name)["rounds_done"] for name in names] == [ROUNDS, ROUNDS]


@pytest.fixture
def offline(tiny, tmp_path):
    """A sweep whose sbatch only notes what it is asked: sweep(words) with the tiny configuration, in a new folder."""
    fake(tmp_path / "sbatch", f'echo "$@" >>{tmp_path}/asked; echo 7')
    env = {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return lambda *words: sweep(tmp_path, *words, env=env)


def test_sweep_plans_all_combinations(offline, tiny, tmp_path):
    lists = ["model.adapter.targets=[q_proj,v_proj],all-linear", "train.lr=1e-2,1e-3"]
    place = ["--partition=p", "--account=a"]
    done = offline("--gpus-per-node=2", *place, tiny / "tiny.yaml", "run.out=out", *lists)
    assert done.returncode == 0, done.stderr
    tasks = (tmp_path / "out" / "tiny-sweep" / "tasks").read_text().splitlines()
    assert [line.rpartition("\t")[2] for line in tasks] == [
        f"run.name=tiny-targets{targets}-lr{lr}"
        for targets in ("q_proj_v_proj", "all-linear")
        for lr in ("1e-2", "1e-3")
    ]
    assert "\tmodel.adapter.targets=[q_proj,v_proj]\ttrain.lr=1e-2\t" in tasks[0]
    array, last = (tmp_path / "asked").read_text().splitlines()
    assert "--array=0-3" in array and "--gpus-per-node=2" in array
    assert "--dependency=afterany:7" in last and " ".join(place) in last and "gpus" not in last


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "give a configuration that exists"),
        (["nowhere.yaml", "run.seed=0,1"], "nowhere.yaml: give a configuration that exists"),
        (["CONFIG", "run.seed"], "run.seed: not understood"),
        (["CONFIG", "run.seed=0,,1"], "run.seed=0,,1: not understood"),
        (["CONFIG", "run.seed=0"], "nothing to sweep"),
        (["CONFIG", "run.seed=0,0"], "two runs would have the name"),
        (["CONFIG", "run.name=a,b"], "run.name=a,b: "),
        (["CONFIG", "run.sed=0,1"], "did you mean seed?"),
        (["CONFIG", "train.lr=1e-3,fast"], "train.lr: "),
    ],
)
def test_sweep_refuses_wrong_input(offline, tiny, tmp_path, words, said):
    done = offline(*(tiny / "tiny.yaml" if word == "CONFIG" else word for word in words))
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "asked").exists()


def fake(path, body):
    """A program for PATH that stands in for one of Slurm's."""
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


# ---- last, as it has been running all the time ----------------------------------------------------------------------


@pytest.mark.slurm
def test_time_limit_too_short_for_all_rounds(bench, limited, scenarios):
    bench.ended(limited)
    same(bench, "limited")
    assert starts(bench, "limited") > 1
    assert "the Slurm job's time limit comes in" in bench.log(limited)
    assert "DUE TO TIME LIMIT" not in bench.log(limited)
