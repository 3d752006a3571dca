"""A language model with PEER layers, from the folder that this file lies in. It needs torch and safetensors alone.

    from peer_model import LanguageModel

    model = LanguageModel.load(".")
    logits = model(tokens)  # int64 [batch, length] -> [batch, length, vocab_size]
    longer = model.generate(tokens, max_new_tokens=100, temperature=0.8)

A text begins with the end-of-document token (``eos_token_id`` of config.json), as in training.

PEER: He 2024, arXiv 2407.04153. Product-key memory: Lample 2019. sigma-MoE: Csordas 2023, arXiv 2310.10837. Recurrent
routers: RMoE, Qiu 2024, arXiv 2408.06793. Cosine routers: XMoE, Chi 2022, arXiv 2204.09179.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"  # of a folder that transformers wrote, which needs no index
PREFIX = "model."  # of the tensors' names in the files
MOST_JSON = 1 << 26  # bytes of a JSON file
LARGEST = 1 << 40  # of a whole number in config.json
MOST_LAYERS = 4096
MOST_TENSORS = 1 << 22

ROUTERS = ("linear", "recurrent", "mlp", "cosine")
EPS = 1e-5  # of the norms within layers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
}


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unmixed(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Where autocast rounds nothing: scores, gates and sums keep the dtypes that they are given."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def linear(width: int, out: int) -> nn.Linear:
    """A map without a bias."""
    return nn.Linear(width, out, bias=False)


def _refused(key: str, wanted: str, value: object) -> ValueError:
    return ValueError(f"config.json: {key} must be {wanted}; got {value!a:.60}")


def whole(section: Mapping[str, Any], key: str, least: int = 1, most: int = LARGEST) -> int:
    """The whole number that ``config.json``, or a section of it, has for ``key``.

    Raises:
        ValueError: it is none, or not from ``least`` to ``most``.
        KeyError: there is no such key.
    """
    value = section[key]
    if type(value) is not int or not least <= value <= most:
        raise _refused(key, f"a whole number from {least} to {most}", value)
    return value


def positive(section: Mapping[str, Any], key: str) -> float:
    """The number above 0 that it has for ``key``; see :func:`whole`."""
    value = section[key]
    if type(value) not in (int, float) or not 0 < value < 1e37:
        raise _refused(key, "a number above 0", value)
    return float(value)


def flag(section: Mapping[str, Any], key: str) -> bool:
    """The ``true`` or ``false`` that it has for ``key``; see :func:`whole`."""
    value = section[key]
    if not isinstance(value, bool):
        raise _refused(key, "true or false", value)
    return value


def choice(section: Mapping[str, Any], key: str, names: Collection[str]) -> str:
    """The one of ``names`` that it has for ``key``; see :func:`whole`."""
    value = section[key]
    if not isinstance(value, str) or value not in names:
        raise _refused(key, f"one of {', '.join(names)}", value)
    return value


class Cache(Protocol):
    """Keys and values of earlier tokens."""

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Take those of new tokens, ``[batch, heads, length, channels]``; those of all tokens so far."""


