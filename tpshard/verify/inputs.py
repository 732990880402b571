"""Inputs for a model of transformers, made from its own config: tokens, images, sound, or several of them.

Tokens come from equal strata of the vocabulary, so that every rank's part of it is met; there are enough positions
for a wrong rotary embedding to show (it has looked fine for 20).
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn

from tpshard.errors import InconclusiveError

POSITIONS = 24
IMAGES = 2
TOKENS_OF_EXPERT = 6  # wanted on average: one in 400 then goes without, if all are equally liked
MOST_SEQUENCES = 16


def make_inputs(module: nn.Module, config: Any, ranks: int, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments for the module. Raises InconclusiveError where it wants something unknown."""
    wanted = signature_of(module)
    maker = _Maker(config, ranks, seed, dtype)
    inputs: dict[str, Any] = {}
    if "pixel_values" in wanted and maker.vision is not None and maker.has_image_token():
        inputs |= maker.patches() if "image_grid_thw" in wanted else maker.images()
    if "input_features" in wanted:
        inputs |= maker.features()
    if "input_values" in wanted:
        inputs |= maker.sound()
    if "input_ids" in wanted:
        inputs |= maker.tokens(inputs)
    if "mm_token_type_ids" in wanted and "pixel_values" in inputs:
        inputs["mm_token_type_ids"] = maker.kinds(inputs["input_ids"])
    if not inputs:
        main = getattr(module, "main_input_name", "?")
        hint = "name the model and its inputs with --model"
        raise InconclusiveError(f"no inputs of kind {main} can be made", hint=hint)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in wanted:
        inputs["decoder_input_ids"] = maker.ids(seed + 1)
    for switch in ("use_cache", "use_mems"):
        if switch in wanted:
            inputs[switch] = False
    if "return_dict" in wanted:
        inputs["return_dict"] = True
    return inputs


def signature_of(module: nn.Module) -> set[str]:
    """The names that the module's forward takes."""
    return set(inspect.signature(module.forward).parameters)


