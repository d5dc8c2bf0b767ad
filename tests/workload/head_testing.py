"""A workload with a matrix in no layer, whose operand is whole and which has rows for some of the tokens only."""

import pytest
from workload_testing import HEAD as SITE
from workload_testing import SITES, has_logits, pack_all, write_dump

from sparsetrace.formats.sites import Site
from sparsetrace.packing import gather

HEAD = (None, "lm_head")
WIDTH = SITE.in_features
VOCABULARY = SITE.outputs("lm_head")


def build_with_head(folder, dtype, level="full", matrix="lm_head", **settings):
    """A workload in small row groups; `lm_head`, or another matrix, has rows where logits were computed."""
    site = Site(SITE.name, None, (matrix,), WIDTH, (VOCABULARY,))
    built = write_dump(folder, dtype, level=level, sites=(*SITES, site), some={site.key: has_logits})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "row_group_rows", lambda features: 4)
        built.workload = pack_all(built, **settings)
    built.head = built.dense[None, matrix]
    built.head_rows = sorted(
        (row for row in built.fed if row["captured"] and has_logits(row)), key=lambda r: r["token"]
    )
    return built
