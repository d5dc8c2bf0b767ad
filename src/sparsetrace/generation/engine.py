"""The engine decodes one group of sequences at fixed shapes and has every operand recorded.

It feeds what the plan says, through whichever backend runs the model. A step works on static tensors of the device,
sampling included, and the host only polls now and then whether any sequence still runs. Everything that shapes a sum
(batch, padding, passes over a prompt) follows from the group and the configuration alone, with capture on or off.
"""

# Shape suffixes: B slots, T positions of one pass, P positions of a sequence, C hidden.

from collections import deque
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sparsetrace.core.files import InputError
from sparsetrace.generation.backend import Backend, Chunk, EngineSetup
from sparsetrace.generation.backends import new_backend
from sparsetrace.generation.capture import Recorder
from sparsetrace.generation.fed import FedTokens
from sparsetrace.generation.plan import GroupPlan, KnownTokens, known_tokens, plan_group, sampled
from sparsetrace.generation.prompts import Sequence
from sparsetrace.generation.selection import block_rows
from sparsetrace.generation.torch_backend import reference_of
from sparsetrace.model.finite import not_finite
from sparsetrace.model.patch import observe


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


class Engine:
    """Runs groups through a model.

    Args:
        setup: model, method and settings.

    Attributes:
        backend: what runs the model.
        block_rows: rows of a block of the dump; a captured pass over known tokens has no more.

    Raises:
        InputError: the backend cannot run this model under this method.
    """

    def __init__(self, setup: EngineSetup) -> None:
        method = setup.patch.method
        if method.needs_dense_prefill and setup.decoding.prefill == "all":
            raise InputError(
                f"generate: prefill must be none or half with method {method.name}, which decides by the dense "
                "part of the prompt, got all"
            )
        self.setup = setup
        self.device = setup.device
        self.block_rows = block_rows(
            setup.patch.sites, setup.patch.parts, setup.model.config.dtype, setup.batching.batch_size, setup.device
        )
        self.backend: Backend = new_backend(setup, self.block_rows)

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
        setup, backend = self.setup, self.backend
        plan = plan_group(group, setup.decoding, setup.batching, given)
        every = None if recorder is None else recorder.capture.every
        setup.patch.begin()
        # before anything is captured: this may run a step
        backend.prepare(plan, recorder)
        # its copies are waited for, so it goes before the prompts, behind which the first steps then queue up
        backend.state.begin(plan, setup.decoding.seed)
        fed = FedTokens(plan, every)
        backend.choose(self._feed_known(backend, plan, recorder, fed))
        if not self._decode(plan, recorder):
            self._refuse_not_finite(plan, recorder)
        chosen = backend.state.outputs(plan)
        if plan.steps:
            fed.add_steps(chosen)
        outputs = chosen if plan.outputs is None else plan.outputs
        eos = frozenset() if setup.decoding.ignore_eos else setup.eos
        return GroupResult(outputs, [bool(ids) and ids[-1] in eos for ids in outputs], fed.table())

    def _feed_known(
        self, backend: Backend, plan: GroupPlan, recorder: Recorder | None, fed: FedTokens | None = None
    ) -> Tensor | None:
        """Feed the known tokens.

        Args:
            backend: what runs them.
            plan: of the group.
            recorder: takes the operands; None captures nothing.
            fed: is told what was fed.

        Returns:
            [B, C] hidden state of each sequence's last known position; None where no token is known.
        """
        known = known_tokens(plan, None if recorder is None else recorder.capture.every)
        tokens = _DeviceTokens(plan, known, self.device)
        hidden_BC: Tensor | None = None
        for start, stop in plan.spans(self.block_rows):
            if fed is not None:
                fed.add_pass(known, start, stop)
            rows_n = None
            if recorder is not None and (count := int(known.captured[:, start:stop].sum())):
                recorder.reserve(count)
                rows_n = recorder.place(*tokens.captured(start, stop))
            hidden_BTC = backend.forward(tokens.chunk(start, stop), rows_n)
            last_B = tokens.ends_B - 1 - start
            within_B = last_B.clamp(0, stop - start - 1)
            ends_here_B = (last_B >= 0) & (last_B < stop - start)
            chunk_BC = hidden_BTC[tokens.slots_B, within_B]
            if recorder is not None and rows_n is not None and recorder.takes_head:
                # only a last position has logits
                recorder.clear_head(rows_n)
                rows_B = rows_n.view(-1, stop - start)[tokens.slots_B, within_B]
                backend.head_input(chunk_BC, torch.where(ends_here_B, rows_B, recorder.nowhere))
            hidden_BC = chunk_BC if hidden_BC is None else torch.where(ends_here_B[:, None], chunk_BC, hidden_BC)
        return hidden_BC

    def _decode(self, plan: GroupPlan, recorder: Recorder | None) -> bool:
        """Run the steps; returns whether everything was finite."""
        backend = self.backend
        every, behind = backend.polling()
        polls = deque([backend.state.poll()])
        lengths, limits = np.array([feed.known for feed in plan.feeds]), np.array(plan.limits)
        for step in range(plan.steps):
            if step % every == 0 and len(polls) > behind:
                alive, finite = polls.popleft()()
                if not finite:
                    return False
                if not alive:
                    break
            if recorder is not None:
                may_run = step + 1 < limits
                recorder.reserve(int((may_run & sampled(lengths + step, recorder.capture.every)).sum()))
            backend.step()
            if step % every == every - 1:
                polls.append(backend.state.poll())
        return backend.state.poll()()[1]

    def _refuse_not_finite(self, plan: GroupPlan, recorder: Recorder | None) -> None:
        self._name_not_finite(plan)
        if recorder is not None:
            # refuses what was captured after the prompt
            recorder.close()
        bad = int((~self.backend.state.finite_B[: len(plan.group)]).cpu().numpy().argmax())
        raise InputError(f"generate: logits must be finite, got Inf or NaN in sequence {plan.group[bad].sequence}")

    def _name_not_finite(self, plan: GroupPlan) -> None:
        """Feed the known tokens again, looking at what enters every site: positions that run dense are not captured."""
        spans = plan.spans(self.block_rows)
        sites = {site.key: site for site in self.setup.patch.sites}
        first = next(iter(sites))
        start = 0

        def see(layer: int, site: str, x_BTK: Tensor) -> None:
            nonlocal start
            if (layer, site) == first:
                start, _ = next(spans)
            bad_BT = ~x_BTK.isfinite().all(-1).cpu().numpy()
            for slot, column in zip(*np.nonzero(bad_BT[: len(plan.group)]), strict=True):
                position = start + int(column)
                if position < plan.feeds[slot].known:
                    sequence = plan.group[slot]
                    token = sequence.base + position
                    raise not_finite(
                        "generate",
                        f"layer {layer}, matrix {sites[layer, site].matrices[0]}, token {token} (sequence "
                        f"{sequence.sequence}, position {position})",
                    )

        with observe(self.setup.model, see):
            self._feed_known(reference_of(self.backend, plan), plan, None)


