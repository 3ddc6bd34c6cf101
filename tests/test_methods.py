"""Every method by closed form, naive replica and axiom; a new method is tested as soon as it is listed."""

import pkgutil
from dataclasses import fields
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from conftest import NORMALIZATION, SIZE, watched_passes
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from torch import nn
from torchvision.models import VisionTransformer
from transformers import randomised

from torchserve_explain.attribution import methods
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Piece, both
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import METHODS, Case, Method, Smoothing
from torchserve_explain.attribution.methods.baselines import Baseline
from torchserve_explain.attribution.methods.biased_layer import BiasedLayer, BiasedLayers, Reduction
from torchserve_explain.attribution.methods.bisection import HALVED, PathRule, _Interval, _middles, _Node
from torchserve_explain.attribution.methods.cam import EigenCam, GradCam, GradCamPlusPlus, HiResCam, LayerCam, ScoreCam
from torchserve_explain.attribution.methods.expected_gradients import GradientShap
from torchserve_explain.attribution.methods.gradient import Sensitivity
from torchserve_explain.attribution.methods.guided import GuidedBackprop, GuidedGradCam
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.methods.perturbation import Occlusion, Rise, random_mask
from torchserve_explain.attribution.methods.smoothing import Moments, SmoothingKind
from torchserve_explain.attribution.rows import Score

METHOD_CASES = [pytest.param(method(), id=name) for name, method in METHODS.items()]
GRADIENT_METHODS = [Sensitivity(), BiasedLayer(), IntegratedGradients(), IntegratedGradients(steps=4), GradientShap(samples=4)]

WITHOUT_REFERENCES = [baseline for baseline in Baseline if baseline is not Baseline.REFERENCES]


def test_every_method_that_has_a_name_is_listed():
    modules = {
        module.name: import_module(f"{methods.__name__}.{module.name}") for module in pkgutil.iter_modules(methods.__path__)
    }
    classes = {one for module in modules.values() for one in vars(module).values() if isinstance(one, type)}
    named = {one for one in classes if issubclass(one, Method) and "name" in vars(one)}
    assert named == set(METHODS.values()) and len(named) == len(METHODS)


def test_both_computations_share_passes_and_return_their_results(classifier, image):
    case, sizes = case_of(classifier, image), watched_passes(classifier)
    images = lambda _: image  # noqa: E731
    (result,) = Engine(classifier, 8).results([Piece(both(case.scores(2, images), case.scores(3, images)))])
    assert sizes == [5] and list(map(len, result.value)) == [2, 3] and result.evaluations == 5


def case_of(classifier, image, target=1, score=Score.LOGIT, **options):
    logits = classifier.logits(image[None])[0]
    known = float((logits if score is Score.LOGIT else logits.softmax(0))[target])
    return Case(classifier, image, target, score, known, **options)


def case_for(method, classifier, image, target=1):
    """The case of the image with the classifier, or with a small ViT where the method asks for attention."""
    if method.unsupported(classifier) is not None:
        classifier = Classifier(randomised(lambda: VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=5)), NORMALIZATION, SIZE)
    return case_of(classifier, image, target)


def explain(job, pack=16):
    (outcome,) = Engine(job.case.classifier, pack).run([job])
    return outcome


@pytest.mark.parametrize("method", [IntegratedGradients(steps=1), IntegratedGradients(), GradientShap(samples=3)])
def test_a_path_on_a_linear_model_is_weight_times_difference(linear, linear_classifier, image, method):
    explained = explain(Job(method, case_of(linear_classifier, image)))
    difference = image - NORMALIZATION(torch.zeros_like(image))
    torch.testing.assert_close(explained.value.map, linear.weight(1) * difference)
    assert explained.value.completeness_error < 1e-9


def test_sensitivity_of_a_linear_model_is_its_squared_weight(linear, linear_classifier, image):
    explained = explain(Job(Sensitivity(), case_of(linear_classifier, image)))
    torch.testing.assert_close(explained.value.map[0], linear.weight(1).square().sum(0))


