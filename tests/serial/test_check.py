"""gdmpi check: exact counts without weights or a network, estimates that hold, and each mistake in one line."""

import re
import resource
from pathlib import Path

import pytest
import yaml
from conftest import launch, tiny_rows, within, write_rows

from gdmpi import check, config as configuration, data, libraries, needs, report
from gdmpi.config import UserError

KNOWN = yaml.safe_load(check.SHAPES.read_text(encoding="utf-8"))
LLAMA = Path(__file__).parents[2] / "configs" / "llama2-7b-mental-health.yaml"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """No hub answers, and what a developer has in the hub's cache is out of sight."""
    from huggingface_hub import constants

    monkeypatch.setattr(libraries, "hub_answers", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def settings(*overrides, path=None, cache="/nowhere"):
    return configuration.load(path, [f"run.cache={cache}", *overrides])


def said(*overrides, **more):
    return "\n".join(check.report(settings(*overrides, **more)))


def test_the_papers_recipe_in_a_process_of_its_own(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    found = launch(["check", LLAMA], cwd=tmp_path, timeout=120).ok().out
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 20  # of CPU; four on an idle machine
    assert "6,738,415,616 parameters, frozen" in found
    assert "159,907,840 trainable parameters" in found
    assert "639.6 MB down and 639.6 MB up per client and round" in found
    assert "64.0 GB in 10 rounds of 5 clients" in found
    assert "3.3 GB in 4-bit NF4 (4.127 bits a weight), 524.8 MB in bfloat16" in found
    assert "HF_TOKEN" in found and "13.5 GB of https://huggingface.co/meta-llama/Llama-2-7b-hf" in found
    assert "data.name: data/mental_health.jsonl is not here yet" in found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", KNOWN)
def test_a_published_shape_has_the_published_parameters(name):
    assert check.lay_out(settings(f"model.name={name}")).parameters == KNOWN[name]["parameters"]


@pytest.mark.parametrize("clients, up", [(64, 4), (65, 8)])
def test_beyond_64_clients_a_round_the_sums_need_wider_integers(clients, up):
    shape = check.lay_out(settings("model.name=Qwen/Qwen2.5-0.5B", f"clients.count={clients}"))
    assert shape.codec.nbytes() == up * shape.nbytes // 4


def test_bytes_of_a_round_are_by_the_methods_formula():
    """Of 10 rounds of 5 clients: FFA sends B alone, RoLoRA B and A in turn, FLoRA all factors to each client."""

    def travels(method):
        text = said(f"method.name={method}", "model.name=demo", "clients.count=5", "run.rounds=10")
        return re.search(r"travels +(.*) down and (.*) up .*; (.*) in 10 rounds of 5 clients", text).groups()

    assert travels("fedit") == travels("gradualdiff")
    sizes = {
        method: [_bytes(text) for text in travels(method)] for method in ("fedit", "ffa", "rolora", "flora", "fedex")
    }
    down, up, whole = sizes["fedit"]
    assert down == up and whole == pytest.approx(50 * (down + up), rel=0.01)
    assert sizes["ffa"][0] == sizes["ffa"][1] == sizes["rolora"][1] < down
    assert sizes["rolora"][2] == pytest.approx(whole / 2, rel=0.01)
    assert sizes["flora"][:2] == pytest.approx([5 * down, up], rel=0.05)
    assert sizes["fedex"][:2] == pytest.approx([7 * down, up], rel=0.05)


def _bytes(text):
    number, unit = text.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]


def test_only_the_clients_of_a_round_count():
    text = said("clients.count=100", "clients.per_round=0.1", "run.rounds=3", "model.name=meta-llama/Llama-2-7b-hf")
    assert "100, 10 a round" in text and "in 3 rounds of 10 clients" in text


def test_counts_are_those_of_the_model_that_is_built(tiny):
    import torch

    from gdmpi import model

    config = configuration.load(tiny / "tiny.yaml")
    built, shape = model.build(config, torch.device("cpu")), check.lay_out(config)
    assert shape.parameters == built.base_parameters
    assert shape.nbytes == built.schema.nbytes and shape.codec.schema == built.schema
    frozen = [layer for name, layer in model.linear_layers(built.model) if name.endswith("base_layer")]
    assert shape.linear == sum(layer.weight.numel() for layer in frozen)
    assert shape.sizes.own + shape.sizes.last == sum(layer.in_features for layer in frozen)


def test_a_4_bit_weight_takes_the_stated_bits():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    import torch

    weight = torch.randn(2048, 2048)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    parts = (packed, state.absmax, state.state2.absmax)
    bits = 8 * sum(part.numel() * part.element_size() for part in parts) / weight.numel()
    assert bits == pytest.approx(needs.NF4_BITS, rel=1e-3)


def test_the_device_decides_on_the_dtype_and_on_what_lies_where():
    nf4 = ("model.name=meta-llama/Llama-2-7b-hf", "model.quantize=nf4")
    gpu, cpu = said(*nf4, "run.device=cuda"), said(*nf4, "run.device=cpu")
    assert "524.8 MB in bfloat16" in gpu and "in host memory" in gpu
    assert "1.0 GB in float32" in cpu and "in host memory" not in cpu
    assert "13.5 GB in float16" in said("model.name=meta-llama/Llama-2-7b-hf")


def test_a_base_on_the_cpu_is_there_once_a_node_and_what_is_made_of_it_takes_disk(tiny, tmp_path):
    from gdmpi import bases, model

    words = {"path": tiny / "tiny.yaml", "cache": tmp_path}
    for choice in ([], ["model.dtype=bfloat16"], ["model.quantize=nf4", "run.device=cpu"]):
        text = said(*choice, **words)
        assert ", mapped: once a node\n" in text and "for every further rank of the node" in text
        assert ("the base as it is used, made by the first run" in text) == bool(choice)
    config = settings("model.quantize=nf4", "run.device=cpu", **words)
    device = model.choose_device(config, 0)
    entry = model.kept(config, device)
    assert bases.make(entry, lambda: model.load_base(config, device, fresh=True)) == []
    stated = float(re.search(rf"disk +([\d.]+) kB in {tmp_path}/bases:", said(*choice, **words))[1])
    # so small a model has more of names, tables of 16 values and JSON than of weights
    weights = model.load_base(config, device).state_dict()
    del weights["lm_head.weight"]  # tied
    assert stated == pytest.approx(sum(t.nbytes for name, t in weights.items() if "quant_" not in name) / 1e3, rel=0.05)
    unknown = said("model.name=Qwen/Qwen2.5-0.5B", "model.dtype=float32", "run.device=cpu")
    assert "2.0 GB in /nowhere/bases" in unknown
    assert "/bases" not in said("model.name=Qwen/Qwen2.5-0.5B", "run.device=cpu")
    on_gpu = said("model.name=Qwen/Qwen2.5-0.5B", "model.quantize=nf4", "run.device=cuda")
    assert "/bases" not in on_gpu and "once a node" not in on_gpu


def test_keys_and_values_of_answers_count_where_they_are_more_than_a_step():
    pytest.importorskip("sacrebleu")
    words = ["model.name=meta-llama/Llama-2-7b-hf", "model.quantize=nf4", "run.device=cuda", "train.pass_tokens=512"]
    without, some, many = (said(*words, f"evaluation.generate={n}", "data.max_length=1024") for n in (0, 1, 50))
    # 2 x 32 layers x 4096 numbers of 2 bytes a token; 16 x (1024 + 128) tokens are cut at 16384
    assert (
        f"answering prompts, {2 * 32 * 4096 * 2 * 16384 / 1e9:.1f} GB of it keys and values; more than a step" in many
    )
    assert "answering prompts" not in without + some

    def together(text):
        return float(re.search(r"([\d.]+) GB  together", text)[1])

    assert together(without) == together(some) < together(many) - 5


def test_local_data_is_counted_for_the_clients(tiny):
    text = said(path=tiny / "tiny.yaml", cache=tiny / "cache")
    assert "60 rows; columns prompt, response; template plain" in text
    assert "48 rows (0 dropped," in text and "16 training rows a client, 4 steps a round" in text
    assert "nothing: the model is here" in text
    assert re.search(r"a client's round takes about [\d.e-]+ s on this machine, with 1 core to itself", text)


def test_rows_that_are_cut_or_dropped_are_counted(tiny):
    for length in (16, 18, 20):
        text = said(f"data.max_length={length}", path=tiny / "tiny.yaml", cache=tiny / "cache")
        kept, dropped, cut = map(int, re.search(r"train +(\d+) rows \((\d+) dropped, (\d+) cut\)", text).groups())
        assert kept + dropped == 48 and dropped + cut > 0


def test_a_file_a_client_is_read_client_by_client_and_a_sites_not_at_all(tiny, tmp_path):
    for client in range(3):
        write_rows(tmp_path / f"{client}.jsonl", tiny_rows(20 + 10 * client))
    files = f"clients.split={{kind: files, files: '{tmp_path}/*.jsonl'}}"
    text = said(files, path=tiny / "tiny.yaml", cache=tmp_path / "cache")
    assert "1.jsonl: 30 rows" in text and "16 to 32 training rows a client, 4 to 8 steps a round" in text
    (tmp_path / "0.jsonl").write_text("broken")
    assert "not read here" in said(files, "clients.boundary=site", path=tiny / "tiny.yaml")
    with pytest.raises(UserError, match="line 1 is not valid JSON"):
        said(files, path=tiny / "tiny.yaml", cache=tmp_path / "cache")


def columns_of(text, first):
    """The numbers of the line of a split's table that begins so, a dash being none."""
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [first] and len(line.split()) > 4]
    return [0 if word == "-" else int(word.replace(",", "")) for word in line.split()[1:]]


