"""How an axis is dealt: by hand, and against index arrays."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle import Axis, block_lists, blocks, even, padded, spans
from tpshard.errors import PolicyError
from tpshard.layout import Layout, Shard, Span
from tpshard.partition import Block, Cut, cut_layout, legal_ranks


def held(layout: Layout, axis: int = 0) -> list[list[tuple[int, int]]]:
    """Each rank's runs along an axis."""
    return [[tuple(run) for run in shard.spans[axis]] for shard in layout.shards if shard]


def deal(size: int, cut: Cut, ranks: int) -> list[list[tuple[int, int]]]:
    return held(cut_layout((size,), 0, cut, ranks))


# ---------------------------------------------------------------------------------------------- by hand


def test_heads_are_dealt_whole() -> None:
    assert deal(60, Cut((Block(6, 10),)), 3) == [[(0, 20)], [(20, 40)], [(40, 60)]]


def test_fewer_units_than_ranks_are_copied_to_neighbours() -> None:
    """Two key-value heads on six ranks: 0 0 0 1 1 1, in the order in which query heads are dealt, not 0 1 0 1 0 1."""
    assert deal(20, Cut((Block(2, 10),)), 6) == [[(0, 10)]] * 3 + [[(10, 20)]] * 3


def test_each_part_of_a_fused_block_is_dealt_on_its_own() -> None:
    """q | k | v with 6, 3, 3 heads of 10 on three ranks."""
    cut = Cut((Block(6, 10), Block(3, 10), Block(3, 10)))
    assert deal(120, cut, 3) == [
        [(0, 20), (60, 70), (90, 100)],
        [(20, 40), (70, 80), (100, 110)],
        [(40, 60), (80, 90), (110, 120)],
    ]


def test_parts_may_mix_cut_and_copied_units() -> None:
    """Multi-query: four query heads are cut, the one key and value head stands on every rank."""
    assert deal(18, Cut((Block(4, 3), Block(1, 3), Block(1, 3))), 2) == [[(0, 6), (12, 18)], [(6, 18)]]


def test_touching_runs_are_one() -> None:
    assert deal(6, Cut((Block(3, 1), Block(3, 1))), 1) == [[(0, 6)]]


def test_an_axis_without_units_is_dealt_as_evenly_as_it_goes() -> None:
    assert deal(1003, Cut((Block(1003, 1, named=False),)), 4) == [[(0, 251)], [(251, 502)], [(502, 753)], [(753, 1003)]]
    assert deal(2, Cut((Block(2, 1, named=False),), replicable=False), 3) == [[(0, 1)], [(1, 2)], []]


def test_an_axis_without_units_is_never_copied() -> None:
    """One row on two ranks, without a word about units: rank 0 has it, rank 1 has none."""
    assert deal(1, Cut((Block(1, 1, named=False),)), 2) == [[(0, 1)], []]


def test_uneven_gives_the_first_ranks_more() -> None:
    assert deal(70, Cut((Block(7, 10),), uneven=True), 3) == [[(0, 30)], [(30, 50)], [(50, 70)]]


def test_uneven_never_copies() -> None:
    """Three heads on six ranks: dealt alike whether the outputs are added (row) or not, the last ranks without any."""
    for replicable in (True, False):
        cut = Cut((Block(3, 10),), replicable=replicable, uneven=True)
        assert deal(30, cut, 6) == [[(0, 10)], [(10, 20)], [(20, 30)], [], [], []]


def test_uneven_copies_one_unit_beside_many() -> None:
    """q | k | v of five query heads and one key-value head, on two ranks: 3 and 2 heads, each with k and v."""
    cut = Cut((Block(5, 10), Block(1, 10), Block(1, 10)), uneven=True)
    assert deal(70, cut, 2) == [[(0, 30), (50, 70)], [(30, 70)]]


def test_padding_makes_ranks_equal() -> None:
    """1003 rows on 4 ranks in multiples of 8: 256 rows each, the last rank's end in 21 of zeros."""
    layout = cut_layout((1003, 44), 0, Cut((Block(1003, 1, named=False),), pad=8), 4)
    assert held(layout) == [[(0, 256)], [(256, 512)], [(512, 768)], [(768, 1003)]]
    assert [shard.shape for shard in layout.shards if shard] == [(256, 44)] * 4
    assert layout.padding == 21 * 44


def test_padding_may_leave_ranks_with_nothing_else() -> None:
    layout = cut_layout((5,), 0, Cut((Block(5, 1, named=False),), pad=4), 3)
    assert held(layout) == [[(0, 4)], [(4, 5)], []]
    assert [shard.shape for shard in layout.shards if shard] == [(4,)] * 3


def test_other_axes_stay_whole() -> None:
    layout = cut_layout((2, 6, 3), 1, Cut((Block(3, 2),)), 3)
    assert layout.shards[1] == Shard((2, 2, 3), ((Span(0, 2),), (Span(2, 4),), (Span(0, 3),)))


