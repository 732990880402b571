"""Layouts, and the copies between them, against index arrays and by hand."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.build import Tensor, load, save
from tests.oracle import Deal, deals, shapes
from tpshard import execute as execute_module
from tpshard.checkpoint import Checkpoint, Place, Stored, WeightFile, open_full
from tpshard.errors import InputError
from tpshard.header import read_header
from tpshard.journal import Head
from tpshard.layout import Box, Layout, Piece, Shard, Span, in_bytes
from tpshard.plan import Item, Output, Plain, Plan, plan
from tpshard.slabs import Slab, cut_into_slabs, regions
from tpshard.staging import Staging

FULL = Span(0, 6)


# ---------------------------------------------------------------------------------------------- values


def test_a_box_needs_as_many_stops_as_starts() -> None:
    with pytest.raises(ValueError, match="start has 2 dimensions, stop has 3"):
        Box((0, 0), (1, 1, 1))


def test_boxes_meet_where_both_are() -> None:
    box = Box((0, 2), (4, 6))
    assert box.intersect(Box((3, 0), (9, 3))) == Box((3, 2), (4, 3))
    assert box.intersect(Box((4, 2), (9, 6))) is None, "touching is not meeting"
    assert Box((), ()).intersect(Box((), ())) == Box((), ()), "a scalar meets itself"


def test_a_box_moves_and_slices() -> None:
    box = Box((1, 2), (3, 6)).translate((10, -2))
    assert (box, box.shape, box.volume) == (Box((11, 0), (13, 4)), (2, 4), 8)
    assert box.slices() == (slice(11, 13), slice(0, 4))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([Span(2, 4), Span(0, 2)], "not ascending"),
        ([Span(0, 3), Span(2, 4)], "not ascending"),
        ([Span(3, 3)], "not ascending"),
        ([Span(-1, 2)], "not ascending"),
        ([Span(0, 2), Span(4, 8)], "runs cover 6 cells of a shard of 5"),
    ],
)
def test_a_shard_refuses_runs_that_make_no_sense(runs: list[Span], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shard((5,), (tuple(runs),))


def test_a_shard_needs_runs_for_every_axis() -> None:
    with pytest.raises(ValueError, match="shape has 2 dimensions, spans has 1"):
        Shard((5, 5), ((Span(0, 5),),))


def test_a_layout_refuses_shards_of_other_tensors() -> None:
    with pytest.raises(ValueError, match="rank 1: 1 dimensions, the tensor has 2"):
        Layout((5, 5), (None, Shard.whole((5,))))
    with pytest.raises(ValueError, match="rank 0: axis 0 ends at 5, a run ends at 6"):
        Layout((5,), (Shard.whole((6,)),))


# ---------------------------------------------------------------------------------------------- by hand


def test_a_fused_block_is_cut_in_each_part() -> None:
    """q | k | v of 4, 2 and 2 rows on two ranks: rows 0-1, 4, 6 and rows 2-3, 5, 7."""
    layout = Layout.along(
        (8, 3), 0, [(Span(0, 2), Span(4, 5), Span(6, 7)), (Span(2, 4), Span(5, 6), Span(7, 8))], [4, 4]
    )
    first = [(piece.box.start, piece.box.stop, piece.at) for piece in layout.shards[0].pieces()]  # type: ignore[union-attr]
    assert first == [((0, 0), (2, 3), (0, 0)), ((4, 0), (5, 3), (2, 0)), ((6, 0), (7, 3), (3, 0))]
    assert layout.cut_axes == (0,)
    assert not layout.is_replicated
    assert [(tuple(run), ranks) for run, ranks in layout.owners(0)] == [
        ((0, 2), (0,)), ((2, 4), (1,)), ((4, 5), (0,)), ((5, 6), (1,)), ((6, 7), (0,)), ((7, 8), (1,)),
    ]  # fmt: skip


def test_tiles_take_replicas_from_the_lowest_rank() -> None:
    layout = Layout.along((4, 2), 0, [(Span(0, 2),), (Span(0, 2),), (Span(2, 4),), (Span(2, 4),)], [2, 2, 2, 2])
    assert layout.tiles() == [(0, Piece(Box((0, 0), (2, 2)), (0, 0))), (2, Piece(Box((2, 0), (4, 2)), (0, 0)))]


def test_tiles_name_the_cells_that_nobody_holds() -> None:
    layout = Layout.along((5, 2), 0, [(Span(0, 2),), (Span(3, 5),)], [2, 2])
    with pytest.raises(InputError, match=r"cells \[2, 0\] to \[2, 1\] are held by no rank"):
        layout.tiles()


def test_neighbouring_tiles_are_one() -> None:
    """Rank 1 shares rows with both neighbours; the lowest holder gives each run, in as few pieces as can be."""
    layout = Layout.along((6,), 0, [(Span(0, 4),), (Span(2, 6),)], [4, 4])
    assert layout.tiles() == [(0, Piece(Box((0,), (4,)), (0,))), (1, Piece(Box((4,), (6,)), (2,)))]


def test_padding_is_what_no_run_covers() -> None:
    layout = Layout.along((5, 2), 0, [(Span(0, 4),), (Span(4, 5),)], [4, 4])
    assert layout.padding == 6
    assert [(s.volume, s.covered) for s in layout.shards if s] == [(8, 8), (8, 2)]


def test_in_bytes_scales_the_last_axis_only() -> None:
    layout = Layout.along((4, 6), 1, [(Span(0, 2),), (Span(2, 6),)], [2, 4])
    assert in_bytes(layout, 16) == Layout.along((4, 12), 1, [(Span(0, 4),), (Span(4, 12),)], [4, 8])
    assert in_bytes(layout, 4) == Layout.along((4, 3), 1, [(Span(0, 1),), (Span(1, 3),)], [1, 2])
    assert in_bytes(Layout.replicated((), 2), 32) == Layout.replicated((4,), 2)


def test_a_cut_inside_a_byte_is_refused() -> None:
    layout = Layout.along((4, 6), 1, [(Span(0, 3),), (Span(3, 6),)], [3, 3])
    with pytest.raises(InputError, match=r"element 3 of the last axis falls inside a byte \(4 bits an element\)"):
        in_bytes(layout, 4)
    with pytest.raises(InputError, match="a scalar of 4 bits does not fill its byte"):
        in_bytes(Layout.replicated((), 1), 4)


def test_regions_by_hand() -> None:
    def found(shape: tuple[int, ...], limit: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [(box.start, box.stop) for box in regions(shape, limit)]

    assert found((2, 3), 6) == [((0, 0), (2, 3))]
    assert found((2, 3), 2) == [((0, 0), (1, 2)), ((0, 2), (1, 3)), ((1, 0), (2, 2)), ((1, 2), (2, 3))]
    assert found((), 1) == [((), ())]
    assert found((3, 0), 4) == []
    assert found((4,), 0) == [((0,), (1,)), ((1,), (2,)), ((2,), (3,)), ((3,), (4,))], "at least one cell each"


# ---------------------------------------------------------------------------------------------- properties


@given(shapes.flatmap(deals))
def test_layout_says_what_the_oracle_says(deal: Deal) -> None:
    layout = deal.layout()
    holders = deal.holders()
    whole = np.arange(math.prod(deal.shape)).reshape(deal.shape)
    for rank, shard in enumerate(layout.shards):
        own = deal.shard(whole, rank)
        if own is None or shard is None:
            assert own is None
            assert shard is None
            continue
        assert shard.volume == own.size
        assert shard.covered == math.prod(len(indices) for indices, _ in deal.ranks[rank] or ())
        again = np.zeros(shard.shape, int)
        for piece in shard.pieces():
            again[piece.local.slices()] = whole[piece.box.slices()]
        assert np.array_equal(again, own)
    for axis in range(len(deal.shape)):
        for run, ranks in layout.owners(axis):
            for index in range(run.start, run.stop):
                assert ranks == tuple(r for r, axes in enumerate(deal.ranks) if axes and index in axes[axis][0])
    assert layout.padding == sum(s.volume - s.covered for s in layout.shards if s)
    assert (holders > 0).all(), "the strategies hold every cell"


@given(shapes.flatmap(deals))
def test_tiles_cover_every_cell_once(deal: Deal) -> None:
    layout = deal.layout()
    whole = np.arange(math.prod(deal.shape)).reshape(deal.shape)
    own = [deal.shard(whole, rank) for rank in range(layout.ranks)]
    times, again = np.zeros(deal.shape, int), np.full(deal.shape, -1)
    for rank, piece in layout.tiles():
        times[piece.box.slices()] += 1
        again[piece.box.slices()] = own[rank][piece.local.slices()]  # type: ignore[index]
    assert (times == 1).all()
    assert np.array_equal(again, whole)


@given(shapes, st.integers(0, 60))
def test_regions_cover_in_order(shape: tuple[int, ...], limit: int) -> None:
    order = np.arange(math.prod(shape)).reshape(shape)
    boxes = list(regions(shape, limit))
    assert [cell for box in boxes for cell in order[box.slices()].ravel()] == list(range(order.size))
    assert all(0 < box.volume <= max(limit, 1) for box in boxes)


# ---------------------------------------------------------------------------------------------- copies


def nibbles(cells: np.ndarray) -> np.ndarray:
    """Cells of 4 bits as bytes, two neighbours in each."""
    flat = cells.reshape(-1, 2)
    return (flat[:, 0] | flat[:, 1] << 4).astype(np.uint8)


def as_bytes(cells: np.ndarray | None, bits: int) -> bytes | None:
    """A tensor of whole numbers as a file holds it at ``bits`` a cell."""
    if cells is None:
        return None
    return nibbles(cells).tobytes() if bits == 4 else cells.astype(f"<u{bits // 8}").tobytes()


def aligned(deal: Deal) -> bool:
    """Whether every edge of the last axis lies between bytes at 4 bits a cell."""
    if not deal.shape or deal.shape[-1] % 2:
        return False
    runs = [(axes[-1][0], axes[-1][1]) for axes in deal.ranks if axes]
    return all(
        size % 2 == 0 and all((a in held) == (a + 1 in held) for a in range(0, deal.shape[-1], 2))
        for held, size in runs
    )


def copy(source: list[bytes | None], have: Layout, want: Layout, bits: int, limit: int) -> list[bytes | None]:
    """One tensor from shards to shards through the plan, in slabs, as execute does it; refuses to write twice."""
    transfer = plan(have, want, bits)
    own: list[bytearray | None] = [None] * want.ranks
    for holding in transfer.writes:
        own[holding.rank] = bytearray()
    position = 0
    for slab in cut_into_slabs(transfer, limit):
        assert slab.offset == position
        position += slab.size
        data = read_slab(slab, source)
        room = np.full(max([contact.size for contact in slab.writes], default=0), 0xBB, np.uint8)
        for contact in slab.writes:
            target = own[contact.rank]
            assert target is not None
            assert len(target) + contact.lead == contact.offset, "front to back, no byte twice"
            target.extend(bytes(contact.lead) + contact.take(data, room).tobytes())
    assert position == transfer.size
    for holding in transfer.writes:
        assert len(own[holding.rank] or b"") == holding.volume
        assert (holding.rank in transfer.whole) == (want.shards[holding.rank] == Shard.whole(want.shape))
    return [None if target is None else bytes(target) for target in own]


def read_slab(slab: Slab, source: list[bytes | None]) -> np.ndarray:
    """A slab's cells from the shards; every cell must be read."""
    data, times = np.full(slab.shape, 0xAA, np.uint8), np.zeros(slab.shape, np.uint8)
    for contact in slab.reads:
        held = source[contact.rank]
        assert held is not None
        assert 0 <= contact.offset <= contact.offset + contact.size <= len(held)
        region = np.frombuffer(held[contact.offset : contact.offset + contact.size], np.uint8)
        if contact.begin is not None:
            data.reshape(-1)[contact.begin : contact.begin + contact.size] = region
            times.reshape(-1)[contact.begin : contact.begin + contact.size] += 1
        else:
            contact.put(region, data)
            for _, here in contact.moves:
                times[here] += 1
    assert slab.size == 0 or (times == 1).all(), "every cell is read once"
    return data


