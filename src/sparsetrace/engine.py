"""The torch engine: decodes one group of sequences at fixed shapes, on any device.

Everything that shapes a sum (batch, padding, prefill chunks) follows from the group and the configuration alone, with
capture on or off.
"""

# Shape suffixes: B slots, T positions of one pass, S positions of a slot, V vocabulary.

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sparsetrace.capture import Recorder, Rows, block_rows
from sparsetrace.files import InputError
from sparsetrace.model import Decoder, KVCache
from sparsetrace.patch import Patch, observe
from sparsetrace.prompts import Sequence
from sparsetrace.schema import SITES
from sparsetrace.settings import Batching, Decoding


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What one group produced.

    Args:
        output_ids: sampled ids of each sequence; the last was never fed.
        stopped: whether each ended with an end-of-sequence token.
        fed: columns of `schema.TOKENS` but for token and text, in the order of execution.
    """

    output_ids: list[list[int]]
    stopped: list[bool]
    fed: pa.Table


class Engine:
    """Runs groups through a model.

    Args:
        model: with or without a method installed.
        patch: the installed method; None runs the model as it is.
        decoding: how tokens are produced.
        batching: how sequences are multiplied together.
        eos: ids that end a sequence.
    """

    def __init__(
        self, model: Decoder, patch: Patch | None, decoding: Decoding, batching: Batching, eos: frozenset[int]
    ) -> None:
        self.model = model
        self.patch = patch
        self.decoding = decoding
        self.batching = batching
        self.eos = frozenset() if decoding.ignore_eos else eos
        if patch is not None and patch.method.needs_dense_prefill and decoding.prefill == "all":
            raise InputError(
                f"generate: prefill must be none or half with method {patch.method.name}, which decides by the dense "
                "part of the prompt, got all"
            )
        self.device = model.embedding.device
        self.block_rows = block_rows(model.config, batching.batch_size)

    @torch.inference_mode()
    def run(self, group: list[Sequence], recorder: Recorder | None) -> GroupResult:
        """Prefill and decode a group.

        Args:
            group: at most `batch_size` sequences; the slots left over are padded and thrown away.
            recorder: takes the operands; None captures nothing and changes nothing else.

        Raises:
            InputError: an activation or a logit is not finite.
        """
        B = self.batching.batch_size
        lengths_B = np.ones(B, dtype=np.int64)
        lengths_B[: len(group)] = [len(sequence.prompt_ids) for sequence in group]
        longest = int(lengths_B.max())
        tokens_BT = np.zeros((B, longest), dtype=np.int64)
        for slot, sequence in enumerate(group):
            tokens_BT[slot, : lengths_B[slot]] = sequence.prompt_ids
        if self.patch is not None:
            self.patch.begin()
        cache = KVCache(self.model.config, B, longest + self.batching.max_new_tokens - 1, self.device)
        self._fed: list[dict[str, np.ndarray]] = []

        hidden_BC = self._prefill(group, tokens_BT, lengths_B, cache, recorder)
        uniform_BS = uniforms(self.decoding.seed, group, longest + self.batching.max_new_tokens, B).to(self.device)
        running_B = np.arange(B) < len(group)
        stopped_B = np.zeros(B, dtype=bool)
        outputs: list[list[int]] = [[] for _ in group]
        for step in range(self.batching.max_new_tokens):
            logits_BV = self.model.logits(hidden_BC)
            self._refuse_not_finite(logits_BV, running_B, group, tokens_BT, lengths_B, recorder)
            positions_B = lengths_B + step
            drawn_B = uniform_BS.gather(1, torch.from_numpy(positions_B).to(self.device)[:, None])
            next_B = sample(logits_BV, drawn_B, self.decoding.temperature, self.decoding.top_k).cpu().numpy()
            for slot in np.flatnonzero(running_B).tolist():
                outputs[slot].append(int(next_B[slot]))
                stopped_B[slot] = next_B[slot] in self.eos
            running_B &= ~stopped_B
            if step + 1 == self.batching.max_new_tokens or not running_B.any():
                break
            rows_B1 = running_B[:, None]
            hidden_BTC = self._pass(
                group, next_B[:, None], positions_B[:, None], rows_B1, rows_B1, "decode", cache, recorder
            )
            hidden_BC = hidden_BTC[:, 0]
        if recorder is not None:
            recorder.close()
        columns = {name: np.concatenate([fed[name] for fed in self._fed]) for name in self._fed[0]}
        return GroupResult(outputs, [bool(s) for s in stopped_B[: len(group)]], pa.table(columns))

    def _prefill(
        self,
        group: list[Sequence],
        tokens_BT: np.ndarray,
        lengths_B: np.ndarray,
        cache: KVCache,
        recorder: Recorder | None,
    ) -> Tensor:
        """Feed the prompts; returns the hidden state of each one's last position, [B, C]."""
        hidden_BC: Tensor | None = None
        for start, stop in self._prefill_chunks(tokens_BT.shape[1]):
            positions_BT = np.broadcast_to(np.arange(start, stop), (len(tokens_BT), stop - start))
            real_BT = positions_BT < lengths_B[:, None]
            real_BT[len(group) :] = False
            sparsified_BT = real_BT & (positions_BT >= self._first_sparsified(lengths_B)[:, None])
            hidden_BTC = self._pass(
                group, tokens_BT[:, start:stop], positions_BT, real_BT, sparsified_BT, "prefill", cache, recorder
            )
            last = torch.from_numpy(np.clip(lengths_B - 1 - start, 0, stop - start - 1)).to(self.device)
            ends_here = torch.from_numpy((lengths_B > start) & (lengths_B <= stop)).to(self.device)
            chunk_BC = hidden_BTC[torch.arange(len(tokens_BT), device=self.device), last]
            hidden_BC = chunk_BC if hidden_BC is None else torch.where(ends_here[:, None], chunk_BC, hidden_BC)
        assert hidden_BC is not None
        return hidden_BC

    def _prefill_chunks(self, longest: int) -> Iterator[tuple[int, int]]:
        """Prompt positions run at once: all where none is captured, else what one block holds."""
        none = self.decoding.prefill == "none"
        width = longest if none else max(1, self.block_rows // self.batching.batch_size)
        for start in range(0, longest, width):
            yield start, min(start + width, longest)

    def _first_sparsified(self, lengths_B: np.ndarray) -> np.ndarray:
        """The prompt position from which on each sequence is sparsified."""
        match self.decoding.prefill:
            case "none":
                return lengths_B
            case "half":
                return lengths_B - lengths_B // 2
            case "all":
                return np.zeros_like(lengths_B)

    def _pass(
        self,
        group: list[Sequence],
        tokens_BT: np.ndarray,
        positions_BT: np.ndarray,
        real_BT: np.ndarray,
        sparsified_BT: np.ndarray,
        phase: str,
        cache: KVCache,
        recorder: Recorder | None,
    ) -> Tensor:
        """One forward pass: note what is fed, announce what is captured, run. Returns hidden states [B, T, C]."""
        none_BT = np.zeros_like(sparsified_BT)
        captured_BT = none_BT if recorder is None else sparsified_BT & recorder.samples(positions_BT)
        self._note(group, tokens_BT, positions_BT, real_BT, sparsified_BT, captured_BT, phase)
        slots, columns = np.nonzero(captured_BT)
        capture = recorder is not None and len(slots) > 0
        if self.patch is not None:
            # Padding and ended slots in a decode pass are sparsified too, and thrown away: their rows are nobody's.
            every = phase == "decode" or self.decoding.prefill == "all"
            some = torch.from_numpy(sparsified_BT).to(self.device) if sparsified_BT.any() else False
            self.patch.sparsified_BT = True if every else some
            dense_BT = real_BT & ~sparsified_BT
            self.patch.dense_BT = torch.from_numpy(dense_BT).to(self.device) if dense_BT.any() else None
            self.patch.record = recorder.record if recorder is not None and capture else None
            self.patch.record_outputs = recorder.record_outputs if recorder is not None and capture else None
        if recorder is not None and capture:
            assert self.patch is not None, "capture needs an installed method; `dense` drops nothing"
            bases = np.array([sequence.base for sequence in group])[slots]
            numbers = np.array([sequence.sequence for sequence in group])[slots]
            position = positions_BT[slots, columns]
            index = slots * tokens_BT.shape[1] + columns
            recorder.begin(Rows(index, bases + position, numbers, position))
        # copied: positions are a broadcast view, which torch must not alias
        hidden: Tensor = self.model(
            torch.from_numpy(tokens_BT.copy()).to(self.device),
            torch.from_numpy(positions_BT.copy()).to(self.device),
            cache,
        )
        if recorder is not None and capture:
            recorder.end()
        return hidden

    def _note(
        self,
        group: list[Sequence],
        tokens_BT: np.ndarray,
        positions_BT: np.ndarray,
        real_BT: np.ndarray,
        sparsified_BT: np.ndarray,
        captured_BT: np.ndarray,
        phase: str,
    ) -> None:
        slots, columns = np.nonzero(real_BT)
        step = len(self._fed)
        self._fed.append(
            {
                "sequence": np.array([sequence.sequence for sequence in group], dtype=np.int32)[slots],
                "position": positions_BT[slots, columns].astype(np.int32),
                "token_id": tokens_BT[slots, columns].astype(np.int32),
                "phase": np.full(len(slots), phase),
                "captured": captured_BT[slots, columns],
                "sparsified": sparsified_BT[slots, columns],
                "group": np.full(len(slots), group[0].group, dtype=np.int32),
                "step": np.full(len(slots), step, dtype=np.int32),
                "slot": slots.astype(np.int32),
            }
        )

    def _refuse_not_finite(
        self,
        logits_BV: Tensor,
        running_B: np.ndarray,
        group: list[Sequence],
        tokens_BT: np.ndarray,
        lengths_B: np.ndarray,
        recorder: Recorder | None,
    ) -> None:
        bad_B = ~logits_BV.isfinite().all(-1).cpu().numpy() & running_B
        if not bad_B.any():
            return
        self._name_not_finite(group, tokens_BT, lengths_B)
        if recorder is not None:
            # refuses what was captured after the prompt
            recorder.close()
        sequence = group[int(bad_B.argmax())].sequence
        raise InputError(f"generate: logits must be finite, got Inf or NaN in sequence {sequence}")

    def _name_not_finite(self, group: list[Sequence], tokens_BT: np.ndarray, lengths_B: np.ndarray) -> None:
        """Feed the prompts again, looking at what enters every site: positions that run dense are not captured."""
        chunks = self._prefill_chunks(tokens_BT.shape[1])
        start = 0

        def see(layer: int, site: str, x_BTK: Tensor) -> None:
            nonlocal start
            if layer == 0 and site == next(iter(SITES)):
                start, _ = next(chunks)
            bad_BT = ~x_BTK.isfinite().all(-1).cpu().numpy()
            for slot, column in zip(*np.nonzero(bad_BT[: len(group)]), strict=True):
                position = start + int(column)
                if position < lengths_B[slot]:
                    sequence = group[slot]
                    raise InputError(
                        f"generate: activations must be finite, got Inf or NaN in layer {layer}, matrix "
                        f"{SITES[site][0]}, token {sequence.base + position} (sequence {sequence.sequence}, position "
                        f"{position}): the checkpoint may need a dtype of wider range"
                    )

        cache = KVCache(self.model.config, len(tokens_BT), tokens_BT.shape[1], self.device)
        with observe(self.model, see):
            self._prefill(group, tokens_BT, lengths_B, cache, None)


def uniforms(seed: int, group: list[Sequence], positions: int, batch: int) -> Tensor:
    """[B, S] float64 in [0, 1): the draw of each slot and position, keyed by (seed, sequence, position) alone."""
    draws_BS = np.zeros((batch, positions))
    for slot, sequence in enumerate(group):
        generator = np.random.Generator(np.random.Philox(key=[seed, sequence.sequence]))
        draws_BS[slot] = generator.random(positions)
    return torch.from_numpy(draws_BS)


def sample(logits_BV: Tensor, uniform_B1: Tensor, temperature: float, top_k: int) -> Tensor:
    """Next token of each slot: the likeliest, or the inverse of the cumulative distribution at a uniform draw.

    Args:
        logits_BV: float32, finite.
        uniform_B1: float64 in [0, 1).
        temperature: 0 is greedy.
        top_k: 0 is all.

    Returns:
        int64 [B].
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    scaled_BV = logits_BV.double() / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        least_B1 = scaled_BV.topk(top_k, dim=-1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, -torch.inf)
    cumulative_BV = scaled_BV.softmax(-1).cumsum(-1)
    # scaled by the last sum, which rounding may leave off one, so that no draw falls beyond the vocabulary
    return (cumulative_BV <= uniform_B1 * cumulative_BV[:, -1:]).sum(-1)
