"""On a GPU: the same bits again, the CPU's losses, real 4-bit weights, the flat vectors and torch's own optimiser."""

import itertools

import numpy as np
import pytest
from conftest import ROOT, launch

from gdmpi import build, checkpoint, config as configuration, data, flat, log, model, mpi, report, rng, run, train

NUMBER = itertools.count()


def missing():
    """Why these tests cannot run here, or an empty text."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else "needs a CUDA device; torch sees none"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(autouse=True)
def deterministic():
    """A run switches torch's deterministic algorithms on; other tests of this process should not inherit that."""
    import torch

    yield
    torch.use_deterministic_algorithms(False)


def configured(tiny, *words):
    given = [f"run.name=cuda-{next(NUMBER)}", "run.device=cuda", *words]
    return configuration.load(tiny / "tiny.yaml", given)


def alone():
    from mpi4py import MPI

    return mpi.Link(MPI.COMM_SELF)


def play(tiny, *words):
    """Run a configuration in this process; returns its Record."""
    return run.play(alone(), configured(tiny, *words), log.Log(False))


def built(tiny, *words):
    import torch

    return model.build(configured(tiny, *words), torch.device("cuda", 0))


def rows_of(tiny, *words):
    config = configured(tiny, *words)
    return data.prepare(config, model.tokenizer(config.model.name)).train


def random_like(trainable, seed):
    values = flat.Flat(trainable.schema)
    values.vector[:] = rng.stream(seed, "test").normal(size=values.vector.size)
    return values


def hashes(book):
    return [row["adapter_sha256"] for row in book.rows]


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_same_run_gives_the_same_bits(tiny, quantize):
    words = [f"model.quantize={quantize}", "model.adapter.dropout=0.1", "run.rounds=2"]
    first, again = play(tiny, *words), play(tiny, *words)
    assert first.config.run.device == "cuda"
    assert hashes(first) == hashes(again) and len(set(hashes(first))) == 3
    assert [row["eval_loss"] for row in first.rows] == [row["eval_loss"] for row in again.rows]
    assert [row["train_loss"] for row in first.rows] == [row["train_loss"] for row in again.rows]
    assert hashes(play(tiny, *words, "run.seed=1")) != hashes(first)


def test_losses_are_the_cpus(tiny):
    import torch

    assert not torch.backends.cuda.matmul.allow_tf32
    gpu, cpu = play(tiny, "run.rounds=2"), play(tiny, "run.rounds=2", "run.device=cpu")
    assert (gpu.config.run.device, cpu.config.run.device) == ("cuda", "cpu")
    for one, two in zip(gpu.rows, cpu.rows, strict=True):
        assert abs(one["eval_loss"] - two["eval_loss"]) < 1e-3
    assert abs(gpu.rows[-1]["test"]["loss"] - cpu.rows[-1]["test"]["loss"]) < 1e-3
    assert gpu.rows[-1]["eval_loss"] < gpu.rows[0]["eval_loss"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_share_a_gpu_give_the_bits_of_one_process(tiny, ranks):
    """A server and one or two client ranks, all client ranks on the same device."""
    words = ["run.device=cuda", "run.rounds=2"]
    seen = []
    for name, count in ((f"single-{ranks}", None), (f"several-{ranks}", ranks)):
        result = launch(
            ["run", tiny / "tiny.yaml", f"run.name={name}", *words],
            count,
            env={"CUDA_VISIBLE_DEVICES": first_device()},
        ).ok()
        shown = report.summary(tiny / "runs" / name)
        seen.append([(row["adapter_sha256"], row["eval_loss"], row["train_loss"]) for row in shown["rounds"]])
    assert seen[0] == seen[1]
    assert ("client ranks share cuda:0" in result.out) == (ranks > 2)


def first_device():
    """What to show to processes that should see one GPU alone: the first of those seen here."""
    import os

    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def test_resumed_on_the_gpu_gives_the_same_bits(tiny):
    words = ["run.rounds=3", "train.keep_optimizer=true", "run.keep=9"]
    config = configured(tiny, *words)
    whole = run.play(alone(), config, log.Log(False))
    state = checkpoint.read(config.directory / checkpoint.name(1))
    again = run.play(alone(), whole.config, log.Log(False), state)
    assert hashes(again) == hashes(whole)


# ---- 4 bits ---------------------------------------------------------------------------------------------------------


def test_nf4_is_really_4_bit_and_learns(tiny):
    import bitsandbytes
    import torch

    trainable, plain = built(tiny, "model.quantize=nf4"), built(tiny)
    layers = model.four_bit_layers(trainable.model)
    assert len(layers) == 14 and trainable.warnings == []
    assert trainable.base_parameters == plain.base_parameters
    for layer in layers:
        assert isinstance(layer.weight, bitsandbytes.nn.Params4bit) and layer.weight.is_cuda
        assert layer.weight.dtype == torch.uint8  # two weights a byte
        assert layer.weight.numel() * 2 == layer.in_features * layer.out_features
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
        assert not layer.weight.requires_grad and layer.compute_dtype == torch.bfloat16
    assert {p.dtype for p in trainable.parameters} == {torch.float32}
    before = [layer.weight.clone() for layer in layers]
    config, rows = configured(tiny, "model.quantize=nf4", "train.epochs=4", "clients.count=1"), rows_of(tiny)
    trainer = train.Trainer(trainable, config, rows)
    losses = [trainer(t, 0)["loss"] for t in (1, 2, 3)]
    assert losses[2] < losses[1] < losses[0] - 0.1
    assert all(torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))
    trainable.check_views()


