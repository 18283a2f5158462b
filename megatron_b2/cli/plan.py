"""`b2 plan`: time, memory, days, energy and failures of a run before it is paid for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from megatron_b2.cli.config_arguments import Flag, parse
from megatron_b2.cli.main import run
from megatron_b2.errors import ConfigError

if TYPE_CHECKING:  # it takes a second: only once the command line is understood
    from megatron_b2.config.schema import RunConfig
    from megatron_b2.planner.hardware import Cluster
    from megatron_b2.planner.reliability import FailureRecord, StorageRate
    from megatron_b2.planner.search import SearchResult

HELP: Final = "time, memory, days and failures of a run, before it is paid for"

USAGE: Final = (
    "b2 plan CONFIG --gpu GPU --nodes N [--network NAME] [--search] [--tokens T] [--json] [--out DIR] "
    "[--table.key VALUE ...]"
)
EXAMPLES: Final = """usage: b2 plan CONFIG --gpu GPU --nodes N     what a run costs, and whether it fits
       b2 plan CONFIG ... --search            of every legal layout, and which is best
       b2 plan --rows RUNS.csv --out FILE     predicted beside measured, for published runs or your own
       b2 plan calibrate --out FILE           measure this machine, for --gpu FILE
       b2 plan hardware                       GPUs and nodes that have a name

  b2 plan preset:baichuan2-13b --gpu a800-80g --nodes 128 --parallel.tensor 8
      Memory of every pipeline position by kind, the step split into what it waits for, TFLOPS and MFU by
      named FLOP conventions, days and energy, checkpoints and failures; and what no published run validates.

  b2 plan preset:baichuan2-13b --gpu a800-80g --nodes 128 --search --out plans/13b
      All layouts that follow the rules; those that no other beats in time and memory as a table, search.json
      and search.png; best.toml is the fastest, ready for `b2 layout check plans/13b/best.toml --world 1024`.

  b2 plan preset:baichuan2-13b --gpu a800-80g --nodes 8,32,128 --search
      The same batch on more and more GPUs: when ZeRO alone is right, and when it no longer is.

  b2 plan run.toml --gpu h100-80g --nodes 4 --network 100 --tokens 3e11
      Four nodes with 100 GB/s between them (or the name of a node), 300 billion tokens.

  b2 plan calibrate --out mine.toml && b2 plan preset:toy --gpu mine.toml --nodes 1
      The machine at hand, a CPU too.

