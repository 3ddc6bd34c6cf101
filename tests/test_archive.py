"""What archive.sh takes and what it refuses, with the reason."""

import json
import os
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, small_cnn
from safetensors.torch import save_file
from torchvision.models import get_model

from torchserve_explain.archive import Archive
from torchserve_explain.archiver import build_archive, complete, parser
from torchserve_explain.errors import ArchiveError
from torchserve_explain.network import build_network, read_labels
from torchserve_explain.serving.settings import read_settings

CONFIG = {"preprocessing": {"resize": [32, 32], "crop": None}}
ARCHITECTURE = "mobilenet_v3_small"
OWN_MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.head(self.convolution(x).relu().mean((2, 3)))
"""


@pytest.fixture
def archive(tmp_path):
    """Build with the options of archive.sh and a configuration of its own; return the archive's path."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))

    def run(*arguments, name="mine"):
        options = ["--store", tmp_path / "store", "--config", tmp_path / "config.yaml", *arguments]
        return build_archive(name, parser().parse_args([name, *map(str, options)]))

    return run


def mobilenet(classes=4):
    torch.manual_seed(0)
    return get_model(ARCHITECTURE, weights=None, num_classes=classes)


def unpacked(path, folder):
    with zipfile.ZipFile(path) as mar:
        mar.extractall(folder)
    return folder


@pytest.mark.parametrize("form", ["pth", "safetensors", "wrapped", "parallel"])
def test_a_checkpoint_of_a_torchvision_architecture_is_archived(archive, tmp_path, form):
    model = mobilenet()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    state = model.state_dict()
    if form == "safetensors":
        save_file(state, path)
    elif form == "parallel":
        torch.save(OrderedDict((f"module.{key}", value) for key, value in state.items()), path)
    else:
        torch.save({"epoch": 3, "state_dict": state} if form == "wrapped" else state, path)
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
    mar = archive("--arch", ARCHITECTURE, "--weights", path, "--labels", tmp_path / "labels.txt")
    loaded = Archive.load(mar)
    assert loaded.labels == ["a", "b", "c", "d"]
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.classifier.logits(x), model.eval()(x).detach(), rtol=1e-4, atol=1e-4)
    assert Archive.load(unpacked(mar, tmp_path / "unpacked")).digest == loaded.digest


def test_a_users_own_model_is_archived(archive, tmp_path):
    (tmp_path / "model.py").write_text(OWN_MODEL)
    state = {"convolution.weight": (4, 3, 3, 3), "convolution.bias": (4,), "head.weight": (3, 4), "head.bias": (3,)}
    torch.save({name: torch.randn(shape) for name, shape in state.items()}, tmp_path / "w.pth")
    mar = archive("--model", tmp_path / "model.py", "--weights", tmp_path / "w.pth")
    names = set(zipfile.ZipFile(mar).namelist())
    travels = {"explain_handler.py", "torchserve_explain/errors.py", "torchserve_explain/attribution/engine.py"}
    assert travels | {"model.py", "weights.safetensors", "model-config.yaml"} <= names
    assert "index_to_name.json" not in names


class Exploit:
    def __reduce__(self):
        return (os.system, ("touch exploited",))


def refusals():
    model, arch = mobilenet(), ["--arch", ARCHITECTURE]
    state = model.state_dict()
    yield "labels", arch, state, "a\nb\nc\n", "3 labels for a classifier of 4 classes"
    yield "missing", arch, {k: v for k, v in state.items() if "features.9" not in k}, None, "missing, such as features.9"
    yield "unknown", arch, state | {"extra": torch.ones(1)}, None, "unknown, such as extra"
    yield "other", ["--arch", "vgg11"], state, None, "the weights do not fit vgg11"
    yield "shapes", arch, state | {"features.0.0.weight": torch.ones(16, 3, 5, 5)}, None, "of another shape"
    yield "whole", arch, model, None, "save model.state_dict()"
    yield "exploit", arch, Exploit(), None, "not a state dict that is safe to load"
    yield "list", arch, [1, 2], None, "holds no state dict"
    yield "keys", arch, {1: torch.ones(1)}, None, "holds no state dict"
    yield "nan", arch, state | {"classifier.3.bias": torch.full((4,), float("nan"))}, None, "not finite"
    yield "garbage", arch, b"not a checkpoint", None, "w.pth"
    yield "arch", ["--arch", "resnet19"], state, None, "'resnet19' is unknown"


@pytest.mark.parametrize("case", list(refusals()), ids=lambda case: case[0])
def test_what_cannot_be_served_is_refused_with_the_reason(archive, tmp_path, case):
    _, options, weights, labels, reason = case
    if isinstance(weights, bytes):
        (tmp_path / "w.pth").write_bytes(weights)
    else:
        torch.save(weights, tmp_path / "w.pth")
    if labels:
        (tmp_path / "l.txt").write_text(labels)
        options = [*options, "--labels", tmp_path / "l.txt"]
    with pytest.raises(ArchiveError, match=re.escape(reason)):
        archive(*options, "--weights", tmp_path / "w.pth")
    assert not (tmp_path / "store").exists() and not Path("exploited").exists()


