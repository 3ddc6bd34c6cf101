"""The compiled forward pass: the same answers, whoever shares the pass; used only where it is equal and faster."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from conftest import NORMALIZATION, ROOT, SIZE, small_cnn
from test_interruption import Arriving
from test_stepping import asking
from torch import nn
from torchvision.models import get_model
from transformers import NETWORKS, SIDE, randomised

from torchserve_explain import runtimes
from torchserve_explain.attribution import classifier as module
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.compiled import Compiled, openvino_version
from torchserve_explain.attribution.computation import Piece
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import METHODS, Case
from torchserve_explain.attribution.rows import Form, Rows, Score
from torchserve_explain.attribution.trial import Pays, tried
from torchserve_explain.serving.settings import read_settings

if openvino_version() is None:
    pytest.skip("OpenVINO is not installed", allow_module_level=True)
BOTH = Pays(one=True, many=True)
NEITHER = Pays(one=False, many=False)


def compiled(model, size=SIZE, pays=BOTH):
    """A classifier whose passes are compiled, whatever that pays here."""
    classifier = Classifier(model, NORMALIZATION, size)
    assert classifier.compile(picture(size), 16, 600, pays) == pays
    return classifier


def picture(size=SIZE, seed=5):
    return NORMALIZATION(torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)))


def rows(count=1, **wanted):
    return Rows(count, lambda *_: torch.empty(0), lambda *_: None, **({"gradient": False} | wanted))


@pytest.fixture(scope="module")
def pair():
    return compiled(small_cnn().float()), Classifier(small_cnn().float(), NORMALIZATION, SIZE)


def explained(classifier, method, image, pack=8):
    return Engine(classifier, pack).results([Job(method, Case(classifier, image, 2))])[0].value.map


# The same answers


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit", "swin", "convnext", "maxvit"])
def test_an_architecture_answers_the_same_compiled(name):
    torch.manual_seed(0)
    network = randomised(NETWORKS[name]).float() if name in NETWORKS else get_model(name, weights=None)
    classifier = compiled(network, (SIDE, SIDE))
    inputs = torch.stack([picture((SIDE, SIDE), seed) for seed in range(3)])
    expected, found = classifier.logits(inputs), classifier.compiled(inputs)
    assert float((expected - found).abs().max()) <= 1e-4 * float(expected.max() - expected.min())


@pytest.mark.parametrize("name", ["occlusion", "lime", "rise", "score_cam"])
def test_maps_of_scores_alone_are_the_same_compiled(pair, name):
    ours, torchs = (explained(classifier, METHODS[name](), picture()) for classifier in pair)
    assert float(torch.cosine_similarity(ours.flatten(), torchs.flatten(), 0)) > 0.9999


def test_gradient_passes_are_pytorchs_and_see_the_same_logits(pair):
    ours, torchs = pair
    for wanted in ({"gradient": True}, {"layers": ("stem",)}, {"activations": ("stem", "reduce")}, {"rule": object()}):
        assert ours.form(rows(**wanted)) is Form.MODULE
    assert torch.equal(*(explained(one, METHODS["saliency"](), picture()) for one in (ours, torchs)))
    with_gradient = ours.evaluate(picture()[None], [2], [Score.LOGIT], gradient=True).logits
    alone = ours.evaluate_compiled(picture()[None], [2], [Score.LOGIT]).logits
    torch.testing.assert_close(alone, with_gradient, rtol=0, atol=1e-4 * float(alone.max() - alone.min()))


LAYERED = ["grad_cam", "grad_cam_plus_plus", "layer_cam", "score_cam"]


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("score", Score)
def test_maps_of_the_last_layer_are_the_same_compiled_alone_and_in_company(pair, name, score):
    ours, torchs = pair
    assert ours.compiled.layer == ours.last_layer and ours.form(rows(layers=(ours.last_layer,))) is Form.COMPILED
    images = [picture(seed=seed) for seed in range(3)]
    found, again, expected = (
        [one.value.map for one in Engine(classifier, pack).results(
            [Job(METHODS[name](), Case(classifier, image, 2, score=score)) for image in images])]
        for classifier, pack in ((ours, 16), (ours, 1), (torchs, 16))
    )  # fmt: skip
    assert all(map(torch.equal, found, again))
    for one, other in zip(found, expected, strict=True):
        assert float(torch.cosine_similarity(one.flatten(), other.flatten(), 0)) > 0.9999


class NoWayBack(torch.autograd.Function):
    """An operation that nobody has written a gradient for."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        raise NotImplementedError("it has no gradient")


