"""Plans the memory of a run: `Figures` has it for each mode, `choose` chooses a mode.

`choose` depends only on these figures, the free memory and the user's settings. Sizes are in bytes.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from families.family import WeightStorage
from families.memory import RESERVE
from families.quantization import QUANTIZATIONS
from trainer.memory.step_cost import NO_PRESERVATION, NOTHING, Load, PreservationLoad, at_share
from trainer.settings import OPTIMIZERS


@dataclass(frozen=True)
class Mode:
    """A memory mode of training."""

    quantize: str = "none"
    checkpointing: float = 0.0  # share of the blocks, from the first, that are recomputed
    offload: bool = False

    def __str__(self) -> str:
        base = "unquantized base" if self.quantize == "none" else f"{self.quantize} base"
        part = f" of {self.checkpointing:.0%} of the blocks" * (self.checkpointing < 1)
        extra = [
            f"gradient checkpointing{part}" if self.checkpointing else "",
            "block weights in CPU memory" if self.offload else "",
        ]
        return ", ".join([base, *filter(None, extra)])

    @property
    def whole(self) -> bool:
        """Whether all blocks are recomputed, or none."""
        return self.checkpointing in (0, 1)

    @property
    def label(self) -> str:
        """The mode in a table."""
        kind = "16 bits" if self.quantize == "none" else self.quantize
        part = f"{self.checkpointing:.0%} " * (self.checkpointing < 1)
        recomputed = f" + {part}checkpointing" if self.checkpointing else ""
        return f"{kind}{recomputed}{' + offload' * self.offload}"


@dataclass(frozen=True)
class Figures:
    """The numbers that the memory of a run depends on."""

    block_weights: int  # values in the transformer's block linears, which can be quantized
    other_weights: int  # values in the rest of the transformer
    text_block_weights: int
    text_other_weights: int
    vae_weights: int
    lora_modules: int  # of a full training: parameters
    lora_values: int  # trained ones, also of a full training
    bytes_per_value: int  # of the unquantized base
    optimizer: str
    ema: bool
    accumulates: bool
    placeholder: bool
    steps: Sequence[Load]  # by the number of recomputed blocks, from none to all
    placeholder_pass: Load
    image: Load  # of the largest batch of the VAE
    caption: Load  # of the largest batch of the text encoder
    preview: Load = NOTHING  # of one preview image
    largest_linear: int = 0  # values of the largest block linear
    preservation: PreservationLoad = NO_PRESERVATION
    compiled: bool = False  # blocks are compiled, unless their weights are offloaded
    full: bool = False  # the transformer's own weights are trained, not a LoRA
    vision_weights: int = 0  # values of the vision encoder, of a run on pairs
    kept_copies: int = 0  # of the trained weights in CPU memory, in a full training

    @property
    def blocks(self) -> int:
        """The number of blocks that can be recomputed."""
        return len(self.steps) - 1

    def recomputed(self, mode: Mode) -> int:
        """The number of blocks that a mode recomputes."""
        return round(mode.checkpointing * self.blocks)

    @property
    def lora_file(self) -> int:
        """Bytes of the result on disk: the LoRA in bfloat16, or the whole transformer."""
        return self.weights("none") if self.full else 2 * self.lora_values

    def weights(self, quantize: str, offload: bool = False) -> int:
        """The transformer's weights on the device."""
        blocks = 0.0 if offload else self._each(quantize) * self.block_weights
        return round(blocks) + self.bytes_per_value * self.other_weights

    def text_weights(self, quantize: str) -> int:
        """The text encoder's weights."""
        blocks = round(self._each(quantize) * self.text_block_weights)
        return blocks + self.bytes_per_value * self.text_other_weights

    def trained(self) -> int:
        """Float32 weights of the LoRA, gradients, EMA and optimizer state between two steps.

        Of a full training only the state: the weights are the transformer's, and each gradient is
        freed in the backward pass.
        """
        facts = OPTIMIZERS[self.optimizer]
        if self.full:
            return round((facts.full_state_bytes or facts.state_bytes) * self.lora_values)
        copies = 4 * (1 + self.ema + self.accumulates)
        return round((copies + facts.state_bytes) * self.lora_values)

    def checkpoint(self) -> int:
        """A copy of the trained weights and the optimizer's state."""
        own = self.bytes_per_value * self.lora_values * (1 + self.kept_copies) if self.full else 0
        return self.trained() + own

    def parts(self, mode: Mode) -> dict[str, int]:
        """The memory on the device at the peak of a step."""
        parts = {
            "transformer": self.weights(mode.quantize, mode.offload),
            "optimizer" if self.full else "LoRA and optimizer": self.trained(),
            "activations": self._activations(mode),
        }
        if self.placeholder:
            parts["text encoder"] = self.text_weights("none") + self.placeholder_pass.bytes
        return parts

    def _step(self, loads: Sequence[Load], mode: Mode) -> int:
        return at_share(loads, mode.checkpointing).held(self.compiled and not mode.offload)

    def _activations(self, mode: Mode) -> int:
        """Of the batch and the rows of preservation: a full training has both at once."""
        batch = self._step(self.steps, mode)
        if self.full:
            return batch + self._step(self.preservation.rows, mode)
        return max(batch, self._rows(mode))

    def _rows(self, mode: Mode) -> int:
        """Preservation's pass, which begins with the batch's gradients still in memory."""
        kept = 0 if self.accumulates or not self.preservation.share else 4 * self.lora_values
        return self._step(self.preservation.rows, mode) + kept

    def captions(self, quantize_text: str) -> int:
        """The peak of encoding captions."""
        return self.text_weights(quantize_text) + self.caption.bytes

    def images(self) -> int:
        """The peak of encoding images, in float32, and control images."""
        vision = self.bytes_per_value * self.vision_weights
        return 4 * self.vae_weights + self.image.bytes + vision

    def previews(self, mode: Mode, quantize_text: str = "none") -> int:
        """The peak of generating a preview image; 0 without previews.

        The weights of training stay on the device. For a quantized base, previews use a second,
        unquantized one, whose block weights are moved to the device one at a time. The text encoder
        is needed if it is quantized or prompts contain the placeholder; else features are cached.
        """
        if not self.preview.bytes:
            return 0
        size = self.weights(mode.quantize, mode.offload) + self.trained()
        size += 4 * self.vae_weights + self.preview.bytes
        if self.placeholder or quantize_text != "none":
            size += self.text_weights("none")
        if mode.quantize != "none":
            size += self.bytes_per_value * self.other_weights
        if mode.quantize != "none" or mode.offload:
            size += self.bytes_per_value * self.largest_linear
        return size

    def peak(self, mode: Mode, quantize_text: str = "none") -> int:
        """The largest peak of all phases."""
        step = sum(self.parts(mode).values())
        return max(step, self.captions(quantize_text), self.images())

    def flops(self, mode: Mode) -> int:
        """FLOPs of one step."""
        rows = self.preservation.flops(mode.checkpointing)
        step = at_share(self.steps, mode.checkpointing).flops
        return step + self.placeholder_pass.flops + rows

    def fetched(self, mode: Mode) -> float:
        """Bytes copied from CPU memory in one step: forward, backward, again where recomputed."""
        passes = (2 + mode.checkpointing) * mode.offload * (1 + self.preservation.share)
        return passes * self._each(mode.quantize) * self.block_weights

    def _each(self, quantize: str) -> float:
        known = QUANTIZATIONS.get(quantize)
        return self.bytes_per_value if known is None else known.bytes_per_weight


