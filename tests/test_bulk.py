"""A lake explained on Ray: the rows are what the local engine records, nothing is lost, and nothing is made twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from ipaddress import ip_address

import numpy as np
import psutil
import pytest
import test_explain_folder as folder
from conftest import ROOT
from live import build_small, picture

from torchserve_explain.bulk.loopback import stay_on_loopback
from torchserve_explain.cli import main
from torchserve_explain.records import read_records

stay_on_loopback()  # before anything imports Ray
pa = pytest.importorskip("pyarrow")
ray = pytest.importorskip("ray")
from pyarrow import parquet  # noqa: E402

from torchserve_explain.bulk import run, sources  # noqa: E402
from torchserve_explain.bulk.lake import SCHEMA, Lake, LakePlace  # noqa: E402

pytestmark = pytest.mark.live
METHODS = ["grad_cam", "integrated_gradients"]
EXPLAINER = "ray::MapWorker(MapBatches(LakeExplainer))"
MANY = 48
STOPPED = """
import sys
from torchserve_explain.bulk.loopback import stay_on_loopback
stay_on_loopback()
from torchserve_explain.bulk import run
from torchserve_explain.cli import main
run.ROWS = 4
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One Ray for every run of this process, of as many cores wherever it runs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(ROOT / "handlers"))
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
        patched.setattr(run, "cluster", nullcontext)
        yield
    ray.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    build_small(tmp_path_factory.mktemp("small"), store)
    return store


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Pictures of two classes, and a file that is no picture."""
    data = tmp_path_factory.mktemp("data")
    for number in range(8):
        path = data / ("ant", "cat")[number % 2] / f"photo #{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(number, (200, 240)))
    (data / "cat" / "broken.png").write_bytes(b"not a picture")
    return data


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Pictures for some seconds."""
    data = tmp_path_factory.mktemp("many")
    for number in range(MANY):
        (data / f"{number}.jpg").write_bytes(picture(number))
    return data


@pytest.fixture(scope="module")
def local(tmp_path_factory, store, labelled):
    """What the local engine makes of the same pictures."""
    out = tmp_path_factory.mktemp("local") / "out"
    assert folder.command(store, labelled, out) == 0
    return out


@pytest.fixture(scope="module")
def out(tmp_path_factory, store, labelled):
    out = tmp_path_factory.mktemp("lake") / "out"
    assert command(store, labelled, out, "--overlays") == 0
    return out


def command(store, data, out, *more):
    return folder.command(store, data, out, "--engine", "ray", "--actors", "2", *more)


def rows(out):
    """The rows by picture and map, of which each must be there once."""
    told = parquet.read_table(out / "maps").to_pylist()
    found = {(row["path"], row["map"]): row for row in told}
    assert len(found) == len(told)
    return found


def values(row):
    return np.frombuffer(row["values"], row["dtype"]).reshape(row["shape"]).astype(np.float64)


def alike(one, other):
    return np.linalg.norm(one - other) <= 2e-3 * np.linalg.norm(one)  # float16, and sums in another order


def test_rows_are_what_the_local_engine_records(out, local):
    found, records = rows(out), read_records(local / "records.jsonl")
    assert {key for key, row in found.items() if row["failed"] is None} == {(r["path"], r["map"]) for r in records}
    for record in records:
        row = found[record["path"], record["map"]]
        for name in record.keys() - {"parameters"}:
            expected = pytest.approx(record[name], rel=1e-3) if isinstance(record[name], float) else record[name]
            assert row[name] == expected, name
        assert json.loads(row["parameters"]) == record["parameters"]
        assert alike(values(row), folder.stored(local, record).astype(np.float64)) and row["dtype"] == "float16"
        assert (row["width"], row["height"], len(row["crop"])) == (200, 240, 4)
        assert row["overlay"][8:12] == row["seen"][8:12] == b"WEBP" and len(row["archive"]) == 64


def test_a_picture_that_fails_is_a_row_that_says_why(out):
    failed = [row for row in rows(out).values() if row["failed"] is not None]
    assert [(row["path"], row["map"]) for row in failed] == [("cat/broken.png", name) for name in METHODS]
    assert "not an image that can be decoded" in failed[0]["failed"] and failed[0]["values"] is None