def test_a_layer_is_compiled_only_where_all_passes_through_it_and_it_answers_the_same(monkeypatch):
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(7, 5)

        def forward(self, x):
            return self.head(torch.cat([self.seen(x).relu().mean((2, 3)), x.mean((2, 3))], 1))

    beside = compiled(Beside())
    assert beside.last_layer == "seen" and beside.compiled.layer is None
    assert beside.form(rows()) is Form.COMPILED and beside.form(rows(layers=("seen",))) is Form.MODULE
    tail = Compiled.tail
    monkeypatch.setattr(Compiled, "tail", lambda self, features: tail(self, 2 * features))
    wrong = compiled(small_cnn().float())
    assert wrong.compiled is not None and wrong.compiled.layer is None and wrong.runtimes["last_layer"] == "torch"
    monkeypatch.setattr(Compiled, "tail", lambda self, features: NoWayBack.apply(tail(self, features)))
    stuck = compiled(small_cnn().float())
    assert stuck.compiled is not None and stuck.compiled.layer is None and stuck.runtimes["one_row"] == "openvino"


def test_a_request_answers_to_the_last_bit_the_same_alone_and_in_company(pair):
    ours, _ = pair
    assert (ours.form(rows(1)), ours.form(rows(9))) == (Form.COMPILED, Form.COMPILED)
    images = [picture(seed=seed) for seed in range(5)]
    logits = Engine(ours, 16).logits(images)
    assert all(torch.equal(Engine(ours, 16).logits([image])[0], found) for image, found in zip(images, logits, strict=True))
    jobs = [Job(METHODS["occlusion"](), Case(ours, image, 1)) for image in images]
    for job, found in zip(jobs, Engine(ours, 16).results(jobs), strict=True):
        assert torch.equal(Engine(ours, 3).results([job])[0].value.map, found.value.map)


@pytest.mark.parametrize("pays", [Pays(one=True, many=False), Pays(one=False, many=True)])
def test_where_only_single_rows_or_only_many_pay_they_share_no_pass(pays):
    ours = compiled(small_cnn().float(), pays=pays)
    forms = {True: Form.COMPILED, False: Form.MODULE}
    assert (ours.form(rows(1)), ours.form(rows(2))) == (forms[pays.one], forms[pays.many])
    assert ours.runtimes == {
        "one_row": "openvino" if pays.one else "torch",
        "many_rows": "openvino" if pays.many else "torch",
        "last_layer": "openvino" if pays.one else "torch",
        "gradient": "torch",
    }
    engine = Engine(ours, 8)
    engine.run([Piece(asking(picture(), 1), 9), Piece(asking(picture(), 3), 9)])  # neither is short
    assert (engine.passes, engine.rows) == (2, 4)


def test_low_precision_keeps_its_rows_and_predictions_are_compiled():
    ours = Classifier(small_cnn().float(), NORMALIZATION, SIZE, narrow=torch.bfloat16)
    ours.compile(picture(), 16, 600, BOTH)
    assert (ours.form(rows(4)), ours.form(rows(1, precise=True))) == (Form.NARROW, Form.COMPILED)
    assert ours.compiled is not None and ours.compiled.layer == ours.last_layer  # which was compared with float32's


def test_a_short_request_goes_between_two_rows_of_a_compiled_pass(pair):
    ours, order = pair[0], []
    expected = {seed: ours.compiled(picture(seed=seed)[None]) for seed in (1, 2)}
    note = lambda name: lambda _start, evaluation: order.append((name, evaluation.logits))  # noqa: E731
    arriving = Arriving(ours, 4, Piece(asking(picture(seed=2), 1, consume=note("short"))))
    long = arriving.engine.add(Piece(asking(picture(seed=1), 4, consume=note("long"))))
    while long.outcome is None:
        arriving.engine.step()
    assert [name for name, _ in order] == ["short", "long"]
    assert torch.equal(order[0][1], expected[2]) and torch.equal(order[1][1], expected[1].expand(4, -1))


# Used only where it is equal and faster


class Deciding(nn.Module):
    """Looks at the image before it chooses its layers."""

    def __init__(self):
        super().__init__()
        self.inner = small_cnn().float()

    def forward(self, x):
        return self.inner(x) if x.max() > 0 else self.inner(-x)


def refused(model, caplog, pays=BOTH):
    classifier = Classifier(model, NORMALIZATION, SIZE)
    with caplog.at_level(logging.WARNING, module.__name__):
        caplog.clear()
        assert classifier.compile(picture(), 16, 600, pays) is None
    assert classifier.compiled is None and classifier.form(rows()) is Form.MODULE and len(caplog.records) == 1
    return caplog.text


def test_a_model_that_looks_at_the_image_stays_as_it_is(caplog):
    assert "not compiled" in refused(Deciding(), caplog)


@pytest.mark.parametrize(
    ("wrong", "why"), [(lambda logits: logits * 1.001, "its logits"), (lambda logits: logits.round(decimals=1), "its")]
)
def test_a_compiled_model_that_answers_otherwise_is_not_used(monkeypatch, caplog, wrong, why):
    right = Compiled.__call__
    monkeypatch.setattr(Compiled, "__call__", lambda *arguments: wrong(right(*arguments)))
    assert why in refused(small_cnn().float(), caplog)


