"""Time what others do at batch 1 on the same shape: gpt-fast, TEAL, and simulating in Python and saving each vector.

    PYTHONPATH=src:kernels python benchmarks/peers.py --gpt-fast .gptfast --teal .teal --out decode.csv

| impl | what | files of the checkout that are read |
|---|---|---|
| gpt-fast | dense, compiled as its own main does | `generate.py`, `model.py` |
| teal | 50 % dropped, no capture, compiled as its own main does | `gpt-fast/generate.py`, `gpt-fast/model.py`, \
`kernels/__init__.py`, `kernels/compile_wrapper.py`, `kernels/sparse_gemv.py` |
| simulate | masks in eager torch, `torch.save` of each matrix's vector for each token; needs no checkout | |

Weights are random, drawn on the GPU; thresholds are the quantile of what enters each matrix over random tokens. A rate
counts as gpt-fast does: tokens generated over the time of the whole call, prefill included, the median of `NUM_RUNS`
calls after two that compile and record. Each peer runs in a process of its own with a time limit; one that fails is
told in one line and the rest go on. Appends the rows of those that did not fail to a CSV, columns as in `COLUMNS`.
"""

# Shape suffixes: B sequences, T tokens.

import argparse
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import record
import torch
from random_checkpoint import SHAPES

COLUMNS = (
    *record.WHERE,
    *("model", "dtype", "batch", "mode", "sparsity", "impl", "capture", "sink"),
    *("tokens_per_s", "bytes_per_token", "limit", "limit_tokens_per_s"),
)
PROMPT_TOKENS = 6
NUM_RUNS = 3
# Simulating takes 0.13 s a token at the 7B shape.
SIMULATED_TOKENS = 20
OBSERVED_TOKENS = 64


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def fill(model: torch.nn.Module) -> None:
    """Random weights on the device, at which activations keep an ordinary scale; a model on `meta` gets memory."""
    model.to(torch.float16).to_empty(device=device())
    generator = torch.Generator(device()).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                std = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
                parameter.normal_(0, std, generator=generator)


def load_gpt_fast(folder: Path, shape: str) -> tuple[ModuleType, torch.nn.Module]:
    """gpt-fast's `generate` module, or that of a fork, and a model of a shape."""
    # its tokenizer needs packages of its own, and random weights need none
    sys.modules["tokenizer"] = SimpleNamespace(get_tokenizer=None)  # type: ignore[assignment]
    sys.path.insert(0, str(folder))
    import generate  # type: ignore[import-not-found]
    import model as their

    config = SHAPES[shape]
    with torch.device("meta"):
        model = their.Transformer(
            their.ModelArgs(
                block_size=config.max_position_embeddings,
                vocab_size=config.vocab_size,
                n_layer=config.num_hidden_layers,
                n_head=config.num_attention_heads,
                dim=config.hidden_size,
                intermediate_size=config.intermediate_size,
                n_local_heads=config.num_key_value_heads,
                rope_base=config.rope_theta,
                norm_eps=config.rms_norm_eps,
            )
        )
    fill(model)
    return generate, model.eval()


def rate(call: Callable[[], object], new: int) -> float:
    """Tokens a second."""
    times = []
    for _ in range(2 + NUM_RUNS):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - started)
    print(f"first call {times[0]:.1f} s, second {times[1]:.1f} s", file=sys.stderr)
    return new / statistics.median(times[2:])


def prompt() -> torch.Tensor:
    return torch.randint(0, 1000, (PROMPT_TOKENS,), dtype=torch.int, device=device())


def gpt_fast(checkout: Path, shape: str, new: int, compiled: bool) -> dict[str, Any]:
    """Dense gpt-fast."""
    generate, model = load_gpt_fast(checkout, shape)
    if compiled:
        generate.decode_one_token = torch.compile(generate.decode_one_token, mode="reduce-overhead", fullgraph=True)
    asked = {"batch_size": 1, "interactive": False, "draft_model": None, "temperature": 0.8, "top_k": 200}
    call = rate(lambda: generate.generate(model, prompt(), new, **asked), new)
    return {"sparsity": 0.0, "capture": "none", "sink": "none", "tokens_per_s": call, "bytes_per_token": 0}


