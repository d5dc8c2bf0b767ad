"""The engines: they decode one group of sequences at fixed shapes, and capture.

`torch` is the reference, on any device, in eager mode. `triton` runs `fused.FusedDecoder` on a GPU, each decoding step
as one CUDA graph, and so each pass over known tokens whose shape comes again. Both share everything else: a step works
on static tensors of the device, sampling included, and the host only looks now and then whether any sequence still
runs.

Everything that shapes a sum (batch, padding, prefill chunks) follows from the group and the configuration alone, with
capture on or off.
"""

# Shape suffixes: B slots, T positions of one pass, n = B T rows, P positions of a sequence, V vocabulary.

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Batching, Decoding
from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.formats.names import SITES
from sparsetrace.generation.capture import Recorder, block_rows
from sparsetrace.generation.prompts import Sequence
from sparsetrace.methods import MatrixRule, Method
from sparsetrace.model.decoder import Decoder, KVCache
from sparsetrace.model.patch import Patch, observe
from sparsetrace_kernels.reference import DENSE, advance_ref, sample

Kind = Literal["torch", "triton"]
Returned = TypeVar("Returned")

# Caches are a multiple of so many positions long: attention with a bias pads others.
ALIGNED_POSITIONS = 8
# Decoding steps between two looks at whether any sequence still runs, and looks that the device may be behind.
GPU_BURST, GPU_BEHIND = 8, 1
# Graphs of passes over known tokens that are kept, of the shapes seen last.
KEPT_PASSES = 8


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What one group produced.

    Args:
        output_ids: ids that follow each prompt, sampled or given; the last was never fed.
        stopped: whether each ended with an end-of-sequence token.
        fed: columns of `tables.TOKENS` but for token and text, in the order of execution.
    """

    output_ids: list[list[int]]
    stopped: list[bool]
    fed: pa.Table


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a group's tokens are fed: some at once, then others step by step.

    Args:
        at_once: ids of each sequence.
        sparse_from, forced_from: int64 [B], the position of `at_once` from which on each is sparsified, and from which
            on its phase is `forced`.
        steps: passes that follow, at most.
        given: ids that follow `at_once`, of which the last is not fed; None where they are sampled.
        outputs: what the result says was put out; None where that is what follows `at_once`.
    """

    at_once: list[list[int]]
    sparse_from: np.ndarray
    forced_from: np.ndarray
    steps: int
    given: list[list[int]] | None = None
    outputs: list[list[int]] | None = None

    def positions(self) -> int:
        """Positions of the longest sequence that is fed, up to a multiple that attention needs no padding for."""
        return _aligned(max(map(len, self.at_once)) + self.steps)

    def limits(self, max_new_tokens: int) -> list[int]:
        """How many tokens are chosen for each sequence, at most."""
        if self.given is not None:
            return [len(ids) for ids in self.given]
        return [max_new_tokens if self.outputs is None else 0] * len(self.at_once)


