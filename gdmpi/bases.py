"""Bases that are made once: cast or quantised, kept under run.cache, and mapped into memory by every rank.

A base that is read as it is saved is mapped from its files: the ranks of a node share the same pages. What is cast to
another dtype or quantised to 4 bits would be a copy in each rank, and each would take the time for it. So the first
rank that needs such a base on the CPU writes it as safetensors, in the form in which it is used, and all ranks, of
later runs too, map that. Weights, fingerprint and results are the same bits as without.

    run.cache/bases/KEY/             what save_pretrained writes, and made.json: what KEY is a hash of, and what tells
                                     that the files are whole
    run.cache/bases/.KEY.part-.../   one that is being written, its lock held by who writes it

KEY stands for the files of the weights (where they lie, sizes, times of change; their gigabytes are not read),
config.json, dtype, quantisation, and the versions of what makes them. Nothing here is ever out of date: what a key no
longer leads to is not used, and not deleted either.
"""

import ctypes
import fcntl
import gc
import hashlib
import importlib.metadata
import json
import shutil
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gdmpi import checkpoint, libraries
from gdmpi.errors import first_line

FORMAT = 1
WHOLE, ABSENT = "whole", "absent"
ABOUT, DAMAGED = "made.json", "damaged"
GENERATION = "generation_config.json"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Entry:
    """A place in the cache: path, of its directory; source, the model's; about, what path's name is a hash of."""

    path: Path
    source: Path
    about: dict


