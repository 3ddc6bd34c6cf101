"""What a network's outputs mean: found or refused when it is archived, and kept in every answer."""

import json
from typing import Any

import pytest
import torch
from conftest import NORMALIZATION, SIZE, WITHOUT_ATTENTION, small_cnn
from live import SMALL_MODEL, picture
from torch import nn

from torchserve_explain.archive import Archive
from torchserve_explain.archiver import build_archive, parser
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.computation import Piece
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.heads import Head
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import METHODS, Case
from torchserve_explain.attribution.methods.gradient import InputXGradient
from torchserve_explain.attribution.methods.path import IntegratedGradients
from torchserve_explain.attribution.quality import Deletion, Infidelity, Measurement
from torchserve_explain.attribution.rows import Contrast, Score
from torchserve_explain.attribution.scores import score_of
from torchserve_explain.errors import ArchiveError, ExplainError, RequestError, Unsupported
from torchserve_explain.gallery.question import ask
from torchserve_explain.serving.planning import shortlist
from torchserve_explain.serving.requests import Instance
from torchserve_explain.serving.service import RawRequest, Service
from torchserve_explain.serving.settings import Settings


class Answering(nn.Module):
    """The small network, its logits changed by a function, or a module, at the end."""

    def __init__(self, change, classes=5):
        super().__init__()
        self.inner = small_cnn(classes=classes)
        self.change = change

    def forward(self, x):
        return self.change(self.inner(x))


def fitted(change=None, classes=5, **options):
    return Classifier(Answering(change or nn.Identity(), classes), NORMALIZATION, SIZE, **options)


# What is found


@pytest.mark.parametrize(("ending", "head"), [(nn.Softmax(1), Head.SOFTMAX), (nn.Sigmoid(), Head.SIGMOID)])
@pytest.mark.parametrize("told", [True, False])
def test_a_softmax_at_the_end_is_taken_off_and_so_is_a_sigmoid(image, ending, head, told):
    model, logits = Answering(ending), fitted().logits(image[None])
    classifier = Classifier(model, NORMALIZATION, SIZE, head=head if told else None)
    assert classifier.head is head and model.change is ending
    torch.testing.assert_close(classifier.logits(image[None]), logits)
    torch.testing.assert_close(head.probabilities(logits), ending(logits))


def test_several_logits_are_a_softmaxs_unless_told_otherwise():
    assert fitted().head is Head.SOFTMAX and fitted(head=Head.SIGMOID).head is Head.SIGMOID


@pytest.mark.parametrize("shape", [lambda x: x, lambda x: x.squeeze(1), nn.Sigmoid()], ids=["column", "row", "sigmoid"])
@pytest.mark.parametrize("options", [{"labels": 2}, {"head": Head.SIGMOID}], ids=str)
def test_one_logit_is_two_classes(image, shape, options):
    classifier = fitted(shape, 1, **options)
    (logit,) = small_cnn(classes=1)(image[None]).detach()[0]
    torch.testing.assert_close(classifier.logits(image[None])[0], torch.stack([-logit, logit]))
    assert classifier.head is Head.SIGMOID and classifier.classes == 2
    probabilities = classifier.head.probabilities(classifier.logits(image[None]))[0]
    assert float(probabilities.sum()) == pytest.approx(1) and float(probabilities[1]) == pytest.approx(float(logit.sigmoid()))


@pytest.mark.parametrize("shape", [lambda x: x, lambda x: x.squeeze(1)])
def test_a_quantity_stays_what_it_is(image, shape):
    classifier = fitted(shape, 1, head=Head.NONE)
    torch.testing.assert_close(classifier.logits(image[None]), small_cnn(classes=1)(image[None]).detach())
    assert classifier.classes == 1
    with pytest.raises(Unsupported, match="no probability"):
        classifier.head.probabilities(classifier.logits(image[None]))
    bounded = fitted(nn.Sigmoid(), 3, head=Head.NONE)  # a quantity from 0 to 1
    torch.testing.assert_close(bounded.logits(image[None]), small_cnn(classes=3)(image[None]).detach().sigmoid())