@st.composite
def conversions(draw: st.DrawFn) -> tuple[Deal, Deal, np.ndarray, int, int]:
    """Two layouts of one tensor of random cells, bits a cell, and a slab limit."""
    shape = draw(shapes)
    bits = draw(st.sampled_from([4, 8, 16, 32]))
    if bits == 4:
        shape = (*shape[:-1], shape[-1] // 2 * 2) if shape else (2,)
    have, want = draw(deals(shape)), draw(deals(shape))
    cells = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2**bits, shape, np.int64)
    return have, want, cells, bits, draw(st.sampled_from([1, 2, 3, 7, 16, 64, 100_000]))


@given(conversions())
@settings(max_examples=300)
def test_split_merge_and_reshard_are_the_oracle(case: tuple[Deal, Deal, np.ndarray, int, int]) -> None:
    have, want, cells, bits, limit = case
    assume(bits != 4 or (aligned(have) and aligned(want)))
    full = Layout.replicated(have.shape, 1)
    whole = [as_bytes(cells, bits)]
    have_bytes = [as_bytes(have.shard(cells, rank), bits) for rank in range(len(have.ranks))]
    want_bytes = [as_bytes(want.shard(cells, rank), bits) for rank in range(len(want.ranks))]
    assert copy(whole, full, have.layout(), bits, limit) == have_bytes, "split"
    assert copy(have_bytes, have.layout(), full, bits, limit) == whole, "merge"
    assert copy(have_bytes, have.layout(), want.layout(), bits, limit) == want_bytes, "reshard"


