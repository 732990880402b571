"""Which engine has settings of its own."""

from __future__ import annotations

from collections.abc import Mapping

from tpshard.engines.profile import Engine
from tpshard.engines.settings.deepseek import DeepSeek
from tpshard.engines.settings.kind import Settings
from tpshard.engines.settings.megatron import Megatron
from tpshard.engines.settings.meta import Meta
from tpshard.engines.settings.trtllm import TensorRT

_OWN: Mapping[str, Settings] = {
    "deepseek": DeepSeek(),
    "megatron": Megatron(),
    "meta": Meta(),
    "trtllm": TensorRT(),
}
_NONE = Settings()


def settings_of(engine: Engine) -> Settings:
    return _OWN.get(engine.name.partition(":")[0], _NONE)
