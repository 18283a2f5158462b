"""A training step on two tensor-parallel ranks: ours against megatron-core.

Same shape and token ids: SwiGLU, RMSNorm, RoPE, no biases, no dropout, untied embedding and head, fp32, two
forked gloo ranks of one thread each, in turns. Ours is the whole train_step of the DeepSpeed engine (ZeRO-1,
TP 2) and also computes NormHead and the max-z loss. Theirs is GPTModel with its local (not Transformer
Engine) layers, and around it the least a step needs, written by hand: mean loss, backward, clipping over both
ranks, torch's fused AdamW. It has no NormHead. megatron-core expects a GPU in two places that are patched
here: torch.cuda.current_device says "cpu", and its random state for dropout (p = 0) is not forked.

    pip install --no-deps megatron-core==0.16.1

It is no dependency of this project; without it the script says so and measures nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from layouts.turns import in_turns, markdown_table, write_json
from torch import Tensor, nn

from megatron_b2.config import load_config
from megatron_b2.config.schema import ParallelConfig, RunConfig
from megatron_b2.data.batch import Batch
from megatron_b2.engine.build import build_engine, initialize_engine
from megatron_b2.parallel.comm import ProcessGroupComm
from megatron_b2.testing.fork import run_ranks
from megatron_b2.testing.measure import machine

RANKS, LR = 2, 1e-4
THEIRS, THEIRS_FUSED = "megatron-core", "megatron-core, compiled SwiGLU"
OURS, OURS_SEQUENCE = "ours", "ours + sequence parallel"


@dataclass(frozen=True)
class Options:
    """Shapes beside the toy preset's (4 layers, hidden 256)."""

    batch: int = 8
    seq_len: int = 256
    vocab: int = 8_192
    rounds: int = 9
    out: Path = Path("runs/bench/tensor_parallel.json")


def run_config(options: Options, *, sequence_parallel: bool) -> RunConfig:
    toy = load_config("preset:toy").config
    return replace(
        toy,
        model=replace(toy.model, vocab_size=options.vocab),
        data=replace(toy.data, seq_len=options.seq_len),
        train=replace(toy.train, global_batch_size=options.batch, micro_batch_size=options.batch),
        parallel=ParallelConfig(engine="deepspeed", tensor=RANKS, sequence_parallel=sequence_parallel),
    )


def token_ids(config: RunConfig) -> tuple[Tensor, Tensor]:
    shape = (config.train.global_batch_size, config.data.seq_len + 1)
    ids = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def ours(config: RunConfig) -> tuple[nn.Module, Callable[[], float]]:
    engine = build_engine(config, comm=ProcessGroupComm(), device=torch.device("cpu"))
    initialize_engine(engine, seed=0)
    inputs, labels = token_ids(config)
    positions = torch.arange(inputs.shape[1], dtype=torch.int32).expand_as(inputs)
    batch = Batch(inputs, labels, torch.zeros_like(inputs, dtype=torch.int32), positions)
    return engine.module, lambda: engine.train_step([batch], lr=LR, step=1).ce.item()


def patch_megatron() -> None:
    """Let megatron-core run on the CPU."""
    warnings.filterwarnings("ignore", module=r"megatron\.")  # that there is neither Apex nor TE
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.cuda.current_device = lambda: torch.device("cpu")
    CudaRNGStatesTracker.fork = lambda *_args, **_kwargs: contextlib.nullcontext()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)


def gpt_model(config: RunConfig, *, fused: bool) -> nn.Module:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    model = config.model
    torch.manual_seed(0)
    return GPTModel(
        TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_heads,
            tensor_model_parallel_size=RANKS,
            normalization="RMSNorm",
            layernorm_epsilon=model.norm_eps,
            gated_linear_unit=True,
            activation_func=nn.functional.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            init_method_std=model.init_std,
            use_cpu_initialization=True,
            apply_rope_fusion=False,
            bias_activation_fusion=fused,
            bias_dropout_fusion=fused,
            gradient_accumulation_fusion=False,
        ),
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=model.vocab_size,
        max_sequence_length=config.data.seq_len,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def theirs(config: RunConfig, *, fused: bool) -> tuple[nn.Module, Callable[[], float]]:
    patch_megatron()
    network = gpt_model(config, fused=fused)
    parameters = list(network.parameters())
    norms = [p for p in parameters if p.ndim == 1]
    optim = config.optim
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
    inputs, labels = token_ids(config)
    length = inputs.shape[1]
    positions = torch.arange(length).expand_as(inputs)
    is_future = torch.ones(1, 1, length, length, dtype=torch.bool).triu(diagonal=1)

    def call() -> float:
        loss = network(inputs, positions, is_future, labels=labels).mean()
        loss.backward()
        clip(parameters, optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return network, call


def clip(parameters: list[nn.Parameter], limit: float) -> None:
    """Over the norm of all gradients; what both ranks hold is counted once."""
    counted = [p.grad for p in parameters if p.grad is not None and (p.ndim > 1 or dist.get_rank() == 0)]
    norm = nn.utils.get_total_norm(counted or [torch.zeros(1)]).square()
    dist.all_reduce(norm)
    nn.utils.clip_grads_with_norm_(parameters, limit, norm.sqrt())


def candidates(options: Options) -> dict[str, Callable[[], tuple[nn.Module, Callable[[], float]]]]:
    """What a rank runs, by name: functions that make the model and its step."""
    config = run_config(options, sequence_parallel=False)
    sequence = run_config(options, sequence_parallel=True)
    return {
        THEIRS: lambda: theirs(config, fused=False),
        THEIRS_FUSED: lambda: theirs(config, fused=True),
        OURS: lambda: ours(config),
        OURS_SEQUENCE: lambda: ours(sequence),
    }


def check_losses(options: Options) -> None:
    """Every candidate has as many parameters, starts where fresh weights do, and learns."""

    def first_steps(make: Callable[[], tuple[nn.Module, Callable[[], float]]]) -> tuple[int, list[float]]:
        module, call = make()
        return sum(p.numel() for p in module.parameters()), [call() for _ in range(5)]

    found = {name: run_ranks(RANKS, first_steps, make)[0] for name, make in candidates(options).items()}
    assert len({size for size, _ in found.values()}) == 1, found
    # Fresh weights: about ln V; NormHead's logits have variance 1, which adds 1/2.
    uniform = math.log(options.vocab)
    for name, (_, losses) in found.items():
        assert abs(losses[0] - uniform) < 0.75, f"{name}: first loss {losses[0]}, expected about {uniform}"
        assert losses[-1] < losses[0], f"{name}: the loss does not fall: {losses}"


def main() -> None:
    """Run the benchmark, print the tables, write the JSON."""
    options = tyro.cli(Options, description=__doc__)
    if importlib.util.find_spec("megatron") is None:
        print("not measured: megatron-core is not installed; pip install --no-deps megatron-core==0.16.1")
        return
    check_losses(options)
    calls = {name: lambda make=make: make()[1] for name, make in candidates(options).items()}
    rows = in_turns(RANKS, calls, rounds=options.rounds)
    facts = machine("torch", "deepspeed", "megatron-core")
    model = run_config(options, sequence_parallel=False).model
    title = f"{RANKS} ranks, {options.batch} x {options.seq_len} tokens, {options.rounds} rounds, {model}"
    tokens = options.batch * options.seq_len
    print(f"{title} · {facts}\n\n{markdown_table(rows, baseline=THEIRS, tokens=tokens)}")
    write_json(options.out, facts=facts, tables={title: rows})


if __name__ == "__main__":
    main()