@given(conversions())
def test_a_cut_inside_a_byte_is_refused_and_nothing_else_is(case: tuple[Deal, Deal, np.ndarray, int, int]) -> None:
    _, want, _, _, _ = case
    assume(want.shape and 0 not in want.shape and want.shape[-1] % 2 == 0)
    full, layout = Layout.replicated(want.shape, 1), want.layout()
    if aligned(want) or layout.is_replicated:
        plan(full, layout, 4)
    else:
        with pytest.raises(InputError, match="falls inside a byte"):
            plan(full, layout, 4)


def test_four_bit_cells_are_cut_too() -> None:
    """Often enough: the property above draws few aligned layouts."""
    cells = np.arange(48).reshape(3, 16) % 16
    layout = Layout.along((3, 16), 1, [(Span(0, 4), Span(8, 10)), (Span(4, 8), Span(10, 16))], [8, 10])
    own = copy([as_bytes(cells, 4)], Layout.replicated((3, 16), 1), layout, 4, 5)
    first = np.concatenate([cells[:, 0:4], cells[:, 8:10], np.zeros((3, 2), int)], 1)
    second = np.concatenate([cells[:, 4:8], cells[:, 10:16]], 1)
    assert own == [as_bytes(first, 4), as_bytes(second, 4)]


def test_a_plan_between_different_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a tensor of \[2, 3\] cannot become one of \[3, 2\]"):
        plan(Layout.replicated((2, 3), 1), Layout.replicated((3, 2), 1), 8)


