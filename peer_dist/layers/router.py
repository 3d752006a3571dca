"""Routers of coarse experts: which of them process a token, and what their outputs are weighted with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from peer_dist.layers.buffers import ExactBuffers, at_least_float32

_TEMPERATURE = 0.3  # of cosine logits at the start


class LinearLogits(nn.Module):
    """A logit per expert, linear in the input ``[..., width]``.

    Args:
        width: of the input.
        num_experts: how many logits.
        std: standard deviation that the weights are drawn with.
    """

    def __init__(self, width: int, num_experts: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width, dtype=torch.float32, device="cpu"))
        nn.init.normal_(self.weight, std=std)

    @torch.no_grad()
    def equalize(self) -> None:
        """Scale the experts' rows to one norm and leave the mean square of the weights as it is (sigma-MoE)."""
        norm = self.weight.square().sum(1).mean().sqrt()
        self.weight.copy_(F.normalize(self.weight) * norm)

    def forward(self, x: Tensor) -> Tensor:
        """The logits ``[..., num_experts]`` of ``x [..., width]``, in at least float32."""
        return F.linear(at_least_float32(x), at_least_float32(self.weight))


class CosineLogits(nn.Module):
    """Cosines between a low-rank projection of the input and experts' embeddings, over a learnt temperature.

    XMoE (Chi 2022, arXiv 2204.09179). The temperature is learnt as its logarithm, and so stays positive.

    Args:
        width: of the input.
        num_experts: how many logits.
        size: width of the projection and of the embeddings.
    """

    def __init__(self, width: int, num_experts: int, size: int) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(size, width, dtype=torch.float32, device="cpu"))
        self.weight = nn.Parameter(torch.empty(num_experts, size, dtype=torch.float32, device="cpu"))
        self.log_temperature = nn.Parameter(torch.tensor([_TEMPERATURE], dtype=torch.float32, device="cpu").log())
        nn.init.normal_(self.projection, std=width**-0.5)
        nn.init.normal_(self.weight, std=size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """The logits ``[..., num_experts]`` of ``x [..., width]``, in at least float32."""
        projected = F.linear(at_least_float32(x), at_least_float32(self.projection))
        cosines = F.linear(F.normalize(projected, dim=-1), F.normalize(at_least_float32(self.weight), dim=-1))
        return cosines * torch.exp(-at_least_float32(self.log_temperature))


@dataclass(frozen=True)
class Rule:
    """How experts are chosen from their logits, and what the logits are trained with beside the model's loss.

    Attributes:
        top_k: experts of a token; with ``expert_choice`` on average.
        score: of a logit, which an expert's output is weighted with.
        normalize: the weights of the experts chosen add up to 1.
        expert_choice: each expert takes the ``s * top_k / num_experts`` tokens of a sequence scoring highest, at least
            one. A token's experts then depend on later tokens.
        dropout: share of scores set to 0 in training, without rescaling.
        balance_loss: coefficient of ``E sum f P`` (Switch, arXiv 2101.03961): ``f`` the share of an expert in the picks
            that scores alone would make, ``P`` its mean probability.
        entropy_loss: coefficient of ``sum P log P`` (sigma-MoE, arXiv 2310.10837).
        z_loss: coefficient of the mean squared ``logsumexp`` of the logits (ST-MoE, arXiv 2202.08906).
        bias_rate: change per step of a bias on the scores, for choosing only, that evens the loads (DeepSeek-V3).
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    expert_choice: bool = False
    dropout: float = 0.0
    balance_loss: float = 0.0
    entropy_loss: float = 0.0
    z_loss: float = 0.0
    bias_rate: float = 0.0


class _WithLoss(torch.autograd.Function):
    """The value as it is; in the backward pass the loss beside it is differentiated too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())


