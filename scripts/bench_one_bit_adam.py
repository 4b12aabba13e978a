r"""1-bit Adam against plain Adam over a slow network: bytes, tokens per second, loss curves; goes on where it was stopped.

    python scripts/bench_one_bit_adam.py --text wiki.train.raw --work runs/one-bit-adam

2 and 4 processes talk over the loopback device of a network namespace that the script makes (`unshare -rn`), limited by
`tc tbf` to 100 Mbit/s, 1 Gbit/s, or not at all. The limit is on the device, so it is the sum of what all processes send.
Bytes are read from the device's counters in /proc/net/dev, headers and acknowledgements included. Where the namespace or
the limit is not permitted, the rows that need it are left out and named.

Convergence is a byte-level Llama on the text, three seeds, scored on the last tenth of it. "naive" compresses gradients
with the same error feedback and lets Adam learn its variance from them: the negative control.

Every row is written when it is done, to `--work`; results go to `evaluation/results/07-one-bit-adam.json`, `.md`, `.png`.
"""

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "evaluation" / "results"
RATES = {"100mbit": 100e6, "1gbit": 1e9, "unlimited": None}
METHODS = ("adam", "adam fp16", "one-bit")
WARMUP_SHARE = 0.15
#: Byte-level Llama of 25.8 million parameters; head and embedding are tied.
LARGE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}


def main() -> int:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="UTF-8 text for convergence; Python's documentation without it")
    parser.add_argument("--work", type=Path, default=Path("runs/one-bit-adam"))
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and few steps: shows that everything runs; results stay in --work"
    )
    parser.add_argument("--only", choices=["speed", "convergence"], help="one half; the tables hold what has run")
    parser.add_argument("--rate", action="append", choices=list(RATES), help="of the speed rows; all by default")
    parser.add_argument("--steps", type=int, default=1200, help="of a convergence row")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        import torch.multiprocessing as mp

        job = json.loads(options.worker)
        mp.start_processes(work, args=(job,), nprocs=job["processes"], start_method="spawn")
        return 0
    if options.text and not options.text.is_file():
        parser.error(f"--text {options.text} is not a file")
    options.work.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()
    kept = options.work / ("rows-quick.json" if options.quick else "rows.json")
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for name, job in plan(options).items():
        if name in found:
            print(f"done: {name}", flush=True)
            continue
        reason = refusal(job["rate"])
        if reason:
            print(f"skipped: {name}: {reason}", flush=True)
            continue
        row = measure(job, options)
        print(f"{name}: {row['seconds']:.0f} s", flush=True)
        found[name] = {**job, **row, "commit": commit}
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(kept)
    if found:
        write(list(found.values()), options)
    return 0


def plan(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every measurement by name, the cheapest first."""
    model, small = (
        ({**SMALL, "num_hidden_layers": 2}, {**SMALL, "hidden_size": 64, "num_hidden_layers": 1})
        if options.quick
        else (LARGE, SMALL)
    )
    jobs: dict[str, dict[str, Any]] = {}
    if options.only != "convergence":
        for rate in options.rate or reversed(RATES):
            for processes in (2, 4):
                for method in METHODS:
                    # Enough steps for a mean, few enough that 100 Mbit/s ends: there a step of Adam takes 40 s.
                    steps = 3 if rate == "100mbit" or options.quick else 10
                    jobs[f"speed {rate} {processes} {method}"] = {
                        "kind": "speed", "rate": rate, "processes": processes, "method": method, "model": model, "steps": steps, "seed": 0,
                        "batch": 2, "length": 64,
                    }  # fmt: skip
        for processes in (2, 4):
            for name, method in (("whole run", "one-bit, fp16 warm-up"), ("whole run, fp32,", "one-bit, fp32 warm-up")):
                jobs[f"{name} {processes}"] = {
                    "kind": "whole", "rate": "unlimited", "processes": processes, "method": method, "model": model,
                    "steps": 20 if options.quick else 40, "seed": 0, "batch": 2, "length": 64,
                }  # fmt: skip
    if options.only != "speed":
        for seed in range(1 if options.quick else 3):
            for method in ("adam", "one-bit", "naive"):
                jobs[f"convergence {method} {seed}"] = {
                    "kind": "convergence", "rate": "unlimited", "processes": 2, "method": method, "model": small,
                    "steps": 60 if options.quick else options.steps, "seed": seed, "batch": 8, "length": 128,
                }  # fmt: skip
    return jobs


def refusal(rate: str) -> str | None:
    """Why this machine cannot give a namespace with that rate; None where it can."""
    for tool in ("unshare", "ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    done = subprocess.run(inside(rate, ["true"]), capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"not permitted here: {' '.join(done.stderr.split())}"


def inside(rate: str, command: list[str]) -> list[str]:
    """The command in a network namespace of its own."""
    limit = "true"
    if RATES[rate]:
        limit = f"ip link set lo mtu 1500 && tc qdisc add dev lo root tbf rate {rate} burst 64kb latency 400ms"
    return ["unshare", "-rn", "sh", "-c", f'ip link set lo up && {limit} && exec "$@"', "sh", *command]


def measure(job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run one job in its namespace."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        given = {**job, "folder": folder, "text": str(options.text.resolve()) if options.text else None}
        started = time.perf_counter()
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(given)]
        with (options.work / "worker.log").open("a") as log:
            subprocess.run(inside(job["rate"], command), check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
        row: dict[str, Any] = json.loads(Path(folder, "row.json").read_text())
        return {**row, "seconds": time.perf_counter() - started}


def work(rank: int, job: dict[str, Any]) -> None:
    """One process of a group."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{job['folder']}/rendezvous", rank=rank, world_size=job["processes"])
    train(rank, job)
    gc.collect()  # a model that outlives its group can wait for the group's thread, which waits for Python's lock
    dist.destroy_process_group()


