"""What a row of each form of published runs says: its workload, cluster and measurements.

What a source leaves open is filled in with what its programs did at the time, and listed in `assumed`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from math import gcd
from typing import Any, Final

from megatron_b2.planner.flops import Convention, seconds_from_tflops, step_flops
from megatron_b2.planner.hardware import Cluster, gpu_names, load_hardware, with_nics
from megatron_b2.planner.memory import predict_memory
from megatron_b2.planner.rows import (
    PublishedRun,
    Row,
    RowError,
    fitted_batch,
    memory_of,
    needed,
    number,
    positive,
    ran_out,
    whole,
)
from megatron_b2.planner.workload import ModelShape, Recompute, Workload

SC21: Final = r"SC'?21|2104\.04473|Narayanan"
"""How sources name the paper whose TFLOP/s count recomputation (equation 3) and whose program was of 2021."""
KORTHIKANTI: Final = r"Korthikanti|2205\.05198"
"""How sources name the paper on sequence parallelism and selective recomputation, of 2022."""
BLOOM_VOCABULARY: Final = 250_880
"""Rows of BLOOM's embedding (bigscience, tr11-176B)."""
BLOOM_HEADS: Final = 64
"""Heads where a row's are not known: those of all rows before the comparison of heads, by the log."""
BLOOM_FP32_SUMS: Final = (2, 28)
"""Month and day of 2022 from which BLOOM's log has BF16 with unsharded fp32 gradients (its section
"Rebalancing layers")."""
WORK_TOLERANCE: Final = 0.15
"""Between the work of a row's batch and its seconds times TFLOP/s, whose early formula was 3 % low."""
SIZE_TOLERANCE: Final = 0.01
"""Between a model's printed size and its parameters; a row further off has other layers than its header."""
MODELS: Final = "published/models.csv"


def megatron_run(row: Row) -> PublishedRun:
    """A row of Megatron-LM's papers and tables."""
    cluster = cluster_of(row)
    text = f"{row.get('source', '')} {row.get('notes', '')}"
    assumed: list[str] = []
    fields = _megatron_layout(row, text, assumed)
    fields |= _megatron_program(row, text, cluster, assumed)
    shape = _shape_of(row)
    micro = whole(row, "mbs")
    if micro is None:
        micro = 1
        assumed.append("micro-batch 1")
    pieces = fields["virtual_stages"]
    batch, note = fitted_batch(
        needed(row, "gbs"), micro=micro, data=fields["data"], rounds=fields["pipeline"] if pieces > 1 else 1
    )
    assumed += note
    work = Workload(
        shape=shape,
        seq_len=needed(row, "seq"),
        micro_batch_size=micro,
        global_batch=batch,
        schedule="interleaved" if pieces > 1 else "1f1b",
        chunked_head=False,
        balanced_stages=False,
        **fields,
    )
    stated = row.get("recompute", "") or ("none" if _is_llama(row) else "")  # arXiv 2407.21783, section 3.3.2
    work = _with_recompute(work, stated, cluster, assumed)
    return PublishedRun(
        form="megatron",
        row=0,
        source=row.get("source", ""),
        workload=work,
        cluster=cluster,
        measured_time=_megatron_time(row, work, cluster, text),
        measured_memory=memory_of(row),
        out_of_memory=ran_out(row),
        assumed=tuple(assumed),
    )