class _DeviceTokens:
    """The known tokens of a group, on the device at once: a copy between two passes would wait for the first."""

    def __init__(self, plan: GroupPlan, known: KnownTokens, device: torch.device) -> None:
        bases_B, numbers_B = plan.labels()
        ends_B = np.ones(plan.batch_size, dtype=np.int64)
        ends_B[: len(plan.group)] = [feed.known for feed in plan.feeds]
        shape = known.tokens.shape

        def there(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.broadcast_to(array, shape).copy()).to(device)

        self.slots_B = torch.arange(plan.batch_size, device=device)
        self.ends_B = torch.from_numpy(ends_B).to(device)
        self._tokens_BP, self._positions_BP = there(known.tokens), there(known.positions)
        self._sparsified_BP = there(known.sparsified)
        self._dense_BP = there(known.real & ~known.sparsified)
        self._bases_BP, self._numbers_BP = there(bases_B[:, None]), there(numbers_B[:, None])
        self._all_sparsified = plan.all_sparsified

    def chunk(self, start: int, stop: int) -> Chunk:
        """What a pass feeds, positions [start, stop)."""
        tokens, positions, sparsified, dense = (
            part_BP[:, start:stop].contiguous()
            for part_BP in (self._tokens_BP, self._positions_BP, self._sparsified_BP, self._dense_BP)
        )
        return Chunk(tokens, positions, True if self._all_sparsified else sparsified, dense)

    def captured(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `Recorder.place` takes of a pass."""
        parts = self._sparsified_BP, self._positions_BP, self._bases_BP, self._numbers_BP
        # `flatten` leaves one column of several strided
        chosen_n, positions_n, bases_n, numbers_n = (part_BP[:, start:stop].contiguous().view(-1) for part_BP in parts)
        return chosen_n, positions_n, bases_n, numbers_n
