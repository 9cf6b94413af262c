"""The configuration: the demo's defaults, what wins over what, and wrong input said in one line that helps."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from gdmpi import config as configuration, method
from gdmpi.errors import UserError

ASKING = Path(__file__).resolve().parent.parent / "methods" / "asking.py"


def flat_keys(config):
    """{section.key: value} of all keys of a Config."""
    return configuration.flatten(config.plain())


DEFAULTS = flat_keys(configuration.load())
ATOMS = [key for key in DEFAULTS if not key.startswith("method.")]


def refused(*overrides, path=None, says=()):
    """The one line with which a configuration is refused."""
    with pytest.raises(UserError) as caught:
        configuration.load(path, overrides)
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and len(line) < 500
    for text in says:
        assert text in line
    return line


# ---- defaults and precedence ----------------------------------------------------------------------------------------


def test_defaults_are_the_demos():
    config = configuration.load()
    assert config == configuration.load(base={})
    assert configuration.flatten(configuration.Config.model_validate({}).plain()) | {"method.weighting": "uniform"} == (
        configuration.flatten(config.plain())
    )
    expected = {
        "run": {"name": "demo", "out": "runs", "rounds": 5, "seed": 0, "keep": 2, "eval_every": 1, "device": "auto"},
        "clients": {"count": 5, "per_round": 1.0, "boundary": "shared"},
        "model": {"name": "demo", "quantize": "none", "dtype": "auto"},
        "data": {"name": "demo", "template": "auto", "max_length": 256, "validation": 0.1, "test": 0.1},
        "method": {"name": "gradualdiff", "weighting": "uniform"},
        "train": {"epochs": 1, "steps": None, "batch_size": 8, "lr": 1e-3, "clip_norm": 0.3, "optimizer": "adamw"},
        "evaluation": {"labels": None},
        "server": {"optimizer": "sgd", "lr": 1.0},
        "exchange": {"codec": "exact"},
        "schedule": {"kind": "sync"},
    }
    plain = config.plain()
    assert plain.keys() == expected.keys()
    for section, values in expected.items():
        assert {key: plain[section][key] for key in values} == values
    assert plain["clients"]["split"] == {"kind": "iid", "files": None, "column": None, "alpha": None}
    adapter = {"kind": "lora", "r": 8, "alpha": 16.0, "dropout": 0.0, "targets": "all-linear", "rslora": False}
    assert plain["model"]["adapter"] == adapter
    assert config.directory == Path("runs/demo")


def test_command_line_wins_over_file_over_base_over_defaults(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train: {lr: 0.25, epochs: 3}\nmodel: {adapter: {r: 16}}\n")
    base = {"train": {"lr": 0.5, "batch_size": 2}, "run": {"seed": 4}, "model": {"adapter": {"alpha": 3}}}
    config = configuration.load(path, ["train.epochs=7", "train.epochs=8", "model.adapter.dropout=0.5"], base)
    assert (config.train.lr, config.train.epochs, config.train.batch_size) == (0.25, 8, 2)
    assert (config.run.seed, config.run.rounds) == (4, 5)
    adapter = config.model.adapter
    assert (adapter.r, adapter.alpha, adapter.dropout, adapter.kind) == (16, 3.0, 0.5, "lora")
    assert base["train"] == {"lr": 0.5, "batch_size": 2}  # the caller's own is left alone


def test_empty_file_is_the_demo(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n")
    assert configuration.load(path) == configuration.load()


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", "1e-04"])
def test_numbers_that_yaml_takes_for_strings_are_numbers(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(f"train: {{lr: {text}}}\n")
    for config in (configuration.load(path), configuration.load(overrides=[f"train.lr={text}"])):
        assert config.train.lr == 1e-4 and isinstance(config.train.lr, float)


def test_values_of_every_kind_from_the_command_line():
    words = ["clients.split={kind: files, files: [a.jsonl, b.jsonl]}", "train.steps=3", "train.clip_norm=null"]
    words += ["model.adapter.targets=[q_proj, v_proj]", "train.keep_optimizer=true", "data.columns.prompt=question"]
    config = configuration.load(overrides=[*words, "data.template={prompt} -> {response}".replace("{", "'{", 1) + "'"])
    assert config.clients.split.files == ["a.jsonl", "b.jsonl"]
    assert (config.train.steps, config.train.clip_norm, config.train.keep_optimizer) == (3, None, True)
    assert config.model.adapter.targets == ["q_proj", "v_proj"]
    assert config.data.columns == {"prompt": "question"}
    assert config.data.template == "{prompt} -> {response}"
    assert configuration.load(overrides=["run.name=a=b".replace("=b", "_b")]).run.name == "a_b"
    assert configuration.load(overrides=["data.template='a={prompt}b={response}'"]).data.template.count("=") == 2


def test_configuration_is_immutable():
    config = configuration.load()
    for section, key in ((config, "run"), (config.run, "seed"), (config.model.adapter, "r"), (config.method, "name")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, key, 3)


# ---- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.lrr=1", "train.lrr: unknown key; did you mean lr?"),
        ("train.batchsize=1", "train.batchsize: unknown key; did you mean batch_size?"),
        ("trian.lr=1", "trian: unknown key; did you mean train?"),
        ("model.adapter.rank=4", "model.adapter.rank: unknown key; known are kind, r, alpha"),
        ("clients.split.kinds=iid", "clients.split.kinds: unknown key; did you mean kind?"),
        ("zzz=1", "zzz: unknown key; known are run, clients, model"),
        ("method.firsts=2", "method.firsts: unknown key"),
        ("run.seed.x=1", "run.seed: "),
    ],
)
def test_unknown_keys_are_named_with_what_would_be_right(word, says):
    assert f"the command line: {says}" in refused(word)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.lr=fast", ["train.lr", "number", "not 'fast'"]),
        ("train.lr=-1", ["train.lr", "greater than or equal to 0", "not -1"]),
        ("train.lr=[1]", ["train.lr", "not [1]"]),
        ("train.batch_size=0", ["train.batch_size", "greater than 0"]),
        ("train.batch_size=2.5", ["train.batch_size", "integer", "not 2.5"]),
        ("train.steps=0", ["train.steps", "greater than 0"]),
        ("train.clip_norm=0", ["train.clip_norm", "greater than 0"]),
        ("train.optimizer=adam", ["train.optimizer", "'adamw', 'adamw8bit' or 'sgd'", "not 'adam'"]),
        ("train.keep_optimizer=maybe", ["train.keep_optimizer", "not 'maybe'"]),
        ("clients.count=0", ["clients.count", "greater than 0"]),
        ("clients.per_round=0", ["clients.per_round", "greater than 0"]),
        ("clients.per_round=1.5", ["clients.per_round", "less than or equal to 1"]),
        ("run.rounds=-1", ["run.rounds", "not -1"]),
        ("run.seed=x", ["run.seed", "integer", "not 'x'"]),
        ("run.name=a/b", ["run.name", "'a/b'"]),
        ("run.name=''", ["run.name"]),
        ("run.device=tpu", ["run.device", "'cuda'", "not 'tpu'"]),
        ("clients.split.kind=topic", ["clients.split.kind", "'by'", "not 'topic'"]),
        ("clients.split={kind: dirichlet, column: a, alpha: 0}", ["clients.split.alpha", "greater than 0", "not 0"]),
        ("clients.split={kind: dirichlet, column: a, alpha: few}", ["clients.split.alpha", "number", "not 'few'"]),
        ("model.adapter.dropout=1", ["model.adapter.dropout", "less than 1"]),
        ("model.adapter={r: 0}", ["model.adapter.r", "greater than 0"]),
        ("model.quantize=int8", ["model.quantize", "'nf4'", "not 'int8'"]),
        ("model=big", ["model", "not 'big'"]),
        ("clients.split=dirichlet", ["clients.split", "give {key: value, ...}, not 'dirichlet'"]),
        ("train=null", ["train", "not None"]),
        ("data.max_length=4", ["data.max_length", "greater than or equal to 8"]),
        ("data.columns={question: q}", ["data.columns", "'prompt'"]),
        ("method.weighting=rows", ["method.weighting", "'uniform' or 'examples'", "not 'rows'"]),
        ("method.name=gradualdif", ["method.name", "did you mean gradualdiff?"]),
        ("method.name=zzz", ["method.name", "known are ", "gradualdiff"]),
        ("method.name=/no/such/file.py", ["method.name", "there is no file /no/such/file.py"]),
        ("schedule.kind=async", ["schedule.kind", "'sync'"]),
    ],
)
def test_wrong_values_are_named_with_what_would_be_right(word, says):
    line = refused(word, says=says)
    assert line.startswith((f"the command line: {says[0]}", "method.name: "))


@pytest.mark.parametrize(
    "word", ["train.lr=nan", "train.lr=.nan", "train.lr=.inf", "server.lr=.nan", "run.timeout=.inf"]
)
def test_numbers_that_are_none_are_refused(word):
    refused(word, says=[word.partition("=")[0]])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["clients.boundary=site"], ["clients.boundary: site needs clients.split", "kind: files"]),
        (["clients.split.kind=files"], ["clients.split: kind: files needs the key files"]),
        (
            ["clients.split.files=a.jsonl"],
            ["clients.split: the key files has no meaning with kind: iid, only with files"],
        ),
        (["clients.split.column=topic"], ["the key column has no meaning with kind: iid, only with by and dirichlet"]),
        (["clients.split.kind=by"], ["clients.split: kind: by needs the key column"]),
        (["clients.split={kind: by, column: topic, alpha: 1}"], ["the key alpha has no meaning with kind: by"]),
        (["clients.split={kind: by, column: topic, files: a}"], ["the key files has no meaning with kind: by"]),
        (["clients.split={kind: dirichlet, column: topic}"], ["kind: dirichlet needs the key alpha"]),
        (["clients.split={kind: dirichlet, alpha: 1}"], ["kind: dirichlet needs the key column"]),
        (["clients.split={kind: files, files: a, column: topic}"], ["the key column has no meaning with kind: files"]),
        (["clients.split={kind: by, column: topic}", "clients.boundary=site"], ["clients.boundary: site needs"]),
        (["data.split_column=part"], ["data.validation: with data.split_column", "a string"]),
        (["data.split_column=part", "data.validation=dev"], ["data.test: with data.split_column"]),
        (["data.train=train"], ["data.train", "data.split_column"]),
    ],
)
def test_impossible_combinations(words, says):
    refused(*words, says=says)


def test_combinations_that_are_possible():
    words = ["data.split_column=part", "data.validation=dev", "data.test=test", "data.train=train"]
    words += ["clients.split={kind: files, files: 'sites/*.jsonl'}", "clients.boundary=site"]
    assert configuration.load(overrides=words).clients.split.files == "sites/*.jsonl"
    words = ["clients.split={kind: dirichlet, column: topic, alpha: 5e-1}"]
    assert configuration.load(overrides=words).clients.split.alpha == 0.5
    back = configuration.load(overrides=[*words, "clients.split={kind: iid, column: null, alpha: null}"])
    assert back == configuration.load()


@pytest.mark.parametrize("word", ["nonsense", "=1", "train.lr=[1", "train.lr={"])
def test_overrides_that_are_none(word):
    refused(word, says=[word])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"train: {lr: 1", "line"),
        (b"train:\n\tlr: 1\n", "line 2"),
        (b"- train\n- model\n", "sections of keys"),
        (b"just words", "sections of keys"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"train: {lrr: 1}", "train.lrr: unknown key; did you mean lr?"),
        (b"train: {lr: fast}", "not 'fast'"),
        (b"1: {2: 3}", "1: keys should be strings"),
        (b"null: 3", "keys should be strings"),
        (b"? [1, 2]\n: 3\n", ""),
        (b"train: {1: 2}", "train.1: keys should be strings"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, says):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    assert refused(path=path, says=[says]).startswith(f"{path}:")


def test_files_that_cannot_be_read(tmp_path):
    assert refused(path=tmp_path / "gone.yaml").startswith(f"{tmp_path / 'gone.yaml'}: cannot read the configuration")
    assert refused(path=tmp_path).startswith(f"{tmp_path}: cannot read the configuration")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(["\n", "a\nb"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("key", sorted({*ATOMS, *DEFAULTS, *{key.rpartition(".")[0] for key in ATOMS}, "method.x"}))
def test_junk_is_refused_in_one_line_or_means_something(key):
    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(value=JUNK)
    def check(value):
        tree = value
        for part in reversed(key.split(".")):
            tree = {part: tree}
        try:
            config = configuration.build(tree, "junk.yaml")
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            assert str(error).startswith(("junk.yaml: ", "method.name: "))
        else:
            again = configuration.build(yaml.safe_load(config.to_yaml()), "saved")
            assert again.to_yaml() == config.to_yaml()

    check()


@settings(max_examples=60, deadline=None)
@given(key=st.text(min_size=1, max_size=10), value=st.text(max_size=10))
def test_junk_on_the_command_line_is_refused_in_one_line(key, value):
    try:
        configuration.load(overrides=[f"{key}={value}"])
    except UserError as error:
        assert len(str(error).splitlines()) == 1, str(error)


# ---- changes, saving and coming back --------------------------------------------------------------------------------


def test_changes_name_key_old_and_new():
    old = configuration.load()
    new = configuration.load(overrides=["train.lr=0.5", "model.adapter.r=4", "clients.split={kind: files, files: [a]}"])
    assert configuration.changes(old, new) == {
        "clients.split.files": (None, ["a"]),
        "clients.split.kind": ("iid", "files"),
        "model.adapter.r": (8, 4),
        "train.lr": (1e-3, 0.5),
    }
    assert configuration.changes(old, old) == {}
    assert configuration.changes(old, configuration.load(overrides=["train.lr=0.001"])) == {}


def test_changes_see_the_methods_options():
    old = configuration.load(overrides=[f"method.name={ASKING}"])
    assert configuration.changes(old, configuration.load(base=old.plain(), overrides=["method.first=2"])) == {
        "method.first": (1.0, 2.0)
    }
    assert configuration.changes(configuration.load(), old) == {
        "method.first": (None, 1.0),
        "method.name": ("gradualdiff", str(ASKING)),
    }


VALID = st.fixed_dictionaries(
    {},
    optional={
        "run": st.fixed_dictionaries(
            {},
            optional={
                "name": st.from_regex(r"[A-Za-z0-9._-]{1,9}", fullmatch=True),
                "rounds": st.integers(0, 10**6),
                "seed": st.integers(0, 2**70),
                "timeout": st.floats(1e-9, 1e9),
                "out": st.text(max_size=9),
            },
        ),
        "data": st.fixed_dictionaries(
            {},
            optional={
                "template": st.text(max_size=9),
                "validation": st.floats(0, 0.99) | st.text(max_size=9),
                "columns": st.dictionaries(st.sampled_from(["prompt", "text"]), st.text(max_size=5)),
            },
        ),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "lr": st.floats(0, 10) | st.sampled_from(["1e-4", "2E3"]),
                "clip_norm": st.none() | st.floats(1e-6, 10),
                "steps": st.none() | st.integers(1, 99),
                "optimizer": st.sampled_from(["adamw", "sgd"]),
            },
        ),
        "model": st.fixed_dictionaries(
            {"adapter": st.fixed_dictionaries({"targets": st.text(max_size=5) | st.lists(st.text(max_size=5))})}
        ),
        "method": st.sampled_from([{}, {"name": str(ASKING), "first": 0.1}, {"weighting": "examples"}]),
    },
)


@settings(max_examples=60, deadline=None)
@given(tree=VALID)
def test_saved_configuration_comes_back_equal(tree):
    config = configuration.build(tree, "here")
    again = configuration.build(yaml.safe_load(config.to_yaml()), "there")
    assert again == config and again.sha256() == config.sha256()
    assert configuration.changes(config, again) == {}


def test_hash_tells_configurations_apart():
    one, two = configuration.load(), configuration.load(overrides=["run.seed=1"])
    assert one.sha256() == configuration.load().sha256() != two.sha256()
    assert list(yaml.safe_load(one.to_yaml())) == list(configuration.Config.model_fields)


# ---- a method's own options -----------------------------------------------------------------------------------------


def test_method_file_brings_its_options():
    config = configuration.load(overrides=[f"method.name={ASKING}"])
    assert config.plain()["method"] == {"name": str(ASKING), "weighting": "uniform", "first": 1.0}
    assert method.options(config).first == 1.0
    config = configuration.load(overrides=[f"method.name={ASKING}", "method.first=5e-1"])
    assert config.plain()["method"]["first"] == method.options(config).first == 0.5
    assert "first: 0.5" in config.to_yaml()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("method.frist=2", "method.frist: unknown key; did you mean first?"),
        ("method.first=much", "method.first: "),
        ("method.first={a: 1}", "method.first: "),
    ],
)
def test_wrong_option_of_a_method_is_named(word, says):
    assert says in refused(f"method.name={ASKING}", word)


def test_option_of_another_method_is_refused():
    assert "method.first: unknown key" in refused("method.first=2")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1\n", "does not define Options and Server and Client"),
        ("def (:\n", "cannot be loaded: SyntaxError"),
        ("raise RuntimeError('first line\\nsecond line')\n", "cannot be loaded: RuntimeError: first line"),
        ("import no_such_module\n", "cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_method_file_that_is_none(tmp_path, source, says):
    path = tmp_path / "mine.py"
    path.write_text(source)
    assert says in refused(f"method.name={path}")


def test_float_options_are_finite_in_yaml():
    config = configuration.load(overrides=["train.lr=1e-7", "model.adapter.alpha=1e30"])
    back = yaml.safe_load(config.to_yaml())
    assert back["train"]["lr"] == 1e-7 and math.isfinite(float(back["model"]["adapter"]["alpha"]))
