"""Sections of the study file that one step reads: frozen and checked when made.

They lie apart from `sparsetrace.study`, so that a change to the study's format or to a method re-runs no step that
does not use it. Each field's description is also the help of the command-line option that carries it.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Shards have five digits in file names. Seeds are keys of 64 bits. Other numbers have limits far beyond what a model
# reads, so that what is planned from them stays small or fails at once.
MOST_SHARDS = 99_999
MOST_SEED = (1 << 64) - 1
MOST_TOKENS = 1 << 40
MOST_POSITIONS = 1 << 24
MOST_SEQUENCES = 1 << 16
Dtype = Literal["auto", "float16", "bfloat16", "float32"]
# Which ones a model has is known when the model is opened.
MatrixName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")]


class Section(BaseModel):
    """A frozen part of the configuration in which unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Conversion(Section):
    """How a checkpoint becomes a runtime model."""

    dtype: Dtype = Field("auto", description="number format of the runtime model; auto keeps the checkpoint's")
    ignore_fields: tuple[str, ...] = Field((), description="fields of config.json known not to alter inference")


class Calibration(Section):
    """Which activations the thresholds are taken from."""

    field: str | None = Field(None, description="field of a .json/.jsonl text that holds the text; found if not given")
    tokens: int = Field(65_536, ge=1, le=MOST_TOKENS, description="tokens counted, at most what the text holds")
    sequence_length: int = Field(
        512, ge=2, le=MOST_POSITIONS, description="tokens per calibration sequence, the begin token included"
    )
    seed: int = Field(
        0, ge=0, le=MOST_SEED, description="which sequences are drawn when the text holds more than asked"
    )
    shards: int = Field(
        1, ge=1, le=MOST_SHARDS, description="parts of the sequences, counted by one job each and added up"
    )


class Greedy(Section):
    """The search behind `allocation: greedy`; its text is the calibration text."""

    field: str | None = Field(None, description="field of a .json/.jsonl text that holds the text; found if not given")
    tokens: int = Field(20_480, ge=1, le=MOST_TOKENS, description="tokens on which the error of a layer is measured")
    sequence_length: int = Field(
        512, ge=4, le=MOST_POSITIONS, description="tokens per sequence; the last quarter of each counts"
    )
    seed: int = Field(0, ge=0, le=MOST_SEED, description="which sequences are drawn")
    step: float = Field(
        0.05, gt=0, lt=1, description="sparsity step of q, 0 < s < 1; larger matrices take smaller steps"
    )

    @property
    def calibration(self) -> Calibration:
        """The sequences that the error is measured on."""
        return Calibration(**self.model_dump(exclude={"step"}))


class Quality(Section):
    """How perplexity, KL divergence and top-1 agreement are measured on held-out text."""

    field: str | None = Field(None, description="field of a .json/.jsonl text that holds the text; found if not given")
    context: int = Field(2048, ge=1, le=MOST_POSITIONS, description="tokens before the scored ones in each window")
    stride: int = Field(
        512, ge=1, le=MOST_POSITIONS, description="tokens scored in each window, and between two windows"
    )
    prefill: Literal["half", "all"] = Field(
        "half", description="part of each window that is sparsified: half (last floor(T/2) positions) or all"
    )
    windows: int | None = Field(
        None, ge=1, le=MOST_TOKENS, description="use only the first N windows; all of the text if not given"
    )


class PromptSet(Section):
    """Which prompts are run."""

    field: str | None = Field(
        None, description="field of a .json/.jsonl prompt set that holds the prompt; found if not given"
    )
    limit: int | None = Field(None, ge=1, le=MOST_TOKENS, description="use only the first N prompts of the file")
    longer: Literal["error", "skip"] = Field("error", description="prompts beyond the context: error or skip")


class Batching(Section):
    """How sequences are batched; fixed by the study file, so that it is the same in every run."""

    max_new_tokens: int = Field(
        64, ge=1, le=MOST_POSITIONS, description="tokens generated per sequence, at most; none with tokens_from text"
    )
    batch_size: int = Field(8, ge=1, le=MOST_SEQUENCES, description="sequences per group, run at fixed shapes")
    shards: int = Field(
        1, ge=1, le=MOST_SHARDS, description="parts of the prompt set, one generate and one pack job each"
    )


class Sampling(Section):
    """How the next token is chosen."""

    temperature: float = Field(0.0, ge=0, description="0 is greedy; otherwise logits are divided by it")
    top_k: int = Field(0, ge=0, le=MOST_TOKENS, description="sample from the k likeliest tokens; 0 is all")
    seed: int = Field(
        0, ge=0, le=MOST_SEED, description="seed of the random draws, each keyed by (seed, sequence, position)"
    )
    ignore_eos: bool = Field(False, description="keep generating after the end-of-sequence token")


class Decoding(Sampling):
    """Where tokens come from and which positions are sparsified."""

    tokens_from: Literal["own", "dense", "text"] = Field(
        "own",
        description="own: sampled from the sparsified model; dense: what the dense model wrote, so that several "
        "settings see the same tokens; text: the prompt set is the text to capture, and nothing is generated",
    )
    replay: Literal["forced", "steps"] = Field(
        "forced", description="tokens of dense or text are fed many positions at once (forced) or one by one (steps)"
    )
    prefill: Literal["none", "half", "all"] = Field(
        "none",
        description="part of each prompt, or text, sparsified and captured: none, half (last floor(T/2)) or all",
    )

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen, whatever model chooses it."""
        return Sampling(**self.model_dump(include=set(Sampling.model_fields)))

    @model_validator(mode="after")
    def _text_is_captured(self) -> Self:
        if self.tokens_from == "text" and self.prefill == "none":
            raise ValueError(
                "prefill must be half or all with tokens_from text, got none: it is the part of each text that is "
                "captured"
            )
        return self


class Capture(Section):
    """Which operands are kept, and what of them; changes nothing that is computed."""

    level: Literal["full", "masks", "stats"] = Field(
        "full", description="full: masks and values; masks: no values; stats: only the statistics of each row"
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="only these layers; all if none is given")
    matrices: tuple[MatrixName, ...] = Field(
        (),
        description="only these matrices of the model, such as q or down; all of its layers' matrices if none is "
        "given; lm_head where it is named",
    )
    every: int = Field(1, ge=1, le=MOST_POSITIONS, description="only positions that are multiples of this")


class Packing(Section):
    """How operands are stored."""

    encoding: Literal["split", "open"] = Field(
        "split", description="split: bitmask and byte planes, near the entropy limit; open: plain lists, larger"
    )
    share_inputs: bool = Field(
        False, description="store matrices that read one masked input (q, k, v; gate, up) once, about a third smaller"
    )


class Machine(Section):
    """Where the model runs."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the GPU if there is one")
    engine: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="torch: the reference; triton: sparse kernels and CUDA graphs; auto takes triton on a GPU where "
        "the method is a threshold on the input and the model 16-bit",
    )
    threads: int = Field(
        1, ge=1, le=MOST_SEQUENCES, description="CPU threads of a step that runs the model; sums may depend on it"
    )
