"""The embedded default model: a small Llama trained on English that every Python install carries.

The text is the prose of `pydoc_data.topics` and of the standard library's docstrings, read from source without
importing anything. It differs between Python versions, and between distributions that leave parts of the library out;
for one install, one torch and one thread count, all files written are the same bytes each time.

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

# Shape suffixes: B batch, T tokens, K input features, N output features, V vocabulary; R = min(K, N).

import ast
import hashlib
import io
import json
import math
import re
import sys
import sysconfig
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsetrace.core.files import InputError, refuse_unexpected_files, write_folder_beside, write_json
from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.model.decoder import Block, Decoder

STEPS = 400
NUM_PROMPTS = 32
NUM_SHARDS = 2
OUTPUT_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model"),
    *("model-*.safetensors", "model.safetensors.index.json", "calibration.txt", "quality.txt"),
    "prompts.jsonl",
)

CONFIG = ModelConfig(
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=1024,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    sliding_window=None,
    tie_word_embeddings=True,
    dtype="float32",
)
UNK, BOS, EOS = 0, 1, 2
CPU = torch.device("cpu")

# Characters set aside for each held-out part; what shares a phrase with the training text is then taken out of it.
HELD_OUT_CHARACTERS = {"validation": 80_000, "calibration": 160_000, "prompts": 80_000}
# Words in a row that no held-out paragraph has in common with the training text.
SHARED_WORDS = 8
PROMPT_TOKENS = (24, 64)
# Less text than this trains no model worth the name; CPython 3.11 has 1.7 million characters of it.
MIN_TRAINING_CHARACTERS = 500_000

STEP_TOKENS = 1024
# Many short windows teach faster than few long ones (by 0.07 nats a token at 128 and 256); the last steps then teach
# the whole context.
SHORT_WINDOW, LONG_WINDOW = 128, CONFIG.max_position_embeddings
SHORT_SHARE = 0.75
WARMUP = 0.05
INIT_STD, EMBEDDING_STD = 0.02, 0.2
# Not for safety: like runs without it ended 0.6 nats a token worse.
MAX_GRADIENT_NORM = 1.0
ADAM_LEARNING_RATE = 8e-3
ADAM_BETAS = (0.9, 0.95)
MUON_LEARNING_RATE = 0.02
MUON_MOMENTUM = 0.95
# Quintic whose iteration drives singular values towards 1. Source: Keller Jordan, "Muon", 2024.
MUON_QUINTIC = (3.4445, -4.7750, 2.0315)
MUON_ITERATIONS = 5

WORD = re.compile(r"[\"'(*`]*[A-Za-z][A-Za-z'-]*[\"'*`.,;:)?!]*")
NOT_OURS = {"site-packages", "dist-packages", "test", "tests"}


@dataclass(frozen=True, slots=True)
class Document:
    """A topic's section, a module's docstring, or the docstrings of one top-level class or function.

    Args:
        name: where it stands in the standard library.
        paragraphs: prose, each in one line.
    """

    name: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        """Paragraphs, one a line."""
        return "\n".join(self.paragraphs)

    @property
    def characters(self) -> int:
        """Length of the paragraphs."""
        return sum(map(len, self.paragraphs))


@dataclass(frozen=True, slots=True)
class Parts:
    """The text, divided by document; no part but `train` is seen in training, by model or tokenizer."""

    train: list[Document]
    validation: list[Document]
    calibration: list[Document]
    prompts: list[Document]


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What came of the training.

    Args:
        validation_loss: of the stored bfloat16 weights, computed in float32; nats a token.
        unigram_loss: of the training text's token frequencies on the same tokens; nats a token.
        steps: optimiser steps.
        seconds: CPU time, user and system, over the number of threads: the wall-clock time of a machine that does
            nothing else.
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
    out: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    threads: int = 2,
    report: Callable[[int, int, float], None] | None = None,
    config: ModelConfig = CONFIG,
    step_tokens: int = STEP_TOKENS,
    device: str = "cpu",
) -> DemoReport:
    """Train the model, or one of another shape, and write its checkpoint folder, whole or not at all.

    Args:
        out: the folder; an earlier checkpoint there is replaced.
        seed: of the initial weights and of the order of the text.
        steps: optimiser steps.
        threads: that torch uses meanwhile; sums depend on it.
        report: called after each step with the step, the number of steps and the step's training loss.
        config: shape of the model, of the demonstration model's vocabulary and context.
        step_tokens: trained on at a time.
        device: to train on: `cpu`, or `cuda`, which multiplies in bfloat16 and need not repeat itself bit for bit.

    Raises:
        InputError: the folder holds something else, or this Python carries too little text.
    """
    for name, value in (("steps", steps), ("threads", threads)):
        if value < 1:
            raise InputError(f"demo: {name} must be at least 1, got {value}")
    refuse_unexpected_files(out, OUTPUT_FILES, "demo")

    started = time.process_time()
    parts = divide(gather(Path(sysconfig.get_path("stdlib"))))
    proto = train_tokenizer(parts.train)
    encode, decode = _tokenizer(proto)
    train_ids = [_document_ids(encode, document) for document in parts.train]
    validation_ids = torch.cat([_document_ids(encode, document) for document in parts.validation])
    prompts = cut_prompts(parts.prompts, encode, decode)

    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # torch.use_deterministic_algorithms is not needed: all that runs here repeats on a CPU at equal thread counts
        model = _train(train_ids, seed, steps, report, config, step_tokens, torch.device(device))
        weights = {name: weight.to("cpu", torch.bfloat16) for name, weight in hugging_face_weights(model).items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
        validation_loss = evaluate(model, validation_ids.to(device))
    finally:
        torch.set_num_threads(threads_before)

    with write_folder_beside(out) as folder:
        _write_weights(folder, weights)
        write_json(folder / "config.json", hugging_face_config(config))
        write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
        write_json(folder / "tokenizer_config.json", _tokenizer_config())
        (folder / "tokenizer.model").write_bytes(proto)
        for name, documents in (("calibration.txt", parts.calibration), ("quality.txt", parts.validation)):
            text = "\n\n".join(document.text for document in documents)
            (folder / name).write_text(text + "\n", encoding="utf-8", newline="\n")
        lines = (json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)
        (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")

    return DemoReport(
        validation_loss=validation_loss,
        unigram_loss=unigram_loss(torch.cat(train_ids), validation_ids[1:]),
        steps=steps,
        seconds=(time.process_time() - started) / threads,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=steps * step_tokens,
    )


# The text


def gather(stdlib: Path) -> list[Document]:
    """Every document of the standard library, in the order of its names; no paragraph occurs twice.

    Args:
        stdlib: the folder of the library's sources.
    """
    documents = []
    seen: set[str] = set()
    for name, text in _raw_documents(stdlib):
        paragraphs = []
        for block in re.split(r"\n\s*\n", text):
            paragraph = " ".join(block.split())
            # letters and digits alone: a change of case or punctuation makes no new paragraph
            key = "".join(_words(paragraph))
            if _is_prose(paragraph) and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        if paragraphs:
            documents.append(Document(name, tuple(paragraphs)))
    return documents


def divide(documents: list[Document]) -> Parts:
    """Divide by document, in the order of the names' hashes, and take from the held-out parts what training repeats.

    Raises:
        InputError: too little is left to train on.
    """
    pool = iter(sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest()))
    held_out: dict[str, list[Document]] = {}
    for part, quota in HELD_OUT_CHARACTERS.items():
        held_out[part] = []
        taken = 0
        while taken < quota and (document := next(pool, None)) is not None:
            held_out[part].append(document)
            taken += document.characters
    train = list(pool)
    available = sum(document.characters for document in train)
    if available < MIN_TRAINING_CHARACTERS:
        raise InputError(
            f"demo: the standard library's sources must hold at least {MIN_TRAINING_CHARACTERS} characters of prose to "
            f"train on, got {available}: use a Python with its pydoc_data and .py files"
        )
    known = {phrase for document in train for paragraph in document.paragraphs for phrase in _phrases(paragraph)}
    return Parts(train, **{part: _without(known, documents) for part, documents in held_out.items()})


def _raw_documents(stdlib: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of all documents, code and markup included."""
    for topic, text in sorted(_topics(stdlib / "pydoc_data" / "topics.py").items()):
        # a heading is a line over a rule
        for number, section in enumerate(re.split(r"(?m)^(?=\S.*\n[*=\-]{3,}$)", text)):
            yield f"pydoc_data/topics/{topic}/{number}", section
    # named modules only: distributions put files of their own, and other people's packages, into the same folder
    for module in sorted(sys.stdlib_module_names):
        sources = [stdlib / f"{module}.py", *sorted((stdlib / module).rglob("*.py"))]
        for source in sources:
            relative = source.relative_to(stdlib)
            if source.is_file() and not NOT_OURS.intersection(relative.parts):
                yield from _docstrings(relative.as_posix(), _parse(source))


