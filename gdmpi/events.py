"""Event files for TensorBoard: the scalars of each round, each round once, however often the run was started."""

import importlib.util
import socket
import time

from gdmpi.errors import UserError

WORDS = {"eval": "evaluation"}


def check(config):
    """UserError if run.tensorboard is set and its library is missing."""
    if config.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("run.tensorboard: tensorboard is not installed; pip install 'gdmpi[tensorboard]'")


def scalars(row):
    """{tag: number} of a round's row: what is known of it; round 0 has only losses."""
    test, moved = row.get("test") or {}, row["clients"]
    found = {
        "loss/training": row["train_loss"],
        "loss/validation": row["eval_loss"],
        "loss/test": test.get("loss"),
        "perplexity/validation": row["eval_perplexity"],
        "perplexity/test": test.get("perplexity"),
        "accuracy/validation": row["eval_accuracy"],
        "accuracy/test": test.get("accuracy"),
        **{f"{name}/test": test.get(name) for name in ("bleu", "rouge_l", "chrf")},
    }
    if row["round"]:
        found |= {f"seconds/{WORDS.get(part, part)}": value for part, value in row["seconds"].items()}
        found |= {f"bytes/{way}": moved * row[f"bytes_{way}_per_client"] for way in ("up", "down")}
        found |= {"speed/tokens_per_second": row["tokens_per_second"], "speed/mfu": row["mfu"]}
        found |= {f"memory/{kind}": row[f"peak_memory_{kind}"] for kind in ("client", "server")}
        found |= {f"server/{name}": value for name, value in (row["server"] or {}).items()}
    return {tag: float(value) for tag, value in found.items() if value is not None}


class Events:
    """A new event file in a directory, with the rounds so far, instead of those that are there.

    An event's time is that of the start, and the rounds' seconds on top: what TensorBoard calls relative time is what
    the rounds have taken, without the breaks of a run that was resumed.
    """

    def __init__(self, directory, rows):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory.mkdir(exist_ok=True)
        old = list(directory.glob("*tfevents*"))
        path = directory / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        part = directory / f"{path.name.replace('tfevents', 'new')}.part"  # a name that TensorBoard does not look at
        self.file = part.open("wb")
        self.records, self.now = RecordWriter(self.file), time.time() - sum(row["seconds"]["total"] for row in rows)
        self.records.write(Event(wall_time=self.now, file_version="brain.Event:2").SerializeToString())
        for row in rows:
            self.add(row)
        for each in old:
            each.unlink()
        part.replace(path)

    def add(self, row):
        """Write a round's scalars."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.now += row["seconds"]["total"]
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row).items()]
        event = Event(wall_time=self.now, step=row["round"], summary=Summary(value=values))
        self.records.write(event.SerializeToString())
        self.records.flush()
