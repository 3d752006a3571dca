"""The model of ``peer_model.py`` behind Hugging Face transformers' interface.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer("ROMEO:", return_tensors="pt"), max_new_tokens=100)

The tokenizer begins every text with the end-of-document token, as training did.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .peer_model import LanguageModel, linear

# transformers calls the cache so in its newest versions, and past_key_values before
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_ABSENT = ("rope_scaling", "rope_parameters", "sliding_window")  # what others' configs have and this model has not


class PeerConfig(PretrainedConfig):
    """What ``config.json`` says, an attribute per key."""

    model_type = "peer_dist"
    use_cache: bool = True


class PeerForCausalLM(PreTrainedModel, GenerationMixin):
    """The exported model as transformers loads, runs, trains and generates with it.

    Raises:
        ValueError: the config asks for what the model does not have.
    """

    config_class = PeerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["Layer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache", "past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"running_mean", "running_var", "expert_bias"}
    _tied_weights_keys: ClassVar[dict[str, str]] = {"model.output.weight": "model.embedding.weight"}

    def __init__(self, config: PeerConfig) -> None:
        super().__init__(config)
        for name in _ABSENT:
            if getattr(config, name, None):
                raise ValueError(f"config: this model has no {name}; leave it out")
        self.model = LanguageModel(config.to_dict())
        if self.model.output is None:  # the embedding's weight, by a module that is called, as others' code expects
            self.model.output = linear(config.hidden_size, config.vocab_size)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights that no file has."""
        std = getattr(self.config, "initializer_range", 0.02)
        for name, value in module.named_parameters(recurse=False):
            if value.ndim > 1:
                nn.init.normal_(value, std=std)
            else:
                nn.init.constant_(value, float(name == "weight"))
        for name, buffer in module.named_buffers(recurse=False):
            nn.init.constant_(buffer, float(name == "running_var"))

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding of the tokens."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another embedding in its place."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Linear | None:
        """Return the map to logits."""
        return self.model.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another map to logits in its place."""
        self.model.output = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Args:
        input_ids: int64 ``[batch, length]``; or, in their place, ``inputs_embeds: [batch, length, hidden_size]``.
        attention_mask: ``[batch, earlier + length]``, 0 where a text is padded; or ``[batch or 1, 1, length, all]``:
            bool, True where a token sees another, or numbers that are added to the scores.
        position_ids: int64 ``[batch or 1, length]``; None: those of the tokens that are not padded. Where they begin
            anew, without a mask and a cache, a text of its own begins.
        past_key_values, cache: a ``Cache`` of the earlier tokens, by the name that transformers gives it.
        labels: as in every causal language model of transformers: ``input_ids``, -100 where nothing counts.
        use_cache: whether to return a cache; None: as the config says. Recomputing layers there is none.
        output_hidden_states: whether to return what each layer takes, and the last norm's output.
        logits_to_keep: of how many last tokens, or of which ones, logits are wanted; 0: of all.
        kwargs: ``num_items_in_batch`` and ``shift_labels``, for the loss.

        Raises:
            ValueError: an argument is none of these, or cannot be used.
        """
        kwargs.pop("cache_position", None)  # of older versions: where the cache ends, which it knows itself
        kwargs.setdefault("output_attentions", self.config.output_attentions)
        loss_options = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        for name, value in kwargs.items():
            if value is not None and value is not False:
                raise ValueError(f"{name}: this model does not take it; leave it out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if past_key_values is not None and cache is not None and past_key_values is not cache:
            raise ValueError("cache and past_key_values are two names of one thing; give one of them")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(f"{_CACHE}: this model takes a Cache of transformers, not {type(cache).__name__}")
        call: dict[str, Any] = {}
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError(f"{_CACHE}: layers that are computed again in the backward pass would fill it twice")
            call, use_cache = {"call": self._checkpointed}, False
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)

        x = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        filled = None if cache is None else _Filled(cache, x)
        earlier = 0 if filled is None else filled.earlier
        mask = _visible(attention_mask, position_ids, earlier, x)
        if position_ids is None:
            position_ids = torch.arange(earlier, earlier + x.shape[1], dtype=torch.int64, device=x.device)[None]
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.to(x.device, torch.int64).cumsum(-1) - 1).clamp(min=0)[:, earlier:]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        seen: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.model.transform(x, position_ids, filled, mask, seen=seen, **call)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.model.logits(hidden[:, kept]), None
        if labels is not None or loss_options.get("shift_labels") is not None:
            size = logits.shape[-1]
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **loss_options)
        states = None if seen is None else tuple(seen)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states, **{_CACHE: cache})

    def _checkpointed(self, layer: nn.Module, *inputs: Any) -> Any:
        """Call a layer of which the inputs alone are kept; the rest is computed again in the backward pass."""
        return self._gradient_checkpointing_func(layer.__call__, *inputs)


class _Filled:
    """A cache of transformers as ``peer_model.py`` fills it.

    Attributes:
        earlier: tokens in it before ``x: [batch, length, width]``, which it is filled with.
    """

    def __init__(self, cache: Cache, x: Tensor) -> None:
        self.earlier = int(cache.get_seq_length())
        self._total = self.earlier + x.shape[1]
        places = torch.arange(self.earlier, self._total, dtype=torch.int64, device=x.device)
        self._cache, self._options = cache, {"cache_position": places}  # which older versions ask for

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Take those of new tokens; those of all tokens so far, without the free room of a cache of fixed size."""
        keys, values = self._cache.update(keys, values, layer, self._options)
        return keys[:, :, : self._total], values[:, :, : self._total]


def _visible(attention_mask: Tensor | None, position_ids: Tensor | None, earlier: int, x: Tensor) -> Tensor | None:
    """Who sees whom, ``[batch or 1, 1, length, earlier + length]``.

    Args:
        attention_mask, position_ids: as they came.
        earlier: tokens of the cache, before ``x: [batch, length, width]``.

    Returns:
        None where every token sees itself and all before it, and none is in the cache.
    """
    length = x.shape[1]
    total = earlier + length
    causal = torch.ones(length, total, dtype=torch.bool, device=x.device).tril(earlier)
    if attention_mask is None:
        apart = None if position_ids is None or earlier else position_ids.diff(dim=-1) != 1
        if apart is None or not bool(apart.any()):
            return causal[None, None] if earlier else None
        text = nn.functional.pad(apart.cumsum(-1), (1, 0)).to(x.device)
        return (causal & (text[:, :, None] == text[:, None, :]))[:, None]
    attention_mask = attention_mask.to(x.device)
    if attention_mask.ndim == 4 and attention_mask.shape[2] == length and attention_mask.shape[3] >= total:
        attention_mask = attention_mask[..., :total]  # a cache of fixed size has free room there
        return attention_mask if attention_mask.is_floating_point() else attention_mask.bool()
    if attention_mask.ndim != 2 or attention_mask.shape[1] != total:
        raise ValueError(
            f"attention_mask: has the shape {list(attention_mask.shape)}, but with {earlier} earlier token(s) and "
            f"{length} new one(s) it must be [batch, {total}] or [batch, 1, {length}, {total}]"
        )
    kept = attention_mask.bool()
    if not earlier and bool(kept.all()):
        return None
    itself = causal.triu(earlier)  # padding sees itself: a row that sees nothing would be NaN
    return ((kept[:, None, :] & causal) | itself)[:, None]
