"""LoRA files as the tools in the field write them, broken ones included, with what each means.

A case writes a file for a model and says what the weights are once it is laid over them, computed
here in float64 from the definitions, with nothing from `adapters`.
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]  # the model's own, by layer; biases as `<layer>.bias`
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LoraFile:
    """A file and its meaning."""

    tensors: Tensors
    after: dict[str, Tensor] = field(default_factory=dict)  # weights with it at scale 1
    metadata: dict[str, str] = field(default_factory=dict)
    spoil: Callable[[bytes], bytes] | None = None  # what happens to the file afterwards
    config: dict | None = None  # the adapter_config.json beside it


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    layout: str  # how names and parts are spelled
    who: str  # writes it
    write: Callable[[Weights], LoraFile]
    refused: str | None = None  # what the refusal of a broken file says
    only: str | None = None  # a model; None: all


@dataclass(frozen=True)
class Layer:
    """A low-rank change of one layer."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def delta(self) -> Tensor:
        return self.alpha / self.rank * (self.up.double() @ self.down.double())


ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0", "_proj", ".to_add_out")
FEED_FORWARD = (".w1", ".w2", ".w3", ".net.0.proj", ".net.2", ".gate_layer", "img_mlp.proj", ".out")


def attention(name: str) -> bool:
    return name.startswith(("layers.", "transformer_blocks.")) and name.endswith(ATTENTION)


def blocks(name: str) -> bool:
    feed_forward = name.startswith(("layers.", "transformer_blocks.")) and name.endswith(
        FEED_FORWARD
    )
    return feed_forward or attention(name)


def every(name: str) -> bool:
    return not name.endswith("_pad_token")  # no layers, though matrices


def layers(
    weights: Weights,
    which: Callable[[str], bool] = attention,
    ranks: tuple[int, ...] = (4,),
    alpha: float = 1.0,
) -> dict[str, Layer]:
    """Random factors for the chosen layers; alpha is given as a multiple of the rank."""
    draw = torch.Generator().manual_seed(7)
    found: dict[str, Layer] = {}
    for name, weight in weights.items():
        if weight.ndim == 2 and which(name):
            rank = ranks[len(found) % len(ranks)]
            down = torch.randn(rank, weight.shape[1], generator=draw) / 8
            up = torch.randn(weight.shape[0], rank, generator=draw) / 8
            found[name] = Layer(down, up, alpha * rank)
    return found


def after(weights: Weights, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name].double() + delta for name, delta in deltas.items()}


def low_rank(
    spell: str,
    parts: tuple[str, str],
    *,
    alpha: float = 1.0,
    alpha_tensor: bool = False,
    which: Callable[[str], bool] = attention,
    ranks: tuple[int, ...] = (4,),
    header: Callable[[dict[str, Layer]], dict] | None = None,
    config: Callable[[dict[str, Layer]], dict] | None = None,
    kohya_header: bool = False,
) -> Callable[[Weights], LoraFile]:
    """A LoRA whose layers are called `spell` (with {} for the name, {_} for it flattened)."""

    def write(weights: Weights) -> LoraFile:
        found = layers(weights, which, ranks, alpha)
        tensors = {}
        for name, layer in found.items():
            written = spelled(spell, name)
            tensors[f"{written}.{parts[0]}"] = layer.down
            tensors[f"{written}.{parts[1]}"] = layer.up
            if alpha_tensor:
                tensors[f"{written}.alpha"] = torch.tensor(layer.alpha)
        deltas = {name: layer.delta for name, layer in found.items()}
        metadata = settings(header(found)) if header else {}
        if kohya_header:
            layer = next(iter(found.values()))
            metadata |= {"ss_network_alpha": str(layer.alpha), "ss_network_dim": str(layer.rank)}
        beside = config(found) if config else None
        return LoraFile(tensors, after(weights, deltas), metadata, config=beside)

    return write


