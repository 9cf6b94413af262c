"""Membership inference: its measures against their definitions, its scores against plain passes of transformers."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import first, tiny_rows, within, write_rows
from hypothesis import given, settings, strategies as st
from test_equivalence import alone, configured

from gdmpi import audit, data, log, model, run
from gdmpi.errors import UserError

MEMORISE = ["clients.count=1", "run.rounds=1", "train.epochs=40", "train.lr=0.01", "model.adapter.kind=full"]


def played(tiny, *words):
    """The directory of a run in this process."""
    config = configured(tiny, *words)
    run.play(alone(), config, log.Log(False))
    return config.directory


@pytest.fixture(scope="module")
def nonsense(tiny):
    """Rows that can only be learnt by heart; 40 are for training, 120 for the test."""
    draw = random.Random(3)
    rows = [
        {
            "prompt": f"Box {i}?",
            "response": "".join(draw.choices("abcdefgh", k=12)),
            "part": ["train", "test", "validation"][(i >= 40) + (i >= 160)],
        }
        for i in range(162)
    ]
    path = tiny / "nonsense.jsonl"
    return write_rows(path, rows) if first() else path


@pytest.fixture(scope="module")
def memorised(tiny, nonsense):
    """The directory of a run that has learnt its training rows by heart."""
    return played(tiny, *MEMORISE, *parts_of(nonsense))


@pytest.fixture(scope="module")
def learnt(tiny, nonsense):
    """The directory of a run of three clients and an adapter on the same rows."""
    return played(tiny, "run.rounds=1", "train.lr=0.02", *parts_of(nonsense))


def parts_of(path):
    return [f"data.name={path}", "data.split_column=part", "data.validation=validation", "data.test=test"]


@pytest.fixture(scope="module")
def short(tiny):
    """The directory of a short run, of 48 training, 6 validation and 6 test rows."""
    return played(tiny, "run.rounds=1", "train.steps=2")


def audited(source, *words):
    return audit.audit(alone(), source, list(words))


def nothing_found(compared):
    """Instead of audit.attack: keeps what it was to compare."""

    def attack(members, others, generator):
        compared.append((members, others))
        return {"auc": 0.5, "auc_95": [0.5, 0.5], "tpr": None, "tpr_95": None, "tpr_guessing": None}

    return attack


# ---- measures ------------------------------------------------------------------------------------------------------


def by_definition(members, others):
    """(AUC, true-positive rate at 1 % false positives) from all pairs, and from all thresholds."""
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    flagged = [([m >= t for m in members], [o >= t for o in others]) for t in {*members, *others}]
    return np.mean(pairs), max([np.mean(hits) for hits, false in flagged if np.mean(false) <= 0.01], default=0.0)


@given(st.integers(1, 40), st.integers(1, 320), st.integers(1, 60), st.integers(0, 8), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_rates_are_what_their_definitions_say(members, others, values, ahead, seed):
    draw = np.random.default_rng(seed)
    members, others = draw.integers(0, values, members) + ahead, draw.integers(0, values, others)
    size = values + ahead
    found = audit.rates(*(np.bincount(part, minlength=size)[None] for part in (members, others)))
    assert [part.item() for part in found] == pytest.approx(by_definition(members.tolist(), others.tolist()), abs=1e-12)
    result = audit.attack(members / 7, others / 7, np.random.default_rng(0))
    assert (result["auc"], result["tpr"] or 0.0) == (found[0], found[1] if len(others) >= 100 else 0)


def test_interval_of_the_auc_is_that_of_its_variance():
    """DeLong, DeLong and Clarke-Pearson's (Biometrics 1988): from each row's share of pairs won."""
    draw = np.random.default_rng(5)
    members, others = draw.normal(0.7, 1, 150), draw.normal(0, 1, 200)
    won = members[:, None] > others
    deviation = np.sqrt(won.mean(1).var(ddof=1) / 150 + won.mean(0).var(ddof=1) / 200)
    result = audit.attack(members, others, np.random.default_rng(0))
    assert result["auc"] == pytest.approx(won.mean(), abs=1e-12)
    assert result["auc_95"] == pytest.approx([won.mean() - 1.96 * deviation, won.mean() + 1.96 * deviation], abs=0.01)
    assert result["tpr_95"][0] < result["tpr"] < result["tpr_95"][1]
    assert audit.attack(members, others, np.random.default_rng(0)) == result


@pytest.mark.parametrize("others", [100, 116, 250])
def test_what_guessing_finds_follows_the_negative_hypergeometric_distribution(others):
    """How many members lie above the highest others but one, but two, ..., whichever 1 % of them allows to be wrong."""
    members, wrong = 300, others // 100
    chances = [
        math.comb(x + wrong, wrong) * math.comb(members + others - x - wrong - 1, others - wrong - 1)
        for x in range(members + 1)
    ]
    whole = math.comb(members + others, others)
    assert sum(chances) == whole
    expected = next(x for x in range(members) if sum(chances[: x + 1]) >= 0.975 * whole)
    draw = np.random.default_rng(2)
    found = audit.attack(draw.normal(size=members), draw.normal(size=others), draw)["tpr_guessing"] * members
    assert abs(found - expected) <= 1.5


@pytest.mark.parametrize(
    ("ahead", "others", "says"),
    [
        (3.0, 150, "better than guessing: of a member and a non-member it names the member in 9"),
        (0.0, 150, "not told from guessing, which gives 0.5; with 1 false alarm in 100 it finds"),
        (-3.0, 150, "below 0.5: members look less like members than others do"),
        (3.0, 99, "better than guessing"),
    ],
)
def test_words_follow_the_numbers(ahead, others, says):
    draw = np.random.default_rng(1)
    result = audit.attack(draw.normal(ahead, 1, 100), draw.normal(0, 1, others), draw)
    means = audit.meaning("loss", {"loss": result})
    assert means.startswith(says)
    told = "with 1 false alarm in 100" in means
    assert all(told == (others >= 100) == (result[key] is not None) for key in ("tpr", "tpr_95", "tpr_guessing"))
    assert (", more than guessing, which finds up to" in means) == (ahead > 0 and told)
    assert ("the rows differ before" in audit.meaning("base", {"base": result})) == (ahead != 0)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ("", "before this training the rows are not told apart, either"),
        ("reference", "before this training the rows are not told apart: what the other scores find comes from it"),
        ("base", "the rows differ before this training"),
        ("base reference", "the rows differ before this training"),
        ("base loss reference", "the rows differ before this training: part of what loss finds is that"),
        ("base loss min_k", "the rows differ before this training: part of what loss and Min-20% find is that"),
    ],
)
def test_words_on_the_base_alone_say_what_applies(found, says):
    def result(auc, tpr):
        return {"auc": auc, "auc_95": [auc - 0.1, auc + 0.1], "tpr": tpr, "tpr_95": [0, 1], "tpr_guessing": 0.05}

    for auc, tpr in ((0.7, 0.0), (0.3, 0.0), (0.55, 0.2)):
        scores = {name: result(0.5, 0.05) for name in audit.SCORES}
        scores |= {name: result(*((0.7, 0) if name == "base" else (auc, tpr))) for name in found.split()}
        assert audit.meaning("base", scores) == says
    for each in scores.values():
        each["tpr"] = None
    assert audit._finds(scores["base"]) == ("base" in found)


# ---- scores --------------------------------------------------------------------------------------------------------


def plain_losses(network, rows):
    """The losses of each row's target tokens, one row at a time."""
    import torch

    found = []
    for i in range(len(rows)):
        tokens, target = rows.row(i)
        with torch.no_grad():
            logits = network.eval()(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].double()
        shares = torch.log_softmax(logits, -1)
        found.append(np.array([-shares[place - 1, tokens[place]].item() for place in np.flatnonzero(target)]))
    return found