class KVCache:
    """Keys and values of earlier tokens, by layer."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self._kept[0][0].shape[2] if self._kept else 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Take those of new tokens, ``[batch, heads, length, channels]``; those of all tokens so far."""
        if layer in self._kept:
            before = self._kept[layer]
            keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        self._kept[layer] = keys, values
        return keys, values


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a weight per feature (Zhang 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``x: [..., width]``, normalised over its last dimension in float32 or wider."""
        return F.rms_norm(wide(x), self.weight.shape, wide(self.weight), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal softmax attention with rotary positions; several heads may share keys and values (grouped queries)."""

    def __init__(self, width: int, heads: int, groups: int, layer: int) -> None:
        super().__init__()
        self.heads, self.groups, self.channels, self.layer = heads, groups, width // heads, layer
        # rows: [groups, (the queries of its heads, key, value), channels]
        self.qkv = linear(width, (heads + 2 * groups) * self.channels)
        self.out = linear(width, width)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        """``x: [batch, length, width]``; ``rotation``: cosines and sines ``[batch or 1, 1, length, channels]``."""
        shared = self.heads // self.groups
        rows = self.qkv(x).unflatten(-1, (self.groups, shared + 2, self.channels)).permute(0, 2, 3, 1, 4)
        query, key, value = rows[:, :, :shared].flatten(1, 2), rows[:, :, shared], rows[:, :, shared + 1]
        query, key = _rotate(query, rotation), _rotate(key, rotation)  # [batch, heads or groups, length, channels]
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
        if shared > 1:
            key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        causal = mask is None and key.shape[2] == query.shape[2]
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.out(context.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = (part.to(x.dtype) for part in rotation)
    return x * cos + torch.cat([-second, first], -1) * sin


class RouterCore(nn.Module):
    """What all layers' routers share: a GRU over layers, or a perceptron of equal size."""

    def __init__(self, size: int, recurrent: bool, projected_from: int) -> None:
        super().__init__()
        self.recurrent = recurrent
        perceptron = nn.Sequential(nn.Linear(size, 3 * size), nn.GELU(), nn.Linear(3 * size, size))
        self.cell: nn.Module = nn.GRUCell(size, size) if recurrent else perceptron
        self.projection = linear(projected_from, size) if projected_from else None


class RouterState(nn.Module):
    """A layer's step of the routers' state."""

    def __init__(self, core: RouterCore, width: int, size: int, passed: bool) -> None:
        super().__init__()
        self._core, self.passed = (core,), passed  # in a tuple: no sub-module of this
        self.projection = None if core.projection is not None else linear(width, size)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """``x: [tokens, width]``, ``state: [tokens, size]`` of the layers before."""
        (core,) = self._core
        project = core.projection if self.projection is None else self.projection
        assert project is not None
        with unmixed(x):
            projected = project(x.to(project.weight.dtype))
            if not core.recurrent:
                return core.cell(projected)
            return core.cell(projected, state.to(projected.dtype) if self.passed else torch.zeros_like(projected))


class ExportedLayer(nn.Module):
    """A feed-forward layer of some kind.

    Attributes:
        routed: whether it takes the routers' state, where the model has one.
    """

    routed: ClassVar[bool] = False

    @classmethod
    def least_tensors(cls, section: Mapping[str, Any]) -> int:
        """How many tensors a layer has at least, so that one too many for the files is never built.

        Raises:
            ValueError: its section of ``config.json`` does not say so.
        """
        return 1

    @classmethod
    def of(
        cls, config: Mapping[str, Any], section: Mapping[str, Any], state_size: int, tables_of: nn.Module | None
    ) -> ExportedLayer:
        """The layer that ``config.json`` describes.

        Args:
            config: all of it.
            section: its part about this kind of layer.
            state_size: width of the routers' state; 0 without one.
            tables_of: the layer whose tables this one shares; None for tables of its own.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """``x: [tokens, width]``, ``state: [tokens, state_size]``, to ``[tokens, width]``."""
        raise NotImplementedError


LAYERS: dict[str, type[ExportedLayer]] = {}
"""By the name that ``mlp`` of config.json has for it: the kinds of layer that this file has."""


def _line(error: BaseException) -> str:
    """The beginning of an error's message, as a part of a sentence."""
    return " ".join(str(error).split())[:200]


def _read_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: there is none.
    """
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_JSON + 1)
        tree = json.loads(data) if len(data) <= MOST_JSON else None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except (RecursionError, MemoryError, ValueError) as error:  # a number of thousands of digits is one too
        raise ValueError(f"{file}: is not valid JSON ({_line(error)})") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: must hold a JSON object")
    return tree


def _stored(folder: Path) -> dict[str, list[str]]:
    """The names of all tensors in a folder's files, by file.

    Raises:
        ValueError: a file is missing or damaged, or the index names one elsewhere.
    """
    files: list[Any] = [ONE_FILE]
    if os.path.lexists(folder / INDEX):
        homes = _read_object(folder / INDEX).get("weight_map")
        if not isinstance(homes, dict) or not homes:
            raise ValueError(f"{folder / INDEX}: has no weight_map from tensors to files")
        files = sorted(set(map(str, homes.values())))
    stored: dict[str, list[str]] = {}
    for name in files:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,200}\.safetensors", name):
            raise ValueError(f"{folder / INDEX}: names {name!r:.80}, which is no safetensors file of this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: there is no such file")
        with _tensors(folder / name, "cpu") as tensors:
            stored[name] = list(tensors.keys())
    return stored


@contextlib.contextmanager
def _tensors(file: Path, device: str) -> Iterator[Any]:
    """A safetensors file, opened. Raises ``ValueError`` if it is damaged."""
    try:
        with safe_open(file, framework="pt", device=device) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read as safetensors ({_line(error)})") from None


class Layer(nn.Module):
    """Attention and a feed-forward part, each behind a norm and added to its input."""

    def __init__(
        self, config: Mapping[str, Any], number: int, core: RouterCore | None, tables_of: nn.Module | None
    ) -> None:
        super().__init__()
        width, kind, eps = whole(config, "hidden_size"), config["mlp"][number], positive(config, "rms_norm_eps")
        heads, groups = whole(config, "num_attention_heads"), whole(config, "num_key_value_heads")
        if width % (2 * heads) or heads % groups:
            raise ValueError(
                f"config.json: hidden_size {width}, num_attention_heads {heads} and num_key_value_heads {groups} do "
                "not divide into heads of an even width and groups of heads"
            )
        size = whole(config["router"], "state_size") if core is not None else 0
        self.attention_norm = RMSNorm(width, eps)
        self.attention = Attention(width, heads, groups, number)
        self.mlp_norm = RMSNorm(width, eps)
        self.router_state = None
        if core is not None and LAYERS[kind].routed:
            passed = choice(config["router"], "passing", ("full", "detached", "none")) != "none"
            self.router_state = RouterState(core, width, size, passed)
        self.mlp = LAYERS[kind].of(config, config.get(kind, {}), size, tables_of)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """``x: [batch, length, width]`` and the routers' state ``[batch * length, size]``, if they have one."""
        x = x + self.attention(self.attention_norm(x), rotation, mask, cache)
        tokens = self.mlp_norm(x).flatten(0, 1)
        if self.router_state is None:
            y = self.mlp(tokens)
        else:
            state = self.router_state(tokens, state)
            y = self.mlp(tokens, state)
        return x + y.view_as(x), state


class LanguageModel(nn.Module):
    """The model that ``config.json`` describes, with weights that are not yet loaded; see :meth:`load`.

    Args:
        config: what the file holds.
        most_tensors: that it may ask for.

    Raises:
        ValueError: it describes no model of this file; the message is one sentence.
    """

    def __init__(self, config: Mapping[str, Any], most_tensors: int = MOST_TENSORS) -> None:
        super().__init__()
        self.config = dict(config)
        try:
            self._check(config, most_tensors)
            self._build(config)
        except KeyError as error:
            raise ValueError(f"config.json: has no {error}, by which the model would be built") from None
        except (TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError, OverflowError) as error:
            raise ValueError(f"config.json: does not describe a model of this file ({_line(error)})") from None

    def _check(self, config: Mapping[str, Any], most_tensors: int) -> None:
        kinds = config["mlp"]
        if not isinstance(kinds, list) or not 1 <= len(kinds) <= MOST_LAYERS:
            raise _refused("mlp", f"a list of the kinds of 1 to {MOST_LAYERS} layers", kinds)
        for kind in kinds:
            if not isinstance(kind, str) or kind not in LAYERS:
                raise ValueError(
                    f"config.json: mlp has a layer of the kind {kind!r:.60}, which this file does not know"
                )
        if whole(config, "num_hidden_layers") != len(kinds):
            raise _refused("num_hidden_layers", f"{len(kinds)}, as many as mlp has", config["num_hidden_layers"])
        for name in {*kinds, "router"} & config.keys():
            if not isinstance(config[name], Mapping):
                raise _refused(name, "an object", config[name])
        if sum(LAYERS[kind].least_tensors(config.get(kind, {})) for kind in kinds) > most_tensors:
            raise ValueError(f"config.json: asks for more layers or experts than the {most_tensors} tensors there are")
        text = whole(config, "text_vocab_size", 1, whole(config, "vocab_size"))
        whole(config, "eos_token_id", 0, text - 1)
        whole(config, "max_position_embeddings")
        positive(config, "rope_theta")

    def _build(self, config: Mapping[str, Any]) -> None:
        width, kinds = whole(config, "hidden_size"), config["mlp"]
        self.embedding = nn.Embedding(config["vocab_size"], width)
        self.router_core = None
        self.state_size = 0
        router = config.get("router")
        kind = choice(router, "kind", ROUTERS) if router is not None else ""
        if router is not None and kind in ("recurrent", "mlp"):
            self.state_size = whole(router, "state_size")
            projected_from = width if flag(router, "shared_projector") else 0
            self.router_core = RouterCore(self.state_size, kind == "recurrent", projected_from)
        layers: list[Layer] = []
        pools: dict[str, list[nn.Module]] = {}  # by kind: the layers that share the tables of the first of them
        for number, kind in enumerate(kinds):
            pool = pools.setdefault(kind, [])
            layers.append(Layer(config, number, self.router_core, pool[0] if pool else None))
            pool.append(layers[-1].mlp)
            section = config.get(kind, {})
            if len(pool) == (whole(section, "layers_per_pool") if "layers_per_pool" in section else 1):
                pools[kind] = []
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(width, positive(config, "rms_norm_eps"))
        self.output = None if flag(config, "tie_word_embeddings") else linear(width, config["vocab_size"])

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> LanguageModel:
        """The model of an exported folder, in evaluation mode and in the files' dtype.

        Nothing in the folder is run, and no file elsewhere is read.

        Raises:
            ValueError: a file is missing or damaged, or the files do not fit each other; the message is one sentence.
        """
        folder = Path(folder)
        config, stored = _read_object(folder / "config.json"), _stored(folder)
        with torch.device("meta"):
            model = cls(config, sum(map(len, stored.values())))
        state: dict[str, Tensor] = {}
        for file, names in stored.items():
            with _tensors(folder / file, str(device)) as tensors:
                state |= {name.removeprefix(PREFIX): tensors.get_tensor(name) for name in names}
        wanted = model.state_dict()
        for name, value in wanted.items():
            if name not in state:
                raise ValueError(f"{folder}: has no tensor {PREFIX}{name}, which config.json asks for")
            there = state[name]
            if there.shape != value.shape or there.is_floating_point() != value.is_floating_point():
                raise ValueError(
                    f"{folder}: the tensor {PREFIX}{name} is {there.dtype} {list(there.shape)}, but by config.json "
                    f"{list(value.shape)} numbers"
                )
        for name in state.keys() - wanted.keys():
            raise ValueError(f"{folder}: has the tensor {PREFIX}{name}, which config.json does not ask for")
        model.load_state_dict(state, assign=True)
        return model.eval()

    def forward(self, tokens: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        """Next-token logits ``[batch, length, vocab_size]`` of ``tokens: int64 [batch, length]``.

        Args:
            cache: of the tokens before these, which it is added to.
            mask: bool, broadcast to ``[batch, heads, length, earlier + length]``, True where a token sees another;
                None: every token sees itself and all before it.
        """
        return self.logits(self.hidden(tokens, cache, mask))

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        """The last layer's output ``[batch, length, hidden_size]``; see :meth:`forward`."""
        earlier, length = 0 if cache is None else cache.get_seq_length(), tokens.shape[1]
        if mask is None and earlier and length > 1:
            mask = torch.ones(length, earlier + length, dtype=torch.bool, device=tokens.device).tril(earlier)
        positions = torch.arange(earlier, earlier + length, dtype=torch.int64, device=tokens.device)
        return self.transform(self.embedding(tokens), positions[None], cache, mask)

    def transform(
        self,
        x: Tensor,
        positions: Tensor,
        cache: Cache | None,
        mask: Tensor | None,
        call: Callable[..., tuple[Tensor, Tensor | None]] = Layer.__call__,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """Embedded tokens ``x: [batch, length, hidden_size]`` through all layers and the norm after them.

        Args:
            positions: int64 ``[batch or 1, length]``.
            cache: of the tokens before these, which it is added to.
            mask: as in :meth:`forward`, or of numbers that are added to the scores; None, where ``x`` is a single
                token, or the cache has no others: every token sees itself and all before it.
            call: calls a layer, given first, with its arguments.
            seen: what every layer takes, and what leaves the last norm, is appended to it.
        """
        rotation = self._rotation(positions)
        state = x.new_zeros(x.shape[0] * x.shape[1], self.state_size) if self.state_size else None
        for layer in self.layers:
            if seen is not None:
                seen.append(x)
            x, state = call(layer, x, rotation, mask, cache, state)
        x = self.norm(x)
        if seen is not None:
            seen.append(x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., hidden_size]`` to ``[..., vocab_size]``."""
        return F.linear(hidden, self.embedding.weight) if self.output is None else self.output(hidden)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        channels = self.config["hidden_size"] // self.config["num_attention_heads"]
        powers = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels
        rates = 1 / positive(self.config, "rope_theta") ** powers
        angles = (positions[:, None, :, None].to(torch.float32) * rates).repeat(1, 1, 1, 2)
        return angles.cos(), angles.sin()

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``tokens: int64 [batch, length]`` and what follows them, up to the end of every document.

        The model sees the last ``max_position_embeddings`` tokens. Up to this many it reads each token once; beyond,
        the whole window again for every new one.

        Args:
            temperature: divides the logits; 0 takes the most likely token.
            top_k: draw among this many most likely tokens; 0: among all.
            generator: of the draws, on the device of ``tokens``.
        """
        window, end, text = (self.config[key] for key in ("max_position_embeddings", "eos_token_id", "text_vocab_size"))
        cache, ended = KVCache(), torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            if tokens.shape[1] <= window:
                hidden = self.hidden(tokens[:, cache.get_seq_length() :], cache)
            else:
                hidden = self.hidden(tokens[:, -window:])
            logits = self.logits(hidden[:, -1])[:, :text].float()  # the rest pads the vocabulary
            if temperature == 0:
                new = logits.argmax(-1)
            else:
                if 0 < top_k < text:
                    logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            new = new.masked_fill(ended, end)
            tokens, ended = torch.cat([tokens, new[:, None]], 1), ended | (new == end)
            if bool(ended.all()):
                break
        return tokens