class Engine:
    """Runs groups through a model.

    Args:
        model: with a method installed.
        patch: the method.
        decoding: how tokens are produced.
        batching: how sequences are multiplied together.
        eos: ids that end a sequence.
        kind: of engine.
        positions: that the longest sequence of all groups has, so that the triton engine's memory is laid out once.

    Raises:
        InputError: the engine cannot run this model under this method.
    """

    def __init__(
        self,
        model: Decoder,
        patch: Patch,
        decoding: Decoding,
        batching: Batching,
        eos: frozenset[int],
        kind: Kind = "torch",
        positions: int = 1,
    ) -> None:
        self.model = model
        self.patch = patch
        self.decoding = decoding
        self.batching = batching
        self.eos = frozenset() if decoding.ignore_eos else eos
        if patch.method.needs_dense_prefill and decoding.prefill == "all":
            raise InputError(
                f"generate: prefill must be none or half with method {patch.method.name}, which decides by the dense "
                "part of the prompt, got all"
            )
        self.device = model.embedding.device
        self.block_rows = block_rows(model.config, patch.parts, batching.batch_size, self.device)
        # tokens that are given end where they end
        self._ending = self.eos if decoding.tokens_from == "own" else frozenset()
        self._given = decoding.tokens_from != "own" and decoding.replay == "steps"
        self._fused: _Fused | None = None
        if kind == "triton":
            self._fused = _Fused(
                model, patch, batching.batch_size, positions, self._ending, decoding.temperature, self.block_rows
            )

    @torch.inference_mode()
    def run(
        self, group: list[Sequence], recorder: Recorder | None, given: list[list[int]] | None = None
    ) -> GroupResult:
        """Feed a group's prompts, then what follows them.

        Args:
            group: at most `batch_size` sequences; the slots left over are padded and thrown away.
            recorder: takes the operands, and is left open; None captures nothing and changes nothing else.
            given: with `tokens_from: dense`, the ids that follow each prompt.

        Raises:
            InputError: an activation or a logit is not finite.
        """
        plan = self._plan(group, given)
        B = self.batching.batch_size
        self.patch.begin()
        if self._fused is not None:
            # before anything is captured: this may run a step
            self._fused.prepare(self, plan, recorder)
            cache, loop = self._fused.cache, self._fused.loop
        else:
            cache = KVCache(self.model.config, B, plan.positions(), self.device)
            loop = _Loop(B, plan.positions(), self._ending, self.device)
        # its copies are waited for, so it goes before the prompts, behind which the first steps then queue up
        loop.begin(group, plan, self.decoding.seed, self.batching.max_new_tokens)
        fed: list[dict[str, np.ndarray]] = []
        hidden_BC = self._feed_at_once(group, plan, cache.first(plan.positions()), recorder, fed)
        self._choose(loop, hidden_BC)
        finite = self._decode(group, plan, cache, loop, recorder)
        if not finite:
            self._refuse_not_finite(group, plan, loop, recorder)
        chosen = loop.outputs(group, plan)
        if plan.steps:
            fed.append(_note_steps(group, plan, chosen, recorder, len(fed)))
        columns = {name: np.concatenate([part[name] for part in fed]) for name in fed[0]}
        outputs = chosen if plan.outputs is None else plan.outputs
        return GroupResult(outputs, [bool(ids) and ids[-1] in self.eos for ids in outputs], pa.table(columns))

    def _plan(self, group: list[Sequence], given: list[list[int]] | None) -> _Plan:
        B = self.batching.batch_size
        prompts = [sequence.prompt_ids for sequence in group]
        lengths_B = np.ones(B, dtype=np.int64)
        lengths_B[: len(group)] = [len(ids) for ids in prompts]
        first_B = self._first_sparsified(lengths_B)
        forced = self.decoding.replay == "forced"
        match self.decoding.tokens_from:
            case "own":
                return _Plan(prompts, first_B, lengths_B, self.batching.max_new_tokens - 1)
            case "dense":
                assert given is not None and all(given), "a sequence has at least one token that follows"
                if forced:
                    whole = [ids + more[:-1] for ids, more in zip(prompts, given, strict=True)]
                    return _Plan(whole, first_B, lengths_B, 0, outputs=given)
                # as many as the dense model had room for, so that the cache is as long as its was
                steps = max(self.batching.max_new_tokens, *map(len, given)) - 1
                return _Plan(prompts, first_B, lengths_B, steps, given)
            case "text":
                nothing: list[list[int]] = [[] for _ in group]
                if forced:
                    return _Plan(prompts, first_B, np.zeros_like(lengths_B), 0, outputs=nothing)
                at_once = [ids[:first] for ids, first in zip(prompts, first_B, strict=False)]
                # the last id is given to be left out
                rest = [[*ids[first:], 0] for ids, first in zip(prompts, first_B, strict=False)]
                return _Plan(at_once, first_B, first_B, max(map(len, rest)) - 1, rest, nothing)

    def _first_sparsified(self, lengths_B: np.ndarray) -> np.ndarray:
        """The prompt position from which on each sequence is sparsified."""
        match self.decoding.prefill:
            case "none":
                return lengths_B
            case "half":
                return lengths_B - lengths_B // 2
            case "all":
                return np.zeros_like(lengths_B)

    def _feed_at_once(
        self,
        group: list[Sequence],
        plan: _Plan,
        cache: KVCache,
        recorder: Recorder | None,
        fed: list[dict[str, np.ndarray]],
        *,
        reference: bool = False,
    ) -> Tensor | None:
        """Feed what is known beforehand; returns the hidden state of each one's last position, [B, C].

        Args:
            fed: is told what was fed.
            reference: run the model itself, whatever the engine.
        """
        B = self.batching.batch_size
        lengths_B = np.ones(B, dtype=np.int64)
        lengths_B[: len(group)] = [len(ids) for ids in plan.at_once]
        longest = max(map(len, plan.at_once))
        tokens_BP = np.zeros((B, longest), dtype=np.int64)
        for slot, ids in enumerate(plan.at_once):
            tokens_BP[slot, : len(ids)] = ids
        positions_BP = np.broadcast_to(np.arange(longest), (B, longest))
        real_BP = positions_BP < lengths_B[:, None]
        real_BP[len(group) :] = False
        sparsified_BP = real_BP & (positions_BP >= plan.sparse_from[:, None])
        captured_BP = sparsified_BP & (recorder.samples(positions_BP) if recorder is not None else False)
        phase_BP = np.where(positions_BP >= plan.forced_from[:, None], "forced", "prefill")
        bases_B, numbers_B = _labels(group, B)
        # to the device at once: a copy between two passes would wait for the first
        host = tokens_BP, positions_BP, sparsified_BP, bases_B[:, None], numbers_B[:, None], lengths_B[:, None]
        device = [torch.from_numpy(np.broadcast_to(part, (B, longest)).copy()).to(self.device) for part in host]
        hidden_BC: Tensor | None = None
        for start, stop in self._chunks(longest):
            span = np.s_[:, start:stop]
            tokens_BT, positions_BT, *places, ends_BT = (part_BP[span].contiguous() for part_BP in device)
            chosen_n, bases_n, numbers_n = (part_BT.view(-1) for part_BT in places)
            fed.append(
                _note(
                    group,
                    step=len(fed),
                    tokens_BT=tokens_BP[span],
                    positions_BT=positions_BP[span],
                    real_BT=real_BP[span],
                    sparsified_BT=sparsified_BP[span],
                    captured_BT=captured_BP[span],
                    phase_BT=phase_BP[span],
                )
            )
            rows_n = None
            if recorder is not None and captured_BP[span].any():
                recorder.reserve(int(captured_BP[span].sum()))
                rows_n = recorder.place(chosen_n, positions_BT.view(-1), bases_n, numbers_n)
            # with all of the prompt sparsified, padding is too: its rows are nobody's
            whole = self.decoding.prefill == "all"
            if self._fused is not None and not reference:
                masked_n = None if whole else chosen_n
                hidden_BTC = self._fused.rows(tokens_BT, positions_BT, cache, rows_n, masked_n)
            else:
                taken = recorder if rows_n is not None else None
                masked_BT = None if whole else sparsified_BP[span]
                dense_BT = real_BP[span] & ~sparsified_BP[span]
                hidden_BTC = self._run_model(tokens_BT, positions_BT, cache, taken, masked_BT, dense_BT)
            last_B = ends_BT[:, 0] - 1 - start
            chunk_BC = hidden_BTC[torch.arange(B, device=self.device), last_B.clamp(0, stop - start - 1)]
            ends_here_B = (last_B >= 0) & (last_B < stop - start)
            hidden_BC = chunk_BC if hidden_BC is None else torch.where(ends_here_B[:, None], chunk_BC, hidden_BC)
        return hidden_BC

    def _chunks(self, longest: int) -> Iterator[tuple[int, int]]:
        """Positions fed at once: all where none is captured, else what one block holds."""
        source, steps = self.decoding.tokens_from, self.decoding.replay == "steps"
        dense = (self.decoding.prefill == "none" and (source == "own" or steps)) or (source == "text" and steps)
        width = max(1, longest if dense else self.block_rows // self.batching.batch_size)
        for start in range(0, longest, width):
            yield start, min(start + width, longest)

    def _run_model(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        cache: KVCache,
        recorder: Recorder | None,
        masked_BT: np.ndarray | None = None,
        dense_BT: np.ndarray | None = None,
    ) -> Tensor:
        """One pass of the model itself, the reference: hidden states [B, T, C].

        Args:
            recorder: takes the operands of the rows that were placed; None where none was.
            masked_BT: bool, the positions that the method applies to; None for all.
            dense_BT: bool, positions of sequences that it does not apply to; None for none.
        """

        def flags(chosen_BT: np.ndarray | None) -> Tensor | None:
            some = chosen_BT is not None and chosen_BT.any()
            return torch.from_numpy(chosen_BT).to(self.device) if some else None

        masked = flags(masked_BT)
        self.patch.sparsified_BT = masked_BT is None if masked is None else masked
        self.patch.dense_BT = flags(dense_BT)
        self.patch.record = recorder.record if recorder is not None else None
        self.patch.record_outputs = recorder.record_outputs if recorder is not None else None
        hidden: Tensor = self.model(tokens_BT, positions_BT, cache)
        return hidden

    def step(self, loop: "_Loop", cache: KVCache, recorder: Recorder | None) -> None:
        """Feed every slot's next token and choose the one after: device work alone, which a CUDA graph can hold."""
        rows_B = None
        if recorder is not None:
            rows_B = recorder.place(loop.running_B, loop.position_B, loop.base_B, loop.number_B)
        tokens_B1, positions_B1 = loop.token_B[:, None], loop.position_B[:, None]
        if self._fused is not None:
            hidden_BTC = self._fused.step(tokens_B1, positions_B1, rows_B)
        else:
            hidden_BTC = self._run_model(tokens_B1, positions_B1, cache, recorder)
        loop.position_B += 1
        self._choose(loop, hidden_BTC[:, 0])

    def _choose(self, loop: "_Loop", hidden_BC: Tensor | None) -> None:
        """Each slot's next token: the one given, or one drawn from the logits; none where no step follows."""
        if self.decoding.tokens_from == "own":
            assert hidden_BC is not None
            if self._fused is not None and self.decoding.top_k == 0:
                loop.choose(*self._fused.draw(hidden_BC, loop))
                return
            logits_BV = self.model.logits(hidden_BC)
            drawn_B1 = loop.uniform_BP.gather(1, loop.position_B[:, None])
            next_B = sample(logits_BV, drawn_B1, self.decoding.temperature, self.decoding.top_k)
            loop.choose(next_B, logits_BV.isfinite().all(-1))
            return
        finite_B = loop.ones_B if hidden_BC is None else hidden_BC.isfinite().all(-1)
        if self._given:
            loop.choose(loop.given_PB.index_select(0, loop.count)[0], finite_B)
        else:
            loop.finite_B &= finite_B | ~loop.running_B

    def _decode(
        self, group: list[Sequence], plan: _Plan, cache: KVCache, loop: "_Loop", recorder: Recorder | None
    ) -> bool:
        """Run the steps; returns whether everything was finite."""
        graphs = self._fused is not None and self._fused.graphs
        burst, behind = (GPU_BURST, GPU_BEHIND) if graphs else (1, 0)
        looks = deque([loop.look()])
        lengths = np.array([len(ids) for ids in plan.at_once])
        limits = np.array(plan.limits(self.batching.max_new_tokens))
        for step in range(plan.steps):
            if step % burst == 0 and len(looks) > behind:
                alive, finite = looks.popleft()()
                if not finite:
                    return False
                if not alive:
                    break
            if recorder is not None:
                may_run = step + 1 < limits
                recorder.reserve(int((may_run & recorder.samples(lengths + step)).sum()))
            if self._fused is not None and graphs:
                self._fused.replay()
            else:
                self.step(loop, cache, recorder)
            if step % burst == burst - 1:
                looks.append(loop.look())
        return loop.look()()[1]

    def _refuse_not_finite(self, group: list[Sequence], plan: _Plan, loop: "_Loop", recorder: Recorder | None) -> None:
        self._name_not_finite(group, plan)
        if recorder is not None:
            # refuses what was captured after the prompt
            recorder.close()
        bad = int((~loop.finite_B[: len(group)]).cpu().numpy().argmax())
        raise InputError(f"generate: logits must be finite, got Inf or NaN in sequence {group[bad].sequence}")

    def _name_not_finite(self, group: list[Sequence], plan: _Plan) -> None:
        """Feed the prompts again, looking at what enters every site: positions that run dense are not captured."""
        longest = max(map(len, plan.at_once))
        chunks = self._chunks(longest)
        start = 0

        def see(layer: int, site: str, x_BTK: Tensor) -> None:
            nonlocal start
            if layer == 0 and site == next(iter(SITES)):
                start, _ = next(chunks)
            bad_BT = ~x_BTK.isfinite().all(-1).cpu().numpy()
            for slot, column in zip(*np.nonzero(bad_BT[: len(group)]), strict=True):
                position = start + int(column)
                if position < len(plan.at_once[slot]):
                    sequence = group[slot]
                    raise InputError(
                        f"generate: activations must be finite, got Inf or NaN in layer {layer}, matrix "
                        f"{SITES[site][0]}, token {sequence.base + position} (sequence {sequence.sequence}, position "
                        f"{position}): the checkpoint may need a dtype of wider range"
                    )

        cache = KVCache(self.model.config, self.batching.batch_size, max(longest, 1), self.device)
        with observe(self.model, see):
            self._feed_at_once(group, plan, cache, None, [], reference=True)


class _Loop:
    """What a decoding step reads and writes: static tensors of the device.

    Args:
        batch: slots.
        positions: of the longest sequence.
        eos: ids that end a sequence.
        device: of the model.
    """

    def __init__(self, batch: int, positions: int, eos: frozenset[int], device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token_B, self.position_B = zeros(batch), zeros(batch)
        self.base_B, self.number_B, self.limit_B = zeros(batch), zeros(batch), zeros(batch)
        self.running_B, self.finite_B = zeros(batch, dtype=torch.bool), zeros(batch, dtype=torch.bool)
        self.ones_B = ~zeros(batch, dtype=torch.bool)
        # chosen tokens, one row for each choice so far; and those to choose
        self.count = zeros(1)
        self.chosen_PB, self.given_PB = zeros(positions + 1, batch), zeros(positions + 1, batch)
        self.uniform_BP = zeros(batch, positions + 1, dtype=torch.float64)
        self._eos = torch.tensor(sorted(eos), dtype=torch.int64, device=device)
        self._flags = zeros(2, dtype=torch.bool)
        self._advance = advance_ref
        if device.type == "cuda":
            # imported late, as in `_Fused`
            from sparsetrace_kernels.decode_state import advance

            self._advance = advance

    def begin(self, group: list[Sequence], plan: _Plan, seed: int, max_new_tokens: int) -> None:
        """Start behind what was fed at once."""
        batch, positions = self.uniform_BP.shape
        bases_B, numbers_B = _labels(group, batch)
        lengths_B, limits_B = np.zeros(batch, dtype=np.int64), np.zeros(batch, dtype=np.int64)
        lengths_B[: len(group)] = [len(ids) for ids in plan.at_once]
        limits_B[: len(group)] = plan.limits(max_new_tokens)
        for tensor, values in (
            (self.position_B, lengths_B),
            (self.base_B, bases_B),
            (self.number_B, numbers_B),
            (self.limit_B, limits_B),
        ):
            tensor.copy_(torch.from_numpy(values))
        self.running_B.copy_(torch.arange(batch) < len(group))
        self.finite_B.fill_(True)
        self.count.zero_()
        self.token_B.zero_()
        self.uniform_BP.copy_(uniforms(seed, group, positions, batch))
        if plan.given is not None:
            given_PB = np.zeros(self.given_PB.shape, dtype=np.int64)
            for slot, ids in enumerate(plan.given):
                given_PB[: len(ids), slot] = ids
            self.given_PB.copy_(torch.from_numpy(given_PB))

    def rest(self) -> None:
        """Run no slot, so that a step captures nothing and stays within the tables."""
        for tensor in (self.running_B, self.position_B, self.count):
            tensor.zero_()

    def choose(self, next_B: Tensor, finite_B: Tensor) -> None:
        """Set the token that each slot is fed next.

        Args:
            next_B: int64.
            finite_B: bool, whether all that it was chosen by is finite.
        """
        self._advance(
            next_B,
            finite_B,
            self._eos,
            self.limit_B,
            self.chosen_PB,
            self.count,
            self.token_B,
            self.running_B,
            self.finite_B,
        )

    def look(self) -> Callable[[], tuple[bool, bool]]:
        """Ask whether any slot runs, and whether all was finite; the answer is waited for when it is called for."""
        torch.stack([self.running_B.any(), self.finite_B.all()], out=self._flags)
        if self._flags.device.type != "cuda":
            alive, finite = self._flags.tolist()
            return lambda: (alive, finite)
        answer = torch.empty(2, dtype=torch.bool, pin_memory=True)
        answer.copy_(self._flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def wait() -> tuple[bool, bool]:
            event.synchronize()
            alive, finite = answer.tolist()
            return alive, finite

        return wait

    def outputs(self, group: list[Sequence], plan: _Plan) -> list[list[int]]:
        """The tokens chosen for each sequence."""
        if plan.given is not None:
            return plan.given
        chosen_PB = self.chosen_PB[: int(self.count)].cpu().numpy()
        limits = self.limit_B.cpu().numpy()
        eos = set(self._eos.tolist())
        outputs = []
        for slot in range(len(group)):
            ids = chosen_PB[: limits[slot], slot].tolist()
            end = next((at for at, token_id in enumerate(ids) if token_id in eos), len(ids) - 1)
            outputs.append(ids[: end + 1])
        return outputs


class _Fused:
    """The kernels' decoder with what CUDA graphs point to; laid out once for all groups.

    Args:
        graph_rows: of a pass over known tokens, at most, for it to be recorded in a graph, whose memory is its own.
    """

    def __init__(
        self,
        model: Decoder,
        patch: Patch,
        batch: int,
        positions: int,
        eos: frozenset[int],
        temperature: float,
        graph_rows: int,
    ) -> None:
        # imported late: the torch engine also runs where Triton is not installed
        from sparsetrace.generation.fused import FusedDecoder
        from sparsetrace_kernels.checks import new_arrivals
        from sparsetrace_kernels.configs import active_table
        from sparsetrace_kernels.draw_tokens import draw_tokens

        self._batch = batch
        self._eos = eos
        self._graph_rows = graph_rows
        self._recorder: Recorder | None = None
        self.device = model.embedding.device
        self.graphs = self.device.type == "cuda"
        table = active_table(torch.cuda.get_device_name(self.device)) if self.graphs else None
        # as a plan's are, so that the longest group fits
        self.decoder = FusedDecoder(model, patch, _aligned(positions), table)
        self._lay_out(_aligned(positions))
        heat = torch.tensor([temperature], dtype=torch.float64, device=self.device) if temperature else None
        self._draw = partial(draw_tokens, temperature=heat, arrivals_C=new_arrivals(self.device))

    def _lay_out(self, positions: int) -> None:
        self.positions = positions
        self.cache = KVCache(self.decoder.config, self._batch, positions, self.device)
        self.loop = _Loop(self._batch, positions, self._eos, self.device)
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        # by (T, positions of the cache), in the order of their last use; they take turns in one pool of memory
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None

    def prepare(self, engine: Engine, plan: _Plan, recorder: Recorder | None) -> None:
        """Begin a group: enough memory, an empty cache, and a captured step if it takes any."""
        if plan.positions() > self.positions:
            self.decoder.extend(plan.positions())
            self._lay_out(plan.positions())
        if recorder is not self._recorder:
            self.decoder.use(recorder)
            self._recorder = recorder
            self._forget_graphs()
        if self._graph is None and self.graphs and plan.steps:
            self.loop.rest()
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                # compiles, and takes all memory, outside the capture, where running out of it can be caught
                engine.step(self.loop, self.cache, recorder)
            torch.cuda.current_stream().wait_stream(side)
            self._graph, _ = _captured(lambda: engine.step(self.loop, self.cache, recorder))
        used = self.cache.first(plan.positions())
        used.k_LBSGD.zero_()
        used.v_LBSGD.zero_()

    def replay(self) -> None:
        """One step."""
        assert self._graph is not None
        self._graph.replay()

    def step(self, tokens_B1: Tensor, positions_B1: Tensor, rows_B: Tensor | None) -> Tensor:
        """Hidden states [B, 1, C] of a decoding step; every slot is masked."""
        rows_B = self._nowhere(self._batch) if rows_B is None else rows_B
        return self.decoder(tokens_B1, positions_B1, self.cache, rows_B, one=self._batch == 1)

    def rows(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        cache: KVCache,
        rows_n: Tensor | None,
        masked_n: Tensor | None,
    ) -> Tensor:
        """Hidden states [B, T, C] of what is fed at once; rows that are not masked stay as they are, None masks all."""
        rows_n = self._nowhere(tokens_BT.numel()) if rows_n is None else rows_n
        if masked_n is not None:
            rows_n = torch.where(masked_n, rows_n, DENSE)

        def run(tokens_BT: Tensor, positions_BT: Tensor, rows_n: Tensor) -> Tensor:
            return self.decoder(tokens_BT, positions_BT, cache, rows_n, one=False)

        if not self.graphs or len(rows_n) > self._graph_rows:
            return run(tokens_BT, positions_BT, rows_n)
        shape = tokens_BT.shape[1], cache.k_LBSGD.shape[2]
        taken = self._passes.pop(shape) if shape in self._passes else _Pass(run, self._pool)
        self._passes[shape] = taken
        if len(self._passes) > KEPT_PASSES:
            del self._passes[next(iter(self._passes))]
        return taken(tokens_BT, positions_BT, rows_n)

    def draw(self, hidden_BC: Tensor, loop: _Loop) -> tuple[Tensor, Tensor]:
        """Each slot's next token, drawn from all of the vocabulary, and whether its logits are finite."""
        logits_BV = functional.linear(hidden_BC, self.decoder.model.lm_head)
        return self._draw(logits_BV, loop.uniform_BP, loop.position_B)

    def _nowhere(self, rows: int) -> Tensor:
        """Masked and not captured."""
        return torch.full((rows,), -1, dtype=torch.int64, device=self.device)


class _Pass:
    """A pass of one shape: launch by launch the first time, which compiles, and as a CUDA graph from the second on."""

    def __init__(self, run: Callable[..., Tensor], pool: Any) -> None:
        self._run, self._pool = run, pool
        self._ran = False
        self._inputs: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Hidden states, until the next pass."""
        if not self._ran:
            self._ran = True
            return self._run(*inputs)
        if self._graph is None:
            self._inputs = [given.clone(memory_format=torch.contiguous_format) for given in inputs]
            self._graph, self._hidden = _captured(lambda: self._run(*self._inputs), self._pool)
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self._graph.replay()
        return self._hidden


def _captured(run: Callable[[], Returned], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Returned]:
    """A CUDA graph of what `run` launches, and what it returned."""
    graph = torch.cuda.CUDAGraph()
    # a writing thread may be at work meanwhile
    with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
        returned = run()
    return graph, returned


def _aligned(positions: int) -> int:
    """Positions of a cache that holds so many."""
    return max(1, -(-positions // ALIGNED_POSITIONS)) * ALIGNED_POSITIONS


def _labels(group: list[Sequence], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Base and number of each slot's sequence, int64 [B]; 0 in slots left over."""
    bases_B, numbers_B = np.zeros(batch, dtype=np.int64), np.zeros(batch, dtype=np.int64)
    bases_B[: len(group)] = [sequence.base for sequence in group]
    numbers_B[: len(group)] = [sequence.sequence for sequence in group]
    return bases_B, numbers_B


def _note(
    group: list[Sequence],
    step: int,
    tokens_BT: np.ndarray,
    positions_BT: np.ndarray,
    real_BT: np.ndarray,
    sparsified_BT: np.ndarray,
    captured_BT: np.ndarray,
    phase_BT: np.ndarray,
) -> dict[str, np.ndarray]:
    """What one pass fed, as columns."""
    slots, columns = np.nonzero(real_BT)
    parts = (positions_BT, tokens_BT, phase_BT, captured_BT, sparsified_BT)
    return _columns(group, slots, np.full(len(slots), step), *(part_BT[slots, columns] for part_BT in parts))


def _note_steps(
    group: list[Sequence], plan: _Plan, chosen: list[list[int]], recorder: Recorder | None, first: int
) -> dict[str, np.ndarray]:
    """What the steps fed, as columns, in the order of (step, slot): all that was chosen but the last."""
    counts = np.array([len(ids) - 1 for ids in chosen])
    fed_TB = np.arange(max(int(counts.max()), 0))[:, None] < counts
    steps, slots = np.nonzero(fed_TB)
    position = np.array([len(ids) for ids in plan.at_once])[slots] + steps
    token_id = np.array([chosen[slot][step] for step, slot in zip(steps, slots, strict=True)])
    captured = recorder.samples(position) if recorder is not None else np.zeros(len(position), dtype=bool)
    every = np.ones(len(position), dtype=bool)
    return _columns(group, slots, first + steps, position, token_id, np.full(len(steps), "decode"), captured, every)


def _columns(
    group: list[Sequence],
    slots: np.ndarray,
    step: np.ndarray,
    position: np.ndarray,
    token_id: np.ndarray,
    phase: np.ndarray,
    captured: np.ndarray,
    sparsified: np.ndarray,
) -> dict[str, np.ndarray]:
    """Columns of `GroupResult.fed`, from one entry for each position fed."""
    return {
        "sequence": np.array([sequence.sequence for sequence in group], dtype=np.int32)[slots],
        "position": position.astype(np.int32),
        "token_id": token_id.astype(np.int32),
        "phase": phase,
        "captured": captured,
        "sparsified": sparsified,
        "group": np.full(len(slots), group[0].group, dtype=np.int32),
        "step": step.astype(np.int32),
        "slot": slots.astype(np.int32),
    }


def choose_kind(
    wanted: Literal["auto", "torch", "triton"],
    device: torch.device,
    config: ModelConfig,
    method: Method,
    rules: list[MatrixRule],
) -> Kind:
    """The engine that a study means.

    Raises:
        InputError: `triton` is wanted and cannot be had.
    """
    if wanted == "torch":
        return "torch"
    if device.type != "cuda":
        if wanted == "triton":
            raise InputError("machine: engine must be torch or auto without a GPU, got triton")
        return "torch"
    # imported late, as in `_Fused`
    from sparsetrace.generation.fused import unsupported

    reason = unsupported(config, method, rules)
    if reason is not None and wanted == "triton":
        raise InputError(f"machine: engine must be torch or auto here, got triton: {reason}")
    return "torch" if reason is not None else "triton"


def uniforms(seed: int, group: list[Sequence], positions: int, batch: int) -> Tensor:
    """[B, S] float64 in [0, 1): the draw of each slot and position, keyed by (seed, sequence, position) alone."""
    draws_BS = np.zeros((batch, positions))
    for slot, sequence in enumerate(group):
        generator = np.random.Generator(np.random.Philox(key=[seed, sequence.sequence]))
        draws_BS[slot] = generator.random(positions)
    return torch.from_numpy(draws_BS)
