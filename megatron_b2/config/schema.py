"""What a run is: frozen dataclasses, no behaviour beyond arithmetic on their own fields.

Units: sequence lengths and batches in tokens or sequences as the name says; steps are optimizer steps.
Sources are sections of the Baichuan 2 report (arXiv 2309.10305) or "our choice".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the transformer (report Table 3, section 2.4)."""

    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the SwiGLU inner layer."""
    num_layers: int
    """Number of transformer blocks."""
    num_heads: int
    """Number of attention heads; hidden_size must be a multiple of it."""
    vocab_size: int = 125_696
    """Rows of the embedding and of NormHead."""
    position: Literal["rope", "alibi"] = "rope"
    """Position encoding: rotary (7B) or attention with linear biases (13B)."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the initial weights (published model config)."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def num_block_parameters(self) -> int:
        """Parameters outside the embedding and the head, L(4h^2 + 3hf + 2h) + h (report Table 10's N)."""
        h, f = self.hidden_size, self.ffn_hidden_size
        return self.num_layers * (4 * h * h + 3 * h * f + 2 * h) + h

    @property
    def num_parameters(self) -> int:
        """All parameters: blocks, final norm, embedding and untied head."""
        return 2 * self.vocab_size * self.hidden_size + self.num_block_parameters


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One tokenized source of the training blend."""

    prefix: str
    """Path of the .bin/.idx pair without the extension."""
    weight: float = 1.0
    """Relative share of training samples; weights are normalised over the sources."""
    append: tuple[str, ...] = ()
    """Paths of more pairs whose documents belong to this source; a phase may add to the end of the list."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A change of the training data during a run; what was consumed before stays as it was."""

    from_step: int
    """The first step that differs: the phase begins after this many optimizer steps."""
    sources: tuple[SourceConfig, ...] = ()
    """The whole blend from then on, as [[data.phases.sources]] tables; a source is known by its prefix."""