WAYS = {
    "lora": ([], []),
    "full": (["model.adapter.kind=full"], []),
    "local": (["method.name=local"], ["client=1"]),
    "centralized": (["method.name=centralized"], []),
    "bfloat16": (["train.dtype=bfloat16"], []),
}


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_those_of_plain_passes(tiny, way, monkeypatch):
    import peft
    import transformers

    settings, words = WAYS[way]
    directory = played(tiny, "run.rounds=1", "train.lr=0.02", *settings)
    compared = []
    monkeypatch.setattr(audit, "attack", nothing_found(compared))
    audited(directory, *words)
    base, network = (transformers.AutoModelForCausalLM.from_pretrained(tiny / "model") for _ in range(2))
    if way == "full":
        network = transformers.AutoModelForCausalLM.from_pretrained(directory / "model")
    else:
        network = peft.PeftModel.from_pretrained(network, directory / "adapter" / ("0001" if way == "local" else ""))
    config = configured(tiny)
    prepared = data.prepare(config, model.tokenizer(config.model.name))
    members = [prepared.train[client] for client in ([1] if way == "local" else prepared.train)]
    others = [prepared.test, prepared.validation]  # six test rows are too few
    close = {"abs": 0.15 if way == "bfloat16" else 1e-4}
    for number, pools in enumerate((members, others)):
        after, before = (
            np.array([x for rows in pools for x in plain_losses(net, rows)], object) for net in (network, base)
        )
        loss = [own.mean() for own in after]
        assert -compared[0][number] == pytest.approx(loss, **close)
        reference = [was.mean() - own for own, was in zip(loss, before, strict=True)]
        assert compared[1][number] == pytest.approx(reference, **close)
        assert -compared[3][number] == pytest.approx([was.mean() for was in before], **close)
        lowest = [sorted(-own)[: max(1, len(own) // 5)] for own in after]
        assert compared[2][number] == pytest.approx([np.mean(low) for low in lowest], **close)
    assert np.ptp(compared[1][0]) > 0.05


def test_what_was_learnt_by_heart_is_found(memorised):
    result = audited(memorised)
    assert result["members"] == {"rows": 40, "of": 40}
    assert result["non_members"] == {"test": {"rows": 120, "of": 120}}
    base = result["scores"].pop("base")  # has learnt none of them
    assert all(found["auc_95"][0] > 0.9 and found["tpr"] > 0.3 for found in result["scores"].values())
    assert "better than guessing" in result["scores"]["reference"]["means"]
    assert base["auc_95"][0] < 0.5 < base["auc_95"][1]


def test_a_model_that_learnt_nothing_gives_nothing_away(tiny, nonsense):
    for words in (["run.rounds=1", "train.lr=0"], ["run.rounds=0"]):
        result = audited(played(tiny, *words, *parts_of(nonsense), "train.dtype=bfloat16"))
        reference = result["scores"]["reference"]
        assert (reference["auc"], reference["auc_95"], reference["tpr"]) == (0.5, [0.5, 0.5], 0.0)
        assert result["scores"]["loss"]["auc"] != 0.5  # rows differ, whatever was learnt


# ---- whose rows ----------------------------------------------------------------------------------------------------


def test_few_test_rows_are_joined_by_validation_rows(short):
    result = audited(short)
    assert result["non_members"] == {"test": {"rows": 6, "of": 6}, "validation": {"rows": 6, "of": 6}}
    assert all(found["tpr"] is None and found["tpr_95"] is None for found in result["scores"].values())
    assert any("cannot be told from fewer than 100 non-members" in note for note in result["notes"])
    assert any("train.steps" in note for note in result["notes"])
    lines = audit.report(result)
    assert "  members      48 of 48 training rows of clients 0, 1, 2" in lines
    assert "  non-members  6 of 6 test rows and 6 of 6 validation rows" in lines
    assert sum("cannot be told" in line for line in lines) == 5


def test_a_sample_is_part_of_all_rows_and_follows_the_seed(learnt, monkeypatch):
    compared = []
    monkeypatch.setattr(audit, "attack", nothing_found(compared))
    for words in ([], ["rows=25"], ["rows=25"]):
        result = audited(learnt, *words)
    assert result["members"] == {"rows": 25, "of": 40} and result["non_members"]["test"] == {"rows": 25, "of": 120}
    whole, part, again = compared[0::4]
    for number in (0, 1):
        assert len(part[number]) == 25 and np.array_equal(part[number], again[number])
        # in other batches the last bits of a loss may be others
        assert np.abs(part[number][:, None] - whole[number]).min(1).max() < 1e-5


def test_members_are_of_clients_that_have_been_trained(tiny):
    directory = played(tiny, "run.rounds=1", "clients.per_round=0.4", "clients.split={kind: by, column: topic}")
    sent = json.loads((directory / "audit.jsonl").read_text().splitlines()[-1])
    (trained,) = map(int, sent["cohort"])
    config = configured(tiny, "clients.split={kind: by, column: topic}")
    rows = data.prepare(config, model.tokenizer(config.model.name)).train
    assert audited(directory)["members"]["of"] == len(rows[trained]) != 48
    assert audited(directory)["clients"] == [trained]
    assert audited(directory, f"client={trained}")["members"]["of"] == len(rows[trained])
    with pytest.raises(UserError, match=f"client={(trained + 1) % 3}: no such client has been trained"):
        audited(directory, f"client={(trained + 1) % 3}")


@pytest.mark.mpi(min_size=3)
def test_any_number_of_ranks_gives_the_same_bits_and_only_what_is_asked_for_is_written(
    tiny, nonsense, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ["run.name=audited", "run.rounds=1", "train.lr=0.02", *parts_of(nonsense)]
    within(["run", tiny / "tiny.yaml", *words]).ok()
    learnt = tiny / "runs" / "audited"
    before = {path: path.stat().st_mtime_ns for path in learnt.rglob("*")}
    out = tmp_path / "out.json"
    one = within(["audit", learnt, "rows=30", "--json", "--out", out]).ok()
    several = within(["audit", learnt, "rows=30", "--json"], ranks=3).ok()
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert one.out == several.out and json.loads(one.out) == json.loads(out.read_text())
    assert one.err == several.err == ""
    assert {path: path.stat().st_mtime_ns for path in learnt.rglob("*")} == before


@pytest.mark.mpi(min_size=3)
def test_sites_are_audited_where_they_are(tiny, tmp_path):
    rows, files = tiny_rows(60), [str(tmp_path / f"{i}.jsonl") for i in range(3)]
    for i, file in enumerate(files if first() else ()):
        write_rows(Path(file), rows[20 * i : 20 * i + 20])
    words = [f"clients.split={{kind: files, files: {files}}}", "clients.boundary=site", "run.rounds=1"]
    within(["run", tiny / "tiny.yaml", "run.name=sites", *words]).ok()
    directory = tiny / "runs" / "sites"
    result = json.loads(within(["audit", directory, "--json"]).ok().out)
    assert result["members"] == {"rows": 48, "of": 48} and result["non_members"]["test"]["of"] == 6
    assert json.loads(within(["audit", directory, "--json"], ranks=3).ok().out) == result


# ---- wrong input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rows=0"], "rows=0: give a whole number"),
        (["rows=9"], r"rows=9: give a whole number, as in rows=1000 \(at least 10\)"),
        (["rows=some"], "rows=some: give a whole number"),
        (["client=3"], "client=3: no such client has been trained; there are 0, 1, 2$"),
        (["row=3"], "the command line: row: unknown key"),
        (["train.rl=3"], "train.rl: unknown key"),
        (["train.lr=3"], "train.lr: an audit is of the run as it was; it takes rows, client, run.device, "),
        (["data.test=0.5"], "data.test: an audit is of the run as it was"),
        (["data.name=elsewhere.jsonl"], "data.name: elsewhere.jsonl: no such file"),
    ],
)
def test_wrong_words(short, words, says):
    with pytest.raises(UserError, match=says) as caught:
        audited(short, *words)
    assert "\n" not in str(caught.value)


def test_wrong_runs(tiny, short, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", tiny_rows(55))
    with pytest.raises(UserError, match="data.name: these are not the rows of the run"):
        audited(short, f"data.name={other}")
    with pytest.raises(UserError, match="no round files here"):
        audited(tmp_path)
    none = played(tiny, "run.rounds=1", "train.steps=1", "data.test=0", "data.validation=0")
    with pytest.raises(UserError, match="no rows were held out that"):
        audited(none)
    each = played(tiny, "run.rounds=1", "train.steps=1", "method.name=local")
    with pytest.raises(UserError, match=r"each client has its own adapter; audit one, as in 'audit .* client=0'"):
        audited(each)
    for words in ([short, "more"], [tmp_path], [short, "--out", tmp_path / "no" / "where.json"]):
        refused = within(["audit", *words])
        assert refused.code == 2 and refused.err.startswith("gdmpi: ") and refused.err.count("\n") == 1


def test_place_for_the_result_is_looked_at_first(tmp_path):
    audit.check_out(None)
    audit.check_out(str(tmp_path / "result.json"))
    with pytest.raises(UserError, match="there is no directory .*missing; make it first"):
        audit.check_out(str(tmp_path / "missing" / "result.json"))
