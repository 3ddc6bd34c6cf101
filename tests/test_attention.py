"""Attention rollout: by a replica with autograd's own gradients, whatever form attention has, and a known answer."""

import pytest
import torch
from conftest import NORMALIZATION
from test_transformers import FORMS, TARGET, Attending, by_patch, explained, images, trained
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import NETWORKS, SIDE, randomised, vit

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case
from torchserve_explain.attribution.methods.attention import AttentionRollout
from torchserve_explain.attribution.methods.gradient import InputXGradient
from torchserve_explain.attribution.rows import Score

__all__ = ["trained"]  # a fixture


class Kept(TorchFunctionMode):
    """Attention by hand, its weights [n, heads, tokens, tokens] kept."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ != "multi_head_attention_forward":
            return func(*args, **(kwargs or {}))
        x, (heads, weight, bias) = args[0].transpose(0, 1), args[4:7]
        parts = zip(weight.chunk(3), bias.chunk(3), strict=True)
        q, k, v = ((x @ w.T + b).unflatten(-1, (heads, -1)).transpose(1, 2) for w, b in parts)
        self.weights.append((q * q.shape[-1] ** -0.5).matmul(k.mT).softmax(-1))
        return ((self.weights[-1] @ v).transpose(1, 2).flatten(2) @ args[11].T + args[12]).transpose(0, 1), None


def rolled_out(weights, gradients, read):
    """Return the relevance of each token for those that are read, by whole matrices, from the first layer to the last."""
    total = torch.eye(weights[0].shape[-1], dtype=torch.float64)
    for one, gradient in zip(weights, gradients, strict=True):
        mean = sum((one[0, head] * gradient[0, head]).clamp(min=0) for head in range(one.shape[1])) / one.shape[1]
        total = total + mean @ total
    return read @ total


@pytest.mark.parametrize("score", list(Score))
def test_it_is_its_naive_replica_through_three_layers(score):
    model = randomised(lambda: vit(layers=3))
    (image,) = images()
    classifier = Classifier(model, NORMALIZATION, (SIDE, SIDE))
    case = Case(classifier, image, TARGET, score, 1.0)
    (found,) = Engine(classifier, 4).results([Job(AttentionRollout(), case)])
    with Kept() as kept:
        logits = model(image[None].clone().requires_grad_())
    explained = (logits if score is Score.LOGIT else logits.softmax(1))[0, TARGET]
    read = torch.eye(17, dtype=torch.float64)[0]
    relevance = rolled_out(kept.weights, torch.autograd.grad(explained, kept.weights), read)
    expected = functional.interpolate(relevance[1:].view(1, 1, 4, 4), size=(SIDE, SIDE), mode="bilinear")[0]
    torch.testing.assert_close(found.value.map, expected)
    assert bool(expected.any()) and found.evaluations == 1


@pytest.mark.parametrize("form", ["fused", "a module", "a module with weights", "scaled"])
def test_what_form_attention_has_does_not_matter_and_all_tokens_that_are_read_count_evenly(form):
    """A mean over 4 x 4 patches reads all of them: of one layer, a sixteenth each and the sum of what they attended to."""
    kept = []

    def by_hand(model, x):
        q, k, v = model.qkv(x)
        kept.append((q @ k.mT * 0.5).softmax(-1))
        return model.layer.norm1(model.out(kept[0] @ v))

    found, _ = explained(Attending(lambda m, x: m.layer.norm1(FORMS[form][0](m, x))).double(), AttentionRollout())
    logits = Attending(by_hand).double()(images().requires_grad_())
    even = torch.full((16,), 1 / 16, dtype=torch.float64)
    relevance = rolled_out(kept, torch.autograd.grad(logits[0, TARGET], kept), even)
    expected = functional.interpolate(relevance.view(1, 1, 4, 4), size=(SIDE, SIDE), mode="bilinear")[0]
    torch.testing.assert_close(found.map, expected)


def test_rows_of_a_pass_are_as_if_alone_and_a_difference_has_a_map_of_its_own():
    classifier = Classifier(randomised(NETWORKS["vit"]), NORMALIZATION, (SIDE, SIDE))
    cases = [Case(classifier, image, target, versus=versus) for image in images(2) for target, versus in ((0, None), (0, 1))]
    jobs = [Job(AttentionRollout(), case) for case in cases]
    together = [one.value.map for one in Engine(classifier, 16).results(jobs)]
    alone = [Engine(classifier, 1).results([job])[0].value.map for job in jobs]
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together[0], together[1])


class Windows(nn.Module):
    """Attention within the rows of 4 x 4 patches, or of all of them to two tokens of its own."""

    def __init__(self, learned):
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), nn.Linear(8, 5)
        self.queries = nn.Parameter(torch.rand(1, 2, 8)) if learned else None

    def forward(self, x):
        tokens = self.norm(self.patches(x).flatten(2).mT)
        queries = tokens.unflatten(1, (4, 4)).flatten(0, 1) if self.queries is None else self.queries.expand(len(x), -1, -1)
        keys = queries if self.queries is None else tokens
        attended = functional.scaled_dot_product_attention(queries[:, None], keys[:, None], keys[:, None])
        return self.head(attended.reshape(len(x), -1, 8).mean(1))


def refusal(model, side=SIDE):
    return AttentionRollout.unsupported(Classifier(model.eval(), NORMALIZATION, (side, side)))


def test_other_networks_are_refused_with_the_reason():
    assert all("no attention" in refusal(NETWORKS[name]()) for name in ("swin", "convnext", "maxvit"))
    assert "no attention" in refusal(Attending(lambda m, x: m.layer.norm1(x)))
    assert all("at most a class token" in refusal(Windows(learned)) for learned in (False, True))


def test_of_timm_a_vit_is_served_and_windows_of_as_many_tokens_as_there_are_patches_are_refused():
    timm = pytest.importorskip("timm", reason="the optional package timm is not installed")
    options = {"num_classes": 5, "embed_dim": 16, "num_heads": (2, 2)}
    swin = timm.models.swin_transformer.SwinTransformer(32, 2, depths=(1, 1), window_size=8, **options)
    assert "at most a class token" in refusal(swin)
    vit = timm.models.vision_transformer.VisionTransformer(SIDE, 8, depth=2, **options | {"num_heads": 2})
    nn.init.normal_(vit.head.weight)
    assert refusal(vit) is None


def test_it_finds_the_patch_that_decides_more_often_than_a_gradient(trained):
    """Two of three; AttnLRP finds all (test_transformers)."""
    rollout, plain = (by_patch(trained, method) for method in (AttentionRollout(), InputXGradient()))
    hits = [float((found.argmax(1) == trained[2]).float().mean()) for found in (rollout, plain)]
    assert hits[0] > 0.6 > 0.4 > hits[1]
