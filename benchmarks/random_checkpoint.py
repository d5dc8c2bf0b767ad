"""Write a checkpoint of a published shape with random weights, and a text and prompts to go with it.

    PYTHONPATH=src:kernels python benchmarks/random_checkpoint.py /scratch/llama-2-7b --shape llama-2-7b

| file | holds |
|---|---|
| `config.json`, `generation_config.json` | a LlamaForCausalLM as Hugging Face writes it |
| `model-0000N-of-0000M.safetensors`, `model.safetensors.index.json` | normal weights, each matrix with the standard \
deviation of one over the root of its inputs, so that activations keep an ordinary scale in either 16-bit type |
| `tokenizer.model`, `tokenizer_config.json` | the embedded model's, filled up with unused ids to the shape's \
vocabulary |
| `calibration.txt`, `prompts.jsonl` | text that every Python install carries |

Each tensor is drawn from a generator of its own, on a GPU if there is one: a seed gives the same bytes on the same kind
of device, whatever the size of the shards and the number of threads that write them.
"""

import argparse
import hashlib
import json
import math
import os
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sparsetrace.core.files import InputError, refuse_unexpected_files, sync, write_folder_beside, write_json
from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.model.demo.checkpoint import OUTPUT_FILES, hugging_face_config
from sparsetrace.model.demo.corpus import Document, divide, gather
from sparsetrace.model.demo.shape import BOS, CONFIG, EOS
from sparsetrace.model.demo.tokens import Decode, Encode, tokenizer_functions, train_tokenizer
from sparsetrace.model.families.llama import LLAMA

LLAMA_2_7B = ModelConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    vocab_size=32000,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    sliding_window=None,
    tie_word_embeddings=False,
    dtype="float16",
)
SHAPES = {
    "llama-2-7b": LLAMA_2_7B,
    "llama-3-8b": replace(
        LLAMA_2_7B,
        intermediate_size=14336,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
    ),
    "small": replace(
        LLAMA_2_7B,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=1280,
        max_position_embeddings=512,
    ),
}
DTYPES = {"float16": "F16", "bfloat16": "BF16"}
SHARD_BYTES = 2 << 30
# Files written at the same time: one thread alone is slower than a fast disk.
WRITERS = 8
PROMPT_TOKENS = (24, 64)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A tensor to draw; with a standard deviation of None it is all ones."""

    name: str
    shape: tuple[int, ...]
    std: float | None

    @property
    def nbytes(self) -> int:
        """Size in a 16-bit type."""
        return 2 * math.prod(self.shape)


def tensors(config: ModelConfig) -> Iterator[Drawn]:
    """All tensors of a checkpoint under Hugging Face's names, each matrix [N, K]."""
    for tensor in LLAMA.tensors(config):
        if tensor.site is not None:
            K = tensor.site.in_features
            for matrix, name in zip(tensor.site.matrices, tensor.sources, strict=True):
                yield Drawn(name, (tensor.site.outputs(matrix), K), K**-0.5)
        elif len(tensor.shape) == 1:
            yield Drawn(tensor.sources[0], tuple(tensor.shape), None)
        else:
            std = 1.0 if tensor.name == "embedding" else config.hidden_size**-0.5
            yield Drawn(tensor.sources[0], tuple(tensor.shape), std)


def draw(one: Drawn, dtype: torch.dtype, seed: int, device: torch.device) -> torch.Tensor:
    """Draw a tensor, and move it to the host."""
    if one.std is None:
        return torch.ones(one.shape, dtype=dtype)
    own = int.from_bytes(hashlib.sha256(f"{seed} {one.name}".encode()).digest()[:7])
    generator = torch.Generator(device).manual_seed(own)
    return torch.empty(one.shape, dtype=dtype, device=device).normal_(0, one.std, generator=generator).cpu()