def find(cache, place, dtype, quantize):
    """The Entry for a base on the CPU; None if it is mapped as saved, or if the model is not a directory here.

    place: as model.locate() says. dtype: a name, or "auto".
    """
    source = Path(place)
    if not source.is_dir():
        return None
    dtype = converted(source, dtype, quantize)
    if dtype is None:
        return None
    files = [(path.name, *_stamp(path)) for path in _files(source)]
    about = {
        "format": FORMAT,
        "source": str(source.resolve()),
        "files": files,
        "config": (source / "config.json").read_text(encoding="utf-8"),
        "dtype": dtype,
        "quantize": quantize,
        "made with": _versions(quantize),
    }
    text = json.dumps(about, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    return Entry(Path(cache, "bases", key).absolute(), source, json.loads(text))


def converted(source, dtype, quantize):
    """The dtype, as a name, that a model in a directory is converted to when it is loaded; None if it is not."""
    try:
        settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
        saved = {FLOATS[each] for path in _files(source) for each in _dtypes(path) if each in FLOATS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # who loads it says what is wrong
    if "quantization_config" in settings:
        return None
    if dtype == "auto":
        dtype = settings.get("dtype") or settings.get("torch_dtype")
    return dtype if dtype and (quantize != "none" or saved - {dtype}) else None


def state(entry):
    """WHOLE, ABSENT, or what is damaged about an entry, in a few words."""
    # a network file system may remember for half a minute that there was no such name; who lists asks anew
    with suppress(OSError):
        list(entry.path.parent.iterdir())
    if not entry.path.is_dir():
        return ABSENT
    try:
        for name, mark in json.loads((entry.path / ABOUT).read_text(encoding="utf-8"))["marks"].items():
            if _mark(entry.path / name) != mark:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return first_line(error)
    return WHOLE


def make(entry, load):
    """Write the base that load() returns as an entry, unless it is there; lines of warning, of what did not go well.

    Nothing of it stays in memory. If others make the same entry meanwhile, it is the first one's. That it cannot be
    written is only a warning, since every rank can have a copy of its own; a UserError of load()'s is passed on.
    """
    from safetensors import SafetensorError

    if state(entry) == WHOLE:
        return []
    said, directory = [], entry.path.parent
    part = directory / f".{entry.path.name}.part-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _sweep(directory)
        with _locked(part):
            part.mkdir()
            _write(entry, part, load)
            found = state(entry)
            if found not in (WHOLE, ABSENT):
                said.append(f"run.cache: the base in {entry.path} was damaged ({found}), so it was made again")
                entry.path.replace(part / DAMAGED)
                shutil.rmtree(part / DAMAGED)
            if found != WHOLE:
                _rename(part, entry.path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        said.append(f"run.cache: no base can be kept in {directory} ({why}): every rank has a copy of its own")
    finally:
        shutil.rmtree(part, ignore_errors=True)
        _give_back()
    return said


def _write(entry, part, load):
    """Fill a directory with a base: as save_pretrained does, then the mark of what is whole; all of it synced."""
    base = load()
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in base.state_dict().values()}  # tied ones once
    size, free = sum(tensors.values()), shutil.disk_usage(part).free
    if size > free:
        raise OSError(f"{size:,} bytes are needed and {free:,} free")
    # saving is stricter than loading about what a model's author wrote on sampling, so that is copied as it is
    base.generation_config = type(base.generation_config)() if base.generation_config else None
    with libraries.saving_weights():
        base.save_pretrained(part)
    (part / GENERATION).unlink(missing_ok=True)
    if (entry.source / GENERATION).is_file():
        shutil.copyfile(entry.source / GENERATION, part / GENERATION)
    written = list(part.iterdir())
    marks = {path.name: _mark(path) for path in written}
    about = part / ABOUT
    about.write_text(json.dumps({"made of": entry.about, "marks": marks}, indent=2), encoding="utf-8")
    readable = part.stat().st_mode & 0o666
    for path in (*written, about):
        path.chmod(readable)  # safetensors lets only the owner read what it writes
        checkpoint.sync(path)
    checkpoint.sync(part)


def _rename(part, path):
    """Give a whole entry its name, unless another process was quicker: that one's is the same."""
    try:
        part.replace(path)
    except OSError:
        if not path.is_dir():
            raise
        return
    checkpoint.sync(path.parent)


@contextmanager
def _locked(part):
    """Hold the lock that says that a directory is being written; it goes with the process, however that ends."""
    name = part.with_name(f"{part.name}.lock")
    try:
        with name.open("w") as lock:
            with suppress(OSError):  # without locks, what a killed process leaves stays there
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    finally:
        name.unlink(missing_ok=True)


def _sweep(directory):
    """Delete what killed processes left half written: a directory whose lock is free, as it is made after the lock."""
    for part in directory.glob(".*.part-*[!k]"):  # no .lock
        lock = part.with_name(f"{part.name}.lock")
        with suppress(OSError), lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part, ignore_errors=True)
            lock.unlink()


def _give_back():
    """Give the memory of a base that was dropped back to the system: what malloc keeps would be a copy after all."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


# ---- files ---------------------------------------------------------------------------------------------------------


def _files(source):
    """The files of a model's weights, those that are read and no others that lie beside them."""
    index = source / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [index, *(source / name for name in names)]
    whole = source / "model.safetensors"
    return [whole] if whole.is_file() else sorted(source.glob("*.bin"))


def _stamp(path):
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _header(path):
    """The bytes of a safetensors file's header: names, dtypes, shapes and places of its tensors, as JSON."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError(f"{path.name} has no header")
        return file.read(size)


def _dtypes(path):
    if path.suffix != ".safetensors":
        return set()
    return {tensor["dtype"] for name, tensor in json.loads(_header(path)).items() if name != "__metadata__"}


def _mark(path):
    """[bytes, hash] that a file is known by; of weights the hash is of the header alone, so that it takes no time."""
    content = _header(path) if path.suffix == ".safetensors" else path.read_bytes()
    return [path.stat().st_size, hashlib.sha256(content).hexdigest()]


def _versions(quantize):
    """What decides on the bits of what is made. Casting rounds alike everywhere; 4 bits are left to the processor."""
    names = ["transformers"] if quantize == "none" else ["transformers", "bitsandbytes", "torch"]
    versions = {name: importlib.metadata.version(name) for name in names}
    if quantize != "none":
        import torch

        versions["processor"] = torch.backends.cpu.get_cpu_capability()
    return versions
