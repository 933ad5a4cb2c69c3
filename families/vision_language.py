"""Asks a vision-language model questions about images: Qwen2.5-VL and Qwen3-VL.

The classes that combine tokenizer and image processor need torchvision. Only the image processor
works without it, so the prompt is put together here: turns as in the published chat templates, and
one image token for each patch of 2 x 2 cells. The ids equal those of the official classes.

Tensor names carry their shape: B questions, L tokens.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

from families.captioners import Answer, Captioner, Question, UnknownCaptioner
from families.device import empty_cache
from families.loading import default_dtype
from families.memory import RESERVE, free_memory
from families.out_of_memory import is_out_of_memory
from families.quantization import QUANTIZATIONS, block_linears, usable
from families.registry import family_of
from families.tokens import PromptTokenizer
from families.weights import quiet_transformers, whole
from families.without_weights import config_of

log = logging.getLogger(__name__)

LEAST_PIXELS = 256 * 256  # smaller images are enlarged, as by Qwen3-VL's own limits
MOST_PIXELS = 768 * 768  # of one image: enough for a scene
MOST_TOKENS = 200  # of an answer
QUESTION_TOKENS = 400  # of a question without its images, at most

_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_PAD, _END = "<|image_pad|>", ("<|im_end|>", "<|endoftext|>")
_NOT_QUANTIZED = ["model.visual", "lm_head"]


@dataclass(frozen=True)
class _Kind:
    """What the image processor and the chat template of a kind of model need."""

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    system: str = ""  # the system turn that the published template adds


_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_KINDS = {  # by `model_type` in config.json
    "qwen2_5_vl": _Kind(*_CLIP, system="You are a helpful assistant."),
    "qwen3_vl": _Kind(_HALF, _HALF),
}


class CaptionerTooLarge(RuntimeError):
    """A vision-language model that does not fit into the free memory."""


@dataclass(frozen=True)
class Loading:
    """How a captioner is loaded, and the memory that it needs."""

    quantize: str  # of the language model's linear layers: none, int8, nf4
    batch: int  # questions at once
    dtype: torch.dtype
    bytes: int  # weights, and an estimate of one batch


class VisionLanguageModel:
    """A loaded captioner. Its answers are the most likely ones, so they are repeatable."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        """model: the whole model, with its vision part and vocabulary head."""
        from transformers import Qwen2VLImageProcessorPil

        self._model, self._tokenizer, self._device = model, tokenizer, device
        kind = _kind_of(model.config, "the model")
        vision = model.config.vision_config
        self._processor: Any = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            image_mean=list(kind.mean),
            image_std=list(kind.deviation),
        )
        self._cells = vision.spatial_merge_size**2  # of one image token
        system = f"<|im_start|>system\n{kind.system}<|im_end|>\n" if kind.system else ""
        self._template = (
            f"{system}<|im_start|>user\n{{}}{{{{}}}}<|im_end|>\n<|im_start|>assistant\n"
        )
        vocabulary = tokenizer.get_added_vocab()
        missing = [token for token in (_PAD, *_END) if token not in vocabulary]
        if missing:
            raise UnknownCaptioner(f"the tokenizer has no {missing[0]}; use that of the model")
        self._pad, self._end = vocabulary[_PAD], [vocabulary[each] for each in _END]
        self._filler = vocabulary[_END[1]]
        # In place of the checkpoint's own settings, which may sample.
        model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self._end, pad_token_id=self._filler
        )

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], most_tokens: int = 0) -> list[Answer]:
        """Answers the questions, in one batch if the memory suffices, else one by one.

        most_tokens: the limit of an answer's length; 0: the usual one.
        """
        most_tokens = most_tokens or MOST_TOKENS
        try:
            return self._answers(questions, most_tokens)
        except Exception as error:
            if len(questions) == 1 or not is_out_of_memory(error):
                raise
        log.warning("out of memory with %d images at once; now one by one", len(questions))
        empty_cache(self._device)
        return [self._answers([each], most_tokens)[0] for each in questions]

    def _answers(self, questions: Sequence[Question], most_tokens: int) -> list[Answer]:
        inputs = self._inputs(questions)
        ids_BL = self._model.generate(**inputs, max_new_tokens=most_tokens)
        new_BL = ids_BL[:, inputs["input_ids"].shape[1] :].tolist()
        answers = []
        for new in new_BL:
            end = next((at for at, each in enumerate(new) if each in self._end), None)
            text = self._tokenizer.decode(new[:end], skip_special_tokens=True)
            answers.append(Answer(text, end is not None))
        return answers

    def _inputs(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """The arguments of `generate`; shorter questions are padded on the left."""
        rows, pixels, grids = [], [], []
        for each in questions:
            size = {"shortest_edge": min(LEAST_PIXELS, each.pixels), "longest_edge": each.pixels}
            found = self._processor(images=list(each.images), size=size, return_tensors="pt")
            pixels.append(found["pixel_values"])
            grids.append(found["image_grid_thw"])
            counts = (found["image_grid_thw"].prod(-1) // self._cells).tolist()
            rows.append(self._ids(each.text, counts))
        length = max(map(len, rows))
        ids_BL = torch.tensor([[self._filler] * (length - len(row)) + row for row in rows])
        mask_BL = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        inputs = {
            "input_ids": ids_BL,
            "attention_mask": mask_BL,
            # Without these, Qwen2.5-VL would ignore rows and columns of the image.
            "mm_token_type_ids": (ids_BL == self._pad).int(),
            "pixel_values": torch.cat(pixels),
            "image_grid_thw": torch.cat(grids),
        }
        return {name: each.to(self._device) for name, each in inputs.items()}

    def _ids(self, text: str, counts: Sequence[int]) -> list[int]:
        """Token ids of a question, with so many tokens for each image.

        Special tokens in the text stay plain text, so it cannot end its turn or add an image.
        """
        template = self._template.format(_IMAGE * len(counts))
        ids: list[int] = []
        left = iter(counts)
        for each in PromptTokenizer(self._tokenizer, template).tokenize(text).ids:
            ids += [each] * (next(left) if each == self._pad else 1)
        return ids


def load(captioner: Captioner, loading: Loading, device: torch.device) -> VisionLanguageModel:
    """Loads a captioner, frozen.

    Raises `MissingModel` if its files cannot be found or lack a weight, and `UnknownCaptioner` for
    another kind of model.
    """
    folder = captioner.model_folder()
    _kind_of(AutoConfig.from_pretrained(folder, trust_remote_code=False), str(folder))
    options: dict[str, Any] = {"device_map": {"": device}}
    if loading.quantize != "none":
        config = QUANTIZATIONS[loading.quantize].text_encoder_config
        options["quantization_config"] = config(loading.dtype, list(_NOT_QUANTIZED))
    model = whole(AutoModelForImageTextToText, folder, loading.dtype, **options)
    tokenizer = AutoTokenizer.from_pretrained(captioner.tokenizer_folder(), trust_remote_code=False)
    model = model.eval().requires_grad_(False)
    return VisionLanguageModel(model, tokenizer, device)


def choose_loading(captioner: Captioner, device: torch.device) -> Loading:
    """The most exact way to load the captioner that fits into the free memory.

    Raises `CaptionerTooLarge` if none fits.
    """
    free, dtype = free_memory(device), default_dtype(device)
    room = free * (1 - RESERVE)
    need = 0
    # On a CPU, int8 saves no memory while it is made.
    quantized = [] if device.type == "cpu" else usable(device, ("int8", "nf4"))
    for quantize in ("none", *quantized):
        need = bytes_needed(captioner, quantize, dtype, batch_on(device))
        if need <= room:
            return Loading(quantize, batch_on(device), dtype, need)
    advice = (
        "name a smaller one with --model"
        if device.type == "cuda"
        else ("set DTYPE=bfloat16, which needs half, or name a smaller one with --model")
    )
    raise CaptionerTooLarge(
        f"{captioner.name} needs about {need / 1e9:.1f} GB to write captions, and "
        f"{room / 1e9:.1f} GB are free; {advice}"
    )


def batch_on(device: torch.device) -> int:
    """Questions at once: a batch reads the weights once for each token of all its answers."""
    return 8 if device.type == "cuda" else 1


def bytes_needed(captioner: Captioner, quantize: str, dtype: torch.dtype, batch: int) -> int:
    """Memory to write captions: the weights, counted, and an estimate of one batch."""
    config = _config_of(captioner)
    model = _without_weights(config)
    values = sum(each.numel() for each in model.parameters())
    language = [n for n in block_linears(model) if n.startswith("model.language_model.")]
    blocks = sum(model.get_parameter(f"{name}.weight").numel() for name in language)
    known = QUANTIZATIONS.get(quantize)
    each = dtype.itemsize if known is None else known.bytes_per_weight
    return round(each * blocks) + dtype.itemsize * (values - blocks) + _batch(config, dtype, batch)


def _batch(config: Any, dtype: torch.dtype, batch: int) -> int:
    """An upper estimate of the memory of a batch of questions with one image each.

    Keys and values of all layers; what one layer keeps at a time; the same of the vision part,
    which has as many cells as an image token stands for; and the vocabulary's scores.
    """
    text, vision = config.text_config, config.vision_config
    cells = vision.spatial_merge_size**2
    image = MOST_PIXELS // (vision.patch_size**2 * cells)
    tokens = image + QUESTION_TOKENS + MOST_TOKENS
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head * tokens
    layer = tokens * (8 * text.hidden_size + 3 * text.intermediate_size)
    eye = cells * image * (8 * vision.hidden_size + 3 * vision.intermediate_size)
    return batch * (dtype.itemsize * (cache + max(layer, eye)) + 2 * 4 * text.vocab_size)


def _config_of(captioner: Captioner) -> Any:
    """The model's config: its own if it is on this machine, otherwise the published one."""
    base, folder = captioner.base, captioner.local_folder()
    if base is not None:
        config_class = family_of(base).model_class("text_encoder").config_class
        config: Any = config_class.from_dict(config_of(base, "text_encoder"))
    elif folder is not None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    else:
        config = AutoConfig.for_model(**captioner.published)
    _kind_of(config, captioner.name)
    return config


def _without_weights(config: Any) -> nn.Module:
    with quiet_transformers(), torch.device("meta"):
        model: nn.Module = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    return model


def _kind_of(config: Any, source: str) -> _Kind:
    if config.model_type not in _KINDS:
        raise UnknownCaptioner(
            f"{source}: model_type {config.model_type!r} is not supported; use one of "
            f"{', '.join(_KINDS)}"
        )
    return _KINDS[config.model_type]