@pytest.mark.parametrize(
    ("arguments", "name", "reason"),
    [
        ([], "nowhere", "there is no classifiers/nowhere"),
        (["--weights", "nowhere.pth", "--arch", "resnet18"], "mine", "nowhere.pth does not exist"),
        ([], "../escape", "is no model name"),
    ],
)
def test_a_wrong_command_is_refused_without_a_traceback(arguments, name, reason):
    result = subprocess.run(["./archive.sh", name, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode in (1, 2) and reason in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a string", "holds a str"),
        (["a", "list"], "holds a list"),
        ({"batchSize": -3}, "batchSize"),
        ({"preprocessing": {"mean": [float("nan")] * 3}}, "preprocessing.mean"),
        ({"batchsize": 4}, "unknown key batchsize"),
        ({"explanations": {"defaults": {"method": "gradcam"}}}, "'gradcam' is unknown"),
        ({"explanations": {"defaults": {"method": "grad_cam", "layer": "layer9"}}}, "'layer9' is not allowed"),
        ({"explanations": {"defaults": {"target": 9}}}, "9 is not a class"),
        ({"preprocessing": {"resise": 3}}, "preprocessing.resise"),
        ({"preprocessing": {"mean": [0.5], "std": [0.5, 0.5, 0.5]}}, "mean and std"),
        ({"preprocessing": {"resize": 256, "crop": None}}, "without a crop"),
        ({"explanations": {"limits": {"seconds": 119}}}, "responseTimeout"),
        ({"explanations": {"defaults": {"methd": "ig"}}}, "unknown parameter 'methd'"),
        ({"maxWorkers": 2}, "2 workers hang with continuousBatching"),
        ({"minWorkers": 3}, "or the archive served under a second name"),
        ({"useJobTicket": True}, "useJobTicket breaks continuousBatching"),
        ({"asyncCommunication": True}, "asyncCommunication breaks continuousBatching"),
        ({"sequenceBatching": True}, "sequenceBatching breaks continuousBatching"),
    ],
)
def test_a_wrong_configuration_is_refused_naming_the_key(archive, tmp_path, content, reason):
    torch.save(mobilenet().state_dict(), tmp_path / "w.pth")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ArchiveError, match=re.escape(reason)):
        archive("--arch", ARCHITECTURE, "--weights", tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("option", "content", "reason"),
    [
        ("--config", b"a: [1", "config is not YAML"),
        ("--config", b"a: \xff", "config is not YAML"),
        ("--labels", b"\xff\xfe", "holds no labels"),
        ("--labels", b"", "holds no labels"),
        ("--model", b"raise SystemExit", "SystemExit"),
        ("--model", b"import nonexistent_package", "nonexistent_package"),
        ("--model", b"def broken(:", "invalid syntax"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(archive, tmp_path, option, content, reason):
    torch.save(mobilenet().state_dict(), tmp_path / "w.pth")
    path = tmp_path / option.strip("-")
    path.write_bytes(content)
    network = [] if option == "--model" else ["--arch", ARCHITECTURE]
    with pytest.raises(ArchiveError, match=re.escape(reason)):
        archive(*network, "--weights", tmp_path / "w.pth", option, path)


def test_only_classifiers_are_architectures(archive, tmp_path):
    torch.save(mobilenet().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ArchiveError, match="'fcn_resnet50' is unknown"):
        archive("--arch", "fcn_resnet50", "--weights", tmp_path / "w.pth")


def test_what_a_configuration_leaves_out_is_as_in_the_default_one(archive, tmp_path):
    torch.save(mobilenet().state_dict(), tmp_path / "w.pth")
    folder = unpacked(archive("--arch", ARCHITECTURE, "--weights", tmp_path / "w.pth"), tmp_path / "unpacked")
    content = yaml.safe_load((folder / "model-config.yaml").read_text())
    assert content["preprocessing"] == CONFIG["preprocessing"]
    assert (content["continuousBatching"], content["batchSize"], content["maxBatchDelay"]) == (True, 32, 1)
    assert (content["minWorkers"], content["maxWorkers"]) == (1, 1)


@pytest.mark.parametrize(
    ("given", "batching"),
    [
        ({"continuousBatching": False}, (False, 8, 20)),
        ({"continuousBatching": False, "batchSize": 2, "maxWorkers": 4}, (False, 2, 20)),
        ({"batchSize": 64}, (True, 64, 1)),
    ],
)
def test_a_configuration_chooses_its_batching(given, batching):
    content = complete(given)
    assert (content["continuousBatching"], content["batchSize"], content["maxBatchDelay"]) == batching
    settings = read_settings(content | {"classifier": {"architecture": "resnet18"}})
    assert settings.continuousBatching is batching[0] and settings.maxWorkers == given.get("maxWorkers", 1)


def as_saved_before_counters(model):
    return {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}


def test_weights_saved_before_batch_norms_counted_are_taken(archive, tmp_path):
    torch.manual_seed(0)
    model = get_model("resnet18", weights=None, num_classes=3)
    torch.save(as_saved_before_counters(model), tmp_path / "w.pth")
    loaded = Archive.load(archive("--arch", "resnet18", "--weights", tmp_path / "w.pth"))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.classifier.logits(x), model.eval()(x).detach(), rtol=1e-4, atol=1e-4)


def test_of_a_batch_norm_nothing_else_may_be_missing(tmp_path):
    state = as_saved_before_counters(get_model("resnet18", weights=None))
    del state["bn1.running_mean"]
    with pytest.raises(ArchiveError, match=r"1 tensors missing, such as bn1\.running_mean"):
        build_network("resnet18", tmp_path, state)


@pytest.fixture
def folder(archive, tmp_path):
    """An unpacked archive without labels."""
    torch.save(mobilenet().state_dict(), tmp_path / "w.pth")
    return unpacked(archive("--arch", ARCHITECTURE, "--weights", tmp_path / "w.pth"), tmp_path / "unpacked")


def test_classes_without_labels_are_called_by_their_indices(folder):
    loaded = Archive.load(folder)
    assert loaded.labels == ["0", "1", "2", "3"] and loaded.classes("2") == [2] and loaded.classes(None) == []


def test_an_archive_of_an_unknown_format_is_refused(folder):
    (folder / "archive.json").write_text(json.dumps({"format": 7}))
    with pytest.raises(ArchiveError, match=r"has the format 7, and .* reads 1; build it anew"):
        Archive.load(folder)


def test_an_archive_made_before_formats_were_told_is_loaded(folder):
    (folder / "archive.json").unlink()
    assert Archive.load(folder).classifier.classes == 4


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [("weights.safetensors", b"", "cannot be read"), ("model-config.yaml", None, "holds no model-config.yaml")],
)
def test_an_archive_that_lacks_a_part_is_refused(folder, name, content, reason):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(ArchiveError, match=reason):
        Archive.load(folder)


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "x.mar").write_bytes(b"PK no")
    with pytest.raises(ArchiveError, match="is no archive"):
        Archive.load(tmp_path / "x.mar")