class _Maker:
    def __init__(self, config: Any, ranks: int, seed: int, dtype: torch.dtype) -> None:
        self.config, self.ranks, self.seed, self.dtype = config, ranks, seed, dtype
        self.text = config.get_text_config()
        visual = hasattr(config, "image_size") or hasattr(config, "patch_size") or hasattr(config, "num_channels")
        self.vision = getattr(config, "vision_config", config if visual else None)
        self._random = torch.Generator().manual_seed(seed)

    def _numbers(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._random, dtype=torch.float64).to(self.dtype)

    def has_image_token(self) -> bool:
        """False where the config's token for an image is not one of its words; True where there are no words."""
        return all(token < self.text.vocab_size for token in self._image_tokens_named())

    def _image_tokens_named(self) -> list[int]:
        return [i for key in _IMAGE_TOKENS if isinstance(i := getattr(self.config, key, None), int)]

    def ids(self, seed: int) -> torch.Tensor:
        length = _longest(self.text)
        return token_ids(self.text.vocab_size, length, self.ranks, seed, _sequences(self.text, min(POSITIONS, length)))

    def tokens(self, others: dict[str, Any]) -> dict[str, Any]:
        tokens = self.ids(self.seed)
        image = next(iter(self._image_tokens_named()), None)
        if image is None:
            return {"input_ids": tokens}
        tokens[tokens == image] = (image + 1) % self.text.vocab_size if image + 1 < self.text.vocab_size else image - 1
        if "pixel_values" not in others:
            return {"input_ids": tokens}
        count = self._image_tokens(others)
        places = torch.full((len(tokens), count), image)
        return {"input_ids": torch.cat([tokens[:, :4], places, tokens[:, 4:]], dim=1)}

    def kinds(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of the tokens stand for an image, for rotary positions along its axes."""
        return (tokens == self._image_tokens_named()[0]).int()

    def _image_tokens(self, others: dict[str, Any]) -> int:
        """How many tokens stand for an image."""
        merge = _first(self.vision, "spatial_merge_size") or 1
        if "image_grid_thw" in others:
            t, h, w = others["image_grid_thw"][0].tolist()
            return int(t * h * w // merge**2)
        fixed = _first(self.config, "image_seq_length", "mm_tokens_per_image")
        patches = (_size(self.vision)[0] // _first(self.vision, "patch_size")) ** 2
        scale = _first(self.config, "scale_factor") or 1
        if fixed and not hasattr(self.config, "vision_feature_select_strategy"):
            return fixed
        keeps_class = getattr(self.config, "vision_feature_select_strategy", "default") == "full"
        return patches // scale**2 // merge**2 + (1 if keeps_class else 0)

    def images(self) -> dict[str, Any]:
        height, width = _size(self.vision)
        return {"pixel_values": self._numbers(IMAGES, _first(self.vision, "num_channels") or 3, height, width)}

    def patches(self) -> dict[str, Any]:
        """Qwen2-VL and its like: patches one after another, and each image's grid of them."""
        merge, patch = _first(self.vision, "spatial_merge_size") or 1, _first(self.vision, "patch_size") or 14
        channels = _first(self.vision, "in_channels", "in_chans", "num_channels") or 3
        side, frames = 2 * merge, _first(self.vision, "temporal_patch_size") or 1
        grid = torch.tensor([[1, side, side]] * IMAGES)
        return {
            "pixel_values": self._numbers(IMAGES * side * side, channels * frames * patch * patch),
            "image_grid_thw": grid,
        }

    def features(self) -> dict[str, Any]:
        """Mel spectra: [batch, bins, frames], as long as the encoder wants them."""
        bins = _first(self.config, "num_mel_bins") or 80
        return {
            "input_features": self._numbers(IMAGES, bins, 2 * (_first(self.config, "max_source_positions") or 1500))
        }

    def sound(self) -> dict[str, Any]:
        """Samples: enough for POSITIONS frames after the convolutions' strides."""
        strides = list(getattr(self.config, "conv_stride", [320]))
        kernels = list(getattr(self.config, "conv_kernel", [400]))
        samples = POSITIONS
        for stride, kernel in zip(reversed(strides), reversed(kernels), strict=True):
            samples = (samples - 1) * stride + kernel
        return {"input_values": self._numbers(IMAGES, samples)}


_IMAGE_TOKENS = ("image_token_id", "image_token_index")


def _first(config: Any, *keys: str) -> int:
    """The first of these that the config has, as a whole number; 0 where it has none."""
    for key in keys:
        value = getattr(config, key, None)
        if isinstance(value, list | tuple) and value:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _size(vision: Any) -> tuple[int, int]:
    size = getattr(vision, "image_size", None)
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    side = size if isinstance(size, int) and size > 0 else 64  # convolutions take any
    return side, side


def _longest(config: Any) -> int:
    """Positions that the model can take; two fewer, since some models count from two."""
    limit = _first(config, "max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
    return max(2, limit - 2) if limit else 2**20


def _sequences(config: Any, length: int) -> int:
    """Two; more where there are so many experts that some would go without a token."""
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts")
    each = _first(config, "num_experts_per_tok", "num_experts_per_token", "moe_top_k") or 1
    return min(MOST_SEQUENCES, max(2, math.ceil(TOKENS_OF_EXPERT * experts / (each * length))))


def token_ids(vocabulary: int, longest: int, ranks: int, seed: int, sequences: int = 2) -> torch.Tensor:
    """Sequences of tokens drawn from equal strata of the vocabulary, so that every rank's part is met."""
    length = min(max(POSITIONS, math.ceil(ranks / 2)), longest)
    count = sequences * length
    generator = torch.Generator().manual_seed(seed)
    strata = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) * vocabulary / count
    order = torch.randperm(count, generator=generator)
    return strata.long().clamp(max=vocabulary - 1)[order].reshape(sequences, length)
