"""Rows in bfloat16: scores and layers close to float32's, gradients and predictions untouched."""

import logging
from http import HTTPStatus

import pytest
import torch
import yaml
from conftest import NORMALIZATION, ROOT, SIZE, small_cnn
from safetensors.torch import save_file
from torch import nn

from torchserve_explain.archive import load_classifier
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.low_precision import narrowed
from torchserve_explain.attribution.methods import Case
from torchserve_explain.attribution.methods.cam import GradCam, LayerCam
from torchserve_explain.attribution.methods.gradient import Sensitivity
from torchserve_explain.attribution.methods.guided import GuidedGradCam
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.rows import Form, Rows, Score
from torchserve_explain.attribution.trial import Pays
from torchserve_explain.errors import RequestError
from torchserve_explain.runtimes import choose_runtimes
from torchserve_explain.serving.images import read_picture
from torchserve_explain.serving.settings import read_settings


def both(model, normalization=NORMALIZATION, size=SIZE):
    return [Classifier(model, normalization, size, narrow=narrow) for narrow in (None, torch.bfloat16)]


def explained(classifier, method, image, target=2):
    return Engine(classifier, 8).results([Job(method, Case(classifier, image, target))])[0].value.map


def test_scores_without_a_gradient_are_rounded_and_no_more():
    wide, narrow = both(small_cnn().float())
    inputs = NORMALIZATION(torch.rand(6, 3, *SIZE))
    ask = {"targets": [2] * 6, "scores": [Score.LOGIT]}
    exact, rounded = (classifier.evaluate(inputs, **ask).scores for classifier in (wide, narrow))
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0, atol=0.03 * float(exact.abs().max()))


def test_a_last_linear_layer_stays_wide():
    network = narrowed(small_cnn().float(), torch.zeros(1, 3, *SIZE), torch.bfloat16)
    assert network.get_parameter("head.weight").dtype == torch.float32
    assert {network.get_parameter(f"{name}.weight").dtype for name in ("stem", "reduce")} == {torch.bfloat16}
    logits = network(torch.rand(2, 3, *SIZE))
    assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("method", [Sensitivity(), IntegratedGradients(steps=5), IntegratedGradients(max_error=0.2)])
def test_gradients_and_predictions_stay_as_they_are(method):
    wide, narrow = both(small_cnn().float())
    image = NORMALIZATION(torch.rand(3, *SIZE))
    assert torch.equal(wide.logits(image[None]), narrow.logits(image[None]))
    exact, found = (explained(classifier, method, image) for classifier in (wide, narrow))
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", [GradCam(), LayerCam(), GuidedGradCam()])
def test_maps_of_a_real_photo_keep_their_direction(lite0, photo, method):
    settings = read_settings(yaml.safe_load((ROOT / "classifiers/imagenet/model-config.yaml").read_text()))
    image = read_picture(photo, settings.preprocessing, 10**8).input
    if method.unsupported(Classifier(lite0, settings.preprocessing.normalization, settings.preprocessing.size)):
        pytest.skip("the network has no ReLU to guide the gradient through")
    maps = [
        explained(classifier, method, image, 967)
        for classifier in both(lite0, settings.preprocessing.normalization, settings.preprocessing.size)
    ]
    assert maps[1].dtype == torch.float32
    assert float(torch.cosine_similarity(maps[0].flatten(), maps[1].flatten(), 0)) > 0.99


def stage(folder, arithmetic):
    save_file(small_cnn().float().state_dict(), folder / "weights.safetensors")
    (folder / "model.py").write_text((ROOT / "tests" / "conftest.py").read_text().replace("class Linear", "class _Linear"))
    sections = {"classifier": {"architecture": "model.py"}, "preprocessing": {"resize": 16, "crop": 16}}
    return read_settings(sections | {"explanations": {"arithmetic": arithmetic}})


def test_a_map_in_bfloat16_does_not_depend_on_its_neighbours():
    _, narrow = both(small_cnn().float())
    first, second = NORMALIZATION(torch.rand(2, 3, *SIZE))
    jobs = [Job(GradCam(), Case(narrow, first, 1)), Job(Sensitivity(), Case(narrow, second, 2))]
    together = Engine(narrow, 8).results(jobs)
    assert torch.equal(together[0].value.map, Engine(narrow, 8).results(jobs[:1])[0].value.map)


class Widening(nn.Module):
    """Computes in float32 whatever it is given."""

    def __init__(self):
        super().__init__()
        self.inner = small_cnn().float()

    def forward(self, x):
        return self.inner(x.float())


def test_a_model_that_does_not_run_in_bfloat16_is_served_in_float32(caplog):
    with caplog.at_level(logging.WARNING):
        wide, narrow = both(Widening())
    assert narrow.narrow is None and "does not run in torch.bfloat16" in caplog.text
    inputs = NORMALIZATION(torch.rand(1, 3, *SIZE))
    found = [c.evaluate(inputs, [0], [Score.LOGIT]).scores for c in (wide, narrow)]
    assert torch.equal(*found)


