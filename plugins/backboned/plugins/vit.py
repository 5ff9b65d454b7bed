"""Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929) from torchvision."""

import torch
from torch import Tensor, nn

from backboned.plugins.torchvision_backbone import torchvision_backbone
from backboned.registry import Backbone, Head, Stage, register


@register
def vit_b_16() -> Backbone:
    """ViT-B/16: twelve blocks over 196 patches and a class token."""
    return torchvision_backbone(
        "vit_b_16",
        stages=(
            Stage("embed", ("conv_proj", "class_token", "encoder.pos_embedding", "encoder.dropout"), _embed),
            *(Stage.of(f"block{n}", f"encoder.layers.encoder_layer_{n - 1}") for n in range(1, 13)),
            Stage.of("pool", "encoder.ln", _class_token),
        ),
        head=Head.at("heads.head"),
        feature_size=768,
    )


def _embed(model: nn.Module, x: Tensor) -> Tensor:
    """`[batch, 3, 224, 224]` → `[batch, 197, 768]`: the patches behind the class token, with their positions."""
    patches = model.get_submodule("conv_proj")(x).flatten(2).permute(0, 2, 1)
    class_token = model.get_parameter("class_token").expand(len(x), -1, -1)
    tokens = torch.cat([class_token, patches], dim=1) + model.get_parameter("encoder.pos_embedding")
    dropped: Tensor = model.get_submodule("encoder.dropout")(tokens)
    return dropped


def _class_token(tokens: Tensor) -> Tensor:
    """`[batch, tokens, 768]` → `[batch, 768]`."""
    return tokens[:, 0]