def _parse(source: Path) -> ast.Module:
    """Syntax tree of a source file; an empty one where it is not this Python's (lib2to3 and others ship such files)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source.read_bytes())
        except (SyntaxError, ValueError):
            return ast.Module(body=[], type_ignores=[])


def _topics(source: Path) -> dict[str, str]:
    """The help topics; none where the distribution leaves them out."""
    tree = _parse(source) if source.is_file() else ast.Module(body=[], type_ignores=[])
    literal = next((node for node in ast.walk(tree) if isinstance(node, ast.Dict)), None)
    topics: dict[str, str] = ast.literal_eval(literal) if literal else {}
    return topics


def _docstrings(name: str, module: ast.Module) -> Iterator[tuple[str, str]]:
    """The docstring of a module, then one text for each top-level class or function with all that it contains."""
    yield name, ast.get_docstring(module) or ""
    for top in module.body:
        if isinstance(top, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}:{top.name}", "\n\n".join(ast.get_docstring(node) or "" for node in _definitions(top))


def _definitions(top: ast.stmt) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """A definition and those within it, in the order of `ast.walk`, which would visit every expression too."""
    queue: deque[ast.AST] = deque([top])
    while queue:
        node = queue.popleft()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        # what holds statements, in the order that all nodes have them
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            queue.extend(getattr(node, block, ()))


def _is_prose(paragraph: str) -> bool:
    """Whether most of it is plain words: sessions, grammars, tables and code are not."""
    words = paragraph.split()
    plain = sum(bool(WORD.fullmatch(word)) for word in words)
    return len(words) >= 4 and plain >= 0.7 * len(words) and ">>>" not in paragraph


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.casefold())


def _phrases(paragraph: str) -> set[tuple[str, ...]]:
    """All runs of `SHARED_WORDS` words; a shorter paragraph is one phrase."""
    words = _words(paragraph)
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(max(1, len(words) - SHARED_WORDS + 1))}


def _without(known: set[tuple[str, ...]], documents: list[Document]) -> list[Document]:
    """The documents less their paragraphs that have a phrase in `known`."""
    kept = (Document(d.name, tuple(p for p in d.paragraphs if known.isdisjoint(_phrases(p)))) for d in documents)
    return [document for document in kept if document.paragraphs]


# Tokens


def train_tokenizer(documents: list[Document], unused: int = 0) -> bytes:
    """A SentencePiece model of the training text, as the bytes of `tokenizer.model`.

    Args:
        documents: to train on.
        unused: ids besides, which only the text `<unusedN>` encodes to: a model of a larger vocabulary
            may choose them.
    """
    from sentencepiece import SentencePieceTrainer

    proto = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(paragraph for document in documents for paragraph in document.paragraphs),
        model_writer=proto,
        model_type="bpe",
        vocab_size=CONFIG.vocab_size + unused,
        user_defined_symbols=[f"<unused{number}>" for number in range(unused)],
        byte_fallback=True,
        # as Llama's: text comes back as it went in, and digits are tokens
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=2,
    )
    return proto.getvalue()


def _tokenizer(proto: bytes) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=proto)
    return processor.encode, processor.decode


def _document_ids(encode: Callable[[str], list[int]], document: Document) -> Tensor:
    """Ids between begin and end, so that the model learns to stop."""
    return torch.tensor([BOS, *encode(document.text), EOS])


def cut_prompts(
    documents: list[Document], encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]
) -> list[str]:
    """Beginnings of paragraphs, evenly from the lowest to the highest of `PROMPT_TOKENS`, whole words.

    Raises:
        InputError: the documents hold too few paragraphs that long.
    """
    low, high = PROMPT_TOKENS
    prompts: list[str] = []
    for document in documents:
        for paragraph in document.paragraphs:
            wanted = low + (high - low) * len(prompts) // (NUM_PROMPTS - 1)
            # up to the wanted number of tokens, and back to the last space: a word is never cut
            beginning = decode(encode(paragraph)[: wanted + 1]).rpartition(" ")[0]
            if len(encode(beginning)) >= max(low, wanted - 8) and beginning != paragraph:
                prompts.append(beginning)
                # one of each document, so that they differ
                break
        if len(prompts) == NUM_PROMPTS:
            return prompts
    raise InputError(f"demo: the held-out text must hold {NUM_PROMPTS} prompts, got {len(prompts)}")


# Training


def _train(
    documents: list[Tensor],
    seed: int,
    steps: int,
    report: Callable[[int, int, float], None] | None,
    config: ModelConfig = CONFIG,
    step_tokens: int = STEP_TOKENS,
    device: torch.device = CPU,
) -> Decoder:
    """Train from scratch: Muon for the matrices, AdamW for embedding and norms, warm-up and cosine for both.

    On this text Muon reached in a given time what AdamW alone missed by 0.4 nats a token.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config)
    # drawn on the host: the same numbers for every device
    initialise(model, generator)
    model.to(device)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [model.embedding, *(p for p in model.parameters() if p.ndim == 1)]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=ADAM_LEARNING_RATE, betas=ADAM_BETAS, eps=1e-10, weight_decay=0.0, fused=True)
    warmup = max(1, round(WARMUP * steps))
    for step, ids_BT in enumerate(_batches(documents, steps, generator, step_tokens), start=1):
        decay = max(0, step - 1 - warmup) / max(1, steps - warmup)
        factor = min(1.0, step / warmup) * (1 + math.cos(math.pi * decay)) / 2
        ids_BT = ids_BT.to(device)
        B, T = ids_BT[:, :-1].shape
        with torch.autocast(device.type, torch.bfloat16, enabled=device != CPU):
            logits_BTV = model.logits(model(ids_BT[:, :-1], torch.arange(T, device=device).expand(B, -1)))
        loss = functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        for group in adam.param_groups:
            group["lr"] = ADAM_LEARNING_RATE * factor
        adam.step()
        muon.step(MUON_LEARNING_RATE * factor)
        if report is not None:
            report(step, steps, loss.item())
    return model


