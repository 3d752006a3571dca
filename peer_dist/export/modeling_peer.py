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
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .peer_model import LanguageModel

# transformers calls the cache so in its newest versions, and past_key_values before
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class PeerConfig(PretrainedConfig):
    """What ``config.json`` says, an attribute per key."""

    model_type = "peer_dist"


class PeerForCausalLM(PreTrainedModel, GenerationMixin):
    """The exported model as transformers loads, runs and generates with it."""

    config_class = PeerConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["Layer"]
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"running_mean", "running_var", "expert_bias"}

    def __init__(self, config: PeerConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.to_dict())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from the folder's files."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the tokens."""
        return self.model.embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Args:
        input_ids: int64 ``[batch, length]``.
        attention_mask: ``[batch, earlier + length]``, 0 where a text is padded.
        past_key_values, cache: a ``DynamicCache`` of the earlier tokens, by the name that transformers gives it.
        labels: as in every causal language model of transformers: ``input_ids``, -100 where nothing counts.
        logits_to_keep: of how many last tokens logits are wanted; 0: of all.

        Raises:
            ValueError: a cache that is not a ``DynamicCache``, or other inputs than these.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds: this model takes input_ids")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"{_CACHE}: this model takes a DynamicCache, not {type(cache).__name__}")
        mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            mask = _visible(attention_mask.bool(), input_ids.shape[1])
        hidden = self.model.hidden(input_ids, cache, mask)
        logits = self.model.logits(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: cache})


def _visible(kept: Tensor, length: int) -> Tensor:
    """``kept: [batch, all]`` to who sees whom, ``[batch, 1, length, all]``; padding sees itself, or it would be NaN."""
    total = kept.shape[1]
    own = torch.ones(length, total, dtype=torch.bool, device=kept.device)
    causal, itself = own.tril(total - length), own.tril(total - length).triu(total - length)
    return ((kept[:, None, :] & causal) | itself)[:, None]
