"""Opening an engine's folder: every logical tensor with its layout and its places, manifest or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpshard.checkpoint import Checkpoint, Place, Stored, open_checkpoint, open_shards
from tpshard.companions import assign_stored
from tpshard.engines.bytewise import are_equal, is_widened
from tpshard.engines.dealt import check_once, dealt
from tpshard.engines.finding import recognised, source_called
from tpshard.engines.inference import Inferred, infer
from tpshard.engines.joints import Joined, Logical, join
from tpshard.engines.profile import Engine, Family
from tpshard.engines.readers.kind import Asked, Reader
from tpshard.engines.rules import engine_policy
from tpshard.engines.settings.kind import Told
from tpshard.engines.settings.of import settings_of
from tpshard.engines.shelf import engine_called, families_for
from tpshard.engines.unrecorded import unrecorded, unrecorded_tensor
from tpshard.errors import InputError, UsageError, printable
from tpshard.folder import (
    CONFIG,
    KEPT_CONFIG,
    MANIFEST_NAME,
    carried_files,
    config_bytes,
    config_of,
    read_bytes,
    read_config,
    read_json,
)
from tpshard.frames import Tensor
from tpshard.header import Entry, byte_count
from tpshard.layout import Layout
from tpshard.library import choose_policy
from tpshard.manifest import FileRecord, Manifest
from tpshard.manifest_parsing import read_manifest
from tpshard.mesh import Grid
from tpshard.quantised import read_quantised

NATIVE = "native"  # tpshard's own shards
SIZES = (  # what config.json and an engine's own settings have to agree on
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "num_local_experts",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """A folder of ranks' files: whose it is (None: recorded or recognised), and its config.json where it has none."""

    folder: Path
    engine: str | None = None
    config: Mapping[str, Any] | None = None

    @classmethod
    def given(cls, folder: Path, engine: str | None, config: Path | None) -> Source:
        """``config``: a config.json, or a folder that has one."""
        return cls(folder, engine, config_of(config) if config else None)

    def open(self, policy: str = "auto") -> Checkpoint:
        return open_ranks(self.folder, self.engine, self.config, policy)

    @property
    def is_native(self) -> bool:
        """Whether it is one of tpshard's own shard folders, or none at all."""
        if self.engine is not None:
            return self.engine == NATIVE
        if (self.folder / MANIFEST_NAME).exists():
            try:
                return not read_manifest(self.folder).engine
            except InputError:
                return True  # opening it says what is wrong
        return recognised(self.folder) is None


def open_ranks(
    folder: Path, engine: str | None = None, config: Mapping[str, Any] | None = None, policy: str = "auto"
) -> Checkpoint:
    """A folder of ranks' files: tpshard's own, or an engine's. ``engine``: where it is not recorded or not clear;
    ``config``: where the folder has none. Raises InputError, UsageError."""
    if engine == NATIVE:
        return open_shards(folder)
    if (folder / MANIFEST_NAME).exists():
        manifest = read_manifest(folder)
        if engine not in (None, manifest.engine or NATIVE):
            what = f"{folder}: the manifest says that these are {manifest.engine or NATIVE}'s files, not {engine}'s"
            raise UsageError(what, hint="leave out --from")
        if not manifest.engine:
            return open_shards(folder)
        return _Opening(folder, engine_called(manifest.engine), config).with_manifest(manifest)
    found = source_called(engine) if engine else recognised(folder)
    if found is None:
        return open_shards(folder)  # says what is missing
    if isinstance(found, Reader):
        return found.open(Asked(folder, config, policy))
    return _Opening(folder, found, config).without_manifest(policy)


def open_any(source: Source) -> Checkpoint:
    """A checkpoint folder of any kind."""
    return open_checkpoint(source.folder) if source.is_native else source.open()


