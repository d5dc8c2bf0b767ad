"""The feed plan against brute force: each position of a sequence followed by hand, for every way that tokens come."""

from itertools import product

import pytest

from sparsetrace.core.settings import Batching, Decoding
from sparsetrace.generation.plan import cache_length, feed_of, known_tokens, new_tokens, plan_group
from sparsetrace.generation.prompts import Sequence

NEW = 5
WAYS = [
    *(
        (source, replay, part)
        for source, replay, part in product(("own", "dense"), ("forced", "steps"), ("none", "half", "all"))
    ),
    *(("text", replay, part) for replay, part in product(("forced", "steps"), ("half", "all"))),
]


def group_of(rng, lengths):
    ids = [rng.integers(3, 96, length).tolist() for length in lengths]
    return [Sequence(20 + slot, 1000 * slot, 2, slot, "test", slot, "", row) for slot, row in enumerate(ids)]


def by_hand(source, replay, prefill, length, following):
    """For each position that is fed: whether it is fed many at a time, sparsified, and its phase."""
    first = {"none": length, "half": length - length // 2, "all": 0}[prefill]
    last = length if source == "text" else length + following - 1
    rows = []
    for position in range(last):
        prompt = position < length
        if source == "text":
            at_once = replay == "forced" or position < first
            phase = "forced" if replay == "forced" else "prefill" if at_once else "decode"
        else:
            at_once = prompt or (source == "dense" and replay == "forced")
            phase = "prefill" if prompt else "forced" if at_once else "decode"
        rows.append((at_once, not prompt or position >= first, phase))
    return rows


@pytest.mark.parametrize(("source", "replay", "prefill"), WAYS)
def test_a_feed_is_the_list_of_its_positions(source, replay, prefill):
    decoding = Decoding(tokens_from=source, replay=replay, prefill=prefill)
    for length, following, every in product(range(1, 9), (1, 2, NEW), (1, 2, 3)):
        rows = by_hand(source, replay, prefill, length, following)
        feed = feed_of(length, following, decoding)
        assert feed.positions == len(rows)
        assert feed.known == sum(at_once for at_once, *_ in rows)
        assert all(at_once == (position < feed.known) for position, (at_once, *_) in enumerate(rows))
        captured = [p for p, (_, sparsified, _) in enumerate(rows) if sparsified and p % every == 0]
        assert feed.captured(every) == len(captured)
        # logits are computed of the last position fed many at a time, and of every one after it
        assert feed.captured_logits(every) == len([p for p in captured if p >= feed.known - 1])
        phases = ["forced" if p >= feed.forced_from else "prefill" for p in range(feed.known)]
        assert phases + ["decode"] * feed.steps == [phase for *_, phase in rows]


@pytest.mark.parametrize(("source", "replay", "prefill"), WAYS)
def test_a_group_is_laid_out_slot_by_slot(rng, source, replay, prefill):
    """Ids, flags and phases of the known positions, padding, and the tokens that steps are forced to feed."""
    decoding, batching = (
        Decoding(tokens_from=source, replay=replay, prefill=prefill),
        Batching(max_new_tokens=NEW, batch_size=4),
    )
    group = group_of(rng, [3, 7, 1])
    given = [rng.integers(3, 96, count).tolist() for count in (2, NEW, 1)] if source == "dense" else None
    plan = plan_group(group, decoding, batching, given)
    known = known_tokens(plan, every=2)
    assert known.tokens.shape == (4, plan.longest)
    for slot, sequence in enumerate(group):
        length = len(sequence.prompt_ids)
        following = len(given[slot]) if given else NEW
        rows = by_hand(source, replay, prefill, length, following)
        fed = (sequence.prompt_ids + (given[slot] if given else [0] * NEW))[: len(rows)]
        count = sum(at_once for at_once, *_ in rows)
        assert known.tokens[slot, :count].tolist() == fed[:count] == plan.known_ids[slot]
        assert known.real[slot].tolist() == [position < count for position in range(plan.longest)]
        sparsified = [sparsified for _, sparsified, _ in rows[:count]]
        assert known.sparsified[slot, :count].tolist() == sparsified and not known.sparsified[slot, count:].any()
        captured = [flag and position % 2 == 0 for position, flag in enumerate(sparsified)]
        assert known.captured[slot, :count].tolist() == captured and not known.captured[slot, count:].any()
        assert known.phase[slot, :count].tolist() == [phase for *_, phase in rows[:count]]
        if source != "own":
            assert plan.limits[slot] == (len(rows) - count + 1 if replay == "steps" else 0)
            if replay == "steps":
                # the last is there to be left out
                assert plan.forced_ids[slot][:-1] == fed[count:]
    assert not known.real[3].any() and not known.captured[3].any()
    steps = {"own": NEW - 1, "dense": NEW - 1 if replay == "steps" else 0}
    if source in steps:
        assert plan.steps == steps[source]
    assert plan.cache_positions >= max(feed.positions for feed in plan.feeds)
    assert plan.dense == (not known.sparsified.any())
    assert not known_tokens(plan, every=None).captured.any()


@pytest.mark.parametrize(("dense", "width"), [(True, 100), (False, 5)])
def test_passes_cover_every_known_position_once(rng, dense, width):
    decoding = Decoding(prefill="none" if dense else "all")
    plan = plan_group(group_of(rng, [13, 4]), decoding, Batching(max_new_tokens=NEW, batch_size=3))
    spans = list(plan.spans(block_rows=17))
    assert [position for span in spans for position in range(*span)] == list(range(13))
    assert max(stop - start for start, stop in spans) == min(13, width)


def test_room_behind_a_prompt_and_length_of_a_cache():
    batching = Batching(max_new_tokens=7)
    assert [new_tokens(Decoding(tokens_from=source), batching) for source in ("own", "dense")] == [7, 7]
    assert new_tokens(Decoding(tokens_from="text", prefill="all"), batching) == 0
    assert [cache_length(positions) for positions in (0, 1, 8, 9)] == [8, 8, 8, 16]
