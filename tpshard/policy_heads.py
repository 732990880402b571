"""Which keys of config.json count heads, and how they are named in a drafted policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_QUERY = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "encoder_attention_heads",
          "decoder_attention_heads", "num_encoder_attention_heads")  # fmt: skip
_KEY_VALUE = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "n_kv_heads", "multi_query_group_num")
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "hidden_dim", "d_embed")


class Heads:
    """The head counts of a config, as expressions; ``variables`` are those that were asked for."""

    def __init__(self, config: Mapping[str, Any], full: Mapping[str, Any]) -> None:
        self._config, self._full = config, full
        self.variables: dict[str, str] = {}
        self._values: dict[str, int] = {}

    def of(self, path: str) -> tuple[str, str]:
        """The names of variables for query and key-value heads of layers at a path; empty where none are known."""
        trail, table = self._table(path)
        side = next((word for word in ("decoder", "encoder") if word in path), "")
        query = self._first(table, (f"{side}_attention_heads", f"num_{side}_attention_heads", *_QUERY))
        if not query:
            return "", ""
        key_value = self._first(table, (f"{side}_key_value_heads", *_KEY_VALUE))
        if key_value and table[key_value] == table[query]:
            key_value = key_value if table.get("num_key_value_heads") else ""
        own = self._named("H", trail, table, query)
        return own, self._named("K", trail, table, key_value) if key_value else own

    def value(self, name: str) -> int:
        """The number that a variable stands for."""
        return self._values[name]

    def hidden(self, path: str) -> int:
        """The width between the blocks of layers at a path; 0 where it is not known."""
        _, table = self._table(path)
        found = self._first(table, _HIDDEN)
        return int(table[found]) if found else 0

    @property
    def words(self) -> set[int]:
        """Sizes of vocabularies."""
        tables = [self._full, *(value for value in self._full.values() if isinstance(value, Mapping))]
        return {
            value
            for table in tables
            for key, value in table.items()
            if "vocab" in key
            and "type" not in key
            and isinstance(value, int)
            and not isinstance(value, bool)
            and value > 1
        }

    def _table(self, path: str) -> tuple[str, Mapping[str, Any]]:
        """The config that is about a path: one inside the config, or all of it."""
        inside = {
            key: value for key, value in self._full.items() if key.endswith("_config") and isinstance(value, Mapping)
        }
        for key, value in inside.items():
            if key.removesuffix("_config") in path.replace("visual", "vision") and self._first(value, _QUERY):
                return f"{key}.", value
        if not self._first(self._full, _QUERY):
            for key in ("text_config", *inside):
                if key in inside and self._first(inside[key], _QUERY):
                    return f"{key}.", inside[key]
        return "", self._full

    @staticmethod
    def _first(table: Mapping[str, Any], keys: tuple[str, ...]) -> str:
        for key in keys:
            value = table.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return key
        return ""

    def _named(self, letter: str, trail: str, table: Mapping[str, Any], key: str) -> str:
        """The variable for a key; the number itself where config.json does not have it."""
        told: Any = self._config
        for part in f"{trail}{key}".split("."):
            told = told.get(part) if isinstance(told, Mapping) else None
        expression = f"{trail}{key}" if isinstance(told, int) else str(table[key])
        for name, known in self.variables.items():
            if known == expression and name.startswith(letter):
                return name
        taken = [name for name in self.variables if name.startswith(letter)]
        name = letter if not taken else f"{letter}{len(taken) + 1}"
        self.variables[name] = expression
        self._values[name] = int(table[key])
        return name
