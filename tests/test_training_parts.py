"""The parts of training: divided networks, training that goes on, kept features, scores, GANs, what is exported and refused."""

import sys
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from patches import write_folder
from rich.console import Console
from rich.progress import Progress
from sklearn.metrics import roc_auc_score
from torch import nn
from torchvision.models import get_model

import training  # noqa: F401
from torchserve_explain.attribution.classifier import Classifier
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.job import Job
from torchserve_explain.attribution.methods import METHODS, Case
from torchserve_explain.errors import TrainingError
from torchserve_explain.network import MODEL, build_network
from torchserve_explain.paths import ROOT
from training.__main__ import main
from training.architectures.direction import Direction
from training.data import Images, read_folder
from training.evaluation import evaluate
from training.export import architecture_of, direction_architecture
from training.features import Kept, in_order, shuffled
from training.fit import Training, balanced, fit
from training.gan import SIDE, Discriminator, Drawing, Generator, draw_samples, train_gan
from training.maps import explain
from training.mean_difference import best_threshold, held_out_accuracy, mean_difference
from training.networks import BACKBONES, RANDOM, build, head_of, preprocessing_for
from training.recipe import Part, read_recipe, recipe_names

QUIET = Progress(disable=True)
CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_divided_is_the_backbone(name):
    torch.manual_seed(0)
    network = build(name, RANDOM, 3, Part.LAST_STAGE)
    network.model.eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features = network.frozen(x)
        torch.testing.assert_close(network.trained(features), network.model(x))
    assert not any(p.requires_grad for p in network.frozen.parameters())
    learning = {id(p) for p in network.trained.parameters()}
    names = [key for key, p in network.model.named_parameters() if id(p) in learning]
    assert names[0].startswith(BACKBONES[name].last_stage) and all(p.requires_grad for p in network.trained.parameters())
    assert len(list(build(name, RANDOM, 3, Part.HEAD).trained.parameters())) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_explains_more_than_one_place(recipe):
    """At a recipe's input size the last layer of each of its backbones is larger than 1 x 1."""
    settings, about = read_recipe(recipe)
    assert about and settings.method in METHODS and set(settings.allowed) <= set(BACKBONES)
    if recipe == "cifar100":
        for name in settings.allowed:
            preprocessing = preprocessing_for(name, settings.size)
            classifier = Classifier(build(name, RANDOM, 4, Part.ALL).model, preprocessing.normalization, preprocessing.size)
            grid = classifier.spatial_layers[classifier.grid_layer("last")]
            assert min(grid.height, grid.width) >= 4, name


def toy(seed=0, count=40):
    """Two clouds of points as an image of one pixel each, and a small network."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    points = torch.randn(count, 3, 1, 1, generator=generator) + 2 * labels[:, None, None, None]
    return Kept(points[:, None], labels.tolist(), CPU)


def toy_training(path, **changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 2))
    recipe = replace(read_recipe("textile")[0], epochs=6, batch=8, patience=6, **changes)
    return Training(model, recipe, balanced([20, 20]), 0, path)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, optimizer):
    whole = toy_training(tmp_path / "whole.pt", optimizer=optimizer)
    epochs = fit(whole, toy(), toy(1), QUIET)
    stopped = toy_training(tmp_path / "stopped.pt", optimizer=optimizer)
    for _ in range(3):
        stopped.epoch(toy(), toy(1), QUIET)
    torch.rand(100)
    again = toy_training(tmp_path / "stopped.pt", optimizer=optimizer)
    assert len(again.epochs) == 3
    other = fit(again, toy(), toy(1), QUIET)
    assert [replace(epoch, seconds=0) for epoch in epochs] == [replace(epoch, seconds=0) for epoch in other]
    for expected, found in zip(whole.trained.state_dict().values(), again.trained.state_dict().values(), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize(("weights", "momentum"), [(RANDOM, 0.1), (None, 0.01)])
def test_statistics_follow_a_network_that_learns_from_nothing(tmp_path, weights, momentum):
    """MobileNetV3's own 0.01 leaves its held-out accuracy at chance for the first hundreds of steps."""
    path = tmp_path / "state.pth"
    torch.save(get_model("mobilenet_v3_large", weights=None, num_classes=2).state_dict(), path)
    network = build("mobilenet_v3_large", weights or str(path), 3, Part.ALL)
    assert {module.momentum for module in network.model.modules() if isinstance(module, nn.BatchNorm2d)} == {momentum}


