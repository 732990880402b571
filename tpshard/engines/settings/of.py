"""Which engine has settings of its own."""

from __future__ import annotations

from collections.abc import Mapping

from tpshard.engines.profile import Engine
from tpshard.engines.settings.kind import Settings
from tpshard.engines.settings.megatron import Megatron

_OWN: Mapping[str, Settings] = {"megatron": Megatron()}
_NONE = Settings()


def settings_of(engine: Engine) -> Settings:
    return _OWN.get(engine.name.partition(":")[0], _NONE)