class Router(ExactBuffers):
    """Chooses experts by a :class:`Rule`, and trains its logits for the rule's losses.

    The losses are those of one forward pass over all tokens of a group's ranks, which have equally many each. They are
    sums over tokens but for statistics that get no gradient, so that each rank differentiates its tokens' part alone.

    Args:
        logits: from the input ``[s, b, width]`` to ``[s, b, num_experts]``.
        num_experts: how many experts there are.
        rule: how they are chosen.
        group: ranks whose tokens the losses and the loads are over; None for this one.
        sequence: ranks that hold a sequence's parts in order; None if this one holds it whole.

    Attributes:
        loss_scale: what the losses are multiplied with before they are differentiated.
        losses: name to value, without coefficient, in the last training pass; the same on all ranks of the group.
    """

    expert_bias: Tensor | None
    loads: Tensor

    def __init__(
        self,
        logits: nn.Module,
        num_experts: int,
        rule: Rule,
        group: dist.ProcessGroup | None = None,
        sequence: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.logits, self.num_experts, self.rule, self.group, self.sequence = logits, num_experts, rule, group, sequence
        self.loss_scale = 1.0
        self.losses: dict[str, Tensor] = {}
        bias = torch.zeros(num_experts, dtype=torch.float32, device="cpu") if rule.bias_rate else None
        self.register_buffer("expert_bias", bias)
        loads = torch.zeros(num_experts, dtype=torch.int64, device="cpu")
        self.register_buffer("loads", loads, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of the tokens ``x [s, b, width]``.

        Returns:
            The weights of the experts' outputs, ``[s * b, num_experts]``, 0 where an expert is not picked, and bool of
            the same shape, whether a token picks an expert.
        """
        rule, logits = self.rule, self.logits(x)
        scores = logits.softmax(-1) if rule.score == "softmax" else logits.sigmoid()
        if rule.dropout and self.training:
            scores = scores * (torch.rand_like(scores) >= rule.dropout)
        if rule.expert_choice:
            by_score = picked = self._tokens_of_experts(scores.detach())
        else:
            by_score = picked = self._experts_of_tokens(scores)
            if self.expert_bias is not None:
                picked = self._experts_of_tokens(scores + self.expert_bias)
        gates = scores * picked
        if rule.normalize and not rule.expert_choice:
            gates = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
        if self.training and torch.is_grad_enabled():  # once, with recomputation too
            if self.expert_bias is not None:
                self.loads += picked.sum((0, 1))
            if rule.balance_loss or rule.entropy_loss or rule.z_loss:
                gates = _WithLoss.apply(gates, self.loss_scale * self._loss(logits, scores, by_score))
        return gates.flatten(0, 1), picked.flatten(0, 1)

    def _experts_of_tokens(self, scores: Tensor) -> Tensor:
        best = scores.topk(self.rule.top_k, dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)

    def _tokens_of_experts(self, scores: Tensor) -> Tensor:
        """Whether an expert picks a token, ``[s, b, num_experts]`` bool, chosen over whole sequences."""
        own, ranks = scores, 1 if self.sequence is None else self.sequence.size()
        if self.sequence is not None and ranks > 1:
            scores = scores.new_empty(ranks * len(own), *own.shape[1:])
            dist.all_gather_into_tensor(scores, own.contiguous(), group=self.sequence)
        best = scores.topk(max(1, len(scores) * self.rule.top_k // self.num_experts), dim=0).indices
        picked = torch.zeros_like(scores, dtype=torch.bool).scatter(0, best, True)
        return picked if self.sequence is None else picked.chunk(ranks)[self.sequence.rank()]

    def _total(self, value: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def _loss(self, logits: Tensor, scores: Tensor, picked: Tensor) -> Tensor:
        """This rank's part of the weighted losses; their values go to ``losses``."""
        rule, experts = self.rule, self.num_experts
        tokens = logits[..., 0].numel() * (1 if self.group is None else self.group.size())
        if rule.balance_loss and rule.score == "sigmoid":
            probabilities = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        else:
            probabilities = logits.softmax(-1)
        share = probabilities.sum((0, 1)) / tokens
        z = logits.logsumexp(-1).square().sum() / tokens
        picks = picked.sum((0, 1)).to(share.dtype) / (tokens * rule.top_k)
        mean, load, whole_z = self._total(torch.cat([share.detach(), picks, z.detach()[None]])).split(
            [experts, experts, 1]
        )
        log = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
        self.losses = {}
        loss = z.new_zeros(())
        if rule.balance_loss:
            loss = loss + rule.balance_loss * experts * (load * share).sum()
            self.losses["balance_loss"] = experts * (load * mean).sum()
        if rule.entropy_loss:  # whose derivative by P is 1 + log P
            loss = loss + rule.entropy_loss * ((1 + log) * share).sum()
            self.losses["entropy_loss"] = (mean * log).sum()
        if rule.z_loss:
            loss = loss + rule.z_loss * z
            self.losses["z_loss"] = whole_z[0]
        return loss

    @torch.no_grad()
    def end_step(self, applied: bool) -> None:
        """Move the bias, if the step was ``applied``, by the loads since the last call. Collective over the group."""
        if self.expert_bias is not None:
            loads = self._total(self.loads.clone()).to(self.expert_bias.dtype)
            if applied:
                self.expert_bias += self.rule.bias_rate * torch.sign(loads.mean() - loads)
        self.loads.zero_()