def test_the_best_epoch_is_kept_and_training_ends_when_none_is_better(tmp_path):
    training_ = toy_training(tmp_path / "state.pt", learning_rate=0.3)
    training_.recipe = replace(training_.recipe, epochs=40, patience=3)
    epochs = fit(training_, toy(), toy(1), QUIET)
    worth = [(epoch.val_accuracy, -epoch.val_loss) for epoch in epochs]
    assert len(epochs) == 1 + worth.index(max(worth)) + 3 < 40
    with torch.no_grad():
        logits = training_.trained(toy(1).features[:, 0])
    assert float(nn.functional.cross_entropy(logits, torch.tensor(toy(1).labels))) == pytest.approx(-max(worth)[1], rel=1e-5)


def test_a_loss_that_is_not_finite_is_an_error_with_the_way_out(tmp_path):
    with pytest.raises(TrainingError, match="--learning-rate"):
        fit(toy_training(tmp_path / "state.pt", optimizer="sgd", learning_rate=1e30), toy(), toy(1), QUIET)


def test_classes_weigh_the_same_however_many_images_they_have():
    weights = balanced([10, 30, 60])
    assert (weights * torch.tensor([10, 30, 60])).tolist() == pytest.approx([100 / 3] * 3)


def test_an_epoch_sees_each_image_once_and_leaves_no_batch_of_one():
    assert sorted(chain(*shuffled(10, 4, 0, 0))) == list(range(10)) and list(chain(*in_order(130))) == list(range(130))
    assert shuffled(10, 4, 0, 0) == shuffled(10, 4, 0, 0) != shuffled(10, 4, 0, 1)
    assert [len(batch) for batch in shuffled(9, 4, 0, 0)] == [4, 4]


def test_a_line_is_written_after_each_epoch_where_there_is_no_terminal(tmp_path, capsys):
    with Progress(console=Console(file=sys.stdout, force_terminal=False)) as shown:
        training_ = toy_training(tmp_path / "state.pt")
        training_.epoch(toy(), toy(1), shown)
        told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 1/6: ")]
    assert len(told) == 1 and f"{training_.epochs[0].val_loss:.3f}" in told[0]


def test_the_direction_and_its_scores_are_the_closed_form():
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 4.0], [4.0, 2.0]])
    labels = torch.tensor([0, 0, 1, 1])
    direction = mean_difference(features, labels)  # (4, 3) - (1, 0)
    assert direction.tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    roc = best_threshold(features @ direction, labels)
    assert roc.auc == 1 and roc.threshold == pytest.approx((2 + 6) / 2 * 0.5**0.5)


def test_the_threshold_is_that_of_the_largest_youden_index():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    scores = torch.randn(60, generator=generator) + labels
    roc = best_threshold(scores, labels)

    def youden(cut):
        return ((scores > cut) & (labels == 1)).sum() / 30 - ((scores > cut) & (labels == 0)).sum() / 30

    assert youden(roc.threshold) == max(youden(cut) for cut in scores)
    assert roc.auc == pytest.approx(roc_auc_score(labels, scores))
    assert roc.auc == pytest.approx(np.trapezoid(roc.true_positives, roc.false_positives))


def test_held_out_accuracy_is_chance_where_there_is_nothing_to_learn_and_none_where_images_are_few():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(200, 4, generator=generator), torch.arange(200) % 2
    assert held_out_accuracy(features, labels, 0) == pytest.approx(0.5, abs=0.1)
    assert held_out_accuracy(features + 10 * labels[:, None], labels, 0) == 1
    assert held_out_accuracy(features[:8], labels[:8], 0) is None


def test_the_exported_direction_explains_g_itself(tmp_path):
    """The second class's logit is g less the threshold, and sensitivity is the squared norm of g's gradient."""
    (tmp_path / MODEL).write_text(direction_architecture("lite0", 1280 * 2 * 2).source)
    torch.manual_seed(0)
    body = build("lite0", "pretrained", 2, Part.HEAD).model.get_submodule("features").eval()
    model = Direction(body, 1280 * 2 * 2)
    model.direction, model.threshold = nn.functional.normalize(torch.randn(1280 * 2 * 2), dim=0), torch.tensor([0.7])
    network = build_network(MODEL, tmp_path, model.state_dict())
    preprocessing = preprocessing_for("lite0", 64)
    classifier = Classifier(network, preprocessing.normalization, preprocessing.size)
    x = torch.rand(3, 64, 64).requires_grad_()
    g = body(x[None]).flatten() @ model.direction
    (gradient,) = torch.autograd.grad(g, x)
    logits = classifier.logits(x.detach()[None])[0]
    assert logits.tolist() == pytest.approx([0.7 - g.item(), g.item() - 0.7], abs=1e-3)
    jobs = [Job(METHODS["sensitivity"](), Case(classifier, x.detach(), target)) for target in (0, 1)]
    maps = [torch.from_numpy(values) for values in explain(Engine(classifier, 4), jobs)]
    expected = gradient.square().sum(0)
    for values in maps:
        assert (values - expected).norm() < 0.02 * expected.norm()
    assert METHODS["lrp"].unsupported(classifier) is None and METHODS["biased_layer"].unsupported(classifier) is None