Every prediction is printed with the error that the model had on published runs it was not fitted to
(docs/planner.md). `b2 plan CONFIG --help` lists the flags and every setting; --json prints JSON alone."""

FLAGS: Final[Mapping[str, Flag]] = MappingProxyType(
    {
        "gpu": Flag("a GPU that `b2 plan hardware` lists, or a hardware file, FILE.toml", "GPU"),
        "nodes": Flag("number of nodes; with --search also several, as in 8,32,128", "N[,N...]"),
        "network": Flag("GB/s between nodes, of a whole node; or a node that is listed", "GB/S|NODE"),
        "search": Flag("try every legal layout instead of that of CONFIG"),
        "tokens": Flag("tokens of the whole run (default: train.steps of CONFIG)", "T"),
        "mtbf": Flag("hours between failures of all these GPUs (default: from Llama 3's rate)", "HOURS"),
        "storage": Flag(
            "GB/s that one node writes a checkpoint with (default: that of BLOOM's nodes)", "GB/S"
        ),
        "json": Flag("print JSON"),
        "out": Flag("folder for plan.json; with --search also search.json, search.png, best.toml", "DIR"),
    }
)
ROWS_FLAGS: Final = ("rows", "out")
CALIBRATE_FLAGS: Final = ("out", "name", "ranks", "device", "peak-tflops", "watts", "network")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `b2 plan ...`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(EXAMPLES)
        return 0
    if arguments[0] == "calibrate":
        return calibrate(arguments[1:])
    if arguments[0] == "hardware":
        return hardware()
    if any(item.partition("=")[0] == "--rows" for item in arguments):
        return rows(arguments)
    return plan(arguments)


def plan(argv: Sequence[str]) -> int:
    """Print the plan of a run, or of the fastest of all layouts."""
    parsed = parse(argv, usage=USAGE, description=EXAMPLES, flags=FLAGS)
    if parsed is None:
        return 0
    flags = parsed.flags
    config = parsed.load().config
    cluster = _cluster(flags)
    counts = [nodes * cluster.node.gpus for nodes in _nodes(flags)]
    gpus = counts[-1]
    numbers = {name: _number(name, flags[name]) for name in ("tokens", "mtbf", "storage") if name in flags}

    from megatron_b2.planner.report import make_plan, plan_json, search_json

    searched = _search(config, cluster, counts) if "search" in flags else {}
    found = searched.get(gpus)
    chosen = found.best.config if found is not None else _resolved(config, gpus)
    result = make_plan(
        chosen,
        cluster,
        gpus=gpus,
        tokens=numbers.get("tokens"),
        failures=_failures(gpus, numbers.get("mtbf")),
        storage=_storage(numbers.get("storage")),
    )
    values: dict[str, Any] = {"plan": plan_json(result)}
    values |= {"search": {str(n): search_json(item) for n, item in searched.items()}} if searched else {}
    folder = Path(flags["out"]) if "out" in flags else None
    written = _write(folder, values, found, cluster) if folder is not None else []
    if "json" in flags:
        print(json.dumps(values, indent=2))
        return 0
    from megatron_b2.cli.plan_tables import WIDTH, print_plan, print_scaling, print_search

    console = Console(highlight=False, width=max(Console().width, WIDTH))
    if len(searched) > 1:
        print_scaling(searched, console=console)
    if found is not None:
        print_search(found, console=console)
    print_plan(result, console=console)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)
    return 0


def _nodes(flags: Mapping[str, str]) -> list[int]:
    """Numbers of nodes, ascending; several only for a search."""
    if "nodes" not in flags:
        raise ConfigError("--nodes N is missing: give the number of nodes, as in --nodes 128")
    numbers = [_whole("nodes", text) for text in flags["nodes"].split(",")]
    if len(numbers) > 1 and "search" not in flags:
        raise ConfigError(f"--nodes {flags['nodes']} compares searches: add --search, or give one number")
    return sorted(set(numbers))


def _cluster(flags: Mapping[str, str]) -> Cluster:
    """The nodes of the command line."""
    from megatron_b2.planner.hardware import gpu_names, load_hardware, with_nics

    if "gpu" not in flags:
        raise ConfigError(
            f"--gpu GPU is missing: give one of {', '.join(gpu_names())}, or a hardware file, FILE.toml"
        )
    network = flags.get("network")
    if network is None or not network[:1].isdigit():
        return load_hardware(flags["gpu"], node=network)
    return with_nics(load_hardware(flags["gpu"]), node_bandwidth=_number("network", network) * 1e9)


def _failures(gpus: int, mtbf_hours: float | None) -> FailureRecord:
    """The failure rate to plan with."""
    from megatron_b2.planner.reliability import LLAMA_3, FailureRecord

    if mtbf_hours is None:
        return LLAMA_3
    return FailureRecord(source="--mtbf", gpus=gpus, days=mtbf_hours / 24, interruptions=1)


def _storage(gigabytes: float | None) -> StorageRate:
    """How fast a node writes, to plan with; GB/s."""
    from megatron_b2.planner.reliability import BLOOM_STORAGE, StorageRate

    if gigabytes is None:
        return BLOOM_STORAGE
    return StorageRate(source=f"--storage: {gigabytes:g} GB/s a node", node_bytes_per_second=gigabytes * 1e9)


def _resolved(config: RunConfig, gpus: int) -> RunConfig:
    """The configuration on so many ranks, with what parallel.auto chooses."""
    from megatron_b2.config import check
    from megatron_b2.layouts.auto import resolve_auto

    check(config, world_size=gpus)
    return resolve_auto(config, world_size=gpus).config if config.parallel.auto else config


def _search(config: RunConfig, cluster: Cluster, counts: Sequence[int]) -> dict[int, SearchResult]:
    """By number of GPUs."""
    from megatron_b2.planner.search import search

    return {gpus: search(config, cluster, gpus=gpus) for gpus in counts}


def _write(
    folder: Path, values: Mapping[str, Any], found: SearchResult | None, cluster: Cluster
) -> list[Path]:
    """Files of `--out`."""
    from megatron_b2.config import to_toml
    from megatron_b2.files.atomic import atomic_file, write_json
    from megatron_b2.planner.plots import draw_search

    paths = [folder / "plan.json"]
    write_json(paths[0], values["plan"])
    if found is not None:
        paths += [folder / name for name in ("search.json", "search.png", "best.toml")]
        write_json(paths[1], values["search"])
        title = f"{found.best.config.name} on {found.best.workload.gpus:,} x {cluster.name}"
        draw_search(found, paths[2], title=title, device_bytes=cluster.gpu.memory_bytes)
        with atomic_file(paths[3]) as stream:
            stream.write(to_toml(found.best.config).encode())
    return paths


def rows(argv: Sequence[str]) -> int:
    """Predict the runs of a CSV."""
    flags = _flags(argv, ROWS_FLAGS, action="b2 plan --rows RUNS.csv --out FILE")
    if "out" not in flags:
        raise ConfigError("--out FILE is missing: give the CSV to write, as in --out predictions.csv")

    from megatron_b2.planner.published import evaluate_rows

    found = evaluate_rows(Path(flags["rows"]), Path(flags["out"]))
    errors = {
        "time": [row.time_error for row in found if row.time_error is not None],
        "memory": [row.memory_error for row in found if row.memory_error is not None],
    }
    for name, values in errors.items():
        if values:
            mean = 100 * sum(map(abs, values)) / len(values)
            worst = 100 * max(values, key=abs)
            print(f"{name}: {len(values)} rows measured, mean error {mean:.1f} %, worst {worst:+.1f} %")
    without = sum(bool(row.reason) for row in found)
    print(f"wrote {flags['out']}: {len(found)} rows" + (f", {without} say why not" if without else ""))
    return 0


def hardware() -> int:
    """Print the GPUs and nodes of the presets."""
    from megatron_b2.cli.plan_tables import WIDTH, print_hardware

    print_hardware(console=Console(highlight=False, width=max(Console().width, WIDTH)))
    return 0


def calibrate(argv: Sequence[str]) -> int:
    """Measure this machine and write a hardware file."""
    if any(item in ("-h", "--help") for item in argv):
        print(CALIBRATE_HELP)
        return 0
    flags = _flags(argv, CALIBRATE_FLAGS, action="b2 plan calibrate --out FILE")
    path = Path(flags.get("out", ""))
    if path.suffix != ".toml":
        raise ConfigError("--out FILE is missing: give a file that ends with .toml, as in --out mine.toml")
    device = flags.get("device")
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device must be cpu or cuda, got {device!r}")
    ranks = _whole("ranks", flags["ranks"]) if "ranks" in flags else None

    from megatron_b2.files.atomic import atomic_file
    from megatron_b2.planner.calibrate import hardware_toml
    from megatron_b2.testing.speeds import measure_machine

    speeds = measure_machine(ranks=ranks, device=device)
    given = {
        name: _number(name, flags[name]) for name in ("peak-tflops", "watts", "network") if name in flags
    }
    text = hardware_toml(
        speeds,
        name=flags.get("name", path.stem),
        peak_flops=given["peak-tflops"] * 1e12 if "peak-tflops" in given else None,
        watts=given.get("watts"),
        network=given["network"] * 1e9 if "network" in given else None,
    )
    with atomic_file(path) as stream:
        stream.write(text.encode())
    print(text)
    print(f"wrote {path}: use it as b2 plan CONFIG --gpu {path} --nodes 1")
    return 0


CALIBRATE_HELP: Final = """usage: b2 plan calibrate --out FILE.toml [--ranks N] [--device cpu|cuda]
                        [--name NAME] [--peak-tflops T] [--watts W] [--network GB/S]

