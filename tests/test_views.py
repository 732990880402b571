"""Views against NumPy's own strides: whatever is asked for, the same bytes, and no byte of others' written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpshard.views import MOST_IDLE, View, blocks, strided


@st.composite
def views(draw: st.DrawFn) -> tuple[np.ndarray, list[int], list[int]]:
    """A file's bytes, and a tensor in it: its axes in any order, some of them longer in the file."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    order = [*draw(st.permutations(range(len(sizes) - 1))), len(sizes) - 1]
    longer = [sizes[axis] + draw(st.integers(0, 2)) for axis in order]
    pitch = [int(np.prod(longer[place + 1 :])) for place in range(len(sizes))]
    strides = [pitch[order.index(axis)] for axis in range(len(sizes))]
    file = np.random.default_rng(int(np.prod(longer))).integers(1, 256, int(np.prod(longer)), np.uint8)
    return file, sizes, strides


@given(views(), st.data())
def test_any_part_of_any_view(found: tuple[np.ndarray, list[int], list[int]], data: st.DataObject) -> None:
    file, sizes, strides = found
    own = np.ndarray(sizes, np.uint8, file, 0, strides).copy().reshape(-1)
    view = strided(sizes, strides)
    if view is None:
        assert np.array_equal(file[: own.size], own)
        return
    begin = data.draw(st.integers(0, own.size))
    end = data.draw(st.integers(begin, own.size))
    for idle in (0, MOST_IDLE):
        got, written = np.zeros(end - begin, np.uint8), np.zeros_like(file)
        for block in blocks(view, begin, end - begin, idle):
            there = np.ndarray(block.shape, np.uint8, file[block.at : block.at + block.extent].copy(), 0, block.strides)
            np.ndarray(block.shape, np.uint8, got, block.own, block.own_strides)[...] = there
            if not idle:
                assert block.extent == block.size  # it may be written as one run
                written[block.at : block.at + block.extent] += 1
        assert np.array_equal(got, own[begin:end])
        if not idle:
            assert written.sum() == end - begin
            assert written.max(initial=0) <= 1


@pytest.mark.parametrize(
    ("shape", "strides", "what"),
    [((2, 3), (3,), "2 dimensions"), ((2, 3), (1, 3), "do not end in 1"), ((2, 3), (0, 1), "not all positive")],
)
def test_views_that_cannot_be(shape: tuple[int, ...], strides: tuple[int, ...], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        View(shape, strides)