@pytest.mark.parametrize("baseline", WITHOUT_REFERENCES)
@pytest.mark.parametrize("score", list(Score))
def test_integrated_gradients_is_complete_for_every_baseline(classifier, image, baseline, score):
    case = case_of(classifier, image, score=score)
    attribution = explain(Job(IntegratedGradients(baseline=baseline, max_error=1e-3), case)).value
    start = classifier.logits(baseline.image(case)[None])[0]
    expected = case.known_score - float((start if score is Score.LOGIT else start.softmax(0))[1])
    assert float(attribution.map.sum()) == pytest.approx(expected, rel=1e-3)
    assert attribution.completeness_error <= 1e-3
    assert case.known_score - attribution.baseline_score == pytest.approx(expected)


def test_the_error_told_is_that_of_the_map(classifier, image):
    case = case_of(classifier, image)
    attribution = explain(Job(IntegratedGradients(steps=2), case)).value
    difference = case.known_score - attribution.baseline_score
    assert attribution.completeness_error == pytest.approx(abs(float(attribution.map.sum()) - difference) / abs(difference))


def test_a_smaller_max_error_refines_the_path(classifier, image):
    coarse, fine = (explain(Job(IntegratedGradients(max_error=e), case_of(classifier, image))) for e in (0.5, 1e-4))
    assert coarse.evaluations < fine.evaluations
    exact = explain(Job(IntegratedGradients(steps=2000), case_of(classifier, image))).value.map
    assert float((fine.value.map - exact).norm()) < 0.3 * float((coarse.value.map - exact).norm())


def test_a_refinements_rounds_are_what_smaller_budgets_end_with(classifier, image):
    whole = explain(Job(IntegratedGradients(max_error=1e-12), case_of(classifier, image, budget=30))).value
    assert [rows for rows, _ in whole.refinement] == [9, 17, 25, 30]
    for rows, error in whole.refinement:
        shorter = explain(Job(IntegratedGradients(max_error=1e-12), case_of(classifier, image, budget=rows))).value
        assert shorter.completeness_error == pytest.approx(error)
    assert explain(Job(IntegratedGradients(steps=3), case_of(classifier, image))).value.refinement == ()


def test_the_path_ends_with_the_budget_and_tells_the_larger_error(classifier, image):
    explained = explain(Job(IntegratedGradients(max_error=1e-12), case_of(classifier, image, budget=21)))
    assert explained.evaluations == 21
    assert explained.value.completeness_error > 1e-12


def naive_map(classifier, case, at):
    """Return the trapezoid rule's map, summed over channels, and the gradients, with nodes at fractions of the path."""
    base, gradients = Baseline.BLACK.image(case), []
    for t in at:
        x = (base + t * (case.input - base)).requires_grad_()
        gradients.append(torch.autograd.grad(classifier._model(x[None])[0, 1], x)[0] * (case.input - base))
    pieces = [(b - a) / 2 * (g + h) for a, b, g, h in zip(at, at[1:], gradients, gradients[1:], strict=False)]
    return sum(pieces).sum(0), gradients


def test_the_map_error_is_the_change_without_every_second_node_over_the_root_of_three(classifier, image):
    case = case_of(classifier, image, budget=9)
    found = explain(Job(IntegratedGradients(max_error=1e-12), case)).value
    fine, coarse = (naive_map(classifier, case, [i / n for i in range(n + 1)])[0] for n in (8, 4))
    assert found.map_error == pytest.approx(float((fine - coarse).norm() / fine.norm()) / 3**0.5)


def test_the_map_error_decides_where_rows_are_spent(classifier, image):
    """A naive replica of the second round: the largest width times change first, of which each half keeps 8^-1/2."""
    case, at = case_of(classifier, image, budget=17), [i / 8 for i in range(9)]
    _, gradients = naive_map(classifier, case, at)
    errors = {
        ends: float((h - g).sum(0).norm()) / 8 for ends, g, h in zip(pairwise(at), gradients, gradients[1:], strict=False)
    }
    for _ in range(8):
        start, stop = max(errors, key=errors.__getitem__)
        error, middle = errors.pop((start, stop)) / 8**0.5, (start + stop) / 2
        errors |= {(start, middle): error, (middle, stop): error}
    expected, _ = naive_map(classifier, case, sorted({0.0, *(stop for _, stop in errors)}))
    found = explain(Job(IntegratedGradients(max_error=1, max_map_error=1e-9), case)).value
    torch.testing.assert_close(found.map.sum(0), expected)


