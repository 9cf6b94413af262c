"""How quick training is: tokens a second, and the share of its devices' peak that it uses."""

import re

from gdmpi import train

# What a device computes in 16 bits at most, in floating-point operations a second: the figures of NVIDIA's data sheets
# for its tensor cores in bfloat16 (float16: V100), halved where a sheet gives them "with sparsity". A device is known
# by words of its name in torch; the first line of which all words are there counts.
PEAKS = (
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100 HBM3", 989e12),  # the SXM module is called NVIDIA H100 80GB HBM3
    ("H100 SXM", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("A10", 125e12),
    ("RTX 4090", 165e12),
    ("V100 PCIE", 112e12),
    ("V100", 125e12),
)
LESS = {"MIG", "LAPTOP", "D"}  # words of a device that is only a part of the one of that name, or a smaller one


def peak_of(name):
    """The peak of the device of a name, or None if it is not known."""
    words = set(re.split(r"[^A-Z0-9]+", re.sub(r"SXM\d", "SXM", name.upper())))
    if words & LESS:
        return None
    return next((peak for known, peak in PEAKS if set(known.upper().split()) <= words), None)


def peak(device):
    """The peak of a torch device in 16 bits, operations a second; None on the CPU and where it is not known."""
    if device is None or device.type != "cuda":
        return None
    import torch

    return peak_of(torch.cuda.get_device_name(device))


def utilisation(ranks):
    """The share of their peak that ranks had, [(operations, seconds, peak)], each weighing as what it could have done.

    None if there is nothing to divide by, or the peak of one that did something is not known.
    """
    busy = [(done, seconds * (peak or 0.0)) for done, seconds, peak in ranks if done]
    if not busy or not all(possible for _, possible in busy):
        return None
    return sum(done for done, _ in busy) / sum(possible for _, possible in busy)


def of_round(notes, seconds, base, trained):
    """How quick a round's training was, as keys of its row, all None or 0 if nobody trained.

    notes: of each rank, {"sent": {client: {"metrics"}}, "train": seconds, "peak"}. seconds: those of the slowest rank.
    base, trained: parameters. tokens_per_second: target tokens of all clients over those seconds;
    seen_tokens_per_second: all tokens passed through the model, seen_tokens, over the same. mfu: the share of the
    devices' peak in 16 bits, by the operations of train.counted over each rank's own seconds of training; a device that
    ranks share counts for each of them.
    """
    metrics = [[note["metrics"] for note in each["sent"].values()] for each in notes]
    seen = sum(m["seen"] for own in metrics for m in own)
    tokens = sum(m["tokens"] for own in metrics for m in own)
    ranks = [
        (sum(train.counted(m, base, trained) for m in own), each["train"], each["peak"])
        for own, each in zip(metrics, notes, strict=True)
    ]
    return {
        "seen_tokens": seen,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        "seen_tokens_per_second": seen / seconds if tokens and seconds else None,
        "mfu": utilisation(ranks),
    }