def test_dtype_of_4_bit_weights_on_a_gpu_is_bfloat16(tiny):
    parts = build.build(alone(), configured(tiny, "model.quantize=nf4"))
    assert parts.config.model.dtype == "bfloat16"
    assert parts.trainable.device.type == "cuda"


# ---- the flat vectors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_flat_views_hold_on_the_gpu(tiny, quantize):
    import torch

    words = [f"model.quantize={quantize}", "train.steps=3"]
    trainable, config, rows = built(tiny, *words), configured(tiny, *words), rows_of(tiny)
    assert trainable.vector.is_cuda and trainable.gradient.is_cuda and trainable.host.is_pinned()
    trainable.check_views()
    values = random_like(trainable, 1)
    trainable.load(values)
    assert flat.sha256(trainable.values()) == flat.sha256(values)
    for p, (name, array) in zip(trainable.parameters, values.items(), strict=True):
        assert p.is_cuda and np.array_equal(p.detach().cpu().numpy(), array), name
    loss = trainable.forward.losses(rows[0], range(4)).mean()
    expected = torch.autograd.grad(loss, trainable.parameters, retain_graph=True)
    trainable.gradient.zero_()
    loss.backward()
    together = torch.cat([gradient.reshape(-1) for gradient in expected])
    torch.testing.assert_close(trainable.gradient, together, rtol=1e-4, atol=1e-6)
    assert trainable.gradient.any()
    train.Trainer(trainable, config, rows)(1, 0)
    trainable.check_views()
    trainable.model.zero_grad()
    with pytest.raises(RuntimeError, match="no longer a view"):
        trainable.check_views()


def test_delta_through_pinned_memory_is_the_plain_difference(tiny):
    trainable = built(tiny)
    for seed in range(3):  # the pinned buffer is used again
        start, end = random_like(trainable, 2 * seed), random_like(trainable, 2 * seed + 1)
        trainable.load(end)
        delta = trainable.delta(start)
        assert delta.schema == start.schema
        assert np.array_equal(delta.part(slice(0, 3)), (end.vector - start.vector)[:3])  # the rest may be on its way
        assert np.array_equal(delta.vector, end.vector - start.vector)
        assert delta.buffer.ctypes.data == trainable.host.data_ptr()
    trainable.load(end)
    assert not trainable.delta(end).vector.any()


# ---- the optimiser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_gives_the_bits_of_torchs_fused_one(tiny, decay):
    import torch

    trainable = built(tiny)
    trainable.load(random_like(trainable, 0))
    copies = [torch.nn.Parameter(p.detach().clone()) for p in trainable.parameters]
    mine, theirs = (
        train.AdamW(trainable.vector, trainable.gradient, decay),
        torch.optim.AdamW(copies, weight_decay=decay, fused=True),
    )
    for step in range(5):
        trainable.gradient.copy_(torch.from_numpy(random_like(trainable, 10 + step).vector))
        for copy, p in zip(copies, trainable.parameters, strict=True):
            copy.grad = p.grad.detach().clone()
        theirs.param_groups[0]["lr"] = 0.01 / (1 + step)
        mine.step(0.01 / (1 + step))
        theirs.step()
        assert all(torch.equal(p, copy) for p, copy in zip(trainable.parameters, copies, strict=True))
    trainable.check_views()