def test_a_smaller_max_map_error_refines_the_path_until_it_holds(classifier, image):
    exact = explain(Job(IntegratedGradients(steps=2000), case_of(classifier, image))).value
    assert exact.map_error is None
    rows = []
    for bound in (0.1, 0.01):
        explained = explain(Job(IntegratedGradients(max_error=0.5, max_map_error=bound), case_of(classifier, image)))
        error = float((explained.value.map - exact.map).sum(0).norm() / exact.map.sum(0).norm())
        assert error <= bound and error / 4 < explained.value.map_error <= bound
        rows.append(explained.evaluations)
    assert rows[0] < rows[1]


def test_both_errors_hold_where_both_are_given(classifier, image):
    method = IntegratedGradients(max_error=1e-4, max_map_error=0.02)
    found = explain(Job(method, case_of(classifier, image))).value
    assert found.completeness_error <= 1e-4 and found.map_error <= 0.02
    alone = explain(Job(IntegratedGradients(max_map_error=0.02), case_of(classifier, image))).value
    assert alone.completeness_error > 1e-4
    idgi = IntegratedGradients(rule=PathRule.IDGI, max_map_error=1e-6)
    explained = explain(Job(idgi, case_of(classifier, image)))
    assert explained.value.map_error is None and explained.evaluations < 50


@pytest.mark.parametrize("baseline", [Baseline.WHITE, Baseline.BLUR])
def test_an_image_that_is_its_baseline_costs_one_round_and_has_no_error(lite0, baseline):
    classifier = Classifier(lite0, NORMALIZATION, (64, 64))
    image = NORMALIZATION(torch.ones(3, 64, 64))
    explained = explain(Job(IntegratedGradients(baseline=baseline), case_of(classifier, image)))
    assert explained.evaluations == 9 and explained.value.completeness_error < 0.05
    assert float(explained.value.map.abs().max()) < 1e-4 and explained.value.map_error < 0.05


def test_bisected_path_is_a_trapezoid_rule_on_its_nodes(classifier, image):
    """A naive replica with all its nodes: nine evenly spaced, when no round of bisection follows."""
    case = case_of(classifier, image, budget=9)
    base = Baseline.BLACK.image(case)
    total = torch.zeros_like(image)
    for i in range(9):
        x = (base + i / 8 * (image - base)).requires_grad_()
        (gradient,) = torch.autograd.grad(classifier._model(x[None])[0, 1], x)
        total += gradient * (0.5 if i in (0, 8) else 1.0) / 8
    found = explain(Job(IntegratedGradients(max_error=1e-12), case)).value.map
    torch.testing.assert_close(found, total * (image - base))


def test_baselines_are_images_before_normalisation(classifier, image):
    case = case_of(classifier, image)
    pixels = {kind: NORMALIZATION.inverse(kind.image(case)) for kind in WITHOUT_REFERENCES}
    assert torch.allclose(pixels[Baseline.BLACK], torch.zeros_like(image))
    assert torch.allclose(pixels[Baseline.WHITE], torch.ones_like(image))
    assert torch.allclose(pixels[Baseline.MEAN][:, 0, 0], torch.tensor(NORMALIZATION.mean, dtype=torch.float64))
    assert pixels[Baseline.BLUR].std() < 0.5 * NORMALIZATION.inverse(image).std()
    assert pixels[Baseline.NOISE].min() >= 0 and pixels[Baseline.NOISE].max() <= 1
    assert pixels[Baseline.NOISE].std() == pytest.approx(12**-0.5, rel=0.1)  # uniform


def test_gradient_shap_reaches_completeness_in_expectation(classifier, image):
    case = case_of(classifier, image)
    explained = explain(Job(GradientShap(samples=2000, baseline=Baseline.NOISE), case))
    assert explained.value.completeness_error < 0.05
    assert explained.evaluations == 4000  # each sample's baseline is scored too


