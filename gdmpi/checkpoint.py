"""The HDF5 round file: all that a resumed run needs, whole or not there.

Format, version 1. Attributes of the root:
    format             "gdmpi round"
    version            1
    creator            "gdmpi X.Y.Z", and the git revision where there is one
    round              rounds done
    adapter_sha256     of the global adapter: its float32 values, little-endian, in the schema's order
    complete           true; written last: a file without it was cut off while it was written
Data sets (each has an attribute sha256 over its bytes):
    config             the resolved configuration, YAML
    history            one JSON object a resume that changed something: {"round", "changes"}
    metrics            one JSON object a round, round 0 first, as in show --json
    about              JSON: model, sizes, splits, libraries, the adapter's schema
    adapter_config     peft's adapter_config.json
    clients            JSON: {client: {"file", "sha256"}} of what clients keep between rounds, in files of their own
    server/NAME        the server's state: a data set; or a group of named float32 tensors that are one flat vector,
                       in the order of the group's attribute order
A client's file (clients/0003/round-000005.h5) has format "gdmpi client", version, client, round, complete, and the
client's arrays as data sets.

The file has the layout of HDF5 1.10, whose metadata carry checksums; the root's attributes that are text have a fixed
length, so that they lie there too.

Files are written aside, synced and renamed: a name that ends in .h5 stands for a whole file. The server's file is
written after the clients' files and holds their hashes: it is the commit mark of the round.
"""

import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from gdmpi import __version__, flat
from gdmpi.errors import UserError, first_line

ROUND, CLIENT, VERSION = "gdmpi round", "gdmpi client", 1

# What makes the fields of a version's round file those of the next: {version: (date of the next, function)}. The
# function takes and returns {field of Round: value}. Clients' files have not changed so far.
UPGRADES = {}


@dataclass
class Round:
    """What a round file holds."""

    round: int
    adapter_sha256: str
    config: str  # YAML
    server: dict
    metrics: list = field(default_factory=list)
    history: list = field(default_factory=list)
    about: dict = field(default_factory=dict)
    adapter_config: str = "{}"
    clients: dict = field(default_factory=dict)
    creator: str = field(default_factory=lambda: creator())


def name(t):
    """The file name of a round, such that names sort as rounds do."""
    return f"round-{t:06d}.h5"


def round_of(path):
    """The round that a file's name tells."""
    return int(path.name.removeprefix("round-").removesuffix(".h5"))


def client_path(directory, client, t):
    """Where a client's file of a round is, below the directory of all clients."""
    return Path(directory) / f"{client:04d}" / name(t)


def files(directory):
    """The round files of a run directory, newest first."""
    return sorted(Path(directory).glob("round-" + "[0-9]" * 6 + ".h5"), reverse=True)


def write(directory, state):
    """Write a round file aside, sync it and rename it; OSError if that fails, and then nothing has changed."""
    with _aside(Path(directory) / name(state.round)) as file:
        _label(
            file,
            format=ROUND,
            version=VERSION,
            creator=state.creator,
            round=state.round,
            adapter_sha256=state.adapter_sha256,
        )
        _put(file, "config", state.config)
        _put(file, "history", [json.dumps(entry) for entry in state.history])
        _put(file, "metrics", [json.dumps(row) for row in state.metrics])
        _put(file, "about", json.dumps(state.about))
        _put(file, "adapter_config", state.adapter_config)
        _put(file, "clients", json.dumps(state.clients))
        _put_arrays(file.create_group("server"), state.server)