# ---------------------------------------------------------------------------------------------- through files

DTYPE = {4: "F4", 8: "U8", 16: "BF16", 32: "F32"}


def outputs(layouts: dict[str, Layout], ranks: int) -> tuple[Output, ...]:
    """One file for each rank."""
    return tuple(Output(f"rank-{rank}.safetensors", rank, 0, 0, len(layouts)) for rank in range(ranks))


def sharded(folder: Path, layouts: dict[str, Layout], bits: dict[str, int], ranks: int) -> Checkpoint:
    """The shard files that a test wrote, opened as a checkpoint."""
    paths = [folder / f"rank-{rank}.safetensors" for rank in range(ranks)]
    headers = [read_header(path) for path in paths]
    stats = [path.stat() for path in paths]
    files = tuple(
        WeightFile(path.name, path, info.st_size, {}, (info.st_size, info.st_mtime_ns, info.st_ino))
        for path, info in zip(paths, stats, strict=True)
    )
    tensors = {
        name: Stored(
            name,
            DTYPE[bits[name]],
            layout,
            tuple(
                Place(rank, headers[rank].entries[name].offset) if shard else None
                for rank, shard in enumerate(layout.shards)
            ),
            0,
        )
        for name, layout in layouts.items()
    }
    return Checkpoint(folder, ranks, files, tensors, {}, ())


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, tuple[Deal, Deal, np.ndarray, int]], int, int]:
    """A few tensors, each with two layouts over the same two numbers of ranks."""
    first, second = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    tensors = {}
    for name in ("b", "a", "c.weight", "d"):
        have, want, cells, bits, _ = draw(conversions())
        if bits == 4 and not (aligned(have) and aligned(want)):
            bits, cells = 8, cells
        tensors[name] = resized(have, first), resized(want, second), cells, bits
    return tensors, first, second