def test_only_what_is_missing_changed_or_failed_is_made(store, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for number in range(4):
        (data / f"{number}.jpg").write_bytes(picture(number))

    def made(*more):
        capsys.readouterr()
        assert command(store, data, out, *more) == 0
        rows(out)
        return int(re.findall(r"^(\d+) maps made", capsys.readouterr().out, re.M)[0])

    assert made() == 8 and made() == 0
    (data / "1.jpg").write_bytes(picture(9))
    (data / "new.jpg").write_bytes(b"half of a pict")
    assert made("--set", "steps=5") == 5 + 0 * 2  # Integrated Gradients of four, Grad-CAM of the changed one
    assert {row["failed"] is None for key, row in rows(out).items() if key[0] == "new.jpg"} == {False}
    (data / "new.jpg").write_bytes(picture(10))
    assert made("--set", "steps=5") == 2 and not any(row["failed"] for row in rows(out).values())
    assert len(rows(out)) == 10


def test_parquet_is_read_row_by_row(store, labelled, out, tmp_path):
    names = sorted(path.relative_to(labelled).as_posix() for path in labelled.rglob("*.jpg"))
    images = [(labelled / name).read_bytes() for name in names]
    columns = {"path": [*names, "empty"], "image": [*({"bytes": image} for image in images), None]}
    columns["label"] = [*(name.split("/")[0] for name in names), "ant"]
    parquet.write_table(pa.table(columns), tmp_path / "lake.parquet", row_group_size=3)
    assert command(store, tmp_path / "lake.parquet", tmp_path / "out", "--methods", "grad_cam") == 0
    found, before = rows(tmp_path / "out"), rows(out)
    assert found.pop(("empty", "grad_cam"))["failed"] == "it cannot be read: the row holds no image"
    assert {path for path, _ in found} == set(names)
    for key, row in found.items():
        assert alike(values(row), values(before[key])) and row["label"] == key[0].split("/")[0]


def test_s3_is_read_and_written(store, labelled, out, tmp_path, capsys):
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        options = f"?scheme=http&endpoint_override=127.0.0.1%3A{server.get_host_and_port()[1]}&allow_bucket_creation=true"
        system, _ = pa.fs.FileSystem.from_uri(f"s3://key:secret@lake/{options}")
        system.create_dir("lake")
        for path in labelled.rglob("*.*"):
            with system.open_output_stream(f"lake/in/{path.relative_to(labelled).as_posix()}") as stream:
                stream.write(path.read_bytes())
        places = f"s3://key:secret@lake/in{options}", f"s3://key:secret@lake/out{options}"
        assert command(store, *places) == 0 and command(store, *places) == 0
        told = capsys.readouterr().out
        assert "16 maps made: s3://lake/out\n" in told and "0 maps made" in told and "secret" not in told
        found = {(row["path"], row["map"]): row for row in Lake(LakePlace(places[1])).rows(SCHEMA.names)}
    finally:
        server.stop()
    assert found.keys() == rows(out).keys()
    assert all(row["failed"] or alike(values(row), values(rows(out)[key])) for key, row in found.items())


def test_an_actor_that_is_killed_loses_nothing(store, many, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROWS", 4)
    out = tmp_path / "out"
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(command, store, many, out, "--methods", "integrated_gradients", "--set", "steps=50")
        wait_for(lambda: list(out.glob("maps/*.parquet")))
        victim = next(one for one in psutil.Process().children(recursive=True) if EXPLAINER in " ".join(one.cmdline()))
        victim.kill()
        assert len(list(out.glob("maps/*.parquet"))) < MANY / 4
        assert running.result() == 0
    assert len(rows(out)) == MANY and not any(row["failed"] for row in rows(out).values())


def test_a_run_that_is_stopped_goes_on_and_listens_on_loopback_alone(store, many, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["explain", "small", "--store", store, "--data", many, "--out", out, "--engine", "ray"]
    given += ["--methods", "integrated_gradients", "--set", "steps=50"]
    own = {**os.environ, "PYTHONPATH": str(ROOT / "handlers")}
    with subprocess.Popen([sys.executable, "-c", STOPPED, *map(str, given)], env=own, stderr=-1, text=True) as process:
        wait_for(lambda: process.poll() is not None or list(out.glob("maps/*.parquet")))
        ours = {one.pid for one in psutil.Process(process.pid).children(recursive=True)}
        found = [one for one in psutil.net_connections("tcp") if one.pid in ours and one.status == psutil.CONN_LISTEN]
        process.send_signal(signal.SIGINT)
        told = process.communicate()[1]
    assert process.returncode == 130 and "goes on where it was" in told
    assert found and all(ip_address(one.laddr.ip.removeprefix("::ffff:")).is_loopback for one in found)
    before = len(rows(out))
    assert 0 < before < MANY
    assert command(store, many, out, "--methods", "integrated_gradients", "--set", "steps=50") == 0
    assert f"{MANY - before} maps made" in capsys.readouterr().out and len(rows(out)) == MANY


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_gallery_is_built_of_a_lake(out, local, tmp_path, capsys):
    assert main(["gallery", str(out), "--out", str(tmp_path / "pages")]) == 0
    folder.test_every_link_leads_somewhere_and_nothing_comes_from_elsewhere(tmp_path / "pages")
    told = {(r["path"], r["map"]): r["parameters"] for r in read_records(tmp_path / "pages" / "records.jsonl")}
    assert told == {(r["path"], r["map"]): r["parameters"] for r in read_records(local / "records.jsonl")}
    assert {path.name for path in (tmp_path / "pages" / "means").iterdir()} == {p.name for p in (local / "means").iterdir()}
    overview = (tmp_path / "pages" / "index.html").read_text()
    assert "8 pictures of 2 classes" in overview and "Skipped: 1" in overview and "cat/broken.png" in overview
    assert main(["gallery", str(out), "--out", str(tmp_path / "few"), "--sample", "3"]) == 0
    assert len(list((tmp_path / "few" / "pictures").rglob("grad_cam.npy"))) in (2, 3)  # one may be the broken one
    assert main(["gallery", str(local), "--out", str(tmp_path / "none")]) == 1
    assert "allowed: what explain --engine ray has written" in capsys.readouterr().err


def test_a_page_is_written_nowhere_else_and_not_without_pictures(out, tmp_path, capsys):
    told = rows(out)["ant/photo #0.jpg", "grad_cam"]
    for name, changed, said in (
        ("up", {"path": "../../up.jpg"}, "without . and .."),
        ("bare", {"overlay": None}, "--overlays"),
    ):
        lake = Lake(LakePlace(str(tmp_path / name)))
        lake.write_about(json.loads((out / "about.json").read_text()))
        lake.add(pa.Table.from_pylist([told | changed], SCHEMA))
        assert main(["gallery", str(tmp_path / name), "--out", str(tmp_path / "pages" / name)]) == 1
        assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("up.jpg"))


def test_the_same_rows_twice_are_one_file(out, tmp_path):
    lake, table = Lake(LakePlace(str(tmp_path))), parquet.read_table(out / "maps")
    for _ in range(2):
        lake.add(table)
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "maps").iterdir()) == ["failed", "maps"]
    assert len(rows(tmp_path)) == table.num_rows