@dataclass(frozen=True)
class Wishes:
    """The user's settings; None and `auto` are chosen by the plan."""

    quantize: str = "auto"
    checkpointing: bool | None = None
    offload: bool | None = None
    previews: bool = False  # preview images during training, in a mode with enough memory for them


@dataclass(frozen=True)
class Choice:
    """The chosen mode and the reason."""

    mode: Mode
    quantize_text: str
    peak: int
    fits: bool
    reason: str
    no_previews: str = ""  # why no preview images are generated during training; empty if they are

    @property
    def storage(self) -> WeightStorage:
        return WeightStorage(self.mode.quantize, self.quantize_text, self.mode.offload)


KINDS = ("none", "int8", "nf4")  # of weights on the device


def _ladder(blocks: int, kinds: Sequence[str], offloaded: Sequence[str]) -> list[Mode]:
    return [
        Mode(quantize, recomputed / blocks, offload)
        for offload, each in ((False, kinds), (True, offloaded))
        for quantize in each
        for recomputed in range(blocks + 1)
    ]


# From the most exact and fastest to the smallest. Without fp8, since int8 takes as much memory with
# a fifth of the error. Offloaded weights take no GPU memory, so nf4 would not help. Here blocks are
# recomputed all or not at all; a choice may be between.
OFFLOADED = ("int8", "none")
LADDER: tuple[Mode, ...] = tuple(_ladder(1, KINDS, OFFLOADED))


