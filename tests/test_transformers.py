"""Relevance through transformers: rules by replicas, networks by autograd of the literal rules, and a known answer."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import NORMALIZATION
from torch import nn
from torch.nn import functional
from transformers import CLASSES, NETWORKS, NO_COLOUR, SIDE, Literal, marked_images, randomised, trained_vit

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.functions import replacing
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import Case
from torchserve_explain.attribution.methods import relevance as rules
from torchserve_explain.attribution.methods.deep_lift import DeepLift
from torchserve_explain.attribution.methods.gradient import InputXGradient
from torchserve_explain.attribution.methods.lrp import EPSILON, Attention, Composite, LayerwiseRelevance, RelevanceRules

SIZE, TARGET = (SIDE, SIDE), 3


@pytest.fixture
def exact(monkeypatch):
    """Divisors nearly as they are."""
    monkeypatch.setattr(rules, "STABILIZER", 1e-13)


def images(count=1):
    return NORMALIZATION(torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def explained(model, method, image=None, target=TARGET):
    classifier = Classifier(model, NORMALIZATION, SIZE)
    assert type(method).unsupported(classifier) is None
    image = images()[0] if image is None else image
    score = float(classifier.logits(image[None])[0, target])
    (found,) = Engine(classifier, 4).results([Job(method, Case(classifier, image, target, known_score=score))])
    return found.value, score


def relevance(body, x, output_relevance, attention=True):
    """Return what each value of x gets of the relevance of body(x)."""

    class Net(nn.Module):
        def forward(self, x):
            return body(x)

    x = x.clone().requires_grad_()
    y = replacing(Net(), lambda: rules.sharing(attention))(x)
    torch.testing.assert_close(y, body(x))
    (found,) = torch.autograd.grad(y, x, output_relevance)
    return found


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_matrix_product_of_two_signals_gives_each_half_of_every_contribution(exact):
    """R_a[j, i] = sum_p a[j, i] b[i, p] R[j, p] / (2 z[j, p]), and likewise for b; a + b, the two cut out of one tensor."""
    x, r = random(2, 3 * 4 + 4 * 2), random(2, 3, 2, seed=1)
    found = relevance(lambda x: x[:, :12].view(2, 3, 4) @ x[:, 12:].view(2, 4, 2), x, r)
    expected = torch.zeros_like(x)
    for n in range(2):
        a, b = x[n, :12].view(3, 4), x[n, 12:].view(4, 2)
        for j in range(3):
            for p in range(2):
                z = sum(a[j, i] * b[i, p] for i in range(4))
                for i in range(4):
                    share = a[j, i] * b[i, p] / z * r[n, j, p] / 2
                    expected[n, 4 * j + i] += share
                    expected[n, 12 + 2 * i + p] += share
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(), r.sum())


PRODUCTS = {
    "bmm": lambda a, b: torch.bmm(a, b),
    "method": lambda a, b: a.matmul(b),
    "einsum": lambda a, b: torch.einsum("nji,nip->njp", a, b),
    "einsum of a list": lambda a, b: torch.einsum("nji,nip->njp", [a, b]),
    "the other way round": lambda a, b: (b.mT @ a.mT).mT,
}


@pytest.mark.parametrize("form", PRODUCTS)
@pytest.mark.parametrize("constant", [False, True])
def test_what_form_a_matrix_product_has_does_not_matter(form, constant):
    x, r, weights = random(2, 20), random(2, 3, 2, seed=1), random(2, 4, 2, seed=2)

    def body(product):
        return lambda x: product(x[:, :12].view(2, 3, 4), weights if constant else x[:, 12:].view(2, 4, 2))

    found = relevance(body(PRODUCTS[form]), x, r)
    torch.testing.assert_close(found, relevance(body(torch.matmul), x, r))
    assert float(found.sum()) == pytest.approx(float(r.sum()), rel=1e-4)


def test_a_softmaxs_relevance_is_its_taylor_expansions():
    """R_x[i] = x[i] (R[i] - s[i] sum_j R[j]): a masked place has none, and the constant term keeps the rest."""
    x, r = random(3, 5), random(3, 5, seed=1)
    x[0, 2], r[0, 2] = -torch.inf, 0  # a weight of zero gives nothing to anything
    found = relevance(lambda x: x.softmax(-1), x, r)
    expected = torch.zeros_like(x)
    for n in range(3):
        total = sum(x[n, j].exp() for j in range(5))
        for i in range(5):
            if x[n, i].isfinite():
                expected[n, i] = x[n, i] * (r[n, i] - x[n, i].exp() / total * r[n].sum())
    torch.testing.assert_close(found, expected)
    jacobians = torch.stack([torch.autograd.functional.jacobian(lambda v: v.softmax(-1), row) for row in x])
    slope = (jacobians.mT @ (r / x.softmax(-1)).nan_to_num(0)[..., None])[..., 0]
    torch.testing.assert_close(found, (x * slope).nan_to_num(0))


def test_detached_weights_leave_all_to_the_values(exact):
    x, r = random(1, 3, 4), random(1, 3, 4, seed=1)
    found = relevance(lambda x: (x @ x.mT).softmax(-1) @ x, x, r, attention=False)
    weights = (x @ x.mT).softmax(-1)
    torch.testing.assert_close(found, x * (weights.mT @ (r / (weights @ x))))
    torch.testing.assert_close(found.sum(), r.sum())


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_norms_relevance_is_that_of_a_linear_function(exact, affine, groups):
    """R_x[i] = x[i] sum_j (delta_ij - 1 / n) w[j] / sigma R[j] / y[j], sigma a number."""
    x, r = random(2, 6), random(2, 6, seed=1)
    weight, bias = (random(6, seed=2), random(6, seed=3)) if affine else (torch.ones(6).double(), torch.zeros(6).double())
    given = (weight, bias) if affine else (None, None)
    if groups == 1:
        found = relevance(lambda x: functional.layer_norm(x, (6,), *given), x, r)
    else:
        found = relevance(lambda x: functional.group_norm(x, groups, *given), x, r)
    expected = torch.zeros_like(x)
    n = 6 // groups
    for row in range(2):
        for group in range(groups):
            members = range(group * n, (group + 1) * n)
            mean = sum(x[row, i] for i in members) / n
            sigma = (sum((x[row, i] - mean) ** 2 for i in members) / n + 1e-5) ** 0.5
            for j in members:
                y = (x[row, j] - mean) / sigma * weight[j] + bias[j]
                for i in members:
                    expected[row, i] += x[row, i] * ((i == j) - 1 / n) * weight[j] / sigma * r[row, j] / y
    torch.testing.assert_close(found, expected)
    if not affine:
        torch.testing.assert_close(found.sum(), r.sum())


def test_elementwise_functions_and_divisions_by_a_norm_pass_relevance_on():
    x, r = random(2, 5), random(2, 5, seed=1)
    for body in (
        *(functional.gelu, functional.silu, functional.hardswish, torch.tanh),
        *(lambda x: functional.normalize(x, dim=-1), lambda x: x / x.norm(dim=-1, keepdim=True), lambda x: 3 * x + 1),
        *(lambda x: x * x.sigmoid(), lambda x: x / 2),
    ):
        torch.testing.assert_close(relevance(body, x, r), r)
    halves = relevance(lambda x: x[:, :2] * x[:, 2:4], x, r[:, :2])
    torch.testing.assert_close(halves, torch.cat([r[:, :2], r[:, :2], torch.zeros(2, 1)], 1) / 2)


def test_a_position_keeps_its_share_and_a_difference_is_shared(exact):
    x, r, place = random(2, 5), random(2, 5, seed=1), random(5, seed=2)
    torch.testing.assert_close(relevance(lambda x: x + place, x, r), x / (x + place) * r)
    torch.testing.assert_close(relevance(lambda x: place + x, x, r), x / (x + place) * r)
    torch.testing.assert_close(relevance(lambda x: torch.addcmul(place, x, place + 1), x, r),
                               relevance(lambda x: place + x * (place + 1), x, r))  # fmt: skip
    torch.testing.assert_close(relevance(lambda x: torch.subtract(2 * x, x - 1), x, r), r)
    mean = x.mean(1, keepdim=True)
    shares = r / (x - mean)
    expected = x * shares - (x / x.sum(1, keepdim=True)) * (mean * shares).sum(1, keepdim=True)
    torch.testing.assert_close(relevance(lambda x: x - x.mean(1, keepdim=True), x, r), expected)


@pytest.mark.parametrize("attention", list(Attention))
@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_relevance_is_input_times_the_gradient_of_the_literal_rules(exact, monkeypatch, name, attention):
    """So it is where every layer has the epsilon rule; MaxViT without biases, since its batch norms keep nothing for theirs."""
    monkeypatch.setattr(RelevanceRules, "parts", lambda *_: EPSILON)
    model = randomised(NETWORKS[name], biases=name != "maxvit")
    found, score = explained(model, LayerwiseRelevance(attention=attention))
    x = images().requires_grad_()
    with Literal(attention is Attention.PROPAGATED):
        logits = model(x.clone())
    assert float(logits[0, TARGET]) == pytest.approx(score)
    (gradient,) = torch.autograd.grad(logits[0, TARGET], x)
    expected = (x * gradient)[0].detach()
    torch.testing.assert_close(found.map, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    plain = x * torch.autograd.grad(model(x)[0, TARGET], x)[0]
    assert float((expected - plain[0]).norm()) > 0.1 * float(plain.norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_without_biases_nothing_is_lost(exact, monkeypatch, name):
    """All of the score comes to the pixels, by every rule for convolutions, if the weights of attention are constants.

    But where all inputs of a convolution speak against an output, as in so small a MaxViT's depthwise ones: epsilon there.
    """
    if name == "maxvit":
        monkeypatch.setattr(RelevanceRules, "parts", lambda *_: EPSILON)
    model = randomised(NETWORKS[name], biases=False)
    for composite in Composite:
        found, score = explained(model, LayerwiseRelevance(composite, Attention.DETACHED))
        assert float(found.map.sum()) == pytest.approx(score, rel=1e-6), composite


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_of_a_pass_are_as_if_alone(name):
    classifier = Classifier(randomised(NETWORKS[name]), NORMALIZATION, SIZE)
    cases = [Case(classifier, image, target, known_score=1.0) for target, image in enumerate(images(3))]
    jobs = [Job(LayerwiseRelevance(attention=attention), case) for attention in Attention for case in cases]
    together = [found.value.map for found in Engine(classifier, 16).results(jobs)]
    alone = [Engine(classifier, 1).results([job])[0].value.map for job in jobs]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9 * float(other.abs().max()))


class Attending(nn.Module):
    """One layer of attention over 4 x 4 patches, in a form of one's own."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(2)
        self.patches, self.form = nn.Conv2d(3, 8, 8, 8), form
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(8, CLASSES)
        nn.init.normal_(self.attention.in_proj_bias, 0, 0.1)

    def forward(self, x):
        return self.head(self.form(self, self.patches(x).flatten(2).mT).mean(1))

    def qkv(self, x):
        joined = functional.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias)
        return joined.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)

    def out(self, heads):
        return self.attention.out_proj(heads.transpose(1, 2).flatten(2))