def test_grad_cam_of_a_known_head(image):
    """Mean-pooled features and a linear head: the map is ReLU(sum of w_k / (h w) A_k), enlarged."""
    torch.manual_seed(0)
    convolution, head = nn.Conv2d(3, 6, 3, stride=4), nn.Linear(6, 2)
    model = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    classifier = Classifier(model, NORMALIZATION, SIZE)
    features = convolution(image[None]).detach()
    expected = (head.weight[1].detach()[:, None, None] * features[0]).sum(0).relu() / features[0, 0].numel()
    expected = nn.functional.interpolate(expected[None, None], SIZE, mode="bilinear")[0]
    torch.testing.assert_close(explain(Job(GradCam(), case_of(classifier, image))).value.map, expected)


def naive_layer(model, image, target):
    """Return the activations and gradients [channels, h, w] at the small network's `reduce`, by hand."""
    x = model.relu(model.norm(model.stem(image[None])))
    x = model.relu(x + model.norm2(model.depthwise(x)))
    activation = model.reduce(x).detach().requires_grad_()
    model.head(torch.flatten(model.pool(activation.relu()), 1))[0, target].backward()
    return activation[0].detach(), activation.grad[0]


def test_grad_cam_plus_plus_is_its_naive_replica(model, classifier, image):
    activation, gradient = naive_layer(model, image, 1)
    cam = torch.zeros_like(activation[0])
    for a, g in zip(activation, gradient, strict=True):
        weight = 0.0
        for i, j in torch.cartesian_prod(torch.arange(a.shape[0]), torch.arange(a.shape[1])).tolist():
            if g[i, j] != 0:
                alpha = g[i, j] ** 2 / (2 * g[i, j] ** 2 + a.sum() * g[i, j] ** 3)
                weight += alpha * max(float(g[i, j]), 0.0)
        cam += weight * a
    expected = nn.functional.interpolate(cam.relu()[None, None], SIZE, mode="bilinear")[0]
    found = explain(Job(GradCamPlusPlus("reduce"), case_of(classifier, image))).value.map
    torch.testing.assert_close(found, expected)


def test_layer_cam_is_its_naive_replica(model, classifier, image):
    activation, gradient = naive_layer(model, image, 1)
    cam = sum(g.clamp(min=0) * a for a, g in zip(activation, gradient, strict=True)).clamp(min=0)
    expected = nn.functional.interpolate(cam[None, None], SIZE, mode="bilinear")[0]
    found = explain(Job(LayerCam("reduce"), case_of(classifier, image))).value.map
    torch.testing.assert_close(found, expected)


def test_hires_cam_is_its_naive_replica(model, classifier, image):
    activation, gradient = naive_layer(model, image, 1)
    cam = sum(g * a for a, g in zip(activation, gradient, strict=True)).clamp(min=0)
    expected = nn.functional.interpolate(cam[None, None], SIZE, mode="bilinear")[0]
    found = explain(Job(HiResCam("reduce"), case_of(classifier, image))).value.map
    torch.testing.assert_close(found, expected)


def test_eigen_cam_is_the_projection_of_pytorch_grad_cam(model, classifier, image):
    activation, _ = naive_layer(model, image, 1)
    projection = torch.from_numpy(get_2d_projection(activation[None].numpy())[0]).double()
    if projection.max() < -projection.min():
        projection = -projection
    expected = nn.functional.interpolate(projection.relu()[None, None], SIZE, mode="bilinear")[0]
    found = explain(Job(EigenCam("reduce"), case_of(classifier, image))).value.map
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def naive_idgi(classifier, case, at):
    """The squared gradient at each node but the last, scaled so that it sums to the rise of the score after it."""
    base, total = Baseline.BLACK.image(case), torch.zeros_like(case.input)
    for start, stop in pairwise(at):
        x, after = ((base + t * (case.input - base)).requires_grad_() for t in (start, stop))
        score, rise = (classifier._model(one[None])[0, 1] for one in (x, after))
        (gradient,) = torch.autograd.grad(score, x)
        total += gradient**2 / (gradient**2).sum() * float(rise - score)
    return total


