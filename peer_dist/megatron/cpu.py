"""Megatron-core on machines without a GPU.

Megatron-core 0.16.1 asks ``torch.cuda`` for its device and its random states wherever it runs. Here its
modules, and nothing else, see another ``torch``: a proxy that answers those questions with the CPU. Laptops
and CI run the same model code that GPUs run; where CUDA exists nothing is replaced.

Everywhere Megatron is imported as if apex and TransformerEngine were not installed (docs/apex.md).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")

# What peer_dist uses. They must be loaded before their name `torch` can be replaced.
_MODULES = (
    "megatron.core.models.gpt",
    "megatron.core.transformer.attention",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel.random",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.optimizer",
)

# Loggers, and from which level on they are heard.
_LEVELS = {
    "megatron.core": logging.WARNING,
    # warns of each feed-forward module that Megatron does not know, which is all of ours
    "megatron.core.transformer.transformer_layer": logging.ERROR,
}
# With the stand-in dropout moves the CPU's random state, as it should; with CUDA that warning would mean a mistake.
_LEVELS_ON_CPU = {"megatron.core.tensor_parallel.random": logging.ERROR}


class _Proxy(types.ModuleType):
    """A module with some of its names replaced."""

    def __init__(self, base: types.ModuleType, **replaced: Any) -> None:
        super().__init__(base.__name__)
        self.__dict__.update(replaced, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The tensor factory with ``device="cuda"`` read as the CPU."""

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return call


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Synchronisation and caches: the CPU has none."""


class _Stream(torch.cpu.Stream):
    """In which everything has happened already."""

    def record_event(self) -> torch.cpu.Event:  # type: ignore[override]
        return torch.cpu.Event()


_CUDA = _Proxy(
    torch.cuda,
    Stream=_Stream,
    current_stream=torch.cpu.current_stream,
    stream=torch.cpu.stream,
    current_device=lambda: _CPU,
    synchronize=_nothing,
    empty_cache=_nothing,
    get_rng_state=lambda *_: torch.get_rng_state(),
    manual_seed=lambda seed: torch.manual_seed(seed),
)
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange")
_TORCH = _Proxy(torch, cuda=_CUDA, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})


def _for_megatron(original: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """A method of Tensor that is another one for megatron.core, and as ever elsewhere."""

    @functools.wraps(original)
    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return (answer if caller.startswith("megatron.core") else original)(self, *args, **kwargs)

    method._peer_dist = True  # type: ignore[attr-defined]
    return method


def _leave(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``Tensor.cuda`` where there is none."""
    return tensor


def _cuda_type(tensor: torch.Tensor) -> str:
    """``Tensor.type()`` as its optimizers want it: torch.FloatTensor is a torch.cuda.FloatTensor."""
    return "torch.cuda." + str(torch.empty(0, dtype=tensor.dtype, device=_CPU).type()).rpartition(".")[2]


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Counts of tokens are on the host already; collectives want those that they split by as numpy's arrays."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    """A context in which apex and TransformerEngine cannot be imported; afterwards all is as it was.

    Megatron takes an optimizer and other functions from them wherever it finds them, so that a run would depend on what
    an image has. It expects an ImportError where they do not work, while they raise others too.
    """
    packages = ("apex", "transformer_engine")
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in packages}
    for name in loaded:
        del sys.modules[name]
    for name in packages:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's sign of a module that cannot be imported
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(loaded)


def install() -> bool:
    """Import Megatron-core quietly and, where there is no CUDA, let its modules see the CPU.

    Call it again after importing further megatron.core modules; what is already replaced stays.

    Returns:
        Whether the stand-in is in use (False where CUDA exists).
    """
    with _by_itself(), warnings.catch_warnings():  # it says ten times what it does not find
        warnings.simplefilter("ignore")
        for name in _MODULES:
            importlib.import_module(name)
    stands_in = not torch.cuda.is_available()
    for name, level in {**_LEVELS, **(_LEVELS_ON_CPU if stands_in else {})}.items():
        logger = logging.getLogger(name)
        if logger.level != level:  # setting it clears the caches of all loggers, which takes milliseconds
            logger.setLevel(level)
    if not stands_in:
        return False

    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = _TORCH
    # These two took their CUDA functions by name before the proxy was there.
    random = sys.modules["megatron.core.tensor_parallel.random"]
    random.__dict__["_get_cuda_rng_state"] = lambda *_, **__: torch.get_rng_state()
    random.__dict__["_set_cuda_rng_state"] = lambda state, *_, **__: torch.set_rng_state(state)
    sys.modules["megatron.core.transformer.moe.token_dispatcher"].__dict__["maybe_move_tensor_to_cpu"] = _to_host
    if not hasattr(torch.Tensor.cuda, "_peer_dist"):
        torch.Tensor.cuda = _for_megatron(torch.Tensor.cuda, _leave)  # type: ignore[method-assign]
        torch.Tensor.type = _for_megatron(torch.Tensor.type, _cuda_type)  # type: ignore[method-assign]
    return True
