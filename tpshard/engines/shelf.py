"""The engines that tpshard knows, and which of them wrote a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources

from tpshard.document import did_you_mean, parse_documents
from tpshard.engines.profile import Engine, Family
from tpshard.engines.profile_parsing import parse_engine
from tpshard.errors import InputError, UsageError, printable
from tpshard.policy import meets


@cache
def engines() -> Mapping[str, Engine]:
    """All profiles by name."""
    found: dict[str, Engine] = {}
    for item in sorted(resources.files("tpshard").joinpath("engines").iterdir(), key=lambda entry: entry.name):
        if item.name.endswith(".yaml"):
            for document in parse_documents(item.read_text("utf-8"), item.name, trusted=True):
                engine = parse_engine(document)
                found[engine.name] = engine
    return found


def engine_text(engine: Engine) -> str:
    """The YAML file that holds a profile, as written."""
    return resources.files("tpshard").joinpath("engines", engine.source).read_text("utf-8")


def engine_called(name: str) -> Engine:
    """Raises UsageError where there is none."""
    known = engines()
    base, _, variant = name.partition(":")
    if base not in known:
        hint = did_you_mean(name, known) or f"engines: {', '.join(known)}"
        raise UsageError(f"no engine is called '{printable(name, 40)}'", hint=hint)
    engine = known[base]
    if variant and variant not in engine.variants:
        hint = f"variants: {', '.join(engine.variants)}" if engine.variants else "it has no variants"
        raise UsageError(f"{engine.title} has no variant '{printable(variant, 40)}'", hint=hint)
    families = tuple(family for family in engine.families if not variant or family.variant == variant)
    return replace(engine, families=families, name=name)


def families_for(engine: Engine, config: Mapping[str, object]) -> list[Family]:
    """The names that an engine has for a model, the preferred first. Raises InputError where it has none."""
    model_type = config.get("model_type")
    order = list(engine.variants)
    found = [family for family in engine.families if family.conditions and meets(config, family.conditions)]
    if found:
        return sorted(found, key=lambda family: order.index(family.variant) if family.variant else 0)
    known = engine.model_types
    if model_type in known:
        some = {key: config.get(key) for f in engine.families if model_type in f.model_types for key in f.conditions}
        told = ", ".join(f"{key} {printable(str(value), 40)}" for key, value in some.items())
        raise InputError(f"{engine.title}: no names are known for this kind of model: {told}")
    what = f"{engine.title}: no names are known for model_type '{printable(str(model_type), 40)}'"
    hint = f"known: {', '.join(known)}" if config else "there is no config.json; give one with --config"
    raise InputError(what, hint=hint)
