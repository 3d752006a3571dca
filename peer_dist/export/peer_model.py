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

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

INDEX = "model.safetensors.index.json"
PREFIX = "model."  # of the tensors' names in the files

_EPS = 1e-5  # of every norm
_ROTARY_BASE = 10000.0
_ELEMENTS = 1 << 23  # held at a time by a layer that looks at many keys and rows per token

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _linear(width: int, out: int) -> nn.Linear:
    return nn.Linear(width, out, bias=False)


class Cache(Protocol):
    """Keys and values of earlier tokens; transformers' ``DynamicCache`` is one too."""

    def get_seq_length(self) -> int:
        """Tokens so far."""

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Take those of new tokens, ``[batch, heads, length, channels]``; those of all tokens so far."""


class KVCache:
    """Keys and values of earlier tokens, by layer."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        return self._kept[0][0].shape[2] if self._kept else 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if layer in self._kept:
            before = self._kept[layer]
            keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        self._kept[layer] = keys, values
        return keys, values


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(_wide(x), self.weight.shape, _wide(self.weight), _EPS).to(x.dtype)


class VectorNorm(nn.Module):
    """LayerNorm or RMSNorm of each vector of ``[..., sets, width]``, with weights per set."""

    def __init__(self, kind: str, sets: int, width: int) -> None:
        super().__init__()
        self.kind, self.shape = kind, (sets, width)
        self.weight = nn.Parameter(torch.ones(sets * width))
        self.bias = nn.Parameter(torch.zeros(sets * width)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        norm = F.layer_norm if self.kind == "layer" else F.rms_norm
        y = norm(_wide(x), self.shape[1:], eps=_EPS) * self.weight.view(self.shape)
        return (y if self.bias is None else y + self.bias.view(self.shape)).to(x.dtype)


class KeyNorm(nn.Module):
    """Normalises sub-keys ``[..., 2, n, half]``, with weights per set of them."""

    def __init__(self, kind: str, sets: int, half: int) -> None:
        super().__init__()
        self.norm = VectorNorm(kind, sets, half)

    def forward(self, keys: Tensor) -> Tensor:
        per_key = keys.movedim(-2, 0)
        return self.norm(per_key.flatten(1, -2)).view_as(per_key).movedim(0, -2)


class QueryBatchNorm(nn.Module):
    """BatchNorm of queries ``[tokens, heads, key_dim]`` with the statistics that training kept."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, query: Tensor) -> Tensor:
        x = (_wide(query.flatten(1)) - self.running_mean) * torch.rsqrt(_wide(self.running_var) + _EPS)
        return (x * self.weight + self.bias).view_as(query).to(query.dtype)


class Attention(nn.Module):
    """Causal softmax attention with rotary positions."""

    def __init__(self, width: int, heads: int, layer: int) -> None:
        super().__init__()
        self.heads, self.layer = heads, layer
        self.qkv = _linear(width, 3 * width)  # rows: [heads, (query, key, value), channels]
        self.out = _linear(width, width)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        """``x: [batch, length, width]``; ``rotation``: cosines and sines ``[length, channels]``."""
        query, key, value = self.qkv(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        causal = mask is None and key.shape[2] == query.shape[2]
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.out(context.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * rotation[0] + torch.cat([-second, first], -1) * rotation[1]


class MLP(nn.Module):
    """A dense feed-forward block (``gelu``, ``relu`` or ``swiglu``), with its ``top_k`` largest hidden units or all."""

    def __init__(self, width: int, hidden: int, activation: str, top_k: int = 0) -> None:
        super().__init__()
        self.activation, self.top_k = activation, top_k
        self.fc1 = _linear(width, 2 * hidden if activation == "swiglu" else hidden)
        self.fc2 = _linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if self.activation == "swiglu":
            gate, hidden = hidden.chunk(2, -1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = _ACTIVATIONS[self.activation](hidden)
        if self.top_k:
            kept = hidden.topk(self.top_k, -1)
            hidden = torch.zeros_like(hidden).scatter(-1, kept.indices, kept.values)
        return self.fc2(hidden)


class ProductKeyLayer(nn.Module):
    """Retrieves ``top_k`` of ``n * n`` rows per head, key ``(a, b)`` being ``[keys[0, a], keys[1, b]]``."""

    def __init__(self, width: int, rows: int, section: Mapping[str, Any], state_size: int = 0) -> None:
        super().__init__()
        self.heads, self.top_k, self.n = section["heads"], section["top_k"], math.isqrt(rows)
        projected = section.get("query_projection", True)
        key_dim = section["key_dim"] if projected else width
        self.gate = _GATES[section["gate"]]
        self.query = _linear(width, self.heads * key_dim) if projected else None
        self.state_query = _linear(state_size, self.heads * key_dim) if state_size else None
        kind, sets = section["query_norm"], 2 if section["shared_keys"] else 2 * self.heads
        self.norm: nn.Module = nn.Identity() if kind == "none" else VectorNorm(kind, self.heads, key_dim)
        if kind == "batch":
            self.norm = QueryBatchNorm(self.heads * key_dim)
        shape = (2, self.n, key_dim // 2)
        self.keys = nn.Parameter(torch.empty(shape if section["shared_keys"] else (self.heads, *shape)))
        kind = section.get("key_norm", "none")
        self.key_norm = None if kind == "none" else KeyNorm(kind, sets, key_dim // 2)
        self.step = max(1, _ELEMENTS // max(self.heads * self.top_k * width, 2 * self.heads * self.n))  # tokens

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """``x: [tokens, width]``, ``state: [tokens, state_size]``, to ``[tokens, width]``, some tokens at a time."""
        keys = self.keys if self.key_norm is None else self.key_norm(self.keys)
        states = [None] * -(-len(x) // self.step) if state is None else state.split(self.step)
        return torch.cat([self._some(*each, keys) for each in zip(x.split(self.step), states)])

    def _some(self, x: Tensor, state: Tensor | None, keys: Tensor) -> Tensor:
        return self.mixed(x, *self.retrieve(x, state, keys))

    def retrieve(self, x: Tensor, state: Tensor | None, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and gates ``[tokens, heads * top_k]``."""
        if self.query is None:
            query = x[:, None].expand(-1, self.heads, -1)
        else:
            query = self.query(x) if self.state_query is None else self.query(x) + self.state_query(state)
            query = self.norm(query.unflatten(-1, (self.heads, -1)))
        halves = query.unflatten(-1, (2, -1)).permute(1, 2, 0, 3)  # [heads, 2, tokens, half]
        scores, numbers = _wide(halves @ keys.expand(self.heads, *keys.shape[-3:]).mT).topk(self.top_k, -1)
        pairs = (scores[:, 0, :, :, None] + scores[:, 1, :, None, :]).flatten(-2)
        best, places = pairs.topk(self.top_k, -1)  # [heads, tokens, top_k]
        first = numbers[:, 0].gather(-1, places // self.top_k)
        second = numbers[:, 1].gather(-1, places % self.top_k)
        rows, gates = first * self.n + second, self.gate(best)
        return rows.transpose(0, 1).flatten(1), gates.transpose(0, 1).flatten(1)

    def mixed(self, x: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
        raise NotImplementedError


class PEER(ProductKeyLayer):
    """``sum of g_i * act(down_i . x) * up_i`` over heads and retrieved experts.

    Args:
        tables_of: the layer whose tables this one reads, if they are not its own.
    """

    def __init__(self, width: int, section: Mapping[str, Any], state_size: int, tables_of: PEER | None) -> None:
        super().__init__(width, section["num_experts"], section, state_size)
        self.activation = _ACTIVATIONS[section["activation"]]
        self._tables_of = () if tables_of is None else (tables_of,)  # in a tuple: no sub-module of this
        if tables_of is None:
            self.down = nn.Parameter(torch.empty(section["num_experts"], width))
            self.up = nn.Parameter(torch.empty(section["num_experts"], width))
        hidden = section["dense_hidden"]
        self.dense_in = _linear(width, hidden) if hidden else None
        self.dense_out = _linear(hidden, width) if hidden else None
        self.gate_in = _linear(width, width) if section["output_gate"] else None
        self.gate_out = _linear(width, width) if section["output_gate"] else None

    def mixed(self, x: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
        owner = self._tables_of[0] if self._tables_of else self
        hidden = self.activation(_wide(owner.down[rows] @ x[:, :, None]))[..., 0] * gates
        y = (hidden[:, None].to(x.dtype) @ owner.up[rows])[:, 0]
        if self.dense_in is not None and self.dense_out is not None:
            y = y + self.dense_out(self.activation(self.dense_in(x)))
        if self.gate_in is not None and self.gate_out is not None:
            y = self.gate_out(y * F.silu(self.gate_in(x)))
        return y


class ProductKeyMemory(ProductKeyLayer):
    """``sum of g_i * value_i`` over heads and retrieved values."""

    def __init__(self, width: int, section: Mapping[str, Any]) -> None:
        super().__init__(width, section["num_values"], section)
        self.values = nn.Parameter(torch.empty(section["num_values"], width))

    def mixed(self, x: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
        return (gates[:, None].to(x.dtype) @ self.values[rows])[:, 0]


class LinearLogits(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_wide(x), _wide(self.weight))


class CosineLogits(nn.Module):
    def __init__(self, width: int, experts: int, size: int) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(size, width))
        self.weight = nn.Parameter(torch.empty(experts, size))
        self.log_temperature = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        projected = F.normalize(F.linear(_wide(x), _wide(self.projection)), dim=-1)
        return F.linear(projected, F.normalize(_wide(self.weight), dim=-1)) * torch.exp(-_wide(self.log_temperature))


class Router(nn.Module):
    """Chooses the ``top_k`` experts of the largest scores; a bias, if there is one, counts in the choice only."""

    expert_bias: Tensor | None

    def __init__(self, logits: nn.Module, experts: int, top_k: int, score: str, normalize: bool, bias: bool) -> None:
        super().__init__()
        self.logits, self.top_k, self.score, self.normalize = logits, top_k, _GATES[score], normalize
        self.register_buffer("expert_bias", torch.zeros(experts) if bias else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[tokens, width]`` to experts and gates ``[tokens, top_k]``."""
        scores = self.score(self.logits(x))
        experts = (scores if self.expert_bias is None else scores + self.expert_bias).topk(self.top_k, -1).indices
        gates = scores.gather(-1, experts)
        if self.normalize:
            gates = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
        return experts, gates


class MixtureOfExperts(nn.Module):
    def __init__(self, router: Router, experts: list[MLP]) -> None:
        super().__init__()
        self.router, self.experts = router, nn.ModuleList(experts)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """``x: [tokens, width]`` through the experts that are chosen by it or, if there is one, by the state."""
        chosen, gates = self.router(x if state is None else state)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens, places = (chosen == number).nonzero(as_tuple=True)
            y = y.index_add(0, tokens, expert(x[tokens]) * gates[tokens, places, None].to(x.dtype))
        return y


class RouterCore(nn.Module):
    """What all layers' routers share: a GRU over layers, or a perceptron of equal size."""

    def __init__(self, size: int, recurrent: bool, projected_from: int) -> None:
        super().__init__()
        self.recurrent = recurrent
        perceptron = nn.Sequential(nn.Linear(size, 3 * size), nn.GELU(), nn.Linear(3 * size, size))
        self.cell: nn.Module = nn.GRUCell(size, size) if recurrent else perceptron
        self.projection = _linear(projected_from, size) if projected_from else None


class RouterState(nn.Module):
    """A layer's step of the routers' state."""

    def __init__(self, core: RouterCore, width: int, size: int, passed: bool) -> None:
        super().__init__()
        self._core, self.passed = (core,), passed  # in a tuple: no sub-module of this
        self.projection = None if core.projection is not None else _linear(width, size)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """``x: [tokens, width]``, ``state: [tokens, size]`` of the layers before."""
        (core,) = self._core
        project = core.projection if self.projection is None else self.projection
        assert project is not None
        if not core.recurrent:
            return core.cell(project(x))
        return core.cell(project(x), state if self.passed else torch.zeros_like(state))


class Layer(nn.Module):
    """Attention and a feed-forward part, each behind a norm and added to its input."""

    def __init__(self, config: Mapping[str, Any], number: int, core: RouterCore | None, tables_of: PEER | None) -> None:
        super().__init__()
        width, kind = config["hidden_size"], config["mlp"][number]
        size = config["router"]["state_size"] if core is not None else 0
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, config["num_attention_heads"], number)
        self.mlp_norm = RMSNorm(width)
        self.router_state = None
        if core is not None and kind in ("peer", "moe", "sigma_moe"):
            self.router_state = RouterState(core, width, size, config["router"]["passing"] != "none")
        self.mlp: nn.Module
        if kind == "dense":
            hidden, activation = config["intermediate_size"], config["ffn_activation"]
            self.mlp = MLP(width, hidden, activation, config["ffn_top_k"])
        elif kind == "peer":
            self.mlp = PEER(width, config["peer"], size, tables_of)
        elif kind == "pkm":
            self.mlp = ProductKeyMemory(width, config["pkm"])
        elif kind in ("moe", "sigma_moe"):
            self.mlp = _coarse(config, kind, size)
        else:
            raise ValueError(f"config.json: mlp has a layer of the kind {kind!r}, which this file does not know")

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


def _coarse(config: Mapping[str, Any], kind: str, state_size: int) -> MixtureOfExperts:
    width, section, router = config["hidden_size"], config[kind], config["router"]
    experts = section["num_experts"]
    if kind == "moe":
        hidden = section["expert_hidden_size"] or config["intermediate_size"]
        activation, score, normalize = config["ffn_activation"], section["score"], section["normalize"]
    else:
        hidden, activation, score, normalize = section["expert_hidden_size"], "relu", "sigmoid", False
    logits: nn.Module = LinearLogits(state_size or width, experts)
    if router["kind"] == "cosine":
        logits = CosineLogits(width, experts, router["state_size"])
    return MixtureOfExperts(
        Router(logits, experts, section["top_k"], score, normalize, section.get("expert_bias", False)),
        [MLP(width, hidden, activation) for _ in range(experts)],
    )


class LanguageModel(nn.Module):
    """The model that ``config.json`` describes, with weights that are not yet loaded; see :meth:`load`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        width, kinds = config["hidden_size"], config["mlp"]
        self.embedding = nn.Embedding(config["vocab_size"], width)
        self.router_core = None
        self.state_size = 0
        router = config.get("router")
        if router is not None and router["kind"] in ("recurrent", "mlp"):
            self.state_size = router["state_size"]
            projected_from = width if router["shared_projector"] else 0
            self.router_core = RouterCore(self.state_size, router["kind"] == "recurrent", projected_from)
        layers: list[Layer] = []
        pool: list[PEER] = []  # the PEER layers that share the tables of the first of them
        for number, kind in enumerate(kinds):
            layers.append(Layer(config, number, self.router_core, pool[0] if pool and kind == "peer" else None))
            if isinstance(layers[-1].mlp, PEER):
                pool.append(layers[-1].mlp)
                if len(pool) == config["peer"]["layers_per_pool"]:
                    pool = []
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(width)
        self.output = None if config["tie_word_embeddings"] else _linear(width, config["vocab_size"])

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> LanguageModel:
        """The model of an exported folder, in evaluation mode and in the files' dtype."""
        folder = Path(folder)
        with torch.device("meta"):
            model = cls(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        state: dict[str, Tensor] = {}
        for file in sorted(set(files.values())):
            with safe_open(folder / file, framework="pt", device=str(device)) as tensors:
                names = (name for name, home in files.items() if home == file)
                state |= {name.removeprefix(PREFIX): tensors.get_tensor(name) for name in names}
        model.load_state_dict(state, assign=True)
        return model.eval()

    def forward(self, tokens: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        """Next-token logits ``[batch, length, vocab_size]`` of ``tokens: int64 [batch, length]``.

        Args:
            cache: of the tokens before these, which it is added to.
            mask: bool, broadcast to ``[batch, heads, length, earlier + length]``, True where a token sees another;
                None: every token sees itself and all before it.
        """
        return self.logits(self.hidden(tokens, cache, mask))

    def hidden(self, tokens: Tensor, cache: Cache | None = None, mask: Tensor | None = None) -> Tensor:
        """The last layer's output ``[batch, length, hidden_size]``; see :meth:`forward`."""
        earlier, length = 0 if cache is None else cache.get_seq_length(), tokens.shape[1]
        if mask is None and earlier and length > 1:
            mask = torch.ones(length, earlier + length, dtype=torch.bool, device=tokens.device).tril(earlier)
        x = self.embedding(tokens)
        rotation = self._rotation(earlier, length, x)
        state = x.new_zeros(tokens.numel(), self.state_size) if self.state_size else None
        for layer in self.layers:
            x, state = layer(x, rotation, mask, cache, state)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., hidden_size]`` to ``[..., vocab_size]``."""
        return F.linear(hidden, self.embedding.weight if self.output is None else self.output.weight)

    def _rotation(self, begin: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        channels = self.config["hidden_size"] // self.config["num_attention_heads"]
        powers = torch.arange(0, channels, 2, dtype=torch.float32, device=like.device) / channels
        positions = torch.arange(begin, begin + length, dtype=torch.float32, device=like.device)
        angles = torch.outer(positions, 1 / _ROTARY_BASE**powers).repeat(1, 2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

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
