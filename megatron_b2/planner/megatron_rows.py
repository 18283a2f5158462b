"""Rows of Megatron-LM's papers and tables: layout, program and batch, also where the source is silent.

What a row leaves open is what its program did at the time, or the first of the usual choices that fits the
device; both are listed in `assumed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from megatron_b2.errors import ConfigError
from megatron_b2.planner.flops import Convention, seconds_from_tflops
from megatron_b2.planner.hardware import Cluster
from megatron_b2.planner.memory import predict_memory
from megatron_b2.planner.models import known_model, llama_shape
from megatron_b2.planner.rows import (
    SECONDS,
    PublishedRun,
    Row,
    RowError,
    cluster_of,
    fitted_batch,
    memory_of,
    needed,
    number,
    positive,
    ran_out,
    recompute_of,
    stage_of,
    whole,
)
from megatron_b2.planner.workload import ModelShape, Recompute, Workload

SC21: Final = r"SC'?21|2104\.04473|Narayanan"
"""How sources name the paper whose TFLOP/s count recomputation (equation 3) and whose program was of 2021."""
KORTHIKANTI: Final = r"Korthikanti|2205\.05198"
"""How sources name the paper on sequence parallelism and selective recomputation, of 2022."""
FSDP: Final = r"fsdp|full[-_ ]shard"
"""How sources name the parameters that PyTorch shards."""
FP8: Final = r"fp8|float8"
"""How sources name products of 8 bits."""
LARGEST_MICRO: Final = 64
"""Sequences of the largest micro-batch that is assumed."""
TENSOR: Final = (1, 2, 4, 8)
"""Tensor sizes that are assumed: within a node."""


@dataclass(frozen=True)
class Source:
    """What a row says, and what is the same for every layout that it may have had."""

    row: Row
    text: str
    """Source and notes."""
    cluster: Cluster
    shape: ModelShape
    program: dict[str, Any]
    """Fields of the workload that its program decides."""

    @property
    def is_sharded(self) -> bool:
        """ZeRO-3 or FSDP."""
        return bool(self.program["zero_stage"] == 3)


def is_llama_3(row: Row) -> bool:
    """Whether a row is of Llama 3, which ran interleaved layer by layer and without recomputation (arXiv
    2407.21783, section 3.3.2)."""
    names = " ".join(row.get(name, "") for name in ("source", "model", "notes"))
    return re.search(r"llama[\s_-]*v?3", names, re.IGNORECASE) is not None


def megatron_run(row: Row) -> PublishedRun:
    """A row of Megatron-LM's papers and tables."""
    cluster, assumed = cluster_of(row), list[str]()
    text = f"{row.get('source', '')} {row.get('notes', '')}"
    if any(number(row.get(name, "")) not in (None, 0.0, 1.0) for name in ("ep", "experts")):
        raise RowError("expert parallelism is not modelled")
    if re.search(FP8, " ".join(row.values()), re.IGNORECASE):
        raise RowError("fp8 is not modelled")
    shape = shape_of(row, assumed)
    source = Source(row, text, cluster, shape, megatron_program(row, text, cluster, assumed))
    work, notes = _chosen(source)
    return PublishedRun(
        form="megatron",
        row=0,
        source=row.get("source", ""),
        workload=work,
        cluster=cluster,
        measured_time=_time(source, work),
        measured_memory=memory_of(row),
        out_of_memory=ran_out(row),
        assumed=(*assumed, *notes),
    )


def _chosen(source: Source) -> tuple[Workload, list[str]]:
    """The first workload that fits the device, of those that the row may mean; the last if none does."""
    last: tuple[Workload, list[str]] | None = None
    problem: Exception | None = None
    for split, micro, kind in _options(source):
        try:
            last = _workload(source, split, micro, kind)
        except (RowError, ConfigError) as error:
            problem = problem or error
            continue
        if is_possible(last[0], source.cluster):
            return last
    if last is None:
        raise problem or RowError("no layout is possible: give tp and pp")
    return last


