"""What torch does in a rank's local training, written down for a person to look at: run.profile."""

import contextlib
import os

STEPS = 10  # that are traced, of a rank in a round: each is ten thousand events and more, also of small models


def round_of(done, rounds):
    """The round that a start traces which goes on after round done: its second, since the first warms up."""
    return min(done + 2, rounds)


def path(directory, rank, t):
    """Where a rank's trace of round t goes in a run's directory; rank may be a pattern."""
    rank = rank if isinstance(rank, str) else f"{rank:04d}"
    return directory / "profile" / f"rank-{rank}-round-{t:06d}.json.gz"


@contextlib.contextmanager
def traced(trainer, target):
    """Trace the first STEPS steps of a trainer within this, and write a Chrome trace, gzipped, if there were any.

    Writing is left to the end, so that it does not count as training.
    """
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it would say on every rank's stderr when it begins and ends
    cuda = [ProfilerActivity.CUDA] if trainer.model.device.type == "cuda" else []
    recorder, tell, steps = profile(activities=[ProfilerActivity.CPU, *cuda]), trainer.on_step, 0

    def on_step(*note):
        nonlocal steps
        steps += 1
        if steps == STEPS:
            recorder.stop()
        if tell:
            tell(*note)

    recorder.start()
    trainer.on_step = on_step
    try:
        yield
    finally:
        trainer.on_step = tell
        if steps < STEPS:
            recorder.stop()
    if steps:
        target.parent.mkdir(exist_ok=True)
        part = target.with_name(target.name + ".part.gz")  # torch compresses what is called .gz
        recorder.export_chrome_trace(str(part))
        part.replace(target)