def write_text(path, text):
    """Write a text file aside and rename it: whoever reads it sees the old text or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_client(directory, client, t, arrays, over=()):
    """Write what a client keeps, readable by its owner alone; returns the file's SHA-256.

    over: files of the client that nothing needs any more. One that holds arrays of the same names, shapes and types is
    renamed and written over: its memory in the system's cache is there, and to get it for a new file takes longer than
    all the rest.
    """
    path = client_path(directory, client, t)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    old = next((old for old in over if _fits(old, arrays)), None)
    with _aside(path, mode=0o600, old=old) as file:
        _label(file, format=CLIENT, version=VERSION, client=client, round=t)
        _put_arrays(file, arrays)
    return file_sha256(path)


def read(path, server=True):
    """Read and check a round file: a Round. UserError, one line, for anything that is not whole and ours.

    server: with the server's state, which is nearly all of a large model's file; who only shows a run leaves it out.
    """
    with _opened(path, ROUND) as file:
        fields = {
            "round": int(file.attrs["round"]),
            "adapter_sha256": _text(file.attrs["adapter_sha256"]),
            "config": _get(file["config"]),
            "history": [json.loads(line) for line in _get(file["history"])],
            "metrics": [json.loads(line) for line in _get(file["metrics"])],
            "about": json.loads(_get(file["about"])),
            "adapter_config": _get(file["adapter_config"]),
            "clients": json.loads(_get(file["clients"])),
            "server": _get_arrays(file["server"]) if server else {},
            "creator": _text(file.attrs["creator"]),
        }
        for version in range(int(file.attrs["version"]), VERSION):
            _, upgrade = UPGRADES[version]
            fields = upgrade(fields)
        return Round(**fields)


def read_client(directory, client, t, sha256):
    """What a client kept after round t; UserError if its file is missing or not the one that was committed."""
    path = client_path(directory, client, t)
    if not path.is_file():
        raise UserError(f"{path}: missing; round {t} cannot be resumed without what client {client} kept")
    if file_sha256(path) != sha256:
        raise UserError(f"{path}: not the file that round {t} was committed with (its hash differs)")
    with _opened(path, CLIENT) as file:
        return _get_arrays(file)


def newest(directory, warn, server=True):
    """(path, Round) of the newest whole round file, read as read() does; warn(line) names each damaged one.

    UserError if there is none, or if one is no damaged file of ours but one of another program or a newer version.
    """
    candidates = files(directory)
    if not candidates:
        raise UserError(
            f"{directory}: no round files here; a run directory holds files like {name(5)}, and a run that was killed "
            "before its first is started anew with run"
        )
    for path in candidates:
        try:
            return path, read(path, server)
        except Damaged as problem:
            warn(f"{problem}; trying the one before")
    raise UserError(f"{directory}: none of its {len(candidates)} round files is whole")


def half_written(directory):
    """What a process was writing when it was killed: no part of a run, and read by nobody."""
    folders = ("", "clients/*/", "adapter/", "adapter/*/", "model/", "model/*/", "tensorboard/")
    places = [*(f"{folder}*.part" for folder in folders), "profile/*.part.gz"]
    return sorted(path for place in places for path in Path(directory).glob(place))


def clients_files(directory, client=None):
    """The files of a client, or of all, in a run directory, of all rounds."""
    folder = "*" if client is None else f"{client:04d}"
    return sorted(Path(directory).glob(f"clients/{folder}/round-" + "[0-9]" * 6 + ".h5"))


def prune(directory, keep):
    """Delete the round files but the newest keep."""
    for path in files(directory)[keep:]:
        path.unlink()


def unneeded(directory, oldest, client=None):
    """The files of a client, or of all, of rounds before the oldest that may still be resumed from."""
    return [path for path in clients_files(directory, client) if round_of(path) < oldest]


def prune_clients(directory, oldest, client=None):
    """Delete the files that unneeded() names."""
    for path in unneeded(directory, oldest, client):
        path.unlink()


@functools.cache
def creator():
    """This program's version, and its git revision when it runs from a checkout."""
    here = Path(__file__).parent
    try:
        revision = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5
        )
        tracked = subprocess.run(["git", "-C", here, "ls-files", "--error-unmatch", __file__], capture_output=True)
    except (OSError, subprocess.TimeoutExpired):
        return f"gdmpi {__version__}"
    ours = revision.returncode == 0 and tracked.returncode == 0
    return f"gdmpi {__version__}" + (f" ({revision.stdout.strip()})" if ours else "")


def file_sha256(path):
    """SHA-256 over a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class _aside:
    """Open path.part for writing; on success mark it complete, sync it and rename it, on failure remove it.

    old: a file that becomes path.part, to be written over; else it is a new one.
    """

    def __init__(self, path, mode=0o666, old=None):
        self.path, self.part, self.mode, self.old = path, path.with_name(path.name + ".part"), mode, old

    def __enter__(self):
        self.part.unlink(missing_ok=True)
        if self.old:
            self.old.replace(self.part)
        else:
            self._create()
        # the layout of HDF5 1.10 has checksums over its metadata; a flipped bit in an older one can crash the reader
        try:
            self.file = h5py.File(self.part, "r+" if self.old else "w", libver=("v110", "v110"))
            self.file.attrs.modify("complete", False)
        except BaseException:
            self.part.unlink(missing_ok=True)
            raise
        return self.file

    def _create(self):
        umask = os.umask(0)
        os.umask(umask)
        os.close(os.open(self.part, os.O_CREAT | os.O_EXCL | os.O_RDWR, self.mode & ~umask))

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self.file.attrs.modify("complete", True)
            self.file.close()
            if kind is None:
                sync(self.part)
                self.part.replace(self.path)
                sync(self.path.parent)
        except BaseException:
            self.part.unlink(missing_ok=True)
            raise
        if kind is not None:
            self.part.unlink(missing_ok=True)


def sync(path):
    """Have the operating system put a file, or a directory's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _label(item, **attributes):
    """Set attributes; text with a fixed length, since text of any length lies where HDF5 keeps no checksum."""
    for key, value in attributes.items():
        item.attrs.modify(key, np.bytes_(value.encode()) if isinstance(value, str) else value)


