"""Names of layers in LoRA files: those of diffusers and peft, and kohya's, in both directions.

    diffusers  unet.down_blocks.0.attentions.0.proj_in.lora_A.weight, .lora_B.weight
               also text_encoder., text_encoder_2., transformer.
    kohya      lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .alpha
               also lora_te_, lora_te1_, lora_te2_ for text encoders

kohya's names have `_` for every dot. For SDXL, kohya's trainers name blocks as the original code does
(`input_blocks_4_1`, `output_blocks_0_1`, `middle_block_1`), which depends on the number of layers of a block.
"""

from __future__ import annotations

import re

KOHYA = {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te_": "text_encoder", "lora_te2_": "text_encoder_2"}
# parts of names that have `_` themselves, the longest first
PARTS = sorted(
    """
    down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out time_emb_proj
    time_embedding add_embedding class_embedding linear_1 linear_2 conv_in conv_out conv_shortcut conv_norm_out
    text_model self_attn q_proj k_proj v_proj out_proj text_projection
    """.split(),  # noqa: SIM905
    key=len,
    reverse=True,
)
RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
OUTSIDE = {  # of the blocks, in the original code of SDXL
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
# the layers of those names that diffusers reads under the original ones alone
LABELS = {ours: original for original, ours in OUTSIDE.items() if original.startswith("label_emb")}


def kohya_key(component: str, layer: str, several: bool = False) -> str:
    """The name of a layer in kohya's files, without its ending.

    Args:
        component: `unet`, `text_encoder` or `text_encoder_2`.
        layer: its name in the component.
        several: the model has two text encoders: the first is `te1`.
    """
    first = "lora_te1_" if several else "lora_te_"
    prefix = {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}[component]
    name = layer.replace(".", "_")
    return prefix + (LABELS.get(name, name) if component == "unet" else name)


def split_kohya(key: str) -> tuple[str, str] | None:
    """The component and the name of a layer with `_` for dots, of kohya's key without its ending; None: no such key."""
    for prefix, component in KOHYA.items():
        if key.startswith(prefix):
            return component, key.removeprefix(prefix)
    return None


def dotted(name: str) -> str:
    """A name of diffusers with its dots, from one with `_` for them."""
    for number, part in enumerate(PARTS):
        name = re.sub(rf"(?<![a-z]){part}(?![a-z0-9])", f"<{number}>", name)
    return re.sub(r"<(\d+)>", lambda match: PARTS[int(match[1])], name.replace("_", "."))


def flat(name: str) -> str:
    """A name of diffusers or transformers with `_` for its dots, by which both spellings are compared."""
    return name.replace(".", "_").removeprefix("text_model_")


def from_original(name: str, layers: int) -> str:
    """A name of the original code's U-Net as diffusers', both with `_` for dots.

    Args:
        name: such as `input_blocks_4_1_proj_in`.
        layers: of a block, `layers_per_block` in the network's config.
    """
    if name in OUTSIDE:
        return OUTSIDE[name]
    match = re.fullmatch(r"(input_blocks|output_blocks)_(\d+)_(\d+)_(.*)|middle_block_(\d+)_(.*)", name)
    if match is None:
        return name
    if match[5] is not None:
        place, rest = {"0": "resnets_0", "1": "attentions_0", "2": "resnets_1"}.get(match[5], "none"), match[6]
        return f"mid_block_{place}_{RESNET.get(rest, rest)}"
    down, number, inner, rest = match[1] == "input_blocks", int(match[2]), int(match[3]), match[4]
    block, index = divmod(number - down, layers + 1)
    side = "down" if down else "up"
    if rest in ("op", "conv"):
        return f"{side}_blocks_{block}_{side}samplers_0_conv"
    kind = "resnets" if inner == 0 else "attentions"
    return f"{side}_blocks_{block}_{kind}_{index}_{RESNET.get(rest, rest)}"
