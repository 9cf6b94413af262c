"""The ways to train a client's adapter that clients.py and gpu_clients.py compare, each in a process of its own.

    python contenders.py prepare WORK            rows, and the adapter that all begin with
    python contenders.py train WORK NAME         train it in one of the ways; prints a line of JSON
    python contenders.py evaluate WORK NAME ...  the held-out loss of what they trained; prints a line of JSON

WORK is a directory with a model and settings.json. All see the same rows, tokenised and masked beforehand; those that
keep an order see them in gdmpi's. A few other rows come first, untimed; then the adapter's first values are put back.
"""

import contextlib
import ctypes
import gc
import json
import sys
import time
from pathlib import Path

import numpy as np

LORA = {"r": 64, "alpha": 64}
LR, CLIP = 1e-3, 0.3
WARM, TIMED = 0, 1  # gdmpi's clients: their rows
EVALUATED = 8  # held-out rows at once
IGNORED = -100  # the label of what carries no loss


class Work:
    """A directory with what a comparison consists of; its settings are attributes."""

    def __init__(self, place):
        self.place = Path(place)
        self.__dict__.update(json.loads((self.place / "settings.json").read_text(encoding="utf-8")))

    def rows(self, part):
        from gdmpi.encode import Rows

        with np.load(self.place / f"{part}.npz") as arrays:
            return Rows.from_arrays(arrays)

    def config(self, *words):
        """gdmpi's configuration of the comparison."""
        from gdmpi import config

        return config.load(
            None,
            [
                f"model.name={self.model}",
                f"model.quantize={self.quantize}",
                f"model.adapter.r={LORA['r']}",
                f"model.adapter.alpha={LORA['alpha']}",
                f"data.name={self.data}",
                f"data.max_length={self.max_length}",
                "data.validation=0",
                "data.test=0",
                "clients.count=1",
                f"train.batch_size={self.batch}",
                f"train.lr={LR}",
                f"train.clip_norm={CLIP}",
                f"train.threads={self.threads}",
                f"run.device={self.device}",
                f"run.cache={self.place / 'cache'}",
                *words,
            ],
        )

    def base(self, dtype=None):
        """The frozen base, loaded as one does without gdmpi; in 4 bits on a GPU it is computed with in bfloat16."""
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        dtype = dtype or ("bfloat16" if self.device == "cuda" else "float32")
        extra = {"dtype": getattr(torch, dtype)}
        if self.quantize == "nf4":
            extra["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=extra["dtype"],
            )
        network = AutoModelForCausalLM.from_pretrained(self.model, device_map={"": self.device}, **extra)
        network.config.use_cache = False
        return network

    def adapted(self, network):
        """The base with the adapter on it, as it is before training."""
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        network = get_peft_model(network, lora)
        if (self.place / "initial.safetensors").exists():
            self.put(network)
        return network

    def put(self, network, name="initial"):
        """Load an adapter's values into a network."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(network, load_file(self.place / f"{name}.safetensors"))

    def keep(self, network, name):
        """Save the values of a network's adapter."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        arrays = {key: p.detach().float().cpu().clone() for key, p in get_peft_model_state_dict(network).items()}
        save_file(arrays, self.place / f"{name}.safetensors")


# ---- what all begin with --------------------------------------------------------------------------------------------


def prepare(work):
    """Tokenise, choose the rows to warm up with, to train on and to evaluate with, and draw the adapter."""
    import torch

    from gdmpi import data, libraries, model

    config = work.config()
    libraries.environment(config.run.cache)
    tokenizer = model.tokenizer(work.model)
    rows = data.prepare(config, tokenizer).train[0]
    if work.cut:  # one long text in pieces of the same length, all of which carries loss but what nothing predicts
        count = len(rows.tokens) // work.cut
        target = np.ones((count, work.cut), bool)
        target[:, 0] = False
        tokens, starts = rows.tokens[: count * work.cut], np.arange(count + 1, dtype=np.int64) * work.cut
        rows = data.Rows(tokens, target.reshape(-1), starts, np.arange(count))
    # where there are too few rows for the steps, they come again
    sizes = {"held": work.held, "warm": work.warm * work.batch, "timed": work.steps * work.batch}
    order = np.random.default_rng(0).permutation(len(rows))
    held, order = order[: work.held], order[work.held :]
    places = np.split(np.resize(order, sizes["warm"] + sizes["timed"]), [sizes["warm"]])
    for part, ids in zip(sizes, (held, *places), strict=True):
        np.savez(work.place / f"{part}.npz", **rows.take(ids).arrays())
    torch.manual_seed(0)
    work.keep(work.adapted(work.base()), "initial")
    timed = work.rows("timed")
    padded = sum(data.pad(timed, ids)[0].size for ids in order_of(work, TIMED))
    return {"rows": len(timed), "tokens": len(timed.tokens), "target": timed.target_tokens, "padded": padded}