def _megatron_layout(row: Row, text: str, assumed: list[str]) -> dict[str, Any]:
    """Tensor, pipeline, virtual stages, context and data, of what is given: gpus = t p c d."""
    layers, heads = needed(row, "layers"), _heads(row, assumed)
    if any(number(row.get(name, "")) not in (None, 0.0, 1.0) for name in ("ep", "experts")):
        raise RowError("expert parallelism is not modelled")
    t, p, d = whole(row, "tp"), whole(row, "pp"), whole(row, "dp")
    context = whole(row, "cp") or _named(text, "CP") or 1
    v = whole(row, "vpp") or _named(text, "VPP")
    named = _named(text, r"MP|model[- ]parallel")
    gpus = whole(row, "gpus") or (t * p * d * context if t and p and d else needed(row, "gpus"))
    if t is None and p is None:
        model = named or (max(1, gpus // (d * context)) if d else 8 * context)
        t = gcd(gcd(8, model), heads)
        p = model // t
        assumed.append(f"tensor {t} x pipeline {p}")
    elif p is None:
        p = max(1, (named // t) if named and t else gpus // ((t or 1) * context * (d or gpus)))
        assumed.append(f"pipeline {p}")
    elif t is None:
        t = max(1, named // p) if named else gcd(gcd(8, heads), gpus // p)
        assumed.append(f"tensor {t}")
    assert t is not None
    model = t * p * context
    if gpus % model:
        raise RowError(f"gpus = {gpus} is no multiple of tensor x pipeline x context = {t} x {p} x {context}")
    data = gpus // model
    if d is not None and d != data:
        assumed.append(f"data {data} instead of {d}, by the number of GPUs")
    if v is None and p > 1 and _is_llama(row):
        v = max(1, layers // p)  # arXiv 2407.21783, section 3.3.2: an interleaved schedule, layer by layer
        assumed.append(f"virtual stages {v}")
    if v is None and p > 1 and _is_interleaved(row, text, layers=layers, pipeline=p, data=data):
        v = layers // p // 2
        assumed.append(f"virtual stages {v}")
    v = v or 1
    if v > 1 and p * v > layers:
        assumed.append(f"virtual stages 1 instead of {v}: {layers} layers are too few")
        v = 1
    return {"tensor": t, "pipeline": p, "context": context, "data": data, "virtual_stages": v if p > 1 else 1}


def _is_interleaved(row: Row, text: str, *, layers: int, pipeline: int, data: int) -> bool:
    """Whether a run of 2023 or later that says nothing of its schedule is taken to be interleaved, two layers
    a chunk (our assumption: Megatron-LM's large runs are), if its layers and batch allow it."""
    is_late = not re.search(f"{SC21}|{KORTHIKANTI}|zero[-_ ]?3|fsdp", text, re.IGNORECASE)
    micro = needed(row, "gbs") / (data * (whole(row, "mbs") or 1))
    return is_late and layers % (2 * pipeline) == 0 and layers > 2 * pipeline and micro % pipeline == 0


def _heads(row: Row, assumed: list[str]) -> int:
    """Attention heads; where they are not given, heads of width 128."""
    heads = whole(row, "heads")
    if heads is None:
        heads = max(1, needed(row, "hidden") // 128)
        assumed.append(f"{heads} heads")
    return heads


def _is_llama(row: Row) -> bool:
    names = (row.get("source", ""), row.get("model", ""), row.get("notes", ""))
    return any("llama" in name.lower() for name in names)


def _megatron_program(row: Row, text: str, cluster: Cluster, assumed: list[str]) -> dict[str, Any]:
    """What the program of the time did: Megatron-LM of 2021 (fp16, plain data parallelism), of 2022 (sequence
    parallelism), of 2023 and later (bf16 with fp32 sums, sharded optimizer), DeepSpeed's ZeRO-3, FSDP."""
    is_hopper = cluster.gpu.architecture == "hopper"
    fields: dict[str, Any] = {
        "attention": "fused" if is_hopper else "unfused",
        "gradient_copy": re.search(SC21, text, re.IGNORECASE) is not None,
    }
    if re.search(r"zero[-_ ]?3", text, re.IGNORECASE):
        return fields | {"zero_stage": 3, "gradient_bytes": 2, "overlap_data": True}
    if re.search(r"fsdp", text, re.IGNORECASE):
        return fields | {"zero_stage": 3, "zero_engine": "fsdp", "attention": "fused"}
    parallel = row.get("seqpar", "").lower()
    is_early = re.search(f"{SC21}|{KORTHIKANTI}", text, re.IGNORECASE) is not None
    if parallel:
        fields["sequence_parallel"] = parallel in ("true", "yes", "on") or bool(number(parallel))
    else:
        fields["sequence_parallel"] = not is_early or "sp" in row.get("recompute", "").lower().split("+")
        assumed.append(f"sequence parallelism {'on' if fields['sequence_parallel'] else 'off'}")
    if is_early:
        return fields | {"zero_stage": 0, "gradient_bytes": 2, "overlap_data": False}
    fields["zero_engine"] = "megatron"
    assumed.append("ZeRO-1, fp32 gradients" + (", overlapped" if is_hopper else ""))
    return fields | {"zero_stage": 1, "gradient_bytes": 4, "overlap_data": is_hopper}


def _with_recompute(work: Workload, cell: str, cluster: Cluster, assumed: list[str]) -> Workload:
    """The workload with what a cell says of recomputation; of an empty cell, the least that fits. Unfused
    attention without recomputation is left out: nobody has run it at this size since 2022."""
    kind = recompute_of(cell)
    if kind is not None:
        return replace(work, recompute=kind)
    kinds: tuple[Recompute, ...] = ("none", "selective", "full")
    options = [replace(work, recompute=kind) for kind in kinds[work.attention == "unfused" :]]
    fitting = [one for one in options if predict_memory(one).total <= cluster.gpu.memory_bytes]
    chosen = (fitting or options[-1:])[0]
    assumed.append(f"recompute {chosen.recompute}")
    return chosen


def recompute_of(cell: str) -> Recompute | None:
    """full, sel, sel+SP, none, 1, 0, true, false; None for an empty cell or "unstated"."""
    text = cell.strip().lower()
    if text.startswith("sel") or text == "selective":
        return "selective"
    if text in ("full", "1", "true", "yes", "uniform", "block"):
        return "full"
    if text in ("none", "0", "false", "no", "off"):
        return "none"
    return None


def _megatron_time(row: Row, work: Workload, cluster: Cluster, text: str) -> float | None:
    """Seconds a step: as given, or of TFLOP/s or a utilisation by the source's own convention."""
    seconds, tflops = positive(row, "iter_s"), positive(row, "tflops_per_gpu")
    if seconds is not None:
        return seconds
    convention: Convention = "sc21-model"
    if re.search(SC21, text, re.IGNORECASE):
        convention = "sc21"
    elif _is_llama(row):
        convention = "megatron"
    if tflops is None:
        share = positive(row, "mfu_or_pct")
        if share is None:
            return None
        tflops = share / (100 if share > 1 else 1) * cluster.gpu.peak_flops / 1e12
    return seconds_from_tflops(work, tflops, convention)


def _shape_of(row: Row) -> ModelShape:
    """The shape that the columns give; the Llama family by its name."""
    h = needed(row, "hidden")
    if _is_llama(row):
        for shape in _models().values():
            if shape.gated and (shape.hidden_size, shape.num_layers) == (h, needed(row, "layers")):
                return shape
    return ModelShape(
        hidden_size=h,
        ffn_hidden_size=whole(row, "ffn") or 4 * h,
        num_layers=needed(row, "layers"),
        num_heads=_heads(row, []),
        vocab_size=whole(row, "vocab") or 51_200,
        gated=False,
        tied=True,
    )


def bloom_run(row: Row) -> PublishedRun:
    """A row of BLOOM's log."""
    assumed: list[str] = []
    t, p, micro = (needed(row, name) for name in ("tp", "pp", "mbs"))
    given, nodes = whole(row, "dp"), whole(row, "nodes")
    data = given or 1
    if nodes is not None:
        if 8 * nodes % (t * p):
            raise RowError(f"{nodes} nodes of 8 GPUs are no multiple of tensor x pipeline = {t} x {p}")
        data = 8 * nodes // (t * p)
    if given is not None and given != data:
        assumed.append(f"data {data} instead of {given}, by the number of nodes")
    batch, note = fitted_batch(needed(row, "gbs"), micro=micro, data=data)
    stage = number(row.get("zs", ""))
    if stage not in (None, 0, 1):
        raise RowError(f"zs = {row['zs']!r}: BLOOM's log has ZeRO stages 0 and 1")
    is_late = _month_and_day(row.get("notes", "")) >= BLOOM_FP32_SUMS
    work = Workload(
        shape=_bloom_shape(row, p, assumed),
        seq_len=2048,
        micro_batch_size=micro,
        global_batch=batch,
        tensor=t,
        pipeline=p,
        data=data,
        zero_stage=0 if stage == 0 else 1,
        recompute="full",
        attention="unfused",
        # ZeRO-0 ran only on the branch that had fp32 sums before the others.
        gradient_bytes=4 if is_late or stage == 0 else 2,
        overlap_data=False,
        chunked_head=False,
        balanced_stages=is_late,
    )
    work = _by_stated_work(work, row, assumed)
    seconds, tflops = positive(row, "sec_it"), positive(row, "tflops")
    if seconds is None and tflops is not None:
        seconds = seconds_from_tflops(work, tflops, "sc21")
    return PublishedRun(
        form="bloom",
        row=0,
        source="BLOOM",
        workload=work,
        cluster=load_hardware("a100-80g", node="opa100x4"),
        measured_time=seconds,
        measured_memory=memory_of(row),
        out_of_memory=ran_out(row),
        assumed=(*assumed, *note),
    )


def _month_and_day(notes: str) -> tuple[int, int]:
    found = re.search(r"\b(\d\d)-(\d\d)\b", notes)
    return (int(found[1]), int(found[2])) if found else (2, 20)


def _bloom_shape(row: Row, pipeline: int, assumed: list[str]) -> ModelShape:
    """GPT with a tied table. The layers are those of the section's heading, but where the size says that a
    row has others, they are a multiple of the pipeline."""
    h = needed(row, "hidden")
    shape = ModelShape(
        hidden_size=h,
        ffn_hidden_size=4 * h,
        num_layers=whole(row, "layers") or 1,
        num_heads=_bloom_heads(row, h, assumed),
        vocab_size=BLOOM_VOCABULARY,
        gated=False,
        tied=True,
    )
    size = number(row.get("size", ""))
    if size is None:
        if whole(row, "layers") is None:
            raise RowError("layers and size are missing")
        return shape
    close = abs(shape.parameters / (size * 1e9) - 1) <= SIZE_TOLERANCE
    if close and whole(row, "layers") is not None:
        return shape
    layers = (size * 1e9 - shape.table_parameters) / shape.layer_parameters
    rounds = max(1, round(layers / pipeline))
    assumed.append(f"{rounds * pipeline} layers, by the size")
    return replace(shape, num_layers=rounds * pipeline)


def _bloom_heads(row: Row, hidden: int, assumed: list[str]) -> int:
    given = whole(row, "nheads")
    if given is not None and hidden % given == 0:
        return given
    heads = next(heads for heads in (BLOOM_HEADS, 80, 96, 112, 40, 32, 16, 1) if hidden % heads == 0)
    why = f" instead of {given}, which do not divide {hidden}" if given else ""
    assumed.append(f"{heads} heads{why}")
    return heads


def _by_stated_work(work: Workload, row: Row, assumed: list[str]) -> Workload:
    """Seconds times TFLOP/s are the work that was done. Where it is not that of the row's batch, the batch is
    another (a heading of the log says so for some): take what the work says."""
    seconds, tflops = positive(row, "sec_it"), positive(row, "tflops")
    if seconds is None or tflops is None:
        return work
    ratio = seconds * tflops * 1e12 * work.gpus / step_flops(work, "sc21")
    if abs(ratio - 1) <= WORK_TOLERANCE:
        return work
    unit = work.micro_batch_size * work.data
    batch = max(1, round(work.global_batch * ratio / unit)) * unit
    assumed.append(f"global batch {batch} instead of {work.global_batch}, by seconds times TFLOP/s")
    return replace(work, global_batch=batch)


def fsdp_run(row: Row) -> PublishedRun:
    """A row of llm-foundry's or torchtitan's tables."""
    text = " ".join((row.get("parallel", ""), row.get("notes", "")))
    if re.search(r"fp8|float8", text, re.IGNORECASE):
        raise RowError("fp8 is not modelled")
    cluster = cluster_of(row)
    shape = known_model(row["model"], positive(row, "params"))
    if shape is None:
        raise RowError(f"model {row['model']!r} is not in {MODELS}")
    gpus = needed(row, "gpus")
    t, p, c = (_sized(row["parallel"], name) or 1 for name in ("TP", "PP", "CP"))
    if gpus % (t * p * c):
        raise RowError(f"gpus = {gpus} is no multiple of tensor x pipeline x context = {t} x {p} x {c}")
    data, micro, assumed = gpus // (t * p * c), needed(row, "mbs"), list[str]()
    steps = whole(row, "gradaccum")
    given = whole(row, "gbs") or micro * data * (steps or 1)
    batch, note = fitted_batch(given, micro=micro, data=data)
    is_titan = "titan" in row.get("source", "").lower()
    work = Workload(
        shape=shape,
        seq_len=needed(row, "seq"),
        micro_batch_size=micro,
        global_batch=batch,
        tensor=t,
        pipeline=p,
        context=c,
        data=data,
        zero_stage=1 if p > 1 else 3,
        zero_engine="fsdp",
        sequence_parallel=t > 1,
        gradient_bytes=4 if is_titan else 2,
        gradient_copy=False,
        chunked_head=False,
    )
    work = _with_recompute(work, row["act_ckpt"], cluster, assumed)
    rate, seconds = positive(row, "tok_s_gpu"), None
    if rate is not None:
        seconds = work.tokens_per_step / gpus / rate
    elif (share := positive(row, "mfu")) is not None:
        seconds = seconds_from_tflops(work, share / 100 * cluster.gpu.peak_flops / 1e12, "llm-foundry")
    return PublishedRun(
        form="fsdp",
        row=0,
        source=row.get("source", ""),
        workload=work,
        cluster=cluster,
        measured_time=seconds,
        measured_memory=memory_of(row),
        out_of_memory=ran_out(row),
        assumed=(*assumed, *note),
    )


def cluster_of(row: Row) -> Cluster:
    """The preset that a GPU's and a network's description means.

    Raises:
        RowError: the GPU is none of the presets.
    """
    text = row["gpu"].upper().replace("AMPERE", "A100")
    found = re.search(r"\b([AH]\d00)(?:\D+(\d{2,3})(?![\dW]))?", text)
    presets = [name for name in gpu_names() if found and name.startswith(f"{found[1].lower()}-")]
    if found is None or not presets:
        raise RowError(f"GPU {row['gpu']!r} is none of the presets")
    sizes = {int(name.split("-")[1].removesuffix("g")): name for name in presets}
    wanted = int(found[2] or max(sizes))
    nearest = min(sizes, key=lambda size: abs(size - wanted))
    cluster = load_hardware(sizes[nearest])
    gpu = replace(cluster.gpu, memory_bytes=cluster.gpu.memory_bytes * wanted / nearest)
    watts = re.search(r"\b(\d+)\s*W\b", text)
    if watts is not None:
        # Large products run at the power limit (our assumption: their rate is proportional to it).
        gpu = replace(gpu, peak_flops=gpu.peak_flops * min(1.0, float(watts[1]) / gpu.tdp_watts))
    cluster = replace(cluster, gpu=gpu)
    rate = re.search(r"([\d,]+)\s*Gbps\s*/\s*(node|gpu)", row.get("interconnect", ""), re.IGNORECASE)
    if rate is None:
        return cluster
    factor = cluster.node.gpus if rate[2].lower() == "gpu" else 1
    return with_nics(cluster, node_bandwidth=float(rate[1].replace(",", "")) * 1e9 / 8 * factor)


def known_model(name: str, parameters: float | None = None) -> ModelShape | None:
    """A public model by its name, or by its name and parameters; None if it is not known."""
    key = re.sub(r"[^a-z0-9.]", "", name.lower())
    family = re.search(r"llama-?(\d)?(?:\.\d)?-?(\d+b)", key)
    if family is not None:
        return _models().get(f"llama-{family[1] or 3}-{family[2]}")
    exact = {known.replace("-", ""): shape for known, shape in _models().items()}
    found = exact.get(key) or exact.get(f"mpt{key}")
    if found is not None or parameters is None:
        return found
    nearest = min(_models().values(), key=lambda shape: abs(shape.parameters - parameters))
    return nearest if abs(nearest.parameters / parameters - 1) <= 2 * SIZE_TOLERANCE else None


@cache
def _models() -> Mapping[str, ModelShape]:
    text = resources.files(__package__).joinpath(MODELS).read_text(encoding="utf-8")
    return {
        row["name"]: ModelShape(
            hidden_size=int(row["hidden"]),
            ffn_hidden_size=int(row["ffn"]),
            num_layers=int(row["layers"]),
            num_heads=int(row["heads"]),
            kv_heads=int(row["kv_heads"]),
            vocab_size=int(row["vocab"]),
            gated=row["gated"] == "1",
            tied=row["tied"] == "1",
        )
        for row in csv.DictReader(text.splitlines())
    }


def _named(text: str, name: str) -> int | None:
    """The number after a name in a note: 96 of "model-parallel 96", 16 of "CP16"."""
    found = re.search(rf"\b(?:{name})\s*[=:]?\s*(\d+)\b", text, re.IGNORECASE)
    return int(found[1]) if found else None


def _sized(text: str, name: str) -> int | None:
    """The number that a dimension has in "FSDP8xTP8xPP4"."""
    found = re.search(rf"{name}\s*=?\s*(\d+)", text, re.IGNORECASE)
    return int(found[1]) if found else None
