"""Reading bytes of a checkpoint's files, wherever a rank's own tensor lies."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from tpshard.checkpoint import Checkpoint, Place, Stored
from tpshard.errors import InputError, StorageError, printable
from tpshard.slabs import Bytes, Contact, Rooms, Slab
from tpshard.staging import storage_errors
from tpshard.stores.path import StorePath
from tpshard.stores.ranges import GAP, Wanted, read_ranges
from tpshard.views import LARGEST_COVER, MOST_IDLE, View, blocks

MAX_OPEN = 64


class SourceFiles:
    """A checkpoint's files, open for reading, a bounded number at a time. Belongs to one thread."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._in_store = isinstance(checkpoint.folder, StorePath)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._rooms = Rooms()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def read(self, stored: Stored, rank: int, offset: int, into: Bytes) -> None:
        """Fill ``into`` from byte ``offset`` of one rank's own tensor."""
        place = self._place(stored, rank)
        if place.view is None:
            self._read(place.file, place.offset + offset, into)
            return
        if self._in_store:
            self._read_view(place, place.view, offset, into)
            return
        for block in blocks(place.view, offset, len(into), MOST_IDLE):
            room = self._rooms.get(1, block.extent)
            self._read(place.file, place.offset + block.at, room)
            there = np.ndarray(block.shape, np.uint8, room.data, 0, block.strides)
            np.ndarray(block.shape, np.uint8, into.data, block.own, block.own_strides)[...] = there

    def fill(self, slabs: Iterable[tuple[Stored, Slab, int]], buffer: Bytes) -> None:
        """Fill slabs that lie in ``buffer`` from the given place on. What is contiguous in file and buffer, as the
        small tensors of a full checkpoint are, is read at once."""
        if self._in_store:
            self._fill_from_store(slabs, buffer)
            return
        file, at, begin, size = -1, 0, 0, 0  # the run to be read
        for stored, slab, start in slabs:
            for contact in slab.reads:
                place = self._place(stored, contact.rank)
                if contact.begin is None:
                    room = self._rooms.get(0, contact.size)
                    self.read(stored, contact.rank, contact.offset, room)
                    contact.put(room, buffer[start : start + slab.size].reshape(slab.shape))
                    continue
                next_begin = start + contact.begin
                if place.view is not None:
                    self.read(stored, contact.rank, contact.offset, buffer[next_begin : next_begin + contact.size])
                    continue
                next_file, next_at = place.file, place.offset + contact.offset
                if (file, at + size, begin + size) == (next_file, next_at, next_begin):
                    size += contact.size
                    continue
                if size:
                    self._read(file, at, buffer[begin : begin + size])
                file, at, begin, size = next_file, next_at, next_begin, contact.size
        if size:
            self._read(file, at, buffer[begin : begin + size])

    # ------------------------------------------------------------------------------------------ from a store

    def _fill_from_store(self, slabs: Iterable[tuple[Stored, Slab, int]], buffer: Bytes) -> None:
        """All at once: each request costs a while, whatever its size."""
        wanted: list[Wanted] = []
        scattered: list[tuple[Contact, Bytes, Bytes]] = []
        for stored, slab, start in slabs:
            for contact in slab.reads:
                place = self._place(stored, contact.rank)
                if contact.begin is None:
                    room = np.empty(contact.size, np.uint8)
                    scattered.append((contact, room, buffer[start : start + slab.size].reshape(slab.shape)))
                else:
                    room = buffer[start + contact.begin : start + contact.begin + contact.size]
                if place.view is not None:
                    self._read_view(place, place.view, contact.offset, room)
                else:
                    path = self._checkpoint.files[place.file].path
                    wanted.append(Wanted(path, place.offset + contact.offset, room.data))
        read_ranges(wanted)
        for contact, room, there in scattered:
            contact.put(room, there)

    def _read_view(self, place: Place, view: View, offset: int, into: Bytes) -> None:
        """What lies between the strips is read with them where that is less than a request costs."""
        path = self._checkpoint.files[place.file].path
        strips = len(view.shape) > 1 and view.strides[-2] - view.shape[-1] <= GAP
        step = max(view.shape[-1], LARGEST_COVER * view.size // max(1, view.extent)) if strips else len(into)
        for begin in range(0, len(into), max(1, step)):
            part = into[begin : begin + step]
            idle = LARGEST_COVER if strips else 0
            found = [(b, np.empty(b.extent, np.uint8)) for b in blocks(view, offset + begin, len(part), idle)]
            read_ranges([Wanted(path, place.offset + block.at, room.data) for block, room in found])
            for block, room in found:
                there = np.ndarray(block.shape, np.uint8, room.data, 0, block.strides)
                np.ndarray(block.shape, np.uint8, part.data, block.own, block.own_strides)[...] = there

    # ------------------------------------------------------------------------------------------ places

    def _place(self, stored: Stored, rank: int) -> Place:
        place = stored.places[rank]
        if place is None:
            raise InputError(f"{printable(stored.name)}: rank {rank} holds nothing of it")
        return place

    def _read(self, index: int, offset: int, into: Bytes) -> None:
        path, room, done = self._checkpoint.files[index].path, into.data, 0
        if isinstance(path, StorePath):
            path.fill(offset, room)
            return
        fd = self._descriptor(index)
        while done < len(room):
            with storage_errors(path):
                count = os.preadv(fd, [room[done:]], offset + done)
            if count == 0:
                raise StorageError(f"{path}: ends at byte {offset + done}, {len(room) - done} more were expected")
            done += count

    def _descriptor(self, index: int) -> int:
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        if len(self._open) >= MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        path = self._checkpoint.files[index].path
        with storage_errors(path):
            self._open[index] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[index]