def test_a_digest_tells_contents_apart_and_not_the_time_of_making(archive, tmp_path):
    torch.save(mobilenet().state_dict(), tmp_path / "w.pth")
    arguments = ("--arch", ARCHITECTURE, "--weights", tmp_path / "w.pth")
    first, second = (Archive.load(archive(*arguments)).digest for _ in range(2))
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
    assert first == second != Archive.load(archive(*arguments, "--labels", tmp_path / "labels.txt")).digest


@pytest.mark.live
def test_two_builds_at_once_do_not_disturb_each_other(tmp_path):
    torch.save(mobilenet().state_dict(), tmp_path / "w.pth")
    command = ["./archive.sh", "twin", "--arch", ARCHITECTURE, "--weights", str(tmp_path / "w.pth"), "--store", str(tmp_path)]
    builds = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [build.wait() for build in builds] == [0, 0]
    assert zipfile.ZipFile(tmp_path / "twin.mar").testzip() is None
    assert [path.name for path in tmp_path.glob("*.mar")] == ["twin.mar"] and not list(tmp_path.glob(".*.mar"))


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("l.json", '["x", "y"]', ["x", "y"]),
        ("l.json", '{"1": "y", "0": "x"}', ["x", "y"]),
        ("l.json", '{"0": ["n01", "x"], "1": ["n02", "y"]}', ["x", "y"]),
        ("l.txt", "x\n y \n\n", ["x", "y"]),
    ],
)
def test_labels_are_read_in_every_common_form(tmp_path, name, text, labels):
    (tmp_path / name).write_text(text)
    assert read_labels(tmp_path / name) == labels


def test_labels_with_a_gap_are_refused(tmp_path):
    (tmp_path / "l.json").write_text(json.dumps({"0": "x", "2": "y"}))
    with pytest.raises(ValueError, match="'1' has no label"):
        read_labels(tmp_path / "l.json")


def test_the_number_of_classes_is_that_of_the_weights(tmp_path):
    network = build_network(ARCHITECTURE, tmp_path, mobilenet(6).state_dict())
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 6)


def test_two_public_modules_without_a_model_are_refused(tmp_path):
    (tmp_path / "model.py").write_text(OWN_MODEL + "\nclass Other(Net):\n    pass\n")
    with pytest.raises(ValueError, match="Net, Other"):
        build_network("model.py", tmp_path, small_cnn().state_dict())


def test_a_network_of_timms_is_built_by_name(tmp_path):
    timm = pytest.importorskip("timm")
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    network = build_network("timm/test_resnet", tmp_path, state)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    with pytest.raises(ValueError, match="unknown to timm"):
        build_network("timm/no_such_net", tmp_path, state)


def test_timm_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm is not installed"):
        build_network("timm/test_resnet", tmp_path, {})
