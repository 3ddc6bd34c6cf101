"""Small transformers with random parameters, and one that is trained on a task whose answer is known."""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import ConvNeXt, MaxVit, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

SIDE, CLASSES = 32, 5


def vit(layers=2):
    return VisionTransformer(SIDE, 8, layers, 2, 8, 16, num_classes=CLASSES)


def swin(**options):
    """Windows of 2 x 2, shifted in every second block; 8 x 8 places, then 4 x 4."""
    return SwinTransformer([4, 4], 8, [2, 2], [2, 2], [2, 2], mlp_ratio=2, num_classes=CLASSES, **options)


def swin_v2():
    return swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


def convnext():
    return ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)], layer_scale=0.5, num_classes=CLASSES)


def maxvit():
    return MaxVit((SIDE, SIDE), 8, 2, [8, 16], [1, 1], 4, 0.0, num_classes=CLASSES)


NETWORKS = {"vit": vit, "swin": swin, "swin_v2": swin_v2, "convnext": convnext, "maxvit": maxvit}


def randomised(build, biases=True):
    """Build a network in float64 whose parameters are all of a size to matter; without `biases` nothing is added anywhere."""
    torch.manual_seed(0)
    model = build().double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "embedding" in name or "token" in name or "relative" in name:
                weighs = name.endswith("weight") or "scale" in name
                parameter.normal_(1, 0.2) if weighs else parameter.normal_(0, 0.3 if biases else 0)
            else:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.get_buffer("running_mean").normal_(0, 0.3 if biases else 0)
    return model


class Literal(TorchFunctionMode):
    """The rules as autograd has them: gates, deviations and norms are numbers, each factor of a product gets one half."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x: Any = args[0] if args else None
        match func.__name__:
            case "gelu" | "silu" | "relu" | "sigmoid" | "tanh" | "hardswish" if x.requires_grad:
                return x * (func(x.detach().clone(), *args[1:]) / x.detach()).nan_to_num()
            case "layer_norm":
                sigma = (x.var(-1, correction=0, keepdim=True) + kwargs["eps"]).sqrt().detach()
                return (x - x.mean(-1, keepdim=True)) / sigma * kwargs["weight"] + kwargs["bias"]
            case "normalize" if x.requires_grad:
                return x / x.norm(dim=-1, keepdim=True).detach()
            case "softmax":
                weights = func(*args, **kwargs)
                return weights if self.attention else weights.detach()
            case "matmul" | "einsum":
                *front, a, b = args
                if a.requires_grad and b.requires_grad:
                    return (func(*front, a, b.detach()) + func(*front, a.detach(), b)) / 2
            case "mul" if all(isinstance(one, torch.Tensor) and one.requires_grad for one in args):
                gate, signal = sorted(args, key=torch.numel)
                return gate.detach() * signal
            case "multi_head_attention_forward":
                return self.attend(x.transpose(0, 1), args[4], *args[5:7], *args[11:13]).transpose(0, 1), None
        return func(*args, **kwargs)

    def attend(self, x, heads, weight, bias, out_weight, out_bias):
        q, k, v = ((x @ w.T + b).unflatten(-1, (heads, -1)).transpose(1, 2)
                   for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True))  # fmt: skip
        with self:
            mixed = (q * q.shape[-1] ** -0.5).matmul(k.mT).softmax(-1).matmul(v)
        return mixed.transpose(1, 2).flatten(2) @ out_weight.T + out_bias


COLOURS = ((1.0, 0.1, 0.1), (0.1, 1.0, 0.1), (0.1, 0.1, 1.0), (1.0, 1.0, 0.1))
NO_COLOUR = len(COLOURS)  # without a class of its own for it, one of the colours would be known by the others' absence


def marked_images(count, seed):
    """Return images [n, 3, 32, 32] of grey noise, the place [n] of 16 that has a coloured patch of 8 x 8, and its colour [n].

    Another patch is cyan, which says nothing; where the colour is NO_COLOUR there is no other than that.
    """
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, SIDE, SIDE, generator=random).expand(-1, 3, -1, -1).clone()
    classes = torch.randint(NO_COLOUR + 1, (count,), generator=random)
    places = torch.stack([torch.randperm(16, generator=random)[:2] for _ in range(count)])
    for image, colour, (marked, other) in zip(images, classes, places, strict=True):
        _paint(image, int(other), (0.1, 0.9, 0.9))
        if colour < NO_COLOUR:
            _paint(image, int(marked), COLOURS[colour])
    return images, places[:, 0], classes


def _paint(image, place, colour):
    y, x = 8 * (place // 4), 8 * (place % 4)
    patch = image[:, y : y + 8, x : x + 8]
    patch.mul_(0.3).add_(0.7 * torch.tensor(colour)[:, None, None])


def trained_vit(normalization, steps=150):
    """Return a ViT of two blocks that names the colour."""
    torch.manual_seed(1)
    model = VisionTransformer(SIDE, 8, 2, 4, 32, 64, num_classes=NO_COLOUR + 1)
    nn.init.normal_(model.heads.head.weight, 0, 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        images, _, classes = marked_images(64, step)
        loss = nn.functional.cross_entropy(model(normalization(images)), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
