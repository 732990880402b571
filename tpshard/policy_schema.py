"""The JSON Schema of a policy file, for editors: built from the same lists of words that the reader of policies uses.

It refuses what can be refused without a checkpoint, save what JSON Schema cannot say: the syntax of expressions and
of braces in patterns, and what is peculiar to YAML (duplicate keys, anchors, tags).
"""

from __future__ import annotations

import itertools
from typing import Any

from tpshard import expressions, patterns
from tpshard.policy import KINDS, POLICY_KEYS, RULE_KEYS
from tpshard.roles import Kind

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
EXPRESSION: Schema = {"$ref": "#/$defs/expression"}
UNITS = ("heads", "unit", "parts", "pad")

KIND_DESCRIPTIONS: dict[Kind, str] = {
    "column": "Cut the layer's out axis; the output stays with the ranks unless it is gathered.",
    "row": "Cut the layer's in axis; the ranks' outputs are summed. A bias stays whole and is added once.",
    "replicate": "The whole layer on every rank.",
}

RULE_PROPERTIES: Schema = {
    "rule": {
        "description": "Which axis is cut.",
        "oneOf": [{"const": kind, "description": KIND_DESCRIPTIONS[kind]} for kind in KINDS],
    },
    "dims": {
        "description": "A letter for each axis of the weight: o out, i in, e expert, . other. Default: oi, then dots. "
        "Embeddings and GPT-2's Conv1D are io.",
        "type": "string",
        "pattern": r"^(?!.*o.*o)(?!.*i.*i)(?!.*e.*e)[oie.]+$",
    },
    "heads": {"description": "The axis is so many units, none of which is cut.", **EXPRESSION},
    "unit": {"description": "The axis is units of so many cells, none of which is cut.", **EXPRESSION},
    "parts": {
        "description": "The axis is several blocks in a row, each dealt on its own: how many equal ones; or the heads "
        "of each; or [units, cells of one] of each.",
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "array", "minItems": 1, "items": EXPRESSION},
            {
                "type": "array",
                "minItems": 1,
                "items": {"type": "array", "minItems": 2, "maxItems": 2, "items": EXPRESSION},
            },
        ],
    },
    "gather": {
        "description": "true: the cut output is joined, so that every rank has all of it (column only). input: the "
        "layer wants its whole input, and the ranks' parts are joined before it.",
        "enum": [True, False, "input"],
    },
    "uneven": {"description": "Ranks may get one unit more than others, the first ones first.", "type": "boolean"},
    "pad": {"description": "Pad the axis with zeros to a multiple of so many cells on each rank.", **EXPRESSION},
    "experts": {
        "description": "The layer stands once for each of so many experts; the last number in its name says which one.",
        **EXPRESSION,
    },
}

_KEY: Schema = {"minLength": 1, "maxLength": patterns.MAX_LENGTH, "pattern": r"^[^\[\]?!\\]*$"}
_KEYS: Schema = {"anyOf": [{"type": "string", **_KEY}, {"type": "array", "items": {"type": "string", **_KEY}}]}
_SCALAR: Schema = {"type": ["string", "integer", "boolean"]}
POLICY_PROPERTIES: Schema = {
    "name": {
        "description": "One word; --policy takes it for built-in policies, reports show it.",
        "type": "string",
        "pattern": r"^[\w.+-]{1,100}$",
    },
    "description": {"description": "For people: which models it is for.", "type": "string"},
    "for": {
        "description": "How --policy auto picks it: keys of config.json (dotted for nested ones), each with the value, "
        "or a list of values, that it must have.",
        "type": "object",
        "additionalProperties": {"anyOf": [_SCALAR, {"type": "array", "items": _SCALAR}]},
    },
    "extends": {
        "description": "A policy, built-in or of the same file, whose rules, vars and default apply where this one "
        "says nothing.",
        "type": "string",
    },
    "vars": {
        "description": "Names for expressions over config.json.",
        "type": "object",
        "additionalProperties": EXPRESSION,
    },
    "default": {
        "description": "What becomes of tensors without a rule: error (they are listed and nothing is cut) or "
        "replicate.",
        "enum": ["error", "replicate"],
    },
    "stages": {
        "description": "For --pp: how layers are numbered, and what goes with the first and the last of them.",
        "type": "object",
        "additionalProperties": False,
        "required": ["layers"],
        "properties": {
            "layers": {"description": "The path before a layer's number.", **_KEYS},
            "first": {"description": "What the first stage has besides.", **_KEYS},
            "last": {"description": "What the last stage has besides.", **_KEYS},
            "every": {"description": "What every stage has.", **_KEYS},
            "tied": {
                "description": "What the last stage needs as well where no tensor meets the key on the right.",
                "type": "object",
                "maxProperties": 1,
                "propertyNames": _KEY,
                "additionalProperties": _KEYS,
            },
        },
    },
    "rules": {
        "description": "Layers or tensors, by the tail of their names at a dot (* within a segment, ** any segments, "
        "{a,b} either), and what is done with them.",
        "type": "object",
        "propertyNames": _KEY,
        "additionalProperties": {"$ref": "#/$defs/rule"},
    },
}


def policy_schema() -> Schema:
    """The schema of one YAML document of a policy file (draft 2020-12)."""
    return {
        "$schema": DIALECT,
        "title": "tpshard policy",
        "description": "Which axis of which layer is cut for tensor parallelism, and in what units.",
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "anyOf": [{"required": ["rules"]}, {"required": ["extends"]}],
        "properties": {key: POLICY_PROPERTIES[key] for key in POLICY_KEYS},
        "$defs": {"rule": _rule(), "expression": _expression()},
    }


def _rule() -> Schema:
    """Either a word, or a mapping whose keys agree with one another."""
    return {
        "anyOf": [
            {"oneOf": RULE_PROPERTIES["rule"]["oneOf"]},
            {
                "type": "object",
                "additionalProperties": False,
                "required": ["rule"],
                "properties": {key: RULE_PROPERTIES[key] for key in RULE_KEYS},
                "allOf": [
                    *({"not": {"required": list(pair)}} for pair in itertools.combinations(UNITS, 2)),
                    {"not": {"required": ["pad", "uneven"], "properties": {"uneven": {"const": True}}}},
                    _only_columns_gather_their_output(),
                    _what_is_whole_has_no_units(),
                ],
            },
        ]
    }


def _only_columns_gather_their_output() -> Schema:
    return {
        "if": {"required": ["gather"], "properties": {"gather": {"const": True}}},
        "then": {"properties": {"rule": {"const": "column"}}},
    }


def _what_is_whole_has_no_units() -> Schema:
    """``gather: input`` is apart: the units say how the input is dealt."""
    units = [{"required": [key]} for key in UNITS]
    return {
        "if": {"properties": {"rule": {"const": "replicate"}, "gather": {"const": False}}},
        "then": {"not": {"anyOf": units}, "properties": {"uneven": {"const": False}}},
    }


def _expression() -> Schema:
    return {
        "description": "A whole number, or arithmetic over config.json: keys, dotted keys, [index], + - * / //, "
        "parentheses, and | for the first that is present.",
        "anyOf": [
            {"type": "integer"},
            {"type": "string", "minLength": 1, "maxLength": expressions.MAX_LENGTH},
        ],
    }