def ladder_of(figures: Figures) -> Sequence[Mode]:
    """The modes of a run: a full training needs all weights in 16 bits on the GPU."""
    if not figures.full:
        return LADDER
    return [each for each in LADDER if each.quantize == "none" and not each.offload]


def choose(
    figures: Figures, free: int, wishes: Wishes, usable: Collection[str] = tuple(QUANTIZATIONS)
) -> Choice:
    """The first mode that fits into `free` bytes and agrees with the user's settings.

    It recomputes as few blocks as fit. `usable` are the quantizations of this machine. If no mode
    fits, the smallest is chosen.
    """
    granted = _granted(wishes, figures.blocks)
    ladder = [mode for mode in granted if mode.quantize in ("none", *usable)]
    ladder = ladder or granted  # loading raises an error for an unusable quantization
    room = round(free * (1 - RESERVE))

    def text_for(mode: Mode) -> str:
        if figures.placeholder:
            return "none"
        if wishes.quantize not in ("auto", "none"):
            return wishes.quantize
        kinds = [name for name in KINDS if name in ("none", *usable)]
        kinds = ["none"] if wishes.quantize == "none" else kinds
        fitting = [name for name in kinds if figures.captions(name) <= room]
        return (fitting or kinds[-1:])[0]

    needs = {mode: figures.peak(mode, text_for(mode)) for mode in ladder}
    previews = {mode: figures.previews(mode, text_for(mode)) for mode in ladder}
    fitting = [mode for mode in ladder if needs[mode] <= room]
    with_room = [mode for mode in fitting if previews[mode] <= room]
    if wishes.previews and with_room:
        fitting = with_room
        needs = {mode: max(needs[mode], previews[mode]) for mode in ladder}
    mode = fitting[0] if fitting else min(ladder, key=lambda each: needs[each])
    need, better = needs[mode], [each for each in ladder[: ladder.index(mode)] if each.whole]
    part = f"recomputes {figures.recomputed(mode)} of {figures.blocks}, " * (not mode.whole)
    reason = f"{mode}: {part}needs {_gb(need)} of {_gb(room)}"
    if not fitting:
        reason += ", which is not enough; expect an out-of-memory error"
    elif better:
        reason += f"; {better[-1]} would need {_gb(needs[better[-1]])}"
    no_previews = ""
    if previews[mode] > room:
        no_previews = f"with the {mode}, an image needs {_gb(previews[mode])} of {_gb(room)}"
    return Choice(mode, text_for(mode), need, bool(fitting), reason, no_previews)


def leaner(
    figures: Figures, mode: Mode, wishes: Wishes, usable: Collection[str] = tuple(QUANTIZATIONS)
) -> Mode | None:
    """The first mode after `mode` that needs less memory and agrees with the user's settings.

    It recomputes all blocks or none: how much was lacking is not known, and a run is retried once.
    """
    ladder = _granted(wishes, figures.blocks)
    after = ladder[ladder.index(mode) + 1 :] if mode in ladder else []
    after = [each for each in after if each.whole and each.quantize in ("none", *usable)]
    need = sum(figures.parts(mode).values())
    for each in after:
        if sum(figures.parts(each).values()) < need:
            return each
    return None


def _granted(wishes: Wishes, blocks: int) -> list[Mode]:
    """The modes that agree with the user's settings, for a model of so many blocks."""
    one = (wishes.quantize,)
    kinds = (KINDS, OFFLOADED) if wishes.quantize == "auto" else (one, one)
    return [
        mode
        for mode in _ladder(blocks, *kinds)
        if wishes.checkpointing in (None, mode.checkpointing)
        and wishes.offload in (None, mode.offload)
    ]


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