def test_a_split_is_a_table_of_clients_and_values(tiny):
    text = said("clients.split={kind: by, column: topic}", path=tiny / "tiny.yaml", cache=tiny / "cache")
    assert "3, split by topic, 3 a round" in text and "rows of each value of topic" in text
    everyone, clients = columns_of(text, "all"), [columns_of(text, str(client)) for client in range(3)]
    assert [sum(column) for column in zip(*clients, strict=True)] == everyone and everyone[0] == 48
    assert all(sum(row[3:]) == row[0] for row in [everyone, *clients])
    assert f"train       48 rows (0 dropped, 0 cut): {everyone[1]:,} tokens, loss on {everyone[2]:,}" in text
    assert sum(count > 0 for row in clients for count in row[3:]) == 4, "each colour has one client"
    text = said(
        "clients.split={kind: dirichlet, column: topic, alpha: 1}", path=tiny / "tiny.yaml", cache=tiny / "cache"
    )
    assert "3, split by Dirichlet(1.0) over topic, 3 a round" in text
    assert columns_of(text, "all")[:1] + columns_of(text, "all")[3:] == everyone[:1] + everyone[3:]
    assert "split" not in said(path=tiny / "tiny.yaml", cache=tiny / "cache")


def test_a_large_split_is_cut_to_what_can_be_read(tiny, tmp_path):
    rows = [row | {"topic": f"a rather\nlong name, number {i % 70}"} for i, row in enumerate(tiny_rows(300))]
    name = f"data.name={write_rows(tmp_path / 'many.jsonl', rows)}"
    words = {"path": tiny / "tiny.yaml", "cache": tmp_path / "cache"}
    split = "clients.split={kind: dirichlet, column: topic, alpha: 100}"
    lines = check.report(settings(name, "clients.count=40", split, **words))
    assert all("\n" not in line and len(line) < 125 for line in lines if str(tmp_path) not in line)
    begin = next(i for i, line in enumerate(lines) if line.startswith("  split"))
    assert lines[begin + 1].split()[:2] == ["client", "rows"] and lines[begin + 1].endswith("the others")
    assert [line.split()[0] for line in lines[begin + 2 : begin + 18]] == [str(client) for client in range(16)]
    assert re.fullmatch(r" +24 more, of \d+ to \d+ rows", lines[begin + 18])
    everyone = columns_of("\n".join(lines), "all")
    assert everyone[0] == sum(everyone[3:]) == 240


