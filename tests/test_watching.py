"""Metrics, alerts and the dashboard: checked by Prometheus' own tools, against each other, and beside a live server."""

import json
import os
import re
import signal
import time

import httpx
import pytest
import yaml
from conftest import ROOT
from live import build_small, picture, served
from watch import alerts, composed, dashboard_queries, declared, metric_names, prometheus, run, tool

DEPLOY = ROOT / "deploy"


def test_rules_by_their_own_tool():
    run("promtool", "check", "config", DEPLOY / "prometheus.yml")
    run("promtool", "test", "rules", DEPLOY / "alerts_test.yml")


def test_every_alert_is_tried_and_says_what_to_do():
    [group] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    tried = yaml.safe_load((DEPLOY / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tried for case in test["alert_rule_test"] if case["exp_alerts"]}
    quiet = {case["alertname"] for test in tried for case in test["alert_rule_test"] if not case["exp_alerts"]}
    assert {rule["alert"] for rule in group["rules"]} == fired == quiet
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("page", "ticket") and set(rule["annotations"]) == {"summary", "action"}


def test_what_is_asked_for_is_measured():
    [group] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    queries = [*(rule["expr"] for rule in group["rules"]), *dashboard_queries(".*", "5m")]
    for query in queries:
        for name in metric_names(query, declared()):
            labels = {"Method", "Status", "Kind", "Stage"} & set(re.findall(r"\w+", " ".join(re.findall(r"by \(.*?\)", query))))
            assert name == "up" or labels <= set(declared()[name][1]), (query, name)


def test_dashboard_by_its_model():
    board = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    assert board["schemaVersion"] >= 36 and board["uid"] == "torchserve-explain" and board["title"]
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    source = yaml.safe_load((DEPLOY / "grafana" / "datasource.yml").read_text())["datasources"][0]
    cells = set()
    for panel in panels:
        assert panel["type"] == "timeseries" and panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        letters = [target["refId"] for target in panel["targets"]]
        assert letters and len(set(letters)) == len(letters) and all(target["expr"] for target in panel["targets"])
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not own & cells
        cells |= own
    [variable] = board["templating"]["list"]
    assert metric_names(variable["definition"], declared()) and variable["datasource"]["uid"] == source["uid"]


def test_the_dashboards_queries_by_prometheus_parser(tmp_path):
    rules = [{"record": f"panel:{index}", "expr": query} for index, query in enumerate(dashboard_queries(".*", "5m"))]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in run("promtool", "check", "rules", path)


@pytest.mark.live
def test_watching_a_server(tmp_path):
    """Each query of the dashboard is answered, with values where its metrics are; a killed worker is found."""
    build_small(tmp_path, tmp_path)
    with (
        served(["small"], tmp_path, tmp_path / "run") as server,
        prometheus(tool("prometheus"), tmp_path, server.metrics.removeprefix("http://")) as watcher,
        httpx.Client(base_url=server.inference, timeout=60) as client,
    ):
        for method in ("grad_cam", "integrated_gradients", "nonsense", "grad_cam") * 4:
            client.post("/explanations/small", files={"data": picture()}, data={"method": method})
            client.post("/predictions/small", files={"data": picture()})
        present = set(re.findall(r"^\w+", httpx.get(f"{server.metrics}/metrics").text, re.M))
        watcher.wait("sum(rate(ExplainSeconds_count[20s])) > 0")
        empty = []
        for query in dashboard_queries(".*", "30s"):
            values = watcher.query(query)  # a query that is wrong fails here
            names = {name for name in metric_names(query, declared()) if name != "up"}
            if not values and all(any(one.startswith(name) for one in present) for name in names):
                empty.append(query)
        assert not empty
        [worker] = httpx.get(f"{server.management}/models/small").json()[0]["workers"]
        assert not alerts(watcher)
        os.kill(worker["pid"], signal.SIGKILL)
        watcher.wait('ALERTS{alertname="WorkerRestarted"}', seconds=90)


# What load does not move: the machine's, told once a minute, and the fraction of a bucket that one picture's errors share.
STILL = {"MemoryUsed", "CPUUtilization", "GPUUtilization", "ExplainCompletenessError"}


@pytest.mark.live
def test_the_compose_file_by_hand(tmp_path):
    """Asked through the proxy with tokens on, the dashboard's values move; a killed worker is found in them."""
    with composed(tmp_path) as everything:
        watcher, since, end = everything.watcher, time.time(), time.monotonic() + 300
        with everything.asked():
            while still := unmoved(everything, since):
                assert time.monotonic() < end, still
                time.sleep(1)
        assert watcher.query('ExplainRefusals{Status="400"} > 0')
        killed, since = everything.worker(), time.time()
        os.kill(killed, signal.SIGKILL)
        watcher.wait('ALERTS{alertname="WorkerRestarted"}', seconds=180)
        everything.worker(killed)
        (restarts,) = (query for query in dashboard_queries(".*", "20s") if "WorkerLoadTime" in query)
        watcher.wait(f"({restarts}) > 0", seconds=180)  # what a new worker tells is collected a little later
        answer = everything.client.post("/predictions/small", files={"data": picture()})
        assert answer.status_code == 200


def unmoved(everything, since):
    """Return the dashboard's queries of what the server tells whose values are always the same."""
    present = set(re.findall(r"^\w+", httpx.get(f"{everything.server.metrics}/metrics").text, re.M))
    still = []
    for query in dashboard_queries(".*", "20s"):
        names = metric_names(query, declared())
        there = all(any(one.startswith(name) for one in present) for name in names)
        moving = not names & {*STILL, "WorkerLoadTime", "Requests5XX", "up"}
        if there and moving and all(len(set(series)) == 1 for series in everything.watcher.values(query, since)):
            still.append(query)
    return still
