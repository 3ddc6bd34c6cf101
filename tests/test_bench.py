"""The bench: contests that end, ratios that are told, and the gate that compares them."""

import multiprocessing
from functools import partial

import pytest
import torch

from bench import gate, growth, tables
from bench.contest import ContestResult, Ready, _take_turn, agreement, compete, contestants
from bench.ours import PATH, PATHS, SENSITIVITIES, WORKS, Outcome
from bench.server import quantile
from bench.subjects import subject
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
    assert gate.fallen([line(1.7), line(2.5, "floor")], before) == []
    (told,) = gate.fallen([line(1.5), line(2.5, "floor")], before)
    assert "captum" in told and "1.50x, was 2.00x" in told


def test_what_was_not_measured_before_passes_the_gate():
    assert gate.fallen([line(0.1, "zennit")], [line(2.0)]) == []
    assert gate.fallen([line(0.1)], [line(None, refusal="it cannot")]) == []


def test_a_contest_has_the_engine_first_and_a_floor_where_there_is_one():
    names = {work: [contestant.name for contestant in contestants(work)] for work in (*WORKS, *SENSITIVITIES)}
    assert all(found[0] == "ours" and len(found) > 1 for found in names.values())
    assert names["grad_cam"] == ["ours", "ours, bfloat16", "captum", "captum, tuned", "pytorch-grad-cam"]
    assert names["occlusion"][1:4] == ["ours, bfloat16", "ours, torch", "floor, compiled"]
    assert names["lrp"][-1] == "zennit"
    assert "floor" in names["integrated_gradients, 50 steps"]


@pytest.mark.live
def test_contestants_run_in_turns_agree_and_say_why_they_cannot():
    found = by_name(compete(partial(subject, "resnet18", 1), "grad_cam", threads=1, repeats=2, budget=60))
    ours = found["ours"]
    assert ours.ready.outcome.rows == 1
    for result in found.values():
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