Measure products by size, memory bandwidth, and all-reduce, all-gather and reduce-scatter between N processes
of this machine (one a GPU over NCCL; without GPUs over gloo), and write a hardware file for --gpu FILE.

  --ranks N           processes that communicate (default: all GPUs, or 2 on a CPU)
  --device cpu|cuda   default: GPUs where there are any
  --name NAME         of the GPU in the file (default: the file's name)
  --peak-tflops T     the data sheet's peak (default: the fastest product that was measured)
  --watts W           design power of one device, for energy (default: 400, marked as assumed)
  --network GB/S      between nodes, of a whole node (default: as the link inside, marked as assumed)"""


def _flags(argv: Sequence[str], known: Sequence[str], *, action: str) -> dict[str, str]:
    """Values of the flags of an action without CONFIG."""
    found: dict[str, str] = {}
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--")
        if not flag.startswith("--") or name not in known:
            flags = ", ".join(f"--{item}" for item in known)
            raise ConfigError(f"{action} has no {argument!r}; its flags are {flags}")
        if not equals and (not remaining or remaining[0].startswith("--")):
            raise ConfigError(f"{flag} needs a value; usage: {action}")
        found[name] = value if equals else remaining.pop(0)
    return found


def _whole(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--{name} must be a whole number, 1 or more, got {text!r}")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ConfigError(f"--{name} must be a number above 0, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(run(main))
