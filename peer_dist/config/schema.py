"""The configuration's keys: their types, defaults, meaning and limits, each stated once.

YAML is turned into these objects by :func:`peer_dist.config.load_config`; ``peer-dist train --help`` prints
this file's descriptions.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MLPKind = Literal["dense", "peer", "moe", "pkm", "sigma_moe"]

MLP_SECTIONS = ("peer", "moe", "sigma_moe", "pkm", "router")  # what describes the layers, beside model

ROUTED_KINDS = ("peer", "moe", "sigma_moe")  # those of model.mlp that router.kind changes

VOCAB_MULTIPLE = 128  # what the vocabulary is padded to a multiple of, in every layout

Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The transformer: Megatron-core's GPTModel with rotary positions and RMSNorm."""

    num_layers: int = Field(4, ge=1, description="transformer layers")
    hidden_size: int = Field(128, ge=1, description="width of the residual stream")
    num_attention_heads: int = Field(4, ge=1, description="attention heads; must divide hidden_size")
    num_query_groups: int | None = Field(
        None,
        ge=1,
        description="heads of keys and values, each shared by as many of the attention heads; null: as many as those",
    )
    rope_base: float = Field(10000.0, gt=1, description="base of the rotary positions' wavelengths (RoPE theta)")
    norm_eps: float = Field(1e-5, gt=0, description="added to the mean square in the layers' RMSNorms")
    ffn_hidden_size: int = Field(512, ge=1, description="hidden width of the dense feed-forward layers")
    ffn_activation: Literal["gelu", "swiglu"] = Field("swiglu", description="dense feed-forward activation")
    ffn_top_k: int = Field(
        0,
        ge=0,
        description="hidden units of a dense feed-forward kept per token, the largest; 0: all (sigma-MoE paper)",
    )
    seq_length: int = Field(128, ge=2, description="tokens per sequence")
    mlp: MLPKind | list[MLPKind] = Field(
        "dense",
        description="feed-forward kind, one for all layers or a list with one per layer: dense | peer | moe | pkm | "
        "sigma_moe",
    )
    tied_embeddings: bool = Field(True, description="input and output embeddings share one matrix")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="dropout after embeddings, attention and feed-forward, and of attention weights",
    )

    @property
    def query_groups(self) -> int:
        """Heads of keys and values, whether or not ``num_query_groups`` says so."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def mlp_kinds(self) -> list[MLPKind]:
        """The feed-forward kind of each layer, ``num_layers`` long."""
        return list(self.mlp) if isinstance(self.mlp, list) else [self.mlp] * self.num_layers

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"hidden_size / num_attention_heads ({self.hidden_size // self.num_attention_heads}) "
                "must be even for rotary positions"
            )
        if self.num_attention_heads % self.query_groups:
            raise ValueError(
                f"num_query_groups ({self.num_query_groups}) must divide num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.ffn_top_k > self.ffn_hidden_size:
            raise ValueError(f"ffn_top_k ({self.ffn_top_k}) must be at most ffn_hidden_size ({self.ffn_hidden_size})")
        if isinstance(self.mlp, list) and len(self.mlp) != self.num_layers:
            raise ValueError(f"mlp lists {len(self.mlp)} kinds for {self.num_layers} layers (num_layers)")
        return self


def _square(value: int) -> int:
    root = math.isqrt(value)
    if root * root != value:
        raise ValueError(
            f"must be the square of a whole number; {value} is not, {root**2} and {(root + 1) ** 2} are the nearest"
        )
    return value


def _even(value: int) -> int:
    if value % 2:
        raise ValueError(f"must be even (two sub-keys of half the width); {value} is odd")
    return value


class PEERSection(Section):
    """The PEER layers (model.mlp: peer): product-key retrieval of single-neuron experts."""

    num_experts: int = Field(65536, ge=1, description="experts N per layer; the square of a whole number")
    heads: int = Field(8, ge=1, description="query heads h; each retrieves top_k experts")
    top_k: int = Field(16, ge=1, description="experts k per head; at most sqrt(num_experts)")
    key_dim: int = Field(128, ge=2, description="width of a query and of a product key; even")
    query_norm: Literal["batch", "layer", "rms", "none"] = Field("batch", description="query normalisation")
    gate: Literal["softmax", "sigmoid", "relu"] = Field("softmax", description="router score to gate")
    activation: Literal["gelu", "relu", "silu"] = Field("gelu", description="the experts' activation")
    shared_keys: bool = Field(True, description="all heads share the product keys (the paper); false: per head")
    key_norm: Literal["none", "layer", "rms"] = Field("none", description="normalisation of the sub-keys (UltraMem)")
    output_gate: bool = Field(False, description="y becomes (y * silu(x W1)) W2 (Memory+)")
    dense_hidden: int = Field(0, ge=0, description="hidden width of a dense block beside the experts; 0: none")
    dispatch_chunks: int = Field(
        1, ge=1, description="parts in which tokens travel, so that exchange and experts overlap; may change on resume"
    )
    layers_per_pool: int = Field(
        1, ge=1, description="PEER layers, counted from the first, that share one pair of tables; on one pipeline stage"
    )
    revive_interval: int = Field(
        0,
        ge=0,
        description="steps after which sub-keys that were hardly picked become near copies of well-used ones, so "
        "that their experts are picked; 0: never",
    )
    table_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="dtype of the down and up tables; bfloat16 keeps float32 masters beside them, unless "
        "table_optimizer.stochastic_rounding",
    )

    _square = field_validator("num_experts")(_square)
    _even = field_validator("key_dim")(_even)

    @model_validator(mode="after")
    def _check(self) -> PEERSection:
        root = math.isqrt(self.num_experts)
        if self.top_k > root:
            raise ValueError(f"top_k ({self.top_k}) must be at most sqrt(num_experts) ({root})")
        return self


def _check_top_k(top_k: int, num_experts: int) -> None:
    if top_k > num_experts:
        raise ValueError(f"top_k ({top_k}) must be at most num_experts ({num_experts})")


class MoESection(Section):
    """Coarse mixture-of-experts layers (model.mlp: moe): Megatron-core's MoELayer, without dropped tokens."""

    num_experts: int = Field(8, ge=2, description="experts, each a feed-forward of its own")
    expert_hidden_size: int | None = Field(None, ge=1, description="hidden width; null: model.ffn_hidden_size")
    top_k: int = Field(2, ge=1, description="experts per token (expert_choice: on average)")
    routing: Literal["token_choice", "expert_choice"] = Field(
        "token_choice",
        description="who chooses whom; expert_choice (per sequence) lets later tokens change earlier ones: it is not "
        "causal, and its losses are no language model's",
    )
    score: Literal["softmax", "sigmoid"] = Field("softmax", description="router logit to score")
    normalize: bool = Field(
        True,
        description="gates add up to 1 over the experts chosen; false: the scores as they are (Switch, with top_k 1)",
    )
    balance_loss: float = Field(
        0.01, ge=0, description="coefficient of the load-balance loss, over a forward pass of all ranks"
    )
    z_loss: float = Field(0.0, ge=0, description="coefficient of the router's z-loss")
    expert_bias: bool = Field(False, description="balance by a bias on the scores (DeepSeek-V3); needs sigmoid")
    expert_bias_rate: float = Field(1e-3, gt=0, description="change of that bias per step")

    @model_validator(mode="after")
    def _check(self) -> MoESection:
        by_tokens = self.routing == "token_choice"
        _check_top_k(self.top_k, self.num_experts)
        if by_tokens and self.top_k == 1 and self.normalize:
            raise ValueError("normalize must be false with top_k 1: every gate would be 1 and the router learn nothing")
        if self.expert_bias and not by_tokens:
            raise ValueError("expert_bias must be false with routing expert_choice: its experts are balanced already")
        if self.expert_bias and self.score != "sigmoid":
            raise ValueError(f"expert_bias needs score sigmoid (got {self.score}): the bias is added to the scores")
        return self