@pytest.mark.filterwarnings("ignore:vgg16 starts")
def test_the_direction_of_a_torchvision_backbone_is_built_without_training(tmp_path):
    (tmp_path / MODEL).write_text(direction_architecture("vgg16", 512 * 7 * 7).source)
    assert "training" not in (tmp_path / MODEL).read_text().split("import")[1]
    with torch.device("meta"):
        body = build("vgg16", RANDOM, 2, Part.HEAD).model.get_submodule("features")
        state = Direction(body, 512 * 7 * 7).state_dict()
    network = build_network(MODEL, tmp_path, {key: torch.zeros(tensor.shape) for key, tensor in state.items()})
    assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 2)


def test_every_backbone_is_exported_under_the_name_that_the_archive_knows():
    for name, backbone in BACKBONES.items():
        architecture = architecture_of(name)
        assert architecture.name == (name if backbone.source is None else MODEL)
        assert (architecture.source is None) == (backbone.source is None)


def test_scores_are_those_of_the_confusion():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    logits = nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 1, 0]), 3).float()
    scores = evaluate(logits, labels, ["a", "b", "c"])
    assert scores.confusion == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert scores.accuracy == pytest.approx(4 / 6) and scores.balanced_accuracy == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert [(c.precision, c.recall) for c in scores.classes] == [
        pytest.approx(pair) for pair in ((2 / 3, 2 / 3), (2 / 3, 1), (0, 0))
    ]


@pytest.mark.live
def test_a_gan_learns_the_colour_of_its_images(tmp_path):
    torch.manual_seed(0)
    colour = torch.tensor([0.8, -0.6, 0.2])[None, :, None, None]
    real = (colour + 0.05 * torch.randn(16, 3, SIDE, SIDE)).clamp(-1, 1)
    generator = train_gan(real, Drawing(8, 100, tmp_path, CPU, 4))
    with torch.no_grad():
        drawn = generator(torch.randn(8, 100, 1, 1))
    assert drawn.shape == (8, 3, SIDE, SIDE) and Discriminator()(drawn).shape == (8,)
    red, green, blue = drawn.mean((0, 2, 3)).tolist()
    assert red > 0.1 > -0.1 > green and green < blue < red
    assert sum(isinstance(layer, nn.ConvTranspose2d) for layer in Generator()) == 5


def test_drawn_images_are_kept_and_belong_to_their_class(tmp_path):
    preprocessing = preprocessing_for("cnn", 32)
    data = read_folder(write_folder(tmp_path / "images", ("blue", "red"), 5), preprocessing, (0.6, 0.2, 0.2), 0)
    drawing = Drawing(3, 1, tmp_path / "drawn", CPU, 2)
    drawn = draw_samples(data.splits["train"], data.classes, drawing, 0)
    assert [sample.label for sample in drawn] == [0, 0, 0, 1, 1, 1]
    times = [sample.path.stat().st_mtime_ns for sample in drawn]
    assert [s.path.stat().st_mtime_ns for s in draw_samples(data.splits["train"], data.classes, drawing, 0)] == times
    assert Images(drawn, preprocessing)[5][0].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["textile", "--weights", "nowhere.pth"], "--weights: nowhere.pth does not exist"),
        (["textile", "--weights", str(ROOT / "README.md")], "--weights: README.md is no state dict of lite0"),
        (["textile", "--data", "nowhere"], "nowhere is no folder"),
        (["leaves", "--backbone", "lite0"], "tells two classes apart, not 3"),
        (["textile", "--out", str(ROOT / "classifiers" / "imagenet")], "holds another classifier"),
        (["textile", "--out", str(ROOT / "README.md")], "is a file"),
        (["textile", "--out", str(ROOT / "README.md" / "deeper")], "Not a directory"),
        (["textile", "--out", "/proc/nothing"], "--out: "),
        (["textile", "--out", "a name"], "'a name' is no model name"),
        (["vegetables", "--backbone", "cnn", "--size", "4"], "--size 4: cnn cannot take such images"),
    ],
)
def test_a_wrong_command_is_refused_with_the_reason(tmp_path, capsys, arguments, reason):
    data = write_folder(tmp_path / "images", count=3)
    recipe, *options = arguments
    assert main([recipe, "--data", str(data), "--out", str(tmp_path / "out"), "--workers", "0", "--size", "32", *options]) == 1
    told = capsys.readouterr().err
    assert reason in told and not (tmp_path / "out").exists()