def by_hand(model, x, mask=None):
    q, k, v = model.qkv(x)
    weights = q @ k.mT * 0.5
    return model.out((weights if mask is None else weights + mask).softmax(-1) @ v)


def fused(model, x, *mask, **options):
    return model.out(functional.scaled_dot_product_attention(*model.qkv(x), *mask, **options))


def scaled(model, x):
    q, k, v = model.qkv(x)
    return model.out(functional.scaled_dot_product_attention(q / 3, k, v, scale=1.5))


CAUSAL = torch.full((16, 16), -torch.inf, dtype=torch.float64).triu(1)
FORMS: dict[str, tuple[Callable[..., torch.Tensor], torch.Tensor | None]] = {
    "fused": (fused, None),
    "a module": (lambda m, x: m.attention(x, x, x, need_weights=False)[0], None),
    "a module with weights": (lambda m, x: m.attention(x, x, x)[0], None),
    "causal": (partial(fused, is_causal=True), CAUSAL),
    "masked": (partial(fused, attn_mask=CAUSAL), CAUSAL),
    "a masked module": (lambda m, x: m.attention(x, x, x, need_weights=False, attn_mask=CAUSAL < 0)[0], CAUSAL),
    "mask of truths": (lambda m, x: fused(m, x, CAUSAL == 0), CAUSAL),
    "scaled": (scaled, None),
}


