"""One optimizer step of the toy model: ours against transformers' LlamaForCausalLM of the same shape.

Same token ids, same AdamW, same clipping, in one run and in turns. Ours also computes NormHead and the
max-z loss, which Llama has not. Floor: 6 N floating-point operations a token for N parameters outside the
embedding, plus attention. Prints a table a vocabulary and writes JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_b2.config import load_config
from megatron_b2.config.schema import RunConfig
from megatron_b2.data.batch import Batch
from megatron_b2.engine.build import build_engine, initialize_engine
from megatron_b2.parallel.comm import SingleComm
from megatron_b2.testing.measure import compare, machine, markdown_table, write_report


@dataclass(frozen=True)
class Options:
    """Shapes beside the toy preset's."""

    vocabs: tuple[int, ...] = (8_192, 125_696)
    batch: int = 8
    rounds: int = 5
    out: Path = Path("runs/bench/train_step.json")


def run_config(vocab: int, batch: int) -> RunConfig:
    toy = load_config("preset:toy").config
    return replace(
        toy,
        model=replace(toy.model, vocab_size=vocab),
        train=replace(toy.train, global_batch_size=batch, micro_batch_size=batch),
    )


def token_ids(config: RunConfig) -> Tensor:
    shape = (config.train.global_batch_size, config.data.seq_len + 1)
    return torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def ours(config: RunConfig) -> Callable[[], None]:
    engine = build_engine(config, comm=SingleComm(), device=torch.device("cpu"))
    initialize_engine(engine, seed=0)
    ids = token_ids(config)
    inputs = ids[:, :-1].contiguous()
    positions = torch.arange(inputs.shape[1], dtype=torch.int32).expand_as(inputs)
    batch = Batch(inputs, ids[:, 1:].contiguous(), torch.zeros_like(inputs, dtype=torch.int32), positions)
    return lambda: engine.train_step([batch], lr=1e-3, step=1).loss.item()


def llama(config: RunConfig) -> Callable[[], None]:
    model = config.model
    network = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            vocab_size=model.vocab_size,
            max_position_embeddings=config.data.seq_len,
            tie_word_embeddings=False,
        )
    )
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    ids = token_ids(config)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def call() -> float:
        loss = network(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return call


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    facts, report = machine("torch", "transformers"), {}
    print(facts)
    for vocab in options.vocabs:
        config = run_config(vocab, options.batch)
        candidates = {"transformers": lambda c=config: llama(c), "ours": lambda c=config: ours(c)}
        rows = compare(candidates, rounds=options.rounds)
        tokens = options.batch * config.data.seq_len
        title = f"V = {vocab:,}, {options.batch} x {config.data.seq_len} tokens, {config.model}"
        report[title] = rows
        print(f"\n{title}\n\n{markdown_table(rows, baseline='transformers', tokens=tokens)}")
    write_report(options.out, facts=facts, rows=report)


if __name__ == "__main__":
    main()
