"""Speed of the kernels and of decoding on this GPU, for the shapes of one model.

Kernels: each multiply of a layer by itself, in CUDA-graph replays over rotating weights larger than the L2 cache.
Decoding: whole groups of random prompts, whose generated text is discarded. Thresholds are taken from the model's
activations on random tokens, so no calibration is needed.
"""

# Shape suffixes: B slots, T positions of one pass, K input features, N output features.

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Batching, Capture, Decoding
from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.generation import prompts
from sparsetrace.generation.backend import EngineSetup
from sparsetrace.generation.backends import choose_backend
from sparsetrace.generation.capture import Recorder
from sparsetrace.generation.engine import Engine
from sparsetrace.generation.selection import select
from sparsetrace.methods import Dense, MatrixRule, Method, Teal
from sparsetrace.model.decoder import Decoder
from sparsetrace.model.patch import install, observe
from sparsetrace.model.runtime import RuntimeModel
from sparsetrace.tools.tuning import DTYPES, site_shapes
from sparsetrace_kernels.configs import choose_config, table_for
from sparsetrace_kernels.gemv_problem import Problem
from sparsetrace_kernels.timing import num_copies, read_floor, time_in_graph
from sparsetrace_kernels.torch_ops import threshold_bits_for

NUM_REPLAYS = 20
# Length of the random sequence that thresholds are taken from.
OBSERVED_TOKENS = 256
PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One multiply by one implementation.

    Args:
        site: of the input.
        K, N: inputs and outputs of the site's matrices together.
        impl: `dense` (torch, the faster of two weight layouts), `single` (one launch that thresholds, multiplies and
            captures) or `list` (the engine's kernel, which multiplies what the kernel before it has listed and
            captured).
        us: microseconds a call, median.
        floor_share: time of one launch that reads the needed bytes and does nothing else, as a share of `us`.
        config: configuration of the kernel, as `GemvConfig.encode` writes it; empty for `dense`.
        chosen_by: what chose it: `table` (measured on this kind of GPU) or `heuristic`; empty for `dense`.
    """

    site: str
    K: int
    N: int
    impl: str
    us: float
    floor_share: float
    config: str = ""
    chosen_by: str = ""


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """Decoding at one batch size under one method.

    Args:
        batch: sequences at a time.
        method: label of the method.
        sink: where the operands went: `none` or `disk`.
        tokens_per_s: tokens generated a second, including the time of prefill, and with a sink the time until the last
            block is on the disk.
        bytes_per_token: bytes written for each captured token; 0 without a sink.
    """

    batch: int
    method: str
    sink: str
    tokens_per_s: float
    bytes_per_token: float


def kernel_rows(config: ModelConfig, sparsity: float, device: torch.device) -> Iterator[KernelRow]:
    """Time the multiplies of one layer.

    `list` is timed in the configuration that the engine would choose, `single`, which no engine launches, in the one
    that the committed table or the heuristic chooses.

    Args:
        config: of the model; a float32 model is measured in float16, since the kernels do not take float32.
        sparsity: fraction of the inputs dropped.
        device: a GPU.
    """
    dtype = getattr(torch, config.dtype if config.dtype in DTYPES else DTYPES[0])
    tables = {op: table_for(op, torch.cuda.get_device_name(device)) for op in ("single", "list")}
    for site, (K, N) in site_shapes(config).items():
        kept = K - round(sparsity * K)
        kept_bytes = max(kept * N * dtype.itemsize, 1)
        problem = Problem(K, N, dtype, num_copies(kept_bytes, device), device)
        # the faster layout, whichever the model stores
        dense = min(time_in_graph(calls, NUM_REPLAYS)[1] for calls in problem.dense_calls())
        vector_bytes = (K + N) * dtype.itemsize
        yield KernelRow(site, K, N, "dense", dense, read_floor(K * N * dtype.itemsize + vector_bytes, device) / dense)
        floor = read_floor(kept_bytes + vector_bytes, device)
        for op, table in tables.items():
            measured = table is not None and table.find(op, dtype, K, N, sparsity) is not None
            chosen = choose_config(op, K, N, dtype, sparsity, table)
            _, us, _ = time_in_graph(problem.calls(op, sparsity, chosen), NUM_REPLAYS)
            yield KernelRow(site, K, N, op, us, floor / us, chosen.encode(), "table" if measured else "heuristic")


@torch.inference_mode()
def observed_rules(decoder: Decoder, sparsity: float, seed: int = 0) -> list[MatrixRule]:
    """Derive thresholds that drop the fraction `sparsity` of each site's input, observed on random tokens."""
    rules: list[MatrixRule] = []
    matrices = {site.key: site.matrices for site in decoder.sites}

    def see(layer: int, site: str, x_BTK: Tensor) -> None:
        bits = int(threshold_bits_for(x_BTK.flatten(), sparsity))
        rules.extend(MatrixRule(layer, matrix, bits, expected=sparsity) for matrix in matrices[layer, site])

    config, device = decoder.config, decoder.embedding.device
    generator = torch.Generator().manual_seed(seed)
    T = min(OBSERVED_TOKENS, config.max_position_embeddings)
    tokens_BT = torch.randint(config.vocab_size, (1, T), generator=generator).to(device)
    with observe(decoder, see):
        decoder(tokens_BT, torch.arange(T, device=device)[None])
    return rules