@pytest.mark.parametrize(("options", "intervals"), [({"steps": 5}, 5), ({"max_error": 1e-12}, 8)])
def test_idgi_is_its_naive_replica_and_complete_whatever_the_steps(classifier, image, options, intervals):
    case = case_of(classifier, image, budget=9)
    explained = explain(Job(IntegratedGradients(rule=PathRule.IDGI, **options), case), pack=3)
    torch.testing.assert_close(explained.value.map, naive_idgi(classifier, case, [i / intervals for i in range(intervals + 1)]))
    assert explained.value.completeness_error < 1e-9 and explained.evaluations == intervals + 1


def test_idgi_of_a_linear_model_shares_by_squared_weights(linear, linear_classifier, image):
    case = case_of(linear_classifier, image)
    found = explain(Job(IntegratedGradients(rule=PathRule.IDGI), case)).value
    squares = linear.weight(1).square()
    torch.testing.assert_close(found.map, squares / squares.sum() * (case.known_score - found.baseline_score))


def test_guided_relu6_passes_back_only_what_is_positive_and_not_cut():
    class Net(nn.Module):
        def forward(self, x):
            x = x.flatten(1)[:, :4]
            return nn.functional.relu6(x) @ torch.tensor([[2.0, 1], [-3, 1], [5, 1], [7, 1]], dtype=x.dtype)

    classifier = Classifier(Net(), NORMALIZATION, SIZE)
    image = torch.zeros(3, *SIZE)
    image[0, 0, :4] = torch.tensor([1.0, 2.0, -1.0, 9.0])  # passed, weight negative, below 0, above 6
    found = explain(Job(GuidedBackprop(), Case(classifier, image, 0, known_score=0.0))).value.map
    assert found[0, 0, :4].tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize("samples", [50, 5])
def test_score_cam_is_its_naive_replica(model, classifier, image, samples):
    activation, _ = naive_layer(model, image, 1)
    chosen = activation.flatten(1).var(1).argsort(descending=True)[:samples].sort().values
    scores = []
    for channel in chosen.tolist():
        mask = nn.functional.interpolate(activation[None, channel : channel + 1], SIZE, mode="bilinear")
        mask = (mask - mask.min()) / (mask.max() - mask.min())
        scores.append(model(image[None] * mask)[0, 1].detach())
    cam = torch.tensordot(torch.stack(scores).softmax(0), activation[chosen], 1)
    expected = nn.functional.interpolate(cam.relu()[None, None], SIZE, mode="bilinear")[0]
    explained = explain(Job(ScoreCam("reduce", samples), case_of(classifier, image)))
    torch.testing.assert_close(explained.value.map, expected)
    assert explained.evaluations == 1 + min(samples, 12)


def test_rise_is_its_naive_replica(classifier, image):
    case = case_of(classifier, image, seed=3)
    hidden = Baseline.BLACK.image(case)
    masks = torch.stack([random_mask(case, number) for number in range(40)])
    scores = classifier.logits(hidden + masks * (image - hidden))[:, 1]
    expected = (masks * scores[:, None, None, None]).sum(0) / masks.sum(0) - scores.mean()
    torch.testing.assert_close(explain(Job(Rise(samples=40), case)).value.map, expected)


def test_random_masks_show_half_and_are_smooth(classifier, image):
    case = case_of(classifier, image)
    masks = torch.stack([random_mask(case, number) for number in range(300)])
    assert masks.shape == (300, 1, *SIZE) and float(masks.min()) >= 0 and float(masks.max()) <= 1
    assert masks.mean((0, 1)).sub(0.5).abs().max() < 0.1
    assert float(masks.diff(dim=3).abs().max()) < 0.5  # no cell ends in a step


def test_rise_finds_the_only_pixels_that_count(image):
    class Corner(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, :, :4, :4].mean((1, 2, 3)), x[:, 0, 0, 0]], 1)

    classifier = Classifier(Corner(), NORMALIZATION, SIZE)
    image = NORMALIZATION(torch.ones(3, *SIZE))
    found = explain(Job(Rise(samples=2000), Case(classifier, image, 0))).value.map[0]
    assert found[1, 1] > 4 * found[8:, 8:].abs().max()