@dataclass(frozen=True, kw_only=True)
class MegatronOrderConfig:
    """What order = "megatron" must know of the Megatron-LM run that it repeats."""

    train_samples: int = 0
    """Samples that run was planned for, on which its order depends; 0 is train.steps * global_batch_size."""
    surplus: float = 0.005
    """Share of samples planned in excess for each source of a blend (mid_level_dataset_surplus)."""
    blend_single: bool = False
    """The only source was given with a weight (--data-path 1.0 PREFIX): its samples have the surplus too."""
    drop_last: bool = True
    """Validation leaves out a last, partial sample (drop_last_partial_validation_sequence)."""
    exact: bool = False
    """Count partial samples in integers; false repeats Megatron-LM's float32, which can be off."""
    cache: str = ""
    """Folder of the built index; empty is PREFIX.order beside each source."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The tokenized corpus and how samples are cut from it."""

    sources: tuple[SourceConfig, ...] = ()
    """The blend, as [[data.sources]] tables."""
    phases: tuple[PhaseConfig, ...] = ()
    """Other blends from given steps on, as [[data.phases]] tables in the order of their steps."""
    order: Literal["stateless", "megatron"] = "stateless"
    """Order of the samples: ours, or that of a Megatron-LM run which is continued here."""
    megatron: MegatronOrderConfig = field(default_factory=MegatronOrderConfig)
    """What order = "megatron" must know of the Megatron-LM run that it repeats."""
    seq_len: int = 4_096
    """Tokens a sample."""
    split: tuple[float, float, float] = (0.98, 0.02, 0.0)
    """Shares of documents for train, validation and test."""
    document_masking: bool = True
    """Attention and positions stay inside a document; false lets packed documents see each other."""
    prefetch: int = 2
    """Global batches assembled ahead by the loader thread."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer that made the data."""

    path: str = ""
    """SentencePiece tokenizer.model, or the folder that holds it."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule (report section 2.5)."""

    max_lr: float = 2e-4
    """Peak learning rate (7B 2e-4, 13B 1.5e-4)."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak (our choice: the report gives none)."""
    warmup_steps: int = 2_000
    """Linear warm-up."""
    decay_steps: int | None = None
    """Step at which the cosine reaches its minimum; none means train.steps."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.95
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Adam epsilon (our choice: the report gives none)."""
    weight_decay: float = 0.1
    """Decoupled decay on matrices; norm weights have none."""
    grad_clip: float = 0.5
    """Global gradient norm; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    steps: int
    """Optimizer steps of the whole run."""
    global_batch_size: int
    """Sequences an optimizer step, over all ranks."""
    micro_batch_size: int = 1
    """Sequences a forward pass on one rank."""
    seed: int = 1234
    """Seed of the initial weights and of the data order."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 master weights, optimizer state and gradient accumulation."""
    max_z_weight: float = 2e-4
    """Weight of the max-z loss (report section 2.5); 0 turns it off."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in backward: none, the attention core and SwiGLU, or whole blocks."""
    recompute_layers: tuple[int, ...] = ()
    """Blocks (0-based) that `recompute` applies to; an empty list means all."""
    deterministic: bool = True
    """Only deterministic algorithms; an operation that has none is an error."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does to the step."""
    log_interval: int = 10
    """Steps between metric lines."""
    eval_interval: int = 0
    """Steps between validations; 0 validates only at the end."""
    eval_batches: int = 8
    """Global batches a validation."""
    peak_tflops: float | None = None
    """Dense peak of one device in TFLOP/s at this precision (A100, A800 bf16: 312); none shows no MFU."""

    def accumulation_steps(self, dp_size: int) -> int:
        """Micro-batches a rank runs for one optimizer step on `dp_size` data-parallel ranks."""
        return self.global_batch_size // (self.micro_batch_size * dp_size)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Engine and layout: ranks = tensor x context x data x pipeline, where data is what the others leave."""

    engine: Literal["single", "deepspeed"] = "single"
    """One plain torch process, or DeepSpeed ZeRO with any layout."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What ZeRO shards over data x context ranks: nothing, optimizer, + gradients, + parameters."""
    tensor: int = 1
    """Ranks that split every matrix (Megatron-LM style); keep them inside one node."""
    context: int = 1
    """Ranks that split the sequence of every sample, for long sequences."""
    pipeline: int = 1
    """Pipeline stages: ranks that hold different layers."""
    sequence_parallel: bool = False
    """Norms and residuals on sequence shards of the tensor-parallel ranks."""
    context_method: Literal["auto", "ulysses", "ring"] = "auto"
    """Attention over context-parallel ranks: auto is ulysses where the heads divide, else ring."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """Order in which pipeline stages run micro-batches."""
    virtual_stages: int = 1
    """Chunks of layers a pipeline rank holds; more than 1 only with schedule "interleaved"."""
    hpz: int = 1
    """ZeRO-3 partitions a second copy of the parameters over N ranks (a node) for backward; 1 is off."""
    offload_optimizer: bool = False
    """Optimizer state and step on the CPU."""
    quantized_weights: bool = False
    """ZeRO-3 gathers parameters in 8 bits (ZeRO++ qwZ); changes the numbers."""
    quantized_gradients: bool = False
    """ZeRO-3 reduces gradients in 4 bits (ZeRO++ qgZ); changes the numbers."""
    whole_parameters: int = 0
    """ZeRO-3 keeps the first parameters, up to this many elements on a rank, whole instead of partitioned."""
    auto: bool = False
    """Choose zero_stage and recomputation for parallel.memory_gb from the memory model, and print why."""
    memory_gb: float = 80.0
    """Memory of one device in GiB that `auto` may fill (A100 and A800: 80)."""
    timeout_minutes: float = 30.0
    """Limit of one collective operation."""
    watchdog_seconds: float = 300.0
    """A rank that makes no progress for this long ends the run with a report; 0 turns the watchdog off."""
    first_step_seconds: float = 1_800.0
    """The same limit for the first step, which compiles and connects."""

    @property
    def model_ranks(self) -> int:
        """Ranks that together hold the model and one sample: tensor x context x pipeline."""
        return self.tensor * self.context * self.pipeline

    def data_size(self, world_size: int) -> int:
        """Ranks of the data dimension, which share the global batch (checks.py holds that it divides)."""
        return world_size // self.model_ranks


@dataclass(frozen=True, kw_only=True)
class OpsConfig:
    """Backends of the operations; `b2 ops list` says what this machine can run."""

    backend: Literal["auto", "reference", "triton", "cuda"] = "auto"
    """Of every operation that has it; auto takes the first that the device can run."""
    attention: Literal["default", "auto", "reference", "triton", "cuda"] = "default"
    """Causal attention with ALiBi and packed documents; default means ops.backend, here and below. cuda
    stores tokens x tokens probabilities of each head: used only where it is named here, not with the ring."""
    skip_negligible_keys: bool = False
    """Triton's attention with ALiBi leaves out keys so far away that together they add less than 2^-24 of a
    row's sum: below the resolution of fp32, but not the same bits. An error with any other attention."""
    head_loss: Literal["default", "auto", "reference", "triton", "cuda"] = "default"
    """NormHead, cross-entropy and max-z loss."""
    head_gradient: Literal["backward", "forward"] = "backward"
    """Pass in which the Triton head makes its gradients: backward computes the logits again; forward keeps
    them, which is a quarter less arithmetic, and holds the weight's gradient until the backward pass. Other
    heads ignore it: the reference always uses the forward pass, cuda the backward pass."""
    rms_norm: Literal["default", "auto", "reference", "triton", "cuda"] = "default"
    """RMSNorm, also with the addition of the residual."""
    rope: Literal["default", "auto", "reference", "triton"] = "default"
    """Rotary positions on the fused projection."""
    swiglu: Literal["default", "auto", "reference", "triton", "cuda"] = "default"
    """SwiGLU on the fused projection."""
    adamw: Literal["default", "auto", "reference", "cuda"] = "default"
    """The optimizer's update of all parameters."""
    compile: bool = False
    """torch.compile for rms_norm and swiglu where they use the reference."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    interval: int = 1_000
    """Steps between checkpoints (report appendix C); 0 saves only at the end."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep every checkpoint whose step is a multiple of this; 0 keeps none."""
    milestone_tokens: int = 0
    """Also save and keep one checkpoint each time this many tokens were seen (report: 220e9); 0 is off."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest whole checkpoint of the run directory."""
    init_from: str | None = None
    """Weights to start from when nothing is resumed: one of our checkpoints or a Hugging Face folder."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    name: str = "run"
    """Name of the run in logs and plots."""
    output_dir: str = "runs/run"
    """Checkpoints, metrics, plots and the resolved configuration go here."""
    model: ModelConfig
    """Shape of the transformer."""
    data: DataConfig = field(default_factory=DataConfig)
    """The tokenized corpus and how samples are cut from it."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer that made the data."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW and its schedule."""
    train: TrainConfig
    """The training loop."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Engine and layout."""
    ops: OpsConfig = field(default_factory=OpsConfig)
    """Backends of the operations."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save and what to keep."""
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """Extra keys for the generated DeepSpeed JSON; a key that contradicts this file is an error."""

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of one optimizer step, over all ranks."""
        return self.train.global_batch_size * self.data.seq_len