def random_groups(
    config: ModelConfig, count: int, batch: int, new: int, seed: int = 0, length: int = PROMPT_TOKENS
) -> list[list[prompts.Sequence]]:
    """Make groups of sequences with random prompts of `length` tokens, numbered as `prompts.split` numbers them."""
    draws = np.random.default_rng(seed)
    groups: list[list[prompts.Sequence]] = []
    for group in range(count):
        numbers = range(group * batch, (group + 1) * batch)
        ids = draws.integers(config.vocab_size, size=(batch, length)).tolist()
        groups.append(
            [
                prompts.Sequence(n, n * (length + new), group, slot, "random", n, "", ids[slot])
                for slot, n in enumerate(numbers)
            ]
        )
    return groups


def decode_rows(
    model: RuntimeModel,
    sparsity: float,
    batches: Sequence[int],
    new: int,
    num_groups: int,
    folder: Path,
    device: torch.device,
) -> Iterator[DecodeRow]:
    """Time decoding: dense and sparse without capture, then sparse with its operands written to the disk.

    Args:
        model: converted.
        sparsity: target of the thresholds.
        batches: sequences at a time.
        new: tokens generated for each sequence.
        num_groups: groups timed for each row, after one that is not timed.
        folder: takes the dump, which is then removed.
        device: of the model.

    Raises:
        InputError: a sequence would exceed the model's context.
    """
    config = model.config
    if PROMPT_TOKENS + new > config.max_position_embeddings:
        raise InputError(
            f"bench: new tokens must be at most {config.max_position_embeddings - PROMPT_TOKENS} for {model.folder}, "
            f"got {new}"
        )
    decoder = model.load(device)
    rules = observed_rules(decoder, sparsity)
    methods: list[tuple[Method, tuple[str, ...]]] = [(Dense(), ("none",)), (Teal(sparsity=sparsity), ("none", "disk"))]
    for method, sinks in methods:
        patch = install(decoder, method, rules)
        for batch in batches:
            batching = Batching(max_new_tokens=new, batch_size=batch)
            engine = Engine(
                EngineSetup(
                    model=decoder,
                    patch=patch,
                    decoding=Decoding(ignore_eos=True),
                    batching=batching,
                    eos=model.eos,
                    backend=choose_backend("auto", device, config, method, rules),
                    positions=PROMPT_TOKENS + new,
                )
            )
            selection = select(decoder.sites, config.dtype, patch, Capture())
            groups = random_groups(config, 1 + num_groups, batch, new)
            for sink in sinks:
                recorder = None if sink == "none" else Recorder(selection, engine.block_rows, engine.device)
                seconds, written, rows = time_groups(engine, recorder, groups, folder)
                rate = num_groups * batch * new / seconds
                if recorder is not None:
                    recorder.shutdown()
                yield DecodeRow(batch, method.label, sink, rate, written / rows if rows else 0.0)
            # frees caches, graphs and rings before the next engine allocates its own
            del engine, recorder
        patch.put(decoder, sparse=False)


def time_groups(
    engine: Engine, recorder: Recorder | None, groups: list[list[prompts.Sequence]], folder: Path
) -> tuple[float, int, int]:
    """Run groups, and time all but the first.

    Returns:
        Seconds until the last block is on the disk, bytes written there, and tokens captured.
    """
    written: list[tuple[list[str], int]] = []

    def note(blocks: list[str], rows: int) -> None:
        written.append((blocks, rows))

    def run(group: list[prompts.Sequence]) -> None:
        if recorder is not None:
            recorder.open(folder, group[0].group)
        engine.run(group, recorder)
        if recorder is not None:
            recorder.close(note)

    def finish() -> None:
        if recorder is not None:
            recorder.wait()
        if engine.device.type == "cuda":
            torch.cuda.synchronize()

    def remove() -> int:
        """Remove the blocks that were written, and return their size; a benchmark's recorder may have kept none."""
        files = [folder / block for blocks, _ in written for block in blocks if (folder / block).exists()]
        size = sum(file.stat().st_size for file in files)
        for file in files:
            file.unlink()
        return size

    run(groups[0])
    finish()
    remove()
    written.clear()
    started = time.perf_counter()
    for group in groups[1:]:
        run(group)
    finish()
    seconds = time.perf_counter() - started
    return seconds, remove(), sum(rows for _, rows in written)
