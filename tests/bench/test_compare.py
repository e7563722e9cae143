"""The parts of compare.py that need no worker."""

import numpy as np
import pytest
from compare import SHAPES, VARIANTS, sees, variant_of, work_of


def test_shapes_are_those_of_the_benchmarks():
    assert SHAPES["sit"] == ((8, 16, 256, 256, 72), ("dense",))
    with_variants = [sizes for sizes, variants in SHAPES.values() if variants == VARIANTS]
    assert {size for *_, size in with_variants} == {64, 128}
    assert all(seq_q == seq_kv >= 2048 for _, _, seq_q, seq_kv, _ in with_variants)


@pytest.mark.parametrize("variant", VARIANTS)
def test_work_is_the_share_of_keys_that_rows_see(variant):
    seen = np.broadcast_to(sees(variant, np.arange(20), 20), (20, 20))
    assert work_of(variant, 20) == pytest.approx(seen.mean())


def test_the_configuration_names_its_variant():
    names = ["fp32", "FLASH_ATTN-bf16", "causal-fp32", "SAGE_ATTN-padded-fp16"]
    assert [variant_of(name) for name in names] == ["dense", "dense", "causal", "padded"]
