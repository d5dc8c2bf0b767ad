"""Histograms of one model added up: the shards of a text, or several texts."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from sparsetrace.calibration.histogram import Histograms, Provenance, TextShard
from sparsetrace.core.files import InputError, sha256_json


def merge(paths: Sequence[Path], out: Path) -> Provenance:
    """Add up histogram files.

    Args:
        paths: one or more files.
        out: the sum; shards 0 to n - 1 of a text give the bytes that the whole text gives.

    Raises:
        InputError: the files are of different models, dtypes or scores, something would be counted twice, or a shard
            is missing.
    """
    total, first = Histograms.load(paths[0])
    shards = list(_shards(first))
    tokens = first.tokens
    for path in paths[1:]:
        histograms, provenance = Histograms.load(path)
        for name in ("model_hash", "dtype", "layers", "sites", "scores"):
            if getattr(provenance, name) != getattr(first, name):
                raise InputError(
                    f"histograms: {name} of all files must be that of {paths[0]}, {getattr(first, name)}, "
                    f"got {getattr(provenance, name)} in {path}: merge what was counted on one model, in one way"
                )
        total.add(histograms)
        shards += _shards(provenance)
        tokens += provenance.tokens
    texts = _whole_texts(shards)
    text_hash = texts[0] if len(texts) == 1 else sha256_json(sorted(texts))
    several = tuple(TextShard(text, 0, 1) for text in sorted(texts)) if len(texts) > 1 else ()
    merged = replace(first, text_hash=text_hash, tokens=tokens, shards=several)
    total.save(out, merged)
    return merged


def _shards(provenance: Provenance) -> tuple[TextShard, ...]:
    return provenance.shards or (TextShard(provenance.text_hash, 0, 1),)


def _whole_texts(shards: Iterable[TextShard]) -> list[str]:
    """Hashes of the texts that the shards make up.

    Raises:
        InputError: a shard is there twice, or missing.
    """
    texts: dict[str, dict[int, int]] = {}
    for text, shard, count in shards:
        if shard in texts.setdefault(text, {}) or count != next(iter(texts[text].values()), count):
            raise InputError(f"histograms: every text must be counted once, got shard {shard} of {text[:12]} twice")
        texts[text][shard] = count
    for text, found in texts.items():
        count = next(iter(found.values()))
        if missing := sorted(set(range(count)) - set(found)):
            raise InputError(f"histograms: all {count} shards of text {text[:12]} must be there, got none of {missing}")
    return list(texts)