def test_an_archive_chooses_its_arithmetic(tmp_path, monkeypatch, caplog):
    settings = stage(tmp_path, "bfloat16")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert load_classifier(tmp_path, settings, "cpu", SIZE).narrow is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # oneDNN would emulate it
    with caplog.at_level(logging.WARNING):
        assert load_classifier(tmp_path, settings, "cpu", SIZE).narrow is None
    assert "no bfloat16" in caplog.text


def test_another_arithmetic_is_refused():
    with pytest.raises(ValueError, match=r"explanations\.arithmetic: Input should be 'float32', 'bfloat16' or 'auto'"):
        read_settings({"classifier": {"architecture": "resnet18"}, "explanations": {"arithmetic": "int8"}})


# Of many rows, of a row whose score is one beside those of many, and of a row for its layer's sake.
@pytest.mark.parametrize(
    ("faster", "used"),
    [((True, True), "many beside alone"), ((False, True), "many beside"), ((True, False), "alone"), ((False, False), "")],
)
def test_auto_takes_narrow_arithmetic_where_it_is_faster(monkeypatch, faster, used):
    classifier = Classifier(small_cnn().float(), NORMALIZATION, SIZE, narrow=torch.bfloat16)
    verdicts = iter(faster)
    monkeypatch.setattr("torchserve_explain.attribution.trial._pays", lambda *_: next(verdicts))
    assert classifier.weigh_narrow(NORMALIZATION(torch.rand(3, *SIZE)), 16, 600) == Pays(*faster)
    asked = {"many": (4, ()), "beside": (1, ()), "alone": (1, ("reduce",))}
    rows = {
        name: Rows(count, lambda *_: torch.empty(0), lambda *_: None, gradient=False, layers=layers)
        for name, (count, layers) in asked.items()
    }
    assert " ".join(name for name, wanted in rows.items() if classifier.form(wanted) is Form.NARROW) == used
    assert classifier.narrow is (torch.bfloat16 if used else None)


def test_auto_stays_wide_where_the_maps_are_others(caplog):
    classifier = Classifier(small_cnn().float(), NORMALIZATION, SIZE, narrow=torch.bfloat16)
    picture, narrow = NORMALIZATION(torch.rand(3, *SIZE)), classifier._narrow
    assert classifier.weigh_narrow(picture, 16, 600, Pays(True, True)) == Pays(True, True)
    assert narrow is not None
    narrow.register_forward_hook(lambda _module, _inputs, logits: logits + torch.rand_like(logits))
    assert classifier.weigh_narrow(picture, 16, 600, Pays(True, True)) is None
    assert classifier.narrow is None and "its maps differ" in caplog.text


def test_what_auto_measured_is_remembered_beside_what_it_was_measured_with(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known: list[Pays | None] = []

    def noted(*arguments):
        known.append(arguments[4])
        return Pays(True, False)

    monkeypatch.setattr(Classifier, "weigh_narrow", noted)
    classifier, settings = Classifier(small_cnn().float(), NORMALIZATION, SIZE, narrow=torch.bfloat16), stage(tmp_path, "auto")
    torch_alone = settings.explanations.model_copy(update={"runtime": "torch"})
    settings = settings.model_copy(update={"explanations": torch_alone})
    for pays in (classifier.pays, classifier.pays, Pays(True, False)):  # of compiled passes, beside which it was measured
        classifier.pays = pays
        choose_runtimes(classifier, settings, "one")
    assert known == [None, Pays(True, False), None]
    choose_runtimes(classifier, stage(tmp_path, "bfloat16"), "one")
    assert len(known) == 3 and classifier.narrow is torch.bfloat16


def test_auto_stays_wide_where_nothing_is_measured(tmp_path, monkeypatch):
    """The model refuses what the trial asks for, or the archive's own preprocessing the photo."""
    picture = NORMALIZATION(torch.rand(3, *SIZE))

    def narrow():
        return Classifier(small_cnn().float(), NORMALIZATION, SIZE, narrow=torch.bfloat16)

    def refused(*_):
        raise RequestError(HTTPStatus.BAD_REQUEST, "no")

    classifier = narrow()
    monkeypatch.setattr(classifier, "_narrow", lambda _rows: 1 / 0)
    assert classifier.weigh_narrow(picture, 16, 600) is None and classifier.arithmetic == "float32"
    assert narrow().weigh_narrow(picture, 16, 600, Pays(False, False)) == Pays(False, False)
    monkeypatch.setattr("torchserve_explain.runtimes.read_picture", refused)
    classifier = narrow()
    choose_runtimes(classifier, stage(tmp_path, "auto"), "photo")
    assert classifier.arithmetic == "float32"
    classifier = narrow()
    choose_runtimes(classifier, stage(tmp_path, "bfloat16"), "photo")
    assert classifier.arithmetic == "bfloat16"


def test_auto_is_bfloat16_only_where_the_processor_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr("torchserve_explain.archive.has_bfloat16", lambda _device: False)
    assert load_classifier(tmp_path, stage(tmp_path, "auto"), "cpu", SIZE).narrow is None
    monkeypatch.setattr("torchserve_explain.archive.has_bfloat16", lambda _device: True)
    assert load_classifier(tmp_path, stage(tmp_path, "auto"), "cpu", SIZE).narrow is torch.bfloat16
