"""Inputs for a model of transformers, made from its own config: tokens, images, sound, or several of them.

How many tokens stand for an image or a sound, the model itself tells, by shapes alone, where it has a method for it.

Tokens come from equal strata of the vocabulary, so that every rank's part of it is met; there are enough positions
for a wrong rotary embedding to show (it has looked fine for 20).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from typing import Any

import torch
from torch import nn

from tpshard.errors import InconclusiveError

POSITIONS = 24
IMAGES = 2
TOKENS_OF_EXPERT = 6  # wanted on average: one in 400 then goes without, if all are equally liked
MOST_SEQUENCES = 32


def make_inputs(module: nn.Module, config: Any, ranks: int, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments for the module. Raises InconclusiveError where it wants something unknown."""
    wanted = signature_of(module)
    maker = _Maker(module, config, ranks, seed, dtype)
    inputs: dict[str, Any] = {}
    if "pixel_values" in wanted and maker.vision is not None and maker.has_image_token():
        inputs |= maker.flat_patches() if "image_patches" in wanted else maker.images()
    if "input_features" in wanted:
        inputs |= maker.features()
    if "input_values" in wanted:
        inputs |= maker.sound()
    if "input_ids" in wanted:
        inputs |= maker.tokens(inputs)
    if not inputs:
        main = getattr(module, "main_input_name", "?")
        hint = "name the model and its inputs with --model"
        raise InconclusiveError(f"no inputs of kind {main} can be made", hint=hint)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in wanted:
        inputs["decoder_input_ids"] = maker.ids(seed + 1)
    if "global_attention_mask" in wanted and "input_ids" in inputs:  # else its own projections are not met
        inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
        inputs["global_attention_mask"][:, 0] = 1
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
    def __init__(self, module: nn.Module, config: Any, ranks: int, seed: int, dtype: torch.dtype) -> None:
        self.module, self.wanted = module, signature_of(module)
        self.config, self.ranks, self.seed, self.dtype = config, ranks, seed, dtype
        self.text = config.get_text_config()
        self.audio = getattr(config, "audio_config", config)
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
        """Words, and after the first of them a token for each position of the image or sound."""
        tokens = self.ids(self.seed)
        special = next(iter(self._image_tokens_named()), None)
        if special is None:
            return {"input_ids": tokens}
        tokens[tokens == special] = special + 1 if special + 1 < self.text.vocab_size else special - 1
        count = self._positions(others) if others else 0
        places = torch.full((len(tokens), count), special)
        tokens = torch.cat([tokens[:, :4], places, tokens[:, 4:]], dim=1)
        kinds = {"mm_token_type_ids": (tokens == special).int()} if "mm_token_type_ids" in self.wanted else {}
        return {"input_ids": tokens, **kinds}

    def _positions(self, others: dict[str, Any]) -> int:
        """How many tokens stand for an image or a sound."""
        if "aspect_ratio_ids" in others:
            return 1  # mllama: the text attends to the image, and only marks where it stands
        merge = _first(self.vision, "spatial_merge_size") or _first(self.config, "spatial_merge_size") or 1
        if "image_grid_thw" in others:
            t, h, w = others["image_grid_thw"][0].tolist()
            return int(t * h * w // merge**2)
        if "pixel_values" in others and others["pixel_values"].ndim == 3:
            return int(others["pixel_values"].shape[1])
        if (told := self._told(others)) is not None:
            return told
        if "input_features" in others:  # a convolution of stride 2, then a mean of two
            return int(others["input_features"].shape[-1]) // 4
        patches = (int(others["pixel_values"].shape[-1]) // _first(self.vision, "patch_size")) ** 2
        shuffled = getattr(self.vision, "pixel_shuffle_ratio", 1)  # llama4
        return int(patches * shuffled**2 // (_first(self.config, "scale_factor") or 1) ** 2 // merge**2)

    def _told(self, others: dict[str, Any]) -> int | None:
        """By the model's own method, on tensors that have shapes only; None where it has none or looks at numbers."""
        kind = "audio" if "input_features" in others else "image"
        method = f"get_{kind}_features"
        if not hasattr(self.module, method):
            return None
        shapes: Any = copy.deepcopy(self.module).to("meta")
        given = {key: value.to("meta") if value.is_floating_point() else value for key, value in others.items()}
        with contextlib.suppress(Exception), torch.no_grad():
            told = getattr(shapes, method)(**given)
            parts = getattr(told, "pooler_output", told)
            parts = parts if isinstance(parts, tuple | list) else [parts]
            return int(sum(part.numel() // part.shape[-1] for part in parts)) // IMAGES
        return None

    def images(self) -> dict[str, Any]:
        """Two images, in the form that the model's own preparation has."""
        height, width = _size(self.vision)
        if getattr(self.vision, "model_type", "") == "pixtral":  # any size will do, and its largest has 12100 patches
            height = width = min(height, 4 * _first(self.vision, "patch_size"))
        image = _first(self.vision, "num_channels") or 3, height, width
        if "image_grid_thw" in self.wanted or "spatial_shapes" in self.wanted:
            return self.patches()
        sizes = {"image_sizes": torch.tensor([[height, width]] * IMAGES)}
        if "aspect_ratio_ids" in self.wanted:  # mllama: one image of each sequence, in tiles, of which one is used
            tiles = _first(self.vision, "max_num_tiles") or 4
            ones = torch.ones(IMAGES, 1, dtype=torch.long)
            seen = torch.arange(tiles).expand(IMAGES, 1, tiles) < 1
            numbers = self._numbers(IMAGES, 1, tiles, *image)
            return {"pixel_values": numbers, "aspect_ratio_ids": ones, "aspect_ratio_mask": seen.long()}
        if hasattr(self.config, "image_grid_pinpoints"):  # llava_next: the whole and one tile
            return {"pixel_values": self._numbers(IMAGES, 2, *image), **sizes}
        if "pixel_attention_mask" in self.wanted:  # idefics3: several images of each sequence
            return {"pixel_values": self._numbers(IMAGES, 1, *image)}
        any_size = "image_sizes" in self.wanted and getattr(self.vision, "model_type", "") == "pixtral"
        return {"pixel_values": self._numbers(IMAGES, *image), **(sizes if any_size else {})}

    def patches(self) -> dict[str, Any]:
        """Qwen2-VL, SigLIP 2 and their like: patches one after another, and each image's grid of them."""
        merge, patch = _first(self.vision, "spatial_merge_size") or 1, _first(self.vision, "patch_size") or 14
        channels = _first(self.vision, "in_channels", "in_chans", "num_channels") or 3
        side, frames = 2 * merge, _first(self.vision, "temporal_patch_size") or 1
        cells = channels * frames * patch * patch
        if "spatial_shapes" in self.wanted:
            mask = torch.ones(IMAGES, side * 2 * side, dtype=torch.long)
            shapes = torch.tensor([[side, 2 * side]] * IMAGES)
            numbers = self._numbers(*mask.shape, cells)
            return {"pixel_values": numbers, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        grid = torch.tensor([[1, side, side]] * IMAGES)
        return {"pixel_values": self._numbers(IMAGES * side * side, cells), "image_grid_thw": grid}

    def flat_patches(self) -> dict[str, Any]:
        """Fuyu: a row for each of an image's patches, which go through one linear layer."""
        cells = _first(self.vision, "patch_size") ** 2 * (_first(self.vision, "num_channels") or 3)
        return {"pixel_values": self._numbers(IMAGES, 4, cells)}

    def features(self) -> dict[str, Any]:
        """Mel spectra: [batch, bins, frames], as long as the encoder wants them."""
        bins = _first(self.audio, "num_mel_bins") or 80
        frames = 2 * (_first(self.audio, "max_source_positions") or 1500)
        ones = torch.ones(IMAGES, frames, dtype=torch.long)
        mask = {"feature_attention_mask": ones} if "feature_attention_mask" in self.wanted else {}
        return {"input_features": self._numbers(IMAGES, bins, frames), **mask}

    def sound(self) -> dict[str, Any]:
        """Samples: enough for POSITIONS frames after the convolutions' strides. Or a spectrogram, cut into patches."""
        if hasattr(self.config, "frequency_stride"):
            return {"input_values": self._numbers(IMAGES, self.config.max_length, self.config.num_mel_bins)}
        strides = list(getattr(self.config, "conv_stride", [320]))
        kernels = list(getattr(self.config, "conv_kernel", [400]))
        samples = POSITIONS
        for stride, kernel in zip(reversed(strides), reversed(kernels), strict=True):
            samples = (samples - 1) * stride + kernel
        return {"input_values": self._numbers(IMAGES, samples)}


_IMAGE_TOKENS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")


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
    inner = getattr(config, "ffn_config", config)  # DBRX
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts") or _first(inner, "moe_num_experts")
    chosen = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k")
    each = _first(config, *chosen) or _first(inner, *chosen) or 1
    return min(MOST_SEQUENCES, max(2, math.ceil(TOKENS_OF_EXPERT * experts / (each * length))))


def token_ids(vocabulary: int, longest: int, ranks: int, seed: int, sequences: int = 2) -> torch.Tensor:
    """Sequences of tokens drawn from equal strata of the vocabulary, so that every rank's part is met."""
    length = min(max(POSITIONS, math.ceil(ranks / 2)), longest)
    count = sequences * length
    generator = torch.Generator().manual_seed(seed)
    strata = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) * vocabulary / count
    order = torch.randperm(count, generator=generator)
    return strata.long().clamp(max=vocabulary - 1)[order].reshape(sequences, length)
