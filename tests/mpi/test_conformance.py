"""Every method of the folder keeps to what all must, by check --method; and what does not is found by its property."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, launch

from gdmpi import conformance, method, mpi
from gdmpi.errors import UserError

FIXTURES = Path(__file__).resolve().parent.parent / "methods"
PROPERTIES = ["loads", "runs", "learns", "repeats", "order", "state", "bytes", "resume", "ranks"]
METHODS = [*method.available(), str(FIXTURES / "gathering.py"), str(FIXTURES / "asking.py")]
(README,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
EXPECTS = """    def __init__(self, options, context, client):
        super().__init__(options, context, client)
        self.rows = context.examples[client]

"""
UPDATE = "        return method.Update(mean=delta"

# what is wrong: ([(what the README's method has, what stands there instead)], the properties that fail, what is said)
BROKEN = {
    "forgets": (
        [
            ('{**super().state(), "velocity": self.velocity}', "super().state()"),
            ('self.velocity = arrays["velocity"]', "pass"),
        ],
        {"resume"},
        "another adapter after round 3",
    ),
    "saves-half": (
        [('{**super().state(), "velocity": self.velocity}', '{"velocity": self.velocity}')],
        {"state", "resume"},
        "weights",
    ),
    "leaks": (
        [(UPDATE, f"        delta.vector[:] += getattr(Client, 'last', 0)\n        Client.last = 1e-3\n{UPDATE}")],
        {"order", "ranks"},
        "does a client leave something to the next one",
    ),
    "forgets-its-own": (
        [
            (
                UPDATE,
                f"        delta.vector[:] *= getattr(self, 'factor', 1)\n        self.factor = 1 + t / 10\n{UPDATE}",
            )
        ],
        {"resume"},
        "is something kept between rounds that is not in state()?",
    ),
    "draws": (
        [(UPDATE, f"        delta.vector[:] *= 1 + 0.01 * np.random.random()\n{UPDATE}")],
        {"repeats", "order", "resume", "ranks"},
        "a global random generator instead of context.stream",
    ),
    "shares": (
        [
            ("class Options", "ROUND = [0]\n\n\nclass Options"),
            ("    def step(self, t):\n", "    def step(self, t):\n        ROUND[0] = t\n"),
            (UPDATE, f"        delta.vector[:] *= 1 + ROUND[0] / 10\n{UPDATE}"),
        ],
        {"resume", "ranks"},
        "the server and its clients, share something",
    ),
    "writes": (
        [(UPDATE, f"        self.start.vector[:1] += 1e-3\n{UPDATE}")],
        {"order", "ranks"},
        "has written into the message",
    ),
    "overflows": (
        [(UPDATE, f"        if t == 2:\n            delta.vector[0] = np.nan\n{UPDATE}")],
        {"runs"},
        "the update is not finite",
    ),
    "crashes": ([(UPDATE, f"        assert t < 3, 'too far'\n{UPDATE}")], {"runs"}, "too far (crashes.py, line 38)"),
    "unlearns": ([(UPDATE, f"        delta.vector[:] *= -1\n{UPDATE}")], {"learns"}, "train.lr"),
    "miscounts": ([('"up": schema.nbytes', '"up": 2 * schema.nbytes')], {"bytes"}, "where the formula says"),
    "expects": (
        [("class Client(method.Client):\n", "class Client(method.Client):\n" + EXPECTS)],
        {"repeats", "order"},
        "a rank without clients, which evaluates as client -1",
    ),
    "demands": ([("beta: float = 0.5", "beta: float")], {"loads"}, "method.beta: has no default, so give it"),
}


def alone():
    from mpi4py import MPI

    return mpi.Link(MPI.COMM_SELF)


def quick(tiny):
    """Settings for a model and texts that are smaller than the demo's."""
    return [f"model.name={tiny / 'model'}", f"data.name={tiny / 'data.jsonl'}", "data.max_length=64", "train.steps=2"]


def outcomes(words, names):
    """{name: {property: (ok, FAILS or -, text)}} of methods, and the Result, as check prints it."""
    result = launch(["check", *(word for name in names for word in ("--method", name)), *words], timeout=600)
    found = {}
    for line in result.out.splitlines():
        if head := re.fullmatch(r"(\S+), 4 rounds of the demo:", line):
            own = found.setdefault(head[1], {})
        elif line.startswith("  "):
            holds, name, text = line.split(maxsplit=2)
            own[name] = (holds, text)
    assert set(found) == set(map(str, names)), result.out + result.err
    return found, result


@pytest.fixture(scope="module")
def kept():
    """What is found of the methods that are there, tried with the demo as a user does."""
    return outcomes([], METHODS)


@pytest.fixture(scope="module")
def broken(tiny, tmp_path_factory):
    """What is found of methods with a mistake each, by its name; with a tiny model, as there are many."""
    directory = tmp_path_factory.mktemp("broken")
    for name, (changes, _, _) in BROKEN.items():
        source = README
        for old, new in changes:
            assert source.count(old) == 1
            source = source.replace(old, new)
        (directory / f"{name}.py").write_text(source)
    found, result = outcomes(quick(tiny), [directory / f"{name}.py" for name in BROKEN])
    assert result.code == 1
    return {Path(name).stem: each for name, each in found.items()}


@pytest.mark.parametrize("name", METHODS)
def test_method_keeps_to_what_all_must(kept, name):
    found = kept[0][name]
    assert list(found) == PROPERTIES
    stated = hasattr(method.load(name), "nbytes")
    assert stated or name not in method.available()
    assert [(key, *found[key]) for key in found if found[key][0] != "ok" and (key != "bytes" or stated)] == []


def test_what_holds_is_said_and_exits_with_0(kept):
    found, result = kept
    assert result.code == 0 and result.err == ""
    assert found[str(FIXTURES / "asking.py")]["bytes"][0] == "-"
    assert "states no formula" in found[str(FIXTURES / "asking.py")]["bytes"][1]
    assert re.search(r"loss 4\.\d+ -> ", found["gradualdiff"]["learns"][1])
    assert "the client that learns least" in found["local"]["learns"][1]
    assert result.out.endswith(f"{len(PROPERTIES) * len(METHODS) - 1} properties tried, all hold\n")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_method_is_found_by_the_property_that_it_lacks(broken, name):
    _, expected, says = BROKEN[name]
    failed = {key: text for key, (holds, text) in broken[name].items() if holds == "FAILS"}
    # in so few steps the tiny model may learn too little; that the demo's does, the methods that are right show
    assert set(failed) - ({"learns"} - expected) == expected, broken[name]
    assert any(says in text for text in failed.values()), failed


def test_without_mpirun_all_is_tried_but_ranks(tiny, monkeypatch):
    monkeypatch.setattr(conformance, "_mpirun", lambda: None)
    monkeypatch.setattr(conformance.mpi, "start", alone)
    lines = []
    assert (
        conformance.report(["gradualdiff"], [*quick(tiny), "train.steps=12", "data.validation=0.2"], lines.append) == 0
    )
    assert len([line for line in lines if line.startswith("  ok ")]) == len(PROPERTIES) - 1
    assert lines[-2].startswith("  -     ranks    not tried: there is no mpirun")


@pytest.mark.parametrize(
    ("names", "words", "says"),
    [
        (["gradualdif"], [], "did you mean gradualdiff"),
        (["/no/such.py"], [], "there is no file /no/such.py"),
        (["fedavg"], ["run.rounds=3"], "run.rounds: check --method decides it"),
    ],
)
def test_what_cannot_be_tried_is_wrong_input(names, words, says):
    with pytest.raises(UserError, match=says):
        conformance.report(names, words, print)
