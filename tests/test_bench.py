"""The bench: contests that end, ratios that are told, and the gate that compares them."""

import json
import multiprocessing
import shutil
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch._inductor import config as inductor

from bench import floor, gate, growth, machine, server, tables
from bench.__main__ import plan
from bench.captured import captured, compiled_gradient, own_gradient
from bench.contest import ContestResult, Ready, _take_turn, agreement, compete, contestants
from bench.floor import GRADIENT_ROWS
from bench.ours import PATH, PATHS, SENSITIVITIES, WORKS, Outcome
from bench.roofline import Cost, cost
from bench.server import quantile
from bench.subjects import subject
from torchserve_explain.archive import has_bfloat16
from torchserve_explain.servers.torchserve import registered


def line(ratio, contestant="captum", **other):
    known = {"network": "resnet18", "batch": 1, "work": "grad_cam", "refusal": None, "rows": 1, "memory_mb": 2.0}
    return (
        known
        | {"contestant": contestant, "ratio": ratio, "seconds": ratio, "chunk": None, "error": None, "cosine": None}
        | other
    )


def by_name(results):
    return {result.contestant: result for result in results}


def test_a_ratio_that_fell_is_named_and_noise_is_not():
    before = [line(2.0), line(3.0, "floor")]
    assert gate.fallen([line(1.7), line(2.5, "floor")], before) == {}
    (told,) = gate.fallen([line(1.5), line(2.5, "floor")], before).values()
    assert "captum" in told and "1.50x, was 2.00x" in told


def test_what_was_not_measured_before_passes_the_gate():
    assert gate.fallen([line(0.1, "zennit")], [line(2.0)]) == {}
    assert gate.fallen([line(0.1)], [line(None, refusal="it cannot")]) == {}
    (told,) = gate.fallen([line(None, refusal="out of memory")], [line(2.0)]).values()
    assert "out of memory, was 2.00x" in told


def test_the_gate_measures_what_fell_a_second_time_before_it_tells():
    before, asked = [line(2.0), line(None, "zennit", least=1.2), line(2.0, work="saliency")], []

    def again(*ratios):
        def measure(*contest):
            asked.append(contest)
            return [line(ratios[0]), line(ratios[1], "zennit")]

        return measure

    found = [line(1.5), line(1.3, "zennit"), line(1.9, work="saliency")]
    assert gate.confirmed(found, before, again(2.1, 1.1)) == []  # neither fell twice
    assert asked == [("resnet18", 1, "grad_cam")]
    (told,) = gate.confirmed(found, before, again(1.4, 1.3))
    assert "1.50x, was 2.00x" in told and "again" in told and "1.40x" in told
    (told,) = gate.confirmed([line(1.1, "zennit")], before, again(2.1, 1.0))
    assert "at least 1.20x" in told
    assert gate.confirmed([line(2.0)], before, lambda *contest: pytest.fail(f"{contest} is measured again")) == []


def test_the_committed_gate_has_a_least_ratio_for_each_quick_contest():
    lines = json.loads((ROOT / "docs" / "bench" / "gate.json").read_text())["results"]
    assert [(one["network"], one["batch"], one["work"]) for one in lines] == plan(quick=True)
    assert all(one["contestant"] == "captum" and one["least"] > 0 for one in lines)


def test_a_contest_has_the_engine_first_and_a_floor_where_there_is_one():
    names = {work: [contestant.name for contestant in contestants(work)] for work in (*WORKS, *SENSITIVITIES)}
    assert all(found[0] == "ours" and len(found) > 1 for found in names.values())
    assert names["grad_cam"] == ["ours", "ours, bfloat16", "ours, torch", "captum", "captum, tuned", "pytorch-grad-cam"]
    assert names["occlusion"][1:4] == ["ours, bfloat16", "ours, torch", "floor, compiled"]
    assert names["lrp"][-1] == "zennit"
    assert names["integrated_gradients, 50 steps"][-2:] == ["floor", "floor, compiled"]