def test_a_model_without_relus_or_grids_says_what_cannot_serve_it():
    gelu = Classifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(784, 2)), NORMALIZATION, SIZE)
    assert all("no ReLU" in (method.unsupported(gelu) or "") for method in (GuidedBackprop, GuidedGradCam))
    flat = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(768, 9), nn.ReLU(), nn.Linear(9, 2)), NORMALIZATION, SIZE)
    assert GuidedBackprop.unsupported(flat) is None
    assert all("spatial" in (method.unsupported(flat) or "") for method in (GradCam, LayerCam, GuidedGradCam))


def test_occlusion_of_a_linear_model_is_what_was_hidden(linear, linear_classifier, image):
    found = explain(Job(Occlusion(Baseline.MEAN), case_of(linear_classifier, image))).value.map[0]
    lost = (linear.weight(1) * image).sum(0)  # by pixel; the mean image is zero after normalisation
    corner = lost[:2, :2].sum()  # the only window that covers the corner's pixel
    torch.testing.assert_close(found[0, 0], corner)


class NaiveBiased(torch.autograd.Function):
    """z in front, zb's gradient times z / zb (bounded to [-1, 1]) on the way back."""

    @staticmethod
    def forward(ctx, z, zb):
        ctx.save_for_backward((z / zb).clamp(-1, 1))
        return z.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient * ctx.saved_tensors[0]


def naive_biased_logits(model, x, gamma):
    """The small network written out, each layer's twin computed by itself."""

    def layer(module, x):
        bias = None if module.bias is None else module.bias + gamma * module.bias.clamp(min=0)
        weight = module.weight + gamma * module.weight.clamp(min=0)
        if isinstance(module, nn.Linear):
            return NaiveBiased.apply(module(x), nn.functional.linear(x, weight, bias))
        options = (module.stride, module.padding, module.dilation, module.groups)
        return NaiveBiased.apply(module(x), nn.functional.conv2d(x, weight, bias, *options))

    x = layer(model.stem, x).relu()
    x = (x + layer(model.depthwise, x)).relu()
    return layer(model.head, model.pool(layer(model.reduce, x).relu()).flatten(1))