def _text(value):
    return value.decode() if isinstance(value, bytes) else value


def _put(group, key, value):
    if key in group:
        data = group[key]
        data[...] = value
    elif isinstance(value, list):
        data = group.create_dataset(key, (len(value),), h5py.string_dtype())
        data[...] = value
    elif isinstance(value, str):
        data = group.create_dataset(key, data=value, dtype=h5py.string_dtype())
    else:
        data = group.create_dataset(key, data=value)
    _label(data, sha256=_digest(value))


def _fits(path, arrays):
    """Whether a client's file holds arrays of these names, shapes and types, and can be written over with them."""
    try:
        with _opened(path, CLIENT) as file:
            return _shapes(file) == _shapes(arrays)
    except UserError:
        return False


def _shapes(arrays):
    """{name: (shape, type)} of arrays or data sets; nested where a vector is a group of tensors."""
    return {
        key: _shapes(value) if isinstance(value, Mapping) else (np.shape(value), getattr(value, "dtype", type(value)))
        for key, value in arrays.items()
    }


def _put_arrays(group, arrays):
    for key, value in arrays.items():
        if isinstance(value, flat.Flat):
            tensors = group.require_group(key)
            if (order := json.dumps(list(value))) != tensors.attrs.get("order"):
                tensors.attrs["order"] = order
            _put_arrays(tensors, dict(value))
        else:
            _put(group, key, np.asarray(value))


def _get(data):
    if h5py.check_string_dtype(data.dtype):
        value = data[()]
        value = value.decode() if isinstance(value, bytes) else [item.decode() for item in value]
    else:
        value = data[()] if data.shape == () else data[...]
    if _digest(value) != _text(data.attrs["sha256"]):
        raise UserError(f"{data.name}: its checksum does not match")
    return value


def _get_arrays(group):
    arrays = {}
    for key, item in group.items():
        if isinstance(item, h5py.Group):
            order = json.loads(item.attrs["order"])
            if sorted(order) != sorted(item):
                raise UserError(f"{item.name}: its order does not name its tensors")
            arrays[key] = flat.pack({part: _get(item[part]) for part in order})
        else:
            arrays[key] = _get(item)
    return arrays


def _digest(value):
    if isinstance(value, str):
        return hashlib.sha256(value.encode()).hexdigest()
    if isinstance(value, list):
        return hashlib.sha256("\n".join(value).encode()).hexdigest()
    return hashlib.sha256(np.ascontiguousarray(value)).hexdigest()


class Damaged(UserError):
    """The file is ours but not whole: an older one may do instead."""


class _opened:
    """An HDF5 file of ours, checked: of this format, not of a newer version, complete; else a UserError or Damaged."""

    def __init__(self, path, form):
        self.path, self.form = Path(path), form

    def __enter__(self):
        try:
            self.file = h5py.File(self.path, "r")
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        except OSError as error:
            raise Damaged(f"{self.path}: damaged or no HDF5 file ({first_line(error)})") from None
        try:
            self._check(self.file.attrs)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self.file

    def _check(self, attrs):
        if _text(attrs.get("format")) != self.form:
            raise UserError(f"{self.path}: not a file of the format '{self.form}'")
        version = attrs["version"]
        if version > VERSION or version < min(UPGRADES, default=VERSION):
            by = _text(attrs.get("creator", "another program"))
            raise UserError(f"{self.path}: of format version {version}, by {by}; this program reads up to {VERSION}")
        if not attrs.get("complete"):
            raise Damaged("cut off while it was written")

    def __exit__(self, kind, error, trace):
        self.file.close()
        if kind is not None and issubclass(kind, UserError) and str(self.path) in str(error):
            return
        if kind is not None and issubclass(kind, Exception):  # also whatever h5py makes of damaged bytes
            raise Damaged(f"{self.path}: damaged: {first_line(error)}") from None