@pytest.mark.parametrize("attention", list(Attention))
@pytest.mark.parametrize("form", FORMS)
def test_what_form_attention_has_does_not_matter(form, attention):
    body, mask = FORMS[form]
    found, expected = (
        explained(Attending(one).double(), LayerwiseRelevance(attention=attention))[0].map
        for one in (body, lambda m, x: by_hand(m, x, mask))
    )
    torch.testing.assert_close(found, expected)
    assert float(found.abs().max()) > 0


def test_heads_may_share_keys_and_a_layer_of_torch_is_reached(exact):
    x, r = random(1, 8, 3, 2), random(1, 4, 3, 2, seed=1)

    def shared(x):
        return functional.scaled_dot_product_attention(x[:, :4], x[:, 4:6], x[:, 6:], enable_gqa=True)

    def repeated(x):
        keys, values = (t.repeat_interleave(2, 1) for t in (x[:, 4:6], x[:, 6:]))
        return (x[:, :4] @ keys.mT / 2**0.5).softmax(-1) @ values

    torch.testing.assert_close(relevance(shared, x, r), relevance(repeated, x, r))
    layer, _ = explained(Attending(lambda m, x: m.layer(x)).double(), LayerwiseRelevance())
    assert float(layer.map.abs().max()) > 0


def test_where_the_image_is_in_the_values_alone_they_take_all(exact):
    x, r, query, key = random(1, 3, 4), random(1, 5, 4, seed=1), random(1, 5, 4, seed=2), random(1, 3, 4, seed=3)
    weights = (query @ key.mT / 2).softmax(-1)
    found = relevance(lambda x: functional.scaled_dot_product_attention(query, key, x), x, r)
    torch.testing.assert_close(found, x * (weights.mT @ (r / (weights @ x))))