@pytest.mark.live
def test_contestants_run_in_turns_agree_and_say_why_they_cannot():
    found = by_name(compete(partial(subject, "resnet18", 1), "grad_cam", threads=1, repeats=2, budget=60))
    ours = found["ours"]
    assert ours.ready.outcome.rows == 1
    narrow = found["ours, bfloat16"]
    assert (narrow.refusal == "this processor has no bfloat16") is not has_bfloat16("cpu")
    for result in found.values():
        if result is narrow and narrow.refusal:
            continue
        assert len(result.seconds) == 2 and result.median > 0
        agreed = agreement(ours.ready.outcome.maps, result.ready.outcome.maps)
        assert agreed is not None and agreed > 0.98
    refused = by_name(compete(partial(subject, "resnet18", 1), "deep_lift", threads=1, repeats=1, budget=60))
    assert "ReLU" in refused["captum"].refusal
    assert refused["ours"].ready.outcome.error < 1e-3


def test_a_contestant_whose_process_ends_is_told_and_the_others_go_on():
    mine, theirs = multiprocessing.Pipe()
    theirs.send(1.5)
    result = ContestResult("captum", Ready(memory=3.0, chunk=None, outcome=Outcome(None)))
    _take_turn(result, mine)
    assert (result.seconds, result.refusal) == ([1.5], None)
    theirs.close()
    _take_turn(result, mine)
    assert result.refusal and "ended" in result.refusal and result.ready is None


def test_maps_that_differ_in_number_have_no_agreement():
    assert agreement(torch.ones(1, 2, 2), torch.ones(2, 2, 2)) is None
    assert agreement(torch.ones(1, 2, 2), -torch.ones(1, 2, 2)) == pytest.approx(-1)


def test_the_table_tells_ratios_and_refusals():
    text = tables.markdown({"threads": "1"}, [line(1.0, "ours"), line(2.5), line(None, "zennit", refusal="no | rule")])
    assert "**2.50**" in text and "no / rule" in text and "### resnet18, 1 image\n" in text


def test_quantiles_and_names():
    assert quantile(range(100), 0.99) == 99
    assert quantile([3.0], 0.5) == 3.0
    assert registered("why=imagenet") == ("why", "imagenet")
    assert registered("imagenet") == ("imagenet", "imagenet")


def test_growth_changes_one_thing_at_a_time_and_its_table_has_a_line_for_each_value():
    given, work = growth.contest("pixels a side", 160)
    small = given()
    assert small.images.shape == (1, 3, 160, 160) and work == PATH
    given, _ = growth.contest("classes", 10)
    assert given().classifier.classes == 10
    given, work = growth.contest("steps", 200)
    assert PATHS[work] == 200
    given, _ = growth.contest("images", 4)
    assert len(given().images) == len(given().targets) == 4
    ready = Ready(memory=3.0, chunk=None, outcome=Outcome(None))
    results = [ContestResult("ours", ready, seconds=[2.0]), ContestResult("captum", refusal="out of memory")]
    text = tables.growth({"threads": "1"}, "resnet18", list(growth.lines("images", 4, results)))
    assert text.splitlines()[-1] == "| 4 images | 2 / 3 | out of memory |"


def small(channels=4):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, channels, 3, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(channels * 4, 5)).requires_grad_(False)


def test_a_captured_gradient_is_the_networks_own_whatever_the_rows():
    network, rows = small(), torch.randn(2, 3, 9, 9)
    graph = captured(own_gradient(network, 1), torch.zeros_like(rows))
    torch.testing.assert_close(graph(rows), own_gradient(network, 1)(rows.clone().requires_grad_()))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_compiled_gradient_is_the_networks_own():
    network, rows = small(), torch.randn(2, 3, 9, 9)
    found = compiled_gradient(network, torch.ones_like(rows), 1)(rows)
    torch.testing.assert_close(found, own_gradient(network, 1)(rows.clone().requires_grad_()))


def test_a_compiled_gradient_that_is_another_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph, **_: lambda rows: 1.01 * graph(rows))
    with pytest.raises(ValueError, match=r"differs by 1\.0e-02"):
        compiled_gradient(small(), torch.ones(2, 3, 9, 9), 1)


def test_a_missing_compiler_is_told():
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.raises(Exception, match="compiler"),
    ):
        compiled_gradient(small(), torch.ones(2, 3, 9, 9), 1)


@pytest.mark.parametrize("work", GRADIENT_ROWS)
@pytest.mark.parametrize("batch", [1, 8])
def test_the_compiled_floor_runs_a_works_rows_and_none_beyond(work, batch, monkeypatch):
    ran = []
    monkeypatch.setattr(floor, "compiled_gradient", lambda *_: lambda rows: ran.append(len(rows)))
    given: Any = SimpleNamespace(classifier=SimpleNamespace(_model=None), images=torch.zeros(batch, 3, 2, 2), targets=[0])
    assert floor.compiled_gradient_run(work, given, None)().rows == sum(ran) == floor.rows_of(work, given)
    assert max(ran) <= 16