def test_weights_that_cannot_be_downloaded_name_those_that_can_be_had(tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("training.networks.get_model", offline)
    data = write_folder(tmp_path / "images", count=3)
    assert main(["vegetables", "--data", str(data), "--out", str(tmp_path / "out"), "--workers", "0"]) == 1
    told = capsys.readouterr().err
    assert "--backbone lite0" in told and "--weights FILE" in told and "no network" in told


@pytest.mark.filterwarnings("ignore:cnn starts")
def test_a_state_dict_of_other_classes_gets_a_new_head(tmp_path):
    torch.manual_seed(0)
    trained = build("cnn", RANDOM, 7, Part.ALL).model
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    network = build("lite0", "pretrained", 3, Part.HEAD).model
    torch.save(network.state_dict(), tmp_path / "lite0.pth")
    again = build("lite0", str(tmp_path / "lite0.pth"), 5, Part.HEAD).model
    assert again.get_submodule(head_of(again)).out_features == 5
    assert torch.equal(*(one.get_parameter("features.0.1.weight") for one in (again, network)))
    with pytest.raises(TrainingError, match="no state dict of lite0"):
        build("lite0", str(tmp_path / "w.pth"), 5, Part.HEAD)


@pytest.mark.parametrize(
    ("recipe", "options", "reason"),
    [
        ("textile", ["--epochs", "0"], "0 is not allowed; allowed: a whole number from 1"),
        ("textile", ["--learning-rate", "nan"], "allowed: a number above 0"),
        ("textile", ["--seed", "-1"], "a whole number from 0"),
        ("birds", ["--draw", "-1"], "a whole number from 0"),
        ("leaves", ["--epochs", "3"], "unrecognized arguments: --epochs 3"),  # nothing is trained by gradient there
    ],
)
def test_a_number_out_of_range_is_refused_before_anything_is_read(capsys, recipe, options, reason):
    with pytest.raises(SystemExit):
        main([recipe, "--data", "nowhere", "--out", "out", *options])
    assert reason in capsys.readouterr().err


def test_what_is_written_does_not_lie_among_what_is_read(tmp_path, capsys):
    data = write_folder(tmp_path / "images", count=3)
    assert main(["textile", "--data", str(data), "--out", str(data / "red" / "out")]) == 1
    assert "lies inside" in capsys.readouterr().err and not (data / "red" / "out").exists()


def test_a_batch_of_one_is_trained_on():
    assert sorted(place for batch in shuffled(5, 1, 0, 0) for place in batch) == [0, 1, 2, 3, 4]
    assert [len(batch) for batch in shuffled(5, 2, 0, 0)] == [2, 2]


def test_classes_with_the_same_features_are_told():
    with pytest.raises(TrainingError, match="same mean"):
        mean_difference(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAIN", "validation")])
def test_splits_are_known_however_they_are_written(tmp_path, names):
    for number, name in enumerate(names):
        write_folder(tmp_path / name, ("blue", "red"), 9, start=100 * number)
    data = read_folder(tmp_path, preprocessing_for("cnn", 32), (0.6, 0.2, 0.2), 0)
    assert data.classes == ["blue", "red"] and all(data.splits.values())


def test_one_split_under_two_names_is_refused(tmp_path):
    for name in ("train", "val", "validation"):
        write_folder(tmp_path / name, ("blue", "red"), 3)
    with pytest.raises(TrainingError, match="both val and validation"):
        read_folder(tmp_path, preprocessing_for("cnn", 32), (0.6, 0.2, 0.2), 0)


def test_a_class_may_be_called_train(tmp_path):
    whole = write_folder(tmp_path / "images", ("blue", "red"), 4)
    (whole / "red").rename(whole / "train")
    assert read_folder(whole, preprocessing_for("cnn", 32), (0.6, 0.2, 0.2), 0).classes == ["blue", "train"]