def teal(checkout: Path, shape: str, new: int, compiled: bool) -> dict[str, Any]:
    """TEAL's fork of gpt-fast at half sparsity."""
    if importlib.util.find_spec("msgspec") is None:
        # a base class of theirs, which only keeps its three fields
        def keep(self: Any, name: str, target: str, schema: str) -> None:
            self.name, self.target, self.schema = name, target, schema

        sys.modules["msgspec"] = SimpleNamespace(Struct=type("Struct", (), {"__init__": keep}))  # type: ignore[assignment]
    sys.path.insert(0, str(checkout))
    generate, model = load_gpt_fast(checkout / "gpt-fast", shape)
    from kernels.sparse_gemv import SparseGEMV, SparseQKVGEMV  # type: ignore[import-not-found]

    sparsity = 0.5
    thresholds = observed_thresholds(model, sparsity, PROMPT_TOKENS + new)
    gemv, qkv = (
        kind.initialize(name, device().type).operator(True)
        for kind, name in ((SparseGEMV, "sparse_gemv"), (SparseQKVGEMV, "sparse_qkv_gemv"))
    )
    for layer in model.layers:
        attention, mlp = layer.attention, layer.feed_forward
        for linear in (attention.wqkv, attention.wo, mlp.w1, mlp.w3, mlp.w2):
            linear.weight.data = linear.weight.data.T.contiguous().T
        attention.gemv1, attention.gemv2, mlp.gemv1, mlp.gemv2 = qkv, gemv, gemv, gemv
        attention.thresh_q = attention.thresh_k = attention.thresh_v = thresholds[attention.wqkv]
        attention.thresh_o = thresholds[attention.wo]
        mlp.thresh_gate, mlp.thresh_up, mlp.thresh_down = thresholds[mlp.w1], thresholds[mlp.w3], thresholds[mlp.w2]
        attention.sparsity_bin = mlp.sparsity_bin = 0
        attention.apply_monkeypatch()
        mlp.apply_monkeypatch()
    if compiled:
        decode = torch.compile(generate.decode_one_token, mode="reduce-overhead", fullgraph=True, dynamic=False)
        # as gpt-fast's loop does: torch since 2.11 refuses a view of what the replay before put out
        generate.decode_one_token = lambda model, x, position, **how: decode(model, x.clone(), position, **how)
    asked = {"interactive": False, "draft_model": None, "temperature": 0.8, "top_k": 200}
    call = rate(lambda: generate.generate(model, prompt(), new, **asked), new)
    return {"sparsity": sparsity, "capture": "none", "sink": "none", "tokens_per_s": call, "bytes_per_token": 0}


@torch.no_grad()
def observed_thresholds(model: torch.nn.Module, sparsity: float, length: int) -> dict[torch.nn.Module, float]:
    """What the fraction `sparsity` of each linear layer's inputs does not exceed, over random tokens."""
    found: dict[torch.nn.Module, float] = {}

    def see(linear: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        magnitudes = inputs[0].float().abs().flatten().sort().values
        found[linear] = float(magnitudes[round(sparsity * len(magnitudes)) - 1])

    linears = [module for module in model.layers.modules() if isinstance(module, torch.nn.Linear)]
    handles = [linear.register_forward_pre_hook(see) for linear in linears]
    with torch.device(device()):
        model.setup_caches(max_batch_size=1, max_seq_length=max(length, OBSERVED_TOKENS))
        model(torch.randint(0, 1000, (1, OBSERVED_TOKENS)), torch.arange(OBSERVED_TOKENS))
    for handle in handles:
        handle.remove()
    return found


@torch.inference_mode()
def simulate(_: None, shape: str, new: int, __: bool) -> dict[str, Any]:
    """Masks in eager torch; every vector saved as a file of its own."""
    from sparsetrace.methods import Teal
    from sparsetrace.model.decoder import Decoder, KVCache
    from sparsetrace.model.patch import install
    from sparsetrace.tools.bench import observed_rules

    config = SHAPES[shape]
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to_empty(device=device())
    generator = torch.Generator(device()).manual_seed(0)
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1)
        else:
            # the head is stored [V, C], the other matrices [K, N]
            inputs = parameter.shape[1] if name == "lm_head" else parameter.shape[0]
            parameter.data.normal_(0, 1.0 if name == "embedding" else inputs**-0.5, generator=generator)
    method = Teal(sparsity=0.5)
    patch = install(decoder, method, observed_rules(decoder, method.sparsity))
    new = min(new, SIMULATED_TOKENS)
    step = 0

    with tempfile.TemporaryDirectory(prefix=".peers-", dir=".") as name:
        folder = Path(name)

        def save(layer: int, matrix: str, operand_BTK: torch.Tensor) -> None:
            torch.save(operand_BTK.cpu(), folder / f"L{layer:02d}.{matrix}.{step:05d}.pt")

        cache = KVCache(config, 1, PROMPT_TOKENS + new + 1, device())
        hidden = decoder(prompt()[None].long(), torch.arange(PROMPT_TOKENS, device=device())[None], cache)
        patch.sparsified_BT, patch.record = True, save
        for step in range(new + 1):
            if step == 1:
                # the first token pays for what is loaded lazily
                synchronize()
                started = time.perf_counter()
            token_BT = decoder.logits(hidden[:, -1]).argmax(-1, keepdim=True)
            hidden = decoder(token_BT, torch.tensor([[PROMPT_TOKENS + step]], device=device()), cache)
        synchronize()
        seconds = time.perf_counter() - started
        size = sum(path.stat().st_size for path in folder.iterdir()) / (new + 1)
    counted = {"tokens_per_s": new / seconds, "bytes_per_token": round(size)}
    return {"sparsity": method.sparsity, "capture": "full", "sink": "disk"} | counted


