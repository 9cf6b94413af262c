"""How often a batch job was started without getting further: two such starts in a row are its last."""

import json

from gdmpi import checkpoint
from gdmpi.errors import PeerError

STARTS = 2  # starts in a row without a new round, after which a batch job is not put into the queue again


def count(directory, done):
    """Note in starts.json how many starts in a row began after the same round; PeerError if it is one too many."""
    path = directory / "starts.json"
    before = _read(path)
    starts = before["starts"] + 1 if before["round"] == done else 1
    if starts > STARTS:
        path.unlink()  # whoever starts the run again after this has looked into it
        raise PeerError(_no_progress(done))
    checkpoint.write_text(path, json.dumps({"round": done, "starts": starts}))


def stuck(directory):
    """What to say if this start and the one before it saved no new round, else None."""
    starts, files = _read(directory / "starts.json"), checkpoint.files(directory)
    done = checkpoint.round_of(files[0]) if files else -1
    return _no_progress(done) if starts["round"] == done and starts["starts"] >= STARTS else None


def _read(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"round": int(found["round"]), "starts": int(found["starts"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"round": None, "starts": 0}  # none yet, or one cut off: then the count begins anew


def _no_progress(done):
    what = f"got no further than round {done}" if done >= 0 else "saved no round at all"
    return f"{STARTS} starts in a row {what}: log.txt says how they ended; starting it again tries anew"
