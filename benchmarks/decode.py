"""Time decoding and capture of a 7B-shaped model with random weights on one GPU.

    python benchmarks/decode.py --scratch /scratch --gigabytes 20

Appends to `results/decode.csv`:

| column | what |
|---|---|
| gpu, torch, triton, commit | where and what was measured |
| model, dtype, batch, sparsity | `llama-2-7b` or `llama-3-8b` by shape; sequences at a time; share of inputs dropped |
| mode | `decode`: generated token by token; `forced`: given text, many positions at once |
| impl | `triton`, or a peer's name (`peers.py`) |
| capture, sink | whether operands are captured, and where blocks go: `disk`, `memory` (dropped once on the host) |
| tokens_per_s | tokens generated, or positions fed, over wall-clock time, until the last block is on the disk |
| bytes_per_token | of the dump |
| limit, limit_tokens_per_s | the least of: the same without capture, the copy to the host, the disk; its rate |

and to `results/decode_ratio.csv` pairs of runs with and without capture, one after the other (metric `capture_cost`),
and to `results/profile.csv` where the time of a token goes, by kernel.
"""

# Shape suffixes: T positions.

import argparse
import gc
import re
import shutil
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from calibrate import random_decoder
from limits import copy_bandwidth, disk_bandwidth
from random_checkpoint import SHAPES
from record import append, where

from sparsetrace.core.settings import Batching, Capture, Decoding
from sparsetrace.formats.dump import write_block
from sparsetrace.generation.backend import EngineSetup
from sparsetrace.generation.capture import Recorder, WriteBlock
from sparsetrace.generation.engine import Engine
from sparsetrace.generation.selection import select
from sparsetrace.methods import Teal
from sparsetrace.model.patch import install
from sparsetrace.tools.bench import PROMPT_TOKENS, observed_rules, random_groups, time_groups

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    *("gpu", "torch", "triton", "commit", "model", "dtype", "batch", "mode", "sparsity", "impl", "capture", "sink"),
    *("tokens_per_s", "bytes_per_token", "limit", "limit_tokens_per_s"),
)
RATIO_COLUMNS = ("gpu", "torch", "triton", "commit", "model", "dtype", "batch", "metric", "p20", "p50", "p80")
PROFILE_COLUMNS = (
    *("gpu", "torch", "triton", "commit", "model", "dtype", "batch", "kernel", "calls", "us_per_step", "share"),
)


def drop(_path: Path, _arrays: dict[str, np.ndarray]) -> None:
    """The sink `memory`: a block that has reached the host, packed, is dropped."""