def shards_of(wanted: list[Drawn], shard_bytes: int) -> list[list[Drawn]]:
    """Divide tensors into shards of at most `shard_bytes` each, or of a single tensor that is larger."""
    shards: list[list[Drawn]] = [[]]
    for one in wanted:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + one.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(one)
    return shards


def write_shard(path: Path, shard: list[Drawn], dtype: str, seed: int, device: torch.device) -> None:
    """Write one safetensors file tensor by tensor; the library would hold the whole file in memory, twice."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for one in shard:
        header[one.name] = {"dtype": DTYPES[dtype], "shape": one.shape, "data_offsets": [end, end + one.nbytes]}
        end += one.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in shard:
            file.write(draw(one, getattr(torch, dtype), seed, device).view(torch.uint8).numpy().data)
    # now, while other shards are drawn
    sync(path)


def write_checkpoint(
    out: Path,
    shape: str,
    dtype: str = "bfloat16",
    seed: int = 0,
    num_prompts: int = 24,
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[str], None] | None = None,
) -> int:
    """Write a checkpoint folder, whole or not at all.

    Args:
        out: the folder; an earlier checkpoint there is replaced.
        shape: one of `SHAPES`.
        dtype: `float16` or `bfloat16`.
        seed: of the weights.
        num_prompts: number of prompts in `prompts.jsonl`.
        shard_bytes: largest size of a weight file.
        report: called with a line for each file written.

    Returns:
        Size of the weights in bytes.
    """
    config = replace(SHAPES[shape], dtype=dtype)
    refuse_unexpected_files(out, OUTPUT_FILES, "random_checkpoint")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = shards_of(list(tensors(config)), shard_bytes)
    total_bytes = sum(one.nbytes for shard in shards for one in shard)
    with write_folder_beside(out) as folder:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        with ThreadPoolExecutor(min(WRITERS, os.cpu_count() or 1)) as pool:
            jobs = [
                pool.submit(write_shard, folder / name, shard, dtype, seed, device)
                for name, shard in zip(names, shards, strict=True)
            ]
            try:
                corpus = divide(gather(Path(sysconfig.get_path("stdlib"))))
                proto = train_tokenizer(corpus.train, config.vocab_size - CONFIG.vocab_size)
                for name, job in zip(names, jobs, strict=True):
                    job.result()
                    if report is not None:
                        report(f"{name} written")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        weight_map = {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
        write_json(folder / "config.json", hugging_face_config(config) | {"torch_dtype": dtype})
        write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
        write_json(folder / "tokenizer_config.json", {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer"})
        (folder / "tokenizer.model").write_bytes(proto)
        text = "\n\n".join(document.text for document in corpus.calibration)
        (folder / "calibration.txt").write_text(text + "\n", encoding="utf-8")
        prompts = cut_prompts(corpus.prompts, *tokenizer_functions(proto), num_prompts)
        lines = (json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)
        (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return total_bytes


def cut_prompts(documents: list[Document], encode: Encode, decode: Decode, count: int) -> list[str]:
    """First halves of paragraphs, cut between words, of lengths within `PROMPT_TOKENS`."""
    low, high = PROMPT_TOKENS
    prompts: list[str] = []
    for paragraph in (paragraph for document in documents for paragraph in document.paragraphs):
        ids = encode(paragraph)
        if len(ids) < low:
            continue
        if len(prompts) == count:
            break
        beginning = decode(ids[: min(high, max(low, len(ids) // 2))]).rpartition(" ")[0]
        prompts.append(beginning or paragraph)
    if len(prompts) < count:
        raise InputError(f"random_checkpoint: prompts must be at most {len(prompts)}, got {count}")
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-7b")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=24)
    arguments = parser.parse_args()
    started = time.perf_counter()
    size = write_checkpoint(arguments.out, arguments.shape, arguments.dtype, arguments.seed, arguments.prompts)
    seconds = time.perf_counter() - started
    print(f"{arguments.out}: {size / 1e9:.2f} GB of weights in {seconds:.1f} s")


if __name__ == "__main__":
    main()
