"""Time what calibration's counting costs, and calibrate and quality for a model of 7B shape with random weights.

Needs a GPU with 20 GB.  Appends rows to a CSV:

| column | what |
|---|---|
| gpu, torch, triton, commit | where and what was measured |
| metric | see below |
| counter | what counted: none, op (`add_histogram` as used), triton (its fallback), bincount (torch) |
| unit, p20, p50, p80 | over the repetitions |

| metric | unit | what |
|---|---|---|
| count | Gelem/s | bit patterns counted of a [4096, 11008] bf16 tensor, normal with channels of different scale |
| count_half_zeros | Gelem/s | the same with half of it zero, as behind a ReLU: half of all counts go to one pattern |
| forward | ms | one pass of calibration, 4,096 tokens in sequences of 2,048 |
| ratio | 1 | that with counting over that without; pairs of passes, one after the other |
| calibrate | s | the step on 65,536 tokens, model loading and text aside |
| calibrate_scores | s | the same with the scores of cats and wina |
| quality | s | the step on 20 windows of 2,048 + 512 tokens under teal at 50 %, the dense model beside it |
"""

# Shape suffixes: B sequences, T tokens, C channels.

import argparse
import csv
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from torch import Tensor

from sparsetrace.calibration.calibrate import CalibrationJob, calibrate, counting_callbacks
from sparsetrace.calibration.counter import ActivationCounter
from sparsetrace.calibration.derive import derive_thresholds
from sparsetrace.calibration.histogram import NUM_PATTERNS
from sparsetrace.calibration.quality import QualityJob, measure
from sparsetrace.core.settings import Calibration, Machine, Quality
from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.methods import Teal
from sparsetrace.model.decoder import Decoder
from sparsetrace.model.patch import observe
from sparsetrace_kernels.histogram import BLOCK, _histogram_kernel, add_histogram
from sparsetrace_kernels.reference import histogram_ref

RESULTS = Path(__file__).parent / "results" / "calibrate.csv"
COLUMNS = ["gpu", "torch", "triton", "commit", "metric", "counter", "unit", "p20", "p50", "p80"]

Counter = Callable[[Tensor, Tensor], object]


def triton_counter(x: Tensor, counts: Tensor) -> None:
    """Counts with the op's Triton kernel, which serves where the other cannot be compiled."""
    grid = (triton.cdiv(x.numel(), BLOCK),)
    _histogram_kernel[grid](x.view(torch.int16), counts, x.numel(), BLOCK=BLOCK)


def bincount_counter(x: Tensor, counts: Tensor) -> None:
    """Counts with torch."""
    counts += torch.bincount(x.view(torch.int16).flatten().int() & (NUM_PATTERNS - 1), minlength=NUM_PATTERNS)


def counters(device: torch.device) -> dict[str, Counter]:
    """The op as it is used and its alternatives, each checked against the oracle."""
    found: dict[str, Counter] = {"op": add_histogram, "triton": triton_counter, "bincount": bincount_counter}
    x = torch.randn(100_003, device=device).bfloat16()
    x[::3] = 0
    for name, add in found.items():
        counts = torch.zeros(NUM_PATTERNS, dtype=torch.int64, device=device)
        add(x, counts)
        add(x, counts)
        if not torch.equal(counts, 2 * histogram_ref(x)):
            raise RuntimeError(f"{name} miscounts")
    return found


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time, the device's work included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th, or the extremes of few."""
    if len(values) < 5:
        return min(values), statistics.median(values), max(values)
    p20, *_, p80 = statistics.quantiles(values, n=5)
    return p20, statistics.median(values), p80


def random_decoder(config: ModelConfig, device: torch.device) -> Decoder:
    """A decoder whose activations have ordinary scales: normal weights over the root of their inputs."""
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1).mul_(torch.randn(parameter.shape, generator=generator, device=device).exp())
        else:
            parameter.data.normal_(0, parameter.shape[0] ** -0.5, generator=generator)
    return decoder.requires_grad_(False).eval()