def test_equal_logits_with_another_map_are_not_equal():
    weight = torch.randn(3 * SIZE[0] * SIZE[1], 4, generator=torch.Generator().manual_seed(0)).double()
    module = lambda x: torch.tensor([1e4, 0, 0, 0]) + 1e-4 * (x.double().flatten(1) @ weight)  # noqa: E731
    noise = lambda x: 5e-2 * torch.randn(len(x), 4, generator=torch.Generator().manual_seed(1))  # noqa: E731
    assert tried(module, module, picture().double(), 0.0, BOTH) == BOTH
    with pytest.raises(ValueError, match="its maps differ"):
        tried(module, lambda x: module(x) + noise(x), picture().double(), 0.0, BOTH)


@pytest.mark.parametrize(("seconds", "pays"), [((1.0, 0.89), BOTH), ((1.0, 0.91), NEITHER)])
def test_it_is_used_where_it_is_faster_by_a_tenth(monkeypatch, seconds, pays):
    now = [0.0]

    def taking(length):
        return lambda x: (now.__setitem__(0, now[0] + length * len(x)), x.flatten(1))[1]

    monkeypatch.setattr("torchserve_explain.attribution.trial.time.monotonic", lambda: now[0])
    module, compiled = map(taking, seconds)
    assert tried(module, compiled, picture(), 1e9, None) == pays
    with pytest.raises(ValueError, match="takes longer than startup may"):
        tried(module, compiled, picture(), 0.0, None)


def test_only_float32_on_the_processor_is_compiled(model):
    classifier = Classifier(model, NORMALIZATION, SIZE)
    assert model.stem.weight.dtype is torch.float64 and classifier.compile(picture(), 16, 600, BOTH) is None


# What an archive says, and what is remembered


def settings(**explanations):
    sections = {"classifier": {"architecture": "resnet18"}, "preprocessing": {"resize": 16, "crop": 16}}
    return read_settings(sections | {"explanations": explanations})


@pytest.fixture
def tries(monkeypatch, tmp_path):
    """The known verdicts that each attempt to compile is given; each finds that single rows pay."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = []

    def noted(*arguments):
        given.append(arguments[4])
        return Pays(True, False)

    monkeypatch.setattr(Classifier, "compile", noted)
    return given


def test_what_was_measured_is_remembered_for_this_archive_and_processor(tries, pair, monkeypatch, tmp_path):
    for digest in ("one", "one", "other"):
        runtimes.choose_runtimes(pair[1], settings(), digest)
    monkeypatch.setattr(runtimes, "processor", lambda *_: "another")
    runtimes.choose_runtimes(pair[1], settings(), "one")
    assert tries == [None, Pays(True, False), None, None]
    (tmp_path / "torchserve-explain" / "runtimes.json").write_text('["no mapping"]')
    runtimes.choose_runtimes(pair[1], settings(), "one")
    assert tries[4:] == [None]


def test_where_nothing_can_be_written_it_is_measured_each_time(tries, pair, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    for _ in range(2):
        runtimes.choose_runtimes(pair[1], settings(), "one")
    assert tries == [None, None]


def test_an_archive_may_keep_to_pytorch_and_one_without_openvino_does(tries, pair, monkeypatch):
    runtimes.choose_runtimes(pair[1], settings(runtime="torch"), "one")
    monkeypatch.setattr(runtimes, "openvino_version", lambda: None)
    runtimes.choose_runtimes(pair[1], settings(), "one")
    assert not tries
    with pytest.raises(ValueError, match=r"explanations\.runtime: Input should be 'auto' or 'torch'"):
        settings(runtime="onnx")


def test_nothing_that_pays_is_not_compiled_again(pair, monkeypatch):
    monkeypatch.setattr(module, "Compiled", None)
    assert Classifier(small_cnn().float(), NORMALIZATION, SIZE).compile(picture(), 16, 600, NEITHER) == NEITHER


def test_the_photo_is_made_for_the_model(pair, monkeypatch):
    shapes = []
    monkeypatch.setattr(Classifier, "compile", lambda _self, photo, *_: shapes.append(photo.shape))
    runtimes.choose_runtimes(pair[1], settings(), "photo")
    assert shapes == [(3, *SIZE)]


SIGNALLED = """
import os, signal
from torchserve_explain.attribution.compiled import Compiled
from torch import nn, zeros
made = [Compiled(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), zeros(1, 3, 2, 2)) for _ in range(2)]
del made[0], made[0]
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_process_whose_compiled_models_are_gone_survives_a_signal():
    environment = os.environ | {"PYTHONPATH": str(ROOT / "handlers")}
    told = subprocess.run([sys.executable, "-Xfaulthandler", "-c", SIGNALLED], env=environment, capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (0, "handled\n")


LISTENED = """
import socket, sys
from torchserve_explain.attribution.compiled import Compiled
from torch import nn, zeros
socket.socket.connect = lambda *_: sys.exit("it reports itself")
Compiled(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), zeros(1, 3, 2, 2))
assert "openvino" in sys.modules and not sys.modules["openvino_telemetry"]
"""


def test_openvino_reports_nothing_to_its_makers(tmp_path):
    """Its import alone would, and makes a folder for the number that it knows the user by."""
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "handlers")}
    subprocess.run([sys.executable, "-c", LISTENED], env=environment, check=True)
    assert not list(tmp_path.iterdir())
