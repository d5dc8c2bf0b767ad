"""The embedded default model: a small Llama trained on English that every Python install carries.

For one Python install, one torch and one thread count, all files written are the same bytes each time.

| file | holds |
|---|---|
| `config.json` | a LlamaForCausalLM as Hugging Face writes it: grouped queries, tied embeddings |
| `model-0000N-of-00002.safetensors` | weights [out, in], bfloat16, rounded from the float32 that was trained |
| `model.safetensors.index.json` | the shard of each tensor |
| `tokenizer.model`, `tokenizer_config.json` | SentencePiece BPE with byte fallback: any text encodes |
| `generation_config.json` | begin and end tokens |
| `calibration.txt` | held-out documents, a blank line between two of them |
| `quality.txt` | other held-out documents, those of the validation loss |
| `prompts.jsonl` | beginnings of held-out paragraphs, each in the field `prompt` |
"""

import json
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetrace.core.files import refuse_unexpected_files, write_folder_beside, write_json
from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.model.decoder import Decoder
from sparsetrace.model.demo.corpus import divide, gather
from sparsetrace.model.demo.shape import BOS, CONFIG, EOS
from sparsetrace.model.demo.tokens import cut_prompts, document_ids, tokenizer_functions, train_tokenizer
from sparsetrace.model.demo.training import INIT_STD, Training, evaluate, train, unigram_loss
from sparsetrace.model.families.llama import LLAMA

NUM_SHARDS = 2
OUTPUT_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model"),
    *("model-*.safetensors", "model.safetensors.index.json", "calibration.txt", "quality.txt"),
    "prompts.jsonl",
)


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What came of the training.

    Args:
        validation_loss: of the stored bfloat16 weights, computed in float32; nats a token.
        unigram_loss: of predicting the same tokens by the training text's token frequencies; nats a token.
        steps: optimiser steps.
        seconds: CPU time, user and system, divided by the number of threads: the wall-clock time on an idle machine.
        parameters: of the model.
        tokens: trained on.
    """

    validation_loss: float
    unigram_loss: float
    steps: int
    seconds: float
    parameters: int
    tokens: int

    @property
    def nats_below_unigram(self) -> float:
        """How much better than token frequencies the model predicts."""
        return self.unigram_loss - self.validation_loss


def make_checkpoint(
    out: Path, training: Training, report: Callable[[int, int, float], None] | None = None
) -> DemoReport:
    """Train the model, or one of another shape, and write its checkpoint folder, whole or not at all.

    Args:
        out: the folder; an earlier checkpoint there is replaced.
        training: how.
        report: called after each step with the step, the number of steps and the step's training loss.

    Raises:
        InputError: the folder holds something else, or this Python carries too little text.
    """
    refuse_unexpected_files(out, OUTPUT_FILES, "demo")

    started = time.process_time()
    corpus = divide(gather(Path(sysconfig.get_path("stdlib"))))
    proto = train_tokenizer(corpus.train)
    encode, decode = tokenizer_functions(proto)
    train_ids = [document_ids(encode, document) for document in corpus.train]
    validation_ids = torch.cat([document_ids(encode, document) for document in corpus.validation])
    prompts = cut_prompts(corpus.prompts, encode, decode)

    threads_before = torch.get_num_threads()
    torch.set_num_threads(training.threads)
    try:
        # torch.use_deterministic_algorithms is not needed: on a CPU, all that runs here repeats at equal thread counts
        model = train(train_ids, training, report)
        weights = {name: weight.to("cpu", torch.bfloat16) for name, weight in hugging_face_weights(model).items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
        validation_loss = evaluate(model, validation_ids.to(training.device))
    finally:
        torch.set_num_threads(threads_before)

    with write_folder_beside(out) as folder:
        _write_weights(folder, weights)
        write_json(folder / "config.json", hugging_face_config(training.config))
        write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
        write_json(folder / "tokenizer_config.json", _tokenizer_config())
        (folder / "tokenizer.model").write_bytes(proto)
        for name, documents in (("calibration.txt", corpus.calibration), ("quality.txt", corpus.validation)):
            text = "\n\n".join(document.text for document in documents)
            (folder / name).write_text(text + "\n", encoding="utf-8", newline="\n")
        lines = (json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)
        (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")

    return DemoReport(
        validation_loss=validation_loss,
        unigram_loss=unigram_loss(torch.cat(train_ids), validation_ids[1:]),
        steps=training.steps,
        seconds=(time.process_time() - started) / training.threads,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=training.steps * training.step_tokens,
    )


def hugging_face_weights(model: Decoder) -> dict[str, Tensor]:
    """The model's weights under the names of a Llama checkpoint, each matrix [N, K], in the order of execution."""
    state, weights = model.state_dict(), {}
    for tensor in LLAMA.tensors(model.config):
        if tensor.site is None:
            weights[tensor.sources[0]] = state[tensor.name]
            continue
        assert tensor.site.layer is not None
        projection = getattr(model.layers[tensor.site.layer], tensor.site.name)
        for matrix, name in zip(tensor.site.matrices, tensor.sources, strict=True):
            weights[name] = projection.matrix(matrix).detach().T.contiguous()
    return weights


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a Llama whose weights are stored in bfloat16."""
    return {
        "architectures": [LLAMA.architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": INIT_STD,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "model_type": LLAMA.model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": CONFIG.max_position_embeddings,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }


def _write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write shards of about equal size, cut between tensors in the order given, and the index."""
    from safetensors.torch import save_file

    total_bytes = sum(weight.nbytes for weight in weights.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(NUM_SHARDS)]
    before = 0
    for name, weight in weights.items():
        shards[before * NUM_SHARDS // total_bytes][name] = weight
        before += weight.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{NUM_SHARDS:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
    )