def test_a_convolutions_multiply_adds_and_a_linear_layers_bytes_are_their_closed_forms():
    convolution = nn.Conv2d(4, 6, 3, padding=1, groups=2).requires_grad_(False)
    forward, both = (cost(convolution, torch.ones(1, 4, 5, 7), gradient) for gradient in (False, True))
    assert forward.multiply_adds == 5 * 7 * 6 * 2 * 9 and both.multiply_adds == 2 * forward.multiply_adds
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU()).requires_grad_(False)
    forward, both = (cost(linear, torch.ones(1, 3, 2, 2), gradient) for gradient in (False, True))
    assert forward == Cost(60, row_bytes=4 * (12 + 5), weight_bytes=4 * (60 + 5))
    assert both == Cost(120, row_bytes=8 * (12 + 5), weight_bytes=8 * (60 + 5))


def test_the_roofline_is_what_takes_longer():
    found = Cost(multiply_adds=100, row_bytes=10, weight_bytes=30)
    assert found.seconds(rows=6, passes=2, speed=machine.Speed(multiply_adds=50, bytes=1000)) == 12
    assert found.seconds(rows=6, passes=2, speed=machine.Speed(multiply_adds=1000, bytes=60)) == 2


def test_the_machines_speed_is_that_of_one_product_and_of_one_copy(monkeypatch):
    monkeypatch.setattr(machine, "SIDE", 4)
    monkeypatch.setattr(machine, "COPIED", 64)
    monkeypatch.setattr(machine, "_best", lambda run: run() is not None and 0.5)
    before = torch.get_num_threads()
    assert machine.speed.__wrapped__(1) == machine.Speed(multiply_adds=128, bytes=256)
    assert torch.get_num_threads() == before


def test_the_table_tells_how_far_above_the_roofline_and_is_made_without_it():
    text = tables.markdown({}, [line(1.0, "ours", roofline=0.4), line(2.5), line(None, "zennit", refusal="no")])
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert "ours / roofline" in rows[0] and all("| 1 | 2.50 |" in row for row in rows[2:])
    assert len({row.count("|") for row in rows}) == 1
    kept = json.loads((ROOT / "docs" / "bench" / "library.json").read_text())
    assert "ours / roofline" in tables.markdown(kept["machine"], kept["results"])


def served(kind, clients, handler, rate, **other):
    figures = {"p50": 0.5, "p99": 1.0, "bytes": 100.0 * rate, "processor_seconds": 0.1}
    return {"network": kind, "clients": clients, "handler": handler, "rate": rate} | figures | other


def test_the_servers_table_tells_each_handler_beside_the_stock_one():
    lines = [
        served("resnet18", n, handler, n * rate)
        for n in (1, 16)
        for handler, rate in (("ours", 6), ("ours, torch", 3), ("stock", 2))
    ]
    rows = [row for row in tables.server({"machine": {}, "predictions": lines}).splitlines() if row.startswith("| resnet18")]
    assert [row.split(" | ")[4] for row in rows] == ["**3.00**", "**1.50**"] * 2
    assert rows[1].startswith("| resnet18 | 1 | ours, torch | 3 / 2 |")
    kept = json.loads((ROOT / "docs" / "bench" / "server.json").read_text())
    assert tables.server(kept).count("| ours |") == 6 and "predictions" not in tables.server(kept)


def test_one_part_of_the_servers_bench_leaves_the_other_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "describe", lambda _: {"threads": "1"})
    monkeypatch.setattr(
        server, "measured", lambda kind, part, _: [served(kind, 1, name, 2.0) for name in (*part.configs, "stock")]
    )
    kept = tmp_path / "run" / "bench" / "server.json"
    monkeypatch.setattr("sys.argv", ["server"])
    server.main()
    both = json.loads(kept.read_text())
    assert [line["handler"] for line in both["predictions"]] == ["ours", "ours, torch", "stock"]
    monkeypatch.setattr(server, "measured", lambda kind, part, _: [served(kind, 1, name, 4.0) for name in ("ours", "stock")])
    monkeypatch.setattr("sys.argv", ["server", "--only", "predictions"])
    server.main()
    now = json.loads(kept.read_text())
    assert now["explanations"] == both["explanations"] and [line["rate"] for line in now["predictions"]] == [4.0, 4.0]
