"""Encodes latents and text features once, so that VAE and text encoder can be freed.

Both are stored on disk (`trainer.data.mapped_file`), so memory does not grow with the number of
images. Shapes: B images, C latent channels, H and W latent rows and columns, L text tokens, D
features.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from families.family import Family
from families.prefix import Prefix, common_ids, read_prefix
from families.references import References
from families.tokens import split_words
from families.transfer import onto
from inference.acceleration import compile_text_encoder, is_compiled, with_fallback
from inference.progress import Progress
from trainer.data import BLACK, Bucket, DatasetError, Example, crop, in_threads
from trainer.learning.loss import loss_weights
from trainer.learning.mapped_tensors import Tensors
from trainer.learning.references import ControlView, encode_controls, on_device
from trainer.learning.samples import Sample
from trainer.learning.views import views_of
from trainer.settings import Settings

log = logging.getLogger(__name__)

BATCH_PIXELS = 1024**2  # of a batch of the VAE: one image of the usual size
# A JPEG may be decoded at a fraction of its size, but at least at so many times its bucket's.
DECODED_SPARE = 2
BATCH_TOKENS = 4096  # of a batch of the text encoder, padding included


class Fitted(NamedTuple):
    """An image in its bucket."""

    pixels_CPP: Tensor  # RGB, or RGB and alpha
    weights_1HW: Tensor | None

    def mirrored(self) -> "Fitted":
        """The mirror image."""
        weights = self.weights_1HW
        return Fitted(self.pixels_CPP.flip(-1), None if weights is None else weights.flip(-1))


@torch.no_grad()
def encode_images(
    family: Family,
    examples: Sequence[Example],
    settings: Settings,
    advance: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Sample]:
    """Encodes every image at every resolution, in its bucket, and the control images of pairs.
    Frees the VAE afterwards.

    With `horizontal_flip`, each also as its mirror image: the latents of that are not the mirrored
    latents. With `crop_jitter`, most at several crops. With `keep_transparency`, transparent images
    have an alpha channel. Threads decode images ahead; batches contain images of one bucket.
    `advance` is called with the phase, the number of images encoded and their total. Raises
    `NoSpace` if the disk is full, and `DatasetError` if a mask is black in the part of an image
    that a crop shows.
    """
    multiple, masked = family.resolution_multiple, any(each.mask_file for each in examples)

    def fitted(example: Example) -> list[Fitted]:
        width, height = example.width, example.height
        plain = [each for each in views[example.name] if not each.mirrored]
        cover = max(max(b.width / width, b.height / height) for b, *_ in plain)
        spare = min(1.0, DECODED_SPARE * cover)
        at_least = math.ceil(width * spare), math.ceil(height * spare)
        kept = settings.keep_transparency and example.transparent
        image = example.image(at_least, None if kept else "white")
        found = []
        for bucket, shift, *_ in plain:
            size = family.latent_size(bucket.width, bucket.height)
            weights = loss_weights(fit_mask(example, bucket, size, shift)) if masked else None
            found.append(Fitted(fit(image, bucket, shift), weights))
        return found + [each.mirrored() for each in found if settings.horizontal_flip]

    latents = Tensors[int]("latents")  # mean and deviation, by index
    weights = Tensors[int]("loss weights")  # by index
    waiting: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    views = {each.name: views_of(each, settings, multiple) for each in examples}
    encoded = [(each, view) for each in examples for view in views[each.name]]
    count = len(encoded)

    def encode(shape: torch.Size) -> None:
        places, pixels = zip(*waiting.pop(shape), strict=True)
        both_B2CHW = torch.stack(family.encode_images(torch.stack(pixels)), dim=1).cpu()
        for place, both_2CHW in zip(places, both_B2CHW, strict=True):
            latents.add(place, both_2CHW)

    with Progress(total=count, desc="encoding images", unit="image") as progress:
        fits = chain.from_iterable(in_threads(fitted, examples))
        for place, (pixels_CPP, weights_1HW) in enumerate(fits):
            if weights_1HW is not None:
                weights.add(place, weights_1HW)
            same = waiting.setdefault(pixels_CPP.shape, [])
            same.append((place, pixels_CPP))
            if (len(same) + 1) * pixels_CPP[0].numel() > BATCH_PIXELS:
                encode(pixels_CPP.shape)
                progress.update(len(same))
                advance("encoding images", int(progress.n), count)
        for shape, same in list(waiting.items()):
            encode(shape)
            progress.update(len(same))
            advance("encoding images", int(progress.n), count)
    cropped = [ControlView(each, v.bucket, v.mirrored, v.shift) for each, v in encoded]
    whole = [ControlView(each) for each in examples[: max(1, len(settings.sample_prompts))]]
    references = encode_controls(family, [*cropped, *whole], advance)
    uncropped = dict(zip((each.example.name for each in whole), references[count:], strict=True))
    family.release("vae", "vision_encoder")
    kept, kept_weights = latents.mapped(), weights.mapped()
    return [
        Sample(
            *(each.name, each.caption, kept[place][0], kept[place][1]),
            *(each.repeats * view.repeats, each.others, view.mirrored, view.shift),
            *(kept_weights.get(place), references[place], uncropped.get(each.name)),
        )
        for place, (each, view) in enumerate(encoded)
    ]


class Captions:
    """Text features of captions: cached if they are constant, encoded in each step otherwise.

    Captions with the placeholder token depend on its embedding, so the text encoder stays in
    memory for them; their common beginning is encoded once. Without such captions it is freed.
    """

    def __init__(
        self,
        family: Family,
        captions: Sequence[str],
        vectors: dict[str, Tensor] | None = None,
        others: Sequence[str] = (),
        advance: Callable[[str, int, int], None] = lambda *_: None,
        edits: Iterable[tuple[str, References]] = (),
    ) -> None:
        """`others` without a token are encoded one by one, so that the rounding of captions, which
        depends on their batch, does not change. `edits` are captions of pairs, whose features
        depend on the references, too."""
        self.family, self.vectors = family, vectors or {}
        pairs = {(text, each.digest): each for text, each in edits}
        distinct = sorted({*captions, *others, *(text for text, _ in pairs)})
        # A token beyond the text encoder's limit has no effect.
        self._tokens = {
            text: tokens
            for text in distinct
            if set(self.vectors) & set(split_words(text, self.vectors))
            and (tokens := family.new_tokens_read(family.tokenize(text, self.vectors)))
        }
        self.trained = set(self._tokens)
        constant = sorted({*captions} - self.trained)
        kept = Tensors[str | tuple[str, str]]("text features")
        with torch.no_grad():
            texts = dict.fromkeys([family.empty_prompt, *constant])
            alone = [
                [text] for text in dict.fromkeys(others) if text not in {*texts, *self.trained}
            ]
            fixed = [key for key in pairs if key[0] not in self.trained]
            count = len(texts) + len(alone) + len(fixed)
            with Progress(total=count, desc="encoding captions", unit="caption") as progress:
                for batch in (*self._alike(texts), *alone):
                    encoded = family.encode_prompts(batch, self.vectors)
                    for text, features in zip(batch, encoded, strict=True):
                        kept.add(text, features)
                    progress.update(len(batch))
                    advance("encoding captions", int(progress.n), count)
                for key in fixed:
                    kept.add(key, self._edit(key[0], pairs[key]))
                    progress.update()
                    advance("encoding captions", int(progress.n), count)
        self._kept = kept.mapped()
        self._prefix: Prefix | None = None
        if not self.trained:
            family.release("text_encoder")
        elif alike := self.trained & {*captions, *others}:
            ids = common_ids([family.tokenize(text, self.vectors) for text in alike])
            ids = ids[: family.max_text_tokens - 1]  # within the limit
            self._prefix = read_prefix(family.text_encoder, ids) if ids else None

    def compile(self) -> None:
        """Compiles the text encoder's layers if some captions are encoded in every step.

        A GPU does the few operations of a caption faster than they are started one by one. Their
        common beginning is then encoded with each of them: its keys and values, layer by layer,
        would cost more to start than to compute.
        """
        if self.trained:
            compile_text_encoder(self.family)

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        """The text encoder, if it is used in every step."""
        return (self.family.text_encoder,) if self.trained else ()

    def tokens_in(self, captions: Iterable[str]) -> set[str]:
        """The tokens in any of the captions, as far as they are encoded."""
        return {token for text in captions for token in self._tokens.get(text, ())}

    def features(
        self,
        captions: Sequence[str],
        references: Sequence[References] = (),
        of_all: Sequence[str] = (),
    ) -> list[Tensor]:
        """text_LD of each caption, with a gradient for the placeholder token in it.

        references: of each caption, if these are of pairs.

        `of_all` are the captions of all processes in this batch. If some of them have a token, a
        sharded text encoder must run in every process equally often: in one without, at weight 0.
        """
        others = [text for text in of_all if text in self.trained and self.family.storage.shard]
        if references:
            return [
                self._of_pair(text, each, others)
                for text, each in zip(captions, references, strict=True)
            ]
        trained = [text for text in captions if text in self.trained]
        alone = others and not trained
        encoded = iter(self._encoded(trained or others[:1]) if trained or alone else ())
        found = [
            next(encoded) if text in self.trained else onto(self.family.device, self._kept[text])
            for text in captions
        ]
        if alone:
            found[0] = found[0] + 0 * next(encoded).sum()
        return found

    def _of_pair(self, text: str, references: References, others: Sequence[str]) -> Tensor:
        if text in self.trained:
            return with_fallback(self.family.text_encoder, partial(self._edit, text, references))
        found = onto(self.family.device, self._kept[text, references.digest])
        return found + 0 * self._of_pair(others[0], references, ()).sum() if others else found

    def _edit(self, text: str, references: References) -> Tensor:
        there = on_device(references, self.family.device)
        return self.family.encode_edit(text, there, self.vectors)

    def _encoded(self, texts: Sequence[str]) -> list[Tensor]:
        family = self.family

        def encode() -> list[Tensor]:
            prefix = None if is_compiled(family.text_encoder) else self._prefix
            return family.encode_prompts(texts, self.vectors, prefix)

        return with_fallback(family.text_encoder, encode)

    def _alike(self, texts: Iterable[str]) -> Iterator[list[str]]:
        """The texts in batches of similar lengths, to minimize padding."""
        lengths = {text: len(self.family.tokenize(text).ids) for text in texts}
        batch: list[str] = []
        for text in sorted(lengths, key=lambda each: lengths[each]):
            if batch and (len(batch) + 1) * lengths[text] > BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(text)
        yield batch


def fit(image: Image.Image, bucket: Bucket, shift: float = 0.0) -> torch.Tensor:
    """The image scaled to cover the bucket and cropped, at the center or shifted.

    Returns float32 [3, bucket.height, bucket.width] in [-1, 1], of an RGBA image [4, …] with
    straight alpha. Lanczos with antialiasing.
    """
    # Cropping in source pixels and scaling in one step keeps the exact aspect ratio: scaling first
    # would round the size to whole pixels.
    box = crop(image.width, image.height, bucket, shift)

    def scaled(part: Image.Image) -> NDArray[np.float32]:
        size = bucket.width, bucket.height
        return np.array(part.resize(size, Image.Resampling.LANCZOS, box=box), dtype=np.float32)

    if image.mode == "RGBA":
        pixels_HWC = torch.from_numpy(_with_alpha(image, scaled))
    else:
        pixels_HWC = torch.from_numpy(scaled(image.convert("RGB")))
    return (pixels_HWC / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def _with_alpha(
    image: Image.Image, scaled: Callable[[Image.Image], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """The scaled channels of an RGBA image, [height, width, 4], from 0 to 255.

    Colors are weighted by their opacity, so that no hidden one gets into an edge. Not in 8 bits, as
    Pillow does it: those of low opacity would be rounded away. Where nothing is visible, it is
    black, so that what was cut away is not trained on.
    """
    opacity = np.asarray(image.getchannel("A"), dtype=np.float32) / 255
    alpha = scaled(Image.fromarray(opacity)).clip(0, 1)
    channels = []
    for color in image.split()[:3]:
        weighted = scaled(Image.fromarray(np.asarray(color, dtype=np.float32) * opacity))
        visible = alpha > 0.5 / 255
        channels.append(np.divide(weighted, alpha, np.zeros_like(alpha), where=visible))
    return np.stack([*channels, alpha * 255], axis=-1).clip(0, 255)


def fit_mask(example: Example, bucket: Bucket, size: tuple[int, int], shift: float = 0.0) -> Tensor:
    """The mask of the part of an image that its bucket shows, in [0, 1]; ones without a mask.

    size: rows and columns of the latents, each the mean of its area. Returns float32 [1, H, W].
    Raises `DatasetError` if all of it is black.
    """
    rows, columns = size
    if not example.mask_file:
        return torch.ones(1, rows, columns)
    mask = example.mask_image()
    left, top, right, bottom = crop(example.width, example.height, bucket, shift)
    across, down = mask.width / example.width, mask.height / example.height
    box = left * across, top * down, right * across, bottom * down
    fitted = np.array(mask.resize((columns, rows), Image.Resampling.BOX, box=box))
    if fitted.max() <= BLACK:
        raise DatasetError(
            f"{example.mask_file}: is black in the part of {example.name} that fits into "
            f"{bucket.width}x{bucket.height}, so nothing of it would be learned; crop the image "
            "around the subject"
        )
    return torch.from_numpy(fitted.astype(np.float32) / 255)[None]