def order_of(work, client):
    """The batches of rows that gdmpi trains a client on, in its order."""
    from gdmpi import data, rng

    rows = work.rows(("warm", "timed")[client])
    return data.batches(rows, work.batch, rng.stream(0, "order", 1, client))


class Memory:
    """The most memory that training takes, and the process, in bytes: of the GPU if there is one, else resident."""

    def __init__(self, device):
        self.cuda = device == "cuda"
        gc.collect()
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self.most = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what loading has freed is no room that training gets for nothing
            self.most = status("VmHWM")
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self.before = status("VmRSS")

    def taken(self):
        if self.cuda:
            import torch

            peak = torch.cuda.max_memory_allocated()
        else:
            peak = status("VmHWM")
        return {"step_bytes": peak - self.before, "bytes": max(peak, self.most)}


def status(key):
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def now(device):
    """(seconds, CPU seconds of this process), when the device has done all that it was told to do."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def measured(began, ended, tokens, steps, memory):
    """What a contender has to show."""
    seconds, cpu = (ended - began).tolist()
    return {"seconds": seconds, "cpu": cpu, "tokens": tokens, "steps": steps} | memory.taken()


# ---- the contenders -------------------------------------------------------------------------------------------------


def gdmpi(work, *words):
    """gdmpi's local training, by itself: its defaults, or other words of its configuration."""
    import torch
    from safetensors.numpy import load_file

    from gdmpi import config as configuration, libraries, model, train

    known = configuration.Train.model_fields
    config = work.config(*(word for word in words if word.partition("=")[0].removeprefix("train.") in known))
    libraries.environment(config.run.cache)
    device = model.choose_device(config, 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.use_deterministic_algorithms(True, warn_only=True)  # as in a run
    trainable = model.build(config, device)
    initial, first = trainable.values(), load_file(work.place / "initial.safetensors")
    for name in initial:
        initial[name][...] = first[name]
    trainable.load(initial)
    trainer = train.Trainer(trainable, config, {WARM: work.rows("warm"), TIMED: work.rows("timed")})
    memory = Memory(work.device)
    trainer(1, WARM)
    trainable.load(initial)
    began = now(work.device)
    result = trainer(1, TIMED)
    ended = now(work.device)
    assert result["tokens"] == work.rows("timed").target_tokens
    return trainable.model, measured(began, ended, result["tokens"], result["steps"], memory)


def transformers(work, network, make):
    """Train a network with a Trainer of transformers or of TRL; make gives one for some rows."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Times the steps alone: what a Trainer sets up before the first of them does not count against it."""

        began = ended = None

        def on_step_begin(self, *_, **__):
            self.began = now(work.device) if self.began is None else self.began

        def on_step_end(self, *_, **__):
            self.ended = now(work.device)

    memory, target = Memory(work.device), work.rows("timed").target_tokens
    make(network, table(work, WARM)).train()
    work.put(network)
    trainer, watch = make(network, table(work, TIMED)), Watch()
    trainer.add_callback(watch)
    trainer.train()
    tokens = sum(label != IGNORED for row in trainer.train_dataset for label in row["labels"])
    assert tokens == target, f"{tokens} target tokens, not {target}"
    return network, measured(watch.began, watch.ended, tokens, trainer.state.global_step, memory)


def table(work, client):
    """A client's rows as a table, in the order in which gdmpi trains on them."""
    import datasets

    rows, found = work.rows(("warm", "timed")[client]), []
    for i in np.concatenate(order_of(work, client)):
        tokens, target = rows.row(i)
        found.append({"input_ids": tokens.tolist(), "labels": np.where(target, tokens, IGNORED).tolist()})
    return datasets.Dataset.from_list(found)


def arguments(work, **others):
    """What all the Trainers are told; the rest are their defaults."""
    told = {
        "output_dir": str(work.place / "trainer"),
        "per_device_train_batch_size": work.batch,
        "num_train_epochs": 1,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "train_sampling_strategy": "sequential",
        "use_cpu": work.device == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return told | others


def plain_trainer(work, dtype=None, checkpointing=False, **others):
    """transformers' Trainer with peft and a collator that pads to the longest row of a batch."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def make(network, rows):
        return Trainer(
            network,
            TrainingArguments(**arguments(work, gradient_checkpointing=checkpointing, **others)),
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            train_dataset=rows,
        )

    network = work.base(dtype)
    if work.quantize != "none":
        from peft import prepare_model_for_kbit_training

        network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=checkpointing)
    elif checkpointing:
        network.enable_input_require_grads()
    return transformers(work, work.adapted(network), make)


def sft_trainer(work, dtype=None, accumulate=False, **others):
    """TRL's SFTTrainer. With packing a step has as many sequences of max_length as it takes for as many tokens.

    accumulate: one such sequence at a time, since without FlashAttention all of a batch attend to each other's square.
    """
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer, pack_dataset

    size = {}
    if others.get("packing"):
        sequences = len(pack_dataset(table(work, TIMED), work.max_length, "bfd"))
        wanted = -(-sequences // work.steps)
        size = {"per_device_train_batch_size": 1 if accumulate else wanted}
        size["gradient_accumulation_steps"] = wanted if accumulate else 1

    def make(network, rows):
        told = {"gradient_checkpointing": False, "max_length": work.max_length, "completion_only_loss": True}
        tokenizer = AutoTokenizer.from_pretrained(work.model)
        config = SFTConfig(**arguments(work, **(told | size | others)))
        return SFTTrainer(network, config, train_dataset=rows, processing_class=tokenizer)

    return transformers(work, work.adapted(work.base(dtype)), make)


GROUPED = {"bf16": True, "train_sampling_strategy": "group_by_length"}
CONTENDERS = {
    "gdmpi": gdmpi,
    "gdmpi float32": lambda work: gdmpi(work, "train.dtype=float32"),
    "Trainer": plain_trainer,
    "Trainer, bf16, by length": lambda work: plain_trainer(work, **GROUPED),
    "Trainer, bf16 base, by length": lambda work: plain_trainer(work, "bfloat16", **GROUPED),
    "Trainer, bf16": lambda work: plain_trainer(work, bf16=True),
    "Trainer, bf16, checkpointing": lambda work: plain_trainer(work, checkpointing=True, bf16=True),
    "SFTTrainer, float32": lambda work: sft_trainer(work, bf16=False),
    "SFTTrainer": lambda work: sft_trainer(work, bf16=True),
    "SFTTrainer, by length": lambda work: sft_trainer(work, **GROUPED),
    "SFTTrainer packing": lambda work: sft_trainer(work, packing=True, bf16=True),
    "SFTTrainer packing, float32": lambda work: sft_trainer(work, packing=True, bf16=False),
    "SFTTrainer packing, one by one": lambda work: sft_trainer(work, packing=True, accumulate=True, bf16=True),
}


# ---- what they have learnt ------------------------------------------------------------------------------------------


def evaluate(work, names):
    """{name: held-out loss} of adapters, by the same plain function for all, in float32 without a GPU."""
    import torch

    rows, result = work.rows("held"), {}
    rows = rows.take(np.argsort(np.diff(rows.starts)))  # by length: less padding
    network = work.adapted(work.base()).eval()
    for name in names:
        work.put(network, name)
        total = count = 0
        for begin in range(0, len(rows), EVALUATED):
            tokens, attention, labels = batch(rows, range(begin, min(begin + EVALUATED, len(rows))), work.device)
            with torch.inference_mode():
                logits = network(input_ids=tokens, attention_mask=attention).logits[:, :-1].float()
            wanted = labels[:, 1:].reshape(-1)
            each = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted, reduction="none")
            total, count = total + float(each.double().sum()), count + int((wanted != IGNORED).sum())
        result[name] = total / count
    return result


def batch(rows, ids, device):
    """Rows padded at the right: (tokens, attention mask, labels)."""
    import torch

    pieces = [[torch.from_numpy(array) for array in rows.row(i)] for i in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad([tokens.long() for tokens, _ in pieces], batch_first=True)
    attention = pad([torch.ones(len(tokens), dtype=torch.long) for tokens, _ in pieces], batch_first=True)
    target = pad([target for _, target in pieces], batch_first=True)
    labels = torch.where(target, tokens, IGNORED)
    return tokens.to(device), attention.to(device), labels.to(device)


def main(what, place, *names):
    work = Work(place)
    with contextlib.redirect_stdout(sys.stderr):  # Trainers print what they log
        if what == "train" and work.device == "cpu":
            import torch

            torch.set_num_threads(work.threads)
        if what == "train":
            network, result = CONTENDERS[names[0]](work)
            work.keep(network, names[0])
        else:
            result = prepare(work) if what == "prepare" else evaluate(work, names)
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