@pytest.mark.parametrize(
    ("change", "classes", "options", "line"),
    [
        (nn.Identity(), 1, {}, "{head: sigmoid}' with a label for each"),
        (nn.Identity(), 1, {"labels": 1}, "{head: none}' where it is a quantity"),
        (nn.Identity(), 1, {"head": Head.SOFTMAX}, "write 'classifier: {head: sigmoid}' for two classes"),
        (nn.Softmax(1), 5, {"head": Head.SIGMOID}, "ends in a softmax; write 'classifier: {head: softmax}'"),
        (nn.Sigmoid(), 5, {"head": Head.SOFTMAX}, "ends in a sigmoid; write 'classifier: {head: sigmoid}'"),
        (torch.sigmoid, 5, {}, "forward ends in a sigmoid"),
        (lambda x: x.softmax(1), 5, {"head": Head.SOFTMAX}, "forward ends in a softmax"),
        (lambda x: x.sigmoid()[:, :3].view(-1, 3), 5, {}, "forward ends in a sigmoid"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_line_to_write(change, classes, options, line):
    with pytest.raises(ValueError) as caught:
        fitted(change, classes, **options)
    assert line in str(caught.value)


def test_a_sigmoid_that_is_used_elsewhere_too_stays(image):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.gate = small_cnn(), nn.Sigmoid()

        def forward(self, x):
            return self.gate(self.gate(self.inner(x)))

    with pytest.raises(ValueError, match="forward ends in a sigmoid"):
        Classifier(Gated(), NORMALIZATION, SIZE)


# What is explained


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_the_other_of_two_classes_has_the_opposite_score(image, name):
    """Every method explains -z where a network with that output of its own would have it."""
    kind = METHODS[name]
    method = kind(**({"samples": 12} if "samples" in kind.__dataclass_fields__ else {}))
    binary = fitted(nn.Identity(), 1, head=Head.SIGMOID)
    plain = fitted(lambda x: torch.cat([-x, x], 1), 1)
    for target in (0, 1):
        maps = []
        for classifier in (binary, plain):
            score = float(classifier.logits(image[None])[0, target])
            (found,) = Engine(classifier, 8).results(
                [Job(method, Case(classifier, image, target, known_score=score, budget=17))]
            )
            maps.append(found.value.map)
        torch.testing.assert_close(*maps)
        assert float(maps[0].abs().max()) > 0 or not method.signed


@pytest.mark.parametrize("versus", [None, 3, Contrast.REST])
def test_the_probability_of_a_sigmoid_is_each_classs_own(image, versus):
    classifier = fitted(head=Head.SIGMOID)
    logits = classifier.logits(image[None])[0]
    own = 1 / (1 + (-logits).exp())
    others = {None: 0.0, 3: float(own[3]), Contrast.REST: float(own[[0, 2, 3, 4]].sum())}
    score = score_of(classifier.head, logits, 1, Score.PROBABILITY, versus)
    assert score == pytest.approx(float(own[1]) - others[versus])
    case = Case(classifier, image, 1, Score.PROBABILITY, score, versus=versus)
    (found,) = Engine(classifier, 8).results([Job(IntegratedGradients(max_error=1e-3), case)])
    assert found.value.completeness_error is not None and found.value.completeness_error <= 1e-3
    assert found.value.baseline_score is not None
    assert float(found.value.map.sum()) == pytest.approx(score - found.value.baseline_score, rel=2e-3)


def test_a_quantity_has_no_curve_and_its_neighbours_have(image):
    classifier = fitted(nn.Identity(), 1, head=Head.NONE)
    value = float(classifier.logits(image[None])[0, 0])
    job = Job(InputXGradient(), Case(classifier, image, 0, known_score=value))
    (found,) = Engine(classifier, 8).results([job])
    curve, other = Engine(classifier, 8).run([Measurement(quality, job, found.value) for quality in (Deletion(), Infidelity())])
    assert isinstance(curve, Unsupported) and "no probability" in str(curve) and not isinstance(other, ExplainError)


# What is answered


def service_of(classes, labels=(), **options):
    settings = Settings.model_validate(
        {"classifier": {"architecture": "model.py"}, "preprocessing": {"resize": 16, "crop": 16}}
    )
    model = small_cnn(classes=classes).float()
    classifier = Classifier(model, settings.preprocessing.normalization, SIZE, labels=len(labels), **options)
    return Service(classifier, list(labels), settings, {"name": "small", "version": "1.0"}, "0" * 64)


def answered(service, explain=False, **fields):
    raw = RawRequest({"data": picture()} | {k: str(v).encode() for k, v in fields.items()}, {"explain": str(explain)})
    (result,) = Engine(service.classifier, 8).results([Piece(service.answer(raw))])
    answer = result.value
    return answer if answer.content_type != "application/json" else (answer.status, json.loads(answer.body))


def test_each_label_of_many_has_a_probability_of_its_own():
    service = service_of(7, head=Head.SIGMOID)
    status, every = answered(service, top_k=7)
    assert status == 200 and len(answered(service)[1]) == 5 and list(every.values()) == sorted(every.values(), reverse=True)
    middle = sorted(every.values())[3]
    status, above = answered(service, threshold=middle)
    assert above == {label: value for label, value in every.items() if value > middle} and len(above) == 3
    assert answered(service, threshold=0)[1] == every and answered(service, threshold=1) == (200, {})
    assert len(answered(service, threshold=0, top_k=2)[1]) == 2
    (one,) = answered(service, explain=True, method="sensitivity", score="probability")[1]["explanations"]
    assert one["target"]["score"] == pytest.approx(one["target"]["probability"]) == pytest.approx(max(every.values()))
    (rest,) = answered(service, explain=True, method="sensitivity", versus="rest")[1]["explanations"]
    assert rest["versus"] == {"index": None, "label": "the rest", "probability": None}
    assert answered(service, explain=True, method="sensitivity", versus="rest", output="html").status == 200


@pytest.mark.parametrize("value", [-0.01, 1.01, "nan", "inf", "", "half", "1e999", True, [0.5], {"a": 1}, 10**400])
def test_a_threshold_outside_zero_to_one_is_refused(value):
    with pytest.raises(RequestError, match="allowed: a number from 0 to 1"):
        shortlist(Instance(b"", {"threshold": value}), fitted(head=Head.SIGMOID))


def test_a_threshold_is_for_sigmoids():
    with pytest.raises(RequestError, match="head is softmax, and it is for sigmoid; allowed: top_k"):
        shortlist(Instance(b"", {"threshold": 0.5}), fitted())
    with pytest.raises(RequestError, match="allowed for predictions: data, top_k, threshold"):
        shortlist(Instance(b"", {"limit": 1}), fitted(head=Head.SIGMOID))


def test_both_of_two_classes_have_a_label():
    service = service_of(1, ["cat", "dog"])
    status, told = answered(service)
    assert status == 200 and told.keys() == {"cat", "dog"} and sum(told.values()) == pytest.approx(1)
    cat, dog = answered(service, explain=True, method="input_x_gradient", target="cat,dog")[1]["explanations"]
    assert cat["target"]["score"] == pytest.approx(-dog["target"]["score"])
    assert cat["target"]["probability"] == pytest.approx(told["cat"], rel=1e-5)
    with pytest.raises(ArchiveError, match="1 labels for a classifier of 2 classes"):
        service_of(1, ["cat"], head=Head.SIGMOID)


def test_a_quantity_is_told_as_a_value():
    service = service_of(1, ["price"], head=Head.NONE)
    _, told = answered(service)
    status, answer = answered(service, explain=True)
    (one,) = answer["explanations"]
    assert status == 200 and list(told) == ["price"]
    expected = {"index": 0, "label": "price", "probability": None, "value": told["price"]}
    assert answer["predicted"] == pytest.approx(expected) and one["target"] == pytest.approx(
        expected | {"score": told["price"]}
    )
    assert one["completeness_error"] <= 0.05
    html, png = (answered(service, explain=True, method="grad_cam,saliency", output=output) for output in ("html", "png"))
    assert f"<h1>price, {told['price']:.4g}</h1>".encode() in html.body and b"<meter" not in html.body and png.status == 200
    _, measured = answered(service, explain=True, method="saliency", quality="deletion,infidelity")
    qualities = measured["explanations"][0]
    assert qualities["quality"]["deletion"] is None and qualities["quality"]["infidelity"] is not None
    for fields, why in (
        ({"score": "probability"}, "score: probability is not allowed"),
        ({"versus": "runner_up"}, "the model answers one quantity"),
        ({"versus": "rest"}, "versus: rest is not allowed"),
    ):
        status, refusal = answered(service, explain=True, **fields)
        assert status == 400 and why in refusal["message"]


def test_only_what_a_quantity_can_be_asked_is_offered():
    offered = {
        outputs: service_of(outputs, head=head)._planner.report({})["parameters"]
        for outputs, head in ((1, Head.NONE), (7, Head.NONE), (6, Head.SOFTMAX))
    }
    assert [offered[outputs]["score"]["allowed"] for outputs in (1, 7)] == [["logit"]] * 2
    assert "versus" not in offered[1] and offered[7]["versus"]["also"] == ["runner_up"]
    assert offered[6]["score"]["allowed"] == ["logit", "probability"] and offered[6]["versus"]["also"] == ["runner_up", "rest"]


def test_several_quantities_are_all_told_and_compared():
    service = service_of(7, head=Head.NONE)
    _, told = answered(service)
    assert len(told) == 7 and len(answered(service, top_k=2)[1]) == 2
    (one,) = answered(service, explain=True, method="saliency", target=0, versus=1)[1]["explanations"]
    assert one["target"]["score"] == pytest.approx(told["0"] - told["1"], rel=1e-4) and one["versus"]["value"] == pytest.approx(
        told["1"]
    )


# What is archived


def archived(folder, outputs, config="", labels=(), name="made", store=None):
    """Archive a small network with that many outputs; return the archive loaded."""
    files = {name: folder / name for name in ("model.py", "weights.pth", "labels.txt", "model-config.yaml")}
    files["model.py"].write_text(SMALL_MODEL.replace("num_classes=7", f"num_classes={outputs}"))
    namespace: dict[str, Any] = {"__name__": "model"}
    exec(files["model.py"].read_text(), namespace)
    torch.manual_seed(0)
    torch.save(namespace["Small"]().state_dict(), files["weights.pth"])
    files["model-config.yaml"].write_text(config)
    files["labels.txt"].write_text("\n".join(labels))
    options = ["--model", files["model.py"], "--weights", files["weights.pth"], "--config", files["model-config.yaml"]]
    options += ["--labels", files["labels.txt"]] if labels else []
    path = build_archive(name, parser().parse_args([name, *map(str, options), "--store", str(store or folder)]))
    return Archive.load(path)


def test_an_archive_keeps_its_head(tmp_path):
    many = archived(tmp_path, 4, "classifier: {head: sigmoid}")
    assert many.classifier.head is Head.SIGMOID and many.settings.classifier.architecture == "model.py"
    assert archived(tmp_path, 1, labels=["no", "yes"]).classifier.head is Head.SIGMOID
    quantity = archived(tmp_path, 1, "classifier: {head: none}", ["price"])
    assert quantity.classifier.head is Head.NONE
    with pytest.raises(ArchiveError, match="the archive answers quantities"):
        ask(quantity, "saliency", "predicted", {})


@pytest.mark.parametrize(
    ("outputs", "config", "labels", "why"),
    [
        (1, "", (), "write 'classifier: {head: sigmoid}'"),
        (1, "", ("price",), "'classifier: {head: none}' where it is a quantity"),
        (1, "classifier: {head: softmax}", (), "a softmax of one logit says nothing"),
        (1, "classifier: {head: sigmoid}", ("yes",), "1 labels for a classifier of 2 classes"),
        (4, "classifier: {head: tanh}", (), "classifier.head: Input should be 'softmax', 'sigmoid' or 'none'"),
        (
            1,
            "classifier: {head: none}\nexplanations: {defaults: {score: probability}}",
            (),
            "score: probability is not allowed",
        ),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_archived(tmp_path, outputs, config, labels, why):
    with pytest.raises(ArchiveError) as caught:
        archived(tmp_path, outputs, config, labels)
    assert why in str(caught.value)
