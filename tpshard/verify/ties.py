"""The output head and the embedding: dealt alike where they are one weight, both there where they are two."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tpshard.checkpoint import Checkpoint, Stored
from tpshard.verify.axes import held
from tpshard.verify.families import are_tied
from tpshard.verify.report import Finding
from tpshard.verify.slots import Slot, slot_of

_PREDICTS_WORDS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")  # endings of classes that have an output head


def check_ties(shards: Checkpoint, family: Mapping[str, Slot]) -> list[Finding]:
    """Findings about the output head. Silent about base models and classifiers, which have none."""
    words = [(tensor, slot) for tensor in shards.tensors.values() if (slot := _of_words(tensor, family))]
    embeddings = [(tensor, slot) for tensor, slot in words if slot.consumer]
    heads = [(tensor, slot) for tensor, slot in words if not slot.consumer]
    if not embeddings:
        return []
    if are_tied(shards.config):
        found = [_dealt_otherwise(*head, *embeddings[0]) for head in heads]
        return [finding for finding in found if finding]
    classes = shards.config.get("architectures")
    named = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
    if heads or not any(name.endswith(_PREDICTS_WORDS) for name in named):
        return []
    heads_of_family = (n for n, slot in family.items() if slot.meaning == "word" and not slot.consumer)
    missing = " or ".join(name for name in heads_of_family if not name.endswith(".bias"))
    said = "" if "tie_word_embeddings" in shards.config else f", by default of {shards.config.get('model_type')}"
    return [Finding(f"{missing} missing and tie_word_embeddings false{said}", file="config.json")]


def _of_words(tensor: Stored, family: Mapping[str, Slot]) -> Slot | None:
    """The slot of a matrix with a row for each word; None for everything else, biases too."""
    slot = slot_of(family, tensor.name)
    return slot if slot and slot.meaning == "word" and len(tensor.shape) >= 2 else None


def _dealt_otherwise(head: Stored, slot: Slot, embedding: Stored, other: Slot) -> Finding | None:
    """A tie is one weight under two names: on each rank the same words, in as many rows."""
    for rank in range(head.layout.ranks):
        here, there = held(head, slot.axis, rank), held(embedding, other.axis, rank)
        rows = [
            shard.shape[axis] if (shard := tensor.layout.shards[rank]) else 0
            for tensor, axis in ((head, slot.axis), (embedding, other.axis))
        ]
        if rows[0] != rows[1] or not np.array_equal(here, there):
            what = (
                f"is tied to {embedding.name} but dealt otherwise: {len(here)} words in {rows[0]} rows from word "
                f"{here[0] if len(here) else 'none'}, there {len(there)} in {rows[1]} from "
                f"{there[0] if len(there) else 'none'}"
            )
            return Finding(what, tensor=head.name, rank=rank)
    return None