@torch.no_grad()
def initialise(model: Decoder, generator: torch.Generator) -> None:
    """Normal matrices, those that write to the residual stream smaller by the root of their number; norms are 1."""
    model.embedding.normal_(0.0, EMBEDDING_STD, generator=generator)
    residual = math.sqrt(2 * len(model.layers))
    for name, parameter in model.layers.named_parameters():
        if parameter.ndim == 2:
            writes = name.endswith(("attn_out.weight", "mlp_mid.weight"))
            parameter.normal_(0.0, INIT_STD / residual if writes else INIT_STD, generator=generator)


class Muon:
    """Momentum whose update is made orthogonal: all its singular values are brought near 1.

    The iteration is X <- F X, F = a + b A + c A^2, A = X X^T. F commutes with A, so it is run on the R x R matrices A
    alone (A <- F A F), all of the model's in one batch, and X is multiplied once, at the end, by the product of the F:
    58 ms a step where the iteration on X took 99 (two cores of an AMD EPYC, Zen 5, in use by others too).

    Args:
        matrices: [K, N] each, the smaller side R the same for all.
    """

    def __init__(self, matrices: list[nn.Parameter]) -> None:
        self.matrices = matrices
        self.momenta = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the matrices from their gradients."""
        updates = []
        for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
            assert matrix.grad is not None
            momentum.lerp_(matrix.grad, 1 - MUON_MOMENTUM)
            update = matrix.grad.lerp(momentum, MUON_MOMENTUM)
            update = update.T if update.shape[0] > update.shape[1] else update
            updates.append(update / (update.norm() + 1e-7))
        a, b, c = MUON_QUINTIC
        gram_MRR = torch.stack([update @ update.T for update in updates])
        identity_RR = torch.eye(gram_MRR.shape[1], device=gram_MRR.device)
        product_MRR = identity_RR.expand_as(gram_MRR)
        for _ in range(MUON_ITERATIONS):
            factor_MRR = a * identity_RR + b * gram_MRR + c * gram_MRR @ gram_MRR
            product_MRR = factor_MRR @ product_MRR
            gram_MRR = factor_MRR @ gram_MRR @ factor_MRR
        for matrix, update, product_RR in zip(self.matrices, updates, product_MRR, strict=True):
            K, N = matrix.shape
            orthogonal = product_RR @ update
            # equal root mean square of the outputs whatever the shape
            matrix.add_(orthogonal.T if K > N else orthogonal, alpha=-learning_rate * math.sqrt(max(1.0, N / K)))


def _batches(documents: list[Tensor], steps: int, generator: torch.Generator, step_tokens: int) -> Iterator[Tensor]:
    """The text cut into windows, [B, T + 1] a step; documents come in a new order each time through."""
    ids = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        T = SHORT_WINDOW if step < SHORT_SHARE * steps else LONG_WINDOW
        B = step_tokens // T
        while len(ids) < B * (T + 1):
            order = torch.randperm(len(documents), generator=generator).tolist()
            ids = torch.cat([ids, *(documents[i] for i in order)])
        yield ids[: B * (T + 1)].view(B, T + 1)
        ids = ids[B * (T + 1) :]


@torch.no_grad()
def evaluate(model: Decoder, ids_T: Tensor) -> float:
    """Mean loss over all tokens of a text but the first, in windows of the whole context; nats."""
    total = 0.0
    for start in range(0, len(ids_T) - 1, LONG_WINDOW):
        ids = ids_T[start : start + LONG_WINDOW + 1]
        logits_TV = model.logits(model(ids[None, :-1], torch.arange(len(ids) - 1, device=ids.device)[None]))[0]
        total += functional.cross_entropy(logits_TV, ids[1:], reduction="sum").item()
    return total / (len(ids_T) - 1)


def unigram_loss(train_ids: Tensor, target_ids: Tensor) -> float:
    """Mean loss of the training text's token frequencies, each counted once more than it occurs; nats."""
    counts_V = torch.bincount(train_ids, minlength=CONFIG.vocab_size).double() + 1
    return -(counts_V / counts_V.sum()).log()[target_ids].mean().item()


# The checkpoint


def hugging_face_weights(model: Decoder) -> dict[str, Tensor]:
    """The model's weights under Hugging Face's names, matrices [N, K], those of a site apart, in layer order."""
    config = model.config
    weights = {"model.embed_tokens.weight": model.embedding.detach()}
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        prefix = f"model.layers.{number}"
        weights[f"{prefix}.input_layernorm.weight"] = layer.attn_norm.weight.detach()
        weights[f"{prefix}.post_attention_layernorm.weight"] = layer.mlp_norm.weight.detach()
        for site in layer.sites:
            block = "self_attn" if site.name.startswith("attn") else "mlp"
            for matrix in site.matrices:
                weight_KN = getattr(layer, site.name).matrix(matrix).detach()
                weights[f"{prefix}.{block}.{matrix}_proj.weight"] = weight_KN.T.contiguous()
    weights["model.norm.weight"] = model.norm.weight.detach()
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = model.lm_head.detach()
    return weights


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a Llama whose weights are stored in bfloat16."""
    return {
        "architectures": ["LlamaForCausalLM"],
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
        "model_type": "llama",
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
    """Shards of about equal size, cut between tensors in their order, and the index."""
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
