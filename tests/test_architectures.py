"""Every architecture with every method in one mixed batch: finite, of the right shape, as if alone, the model untouched."""

import pytest
import torch
from conftest import NORMALIZATION
from support import ARCHITECTURES, CLASSES, row, trained_like, written

from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Result
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import METHODS, Case, Smoothing
from torchserve_explain.attribution.methods.cam import GradCam, LayerCam
from torchserve_explain.attribution.methods.gradient import Saliency
from torchserve_explain.attribution.methods.smoothing import SmoothingKind
from torchserve_explain.attribution.methods.xrai import Xrai
from torchserve_explain.attribution.rows import Score

pytestmark = pytest.mark.live
SAMPLES = 6
RECTIFIED = {METHODS[n] for n in ("grad_cam", "hires_cam", "grad_cam_plus_plus", "layer_cam", "score_cam", "guided_grad_cam")}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request):
    """An architecture's name, its network and its classifier."""
    if request.param.startswith("timm/"):
        pytest.importorskip("timm", reason="the optional package timm is not installed")
    architecture = ARCHITECTURES[request.param]
    model = trained_like(architecture)
    return request.param, model, Classifier(model, NORMALIZATION, (architecture.side, architecture.side))


def few(method):
    return method(**({"samples": SAMPLES} if "samples" in method.__dataclass_fields__ else {}))


def images(classifier, count=2):
    shape = (count, *classifier.example.shape[1:])
    return NORMALIZATION(torch.rand(shape, generator=torch.Generator().manual_seed(1)))


def case_of(classifier, image, target, score=Score.LOGIT):
    logits = classifier.logits(image[None])[0]
    known = float((logits if score is Score.LOGIT else logits.softmax(0))[target])
    return Case(classifier, image, target, score, known, seed=target, budget=17)


def mixed_jobs(classifier):
    """Each method on one image or the other, for one target or another; some smoothed, some on the probability."""
    serving = [few(method) for method in METHODS.values() if method.unsupported(classifier) is None]
    first, second = images(classifier)
    jobs = [
        Job(method, case_of(classifier, (first, second)[place % 2], place % CLASSES)) for place, method in enumerate(serving)
    ]
    jobs.append(Job(few(METHODS["gradient_shap"]), case_of(classifier, first, 2, Score.PROBABILITY)))
    jobs.append(Job(Saliency(), case_of(classifier, second, 3), Smoothing(SmoothingKind.SMOOTHGRAD, 3, 0.01)))
    return jobs


def test_every_method_in_a_mixed_batch(served):
    name, model, classifier = served
    before = {key: value.clone() for key, value in model.state_dict().items()}
    probe = images(classifier, 1)
    logits = classifier.logits(probe)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(probe), rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
    jobs = mixed_jobs(classifier)
    outcomes, cams = Engine(classifier, 16).run(jobs), []
    for job, outcome in zip(jobs, outcomes, strict=True):
        told = f"{name} {type(job.method).__name__}"
        assert isinstance(outcome, Result), f"{told}: {outcome}"
        attribution = outcome.value.map
        assert attribution.shape[1:] == classifier.example.shape[2:] and torch.isfinite(attribution).all(), told
        if type(job.method) in RECTIFIED:
            cams.append(attribution)
        else:
            assert float(attribution.abs().max()) > 0, told
        if outcome.evaluations < 100 and not isinstance(job.method, Xrai):  # a rounding may reorder regions
            (alone,) = Engine(classifier, 1).results([job])
            if job.method.adaptive and alone.evaluations != outcome.evaluations:
                continue  # in float32 a rounding may decide whether the path is refined once more
            difference = float((alone.value.map - attribution).norm())
            assert difference <= 0.1 * float(alone.value.map.norm()), f"{told}: differs by {difference}"
        if type(job.method).__name__ in ("DeepLift", "KernelShap"):
            assert outcome.value.completeness_error < 1e-3, told
    assert any(float(cam.max()) > 0 for cam in cams)  # an untrained head may speak against every place, but not to all
    assert torch.equal(classifier.logits(probe), logits)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_last_layer_is_the_right_one_and_middle_layers_have_maps_of_their_own(served):
    name, _, classifier = served
    assert classifier.last_layer == ARCHITECTURES[name].last
    grids = classifier.spatial_layers
    names = list(grids)
    chosen = [names[len(names) // 3], names[2 * len(names) // 3], "last"]
    case = case_of(classifier, images(classifier, 1)[0], 1)
    jobs = [Job(cam(layer), case) for cam in (GradCam, LayerCam) for layer in chosen]
    maps = [found.value.map for found in Engine(classifier, 4).results(jobs)]
    assert all(torch.isfinite(found).all() for found in maps)
    assert not torch.allclose(maps[3], maps[4]) and not torch.allclose(maps[4], maps[5])


def test_a_grid_is_where_the_image_is(served):
    """A spot moved from one corner to another moves the layer's answer with it: rows are not taken for columns."""
    name, _, classifier = served
    blank = torch.zeros_like(classifier.example)
    quarter = classifier.example.shape[-1] // 4
    grids = classifier.spatial_layers
    layer = min(grids, key=lambda layer: abs(grids[layer].height - 8))  # deeper ones see everything
    for corner in ((slice(0, quarter), slice(-quarter, None)), (slice(-quarter, None), slice(0, quarter))):
        spotted = blank.clone()
        spotted[:, :, corner[0], corner[1]] = 3.0
        both = classifier.evaluate(torch.cat([blank, spotted]), [0, 0], [], layers=[layer]).layers[layer].activation
        change = (both[1] - both[0]).square().sum(0)
        half = change.shape[0] // 2
        halves = (slice(0, half), slice(-half, None)) if corner[0].start == 0 else (slice(-half, None), slice(0, half))
        mirrored = change[halves[1], halves[0]].sum()
        assert float(change[halves].sum()) > float(mirrored), f"{name} {layer}"


def test_the_readmes_table_says_what_serves_it(served):
    name, _, classifier = served
    assert row(name, classifier) in written().splitlines(), "run 'make support'"


def test_the_readmes_table_has_no_other_row():
    assert [line.split("`")[1] for line in written().splitlines()[2:]] == list(ARCHITECTURES)