class SigmaMoESection(Section):
    """sigma-MoE layers (model.mlp: sigma_moe; Csordas 2023): sigmoid router, ReLU experts, no softmax."""

    num_experts: int = Field(16, ge=2, description="experts N_E")
    expert_hidden_size: int = Field(128, ge=1, description="hidden width G of an expert")
    top_k: int = Field(4, ge=1, description="experts K per token")
    entropy_loss: float = Field(
        1e-3, ge=0, description="gamma of the entropy regulariser, over a forward pass of all ranks"
    )
    expert_dropout: float = Field(0.0, ge=0, lt=1, description="delta: share of scores set to 0 in training")

    @model_validator(mode="after")
    def _check(self) -> SigmaMoESection:
        _check_top_k(self.top_k, self.num_experts)
        return self


class PKMSection(Section):
    """Product-key memory layers (model.mlp: pkm; Lample 2019): PEER's retrieval, of values instead of experts."""

    num_values: int = Field(65536, ge=1, description="values; the square of a whole number")
    heads: int = Field(4, ge=1, description="query heads")
    top_k: int = Field(32, ge=1, description="values per head; at most sqrt(num_values)")
    key_dim: int = Field(
        128, ge=2, description="width of a query and of a product key; without effect where query_projection is false"
    )
    query_norm: Literal["batch", "layer", "rms", "none"] = Field(
        "batch", description="query normalisation; none where query_projection is false"
    )
    query_projection: bool = Field(
        True, description="queries are a linear map of the input; false: the input itself, its halves for the sub-keys"
    )
    gate: Literal["softmax", "sigmoid", "relu"] = Field("softmax", description="score to weight")
    shared_keys: bool = Field(False, description="all heads share the product keys; not without query_projection")
    init: Literal["memory", "dense"] = Field(
        "memory",
        description="of keys and values: memory: values N(0, 1/d) (Lample); dense: as the two matrices of a "
        "feed-forward as wide as num_values",
    )
    table_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the values; bfloat16 as with peer.table_dtype"
    )

    _square = field_validator("num_values")(_square)
    _even = field_validator("key_dim")(_even)

    @model_validator(mode="after")
    def _check(self) -> PKMSection:
        root = math.isqrt(self.num_values)
        if self.top_k > root:
            raise ValueError(f"top_k ({self.top_k}) must be at most sqrt(num_values) ({root})")
        if not self.query_projection and self.query_norm != "none":
            raise ValueError(
                f"query_norm ({self.query_norm}) must be none where query_projection is false: the query is the "
                "layer's input, which is normalised already"
            )
        if not self.query_projection and self.shared_keys:
            raise ValueError(
                "shared_keys must be false where query_projection is false: all heads would pick the same values"
            )
        return self