def train(rank: int, job: dict[str, Any]) -> None:
    """Train, and let rank 0 write the row."""
    import torch
    import torch.distributed as dist
    import transformers
    from torch.nn.parallel import DistributedDataParallel

    from hf_compact import OneBitAdam, OneBitAdamConfig
    from hf_compact.calibration import builtin_text

    torch.manual_seed(job["seed"])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, tie_word_embeddings=True, **job["model"]))
    steps, method = job["steps"], job["method"]
    config = {
        "adam": OneBitAdamConfig(exchange="none"),
        "adam fp16": OneBitAdamConfig(exchange="none", gradients="fp16"),
        "one-bit": OneBitAdamConfig(freeze=WARMUP_SHARE if job["kind"] == "convergence" else 2),
        "one-bit, fp16 warm-up": OneBitAdamConfig(freeze=WARMUP_SHARE, gradients="fp16"),
        "one-bit, fp32 warm-up": OneBitAdamConfig(freeze=WARMUP_SHARE),
        "naive": OneBitAdamConfig(exchange="none"),
    }[method]
    optimizer = OneBitAdam(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, config=config, total_steps=steps)
    ddp = DistributedDataParallel(model)
    naive = Naive(model, optimizer, round(WARMUP_SHARE * steps)) if method == "naive" else None
    (ddp.register_comm_hook(naive, Naive.hook) if naive else optimizer.attach(ddp))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
    text = Path(job["text"]).read_bytes() if job["text"] else builtin_text("calibration").encode()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    shown, held_out = ids[: -len(ids) // 10], ids[-len(ids) // 10 :]
    generator = torch.Generator().manual_seed(1000 * job["seed"] + rank)

    def step() -> float:
        starts = torch.randint(len(shown) - job["length"], (job["batch"],), generator=generator)
        rows = torch.stack([shown[start : start + job["length"]] for start in starts])
        loss = ddp(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        if naive:
            naive.exchange()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        if job["kind"] == "convergence":
            schedule.step()
        return loss.item()

    row: dict[str, Any] = {"num_parameters": sum(p.numel() for p in model.parameters())}
    if job["kind"] == "speed":
        for _ in range(3):  # the warm-up of two steps, and the first step after it
            step()
    dist.barrier()
    before, started = interface_bytes(), time.perf_counter()
    losses = [step() for _ in range(steps)]
    dist.barrier()
    row["step_seconds"] = (time.perf_counter() - started) / steps
    row["wire_bytes_per_rank_and_step"] = (interface_bytes() - before) / steps / job["processes"]
    row["tokens_per_second"] = job["processes"] * job["batch"] * job["length"] / row["step_seconds"]
    if job["kind"] == "convergence":
        curve = torch.tensor(losses)
        dist.all_reduce(curve)
        row["losses"] = [round(value, 4) for value in (curve / job["processes"]).tolist()]
        windows = (
            held_out[: 64 * job["length"]].view(-1, 8, job["length"])
            if len(held_out) >= 64 * job["length"]
            else held_out[: job["length"]].view(1, 1, -1)
        )
        with torch.no_grad():
            row["held_out_loss"] = statistics.fmean(model(input_ids=rows, labels=rows).loss.item() for rows in windows)
    optimizer.check_replicas()
    row["counted_bytes_per_step"] = optimizer.report.bytes_per_step(
        "compression" if "compression" in optimizer.report.num_steps else None
    )
    if rank == 0:
        Path(job["folder"], "row.json").write_text(json.dumps(row))


class Naive:
    """Negative control: gradients in one bit with error feedback after the warm-up, and a variance that learns from them."""

    def __init__(self, model: Any, optimizer: Any, warmup: int):
        """Hook below plain Adam."""
        from hf_compact.methods.one_bit_adam.exchange import CompressedMean

        self.parameters = list(model.parameters())
        sizes = [p.numel() for p in self.parameters]
        self.mean = CompressedMean(sizes, [1] * len(sizes), None, optimizer.report, self.parameters[0].device)
        self.optimizer, self.warmup = optimizer, warmup
        optimizer.ddp = model  # the hook below takes the place of the optimizer's own

    def hook(self, bucket):  # DDP takes no other annotation than its own class, which is imported late
        """Exact mean in the warm-up, local gradients afterwards."""
        import torch.distributed as dist
        from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks

        if self.optimizer.num_steps < self.warmup:
            return default_hooks.allreduce_hook(dist.group.WORLD, bucket)
        return debugging_hooks.noop_hook(None, bucket)

    def exchange(self) -> None:
        """Replace local gradients by their compressed mean."""
        import torch

        if self.optimizer.num_steps < self.warmup:
            return
        self.mean.buffer.add_(torch.cat([p.grad.reshape(-1) for p in self.parameters]))
        flat = torch.empty_like(self.mean.buffer)
        self.mean.mean_into(flat)
        for p, values in zip(self.parameters, flat.split(self.mean.sizes), strict=True):
            p.grad.copy_(values.view(p.shape))


def interface_bytes() -> int:
    """Bytes that the loopback device of this namespace has sent."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Claim by claim: target, measured, held; claims whose rows have not run are left out."""
    from evaluation.steps import bar

    by_name = {(row["kind"], row["rate"], row["processes"], row["method"]): row for row in rows if row["kind"] != "convergence"}
    result = []
    for processes in (2, 4):
        adam, half, ours = (by_name.get(("speed", "unlimited", processes, method)) for method in METHODS)
        if adam and ours:
            ratio = adam["wire_bytes_per_rank_and_step"] / ours["wire_bytes_per_rank_and_step"]
            result.append(
                bar(
                    f"{processes} processes: bytes on the wire, float32 / compression phase",
                    ">= 28",
                    round(ratio, 2),
                    ratio >= 28,
                    ours,
                    ours["seconds"],
                )
            )
            speed = ours["tokens_per_second"] / adam["tokens_per_second"]
            result.append(
                bar(
                    f"{processes} processes, unlimited loopback: tokens/s in the compression phase, times Adam's",
                    ">= 0.9",
                    round(speed, 2),
                    speed >= 0.9,
                    ours,
                    ours["seconds"],
                )
            )
        for base, name, target in ((half, "fp16", 4.9), (adam, "fp32", 5.5)):
            whole = by_name.get(("whole", "unlimited", processes, f"one-bit, {name} warm-up"))
            if base and whole:
                ratio = base["wire_bytes_per_rank_and_step"] / whole["wire_bytes_per_rank_and_step"]
                claim = f"{processes} processes: bytes on the wire, {name} / whole run with {WARMUP_SHARE:.0%} warm-up in {name}"
                result.append(bar(claim, f">= {target}", round(ratio, 2), ratio >= target, whole, whole["seconds"]))
    adam, ours = by_name.get(("speed", "100mbit", 4, "adam")), by_name.get(("speed", "100mbit", 4, "one-bit"))
    if adam and ours:
        speed = ours["tokens_per_second"] / adam["tokens_per_second"]
        result.append(
            bar(
                "4 processes, 100 Mbit/s: tokens/s in the compression phase, times Adam's",
                ">= 3.3",
                round(speed, 2),
                speed >= 3.3,
                ours,
                ours["seconds"],
            )
        )
    losses = {
        method: [row["held_out_loss"] for row in rows if row["kind"] == "convergence" and row["method"] == method]
        for method in ("adam", "one-bit", "naive")
    }
    if len(losses["adam"]) == len(losses["one-bit"]) == len(losses["naive"]) >= 3:
        source = next(row for row in rows if row["kind"] == "convergence")
        seconds = sum(row["seconds"] for row in rows if row["kind"] == "convergence")
        mean = statistics.fmean(losses["adam"])
        allowed = max(0.01 * mean, 2 * statistics.stdev(losses["adam"]))
        gap, naive = statistics.fmean(losses["one-bit"]) - mean, statistics.fmean(losses["naive"]) - mean
        result.append(
            bar(
                "held-out loss of 1-bit Adam less Adam's, mean of 3 seeds",
                f"<= max(1 %, 2 sigma) = {allowed:.4f}",
                round(gap, 4),
                gap <= allowed,
                source,
                seconds,
            )
        )
        result.append(
            bar(
                "held-out loss of the naive control less Adam's",
                f"> {allowed:.4f}, so that the test can fail",
                round(naive, 4),
                naive > allowed,
                source,
                seconds,
            )
        )
    return result


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Tables and plot of what has run."""
    sys.path.insert(0, str(ROOT))
    from evaluation.steps import bar_table, machine

    folder = options.work if options.quick else RESULTS
    command = "python scripts/bench_one_bit_adam.py" + (f" --text {options.text.name}" if options.text else "")
    command += f" --steps {options.steps}"
    common = {"machine": machine(), "command": command}
    result = [row | common for row in bars(rows)]
    without_curves = [{key: value for key, value in row.items() if key != "losses"} for row in rows]
    (folder / "07-one-bit-adam.json").write_text(json.dumps({"bars": result, "rows": without_curves}, indent=2) + "\n")
    large = next((row["num_parameters"] for row in rows if row["kind"] == "speed"), 0)
    lines = [
        f"# 1-bit Adam\n\n{machine()}; the commit of each row is in the JSON. Speed: {large / 1e6:.1f}M parameters, seed 0, sum of what all processes send limited to the rate.\n"
    ]
    lines += [bar_table(result)]
    lines += [
        "",
        "| loopback | processes | method | tokens/s | s per step | MB on the wire per process and step |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['rate']} | {row['processes']} | {row['method']}{', whole run' if row['kind'] == 'whole' else ''} | {row['tokens_per_second']:.1f} | "
        f"{row['step_seconds']:.2f} | {row['wire_bytes_per_rank_and_step'] / 1e6:.3f} |" for row in rows if row["kind"] != "convergence"
    ]  # fmt: skip
    lines += ["", "| method | seed | held-out loss, nats per byte | steps |", "|---|---|---|---|"]
    lines += [
        f"| {row['method']} | {row['seed']} | {row['held_out_loss']:.4f} | {row['steps']} |"
        for row in rows
        if row["kind"] == "convergence"
    ]
    (folder / "07-one-bit-adam.md").write_text("\n".join(lines) + "\n\n![loss curves and speed](07-one-bit-adam.png)\n")
    plot(rows, folder / "07-one-bit-adam.png")
    print("\n".join(lines))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss curves, and tokens per second by rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    colours = {"adam": "tab:blue", "one-bit": "tab:orange", "naive": "tab:red", "adam fp16": "tab:cyan"}
    for row in rows:
        if row["kind"] == "convergence":
            width = max(1, len(row["losses"]) // 60)
            means = [statistics.fmean(row["losses"][i : i + width]) for i in range(0, len(row["losses"]), width)]
            label = row["method"] if row["seed"] == 0 else None
            left.plot([i * width for i in range(len(means))], means, color=colours[row["method"]], alpha=0.7, label=label)
    left.set(xlabel="step", ylabel="training loss, nats per byte")
    names = [(rate, processes) for rate in RATES for processes in (2, 4)]
    for offset, method in enumerate(METHODS):
        speeds = {
            (row["rate"], row["processes"]): row["tokens_per_second"]
            for row in rows
            if row["kind"] == "speed" and row["method"] == method
        }
        right.bar(
            [i + 0.27 * (offset - 1) for i in range(len(names))],
            [speeds.get(name, math.nan) for name in names],
            0.25,
            color=colours[method],
            label=method,
        )
    right.set(
        ylabel="tokens per second",
        yscale="log",
        xticks=range(len(names)),
        xticklabels=[f"{rate}\n{processes} processes" for rate, processes in names],
    )
    right.tick_params(axis="x", labelsize=7)
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