def test_very_unequal_clients_are_said_by_check_and_by_the_run(tiny, tmp_path):
    sizes = {"one": 50, "two": 4}
    rows = [row | {"topic": name} for name, n in sizes.items() for row in tiny_rows(n)]
    words = [
        f"data.name={write_rows(tmp_path / 'rows.jsonl', rows)}",
        "clients={count: 2, split: {kind: by, column: topic}}",
    ]
    words += ["data.validation=0", "data.test=0"]
    line = "clients have 4 to 50 training rows and each counts the same; method.weighting=examples weighs by rows"
    assert f"  warning  {line}" in said(*words, path=tiny / "tiny.yaml", cache=tmp_path / "cache")
    words += [f"run.out={tmp_path}", f"run.cache={tmp_path / 'cache'}", "run.rounds=0"]
    assert f"warning: {line}" in launch(["run", tiny / "tiny.yaml", *words]).ok().out
    assert f"warning: round 0: {line}" in report.show(tmp_path / "tiny")
    weighed = said(*words, "method.weighting=examples", path=tiny / "tiny.yaml", cache=tmp_path / "cache")
    assert "each counts the same" not in weighed


def test_a_column_that_the_data_lack_is_one_line(tiny):
    with pytest.raises(UserError, match=r"^clients.split.column: .*data.jsonl has no column 'topi'; it has prompt, "):
        said("clients.split={kind: by, column: topi}", path=tiny / "tiny.yaml", cache=tiny / "cache")
    with pytest.raises(UserError, match="^clients.count: 5 clients but only 4 values"):
        said("clients={count: 5, split: {kind: by, column: topic}}", path=tiny / "tiny.yaml", cache=tiny / "cache")


def test_what_is_missing_is_said_and_no_error(tiny):
    text = said("data.name=texts/none.jsonl", "data.test=/none/test.csv", path=tiny / "tiny.yaml")
    assert "data.name: texts/none.jsonl is not here yet" in text and "data.test: /none/test.csv is not here" in text
    text = said("data.name=owner/texts", path=tiny / "tiny.yaml")
    assert "https://huggingface.co/datasets/owner/texts into" in text and "--download" in text


