"""The state of a group that is being decoded: static tensors on the device, so that a CUDA graph can hold a step."""

# Shape suffixes: B slots, P positions of a sequence.

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparsetrace.generation.plan import GroupPlan
from sparsetrace_kernels import torch_ops


class DecodeState:
    """Next token, position and fate of every slot.

    Args:
        batch: slots.
        positions: longest sequence, in tokens.
        eos: ids that end a sequence.
        device: of the model.

    Attributes:
        token_B, position_B: int64, what each slot is fed next, and where.
        base_B, number_B: int64, first token number and number of each slot's sequence.
        running_B: bool, slots whose sequence goes on.
        uniform_BP: float64 in [0, 1), the random draw of each slot and position.
        chosen_PB: int64, tokens chosen so far, a row for each choice; `count` is the number of choices.
        forced_PB: int64, teacher-forced tokens, likewise.
    """

    def __init__(self, batch: int, positions: int, eos: frozenset[int], device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token_B, self.position_B = zeros(batch), zeros(batch)
        self.base_B, self.number_B, self.limit_B = zeros(batch), zeros(batch), zeros(batch)
        self.running_B, self.finite_B = zeros(batch, dtype=torch.bool), zeros(batch, dtype=torch.bool)
        self.ones_B = ~zeros(batch, dtype=torch.bool)
        self.count = zeros(1)
        self.chosen_PB, self.forced_PB = zeros(positions + 1, batch), zeros(positions + 1, batch)
        self.uniform_BP = zeros(batch, positions + 1, dtype=torch.float64)
        self._eos = torch.tensor(sorted(eos), dtype=torch.int64, device=device)
        self._flags = zeros(2, dtype=torch.bool)
        self._advance = torch_ops.advance
        if device.type == "cuda":
            # imported late: the torch backend also runs where Triton is not installed
            from sparsetrace_kernels.decode_state import advance

            self._advance = advance

    def begin(self, plan: GroupPlan, seed: int) -> None:
        """Start behind the known tokens of a group."""
        batch, positions = self.uniform_BP.shape
        used = len(plan.group)
        bases_B, numbers_B = plan.labels()
        lengths_B, limits_B = np.zeros((2, batch), dtype=np.int64)
        lengths_B[:used] = [feed.known for feed in plan.feeds]
        limits_B[:used] = plan.limits
        for tensor, values in (
            (self.position_B, lengths_B),
            (self.base_B, bases_B),
            (self.number_B, numbers_B),
            (self.limit_B, limits_B),
        ):
            tensor.copy_(torch.from_numpy(values))
        self.running_B.copy_(torch.arange(batch) < used)
        self.finite_B.fill_(True)
        self.count.zero_()
        self.token_B.zero_()
        self.uniform_BP.copy_(uniforms(seed, [sequence.sequence for sequence in plan.group], positions, batch))
        if plan.forced_ids is not None:
            forced_PB = np.zeros(self.forced_PB.shape, dtype=np.int64)
            for slot, ids in enumerate(plan.forced_ids):
                forced_PB[: len(ids), slot] = ids
            self.forced_PB.copy_(torch.from_numpy(forced_PB))

    def rest(self) -> None:
        """Stop every slot, so that a step captures nothing and stays within the tables."""
        for tensor in (self.running_B, self.position_B, self.count):
            tensor.zero_()

    def choose(self, next_B: Tensor, finite_B: Tensor) -> None:
        """Set the token that each slot is fed next.

        Args:
            next_B: int64.
            finite_B: bool, whether everything that it was chosen by is finite.
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

    def choose_forced(self, finite_B: Tensor) -> None:
        """Set the teacher-forced token that each slot is fed next."""
        self.choose(self.forced_PB.index_select(0, self.count)[0], finite_B)

    def note_finite(self, finite_B: Tensor) -> None:
        """Note whether what running slots computed is finite; no token is chosen."""
        self.finite_B &= finite_B | ~self.running_B

    def poll(self) -> Callable[[], tuple[bool, bool]]:
        """Ask whether any slot runs, and whether everything was finite; calling the result waits for the answer."""
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

    def outputs(self, plan: GroupPlan) -> list[list[int]]:
        """The tokens chosen for each sequence."""
        if plan.forced_ids is not None:
            return plan.forced_ids
        chosen_PB = self.chosen_PB[: int(self.count)].cpu().numpy()
        eos = set(self._eos.tolist())
        outputs = []
        for slot, limit in enumerate(plan.limits):
            ids = chosen_PB[:limit, slot].tolist()
            end = next((at for at, token_id in enumerate(ids) if token_id in eos), len(ids) - 1)
            outputs.append(ids[: end + 1])
        return outputs


def uniforms(seed: int, sequences: list[int], positions: int, batch: int) -> Tensor:
    """[B, P] float64 in [0, 1): the draw of each slot and position, keyed by (seed, sequence, position) alone."""
    draws_BP = np.zeros((batch, positions))
    for slot, sequence in enumerate(sequences):
        generator = np.random.Generator(np.random.Philox(key=[seed, sequence]))
        draws_BP[slot] = generator.random(positions)
    return torch.from_numpy(draws_BP)