def _options(source: Source) -> Iterator[tuple[tuple[int, int, int], int, Recompute]]:
    """Splits, micro-batches and recomputation in the order of preference: with sharded parameters the largest
    micro-batch, else the least recomputation and the fewest ranks of the model."""
    splits, kinds = _splits(source), tuple(_recomputations(source))
    if source.is_sharded:
        for micro in _micro_batches(source, splits[0]):
            yield from ((splits[0], micro, kind) for kind in kinds)
        return
    for kind in kinds:
        for split in splits:
            yield from ((split, micro, kind) for micro in _micro_batches(source, split))


def is_possible(work: Workload, cluster: Cluster) -> bool:
    """Whether the predicted memory itself, without its band, is within the device: a row that ran may have
    been close to it."""
    memory = cluster.gpu.memory_bytes
    return predict_memory(work, memory_bytes=memory).total <= memory


def _splits(source: Source) -> list[tuple[int, int, int]]:
    """Tensor, pipeline and context sizes that the row may mean: those given, those that a stated size of
    model parallelism or the data ranks leave; with sharded parameters none; else from the smallest up."""
    row, text, shape = source.row, source.text, source.shape
    t, p, d = whole(row, "tp"), whole(row, "pp"), whole(row, "dp")
    context = whole(row, "cp") or _named(text, "CP") or 1
    model = _named(text, r"MP|model[- ]parallel")
    if model is None and d and whole(row, "gpus"):
        model = max(1, needed(row, "gpus") // (d * context))
    if t and p:
        return [(t, p, context)]
    if source.is_sharded:
        return [(t or 1, p or 1, context)]
    if model is not None:
        inside = max(n for n in TENSOR if model % n == shape.num_heads % n == 0)
        t = t or (max(1, model // p) if p else inside)
        return [(t, p or max(1, model // t), context)]
    gpus = needed(row, "gpus")
    tensors = (t,) if t else TENSOR
    pipelines = (p,) if p else range(1, shape.num_layers + 1)
    found = [
        (tensor, pipeline, context)
        for tensor in tensors
        for pipeline in pipelines
        if gpus % (tensor * pipeline * context) == shape.num_heads % tensor == 0
        and (p or shape.num_layers % pipeline == 0)
    ]
    found = found or [(t or 1, p or 1, context)]
    return sorted(found, key=lambda split: (split[0] * split[1], split[1]))


def _micro_batches(source: Source, split: tuple[int, int, int]) -> list[int]:
    """The micro-batch given; else one sequence in a pipeline, which keeps its bubble small, and without one
    from the largest down."""
    given = whole(source.row, "mbs")
    t, p, c = split
    if given is not None or p > 1:
        return [given or 1]
    share = needed(source.row, "gbs") * t * p * c // _gpus(source.row, split)
    return [micro for micro in range(min(share, LARGEST_MICRO), 1, -1) if share % micro == 0] + [1]


def _recomputations(source: Source) -> Iterator[Recompute]:
    """What the row may have recomputed: what it says, else the least first. Unfused attention without
    recomputation is left out: nobody has run it at this size since 2022."""
    stated = recompute_of(source.row.get("recompute", "") or ("none" if is_llama_3(source.row) else ""))
    if stated is not None:
        yield stated
        return
    if source.program["attention"] != "unfused":
        yield "none"
    yield from ("selective", "full")


def _gpus(row: Row, split: tuple[int, int, int]) -> int:
    """Ranks: as given, or of all four dimensions."""
    t, p, c = split
    d = whole(row, "dp")
    return whole(row, "gpus") or (t * p * c * d if d else needed(row, "gpus"))


def _workload(
    source: Source, split: tuple[int, int, int], micro: int, kind: Recompute
) -> tuple[Workload, list[str]]:
    """One of the workloads that the row may mean, and what of it the row does not say."""
    row, (t, p, c), assumed = source.row, split, list[str]()
    parts = (("tensor", "tp", t), ("pipeline", "pp", p))
    missing = [f"{name} {size}" for name, cell, size in parts if whole(row, cell) is None]
    if missing:
        assumed.append(" x ".join(missing))
    gpus = _gpus(row, split)
    if gpus % (t * p * c):
        raise RowError(f"gpus = {gpus} is no multiple of tensor x pipeline x context = {t} x {p} x {c}")
    data = gpus // (t * p * c)
    if whole(row, "dp") not in (None, data):
        assumed.append(f"data {data} instead of {whole(row, 'dp')}, by the number of GPUs")
    v = _virtual_stages(source, pipeline=p, data=data, micro=micro, assumed=assumed)
    if whole(row, "mbs") is None:
        assumed.append(f"micro-batch {micro}")
    batch, note = fitted_batch(needed(row, "gbs"), micro=micro, data=data, rounds=p if v > 1 else 1)
    if recompute_of(row.get("recompute", "")) is None and not is_llama_3(source.row):
        note.append(f"recompute {kind}")
    work = Workload(
        shape=source.shape,
        seq_len=needed(row, "seq"),
        micro_batch_size=micro,
        global_batch=batch,
        tensor=t,
        pipeline=p,
        context=c,
        data=data,
        virtual_stages=v,
        schedule="interleaved" if v > 1 else "1f1b",
        recompute=kind,
        chunked_head=False,
        balanced_stages=False,
        **source.program,
    )
    return work, [*assumed, *note]


def _virtual_stages(source: Source, *, pipeline: int, data: int, micro: int, assumed: list[str]) -> int:
    """Chunks of a rank: as given; of Llama 3 one for each layer; for other runs of 2023 and later that say
    nothing, two layers a chunk, or one where that does not divide (our assumption: Megatron-LM's large runs
    are interleaved), if the batch allows it."""
    row, layers = source.row, source.shape.num_layers
    given = whole(row, "vpp") or _named(source.text, "VPP")
    if given is not None:
        if given > 1 and pipeline * given > layers:
            assumed.append(f"virtual stages 1 instead of {given}: {layers} layers are too few")
            return 1
        return given if pipeline > 1 else 1
    if pipeline == 1:
        return 1
    each = max(1, layers // pipeline)
    rounds = needed(row, "gbs") / (data * micro)
    if rounds % pipeline:
        return 1
    if not is_llama_3(source.row):
        is_late = not source.is_sharded and _year(source.text) >= 2023
        if not is_late or layers % pipeline or each < 3:
            return 1
        each = each // 2 if each % 2 == 0 else each
    assumed.append(f"virtual stages {each}")
    return each


def shape_of(row: Row, assumed: list[str]) -> ModelShape:
    """The shape that the columns give; the Llama family, and public models that are named, have their own."""
    names = (row.get("source", ""), row.get("model", ""), row.get("notes", ""))
    if any("llama" in name.lower() for name in names):
        return llama_shape(row, assumed)
    hidden, heads = needed(row, "hidden"), whole(row, "heads")
    known = known_model(row.get("model", ""))
    if known is not None and (known.hidden_size, known.num_layers) == (hidden, needed(row, "layers")):
        return replace(known, vocab_size=whole(row, "vocab") or known.vocab_size)
    if heads is None:
        heads = max(1, hidden // 128)
        assumed.append(f"{heads} heads")
    return ModelShape(
        hidden_size=hidden,
        ffn_hidden_size=whole(row, "ffn") or 4 * hidden,
        num_layers=needed(row, "layers"),
        num_heads=heads,
        vocab_size=whole(row, "vocab") or 51_200,
        kv_heads=whole(row, "kv_heads") or 0,
        gated=False,
        tied=True,
    )


def megatron_program(row: Row, text: str, cluster: Cluster, assumed: list[str]) -> dict[str, Any]:
    """What the program of the time did: Megatron-LM of 2021 (fp16, plain data parallelism), of 2022 (sequence
    parallelism), DeepSpeed with it (ZeRO-1), of 2023 and later (bf16 with fp32 sums, sharded optimizer);
    DeepSpeed's ZeRO-3; FSDP."""
    is_hopper = cluster.gpu.architecture == "hopper"
    is_nvidia = re.search(f"{SC21}|{KORTHIKANTI}", text, re.IGNORECASE) is not None
    is_fused = is_hopper or re.search("flash", text, re.IGNORECASE) is not None
    fields: dict[str, Any] = {
        "attention": "fused" if is_fused else "unfused",
        "gradient_copy": re.search(SC21, text, re.IGNORECASE) is not None,
    }
    stage = stage_of(text)
    if stage == 3:
        return fields | {"zero_stage": 3, "gradient_bytes": 2, "overlap_data": True}
    if stage is None and re.search(FSDP, text, re.IGNORECASE):
        return fields | {"zero_stage": 3, "zero_engine": "fsdp", "attention": "fused"}
    parallel = row.get("seqpar", "").lower()
    is_early = _year(text) < 2023
    if parallel:
        fields["sequence_parallel"] = parallel in ("true", "yes", "on") or bool(number(parallel))
    else:
        fields["sequence_parallel"] = not is_early or "sp" in row.get("recompute", "").lower().split("+")
        assumed.append(f"sequence parallelism {'on' if fields['sequence_parallel'] else 'off'}")
    if is_nvidia:
        return fields | {"zero_stage": 0, "gradient_bytes": 2, "overlap_data": False}
    sharded = 1 if stage is None else stage
    if is_early:
        assumed.append(f"ZeRO-{sharded}, fp16 gradients")
        return fields | {"zero_stage": sharded, "gradient_bytes": 2, "overlap_data": False}
    engine = "deepspeed" if stage == 2 else "megatron"
    fields |= {"zero_engine": engine, "zero_stage": sharded, "gradient_bytes": 4, "overlap_data": is_hopper}
    fields["overlap_tensor"] = is_hopper and fields["sequence_parallel"] and not is_llama_3(row)
    overlapped = ", overlapped" if is_hopper else ""
    assumed.append(f"ZeRO-{sharded}, fp32 gradients{overlapped}")
    if not is_fused:
        assumed.append("unfused attention")
    if fields["overlap_tensor"]:
        assumed.append("tensor-parallel sums overlapped")
    return fields


def _year(text: str) -> int:
    """Of an arXiv number, of the two papers that are known by name, or as written; else a recent one."""
    number_of = re.search(r"\b(\d\d)(?:0[1-9]|1[0-2])\.\d{4,5}\b", text)
    if number_of is not None:
        return 2000 + int(number_of[1])
    if re.search(SC21, text, re.IGNORECASE):
        return 2021
    if re.search(KORTHIKANTI, text, re.IGNORECASE):
        return 2022
    written = re.search(r"\b20[12]\d\b", text)
    return int(written[0]) if written is not None else 9999


def _time(source: Source, work: Workload) -> float | None:
    """Seconds a step: as given, or of TFLOP/s or a utilisation by the source's own convention.

    TFLOP/s before Korthikanti's paper count recomputation, as its seconds say of MT-NLG's, and Megatron-LM's
    programs print it so until 2023; a utilisation of that time (MFU) does not."""
    row = source.row
    seconds, tflops = positive(row, "iter_s", SECONDS), positive(row, "tflops_per_gpu")
    if seconds is not None:
        return seconds
    convention: Convention = "sc21-model"
    is_model = re.search(KORTHIKANTI, source.text, re.IGNORECASE) is not None
    is_hardware = tflops is not None and _year(source.text) < 2023 and not is_model
    if re.search(SC21, source.text, re.IGNORECASE) or (is_hardware and work.recompute == "full"):
        convention = "sc21"
    elif is_llama_3(source.row):
        convention = "megatron"
    if tflops is None:
        share = positive(row, "mfu_or_pct")
        if share is None:
            return None
        tflops = share / (100 if share > 1 else 1) * source.cluster.gpu.peak_flops / 1e12
    return seconds_from_tflops(work, tflops, convention)


def _named(text: str, name: str) -> int | None:
    """The number after a name in a note: 96 of "model-parallel 96", 16 of "CP16"."""
    found = re.search(rf"\b(?:{name})\s*[=:]?\s*(\d+)\b", text, re.IGNORECASE)
    return int(found[1]) if found else None