@pytest.mark.parametrize("gamma", [0.0, 0.25, 3.0])
@pytest.mark.parametrize("reduction", list(Reduction))
def test_biased_layer_is_its_naive_replica(classifier, image, gamma, reduction):
    x = image[None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(naive_biased_logits(classifier._model, x, gamma)[0, 1], x)
    expected = image * gradient[0] if reduction is Reduction.RELEVANCE else gradient[0].square().sum(0, keepdim=True)
    found = explain(Job(BiasedLayer(gamma, reduction), case_of(classifier, image))).value.map
    torch.testing.assert_close(found, expected)


def test_biased_layer_is_the_published_rule_where_nothing_is_negative():
    """Between ReLUs the ratio lies in (0, 1], so z = zb * stop(z / zb) holds as it is written."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 2)
    ).double()
    classifier = Classifier(model, NORMALIZATION, SIZE)
    image = torch.rand(3, *SIZE, dtype=torch.float64)

    def published(module, x):
        z = module(x)
        twin = [p + 0.25 * p.clamp(min=0) for p in (module.weight, module.bias)]
        zb = nn.functional.linear(x, *twin) if isinstance(module, nn.Linear) else nn.functional.conv2d(x, *twin)
        return zb * (z / zb).detach()

    target = int(classifier.logits(image[None]).argmax())
    assert classifier.logits(image[None])[0, target] > 0  # else the last ratio would be bounded
    x = image[None].clone().requires_grad_()
    hidden = published(model[2], published(model[0], x).relu()).relu().flatten(1)
    (gradient,) = torch.autograd.grad(published(model[5], hidden)[0, target], x)
    found = explain(Job(BiasedLayer(), case_of(classifier, image, target))).value.map
    torch.testing.assert_close(found, gradient[0].square().sum(0, keepdim=True))


def test_biased_layer_without_gamma_is_sensitivity(classifier, image):
    biased, plain = (explain(Job(m, case_of(classifier, image))).value.map for m in (BiasedLayer(0.0), Sensitivity()))
    torch.testing.assert_close(biased, plain)


def test_biased_layer_keeps_the_logits(lite0):
    classifier = Classifier(lite0, NORMALIZATION, (224, 224))
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    biased = classifier._changed(BiasedLayers(0.25))(x)
    torch.testing.assert_close(biased, classifier.logits(x), atol=1e-5, rtol=1e-5)


def test_biased_layer_survives_a_dead_input(classifier):
    dead = torch.zeros(3, *SIZE, dtype=torch.float64)
    for method in (BiasedLayer(), BiasedLayer(reduction=Reduction.RELEVANCE)):
        assert torch.isfinite(explain(Job(method, case_of(classifier, dead))).value.map).all()


@pytest.mark.parametrize("kind", list(SmoothingKind))
@pytest.mark.parametrize("method", GRADIENT_METHODS, ids=lambda m: type(m).__name__)
def test_smoothing_is_the_moment_of_the_copies_maps(classifier, image, kind, method):
    case = case_of(classifier, image, seed=9)
    copies = torch.stack([explain(Job(method, case.noisy(k, 0.2))).value.map for k in range(6)])
    expected = {
        SmoothingKind.SMOOTHGRAD: copies.mean(0),
        SmoothingKind.SMOOTHGRAD_SQ: copies.square().mean(0),
        SmoothingKind.VARGRAD: copies.var(0, correction=0),
    }
    found = explain(Job(method, case, Smoothing(kind, 6, 0.2)))
    torch.testing.assert_close(found.value.map, expected[kind])
    assert found.value.completeness_error is None


def test_noise_has_the_deviation_asked_for_and_no_copy_repeats(classifier, image):
    case = case_of(classifier, image)
    noise = torch.stack([case.noise(k, 0.1) for k in range(50)])
    assert float(noise.std()) == pytest.approx(0.1 * float(image.max() - image.min()), rel=0.02)
    assert len({float(n[0, 0, 0]) for n in noise}) == 50
    assert not torch.equal(case.noisy(0, 0.1).noise(0, 0.1), case.noise(0, 0.1))


def test_moments_of_one_map_are_the_map_and_no_variance():
    moments = Moments()
    moments.add(torch.tensor([3.0]))
    assert moments.reduced(SmoothingKind.SMOOTHGRAD) == 3 and moments.reduced(SmoothingKind.VARGRAD) == 0


@pytest.mark.parametrize("method", METHOD_CASES)
def test_a_map_has_the_inputs_size_and_the_cost_told(classifier, image, method):
    job = Job(method, case_for(method, classifier, image))
    explained = explain(job)
    assert explained.value.map.shape[1:] == SIZE
    assert float(explained.value.map.abs().max()) > 0
    at_least = explained.evaluations >= job.evaluations
    assert at_least if method.adaptive else explained.evaluations == job.evaluations


@pytest.mark.parametrize("method", METHOD_CASES)
def test_an_unsigned_method_is_never_negative(classifier, image, method):
    job = Job(method, case_for(method, classifier, image))
    smallest = float(explain(job).value.map.sum(0).min())
    assert smallest >= 0 if not job.signed else smallest < 0


@pytest.mark.parametrize("method", METHOD_CASES)
def test_targets_have_maps_of_their_own(classifier, image, method):
    first, second = (explain(Job(method, case_for(method, classifier, image, target))).value.map for target in (0, 4))
    assert torch.allclose(first, second) != method.asks_for_class


@pytest.mark.parametrize("method", METHOD_CASES)
def test_a_method_says_what_it_does_and_all_its_parameters_have_defaults(method):
    told = type(method).__doc__ or ""
    assert "arXiv:" in told or "doi:" in told or "See BiasedLayers for the equation" in told
    assert all(hasattr(method, field.name) for field in fields(method))


def test_an_interval_that_errs_far_more_than_others_is_cut_several_times_in_a_round():
    first, middle, last = (_Node(0, t, 0.0, 0.0, torch.zeros(1)) for t in (0.0, 0.5, 1.0))
    intervals, errors = [_Interval(first, middle), _Interval(middle, last)], {0.0: 10.0, 0.5: 1.0}
    found = [_middles(intervals, lambda one: errors[one.left.t], halved, 4) for halved in (HALVED, 0.0)]
    assert [t for _, t in found[0]] == [0.25, 0.125, 0.375, 0.0625]
    assert [t for _, t in found[1]][:2] == [0.25, 0.75]