class RandomModel:
    """Stands for a `RuntimeModel`: weights made once, and a tokenizer of one token a word."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.config = config
        self.model_hash = "random"
        self.decoder = random_decoder(config, device)
        self.sites = self.decoder.sites

    def load(self, device: torch.device) -> Decoder:
        """The same weights each time."""
        return self.decoder

    def tokenizer(self) -> SimpleNamespace:
        """Words are numbers."""
        return SimpleNamespace(bos=1, encode=lambda text, where: [1, *map(int, text.split())])


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="fewer for a trial")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device("cuda")
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    commit = run.stdout.strip() or "uncommitted"
    where = (torch.cuda.get_device_name(device), torch.__version__, triton.__version__, commit)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    def note(metric: str, counter: str, unit: str, values: list[float]) -> None:
        new = not arguments.out.is_file()
        p20, p50, p80 = percentiles(values)
        print(f"{metric:18} {counter:9} {p50:10.3f} {unit} ({p20:.3f} to {p80:.3f})", flush=True)
        with arguments.out.open("a", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([COLUMNS] if new else [])
            writer.writerow([*where, metric, counter, unit, f"{p20:.4f}", f"{p50:.4f}", f"{p80:.4f}"])

    found = counters(device)
    scale = torch.randn(11008, device=device).exp()
    x = (torch.randn(4096, 11008, device=device) * scale).bfloat16()
    counts = torch.zeros(NUM_PATTERNS, dtype=torch.int64, device=device)
    for metric, values in (("count", x), ("count_half_zeros", x * (x > 0))):
        for name, add in found.items():
            add(values, counts)
            times = [
                seconds(lambda add=add, values=values: [add(values, counts) for _ in range(5)]) / 5
                for _ in range(arguments.repetitions)
            ]
            note(metric, name, "Gelem/s", [x.numel() / t / 1e9 for t in times])

    config = ModelConfig(
        *(4096, 11008, arguments.layers, 32, 32, 128, 32000, 4096, 1e-5, 1e4, None, None, False, "bfloat16")
    )
    model = RandomModel(config, device)
    tokens_BT = torch.randint(0, 32000, (2, 2048), device=device)
    positions_BT = torch.arange(2048, device=device).expand(2, -1)

    def forward(counter: ActivationCounter | None) -> None:
        with torch.inference_mode():
            if counter is None:
                model.decoder(tokens_BT, positions_BT)
                return
            see, see_output = counting_callbacks(model.decoder, counter)
            with observe(model.decoder, see, see_output):
                model.decoder(tokens_BT, positions_BT)
            assert counter.not_finite() is None

    forward(None)
    plain = [seconds(lambda: forward(None)) for _ in range(arguments.repetitions)]
    note("forward", "none", "ms", [1e3 * t for t in plain])
    for name, add in found.items():
        counter = ActivationCounter(model.sites, "bfloat16", device)
        counter.add = add
        forward(counter)
        pairs = [
            (seconds(lambda: forward(None)), seconds(lambda c=counter: forward(c)))
            for _ in range(arguments.repetitions)
        ]
        note("forward", name, "ms", [1e3 * counted for _, counted in pairs])
        note("ratio", name, "1", [counted / plain for plain, counted in pairs])

    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        text = folder / "text.txt"
        generator = torch.Generator().manual_seed(1)
        text.write_text(" ".join(map(str, torch.randint(0, 32000, (70_000,), generator=generator).tolist())))
        machine = Machine(device="cuda")
        settings = Calibration(tokens=65_536, sequence_length=2048)
        for metric, scores in (("calibrate", ()), ("calibrate_scores", ("cats", "wina"))):
            path = folder / f"{metric}.safetensors"
            job = CalibrationJob(model, text, path, settings, machine, scores=scores)
            note(metric, "op", "s", [seconds(lambda job=job: calibrate(job))])
        derive_thresholds("teal-0.5", Teal(sparsity=0.5), folder / "calibrate.safetensors", folder / "t.parquet")
        quality = Quality(context=2048, stride=512, windows=20)
        job = QualityJob(model, text, [folder / "t.parquet"], folder / "q.parquet", quality, machine)
        note("quality", "none", "s", [seconds(lambda: measure(job))])
    print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory at most", flush=True)


if __name__ == "__main__":
    main()