class RouterSection(Section):
    """How routers see the layers before theirs (RMoE, Qiu 2024), in moe, sigma_moe and peer layers alike."""

    kind: Literal["linear", "recurrent", "mlp", "cosine"] = Field(
        "linear",
        description="linear: of the layer's input; recurrent: of a GRU's state over layers (peer: added to the query); "
        "mlp: as large as recurrent, without a state; cosine: low-rank cosine scores (XMoE)",
    )
    state_size: int = Field(
        128, ge=1, description="width of the state, of the perceptron in its place (mlp), and of cosine's projection"
    )
    passing: Literal["full", "detached", "none"] = Field(
        "full", description="the state goes from layer to layer with its gradient, without, or starts anew in each"
    )
    shared_projector: bool = Field(False, description="one projection into the state for all layers, or one per layer")


class ParallelConfig(Section):
    """How ranks divide the work. Ranks left over by these replicate the whole (data parallelism)."""

    tensor: int = Field(1, ge=1, description="tensor-parallel ranks; a power of two that divides heads and widths")
    pipeline: int = Field(1, ge=1, description="pipeline stages")
    virtual_pipeline: int = Field(1, ge=1, description="model chunks per pipeline stage; above 1: interleaved schedule")
    sequence: bool = Field(False, description="sequence parallelism within the tensor group")
    expert: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="row shards of each expert table (all-to-all between them); auto: the ranks of a pipeline stage "
        "over expert_tensor, in whatever world the run is started",
    )
    expert_tensor: int = Field(1, ge=1, description="column shards of each expert table")
    batch_p2p: bool = Field(
        False, description="send and receive between stages in one batched call; not with 2 interleaved stages"
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if VOCAB_MULTIPLE % self.tensor:
            raise ValueError(
                f"tensor must be a power of two up to {VOCAB_MULTIPLE} (got {self.tensor}): it divides the "
                f"vocabulary, which is padded to a multiple of {VOCAB_MULTIPLE}"
            )
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence must be false: it splits the tensor-parallel group, which has one rank")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_pipeline must be 1 (got {self.virtual_pipeline}): there is one pipeline stage; raise pipeline"
            )
        if self.batch_p2p and self.virtual_pipeline > 1 and self.pipeline == 2:
            raise ValueError(
                "batch_p2p must be false with 2 interleaved stages: Megatron-core mixes up their messages "
                "and trains on wrong gradients"
            )
        return self

    def expert_rows(self, world_size: int) -> int:
        """Row shards in a world of this size: what ``expert`` says, ``auto`` resolved."""
        if self.expert == "auto":
            return max(1, world_size // (self.pipeline * self.expert_tensor))
        return self.expert


class ZeroConfig(Section):
    """What of the dense part is sharded over data-parallel ranks."""

    stage: int = Field(
        1,
        ge=0,
        le=3,
        description="0: nothing (Megatron's DDP and optimizer); DeepSpeed ZeRO 1: optimizer states, "
        "2: and gradients, 3: and parameters (without pipeline)",
    )
    offload: bool = Field(
        False, description="ZeRO keeps float32 masters and moments in host memory and steps them there"
    )

    @model_validator(mode="after")
    def _check(self) -> ZeroConfig:
        if self.offload and self.stage == 0:
            raise ValueError("offload needs stage 1, 2 or 3 (got 0): it is DeepSpeed that moves the states")
        return self


class OptimizerConfig(Section):
    """AdamW for the dense part, and the learning-rate schedule that the tables' optimizer shares by default."""

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final over peak learning rate")
    warmup_steps: int = Field(20, ge=0, description="steps of linear warm-up from 0")
    decay_steps: int = Field(
        1000,
        ge=1,
        description="step at which the cosine reaches its floor; apart from train.steps on purpose, "
        "so that a longer run has the same schedule",
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's betas")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.1, ge=0, description="decay of matrices; norms and biases have none")
    grad_clip: float = Field(1.0, ge=0, description="global gradient norm to clip at, tables included; 0: never")

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.warmup_steps >= self.decay_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be less than decay_steps ({self.decay_steps})")
        return self


class TableOptimizerConfig(Section):
    """The expert tables' own optimizer."""

    name: Literal["adam", "rowwise_adam", "rowwise_adagrad"] = Field(
        "adam", description="adam; rowwise_adam: one second moment a row; rowwise_adagrad: that, and no first moment"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of the tables")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Adam's betas; rowwise_adagrad has none")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of the tables")
    warmup_steps: int | None = Field(None, ge=0, description="their own warm-up; null: optimizer.warmup_steps")
    decay_steps: int | None = Field(None, ge=1, description="their own; null: optimizer.decay_steps")
    min_lr_ratio: float | None = Field(None, ge=0, le=1, description="their own; null: optimizer.min_lr_ratio")
    lazy: bool = Field(
        False,
        description="update only the rows that the step's picks touched: no decay, and frozen moments, of the others",
    )
    stochastic_rounding: bool = Field(
        False, description="bfloat16 tables without float32 masters, rounded up or down at random"
    )


class DataConfig(Section):
    """What to train on: files that `peer-dist prepare` made."""

    prefix: str | None = Field(None, description="path of one data set without .bin / .idx")
    blend: dict[str, float] | None = Field(None, description="several: a mapping from prefix to weight")
    tokenizer: str | None = Field(
        None, description="byte, or a tokenizer.json of Hugging Face tokenizers; null: the one the data was made with"
    )
    split: str = Field("90,5,5", description="train, validation and test shares, by documents")

    @field_validator("split")
    @classmethod
    def _split(cls, value: str) -> str:
        try:
            shares = [float(part) for part in value.split(",")]
        except ValueError:
            shares = []
        if len(shares) != 3 or min(shares) < 0 or shares[0] <= 0:
            raise ValueError(f"must be three numbers such as 90,5,5, the first above 0; got {value!r}")
        return value

    @field_validator("blend")
    @classmethod
    def _weights(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and (not value or min(value.values()) <= 0):
            raise ValueError("needs at least one prefix, and every weight above 0")
        return value

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (self.prefix is None) == (self.blend is None):
            raise ValueError("give exactly one of prefix and blend")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Prefix to weight, whichever of ``prefix`` and ``blend`` was given."""
        return self.blend if self.blend is not None else {str(self.prefix): 1.0}


class TrainConfig(Section):
    """The run."""

    steps: int = Field(1000, ge=1, description="optimizer steps in all; raise it to go on from a checkpoint")
    micro_batch_size: int = Field(8, ge=1, description="sequences per rank and forward pass")
    global_batch_size: int = Field(16, ge=1, description="sequences per step over all ranks")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on CPU")
    seed: int = Field(1234, ge=0, le=2**32 - 1, description="seed of weights, dropout and data order")
    recompute_layers: int = Field(
        0,
        ge=0,
        description="layers of each stage (and virtual stage) whose activations are computed again in backward",
    )
    watchdog_seconds: float = Field(
        600.0, ge=0, description="a rank that dies or hangs is noticed within it, and every rank leaves; 0: no watchdog"
    )


class GuardConfig(Section):
    """Steps that are left out because they would spoil the model."""

    max_skipped_steps: int = Field(
        20, ge=0, description="steps left out in a row after which the run stops, with a report; 0: never"
    )
    spike_factor: float = Field(
        0.0, ge=0, description="leave out a batch whose loss exceeds the running median by this factor; 0: never"
    )
    spike_window: int = Field(50, ge=2, description="steps of the running median")

    @field_validator("spike_factor")
    @classmethod
    def _factor(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError(f"must be above 1, or 0 to leave out no batch (got {value})")
        return value


class EvaluationConfig(Section):
    """Held-out loss while training."""

    interval: int = Field(100, ge=1, description="steps between validations")
    batches: int = Field(8, ge=1, description="global batches per validation (at most the whole split)")


class CheckpointConfig(Section):
    """Checkpoints: written under another name, verified, then renamed."""

    dir: str = Field("runs/default/checkpoints", description="folder of this run's checkpoints")
    interval: int = Field(200, ge=1, description="steps between checkpoints (the last step always has one)")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    asynchronous: bool = Field(
        False, description="train on while a thread of each rank writes a copy of its shards (in host memory)"
    )
    fall_back: bool = Field(
        False, description="where the newest is damaged, set it aside and go on from the newest that is intact"
    )
    init_from: str | None = Field(
        None,
        description="a checkpoint, a Llama model's folder (Hugging Face) or a checkpoint of Megatron-core, whose "
        "weights start a new run (fresh optimizers, step 0); PEER layers in the place of its dense ones begin with an "
        "output of 0",
    )


class LoggingConfig(Section):
    """TensorBoard and metrics.jsonl, written by rank 0."""

    dir: str = Field("runs/default/logs", description="folder of metrics.jsonl and TensorBoard's files")
    interval: int = Field(10, ge=1, description="steps per window of the expert-usage statistics")


class Config(Section):
    """A whole training run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    peer: PEERSection = Field(default_factory=PEERSection)
    moe: MoESection = Field(default_factory=MoESection)
    sigma_moe: SigmaMoESection = Field(default_factory=SigmaMoESection)
    pkm: PKMSection = Field(default_factory=PKMSection)
    router: RouterSection = Field(default_factory=RouterSection)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    zero: ZeroConfig = Field(default_factory=ZeroConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    table_optimizer: TableOptimizerConfig = Field(default_factory=TableOptimizerConfig)
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    @model_validator(mode="after")
    def _check(self) -> Config:
        model, parallel, chunks = self.model, self.parallel, self.parallel.pipeline * self.parallel.virtual_pipeline
        for name, size in (
            ("num_attention_heads", model.num_attention_heads),
            ("num_query_groups", model.query_groups),
            ("ffn_hidden_size", model.ffn_hidden_size),
            ("seq_length", model.seq_length),
        ):
            if size % parallel.tensor:
                raise ValueError(f"parallel.tensor ({parallel.tensor}) must divide model.{name} ({size})")
        if model.num_layers % chunks:
            raise ValueError(
                f"parallel.pipeline x virtual_pipeline ({parallel.pipeline} x {parallel.virtual_pipeline}) must divide "
                f"model.num_layers ({model.num_layers})"
            )
        self._check_kinds()
        for pool in self.peer_pools:
            stages = sorted({number // (model.num_layers // chunks) % parallel.pipeline for number in pool})
            if len(stages) > 1:
                raise ValueError(
                    f"peer.layers_per_pool ({self.peer.layers_per_pool}) has layers {[n + 1 for n in pool]} share "
                    f"tables, but parallel.pipeline ({parallel.pipeline}) puts them on stages {stages}; lower it, or "
                    "place the PEER layers of a pool on one stage (model.mlp)"
                )
        if self.zero.stage == 3 and parallel.pipeline > 1:
            raise ValueError(
                f"zero.stage 3 cannot be used with parallel.pipeline ({parallel.pipeline}): stages would wait for each "
                "other's parameters; use zero.stage 1, or parallel.tensor instead of stages"
            )
        warmup, decay, _ = self.table_schedule
        if warmup >= decay:
            raise ValueError(
                f"table_optimizer.warmup_steps ({warmup}) must be less than table_optimizer.decay_steps ({decay}); "
                "each is that of optimizer where it is not set"
            )
        kinds = {"peer": self.peer.table_dtype, "pkm": self.pkm.table_dtype}
        for kind, dtype in kinds.items():
            if self.table_optimizer.stochastic_rounding and kind in model.mlp_kinds and dtype != "bfloat16":
                raise ValueError(
                    f"table_optimizer.stochastic_rounding rounds to bfloat16, but {kind}.table_dtype is {dtype}; set "
                    "that to bfloat16 or stochastic_rounding to false"
                )
        return self

    def _check_kinds(self) -> None:
        """What the layers' kinds and routers need of the layout."""
        kinds, parallel = set(self.model.mlp_kinds), self.parallel
        coarse = " and ".join(sorted(kinds & {"moe", "sigma_moe"}))
        routed = coarse or ("peer" if "peer" in kinds else "")
        if coarse and parallel.expert_tensor > 1:
            raise ValueError(
                f"parallel.expert_tensor must be 1 for model.mlp {coarse} (got {parallel.expert_tensor}): an expert is "
                "whole on its rank; use parallel.expert"
            )
        if parallel.tensor > 1 and not parallel.sequence:
            if coarse:
                raise ValueError(
                    f"parallel.sequence must be true for model.mlp {coarse} with parallel.tensor ({parallel.tensor}), "
                    "or every tensor rank would compute the same tokens"
                )
            if routed and self.router.kind in ("recurrent", "mlp"):
                raise ValueError(
                    f"parallel.sequence must be true for router.kind {self.router.kind} with parallel.tensor "
                    f"({parallel.tensor}): the state is split as the hidden one is"
                )
        if parallel.tensor > 1 and self.model.ffn_top_k and "dense" in kinds:
            raise ValueError(
                f"parallel.tensor must be 1 with model.ffn_top_k (got {parallel.tensor}): the largest are sought among "
                "all hidden units"
            )
        if "peer" in kinds and self.router.kind == "cosine":
            raise ValueError("router.kind cosine is for moe and sigma_moe, but model.mlp has peer layers; use another")

    @property
    def table_schedule(self) -> tuple[int, int, float]:
        """Warm-up steps, decay steps and floor of the tables' learning rate."""
        own, shared = self.table_optimizer, self.optimizer
        return (
            shared.warmup_steps if own.warmup_steps is None else own.warmup_steps,
            shared.decay_steps if own.decay_steps is None else own.decay_steps,
            shared.min_lr_ratio if own.min_lr_ratio is None else own.min_lr_ratio,
        )

    @property
    def peer_pools(self) -> list[list[int]]:
        """The PEER layers (from 0) that share one pair of tables, pool by pool."""
        layers = [number for number, kind in enumerate(self.model.mlp_kinds) if kind == "peer"]
        size = self.peer.layers_per_pool
        return [layers[first : first + size] for first in range(0, len(layers), size)]

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that each read their own sequences."""
        return world_size // (self.parallel.tensor * self.parallel.pipeline)