PEERS = {"gpt-fast": gpt_fast, "teal": teal, "simulate": simulate}


def run_peer(name: str, checkout: Path | None, shape: str, new: int, compiled: bool, limit: float) -> dict[str, Any]:
    """Run one peer in a process of its own.

    Raises:
        RuntimeError: it failed or took longer than `limit` seconds; the last line that it said.
    """
    command = [sys.executable, __file__, "--worker", name, "--shape", shape, "--new", str(new)]
    command += [] if checkout is None else ["--checkout", str(checkout.resolve())]
    command += [] if compiled else ["--eager"]
    with tempfile.TemporaryFile("w+") as said:
        # with a session of its own, the processes that compile for it can be ended with it
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True, env=record.environment()
        )
        try:
            answer, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise RuntimeError(f"took more than {limit:.0f} s") from None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        said.seek(0)
        lines = [line.strip() for line in said if line.strip()]
    if process.returncode:
        # torch's compiler ends its errors with advice
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Unsupported)\b", line)]
        raise RuntimeError((errors or lines or [f"status {process.returncode}"])[-1])
    if lines:
        print(f"{name}: {lines[-1]}", flush=True)
    return json.loads(answer.splitlines()[-1])


def rows_of(
    checkouts: dict[str, Path | None], shape: str, new: int, compiled: bool, limit: float
) -> list[dict[str, Any]]:
    """Rows of the peers that did not fail; the others are told in one line each."""
    rows = []
    for name, checkout in checkouts.items():
        try:
            found = run_peer(name, checkout, shape, new, compiled, limit)
        except RuntimeError as error:
            print(f"{name}: failed: {error}", flush=True)
            continue
        found["tokens_per_s"] = round(found["tokens_per_s"], 2)
        print(f"{name}: {found['tokens_per_s']} tokens/s, {found['bytes_per_token']:,} bytes a token", flush=True)
        fixed = {"model": shape, "dtype": "float16", "batch": 1, "mode": "decode", "impl": name}
        rows.append(record.where() | fixed | found)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt-fast", type=Path, help="checkout of gpt-fast")
    parser.add_argument("--teal", type=Path, help="checkout of FasterDecoding/TEAL")
    parser.add_argument("--no-simulate", action="store_true", help="leave out simulating and saving")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-7b")
    parser.add_argument("--new", type=int, default=200, help="tokens generated in each call")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, to try the script")
    parser.add_argument("--limit", type=float, default=150, help="seconds that a peer may take, compilation included")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    parser.add_argument("--worker", choices=list(PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--checkout", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        torch.manual_seed(0)
        peer = PEERS[arguments.worker]
        print(json.dumps(peer(arguments.checkout, arguments.shape, arguments.new, not arguments.eager)))
        return
    checkouts = {name: getattr(arguments, name.replace("-", "_")) for name in ("gpt-fast", "teal")}
    chosen = {name: checkout for name, checkout in checkouts.items() if checkout is not None}
    chosen |= {} if arguments.no_simulate else {"simulate": None}
    rows = rows_of(chosen, arguments.shape, arguments.new, not arguments.eager, arguments.limit)
    if arguments.out:
        record.append(arguments.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