def test_packed_and_compiled_losses_are_the_plain_ones(tiny):
    """Packed against padded, with and without torch.compile, float32: losses of rows and the gradient of a step."""
    import torch

    found, rows = [], rows_of(tiny)[0]
    for words in (["train.packing=false"], [], ["train.compile=true"]):
        trainable = built(tiny, "train.dtype=float32", *words)
        trainable.load(random_like(trainable, 1))
        assert trainable.forward.notes == []
        losses = torch.cat([trainable.forward.losses(rows, [i]) for i in range(6)])
        trainable.forward.losses(rows, range(6)).mean().backward()
        found.append((losses.detach(), trainable.gradient.clone()))
    for losses, gradient in found[1:]:
        torch.testing.assert_close(losses, found[0][0], rtol=1e-3, atol=1e-5)
        assert torch.linalg.norm(gradient - found[0][1]) < 1e-3 * torch.linalg.norm(gradient)


def test_moments_survive_saving(tiny):
    import torch

    trainable = built(tiny)
    one, two = (
        train.AdamW(trainable.vector, trainable.gradient, 0.0),
        train.AdamW(trainable.vector, trainable.gradient, 0.0),
    )
    trainable.gradient.copy_(torch.from_numpy(random_like(trainable, 1).vector))
    one.step(0.01)
    kept = train._on_host(one.state(), {})
    two.restore(kept)
    assert two.first.is_cuda and two.count.is_cuda
    for name in ("first", "second", "count"):
        assert torch.equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("limit", [0.3, 1e9])
def test_clipping_is_torchs(tiny, limit):
    import torch

    trainable = built(tiny)
    trainable.gradient.copy_(torch.from_numpy(random_like(trainable, 1).vector))
    copy = torch.nn.Parameter(trainable.vector.clone())
    copy.grad = trainable.gradient.clone()
    torch.nn.utils.clip_grad_norm_([copy], limit)
    train.clip(trainable.gradient, limit)
    torch.testing.assert_close(trainable.gradient, copy.grad, rtol=1e-5, atol=0)


def test_devices_are_dealt_by_position_among_the_client_ranks(tiny):
    import torch

    config, count = configured(tiny), torch.cuda.device_count()
    assert model.choose_device(config, 0) == torch.device("cuda", 0)
    assert model.choose_device(config, count) == torch.device("cuda", 0)
    assert model.choose_device(config, count - 1) == torch.device("cuda", count - 1)
    assert train.peak_memory(torch.device("cuda", 0)) >= 0


def test_a_message_lies_on_the_gpu_once_for_all_clients(tiny):
    import torch

    link = alone()
    parts = build.build(link, configured(tiny))
    assert link.landing.memory.is_cuda and link.landing.limit == parts.trainable.schema.nbytes
    values = random_like(parts.trainable, 3)
    message = link.bcast(1, values)
    parts.trainable.load(message)
    first = message.there()
    assert first.is_cuda and first.data_ptr() == link.landing.memory.data_ptr()
    assert torch.equal(first.cpu(), torch.from_numpy(values.vector))
    link.landing.memory.zero_()  # a second client takes what is there, and nothing comes from the host again
    parts.trainable.load(message)
    assert not parts.trainable.vector.any()


@pytest.mark.parametrize("fault", ["lands_from_host_memory", "nothing"])
def test_runs_are_the_same_whether_or_not_mpi_writes_into_gpu_memory(tiny, fault):
    """Where MPI is CUDA-aware the second lets it; elsewhere both go through host memory."""
    name = f"landed-{fault}"
    words = [fault, "run", tiny / "tiny.yaml", f"run.name={name}", "run.device=cuda", "run.rounds=2"]
    result = launch(words, 3, program=(ROOT / "tests" / "faults.py",)).ok()
    assert "the GPUs" in result.out
    shown = [row["adapter_sha256"] for row in report.summary(tiny / "runs" / name)["rounds"]]
    assert shown == hashes(play(tiny, "run.rounds=2"))
