"""Keras models for tests: every kind of layer, no two sizes equal, no bias of zeros, no norm of ones."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
keras: Any = pytest.importorskip("keras")
layers = keras.layers


def randomised(model: Any, seed: int = 0) -> Any:
    """Every variable random; variances stay positive."""
    random = np.random.default_rng(seed)
    for variable in model.variables:
        if "seed_generator" not in variable.path:
            value = random.normal(size=variable.shape) * 0.5
            variable.assign(np.abs(value) + 0.5 if "variance" in variable.path else value)
    return model


def two_lstms(units: int = 128, width: int = 200) -> Any:
    first, second = (layers.LSTM(units, return_sequences=name == "lstm", name=name) for name in ("lstm", "lstm_1"))
    stack = [keras.Input((None, width)), first, second, layers.Dense(1, name="dense")]
    return randomised(keras.Sequential(stack))


def sentences() -> Any:
    """Words, attention with its residual and norm, a feed-forward in a model of its own, both directions."""
    words = keras.Input((11,), dtype="int32", name="words")
    x = layers.Embedding(40, 24, name="table")(words)
    x = layers.LayerNormalization(epsilon=1e-5, name="before")(x)
    y = layers.MultiHeadAttention(4, 5, value_dim=7, name="att")(x, x, use_causal_mask=True)
    x = layers.Add(name="again")([x, y])
    block = [keras.Input((11, 24)), layers.Dense(36, activation="gelu", name="up"), layers.Dropout(0.3, name="drop")]
    inner = keras.Sequential([*block, layers.Dense(24, name="down")], name="mlp")
    x = layers.Concatenate(name="both")([x, inner(x)])
    x = layers.Bidirectional(layers.GRU(8, return_sequences=True), name="bi")(x)
    x = layers.SimpleRNN(12, name="simple")(x)
    x = layers.Dense(68, activation="softmax", name="head")(x)
    return randomised(keras.Model(words, x))


def signals() -> Any:
    """Convolutions one after another, pooling, a batch's norm, a dense layer at each step."""
    x = first = keras.Input((26, 6), name="signal")
    x = layers.Conv1D(16, 3, padding="causal", activation="relu", name="wide")(x)
    x = layers.MaxPooling1D(2, name="pool")(x)
    x = layers.Conv1D(10, 4, strides=2, padding="same", use_bias=False, name="narrow")(x)
    x = layers.BatchNormalization(scale=False, name="norm")(x)
    x = layers.LeakyReLU(name="leaky")(x)
    x = layers.TimeDistributed(layers.Dense(72, name="inner"), name="each")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.Dense(20, activation="sigmoid", name="up")(x)
    return randomised(keras.Model(first, layers.Dense(3, name="down")(x)))


def images() -> Any:
    x = first = keras.Input((9, 13, 3), name="image")
    x = layers.Conv2D(14, (3, 2), strides=(2, 1), padding="same", name="first")(x)
    x = layers.MaxPooling2D((2, 3), padding="same", name="pool")(x)
    x = layers.Conv2D(22, 2, dilation_rate=2, activation="tanh", name="second")(x)
    x = layers.GlobalAveragePooling2D(name="all")(x)
    return randomised(keras.Model(first, layers.Dense(4, activation="relu", name="last")(x)))


def backwards() -> Any:
    """Recurrent layers in other ways: from the end, without bias, with their state, both directions summed."""
    x = first = keras.Input((6, 10), name="steps")
    x = layers.LSTM(12, go_backwards=True, return_sequences=True, use_bias=False, name="back")(x)
    y, state = layers.GRU(16, return_sequences=True, return_state=True, name="kept")(x)
    z = layers.LSTM(20, name="plain")(y)
    both = layers.Bidirectional(layers.LSTM(8), merge_mode="sum", name="both")(y)
    out = layers.Concatenate(name="joined")([z, state, both])
    return randomised(keras.Model(first, layers.Dense(5, name="last")(out)))


def masked() -> Any:
    table = layers.Embedding(30, 10, mask_zero=True, name="table")
    stack = [keras.Input((7,), name="words"), table, layers.LSTM(12, name="lstm"), layers.Dense(5, name="dense")]
    return randomised(keras.Sequential(stack))


MODELS = {
    "two-lstms": lambda: two_lstms(16, 20),
    "sentences": sentences,
    "signals": signals,
    "images": images,
    "backwards": backwards,
    "masked": masked,
}
