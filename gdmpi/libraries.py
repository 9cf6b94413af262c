"""Importing transformers, peft and bitsandbytes: quietly, and without the half of them that a run never uses.

Plainly imported they cost four to five seconds of CPU in every process, most of it for torch's compiler, its
distributed tensors and bitsandbytes' kernels. Five clients on two cores would wait ten seconds before the first step.
"""

import contextlib
import importlib
import importlib.machinery
import logging
import os
import socket
import sys
import types
import urllib.parse
import urllib.request
import warnings
from pathlib import Path

DYNAMO = "torch._dynamo"
TRACE = f"{DYNAMO}._trace_wrapped_higher_order_op"


def environment(cache):
    """Set what the libraries read when they are imported; cache is the directory for all they download."""
    # a token that the user has saved stays where the hub's own tools keep it
    os.environ.setdefault("HF_TOKEN_PATH", str(Path("~/.cache/huggingface/token").expanduser()))
    os.environ.setdefault("HF_HOME", str(Path(cache).absolute() / "huggingface"))
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "TOKENIZERS_PARALLELISM": "false",  # it forks and threads; ranks have a core each
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "DATASETS_VERBOSITY": "error",
        "BITSANDBYTES_NOWELCOME": "1",
        # each shape that is multiplied in bfloat16 takes 0.5 MB, in torch's cache and in oneDNN's, which keep 1,024
        "LRU_CACHE_CAPACITY": "128",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it CUDA's matrix products need not repeat their bits
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written to
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|bitsandbytes|datasets|huggingface_hub)\b.*")


def load(quantized=False):
    """Import torch, transformers and peft and return them; bitsandbytes only if quantized.

    A later import of torch.compile or of torch.distributed works as ever: only the import of transformers and peft
    itself is kept from pulling them in.
    """
    import torch

    if "transformers.modeling_utils" not in sys.modules:
        with without_compiler(), _without_distributed(torch), _without("bitsandbytes"), _names_found_quickly():
            import peft
            import transformers

            importlib.import_module("transformers.modeling_utils")
            importlib.import_module("transformers.models.auto.modeling_auto")
            # asked once and remembered: peft looks for bitsandbytes again when an adapter is put on
            peft.import_utils.is_bnb_available()
    import peft
    import transformers

    if quantized:
        for check in (peft.import_utils.is_bnb_available, transformers.utils.is_bitsandbytes_available):
            check.cache_clear()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return torch, transformers, peft


def load_for_tokens():
    """Import transformers for its tokenizers alone, as if torch were not installed: half the time of load().

    For a server that never sees a model: in this process transformers has no models from then on.
    """
    with _without("torch"), _names_found_quickly():
        import transformers

        importlib.import_module("transformers.models.auto.tokenization_auto")
    return transformers


def hub_answers():
    """Whether the model hub can be reached, found out in 5 s at most; its own clients retry for minutes."""
    import huggingface_hub.constants

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True  # a proxy's business; only trying would tell
    address = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _without(name):
    """Make a module look as if it were not installed."""
    missing = name not in sys.modules
    if missing:
        sys.modules[name] = None
    try:
        yield
    finally:
        if missing:
            del sys.modules[name]


class _NamesFoundQuickly:
    """A finder that lets transformers look only at the end of its 3,000 files for the names that they export.

    It looks through every line of every model's file for the last one that begins with __all__.
    """

    def find_spec(self, name, path=None, target=None):
        if name != "transformers.utils.import_utils":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if find := getattr(module, "fetch__all__", None):
                module.fetch__all__ = lambda text: find(text[text.rfind("\n__all__") + 1 :])

        spec.loader.exec_module = exec_module
        return spec


@contextlib.contextmanager
def _names_found_quickly():
    finder = _NamesFoundQuickly()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@contextlib.contextmanager
def reading_weights():
    """For from_pretrained: embeddings drawn on the meta device, to be overwritten, would import torch's compiler."""
    import torch

    drawn = torch.nn.Embedding.reset_parameters
    torch.nn.Embedding.reset_parameters = lambda self: None  # what a file lacks, transformers initialises afterwards
    try:
        with without_compiler():
            yield
    finally:
        torch.nn.Embedding.reset_parameters = drawn


@contextlib.contextmanager
def saving_weights():
    """For save_pretrained: it imports torch's compiler to ask whether the model was compiled."""
    from transformers import modeling_utils

    real = modeling_utils.unwrap_model
    modeling_utils.unwrap_model = lambda model: model
    try:
        yield
    finally:
        modeling_utils.unwrap_model = real


@contextlib.contextmanager
def _without_distributed(torch):
    """transformers imports distributed tensors, FSDP and checkpoints if torch.distributed says it is available."""
    import torch.distributed

    real = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = real


@contextlib.contextmanager
def without_compiler():
    """Stand in for torch._dynamo while decorators are applied that only matter under torch.compile.

    Whatever else is asked of the stand-in comes from the real module, imported at that moment.
    """
    import torch

    if DYNAMO in sys.modules:
        yield
        return
    standins = {DYNAMO: _StandIn(DYNAMO), TRACE: _StandIn(TRACE)}
    sys.modules.update(standins)
    had = torch.__dict__.get("_dynamo")
    torch._dynamo = standins[DYNAMO]
    try:
        yield
    finally:
        for name, module in standins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        if torch.__dict__.get("_dynamo") is standins[DYNAMO]:
            del torch._dynamo
            if had is not None:
                torch._dynamo = had


class _StandIn(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name in {"disable", "allow_in_graph", "assume_constant_result"}:
            return _undecorated
        if name == "TransformGetItemToIndex":
            return _transform_get_item_to_index
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def _undecorated(function=None, *_, **__):
    return function if function is not None else _undecorated


def _transform_get_item_to_index():
    return _real(TRACE).TransformGetItemToIndex()


def _real(name):
    for standin in (DYNAMO, TRACE):
        if isinstance(sys.modules.get(standin), _StandIn):
            del sys.modules[standin]
    return importlib.import_module(name)