class _Opening:
    """An engine's folder with its headers read."""

    def __init__(self, folder: Path, engine: Engine, config: Mapping[str, Any] | None) -> None:
        self.folder, self.engine = folder, engine
        self.settings = settings_of(engine)
        self.dealt = dealt(folder, engine, self.settings)
        self.mesh, self.files, self.ranks = self.dealt.mesh, self.dealt.files, self.dealt.ranks
        self.told = Told(folder, self.mesh, self.entries(), self.dealt.objects, self.dealt.store)
        self.beside: dict[str, bytes] = {}
        self.config = self._config(config)

    def _config(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """The model's config.json: as given, as it was kept, or made from what the engine says of itself."""
        told = self.settings.config(self.told)
        config = self._chosen_config(given, told)
        for key in SIZES:
            if None not in (told.get(key), config.get(key)) and told[key] != config[key]:
                what = f"{key} is {config[key]} in config.json, {told[key]} by {self.engine.title}'s own settings"
                raise InputError(f"{self.folder}: {what}", hint="is config.json the model's?")
        return config

    def _chosen_config(self, given: Mapping[str, Any] | None, told: dict[str, Any]) -> dict[str, Any]:
        if given is not None:
            config = self.settings.given(given)
        elif (self.folder / KEPT_CONFIG).exists():
            self.beside[CONFIG] = read_bytes(self.folder / KEPT_CONFIG)
            return read_json(self.folder / KEPT_CONFIG)
        else:
            config = read_config(self.folder) if CONFIG not in self.settings.own_files else {}
            if config or not told:
                return config
            config = told
        self.beside[CONFIG] = config_bytes(config)
        return config

    def entries(self) -> list[dict[str, Entry]]:
        return [{name: entry for name, (_, entry) in own.items()} for own in self.ranks]

    def family(self) -> Family:
        """Whose names the files have: the first that knows them all, or the first."""
        version = self.settings.version(self.told)
        fitting = [f for f in families_for(self.engine, self.config) if version in (f.versions or ("",))]
        if self.engine.store:
            fitting = [family for family in fitting if (family.variant == self.engine.store) == self.dealt.store]
        if not fitting:
            kind = self.engine.store if self.dealt.store else version
            raise InputError(
                f"{self.folder}: has files of {self.engine.title} {kind}, and is read as {self.engine.name}",
                hint="leave out --from",
            )
        family = next((found for found in map(self._as_tied, fitting) if self._knows_all(found)), None)
        return family or self._as_tied(fitting[0])

    def _knows_all(self, family: Family) -> bool:
        return all(family.engine_names.find(name) is not None for name in self.ranks[0])

    def _as_tied(self, family: Family) -> Family:
        tied = family.tied
        if tied is None:
            return family
        embedding = next(recipe.name for recipe in family.recipes if recipe.parts[0].text == tied.embedding)
        if tied.name and not any(embedding.text in own for own in self.ranks):
            return family.when_tied()
        if tied.last and self.config.get("tie_word_embeddings"):
            return family.when_tied()
        return family

    def without_manifest(self, policy: str) -> Checkpoint:
        family, chosen = self.family(), choose_policy(policy, self.config)
        vocabulary = family.vocabulary.tensors if family.vocabulary else ()
        guide = engine_policy(self.engine, family, chosen, dict.fromkeys(vocabulary, (1, 1)), 1)
        inferred = infer(self.engine, family, guide, self.config, self.mesh, self.entries(), self._was_widened)
        shapes = {name: shape for name, (_, shape) in inferred.tensors.items()}
        sizes = {name: byte_count(dtype, shape) for name, (dtype, shape) in inferred.tensors.items()}
        own = engine_policy(self.engine, family, chosen, shapes, self.mesh.tp, inferred.rows)
        grid = Grid(self.mesh, self.engine.whole_experts, inferred.layers)
        assigned = assign_stored(own, self.config, shapes, sizes, grid, read_quantised(self._whole(inferred)))
        records = [
            unrecorded_tensor(name, dtype, assigned.tensors[name].layout, assigned.tensors[name].role)
            for name, (dtype, _) in inferred.tensors.items()
        ]
        files = [
            FileRecord(file.name, file.pp * self.mesh.tp + file.tp, file.part, stored.size, "")
            for file, stored in zip(self.dealt.found, self.files, strict=True)
        ]
        manifest = unrecorded(self.engine.name, self.mesh, chosen, records, files)
        checkpoint = self._checkpoint(family, manifest, list(inferred.left))
        if self.dealt.store:
            check_once(checkpoint)
        return self._without_copy(checkpoint, family)

    def _was_widened(self, rank: int, name: str) -> bool:
        """Whether a tensor of F32 has BF16's numbers, in a model of BF16."""
        index, entry = self.ranks[rank][name]
        own = Stored(name, entry.dtype, Layout.replicated(entry.shape, 1), (Place(index, entry.offset, entry.view),), 0)
        told = self.config.get("dtype") or self.config.get("torch_dtype")
        return told == "bfloat16" and is_widened(Checkpoint(self.folder, 1, tuple(self.files), {}, {}, ()), own)

    def _without_copy(self, checkpoint: Checkpoint, family: Family) -> Checkpoint:
        """Without the head that the engine has and the model, whose words are predicted by its embedding, has not."""
        tied = family.tied
        if tied is None or not tied.copied or not self.config.get("tie_word_embeddings"):
            return checkpoint
        head, embedding = checkpoint.tensors.get(tied.head), checkpoint.tensors.get(tied.embedding)
        if head is None or embedding is None:
            return checkpoint
        if not are_equal(checkpoint, embedding, head):
            what = f"{tied.head} and {tied.embedding} differ, and config.json ties them"
            raise InputError(f"{self.folder}: {what}", hint="if both are wanted, set tie_word_embeddings to false")
        kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name != tied.head}
        warning = f"{tied.head} is the embedding again, and config.json ties them: left out"
        return replace(checkpoint, tensors=kept, warnings=(*checkpoint.warnings, warning))

    def _whole(self, inferred: Inferred) -> Checkpoint:
        """The checkpoint that the folder was cut from, as far as names, dtypes and shapes go."""
        tensors = {
            name: Stored(name, dtype, Layout.replicated(shape, 1), (None,), 0)
            for name, (dtype, shape) in inferred.tensors.items()
        }
        return Checkpoint(self.folder, 1, tuple(self.files), tensors, self.config, ())

    def with_manifest(self, manifest: Manifest) -> Checkpoint:
        if manifest.mesh != self.mesh:
            what = f"{self.folder}: has files of {self.mesh.ranks} ranks, the manifest is of {manifest.ranks}"
            raise InputError(what, hint="is the folder complete?")
        listed, there = {record.name: record.size for record in manifest.files}, {f.name: f.size for f in self.files}
        if listed != there:
            name = min(name for name in {*listed, *there} if listed.get(name) != there.get(name))
            what = f"has {there[name]} bytes" if name in there else "is not there"
            raise InputError(f"{self.folder / name}: {what}, the manifest says {listed.get(name, 'nothing of it')}")
        return self._checkpoint(families_for(self.engine, self.config)[0], manifest, [])

    def _checkpoint(self, family: Family, manifest: Manifest, left: Sequence[str]) -> Checkpoint:
        logical = [Logical(record.name, record.dtype, record.layout) for record in manifest.tensors]
        joined = join(self.engine, family, logical, self.mesh, self.config)
        places = self._places(joined, set(left))
        carried = [record.name for record in manifest.carried] if manifest.recorded else self._carried()
        apart = {*self.settings.own_files, *self.dealt.own, KEPT_CONFIG, *self.beside}
        return Checkpoint(
            folder=self.folder,
            ranks=self.mesh.ranks,
            files=tuple(self.files),
            tensors={
                record.name: Stored(
                    record.name, record.dtype, record.layout, tuple(places[index]), record.source, record
                )
                for index, record in enumerate(manifest.tensors)
                if not record.copy_of
            },
            config=self.config,
            carried=tuple(name for name in carried if name not in apart),
            beside=self.beside,
            manifest=manifest,
            warnings=(
                *self.dealt.warnings,
                *(f"{printable(name)} follows from the configuration: left out" for name in left),
            ),
        )

    def _carried(self) -> list[str]:
        weights = {file.name for file in self.dealt.found}
        return [name for name in carried_files(self.folder) if name not in weights]

    def _places(self, joined: Joined, left: set[str]) -> list[list[Place | None]]:
        """Of every logical tensor on every rank; each header has to be as the profile would have written it."""
        places: list[list[Place | None]] = [[None] * self.mesh.ranks for _ in joined.logical]
        for rank, own in enumerate(self.ranks):
            unmet = set(own) - left
            for tensor, parts in joined.of_rank(rank):
                found = own.get(tensor.name)
                if found is None:
                    if tensor.constant is not None:
                        continue  # not every version of the engine has it
                    raise InputError(f"{self.folder}: rank {rank} lacks {printable(tensor.name)}")
                index, entry = found
                if (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
                    raise InputError(
                        f"{self.files[index].path}: {printable(tensor.name)}: {entry.dtype} {list(entry.shape)} in the "
                        f"file, {tensor.dtype} {list(tensor.shape)} expected of {self.engine.title} (rank {rank})",
                        hint="is config.json the model's?",
                    )
                unmet.discard(tensor.name)
                if tensor.constant is not None:
                    self._check_constant(index, entry, tensor)
                for part in parts:
                    places[part.logical][rank] = Place(index, entry.offset + part.offset, part.view)
            if unmet:
                raise InputError(f"{self.folder}: rank {rank} holds {printable(min(unmet))}, which has no place there")
        return places

    def _check_constant(self, file: int, entry: Entry, tensor: Tensor) -> None:
        path = self.files[file].path
        if read_bytes(path, entry.offset, entry.size) != tensor.constant:
            what = f"{printable(tensor.name)} is not what {self.engine.title} has by itself"
            raise InputError(f"{path}: {what}", hint="scales of a key-value cache are not carried over")
