"""The seam between the engine and whatever runs the model.

The engine decides what is fed (`plan.GroupPlan`) and what is recorded of it; a backend runs the passes. All of them
share how tokens are chosen, so that they differ in the arithmetic of the model alone.
"""

# Shape suffixes: B slots, T positions of one pass, n = B T rows, C hidden, V vocabulary.

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsetrace.core.settings import Batching, Decoding
from sparsetrace.generation.capture import Recorder
from sparsetrace.generation.decode_state import DecodeState
from sparsetrace.generation.plan import GroupPlan
from sparsetrace.model.decoder import Decoder
from sparsetrace.model.patch import Patch
from sparsetrace_kernels.torch_ops import sample

BackendName = Literal["torch", "triton"]


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """What an engine runs, for all groups.

    Args:
        model: with a method installed.
        patch: the method.
        decoding: how tokens are produced.
        batching: how sequences are multiplied together.
        eos: ids that end a sequence.
        backend: what runs the model.
        positions: longest sequence of all groups, in tokens, so that memory is laid out once.
    """

    model: Decoder
    patch: Patch
    decoding: Decoding
    batching: Batching
    eos: frozenset[int]
    backend: BackendName = "torch"
    positions: int = 1

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.embedding.device

    @property
    def ending(self) -> frozenset[int]:
        """Ids that end a sequence while it is decoded: given tokens end where they end."""
        own = self.decoding.tokens_from == "own" and not self.decoding.ignore_eos
        return self.eos if own else frozenset()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A pass over known tokens.

    Args:
        tokens, positions: int64 [B, T].
        sparsified: bool [B, T], rows that the method applies to; True for all, padding included.
        dense: bool [B, T], rows of sequences that run dense; padding is neither.
    """

    tokens: Tensor
    positions: Tensor
    sparsified: Tensor | Literal[True]
    dense: Tensor


class Backend(ABC):
    """Runs the passes of one group after another.

    Args:
        setup: of the engine.
        block_rows: rows of a block; no captured pass has more.

    Attributes:
        state: of the group that was prepared.
    """

    state: DecodeState

    def __init__(self, setup: EngineSetup, block_rows: int) -> None:
        self.setup = setup
        self.block_rows = block_rows
        self._recorder: Recorder | None = None

    @abstractmethod
    def prepare(self, plan: GroupPlan, recorder: Recorder | None) -> None:
        """Begin a group: an empty cache and a state of its own; called before anything of it is recorded."""

    @abstractmethod
    def forward(self, chunk: Chunk, rows_n: Tensor | None) -> Tensor:
        """Run a pass over known tokens.

        Args:
            chunk: what is fed.
            rows_n: ring row of each, as the recorder placed them; None captures nothing.

        Returns:
            [B, T, C] hidden states after the last norm.
        """

    def polling(self) -> tuple[int, int]:
        """Steps between two polls of whether any sequence still runs, and polls whose answer may be outstanding."""
        return 1, 0

    @abstractmethod
    def step(self) -> None:
        """Feed every slot's next token and choose the one after it."""

    @abstractmethod
    def _decode(self, tokens_B1: Tensor, positions_B1: Tensor, rows_B: Tensor | None) -> Tensor:
        """[B, 1, C] hidden states of a decoding step, in which every slot is sparsified; arguments as in `forward`."""

    def choose(self, hidden_BC: Tensor | None, rows_B: Tensor | None = None) -> None:
        """Choose each slot's next token: the teacher-forced one, or one drawn from the logits; none if no step follows.

        Args:
            hidden_BC: last hidden state of each slot; None where nothing has been fed.
            rows_B: ring rows, where the input of the output head is recorded.
        """
        state, decoding = self.state, self.setup.decoding
        if decoding.tokens_from == "own":
            assert hidden_BC is not None
            state.choose(*self._draw(self.head_input(hidden_BC, rows_B)))
            return
        finite_B = state.ones_B if hidden_BC is None else hidden_BC.isfinite().all(-1)
        if decoding.replay == "steps":
            state.choose_forced(finite_B)
        else:
            state.note_finite(finite_B)

    def head_input(self, hidden_BC: Tensor, rows_B: Tensor | None = None) -> Tensor:
        """What the output head multiplies; recorded where that is asked for."""
        if self._recorder is None or not self._recorder.takes_head:
            return hidden_BC
        # a captured operand holds no -0.0
        operand_BC = hidden_BC + 0.0
        if rows_B is not None:
            self._recorder.record_head(rows_B, operand_BC)
        return operand_BC

    def _draw(self, hidden_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Each slot's next token, drawn from its logits, and whether these are finite."""
        state, decoding = self.state, self.setup.decoding
        logits_BV = self.setup.model.logits(hidden_BC)
        drawn_B1 = state.uniform_BP.gather(1, state.position_B[:, None])
        next_B = sample(logits_BV, drawn_B1, decoding.temperature, decoding.top_k)
        return next_B, logits_BV.isfinite().all(-1)

    def _feed_next(self) -> None:
        """A whole decoding step: device work alone, which a CUDA graph can hold."""
        state = self.state
        rows_B = None
        if self._recorder is not None:
            rows_B = self._recorder.place(state.running_B, state.position_B, state.base_B, state.number_B)
        hidden_BTC = self._decode(state.token_B[:, None], state.position_B[:, None], rows_B)
        state.position_B += 1
        self.choose(hidden_BTC[:, 0], rows_B)