def test_subfolders_that_are_no_labels_are_told(store, tmp_path, capsys):
    (tmp_path / "in" / "2024").mkdir(parents=True)
    (tmp_path / "in" / "2024" / "one.jpg").write_bytes(picture())
    source = sources.find(LakePlace(str(tmp_path / "in")), ["ant"])
    assert source.items["label"].to_pylist() == [None] and "'2024' is no label" in (source.unlabelled or "")
    assert command(store, tmp_path / "in", tmp_path / "out", "--target", "label") == 1
    assert "the pictures have no labels: subfolder '2024'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"path": ["a"]}, "the column image is missing or of another type; allowed: path (text), image (bytes"),
        ({"path": [1], "image": [b""]}, "the column path is missing or of another type"),
        ({"path": ["a", "a"], "image": [b"", b""]}, "a path of its own for each row"),
        ({"path": ["a"], "image": [b""], "label": ["anp"]}, "label 'anp' is no label of the classifier; allowed: ant"),
    ],
)
def test_parquet_of_other_columns_is_refused(store, tmp_path, capsys, columns, said):
    parquet.write_table(pa.table(columns), tmp_path / "lake.parquet")
    assert command(store, tmp_path / "lake.parquet", tmp_path / "out") == 1
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_cannot_be_is_refused(store, many, tmp_path, capsys):
    def refused(*given):
        assert command(store, *given) == 1
        return capsys.readouterr().err

    (tmp_path / "data").mkdir()
    assert "holds neither; allowed: names that end in" in refused(tmp_path / "data", tmp_path / "out")
    assert "lies inside" in refused(many, many / "out")
    (tmp_path / "data" / "notes.txt").touch()
    assert "holds something else" in refused(many, tmp_path / "data")
    assert "allowed: at most 2" in refused(many, tmp_path / "out", "--actors", "3")
    assert "'grad_cat' is unknown" in refused(many, tmp_path / "out", "--methods", "grad_cat")
    assert "cannot be opened" in refused("ftp://nowhere/in", tmp_path / "out")


def test_rows_of_a_large_row_group_are_told_apart(tmp_path):
    images = [bytes([number]) for number in range(80)]
    parquet.write_table(pa.table({"path": list(map(str, range(80))), "image": images}), tmp_path / "lake.parquet")
    place = LakePlace(str(tmp_path / "lake.parquet"))
    (portion,) = sources.portions(sources.find(place, []).items.take([1, 40, 79]))
    assert dict(sources.read(place, portion)) == {0: b"\x01", 1: b"\x28", 2: b"\x4f"}