def resized(deal: Deal, ranks: int) -> Deal:
    """The same over another number of ranks: more hold nothing, and where ranks are taken away rank 0 holds all."""
    whole = tuple((tuple(range(n)), n) for n in deal.shape)
    kept = deal.ranks[:ranks] + (None,) * (ranks - len(deal.ranks))
    return Deal(deal.shape, kept if len(deal.ranks) <= ranks else (whole, *kept[1:]))


@given(models(), st.sampled_from([1, 5, 64, 4096]), st.integers(1, 3))
@settings(max_examples=60)
def test_files_hold_what_the_oracle_says(
    case: tuple[dict[str, tuple[Deal, Deal, np.ndarray, int]], int, int], slab: int, workers: int
) -> None:
    tensors, first, second = case
    bits = {name: held[3] for name, held in tensors.items()}
    have = {name: held[0].layout() for name, held in tensors.items()}
    want = {name: held[1].layout() for name, held in tensors.items()}
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute_module, "SLAB", slab)
        root = Path(place)
        (root / "full").mkdir()
        save(
            root / "full" / "model.safetensors",
            {
                name: Tensor(DTYPE[width], cells.shape, as_bytes(cells, width) or b"")
                for name, (_, _, cells, width) in tensors.items()
            },
        )
        source = open_full(root / "full")

        def convert(checkpoint: Checkpoint, wanted: dict[str, Layout], ranks: int, target: Path) -> None:
            items = tuple(Item(checkpoint.tensors[name], layout) for name, layout in wanted.items())
            work = Plan(checkpoint, items, outputs(wanted, ranks), ranks, Plain(lambda output: {}))
            with Staging(target, Head({}, tuple(output.name for output in work.outputs))) as staging:
                execute_module.execute(work, staging, "xxh3-128", workers)
                staging.commit()

        convert(source, have, first, root / "have")
        held = sharded(root / "have", have, bits, first)
        convert(held, want, second, root / "want")
        convert(held, {name: Layout.replicated(held.shape, 1) for name, held in have.items()}, 1, root / "again")
        for folder, ranks, which in (("have", first, 0), ("want", second, 1)):
            for rank in range(ranks):
                found = {name: own.data for name, own in load(root / folder / f"rank-{rank}.safetensors").items()}
                expected = {
                    name: as_bytes(tensors[name][which].shard(tensors[name][2], rank), bits[name]) for name in tensors
                }
                assert found == {name: data for name, data in expected.items() if data is not None}
        again = load(root / "again" / "rank-0.safetensors")
        assert {name: own.data for name, own in again.items()} == {
            name: as_bytes(cells, width) for name, (_, _, cells, width) in tensors.items()
        }