def test_a_target_that_the_model_lacks_is_warned_of(tiny):
    text = said("model.adapter.targets=[q_proj, c_attn]", path=tiny / "tiny.yaml", cache=tiny / "cache")
    assert "warning  LoRA is not on c_attn" in text


@pytest.mark.parametrize(
    "override, expected",
    [
        ("model.name=/x/y", "model.name: there is no directory /x/y"),
        ("model.name=./x", "model.name: there is no directory"),
        ("model.name=some/model", "model.name: some/model: there is no directory .*hub cannot be reached"),
        ("model.adapter.targets=c_attn", "model.adapter.targets: c_attn: .* linear layers are down_proj, gate_proj"),
        ("data.columns.prompt=question", "data.columns.prompt: .* has no column 'question'"),
        ("data.template=chat", "data.template: chat, but the tokenizer has no chat template"),
    ],
)
def test_errors_are_one_line(tiny, override, expected):
    with pytest.raises(UserError, match=expected) as error:
        said(override, path=tiny / "tiny.yaml", cache=tiny / "cache")
    assert "\n" not in str(error.value)


def test_a_wrong_config_json_is_one_line(tmp_path):
    for text, expected in (("{}", "cannot read"), ("no json", "cannot read"), ('{"model_type": "vit"}', "vit|ViT")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=expected) as error:
            said(f"model.name={tmp_path}")
        assert "\n" not in str(error.value)


def test_the_command_line_says_errors_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["model.name=/x/y"], ["missing.yaml"], ["model.nam=x"]):
        result = within(["check", *arguments])
        assert result.code == 2 and result.out == "" and result.err.count("\n") == 1, result.err


# ---- the hub -------------------------------------------------------------------------------------------------------


def fill_cache(tiny):
    """Lay the tiny model into the hub's cache as a download does."""
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE) / "models--some--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots" / "abc").mkdir(parents=True)
    for path in (tiny / "model").iterdir():
        (place / "snapshots" / "abc" / path.name).write_bytes(path.read_bytes())
    return place / "snapshots" / "abc"


def test_a_cached_model_is_here(tiny):
    place = fill_cache(tiny)
    config = settings("model.name=some/model", path=tiny / "tiny.yaml", cache=tiny / "cache")
    assert check.lay_out(config).directory == place
    assert "nothing: the model is here" in "\n".join(check.report(config))


def test_download_fetches_the_model_and_the_data(tiny, monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def snapshot(name, **patterns):
        asked.append((name, patterns))
        return str(fill_cache(tiny))

    monkeypatch.setattr(libraries, "hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(data, "read", lambda name, config, cache: asked.append((name, cache)))
    check.download(settings("model.name=some/model", "data.name=owner/texts", cache=tmp_path))
    (name, patterns), table = asked
    assert name == "some/model" and "*.safetensors" in patterns["allow_patterns"]
    assert table == ("owner/texts", str(tmp_path / "datasets"))
    asked.clear()
    check.download(configuration.load(tiny / "tiny.yaml"))
    assert not asked, "what is local is not asked for"


def test_download_errors_are_one_line(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    config = settings("model.name=some/model")
    with pytest.raises(UserError, match="model.name: some/model: the hub cannot be reached"):
        check.download(config)
    monkeypatch.setattr(libraries, "hub_answers", lambda: True)
    gated = GatedRepoError.__new__(GatedRepoError)  # its __init__ wants the answer of a server
    for problem, expected in (
        (gated, "is gated: accept its terms .* HF_TOKEN"),
        (OSError("No space left on device\nmore"), "cannot be downloaded .No space left"),
    ):

        def fail(*_, problem=problem, **__):
            raise problem

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(UserError, match=expected) as error:
            check.download(config)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UserError, match="no safetensors"):
        check.download(config)


def test_only_small_files_and_safetensors_are_fetched():
    from huggingface_hub.utils import filter_repo_objects

    published = [
        *("config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"),
        *("model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *("pytorch_model-00001-of-00002.bin", "original/consolidated.00.pth", "consolidated.safetensors", "README.md"),
        *("onnx/model.onnx", "fp16/model.safetensors", "model.gguf"),
    ]
    kept = list(filter_repo_objects(published, allow_patterns=check.FETCHED, ignore_patterns=check.LEFT))
    assert kept == published[:7]


def test_the_report_is_for_people_and_fits_a_terminal(tiny):
    lines = check.report(settings(path=tiny / "tiny.yaml", cache=tiny / "cache"))
    assert all("\n" not in line and (len(line) < 125 or str(tiny) in line) for line in lines)