def unsupported(form):
    return LayerwiseRelevance.unsupported(Classifier(Attending(form), NORMALIZATION, SIZE))


def test_what_still_has_no_rule_is_refused_by_name():
    assert "more than two signals" in unsupported(lambda m, x: torch.einsum("nlc,nlc,nlc->nlc", x, x, x))
    assert "of more values" in unsupported(lambda m, x: x.mean(1, keepdim=True) / x.sigmoid())
    assert "LogSoftmax" in unsupported(lambda m, x: x.log_softmax(-1))
    assert "Baddbmm" in unsupported(lambda m, x: torch.baddbmm(torch.ones(1), torch.ones(len(x), 16, 16), x))


@pytest.fixture(scope="module")
def trained():
    model = trained_vit(NORMALIZATION)
    drawn, places, classes = marked_images(100, 10_000)
    coloured = classes < NO_COLOUR
    assert bool((model(NORMALIZATION(drawn)).argmax(1) == classes).float().mean() > 0.97)
    return Classifier(model, NORMALIZATION, SIZE), NORMALIZATION(drawn[coloured]), places[coloured], classes[coloured]


def by_patch(trained, method):
    """Return each image's map summed over the channels and values of each of its 16 patches."""
    classifier, inputs, _, classes = trained
    scores = classifier.logits(inputs).gather(1, classes[:, None])[:, 0].tolist()
    drawn = zip(inputs, classes.tolist(), scores, strict=True)
    jobs = [Job(method, Case(classifier, image, target, known_score=score)) for image, target, score in drawn]
    maps = torch.stack([found.value.map.sum(0) for found in Engine(classifier, 32).results(jobs)])
    return maps.unfold(1, 8, 8).unfold(2, 8, 8).sum((3, 4)).flatten(1)


@pytest.mark.parametrize("attention", list(Attention))
def test_the_patch_that_decides_gets_the_relevance(trained, attention):
    """A ViT that names the colour of one patch of 16; input x gradient finds a third of them."""
    places = trained[2]
    found, plain = (by_patch(trained, method) for method in (LayerwiseRelevance(attention=attention), InputXGradient()))
    assert float((found.argmax(1) == places).float().mean()) > 0.97 > 0.6 > float((plain.argmax(1) == places).float().mean())
    shares = found.abs() / found.abs().sum(1, keepdim=True)
    assert float(shares.gather(1, places[:, None]).mean()) > 0.7


def test_the_patch_that_decides_gets_the_contributions(trained):
    found = by_patch(trained, DeepLift())
    assert float((found.argmax(1) == trained[2]).float().mean()) > 0.97
