"""The feed plan: which token ids the model is fed, in which passes, and what of them is sparsified and captured.

It follows from the prompts and the settings alone, before anything runs, so `estimate` and `generate` read the same
plan. Imports no torch.
"""

# Shape suffixes: B slots, P positions of a sequence.

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Batching, Decoding
from sparsetrace.generation.prompts import Sequence

# Cache length is rounded up to this multiple: attention with a bias pads other lengths.
CACHE_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Feed:
    """How one sequence is fed.

    Args:
        known: positions fed many at a time, from 0 on; their ids are known beforehand.
        steps: positions fed one at a time behind them, at most.
        sparse_from: the first position that is sparsified; those from here on may be captured.
        forced_from: the first of the known positions whose phase is `forced`; earlier ones are `prefill`.
    """

    known: int
    steps: int
    sparse_from: int
    forced_from: int

    @property
    def positions(self) -> int:
        """Positions fed in all if the sequence does not end early."""
        return self.known + self.steps

    def captured(self, every: int) -> int:
        """How many positions are captured if the sequence does not end early."""
        return len(range(-(-self.sparse_from // every) * every, self.positions, every))

    def captured_logits(self, every: int) -> int:
        """How many of these the logits are computed for: the last known position, and every step."""
        first = max(self.sparse_from, self.known - 1)
        return len(range(-(-first // every) * every, self.positions, every))


def new_tokens(decoding: Decoding, batching: Batching) -> int:
    """Tokens that may follow a prompt: room that is left behind it. A captured text is followed by none."""
    return 0 if decoding.tokens_from == "text" else batching.max_new_tokens


def first_sparsified(length: int, decoding: Decoding) -> int:
    """The first position of a prompt that is sparsified; its length where none is."""
    return {"none": length, "half": length - length // 2, "all": 0}[decoding.prefill]


def feed_of(length: int, following: int, decoding: Decoding) -> Feed:
    """The feed of one sequence.

    Args:
        length: tokens of the prompt, or of the text.
        following: tokens that are generated or given behind the prompt, at most; the last of them is never fed.
            Not read with `tokens_from: text`.
        decoding: where tokens come from.
    """
    first, at_once = first_sparsified(length, decoding), decoding.replay == "forced"
    match decoding.tokens_from:
        case "own":
            return Feed(length, following - 1, first, forced_from=length)
        case "dense" if at_once:
            return Feed(length + following - 1, 0, first, forced_from=length)
        case "dense":
            return Feed(length, following - 1, first, forced_from=length)
        case "text" if at_once:
            return Feed(length, 0, first, forced_from=0)
        case "text":
            return Feed(first, length - first, first, forced_from=first)


def sampled(positions: np.ndarray, every: int) -> np.ndarray:
    """bool, shape of the positions: which are captured of those that are sparsified."""
    chosen: np.ndarray = positions % every == 0
    return chosen


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What one group is fed.

    Args:
        group: the sequences, one for each slot from 0 on.
        feeds: of each.
        known_ids: ids of each that are fed many at a time.
        batch_size: slots, those left over included.
        steps: passes of one token per slot that follow, at most.
        limits: how many tokens are chosen for each sequence, at most.
        dense: whether none of the known positions is sparsified.
        all_sparsified: whether every known position is, so that padding may be too: nobody reads its rows.
        forced_ids: teacher-forced ids that follow `known_ids`, of which the last is not fed; None where they are
            sampled, or where no step follows.
        outputs: what is reported as the sequences' output; None reports the tokens that were chosen.
    """

    group: list[Sequence]
    feeds: list[Feed]
    known_ids: list[list[int]]
    batch_size: int
    steps: int
    limits: list[int]
    dense: bool
    all_sparsified: bool
    forced_ids: list[list[int]] | None = None
    outputs: list[list[int]] | None = None

    @property
    def longest(self) -> int:
        """Known positions of the sequence that has most."""
        return max(feed.known for feed in self.feeds)

    @property
    def cache_positions(self) -> int:
        """Cache length that holds every sequence."""
        return cache_length(self.longest + self.steps)

    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Base and number of each slot's sequence, int64 [B]; 0 in slots left over."""
        bases_B, numbers_B = np.zeros((2, self.batch_size), dtype=np.int64)
        bases_B[: len(self.group)] = [sequence.base for sequence in self.group]
        numbers_B[: len(self.group)] = [sequence.sequence for sequence in self.group]
        return bases_B, numbers_B

    def spans(self, block_rows: int) -> Iterator[tuple[int, int]]:
        """Positions [start, stop) of each pass over known ids: one if none is captured, else what a block holds."""
        width = max(1, self.longest if self.dense else block_rows // self.batch_size)
        for start in range(0, self.longest, width):
            yield start, min(start + width, self.longest)


@dataclass(frozen=True, slots=True)
class KnownTokens:
    """The known ids of a group side by side, [B, P] each; slots and positions left over are padding.

    Args:
        tokens: int64 ids.
        positions: int64.
        real: bool, no padding.
        sparsified: bool.
        captured: bool.
        phase: str.
    """

    tokens: np.ndarray
    positions: np.ndarray
    real: np.ndarray
    sparsified: np.ndarray
    captured: np.ndarray
    phase: np.ndarray


def known_tokens(plan: GroupPlan, every: int | None) -> KnownTokens:
    """Lay the known ids of a group out.

    Args:
        plan: of the group.
        every: positions that are a multiple of this are captured, of those that are sparsified; None captures none.
    """
    B, P, used = plan.batch_size, plan.longest, len(plan.group)
    lengths_B, sparse_from_B, forced_from_B = np.ones((3, B), dtype=np.int64)
    lengths_B[:used] = [feed.known for feed in plan.feeds]
    sparse_from_B[:used] = [feed.sparse_from for feed in plan.feeds]
    forced_from_B[:used] = [feed.forced_from for feed in plan.feeds]
    tokens_BP = np.zeros((B, P), dtype=np.int64)
    for slot, ids in enumerate(plan.known_ids):
        tokens_BP[slot, : len(ids)] = ids
    positions_BP = np.broadcast_to(np.arange(P), (B, P))
    real_BP = positions_BP < lengths_B[:, None]
    real_BP[used:] = False
    sparsified_BP = real_BP & (positions_BP >= sparse_from_B[:, None])
    captured_BP = sparsified_BP & (False if every is None else sampled(positions_BP, every))
    phase_BP = np.where(positions_BP >= forced_from_B[:, None], "forced", "prefill")
    return KnownTokens(tokens_BP, positions_BP, real_BP, sparsified_BP, captured_BP, phase_BP)


def plan_group(
    group: list[Sequence], decoding: Decoding, batching: Batching, given: list[list[int]] | None = None
) -> GroupPlan:
    """The plan of one group.

    Args:
        group: at most `batch_size` sequences.
        decoding: where tokens come from.
        batching: how sequences are multiplied together.
        given: with `tokens_from: dense`, the ids that follow each prompt.
    """
    prompts = [sequence.prompt_ids for sequence in group]
    new = batching.max_new_tokens
    at_once = decoding.replay == "forced"
    limits = [0] * len(group)
    forced: list[list[int]] | None = None
    outputs: list[list[int]] | None = None
    following = [new] * len(group)
    steps = 0
    match decoding.tokens_from:
        case "own":
            steps, limits = new - 1, following
        case "dense":
            assert given is not None and all(given), "at least one token follows each prompt"
            following = [len(ids) for ids in given]
            if at_once:
                outputs = given
            else:
                # as many as the dense model had room for, so that the cache is as long as its was
                forced, steps = given, max(new, *following) - 1
        case "text":
            outputs = [[] for _ in group]
            if not at_once:
                # a last id is added to be left out
                firsts = [first_sparsified(len(ids), decoding) for ids in prompts]
                forced = [[*ids[first:], 0] for ids, first in zip(prompts, firsts, strict=True)]
                steps = max(map(len, forced)) - 1
    if forced is not None:
        limits = [len(ids) for ids in forced]
    feeds = [feed_of(len(ids), more, decoding) for ids, more in zip(prompts, following, strict=True)]
    whole = [ids + more for ids, more in zip(prompts, given or [[]] * len(group), strict=True)]
    return GroupPlan(
        group=group,
        feeds=feeds,
        known_ids=[ids[: feed.known] for ids, feed in zip(whole, feeds, strict=True)],
        batch_size=batching.batch_size,
        steps=steps,
        limits=limits,
        dense=_known_ids_run_dense(decoding),
        all_sparsified=decoding.prefill == "all",
        forced_ids=forced,
        outputs=outputs,
    )


def _known_ids_run_dense(decoding: Decoding) -> bool:
    """Whether nothing that is fed many positions at a time is sparsified."""
    if decoding.tokens_from == "own" or decoding.replay == "steps":
        return decoding.prefill == "none" or decoding.tokens_from == "text"
    return False


def cache_length(positions: int) -> int:
    """Length of a cache that holds so many positions."""
    return max(1, -(-positions // CACHE_MULTIPLE)) * CACHE_MULTIPLE


def refuse_crowded_split(
    where: str, groups: list[list[Sequence]], decoding: Decoding, batching: Batching, context: int
) -> None:
    """Refuse a split that leaves less room behind a prompt than may be fed: token numbers would meet.

    Args:
        where: the split, for the message.
        groups: of one shard.
        decoding, batching: what is fed.
        context: positions that the model has.

    Raises:
        InputError: names the first sequence without room.
    """
    new = new_tokens(decoding, batching)
    sequences = [sequence for group in groups for sequence in group]
    ends = [*(sequence.base for sequence in sequences[1:]), sequences[-1].base + context]
    for sequence, end in zip(sequences, ends, strict=True):
        room = min(end - sequence.base, context) - len(sequence.prompt_ids)
        if room < new:
            raise InputError(
                f"generate: {where} must leave room for {new} new tokens behind each prompt, got room for "
                f"{room} behind sequence {sequence.sequence}: split it with the same max_new_tokens and tokens_from"
            )
