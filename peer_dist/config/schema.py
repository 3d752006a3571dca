"""The configuration's keys: their types, defaults, meaning and limits, each stated once.

YAML is turned into these objects by :func:`peer_dist.config.load_config`; ``peer-dist train --help`` prints
this file's descriptions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model, field_validator, model_validator

from peer_dist.kinds import DENSE, KINDS, Kind, NotCausal
from peer_dist.kinds.cost import FLOAT, total
from peer_dist.kinds.routing import RouterSection
from peer_dist.kinds.section import (
    LARGEST,
    MOST_LAYERS,
    MOST_STEPS,
    Coefficient,
    Epsilon,
    FilePath,
    Ranks,
    Rate,
    Section,
    Seed,
    Size,
    Steps,
    shown,
)

_MOST_PARAMETERS = 1 << 58  # whose weights, gradients and moments an int64 counts in bytes
_MOST_TOKENS = 1 << 62  # of a run
_MOST_AT_ONCE = 1 << 32  # tokens of a pass
_MOST_SETS = 1 << 14  # of a blend, whose indices number them in 16 bits
VOCAB_MULTIPLE = 128  # what the vocabulary is padded to a multiple of, in every layout

Beta = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Section):
    """The transformer: Megatron-core's GPTModel with rotary positions and RMSNorm."""

    num_layers: int = Field(4, ge=1, le=MOST_LAYERS, description="transformer layers")
    hidden_size: Size = Field(128, description="width of the residual stream")
    num_attention_heads: Size = Field(4, description="attention heads; must divide hidden_size")
    num_query_groups: Size | None = Field(
        None,
        description="heads of keys and values, each shared by as many of the attention heads; null: as many as those",
    )
    rope_base: float = Field(
        10000.0, gt=1, le=1e30, description="base of the rotary positions' wavelengths (RoPE theta)"
    )
    norm_eps: Epsilon = Field(1e-5, description="added to the mean square in the layers' RMSNorms")
    ffn_hidden_size: Size = Field(512, description="hidden width of the dense feed-forward layers")
    ffn_activation: Literal["gelu", "swiglu"] = Field("swiglu", description="dense feed-forward activation")
    ffn_top_k: int = Field(
        0,
        ge=0,
        le=LARGEST,
        description="hidden units of a dense feed-forward kept per token, the largest; 0: all (sigma-MoE paper)",
    )
    seq_length: int = Field(128, ge=2, le=LARGEST, description="tokens per sequence")
    mlp: str | Annotated[list[str], Field(max_length=MOST_LAYERS)] = Field(
        DENSE.name,
        description=f"feed-forward kind, one for all layers or a list with one per layer: {' | '.join(KINDS)}",
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
    def mlp_kinds(self) -> list[str]:
        """The name of each layer's feed-forward kind, ``num_layers`` long."""
        return list(self.mlp) if isinstance(self.mlp, list) else [self.mlp] * self.num_layers

    @field_validator("mlp")
    @classmethod
    def _known(cls, value: str | list[str]) -> str | list[str]:
        for name in [value] if isinstance(value, str) else value:
            if name not in KINDS:
                raise ValueError(f"{name!r} is no kind of layer; known: {', '.join(KINDS)}")
        return value

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


class ParallelConfig(Section):
    """How ranks divide the work. Ranks left over by these replicate the whole (data parallelism)."""

    tensor: Ranks = Field(1, description="tensor-parallel ranks; a power of two that divides heads and widths")
    pipeline: Ranks = Field(1, description="pipeline stages")
    virtual_pipeline: Ranks = Field(1, description="model chunks per pipeline stage; above 1: interleaved schedule")
    sequence: bool = Field(False, description="sequence parallelism within the tensor group")
    expert: Ranks | Literal["auto"] = Field(
        1,
        description="row shards of each expert table (all-to-all between them); auto: the ranks of a pipeline stage "
        "over expert_tensor, in whatever world the run is started",
    )
    expert_tensor: Ranks = Field(1, description="column shards of each expert table")
    wire: Literal["bfloat16", "float8"] | None = Field(
        None,
        description="what tokens' rows and their gradients are rounded to on the way between the ranks of a table; "
        "float8: e4m3 with a float32 scale a row; null: they travel as they are. Coarse experts' always do",
    )
    transport: Literal["all_to_all", "symmetric_memory"] = Field(
        "all_to_all",
        description="how tokens travel; symmetric_memory: by NVSHMEM between GPUs, so that the host waits for no sizes "
        "(not yet run by anybody)",
    )
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

    lr: Rate = Field(1e-3, description="peak learning rate")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final over peak learning rate")
    warmup_steps: int = Field(20, ge=0, le=MOST_STEPS, description="steps of linear warm-up from 0")
    decay_steps: Steps = Field(
        1000,
        description="step at which the cosine reaches its floor; apart from train.steps on purpose, "
        "so that a longer run has the same schedule",
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's betas")
    eps: Epsilon = Field(1e-8, description="AdamW's epsilon")
    weight_decay: Coefficient = Field(0.1, description="decay of matrices; norms and biases have none")
    grad_clip: float = Field(
        1.0, ge=0, le=1e30, description="global gradient norm to clip at, tables included; 0: never"
    )

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
    lr: Rate = Field(1e-3, description="peak learning rate of the tables")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Adam's betas; rowwise_adagrad has none")
    eps: Epsilon = Field(1e-8, description="added to the root of the second moment")
    weight_decay: Coefficient = Field(0.0, description="decoupled weight decay of the tables")
    warmup_steps: int | None = Field(
        None, ge=0, le=MOST_STEPS, description="their own warm-up; null: optimizer.warmup_steps"
    )
    decay_steps: Steps | None = Field(None, description="their own; null: optimizer.decay_steps")
    min_lr_ratio: float | None = Field(None, ge=0, le=1, description="their own; null: optimizer.min_lr_ratio")
    lazy: bool = Field(
        False,
        description="update only the rows that the step's picks touched: no decay, and frozen moments, of the others",
    )
    stochastic_rounding: bool = Field(
        False, description="tables of bfloat16 or eight bits without float32 masters, rounded up or down at random"
    )

    @property
    def moments(self) -> tuple[int, int]:
        """How many float32 numbers it keeps of each element, and of each row."""
        return {"adam": (2, 0), "rowwise_adam": (1, 1), "rowwise_adagrad": (0, 1)}[self.name]

    def keeps_masters(self, itemsize: int) -> bool:
        """Whether tables whose elements have so many bytes have float32 masters beside them."""
        return itemsize < FLOAT and not self.stochastic_rounding


class DataConfig(Section):
    """What to train on: files that `peer-dist prepare` made."""

    prefix: FilePath | None = Field(None, description="path of one data set without .bin / .idx")
    blend: dict[FilePath, float] | None = Field(None, description="several: a mapping from prefix to weight")
    tokenizer: FilePath | None = Field(
        None, description="byte, or a tokenizer.json of Hugging Face tokenizers; null: the one the data was made with"
    )
    split: str = Field("90,5,5", description="train, validation and test shares, by documents")

    @field_validator("split")
    @classmethod
    def _split(cls, value: str) -> str:
        try:
            shares = [float(part) for part in value.split(",")] if value.isprintable() else []
        except ValueError:
            shares = []
        if len(shares) != 3 or not all(0 <= share <= 1e12 for share in shares) or shares[0] < 1e-9:
            raise ValueError(
                f"must be three numbers such as 90,5,5, the first above 0; got {shown(value)}: shares of train, "
                "validation and test"
            )
        return value

    @field_validator("blend")
    @classmethod
    def _weights(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and (not value or min(value.values()) <= 0):
            raise ValueError("needs at least one prefix, and every weight above 0")
        if value is not None and not all(1e-30 <= weight <= 1e30 for weight in value.values()):
            raise ValueError("every weight must lie between 1e-30 and 1e30: only their ratios matter")
        if value is not None and len(value) > _MOST_SETS:
            raise ValueError(f"has {len(value):,} prefixes; {_MOST_SETS:,} are the most: prepare several as one")
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

    steps: Steps = Field(1000, description="optimizer steps in all; raise it to go on from a checkpoint")
    micro_batch_size: Size = Field(8, description="sequences per rank and forward pass")
    global_batch_size: Size = Field(16, description="sequences per step over all ranks")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on CPU")
    fused: Literal["auto", "none"] = Field(
        "auto",
        description="auto: with zero.stage 0 on a GPU, apex's kernel adds up gradients of weights, where apex is "
        "installed; none: torch alone, whatever is installed",
    )
    seed: Seed = Field(1234, description="seed of weights, dropout and data order")
    recompute_layers: int = Field(
        0,
        ge=0,
        description="layers of each stage (and virtual stage) whose activations are computed again in backward",
    )
    watchdog_seconds: float = Field(
        600.0,
        ge=0,
        le=1e8,
        description="a rank that dies or hangs is noticed within it, and every rank leaves; 0: no watchdog",
    )


class GuardConfig(Section):
    """Steps that are left out because they would spoil the model."""

    max_skipped_steps: int = Field(
        20, ge=0, description="steps left out in a row after which the run stops, with a report; 0: never"
    )
    spike_factor: float = Field(
        0.0, ge=0, description="leave out a batch whose loss exceeds the running median by this factor; 0: never"
    )
    spike_window: int = Field(50, ge=2, le=1_000_000, description="steps of the running median")

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

    dir: FilePath = Field("runs/default/checkpoints", description="folder of this run's checkpoints")
    interval: int = Field(200, ge=1, description="steps between checkpoints (the last step always has one)")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    asynchronous: bool = Field(
        False, description="train on while a thread of each rank writes a copy of its shards (in host memory)"
    )
    fall_back: bool = Field(
        False, description="where the newest is damaged, set it aside and go on from the newest that is intact"
    )
    init_from: FilePath | None = Field(
        None,
        description="a checkpoint, a Llama model's folder (Hugging Face) or a checkpoint of Megatron-core, whose "
        "weights start a new run (fresh optimizers, step 0); PEER layers in the place of its dense ones begin with an "
        "output of 0",
    )


class LoggingConfig(Section):
    """TensorBoard and metrics.jsonl, written by rank 0."""

    dir: FilePath = Field("runs/default/logs", description="folder of metrics.jsonl and TensorBoard's files")
    interval: int = Field(10, ge=1, description="steps per window of the expert-usage statistics")


class _Model(Section):
    model: ModelConfig = Field(default_factory=ModelConfig)


if TYPE_CHECKING:
    # the sections of kinds are not attributes to a type checker: Kind.keys returns them with their type
    _Layers = _Model
else:
    _Layers = create_model(
        "_Layers",
        __base__=_Model,
        **{
            kind.name: (kind.section, Field(default_factory=kind.section))
            for kind in KINDS.values()
            if kind.section is not None
        },
    )


class Config(_Layers):
    """A whole training run: the model, a section for each kind of layer that has keys of its own, and all else."""

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
        if parallel.wire == "bfloat16" and self.train.precision == "bf16":
            raise ValueError(
                "parallel.wire bfloat16 has no effect: with train.precision bf16 rows are bfloat16 already; set it to "
                "null, or to float8"
            )
        if parallel.transport == "symmetric_memory":
            self._check_sizes_on_device()
        self._check_kinds()
        for pool in self.pools:
            stages = sorted(set(map(self.stage_of, pool)))
            if len(stages) > 1:
                kind = KINDS[model.mlp_kinds[pool[0]]]
                raise ValueError(
                    f"{kind.key('layers_per_pool')} ({kind.layers_per_pool(self)}) has layers "
                    f"{[n + 1 for n in pool]} share tables, but parallel.pipeline ({parallel.pipeline}) puts them on "
                    f"stages {stages}; lower it, or place the {kind.name} layers of a pool on one stage (model.mlp)"
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
        for kind in self.kinds:
            tables = kind.tables(self)
            if not tables:
                continue
            if self.table_optimizer.stochastic_rounding and tables.dtype == "float32":
                raise ValueError(
                    f"table_optimizer.stochastic_rounding rounds to bfloat16 or eight bits, but "
                    f"{kind.key('table_dtype')} is float32; set that to bfloat16 or stochastic_rounding to false"
                )
            for key, value, held in (
                ("table_memory", tables.memory, tables.far),
                ("table_dtype", tables.dtype, tables.eight_bit),
            ):
                if held and not self.table_optimizer.lazy:
                    raise ValueError(
                        f"{kind.key(key)} {value} needs table_optimizer.lazy true, so that a step meets only the rows "
                        "that were picked"
                    )
            if tables.eight_bit and not self.table_optimizer.stochastic_rounding:
                raise ValueError(
                    f"{kind.key('table_dtype')} {tables.dtype} needs table_optimizer.stochastic_rounding true: steps "
                    "smaller than half a place would be lost"
                )
        self._check_products()
        return self

    def _check_sizes_on_device(self) -> None:
        """Refuse what needs sizes on the host, and ranks that do not all make the same calls."""
        chunks = max((tables.chunks for kind in self.kinds if (tables := kind.tables(self))), default=1)
        held = next((kind for kind in self.kinds if (tables := kind.tables(self)) and tables.held), None)
        if held is not None:
            raise ValueError(
                f"{held.key('table_memory')} must be device, and {held.key('table_dtype')} float32 or bfloat16, with "
                "parallel.transport symmetric_memory; or set the transport to all_to_all"
            )
        for name, wanted, fits, value in (
            ("parallel.expert_tensor", "1", self.parallel.expert_tensor == 1, self.parallel.expert_tensor),
            # buffers are made by all ranks of the world together, while one stage waits for another
            ("parallel.pipeline", "1", self.parallel.pipeline == 1, self.parallel.pipeline),
            ("peer.dispatch_chunks", "1", chunks == 1, chunks),
            ("table_optimizer.lazy", "false", not self.table_optimizer.lazy, "true"),
        ):
            if not fits:
                raise ValueError(
                    f"{name} must be {wanted} with parallel.transport symmetric_memory (got {value}); or set the "
                    "transport to all_to_all"
                )

    def _check_products(self) -> None:
        """Refuse sizes that can be had one by one, but not together."""
        model, train = self.model, self.train
        of_kinds = {kind: total(kind.cost(self)).parameters for kind in self.kinds}
        largest = max(of_kinds, key=lambda kind: of_kinds[kind])
        parameters = model.num_layers * (4 * model.hidden_size**2 + of_kinds[largest])
        if parameters > _MOST_PARAMETERS:
            keys = ", ".join(["model.num_layers", "model.hidden_size", *map(largest.key, largest.sizes)])
            raise ValueError(f"the model would have about {parameters:.1e} parameters, too many to count; lower {keys}")
        at_once = train.micro_batch_size * model.seq_length
        in_all = train.global_batch_size * model.seq_length * train.steps
        for keys, tokens, most in (
            ("train.micro_batch_size x model.seq_length", at_once, _MOST_AT_ONCE),
            ("train.steps x train.global_batch_size x model.seq_length", in_all, _MOST_TOKENS),
        ):
            if tokens > most:
                raise ValueError(f"{keys} is {tokens:.1e} tokens, and {most:.1e} are the most; lower one of them")

    def _check_kinds(self) -> None:
        """What the layers' kinds and routers need of the layout."""
        parallel = self.parallel
        coarse = " and ".join(sorted(kind.name for kind in self.kinds if kind.experts(self)))
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
            if self.has_router_core:
                raise ValueError(
                    f"parallel.sequence must be true for router.kind {self.router.kind} with parallel.tensor "
                    f"({parallel.tensor}): the state is split as the hidden one is"
                )
        for kind in self.kinds:
            kind.check(self)

    @property
    def kinds(self) -> list[Kind[Any]]:
        """The different kinds of the model's layers, in the order of their first one."""
        return [KINDS[name] for name in dict.fromkeys(self.model.mlp_kinds)]

    @property
    def has_router_core(self) -> bool:
        """Whether the routers of the model's layers share a core (``router.kind`` recurrent or mlp)."""
        return self.router.has_core and any(kind.routed for kind in self.kinds)

    @property
    def not_causal(self) -> NotCausal | None:
        """Why later tokens change what the model says of earlier ones; None where they do not."""
        return next((reason for kind in self.kinds if (reason := kind.not_causal(self))), None)

    @property
    def pools(self) -> list[list[int]]:
        """The layers (from 0) that share tables, pool by pool in the order of their first layers.

        A layer with tables that shares them with no other is a pool of its own.
        """
        pools: list[list[int]] = []
        for kind in self.kinds:
            if kind.tables(self):
                layers = [number for number, name in enumerate(self.model.mlp_kinds) if name == kind.name]
                size = kind.layers_per_pool(self)
                pools += [layers[first : first + size] for first in range(0, len(layers), size)]
        return sorted(pools)

    def kind_of(self, number: int) -> Kind[Any]:
        """The kind of a layer, counted from 0."""
        return KINDS[self.model.mlp_kinds[number]]

    @property
    def far_tables(self) -> bool:
        """Whether the rows of some tables lie elsewhere than on the device."""
        return any(tables.far for kind in self.kinds if (tables := kind.tables(self)))

    def stage_of(self, number: int) -> int:
        """The pipeline stage of a layer, both counted from 0."""
        parallel = self.parallel
        return number // (self.model.num_layers // (parallel.pipeline * parallel.virtual_pipeline)) % parallel.pipeline

    @property
    def table_schedule(self) -> tuple[int, int, float]:
        """Warm-up steps, decay steps and floor of the tables' learning rate."""
        own, shared = self.table_optimizer, self.optimizer
        return (
            shared.warmup_steps if own.warmup_steps is None else own.warmup_steps,
            shared.decay_steps if own.decay_steps is None else own.decay_steps,
            shared.min_lr_ratio if own.min_lr_ratio is None else own.min_lr_ratio,
        )

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that each read their own sequences."""
        return world_size // (self.parallel.tensor * self.parallel.pipeline)
