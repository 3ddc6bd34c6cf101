"""The bench's results as a table and as a plot."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]
PEERS = ("ours, bfloat16", "captum", "captum, tuned", "pytorch-grad-cam", "zennit", "floor", "ours, torch", "floor, compiled")
HEAD = "| work | ours, s | ours / roofline | peer | peer, s | ratio | memory ours / peer, MB | error ours / peer | cosine |"


def write(path: Path, results: Mapping[str, Any], table: str) -> None:
    """Write results beside their table, as PATH.json and PATH.md, and print the table."""
    path.with_suffix(".json").write_text(json.dumps(results, indent=1))
    path.with_suffix(".md").write_text(table)
    print(table)


def contest_of(line: Line) -> tuple[str, int, str]:
    """Return what contestants have in common."""
    return line["network"], line["batch"], line["work"]


def markdown(machine: Mapping[str, str], lines: Sequence[Line]) -> str:
    """Return a table for each network and batch; a ratio above 1 says that the peer takes longer."""
    text = [", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    for (network, batch), group in groupby(lines, key=lambda line: (line["network"], line["batch"])):
        text += [f"### {network}, {batch} image{'s' * (batch > 1)}", "", HEAD, "|---|---|---|---|---|---|---|---|---|"]
        for _, contest in groupby(group, key=contest_of):
            ours, *peers = contest
            text += [_row(ours, peer) for peer in peers]
        text.append("")
    return "\n".join(text)


def _row(ours: Line, peer: Line) -> str:
    work = ours["work"] + (f" ({ours['rows']} rows)" if ours["rows"] else "")
    above = f"{ours['seconds'] / ours['roofline']:.2f}" if ours.get("roofline") else ""  # of works with a known number of rows
    if peer["refusal"]:
        return (
            f"| {work} | {ours['seconds']:.3g} | {above} | {peer['contestant']} | {peer['refusal'].replace('|', '/')} | | | | |"
        )
    name = peer["contestant"] + (f", {peer['chunk']} rows a pass" if peer["chunk"] else "")
    error = " / ".join("" if line["error"] is None else f"{line['error']:.1%}" for line in (ours, peer)).strip(" /")
    cosine = "" if peer["cosine"] is None else f"{peer['cosine']:.4f}"
    return (
        f"| {work} | {ours['seconds']:.3g} | {above} | {name} | {peer['seconds']:.3g} | **{peer['ratio']:.2f}** "
        f"| {ours['memory_mb']:.0f} / {peer['memory_mb']:.0f} | {error} | {cosine} |"
    )


def _shown(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    """Yield each contest of one image with its peers that have a ratio."""
    for (network, batch, work), contest in groupby(lines, key=contest_of):
        peers = [line for line in contest if line["contestant"] in PEERS and line.get("ratio")]
        if batch == 1 and peers:
            yield f"{work}\n{network}", peers


def plot(lines: Sequence[Line], path: Path) -> None:
    """Draw how many times longer each peer takes, one image at a time."""
    from matplotlib.figure import Figure

    shown = list(_shown(lines))[::-1]
    figure = Figure(figsize=(9, 0.55 * len(shown) + 1.5), layout="constrained")
    axes = figure.subplots()
    for number, (_, peers) in enumerate(shown):
        for place, peer in enumerate(peers):
            at = number + 0.3 - 0.6 * (place + 0.5) / len(peers)
            colour = f"C{PEERS.index(peer['contestant'])}"
            axes.barh(at, peer["ratio"], height=0.6 / len(peers), color=colour)
            axes.annotate(
                f"{peer['ratio']:.2f}", (peer["ratio"], at), va="center", fontsize=6, xytext=(2, 0), textcoords="offset points"
            )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=7)
    axes.set_xlabel("seconds of a peer / seconds of the engine, medians of turns in one run; 1 is the engine")
    handles = [axes.barh(0, 0, color=f"C{place}", label=name) for place, name in enumerate(PEERS)]
    axes.legend(handles=handles, loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)


def server(results: Mapping[str, Any]) -> str:
    """Return the tables of explanations and of predictions a second, of those that were measured."""
    text = [", ".join(f"{key} {value}" for key, value in results["machine"].items()), ""]
    for kind in ("explanations", "predictions"):
        if kind in results:
            text += [
                f"| network | clients | handler | {kind}/s ours / stock | ratio | p50, s | p99, s | bytes | processor, s |"
            ]
            text += [f"|{'---|' * 9}", *_served(results[kind]), ""]
    return "\n".join(text)


def _served(lines: Sequence[Line]) -> Iterator[str]:
    """Yield a row for each of our handlers beside the stock one, which comes last of those with so many clients."""
    for (network, clients), group in groupby(lines, key=lambda line: (line["network"], line["clients"])):
        *every, stock = group
        for ours in every:
            both = [f"{ours[key]:.3g} / {stock[key]:.3g}" for key in ("rate", "p50", "p99")]
            size = f"{ours['bytes']:.0f} / {stock['bytes']:.0f} ({ours['bytes'] / stock['bytes']:.2g})"
            processor = f"{ours['processor_seconds']:.3g} / {stock['processor_seconds']:.3g}"
            ratio = f"**{ours['rate'] / stock['rate']:.2f}**"
            cells = (network, clients, ours["handler"], both[0], ratio, both[1], both[2], size, processor)
            yield f"| {' | '.join(map(str, cells))} |"


def beside(results: Mapping[str, Any]) -> str:
    """Return the tables of short requests beside busy clients, and of what each mode does by itself."""
    text = [", ".join(f"{key} {value}" for key, value in results["machine"].items()), ""]
    asked = list(dict.fromkeys(line["asked"] for line in results["latencies"]))
    counts = list(dict.fromkeys(line["clients"] for line in results["latencies"]))
    known = {(line["mode"], line["asked"], line["clients"]): line for line in results["latencies"]}
    heads = ["alone" if count == 0 else f"beside {count}" for count in counts]
    text += [f"| p50 / p99, ms | {' | '.join(heads)} | p99 beside {counts[-1]} / p50 alone |"]
    text += [f"|---|{'---|' * len(heads)}---|"]
    for mode, one in ((mode, one) for one in asked for mode in results["modes"] if (mode, one, 0) in known):
        lines = [known[mode, one, count] for count in counts]
        cells = [f"{1000 * line['p50']:.0f} / {1000 * line['p99']:.0f}" for line in lines]
        text.append(f"| {one}, {mode} | {' | '.join(cells)} | **{lines[-1]['p99'] / lines[0]['p50']:.1f}** |")
    text += [
        "",
        "| | explanations/s of 8 clients | memory, MB | Grad-CAM as JSON, PNG, NPY / a prediction |",
        "|---|---|---|---|",
    ]
    for mode, found in results["modes"].items():
        outputs = ", ".join(f"{ratio:.2f}" for ratio in found["outputs"].values())
        text.append(f"| {mode} | {found['rate']:.2f} | {found['memory_mb']:.0f} | {outputs or 'none'} |")
    return "\n".join(text) + "\n"


def growth(machine: Mapping[str, str], network: str, lines: Sequence[Line]) -> str:
    """Return seconds and megabytes of each contestant, a line for each value of what grows."""
    names = list(dict.fromkeys(line["contestant"] for line in lines))
    text = [", ".join(f"{key} {value}" for key, value in ({"network": network} | dict(machine)).items()), ""]
    text += [f"| | {' | '.join(f'{name}, s / MB' for name in names)} |", f"|---|{'---|' * len(names)}"]
    for (growing, value), contest in groupby(lines, key=lambda line: (line["growing"], line["value"])):
        found = {line["contestant"]: line for line in contest}
        text.append(f"| {value} {growing} | {' | '.join(_spent(found[name]) for name in names)} |")
    return "\n".join(text) + "\n"


def _spent(line: Line) -> str:
    return f"{line['seconds']:.3g} / {line['memory_mb']:.0f}" if "seconds" in line else line["refusal"].replace("|", "/")
