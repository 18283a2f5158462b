"""What is planned: a model, a layout and a batch. Frozen dataclasses with arithmetic on their own fields.

Nothing here knows a device; `step.py` predicts the time of a `Workload` on a `hardware.Cluster`, `memory.py`
its bytes. Field names are those of config/schema.py where both have the field. A search changes a layout with
`dataclasses.replace(workload, tensor=8, data=128)`; every new object is checked again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_b2.config.schema import ModelConfig, RunConfig
from megatron_b2.errors import ConfigError
from megatron_b2.parallel.layout import Layout
from megatron_b2.pipeline.partition import balance, partition_problem
from megatron_b2.pipeline.schedule import ScheduleName, schedule_problem

Recompute = Literal["none", "selective", "full"]
"""What backward computes again: nothing, the attention scores (and the MLP's activation), whole blocks. Under
FSDP, selective is torchtitan's choice by operation: every second product, and all that is elementwise."""

ZeroEngine = Literal["deepspeed", "megatron", "fsdp"]
"""Who shards and reduces. DeepSpeed sums gradients with all-reduce at stages 0 to 2 and gathers updated
weights after the step; Megatron-LM's distributed optimizer scatters the sums and may gather beside the next
forward. ZeRO-3's parameters are gathered by DeepSpeed, or by PyTorch's FSDP: their bandwidths differ."""


Attention = Literal["fused", "flash-1", "unfused"]
"""Fused (flash) attention; the first FlashAttention of 2022 and 2023, which was much slower; or scores [s, s]
of every head written to memory."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder-only transformer."""

    hidden_size: int
    """Width h of the residual stream."""
    ffn_hidden_size: int
    """Inner width f of the MLP: 4 h for GPT, 8/3 h for SwiGLU models."""
    num_layers: int
    """Blocks L."""
    num_heads: int
    """Query heads a."""
    vocab_size: int
    """Rows V of the embedding and of the head."""
    kv_heads: int = 0
    """Key and value heads (grouped-query attention); 0 means num_heads."""
    gated: bool = True
    """SwiGLU: three matrices in the MLP, RMSNorm and no biases. False is GPT: two matrices, LayerNorm,
    biases everywhere."""
    tied: bool = False
    """The head uses the embedding's matrix."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {getattr(self, name)} must be 1 or more"
            for name in ("hidden_size", "ffn_hidden_size", "num_layers", "num_heads", "vocab_size")
            if getattr(self, name) < 1
        ]
        if not problems and self.hidden_size % self.num_heads:
            problems.append(
                f"hidden_size = {self.hidden_size} is no multiple of num_heads = {self.num_heads}: "
                "use heads that divide it"
            )
        if self.kv_heads < 0 or (self.kv_heads and self.num_heads % self.kv_heads):
            problems.append(
                f"kv_heads = {self.kv_heads} does not divide num_heads = {self.num_heads}: "
                "use a divisor, or 0 for one key head a query head"
            )
        if problems:
            raise ConfigError(problems)

    @classmethod
    def of(cls, model: ModelConfig) -> ModelShape:
        """The shape of one of our models: SwiGLU, untied, no grouped queries."""
        return cls(
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            vocab_size=model.vocab_size,
        )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_width(self) -> int:
        """Width of all keys, and of all values."""
        return (self.kv_heads or self.num_heads) * self.head_dim

    @property
    def mlp_matrices(self) -> int:
        """Matrices [h, f] of an MLP."""
        return 3 if self.gated else 2

    @property
    def layer_matrix_parameters(self) -> int:
        """Parameters of the matrices of a block: 2 h (h + kv) + 2 or 3 h f."""
        h = self.hidden_size
        return 2 * h * (h + self.kv_width) + self.mlp_matrices * h * self.ffn_hidden_size

    @property
    def layer_vector_parameters(self) -> int:
        """Parameters of the norms and biases of a block: 2 h, or 2 (2 h) + h + 2 kv + h + f + h for GPT
        (13 h with f = 4 h: SC21, equation 2)."""
        h = self.hidden_size
        return 2 * h if self.gated else 7 * h + 2 * self.kv_width + self.ffn_hidden_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of a block."""
        return self.layer_matrix_parameters + self.layer_vector_parameters

    @property
    def table_parameters(self) -> int:
        """Parameters V h of the embedding, and of an untied head."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters, without learned positions. 13B of Baichuan 2: 13,896,668,160."""
        norm = self.hidden_size if self.gated else 2 * self.hidden_size
        tables = self.table_parameters * (1 if self.tied else 2)
        return tables + self.num_layers * self.layer_parameters + norm


@dataclass(frozen=True)
class StageSlice:
    """What one virtual pipeline stage holds."""

    layers: int
    """Number of blocks."""
    has_embedding: bool
    has_head: bool
    """Final norm and head."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step to predict: model, layout, batch, and what the program does.

    Raises:
        ConfigError: on creation, every broken rule with field, value and fix.
    """

    shape: ModelShape
    """The model."""
    seq_len: int
    """Tokens of a sample."""
    micro_batch_size: int
    """Sequences of a forward pass on one data-parallel rank."""
    global_batch: int
    """Sequences of a step over all ranks."""
    tensor: int = 1
    """Ranks that split every matrix (t)."""
    pipeline: int = 1
    """Pipeline ranks (p)."""
    virtual_stages: int = 1
    """Chunks of layers a pipeline rank (v); more than 1 only with schedule "interleaved"."""
    data: int = 1
    """Data-parallel ranks (d)."""
    context: int = 1
    """Ranks that split the sequence of every sample (c)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO shards over data x context ranks: nothing, optimizer, + gradients, + parameters."""
    sequence_parallel: bool = False
    """Norms and residuals on sequence shards of the tensor-parallel ranks."""
    recompute: Recompute = "none"
    """What backward computes again."""
    schedule: ScheduleName = "1f1b"
    """Order of the micro-batches in the pipeline."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of weights and activations; "bf16" also stands for fp16. The optimizer is fp32 with master weights."""
    attention: Attention = "fused"
    """How the scores are computed."""
    gradient_bytes: Literal[2, 4] = 4
    """Width of the accumulated gradients, which is also the width in which they are reduced."""
    gradient_copy: bool = True
    """Gradients of a micro-batch are made before they are added to the sum (DeepSpeed, our pipeline,
    Megatron-LM in 2021); beside fp32 sums a rank then keeps bf16 ones. False: products add to the sum."""
    overlap_data: bool = True
    """Gradients are reduced, and parameters gathered, beside backward and forward passes."""
    overlap_tensor: bool = False
    """Tensor-parallel sums run beside the products before and after them, piece by piece (Megatron-Core's
    --tp-comm-overlap)."""
    zero_engine: ZeroEngine = "deepspeed"
    """Who shards and reduces."""
    chunked_head: bool = True
    """The head makes few logits at once. False: all logits of a micro-batch (Megatron-LM)."""
    fused_loss: bool = False
    """Logits and their gradient stay in the width of activations. False: fp32 copies of both."""
    balanced_stages: bool = True
    """Stages are cut with the embedding and the head counted, as our pipeline does. False: the same number of
    blocks in every stage where that is possible (Megatron-LM)."""

    def __post_init__(self) -> None:
        problems = _size_problems(self) or [*_split_problems(self), *_pipeline_problems(self)]
        if problems:
            raise ConfigError(problems)

    @classmethod
    def of(cls, config: RunConfig, *, gpus: int) -> Workload:
        """The workload of a configuration on `gpus` ranks; the data dimension is what the others leave.

        All blocks count as recomputing, also where train.recompute_layers names a few: the time is then an
        upper estimate.

        Raises:
            ConfigError: the layout does not fit the number of ranks, or another rule is broken.
        """
        parallel, train = config.parallel, config.train
        if gpus < 1 or gpus % parallel.model_ranks:
            raise ConfigError(
                f"gpus = {gpus} is no multiple of parallel.tensor x context x pipeline = {parallel.tensor} x "
                f"{parallel.context} x {parallel.pipeline} = {parallel.model_ranks}: change either"
            )
        return cls(
            shape=ModelShape.of(config.model),
            seq_len=config.data.seq_len,
            micro_batch_size=train.micro_batch_size,
            global_batch=train.global_batch_size,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual_stages=parallel.virtual_stages,
            data=parallel.data_size(gpus),
            context=parallel.context,
            zero_stage=parallel.zero_stage if parallel.engine == "deepspeed" else 0,
            sequence_parallel=parallel.sequence_parallel,
            recompute=train.recompute,
            schedule=parallel.schedule,
            precision=train.precision,
            overlap_data=parallel.engine == "deepspeed" and parallel.zero_stage >= 2,
            attention="unfused" if config.ops.attention == "cuda" else "fused",
        )

    @property
    def layout(self) -> Layout:
        """The four dimensions, for the arithmetic of ranks."""
        return Layout(tensor=self.tensor, context=self.context, data=self.data, pipeline=self.pipeline)

    @property
    def gpus(self) -> int:
        """Ranks: tensor x context x data x pipeline."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def num_micro(self) -> int:
        """Micro-batches of a step on one data-parallel rank (m)."""
        return self.global_batch // (self.micro_batch_size * self.data)

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.shape.parameters

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step over all ranks."""
        return self.global_batch * self.seq_len

    @property
    def local_tokens(self) -> int:
        """Tokens of a micro-batch on one context-parallel rank (T)."""
        return self.micro_batch_size * self.seq_len // self.context

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def data_context(self) -> int:
        """Ranks with the same parameters: over them gradients are summed and ZeRO shards."""
        return self.data * self.context

    @property
    def sequence_shards(self) -> int:
        """Ranks that divide norms and residuals: tensor under sequence parallelism, else 1."""
        return self.tensor if self.sequence_parallel else 1

    def stages(self) -> tuple[StageSlice, ...]:
        """The p v virtual stages in the order of the model; chunk c of rank r is stage c p + r."""
        count = self.pipeline * self.virtual_stages
        shape = self.shape
        if self.balanced_stages or shape.num_layers % count:
            layers = balance(
                shape.num_layers,
                count,
                layer=shape.layer_parameters,
                first=shape.table_parameters,
                last=shape.table_parameters,
            )
        else:
            layers = (shape.num_layers // count,) * count
        return tuple(
            StageSlice(number, has_embedding=index == 0, has_head=index == count - 1)
            for index, number in enumerate(layers)
        )

    def stage_parameters(self, stage: StageSlice) -> int:
        """Parameters of a virtual stage on one tensor-parallel rank. Norms and the output biases are on every
        rank; the last stage of a pipeline keeps its own copy of a tied table."""
        shape = self.shape
        vectors = shape.layer_vector_parameters if shape.gated else 6 * shape.hidden_size
        split = shape.layer_parameters - vectors
        total = stage.layers * (split // self.tensor + vectors)
        shared = shape.tied and stage.has_embedding and stage.has_head
        tables = stage.has_embedding + (stage.has_head and not shared)
        total += tables * (shape.table_parameters // self.tensor)
        if stage.has_head:
            total += shape.hidden_size if shape.gated else 2 * shape.hidden_size
        return total

    def describe(self) -> str:
        """The layout for people: t8 p12 v1 d8 c1 ZeRO-1, mbs 2 x 128 micro-batches, recompute full, SP."""
        return (
            f"t{self.tensor} p{self.pipeline} v{self.virtual_stages} d{self.data} c{self.context} "
            f"ZeRO-{self.zero_stage}, micro-batch {self.micro_batch_size} x {self.num_micro}, "
            f"recompute {self.recompute}" + (", sequence parallel" if self.sequence_parallel else "")
        )


def _size_problems(work: Workload) -> list[str]:
    names = (
        *("seq_len", "micro_batch_size", "global_batch"),
        *("tensor", "pipeline", "virtual_stages", "data", "context"),
    )
    problems = [
        f"{name} = {getattr(work, name)} must be 1 or more" for name in names if getattr(work, name) < 1
    ]
    if work.zero_stage not in (0, 1, 2, 3):
        problems.append(f"zero_stage = {work.zero_stage} is no ZeRO stage: use 0, 1, 2 or 3")
    return problems


def _split_problems(work: Workload) -> list[str]:
    shape, t, c = work.shape, work.tensor, work.context
    problems = [
        f"{name} = {value} is no multiple of tensor = {t}: use a tensor size that divides it"
        for name, value in (
            ("shape.num_heads", shape.num_heads),
            ("shape.ffn_hidden_size", shape.ffn_hidden_size),
        )
        if value % t
    ]
    if work.seq_len % c:
        problems.append(f"seq_len = {work.seq_len} is no multiple of context = {c}: use a divisor")
    elif work.sequence_parallel and work.seq_len // c % t:
        problems.append(
            f"sequence_parallel needs seq_len / context = {work.seq_len // c} to be a multiple of "
            f"tensor = {t}: turn it off or change one"
        )
    share = work.micro_batch_size * work.data
    if work.global_batch % share:
        problems.append(
            f"global_batch = {work.global_batch} is no multiple of micro_batch_size x data = "
            f"{work.micro_batch_size} x {work.data} = {share}: change one of the three"
        )
    return problems


def _pipeline_problems(work: Workload) -> list[str]:
    problems = []
    found = partition_problem(work.shape.num_layers, work.pipeline * work.virtual_stages)
    if found is not None:
        problems.append(found)
    if work.zero_stage >= 2 and work.pipeline > 1:
        problems.append(
            f"zero_stage = {work.zero_stage} with pipeline = {work.pipeline} would reduce gradients in every "
            "micro-batch: use zero_stage 0 or 1, or pipeline = 1"
        )
    if work.global_batch % (work.micro_batch_size * work.data) == 0 and (
        work.pipeline > 1 or work.virtual_stages > 1
    ):
        found = schedule_problem(
            work.schedule,
            num_ranks=work.pipeline,
            num_micro=work.num_micro,
            num_chunks=work.virtual_stages,
        )
        if found is not None:
            problems.append(found)
    return problems
