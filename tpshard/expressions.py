"""Integer arithmetic over the keys of config.json: what stands in a policy's ``vars``, ``heads``, ``parts`` …

``num_key_value_heads | num_attention_heads`` is the first that is present; ``+ - * / //``, parentheses, dotted keys
and ``[index]`` work as expected; ``/`` must divide exactly. The text is parsed, never evaluated as Python.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from tpshard.errors import PolicyError, printable

MAX_LENGTH = 256
MAX_VALUE = 2**53
MAX_STEPS = 10_000  # variables that use others twice each would take 2^n


class MissingKeyError(PolicyError):
    """A key that the config does not have."""


def evaluate(text: str, config: Mapping[str, Any], variables: Mapping[str, str | int] | None = None) -> int:
    """The value of an expression; ``variables`` are expressions themselves and are looked up before the config.

    Raises PolicyError that says which part could not be computed.

    >>> evaluate("hidden_size / heads", {"hidden_size": 44, "n_head": 4}, {"heads": "n_head"})
    11
    """
    try:
        return _evaluate(text, config, variables or {}, iter(range(MAX_STEPS)))
    except RecursionError:
        raise PolicyError(f"'{printable(text)}' leads through too many variables") from None


def _evaluate(text: str, config: Mapping[str, Any], variables: Mapping[str, str | int], steps: Iterator[int]) -> int:
    if len(text) > MAX_LENGTH:
        raise PolicyError(f"an expression of {len(text)} characters, at most {MAX_LENGTH} are read")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise PolicyError(f"'{printable(text)}' is not an expression over config keys") from None
    value = _Evaluation(config, variables, text, steps).value(tree)
    if value is None:
        raise MissingKeyError(f"'{printable(text)}' is not in the config{_absent(tree, config, variables)}")
    return _integer(value, text)


class _Evaluation:
    """One expression at work; ``steps`` are shared with the variables that it uses, and bound the time."""

    def __init__(
        self, config: Mapping[str, Any], variables: Mapping[str, str | int], text: str, steps: Iterator[int]
    ) -> None:
        self.config, self.variables, self.text, self.steps = config, variables, text, steps

    def value(self, node: ast.expr) -> Any:
        """The value, or None where a key is absent or null."""
        if next(self.steps, None) is None:
            raise PolicyError(f"'{printable(self.text)}' takes more than {MAX_STEPS} steps")
        match node:
            case ast.Constant(value=int() as number) if not isinstance(number, bool):
                return number
            case ast.Name(id=name) if name in self.variables:
                return self._variable(name)
            case ast.Name(id=name):
                return self.config.get(name)
            case ast.Attribute(value=inner, attr=key):
                table = self.value(inner)
                return table.get(key) if isinstance(table, Mapping) else None
            case ast.Subscript(value=inner, slice=index):
                return self._item(self.value(inner), self.value(index))
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                first = self.value(left)
                return first if first is not None else self.value(right)
            case ast.BinOp(left=left, op=operator, right=right):
                return self._arithmetic(self.value(left), operator, self.value(right))
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return self._arithmetic(0, ast.Sub(), self.value(inner))
            case _:
                raise PolicyError(f"'{printable(ast.unparse(node))}' is not allowed in an expression")

    def _variable(self, name: str) -> Any:
        text = self.variables[name]
        if isinstance(text, int):
            return text
        # A variable may use the others, but not itself: without it, a circle ends in a config look-up.
        rest = {key: value for key, value in self.variables.items() if key != name}
        try:
            return _evaluate(text, self.config, rest, self.steps)
        except MissingKeyError:
            return None

    def _item(self, items: Any, index: Any) -> Any:
        if not isinstance(items, list) or not isinstance(index, int):
            return None
        return items[index] if -len(items) <= index < len(items) else None

    def _arithmetic(self, left: Any, operator: ast.operator, right: Any) -> int | None:
        if left is None or right is None:
            return None
        a, b = _integer(left, self.text), _integer(right, self.text)
        match operator:
            case ast.Add():
                result = a + b
            case ast.Sub():
                result = a - b
            case ast.Mult():
                result = a * b
            case ast.Div() | ast.FloorDiv():
                if b == 0:
                    raise PolicyError(f"'{printable(self.text)}' divides by zero")
                if isinstance(operator, ast.Div) and a % b:
                    raise PolicyError(f"'{printable(self.text)}': {a} / {b} is not whole", hint="// rounds down")
                result = a // b
            case _:
                raise PolicyError(f"'{printable(self.text)}': only + - * / // and | are allowed")
        return _integer(result, self.text)


def _integer(value: Any, text: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PolicyError(f"'{printable(text)}' is {printable(repr(value), 40)} in the config, not a whole number")
    if abs(value) > MAX_VALUE:
        raise PolicyError(f"'{printable(text)}' is beyond 2^53")
    return value


def _absent(tree: ast.expr, config: Mapping[str, Any], variables: Mapping[str, str | int]) -> str:
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    missing = [name for name in names if name not in config and name not in variables]
    return f" (no '{printable(missing[0])}')" if missing and ast.unparse(tree) != missing[0] else ""