def spelled(spell: str, name: str) -> str:
    block, number, rest = (name.split(".", 2) + ["", ""])[:3]
    spell = spell.replace("{block}.{number}.", f"{block}.{number}.")
    middle = f"{block}.{number}._orig_mod.{rest}"
    return (
        spell.replace("{wrapped}", middle)
        .replace("{_}", name.replace(".", "_"))
        .replace("{}", name)
    )


def settings(peft: dict) -> dict[str, str]:
    named = {f"transformer.{name}": value for name, value in peft.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(named)}


AB = ("lora_A.weight", "lora_B.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight")
DOTTED = ("lora.down.weight", "lora.up.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
NAMED = ("lora_A.my_style.weight", "lora_B.my_style.weight")


def one_alpha(found: dict[str, Layer]) -> dict:
    layer = next(iter(found.values()))
    return {"r": layer.rank, "lora_alpha": layer.alpha, "target_modules": sorted(found)}


def patterns(found: dict[str, Layer]) -> dict:
    return one_alpha(found) | {
        "rank_pattern": {name: layer.rank for name, layer in found.items()},
        "alpha_pattern": {name: layer.alpha for name, layer in found.items()},
    }


def rslora(weights: Weights) -> LoraFile:
    found = layers(weights, ranks=(4,), alpha=1.5)
    file = low_rank("transformer.{}", AB, alpha=1.5)(weights)
    deltas = {name: layer.delta * layer.rank**0.5 for name, layer in found.items()}
    metadata = settings(one_alpha(found) | {"use_rslora": True})
    return LoraFile(file.tensors, after(weights, deltas), metadata)


# Other changes than low rank.


def lokr(spell: str, decomposed: bool, alpha: float) -> Callable[[Weights], LoraFile]:
    def write(weights: Weights) -> LoraFile:
        draw = torch.Generator().manual_seed(3)
        tensors, deltas = {}, {}
        for name in layers(weights):
            rows, columns = weights[name].shape
            key = spelled(spell, name)
            w1 = tensors[f"{key}.lokr_w1"] = torch.randn(8, 8, generator=draw) / 4
            if decomposed:
                up = tensors[f"{key}.lokr_w2_a"] = torch.randn(rows // 8, 2, generator=draw) / 4
                down = torch.randn(2, columns // 8, generator=draw) / 4
                tensors[f"{key}.lokr_w2_b"] = down
                w2, scale = up.double() @ down.double(), alpha / 2
            else:
                w2, scale = torch.randn(rows // 8, columns // 8, generator=draw) / 4, 1.0
                tensors[f"{key}.lokr_w2"] = w2
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
            deltas[name] = scale * torch.kron(w1.double(), w2.double())
        return LoraFile(tensors, after(weights, deltas))

    return write


def loha(weights: Weights) -> LoraFile:
    draw = torch.Generator().manual_seed(3)
    tensors, deltas = {}, {}
    for name in layers(weights):
        rows, columns = weights[name].shape
        products = []
        for side in (1, 2):
            up, down = torch.randn(rows, 2, generator=draw), torch.randn(2, columns, generator=draw)
            tensors[f"diffusion_model.{name}.hada_w{side}_a"] = up / 4
            tensors[f"diffusion_model.{name}.hada_w{side}_b"] = down / 4
            products.append((up / 4).double() @ (down / 4).double())
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(1.0)
        deltas[name] = 1.0 / 2 * products[0] * products[1]
    return LoraFile(tensors, after(weights, deltas))


def diff(weights: Weights) -> LoraFile:
    draw = torch.Generator().manual_seed(3)
    tensors, deltas = {}, {}
    for name in layers(weights):
        for part, key in ((name, "diff"), (f"{name}.bias", "diff_b")):
            if part in weights:
                value = torch.randn(weights[part].shape, generator=draw) / 8
                tensors[f"diffusion_model.{name}.{key}"] = value
                deltas[part] = value.double()
    return LoraFile(tensors, after(weights, deltas))


def norms(spell: str, key: str, names: Mapping[str, str] | None = None) -> Callable[..., LoraFile]:
    """Changes of every norm's weight; `names` are other names of their last parts."""

    def write(weights: Weights) -> LoraFile:
        draw = torch.Generator().manual_seed(3)
        tensors, deltas = {}, {}
        for name, weight in weights.items():
            if weight.ndim == 1 and not name.endswith((".bias", "_pad_token")):
                front, _, last = name.rpartition(".")
                written = f"{front}.{(names or {}).get(last, last)}" if front else last
                value = torch.randn(weight.shape, generator=draw) / 8
                tensors[f"{spelled(spell, written)}.{key}"] = value
                deltas[name] = value.double()
        return LoraFile(tensors, after(weights, deltas))

    return write


def with_biases(weights: Weights) -> LoraFile:
    """A LoRA of weights with `diff_b` beside it, where the layer has a bias."""
    file = low_rank("diffusion_model.{}", DOWN_UP, which=every)(weights)
    moved = {}
    for name in layers(weights, every):
        bias = weights.get(f"{name}.bias")
        if bias is not None:
            value = torch.full_like(bias, 1 / 8)
            file.tensors[f"diffusion_model.{name}.diff_b"] = value
            moved[f"{name}.bias"] = bias.double() + value.double()
    return LoraFile(file.tensors, file.after | moved)


def dora(
    spell: str, parts: tuple[str, str], magnitude: str, column: bool = False
) -> Callable[[Weights], LoraFile]:
    """Magnitudes beside a LoRA; `column`: as a matrix [out, 1], with an alpha."""

    def write(weights: Weights) -> LoraFile:
        plain = low_rank(spell, parts, alpha=0.5 if column else 1, alpha_tensor=column)(weights)
        draw = torch.Generator().manual_seed(5)
        tensors, adapted = dict(plain.tensors), {}
        for name, moved in plain.after.items():
            norm = moved.norm(dim=1)
            size = (norm * (1 + torch.rand(len(norm), generator=draw) / 4)).float()
            tensors[f"{spelled(spell, name)}.{magnitude}"] = size[:, None] if column else size
            adapted[name] = size.double()[:, None] * moved / norm[:, None]
        return LoraFile(tensors, adapted)

    return write


# Z-Image by the names of its first release.


def fused(
    spell: str, parts: tuple[str, str], redundant: bool = False, alpha: bool = True
) -> Callable[[Weights], LoraFile]:
    """q, k and v as one layer; `redundant`: beside them as well, as Anime-Z has them."""

    def write(weights: Weights) -> LoraFile:
        draw = torch.Generator().manual_seed(9)
        tensors: Tensors = {}
        deltas: dict[str, Tensor] = {}
        blocks_of = sorted({n[: -len(".to_q")] for n in weights if n.endswith("attention.to_q")})
        for block in blocks_of:
            rows, columns = weights[f"{block}.to_q"].shape
            down = torch.randn(4, columns, generator=draw) / 8
            ups = [torch.randn(rows, 4, generator=draw) / 8 for _ in range(4)]
            written = {f"{block}.qkv": torch.cat(ups[:3]), f"{block}.out": ups[3]}
            split = dict(
                zip((f"{block}.to_{x}" for x in ("q", "k", "v", "out.0")), ups, strict=True)
            )
            for name, up in (written | split if redundant else written).items():
                key = spelled(spell, name)
                tensors[f"{key}.{parts[0]}"], tensors[f"{key}.{parts[1]}"] = (
                    down.clone(),
                    up.clone(),
                )
                if alpha:
                    tensors[f"{key}.alpha"] = torch.tensor(2.0)
            scale = 0.5 if alpha else 1.0
            deltas |= {name: scale * (up.double() @ down.double()) for name, up in split.items()}
        return LoraFile(tensors, after(weights, deltas))

    return write


def fused_gate(
    spell: str, parts: tuple[str, str], alpha: bool = True
) -> Callable[[Weights], LoraFile]:
    """Qwen-Image-2.1's gate_layer and proj as one layer, beside the attention."""

    def write(weights: Weights) -> LoraFile:
        draw = torch.Generator().manual_seed(9)
        scale = 0.5 if alpha else 1.0
        file = low_rank(spell, parts, alpha=scale, alpha_tensor=alpha)(weights)
        deltas: dict[str, Tensor] = {}
        for name in (n for n in weights if n.endswith(".gate_layer")):
            rows, columns = weights[name].shape
            down = torch.randn(4, columns, generator=draw) / 8
            up = torch.randn(2 * rows, 4, generator=draw) / 8
            key = spelled(spell, name.replace("gate_layer", "gate_up"))
            file.tensors.update({f"{key}.{parts[0]}": down, f"{key}.{parts[1]}": up})
            if alpha:
                file.tensors[f"{key}.alpha"] = torch.tensor(2.0)
            whole = scale * (up.double() @ down.double())
            deltas |= {name: whole[:rows], name.replace("gate_layer", "proj"): whole[rows:]}
        return LoraFile(file.tensors, file.after | after(weights, deltas))

    return write


def ends(weights: Weights) -> LoraFile:
    """The layers before and after the blocks, with one block, by their first names."""
    names = {
        "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
        "all_x_embedder.2-1": "x_embedder",
        "layers.0.attention.to_q": "layers.0.attention.to_q",
    }
    found = layers(weights, lambda name: name in names)
    tensors = {}
    for name, layer in found.items():
        tensors[f"diffusion_model.{names[name]}.lora_A.weight"] = layer.down
        tensors[f"diffusion_model.{names[name]}.lora_B.weight"] = layer.up
    return LoraFile(tensors, after(weights, {n: layer.delta for n, layer in found.items()}))


# Broken files.


def broken(change: Callable[[Tensors], object]) -> Callable[[Weights], LoraFile]:
    def write(weights: Weights) -> LoraFile:
        file = low_rank("transformer.{}", AB)(weights)
        change(file.tensors)
        return file

    return write


def first(tensors: Tensors, part: str) -> str:
    return next(key for key in tensors if key.endswith(part))


def a_bias(weights: Weights) -> LoraFile:
    """One `lora_B.bias`, as PEFT's `lora_bias` writes them, in an otherwise plain file."""
    file = low_rank("transformer.{}", AB)(weights)
    name = next(n for n in layers(weights) if f"{n}.bias" in weights)
    bias = torch.ones(len(weights[name])) / 8
    file.tensors[f"transformer.{name}.lora_B.bias"] = bias
    moved = {f"{name}.bias": weights[f"{name}.bias"].double() + bias}
    return LoraFile(file.tensors, file.after | moved)


def spoiled(spoil: Callable[[bytes], bytes]) -> Callable[[Weights], LoraFile]:
    def write(weights: Weights) -> LoraFile:
        return LoraFile(low_rank("transformer.{}", AB)(weights).tensors, spoil=spoil)

    return write


def other_file(*names: str, metadata: dict[str, str] | None = None) -> Callable[..., LoraFile]:
    """Not a LoRA: tensors of these names."""
    return lambda _: LoraFile({name: torch.ones(4, 64) for name in names}, metadata=metadata or {})


def foreign(*names: str) -> Callable[[Weights], LoraFile]:
    """A LoRA of layers with these names."""
    return lambda _: LoraFile(
        {f"{name}.{part}": torch.ones(4, 4) for name in names for part in DOWN_UP}
    )


def with_config(config: dict, alpha: float = 1.0) -> Callable[[Weights], LoraFile]:
    """A LoRA of rank 4 beside an adapter_config.json that is about another."""
    return low_rank("base_model.model.{}", AB, alpha=alpha, config=lambda _: config)


def _other_block(tensors: Tensors) -> None:
    for part in AB:
        key = first(tensors, part)
        tensors[key.replace(".0.", ".77.", 1)] = tensors[key].clone()


def _block(tensors: Tensors) -> str:
    return next(iter(tensors)).removesuffix(f".to_q.{AB[0]}")


def _pickle(_: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({"transformer.x.lora_A.weight": torch.ones(1)}, buffer)
    return buffer.getvalue()


_MIXED = (2, 4, 8)
CASES = (
    Case("`transformer.` A/B", "diffusers, PEFT, this project", low_rank("transformer.{}", AB)),
    Case("… every linear layer", "", low_rank("transformer.{}", AB, which=every)),
    Case("… mixed ranks", "Comfy-Org", low_rank("transformer.{}", AB, ranks=_MIXED)),
    Case(
        "… alpha = 1.5 · rank in `lora_adapter_metadata`",
        "diffusers, lightx2v, Pruna",
        low_rank("transformer.{}", AB, alpha=1.5, header=one_alpha),
    ),
    Case(
        "… `rank_pattern` and `alpha_pattern` there",
        "PEFT",
        low_rank("transformer.{}", AB, alpha=1.5, ranks=_MIXED, header=patterns),
    ),
    Case("… `use_rslora` there", "PEFT", rslora),
    Case("… alpha = 2 · rank, written nowhere", "", low_rank("transformer.{}", AB, alpha=2.0)),
    Case("… with `.alpha`", "", low_rank("transformer.{}", AB, alpha=0.5, alpha_tensor=True)),
    Case(
        "`transformer.` down/up with `.alpha`",
        "OneTrainer before",
        low_rank("transformer.{}", DOWN_UP, alpha=0.5, alpha_tensor=True),
    ),
    Case("… no alpha", "", low_rank("transformer.{}", DOWN_UP)),
    Case(
        "`transformer.` lora.down/lora.up", "diffusers before", low_rank("transformer.{}", DOTTED)
    ),
    Case("`diffusion_model.` A/B", "ai-toolkit", low_rank("diffusion_model.{}", AB)),
    Case("… every linear layer", "", low_rank("diffusion_model.{}", AB, which=every)),
    Case("… mixed ranks", "Comfy-Org", low_rank("diffusion_model.{}", AB, ranks=_MIXED)),
    Case(
        "… with `.alpha`",
        "musubi-tuner converted",
        low_rank("diffusion_model.{}", AB, alpha=0.5, alpha_tensor=True),
    ),
    Case(
        "… with `.alpha` and the same alpha in `lora_adapter_metadata`",
        "re-uploads",
        low_rank("diffusion_model.{}", AB, alpha=2.0, alpha_tensor=True, header=one_alpha),
    ),
    Case(
        "`diffusion_model.` down/up with `.alpha`",
        "",
        low_rank("diffusion_model.{}", DOWN_UP, alpha=0.5, alpha_tensor=True),
    ),
    Case("bare A/B", "", low_rank("{}", AB)),
    Case("… with `.alpha`", "", low_rank("{}", AB, alpha=0.5, alpha_tensor=True)),
    Case("bare `.default.`", "DiffSynth-Studio", low_rank("{}", DEFAULT)),
    Case(
        "bare down/up with `.alpha`, mixed ranks",
        "lightx2v",
        low_rank("{}", DOWN_UP, alpha=0.125, alpha_tensor=True, ranks=_MIXED),
    ),
    Case("… no alpha", "", low_rank("{}", DOWN_UP)),
    Case("`base_model.model.` A/B", "PEFT, ModelScope", low_rank("base_model.model.{}", AB)),
    Case(
        "… alpha = 2 · rank in `adapter_config.json` beside it",
        "PEFT",
        low_rank("base_model.model.{}", AB, alpha=2.0, config=one_alpha),
    ),
    Case(
        "… `rank_pattern` and `alpha_pattern` there",
        "PEFT",
        low_rank("base_model.model.{}", AB, alpha=1.5, ranks=_MIXED, config=patterns),
    ),
    Case(
        "… every linear layer, `lora_A.default.weight`",
        "PEFT",
        low_rank("base_model.model.{}", DEFAULT, which=every),
    ),
    Case(
        "`base_model.model.transformer.` `lora_A.my_style.weight`",
        "PEFT",
        low_rank("base_model.model.transformer.{}", NAMED, which=every),
    ),
    Case(
        "`transformer.` `lora_A.my_style.weight`",
        "musubi-tuner converted",
        low_rank("transformer.{}", NAMED),
    ),
    Case("`model.diffusion_model.` A/B", "", low_rank("model.diffusion_model.{}", AB, which=every)),
    Case(
        "`transformer._orig_mod.` A/B",
        "torch.compile",
        low_rank("transformer._orig_mod.{}", AB, which=every),
    ),
    Case(
        "`module.` in front, `_orig_mod.` within",
        "DataParallel, compiled blocks",
        low_rank("module.{wrapped}", AB),
    ),
    Case("`unet.`, `dit.` A/B", "", low_rank("unet.dit.{}", AB)),
    Case(
        "`lora_unet_` down/up with `.alpha`, attention",
        "kohya, musubi-tuner",
        low_rank("lora_unet_{_}", DOWN_UP, alpha=0.5, alpha_tensor=True),
    ),
    Case(
        "… attention and feed-forward",
        "kohya, musubi-tuner",
        low_rank("lora_unet_{_}", DOWN_UP, alpha=0.5, alpha_tensor=True, which=blocks),
    ),
    Case(
        "… every linear layer",
        "kohya, musubi-tuner",
        low_rank("lora_unet_{_}", DOWN_UP, alpha=0.5, alpha_tensor=True, which=every),
    ),
    Case(
        "… `.alpha` lost, `ss_network_alpha` in the header",
        "kohya, musubi-tuner",
        low_rank("lora_unet_{_}", DOWN_UP, alpha=0.5, kohya_header=True),
    ),
    Case("`lora_unet_` A/B", "", low_rank("lora_unet_{_}", AB)),
    Case(
        "`lora_unet__` down/up with `.alpha`, every linear layer",
        "VideoX-Fun",
        low_rank("lora_unet__{_}", DOWN_UP, alpha=0.5, alpha_tensor=True, which=every),
    ),
    Case(
        "`lora_unet__orig_mod_` down/up with `.alpha`",
        "kohya, compiled",
        low_rank("lora_unet__orig_mod_{_}", DOWN_UP, alpha=0.5, alpha_tensor=True),
    ),
    Case(
        "`lycoris_` down/up with `.alpha`",
        "LyCORIS",
        low_rank("lycoris_{_}", DOWN_UP, alpha=0.5, alpha_tensor=True),
    ),
    Case(
        "`lora_transformer_` down/up with `.alpha`",
        "OneTrainer",
        low_rank("lora_transformer_{_}", DOWN_UP, alpha=0.5, alpha_tensor=True),
    ),
    Case(
        "… every linear layer",
        "OneTrainer",
        low_rank("lora_transformer_{_}", DOWN_UP, alpha=0.5, alpha_tensor=True, which=every),
    ),
    Case(
        "LoKr `diffusion_model.`, whole factors",
        "ai-toolkit",
        lokr("diffusion_model.{}", False, 1e10),
    ),
    Case("… `w2_a`, `w2_b`", "ai-toolkit", lokr("diffusion_model.{}", True, 1.0)),
    Case("LoKr `lycoris_`", "LyCORIS, ai-toolkit before", lokr("lycoris_{_}", True, 1.0)),
    Case("LoKr `transformer.`", "", lokr("transformer.{}", True, 1.0)),
    Case("LoHa `diffusion_model.`", "LyCORIS", loha),
    Case(
        "DoRA `transformer.` `lora_magnitude_vector`",
        "diffusers",
        dora("transformer.{}", AB, "lora_magnitude_vector"),
    ),
    Case(
        "… `lora_magnitude_vector.weight`",
        "PEFT",
        dora("transformer.{}", AB, "lora_magnitude_vector.weight"),
    ),
    Case(
        "DoRA `diffusion_model.`",
        "",
        dora("diffusion_model.{}", AB, "lora_magnitude_vector"),
    ),
    Case(
        "DoRA `lora_unet_` `dora_scale`",
        "kohya, LyCORIS",
        dora("lora_unet_{_}", DOWN_UP, "dora_scale", column=True),
    ),
    Case(
        "DoRA `transformer.` `dora_scale`",
        "OneTrainer",
        dora("transformer.{}", AB, "dora_scale", column=True),
    ),
    Case("`.diff` and `.diff_b`", "ComfyUI extractions", diff),
    Case("down/up with `.diff_b`", "ComfyUI extractions", with_biases),
    Case("norms: `.diff`", "ComfyUI extractions", norms("diffusion_model.{}", "diff")),
    Case("norms: `lycoris_` `.w_norm`", "LyCORIS", norms("lycoris_{_}", "w_norm")),
    Case(
        "norms: `q_norm`, `k_norm`",
        "ComfyUI layout",
        norms("diffusion_model.{}", "diff", {"norm_q": "q_norm", "norm_k": "k_norm"}),
        only="Z-Image",
    ),
    Case("one `lora_B.bias`", "PEFT's `lora_bias`", a_bias, only="Qwen-Image"),
    Case(
        "fused qkv, out: A/B with `.alpha`",
        "ComfyUI layout",
        fused("diffusion_model.{}", AB),
        only="Z-Image",
    ),
    Case(
        "… down/up, dotted",
        "musubi-tuner for ComfyUI",
        fused("diffusion_model.{}", DOWN_UP),
        only="Z-Image",
    ),
    Case("… bare", "OneTrainer's original names", fused("{}", DOWN_UP), only="Z-Image"),
    Case(
        "… A/B without alpha",
        "diffusion-pipe",
        fused("diffusion_model.{}", AB, alpha=False),
        only="Z-Image",
    ),
    Case("… lora.down/lora.up", "", fused("diffusion_model.{}", DOTTED), only="Z-Image"),
    Case("… `lora_unet_`", "kohya", fused("lora_unet_{_}", DOWN_UP), only="Z-Image"),
    Case(
        "… beside to_q, to_k, to_v, to_out.0",
        "Anime-Z",
        fused("lora_unet_{_}", DOTTED, redundant=True),
        only="Z-Image",
    ),
    Case("`final_layer`, `x_embedder`", "ComfyUI layout", ends, only="Z-Image"),
    Case(
        "fused gate_up: A/B without alpha",
        "ai-toolkit",
        fused_gate("diffusion_model.{}", AB, alpha=False),
        only="Qwen-Image-2.1",
    ),
    Case(
        "… `lora_unet_` down/up with `.alpha`",
        "ComfyUI layout",
        fused_gate("lora_unet_{_}", DOWN_UP),
        only="Qwen-Image-2.1",
    ),
)
BROKEN = (
    Case(
        "one `lora_B` missing",
        "",
        broken(lambda t: t.pop(first(t, AB[1]))),
        refused="has lora_A but no lora_B",
    ),
    Case("a block the model has not", "", broken(_other_block), refused="do not exist in"),
    Case(
        "another model's LoRA",
        "",
        broken(
            lambda t: [
                t.update({f"transformer.double_blocks.{k[-30:]}": t.pop(k)}) for k in list(t)
            ]
        ),
        refused="do not exist in",
    ),
    Case(
        "a FLUX LoRA",
        "",
        foreign("lora_unet_single_blocks_3_linear1", "lora_unet_double_blocks_0_img_attn_qkv"),
        refused="made for another model: FLUX",
    ),
    Case(
        "a Stable Diffusion XL LoRA",
        "",
        foreign(
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "lora_te2_x"
        ),
        refused="made for another model: Stable Diffusion XL",
    ),
    Case(
        "a Wan LoRA",
        "",
        foreign("diffusion_model.blocks.0.self_attn.q"),
        refused="made for another model: Wan",
    ),
    Case(
        "a text encoder's layers beside it",
        "",
        broken(lambda t: t.update({f"lora_te1_x.{part}": torch.ones(4, 4) for part in DOWN_UP})),
        refused="belong to a text encoder",
    ),
    Case(
        "a layer that the block has not",
        "",
        broken(lambda t: t.update({f"{_block(t)}.to_x.{p}": torch.ones(4, 4) for p in DOWN_UP})),
        refused="has no to_x, only",
    ),
    Case(
        "two adapters in one file",
        "",
        broken(lambda t: t.update({f"x.lora_A.{n}.weight": torch.ones(4, 4) for n in "ab"})),
        refused="it contains 2 adapters (a, b)",
    ),
    Case(
        "another rank in `adapter_config.json`",
        "",
        with_config({"r": 8, "lora_alpha": 8}),
        refused="has rank 4, but adapter_config.json says 8",
    ),
    Case(
        "PiSSA in `adapter_config.json`",
        "",
        with_config({"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa"}),
        refused="changes the base model before the training",
    ),
    Case(
        "one layer of another size",
        "",
        broken(lambda t: t.update({first(t, AB[1]): torch.ones(60, 4)})),
        refused="have another size in",
    ),
    Case(
        "a token's embedding beside it, `token_embedding.zwx`",
        "",
        broken(lambda t: t.update({"token_embedding.zwx": torch.ones(1, 64)})),
        refused="token_embedding.zwx is not a known LoRA tensor",
    ),
    Case(
        "… `lora_token_embedding.zwx`",
        "",
        broken(lambda t: t.update({"lora_token_embedding.zwx": torch.ones(1, 64)})),
        refused="lora_token_embedding.zwx is not a known LoRA tensor",
    ),
    Case(
        "NaN in one layer",
        "",
        broken(lambda t: t[first(t, AB[1])].view(-1)[3].fill_(torch.nan)),
        refused="contains NaN or infinity",
    ),
    Case(
        "rank 2000",
        "",
        broken(
            lambda t: t.update(
                {first(t, AB[0]): torch.ones(2000, 64), first(t, AB[1]): torch.ones(64, 2000)}
            )
        ),
        refused="has rank 2000; 1024 is the limit",
    ),
    Case(
        "cut short", "", spoiled(lambda whole: whole[:-9]), refused="not a whole safetensors file"
    ),
    Case(
        "a whole model",
        "",
        other_file("model.diffusion_model.layers.0.attention.qkv.weight"),
        refused="is a whole model of Z-Image (1 tensors), not a LoRA",
    ),
    Case("a VAE", "", other_file("decoder.conv_in.weight"), refused="is a VAE"),
    Case(
        "a text encoder",
        "",
        other_file("model.layers.0.self_attn.q_proj.weight"),
        refused="is a text encoder",
    ),
    Case("a ControlNet", "", other_file("control_layers.0.x.weight"), refused="is a ControlNet"),
    Case("an embedding", "", other_file("<zwx>"), refused="is an embedding (textual inversion)"),
    Case(
        "a training checkpoint of this project",
        "",
        other_file("parameters.x", metadata={"zeroprior.checkpoint": "{}"}),
        refused="is a training checkpoint, which can only be resumed",
    ),
    Case("a pickle", "", spoiled(_pickle), refused="pickle"),
    Case(
        "a Git-LFS pointer",
        "",
        spoiled(lambda _: b"version https://git-lfs.github.com/spec/v1"),
        refused="is a Git-LFS pointer",
    ),
    Case("a GGUF file", "", spoiled(lambda _: b"GGUF" + bytes(60)), refused="is a GGUF file"),
    Case(
        "a web page in its place",
        "",
        spoiled(lambda _: b"<!DOCTYPE html><title>Sign in</title>"),
        refused="is a web page",
    ),
)