@pytest.mark.parametrize("block", [Block(6, 0), Block(0, 4), Block(0, 0)])
@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
def test_an_axis_of_no_cells_can_be_dealt(block: Block, ranks: int) -> None:
    layout = cut_layout((0, 4), 0, Cut((block,), uneven=True), ranks)
    assert [shard.shape for shard in layout.shards if shard] == [(0, 4)] * ranks


# ---------------------------------------------------------------------------------------------- refusals


def test_units_that_do_not_go_into_the_ranks() -> None:
    with pytest.raises(PolicyError) as caught:
        cut_layout((60,), 0, Cut((Block(6, 10),)), 4)
    assert caught.value.message == "6 units cannot be dealt to 4 ranks"
    assert caught.value.hint == "--tp that works: 1, 2, 3, 6, 12, 18, 24, 30, 36, 42, 48, 54 …; or set uneven: true"


def test_a_row_rule_may_not_copy_units() -> None:
    """Partial sums would count them twice."""
    with pytest.raises(PolicyError, match="2 units cannot be dealt to 4 ranks: a row rule may not replicate") as caught:
        cut_layout((20,), 0, Cut((Block(2, 10),), replicable=False), 4)
    assert caught.value.hint == "--tp that works: 1, 2; or set uneven: true"


def test_one_unit_is_singular() -> None:
    with pytest.raises(PolicyError, match="1 unit cannot be dealt"):
        cut_layout((3,), 0, Cut((Block(1, 3),), replicable=False), 3)


def test_blocks_must_cover_the_axis() -> None:
    with pytest.raises(PolicyError, match="parts cover 50 of 60 along axis 1"):
        cut_layout((2, 60), 1, Cut((Block(5, 10),)), 5)


def test_legal_ranks_are_those_of_every_cut() -> None:
    heads, kv = Cut((Block(6, 10),)), Cut((Block(2, 10),))
    assert legal_ranks([heads, kv], 12) == [1, 2, 6, 12]
    assert legal_ranks([heads, Cut((Block(6, 10),), replicable=False)], 12) == [1, 2, 3, 6]
    assert legal_ranks([heads, Cut((Block(5, 10),), uneven=True)], 6) == [1, 2, 3, 6]
    assert legal_ranks([], 3) == [1, 2, 3]


# ---------------------------------------------------------------------------------------------- against the oracle


def same(layout: Layout, axis: Axis) -> bool:
    return [(s.shape[0], s.spans[0]) for s in layout.shards if s] == [
        (size, spans(indices)) for indices, size in zip(axis.held, axis.sizes, strict=True)
    ]


@given(st.integers(0, 40), st.integers(1, 8))
def test_even_is_the_oracle(size: int, ranks: int) -> None:
    assert same(cut_layout((size,), 0, Cut((Block(size, 1, named=False),)), ranks), even(size, ranks))


@given(st.integers(0, 40), st.integers(1, 8), st.integers(1, 9))
def test_padded_is_the_oracle(size: int, ranks: int, pad: int) -> None:
    layout = cut_layout((size,), 0, Cut((Block(size, 1, named=False),), pad=pad), ranks)
    assert same(layout, padded(size, ranks, pad))
    assert all(shard.shape[0] % pad == 0 for shard in layout.shards if shard)


@given(st.integers(0, 30).flatmap(lambda size: st.tuples(st.just(size), block_lists(size))), st.integers(1, 8))
def test_blocks_are_the_oracle(case: tuple[int, list[tuple[int, int]]], ranks: int) -> None:
    size, parts = case
    units = tuple(Block(count, width) for count, width in parts)
    assert same(cut_layout((size,), 0, Cut(units, uneven=True), ranks), blocks(parts, ranks, copied=False))
    if ranks in legal_ranks([Cut(units)], 8):
        assert same(cut_layout((size,), 0, Cut(units), ranks), blocks(parts, ranks))


@given(
    st.integers(0, 30).flatmap(lambda size: st.tuples(st.just(size), block_lists(size))),
    st.integers(1, 8),
    st.booleans(),
)
def test_refused_exactly_where_not_legal(case: tuple[int, list[tuple[int, int]]], ranks: int, replicable: bool) -> None:
    size, parts = case
    cut = Cut(tuple(Block(count, width) for count, width in parts), replicable=replicable)
    if ranks in legal_ranks([cut], 8):
        layout = cut_layout((size,), 0, cut, ranks)
        counts = np.zeros(size, int)
        for shard in layout.shards:
            for run in shard.spans[0] if shard else ():
                counts[run.start : run.stop] += 1
        assert (counts >= 1).all()
        assert replicable or (counts == 1).all(), "a row rule holds every cell once"
    else:
        with pytest.raises(PolicyError) as caught:
            cut_layout((size,), 0, cut, ranks)
        legal = [int(number) for number in re.findall(r"\d+", (caught.value.hint or "").split(";")[0])]
        assert legal
        assert ranks not in legal