class Bench:
    """One model and dtype: engines for its batches, and where rows go."""

    def __init__(
        self, name: str, dtype: str, sparsity: float, scratch: Path, limits: dict[str, float], out: Path
    ) -> None:
        self.name, self.dtype, self.sparsity = name, dtype, sparsity
        self.scratch, self.limits, self.out = scratch, limits, out
        self.config = replace(SHAPES[name], dtype=dtype)
        device = torch.device("cuda")
        self.decoder = random_decoder(self.config, device)
        self.patch = install(self.decoder, Teal(sparsity=sparsity), observed_rules(self.decoder, sparsity))
        self.where = where()

    def engine(self, decoding: Decoding, batching: Batching, positions: int) -> Engine:
        """A Triton engine whose longest sequence has so many positions."""
        return Engine(EngineSetup(self.decoder, self.patch, decoding, batching, frozenset(), "triton", positions))

    def recorder(self, engine: Engine, write: WriteBlock = write_block) -> Recorder:
        """A recorder of all operands, whose blocks go to `write`."""
        selection = select(self.decoder.sites, self.dtype, self.patch, Capture())
        return Recorder(selection, engine.block_rows, engine.device, write)

    def run(self, batch: int, new: int, groups: int, *, forced: int = 0, rounds: int = 1, disk: bool = True) -> None:
        """Time one batch size without capture, into memory and onto the disk.

        Args:
            batch: sequences at a time.
            new: tokens generated for each.
            groups: timed of each kind.
            forced: positions of each given text; 0 decodes.
            rounds: of each kind, in turn; the fastest counts.
            disk: write too.
        """
        decoding = Decoding(ignore_eos=True)
        if forced:
            decoding = Decoding(tokens_from="text", prefill="all")
        batching = Batching(max_new_tokens=new, batch_size=batch)
        made = random_groups(self.config, 1 + groups, batch, new, length=forced or PROMPT_TOKENS)
        positions = len(made[0][0].prompt_ids) + new
        engine = self.engine(decoding, batching, positions)
        tokens = groups * batch * (forced or new)
        sinks = {"none": None, "memory": drop} | ({"disk": write_block} if disk else {})
        best: dict[str, tuple[float, float]] = {}
        for _ in range(rounds):
            for sink, write in sinks.items():
                recorder = None
                if write is not None:
                    recorder = self.recorder(engine, write)
                folder = Path(tempfile.mkdtemp(dir=self.scratch))
                seconds, written, rows = time_groups(engine, recorder, made, folder)
                shutil.rmtree(folder)
                rate = tokens / seconds
                if rate > best.get(sink, (0.0, 0.0))[0]:
                    best[sink] = rate, written / rows if rows else 0.0
                if recorder is not None:
                    recorder.shutdown()
                del recorder
        packed = best.get("disk", (0.0, 0.0))[1]
        for sink, (rate, size) in best.items():
            limit = {"no capture": best["none"][0]}
            if packed and sink != "none":
                # 0 where it was not measured
                links = ("copy", "disk") if sink == "disk" else ("copy",)
                limit |= {link: self.limits[link] * 1e9 / packed for link in links if self.limits[link]}
            name = min(limit, key=limit.__getitem__)
            self.note(
                batch=batch,
                mode="forced" if forced else "decode",
                capture=sink != "none",
                sink=sink,
                tokens_per_s=round(rate, 1),
                bytes_per_token=round(size),
                limit=name if sink != "none" else "",
                limit_tokens_per_s=round(limit[name], 1) if sink != "none" else "",
            )
        del engine
        gc.collect()
        torch.cuda.empty_cache()

    def note(self, **values: object) -> None:
        """Append one row of decode.csv, and print it."""
        row = {
            **self.where,
            "model": self.name,
            "dtype": self.dtype,
            "sparsity": self.sparsity,
            "impl": "triton",
            **values,
        }
        append(self.out / "decode.csv", COLUMNS, [row])
        print(*(f"{name}={row[name]}" for name in COLUMNS[4:]), flush=True)

    def capture_cost(self, batch: int, new: int, groups: int, pairs: int) -> None:
        """Ratio of time with capture onto the disk to time without, in pairs one after the other."""
        batching = Batching(max_new_tokens=new, batch_size=batch)
        made = random_groups(self.config, 1 + groups, batch, new)
        positions = len(made[0][0].prompt_ids) + new
        engines = [self.engine(Decoding(ignore_eos=True), batching, positions) for _ in range(2)]
        recorder = self.recorder(engines[0])
        ratios = []
        for _ in range(pairs):
            folder = Path(tempfile.mkdtemp(dir=self.scratch))
            on = time_groups(engines[0], recorder, made, folder)[0]
            off = time_groups(engines[1], None, made, folder)[0]
            shutil.rmtree(folder)
            ratios.append(on / off)
        recorder.shutdown()
        p20, _, _, p80 = statistics.quantiles(ratios, n=5)
        row = {**self.where, "model": self.name, "dtype": self.dtype, "batch": batch, "metric": "capture_cost"}
        row |= {"p20": round(p20, 4), "p50": round(statistics.median(ratios), 4), "p80": round(p80, 4)}
        append(self.out / "decode_ratio.csv", RATIO_COLUMNS, [row])
        print("capture_cost", batch, row["p20"], row["p50"], row["p80"], flush=True)
        del engines, recorder
        gc.collect()
        torch.cuda.empty_cache()

    def profile(self, batch: int, steps: int = 20) -> None:
        """Time of each kernel in a decoding step with capture, and the gaps between kernels."""
        new = 4 * steps
        batching = Batching(max_new_tokens=new, batch_size=batch)
        made = random_groups(self.config, 1, batch, new)
        positions = len(made[0][0].prompt_ids) + new
        engine = self.engine(Decoding(ignore_eos=True), batching, positions)
        recorder = self.recorder(engine, drop)
        time_groups(engine, recorder, [made[0], made[0]], self.scratch)
        backend = engine.backend
        recorder.open(self.scratch, 0)
        with torch.inference_mode():
            backend.state.position_B.fill_(positions // 2)
            backend.state.count.zero_()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(steps):
                backend.step()
            torch.cuda.synchronize()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            backend.step()
        torch.cuda.synchronize()
        whole = (time.perf_counter() - began) / steps * 1e6
        times: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for event in profiler.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                name = re.sub(r"<.*|\(.*|^void |at::native::", "", event.name)
                times[name] += event.device_time
                calls[name] += 1
        rows = [(name, calls[name] / steps, time / steps) for name, time in times.most_common()]
        rows.append(("(gaps, less overlap)", 0, whole - sum(us for *_, us in rows)))
        rows.append(("(step)", 1, whole))
        for name, count, us in rows:
            row = {**self.where, "model": self.name, "dtype": self.dtype, "batch": batch, "kernel": name}
            row |= {"calls": round(count, 2), "us_per_step": round(us, 2), "share": round(us / whole, 4)}
            append(self.out / "profile.csv", PROFILE_COLUMNS, [row])
            print(f"{us:9.1f} us {us / whole:6.1%} {count:6.1f} x {name}", flush=True)
        recorder.shutdown()
        del engine, recorder, backend
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder on the disk that is written to")
    parser.add_argument("--models", nargs="+", default=["llama-2-7b"], choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--gigabytes", type=float, default=20.0, help="written in each timing of many rows")
    parser.add_argument("--new", type=int, default=200, help="tokens generated of each sequence at batch 1")
    parser.add_argument("--groups", type=int, default=24, help="in each timing at batch 1")
    parser.add_argument("--parts", nargs="+", default=["one", "cost", "many", "forced", "profile"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    limits = {"copy": 0.0, "disk": 0.0}
    if {"many", "forced"} & set(arguments.parts):
        total = int(arguments.gigabytes * 1e9)
        limits["copy"] = copy_bandwidth(total)
        found = disk_bandwidth(arguments.scratch, total)
        limits["disk"] = max(found.values())
        print(f"copy {limits['copy']:.1f} GB/s, disk", {way: round(rate, 2) for way, rate in found.items()}, flush=True)
    for name in arguments.models:
        for dtype in arguments.dtypes:
            bench = Bench(name, dtype, arguments.sparsity, arguments.scratch, limits, arguments.out)
            parts = bench.patch.parts
            inputs = sum(site.in_features * len(parts[site.key]) for site in bench.patch.sites)
            # two bytes of each kept input, and a bit of the mask of each; what several matrices read counts once
            row_bytes = inputs * (2 * (1 - arguments.sparsity) + 1 / 8)
            rows = max(1, int(arguments.gigabytes * 1e9 / row_bytes))
            if "one" in arguments.parts:
                bench.run(1, arguments.new, arguments.groups)
            if "cost" in arguments.parts:
                bench.capture_cost(1, arguments.new, arguments.groups, 3)
            if "many" in arguments.parts:
                bench.run(64, max(2, rows // 64 + 1), 1)
            if "forced" in arguments.parts:
                bench.run(8, 1, max(1, rows // 4096), forced=512)
            if "profile" in arguments.parts:
                bench.profile(1)
                bench.profile(64)
            del bench
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
