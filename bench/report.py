"""The tables of README.md, docs/data.md and docs/operations.md, from results in `bench/results`.

    python bench/report.py           print them
    python bench/report.py --write   put them into their pages, between two marks

A test compares the pages with what this makes, so no figure there is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- made by bench/report.py -->\n", "<!-- end of what bench/report.py made -->"

DATA = {"hh_harmless_train.jsonl": "HH harmless", "chat_long_pairs.jsonl": "long chat"}
WORKLOADS = {
    "conversations": "conversations",
    "pairs": "both sides of pairs",
    "best_of_16": "best of 16, one prompt",
}
SIDES = {
    "scorer": "`Scorer`",
    "scorer_deterministic": "`Scorer(deterministic=True)`",
    "plain_random": "transformers, batches of 16",
    "plain_sorted": "transformers, sorted by length",
    "cross_encoder": "sentence-transformers",
    "vllm": "vLLM",
}


SERVERS = {
    "raywards_haproxy": "raywards behind HAProxy",
    "raywards": "raywards behind Serve's own proxy",
    "raywards_bare": "raywards without Ray",
    "vllm": "vLLM's server",
    "serve_rm": "OpenRLHF's `serve_rm` loop",
    "fastapi": "FastAPI and transformers",
}
REQUESTS = {
    "single": "single conversations",
    "best_of_16": "bursts of best of 16",
    "mixed": "short and long conversations",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into the pages")
    args = parser.parse_args()
    pages = {"README.md": tables(), "docs/data.md": preparation(), "docs/operations.md": serving()}
    for page, text in pages.items():
        if not args.write:
            print(text)
            continue
        before, _, rest = (ROOT / page).read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        (ROOT / page).write_text(f"{before}{BEGIN}{text}{END}{after}", encoding="utf-8")


def tables() -> str:
    """All tables, as Markdown."""
    trained = [load(path) for path in sorted(RESULTS.glob("train_*.json"))]
    scored = [load(path) for path in sorted(RESULTS.glob("score_*.json"))]
    trained.sort(key=lambda result: (list(DATA).index(result["settings"]["data"]), dtype(result)))
    scored.sort(key=lambda result: dtype(result))
    quality = load(RESULTS / "quality_hh.json")
    measured = [*trained, *scored, quality]
    return "\n".join([training(trained), as_good(quality), scoring(scored), footnote(measured)])


def training(results: list[dict[str, Any]]) -> str:
    lines = [
        "Whole training steps, pairs per second (median of the rounds), beside TRL "
        f"{results[0]['machine']['versions']['trl']}:",
        "",
        "| pairs | dtype | TRL is | raywards | TRL | ratio (range) | peak memory, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for against, found in result["speed"].items():
            rounds = found["rounds"]
            ours, theirs = (
                statistics.median(r[side]["pairs_per_second"] for r in rounds)
                for side in ("raywards", "trl")
            )
            memory = (
                statistics.median(r[side]["memory"]["peak"] / 2**30 for r in rounds)
                for side in ("raywards", "trl")
            )
            name = "at its defaults" if against == "default" else "tuned"
            peaks = " / ".join(f"{peak:.2f}" for peak in memory)
            lines.append(
                f"| {DATA[result['settings']['data']]} | {dtype(result)} | {name} | {ours:.2f} "
                f"| {theirs:.2f} | {ratio([r['ratio'] for r in rounds])} | {peaks} |"
            )
    curves = [r for r in results if r.get("losses")]
    for result in curves:
        losses = result["losses"]
        lines.append(
            f"\nLosses of {len(losses['trl'])} steps in {dtype(result)} on "
            f"{DATA[result['settings']['data']]}: at most {losses['largest_difference']:.1e} from "
            f"TRL's ({losses['largest_of_first_10']:.1e} in the first 10)."
        )
    return "\n".join(lines) + "\n"


def as_good(result: dict[str, Any]) -> str:
    """The same run through both, and whether one of the models is better."""
    sides, settings = result["sides"], result["settings"]
    pairs = len(sides["trl"]["right"])
    lines = [
        f"{settings['steps']} steps of {settings['batch']} pairs in {dtype(result)}, both from the "
        f"same weights and head ({settings['model']}) at their defaults; {pairs} held-out pairs:",
        "",
        "| | accuracy | right where the other is wrong | loss of the last 20 steps | seconds |",
        "|---|---|---|---|---|",
    ]
    for side, name in (("raywards", "raywards"), ("trl", "TRL")):
        found = sides[side]
        alone, loss = result[f"only_{side}_right"], statistics.mean(found["losses"][-20:])
        lines.append(
            f"| {name} | {found['accuracy']:.4f} | {alone} | {loss:.4f} | {found['seconds']:.0f} |"
        )
    most = max(side["others_cores"] for side in sides.values())
    lines += [
        "",
        f"McNemar's exact test of that split: p = {result['mcnemar_p']:.2f}. raywards took "
        f"{result['times_faster']:.2f} times less, encoding and export included; others took up to "
        f"{most:.2f} cores meanwhile.",
        "",
    ]
    return "\n".join(lines)


def scoring(results: list[dict[str, Any]]) -> str:
    lines = ["Scoring, sequences per second (median of the rounds), and how many times faster:", ""]
    for result in results:
        works = {name: result["workloads"][name] for name in WORKLOADS}
        head = [f"{WORKLOADS[name]} ({work['sequences']})" for name, work in works.items()]
        lines += [f"| {dtype(result)} | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
        for side, title in SIDES.items():
            if all(side in work["sides"] for work in works.values()):
                cells = [cell(side, work["sides"][side]) for work in works.values()]
                lines.append(f"| {title} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def serving() -> str:
    """Figures of `bench/serve.py` in each dtype, and the timeline of `bench/scale.py`."""
    results = sorted(map(load, RESULTS.glob("serve_*.json")), key=dtype)
    lines = [line for result in results for line in served(result)]
    return "\n".join([*lines, *growth()]) + "\n"


def served(result: dict[str, Any]) -> list[str]:
    rows = [row for one in result["rounds"] for row in one if "per_s" in row]
    lines = [
        f"Requests per second in {dtype(result)} (p50 / p99 in ms), median of "
        f"{len(result['rounds'])} rounds, by number of clients:"
    ]
    for workload, title in REQUESTS.items():
        asked = [row for row in rows if row["workload"] == workload and row["loop"] == "closed"]
        counts = sorted({row["clients"] for row in asked})
        if not counts:
            continue
        lines += [
            "",
            f"| {title} | {' | '.join(map(str, counts))} |",
            "|---|" + "---|" * len(counts),
        ]
        for side, name in SERVERS.items():
            cells = [
                requests(r for r in asked if (r["side"], r["clients"]) == (side, n)) for n in counts
            ]
            if any(cells):
                lines.append(f"| {name} | {' | '.join(cells)} |")
        waves = [r["per_s"] for r in rows if (r["side"], r["workload"]) == ("scorer", workload)]
        if waves:
            empty = " |" * (len(counts) - 1)
            lines.append(f"| `Scorer` in waves of 64 | {statistics.median(waves):.1f} |{empty}")
    return [*lines, "", *ratios(rows), "", *served_on(result), ""]


def requests(rows: Iterable[dict[str, Any]]) -> str:
    found = list(rows)
    if not found:
        return ""
    middle = {k: statistics.median(r[k] for r in found) for k in ("per_s", "p50_ms", "p99_ms")}
    return "{per_s:.1f} ({p50_ms:,.0f} / {p99_ms:,.0f})".format(**middle)


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """At 64 clients, round by round."""

    def rate(side: str, workload: str) -> list[float]:
        return [r["per_s"] for r in rows if (r["side"], r["workload"]) == (side, workload)
                and r["clients"] == 64 and r["loop"] in ("closed", "waves")]  # fmt: skip

    lines = []
    for workload, title in REQUESTS.items():
        ours = rate("raywards_haproxy", workload)
        for side, name in {**SERVERS, "scorer": "the bare `Scorer`"}.items():
            theirs = rate(side, workload)
            if side != "raywards_haproxy" and ours and theirs:
                found = [a / b for a, b in zip(ours, theirs, strict=True)]
                lines.append(f"- {title}: {ratio(found)} {name}")
    ours, pinged = rate("raywards_haproxy", "tiny single"), rate("raywards_haproxy", "tiny ping")
    if pinged:
        lines.append(
            f"- a tiny model: {statistics.median(ours):,.0f} requests/s, beside "
            f"{statistics.median(pinged):,.0f} of `/ping` through the same HAProxy: "
            f"{ratio([a / b for a, b in zip(ours, pinged, strict=True)])}"
        )
    return ["raywards behind HAProxy at 64 clients, times as many requests as", "", *lines]


def served_on(result: dict[str, Any]) -> list[str]:
    checks = [row for one in result["rounds"] for row in one if "check" in row]
    busy = max(row.get("others_cores", 0) for row in checks)
    gap = max(row.get("largest_difference", 0) for row in checks)
    about = result["machine"]
    return [
        "Servers and clients share the cores. Every side's rewards of 64 conversations are within "
        f"{gap:.2g} of those of `Scorer` in fp32. Others took up to {busy:.2f} cores before a side "
        f"started. Measured on {machine.in_words(about)}.",
        "",
        f"```text\n{about['command']}\n```",
    ]


def growth() -> list[str]:
    """The timeline of `bench/scale.py`: seconds in which the number of replicas changed."""
    result = load(RESULTS / "scale.json")
    seconds, about = result["seconds"], result["machine"]
    most = max(second["replicas"] for second in seconds)
    bars, before, answers = [], None, 0
    for second in seconds:
        answers += second["answers"]
        if second["replicas"] != before or second is seconds[-1]:
            before = second["replicas"]
            bar = "█" * before + "░" * (most - before)
            bars.append(
                f"{second['s']:4d} s  {bar}  {before} replicas, {answers:5d} answers so far"
            )
    return [
        f"Replicas with the load ({result['settings']['clients']} clients begin at 0 s; once "
        f"{most} replicas have been there for some seconds, one client is left):",
        "",
        "```text",
        *bars,
        "```",
        "",
        f"{most} replicas {result['up_s']:.1f} s after the load began, one again "
        f"{result['down_s']:.1f} s after it ended; of {result['answers']:,} requests "
        f"{result['lost']} were lost, {result['wrong']} answered wrongly, {result['refused']} told "
        "when to come back. A replica's own part is to import and to load: the rest is Serve's "
        f"averages and decisions. `{about['command']}` on {machine.in_words(about)}.",
    ]


def preparation() -> str:
    """Figures of `bench/prepare.py`: a column for each number of pairs, and one of forty times."""
    result = load(RESULTS / "prepare_million.json")
    few, many = result["by_pairs"].values()
    prepared: dict[str, Callable[[dict[str, Any]], str]] = {
        "prepared by two Ray tasks at once, pairs/s": lambda c: (
            f"{c['prepare_2']['pairs_per_second']:,.0f}"
        ),
        "memory of the driver meanwhile, MiB": lambda c: memory(c["prepare_2"], "driver"),
        "of a task, MiB": lambda c: memory(c["prepare_2"], "task"),
        "found again, s": lambda c: f"{c['found_2']['seconds']:.1f}",
        "JSONL, MB": lambda c: f"{c['source_bytes'] / 1e6:,.0f}",
        "prepared, MB": lambda c: f"{c['disk_bytes'] / 1e6:,.0f}",
    }
    planned: dict[str, Callable[[dict[str, Any]], str]] = {
        "table opened, s": lambda plan: f"{plan['open_s']:.2f}",
        "first step planned, s": lambda plan: f"{plan['first_step_s']:.2f}",
        "resumed in the middle of epoch 3, s": lambda plan: f"{plan['resume_s']:.2f}",
        "memory of a worker that plans and reads, MiB": lambda plan: memory(plan, "driver"),
    }
    plans = [few["plan"], many["plan"], many["forty"]]
    rows = [["pairs", *(f"{plan['pairs']:,}" for plan in plans)], ["---"] * 4]
    rows += [[name, of(few), of(many), ""] for name, of in prepared.items()]
    rows += [[name, *map(of, plans)] for name, of in planned.items()]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *remarks(result, few, many)]) + "\n"


def remarks(result: dict[str, Any], few: dict[str, Any], many: dict[str, Any]) -> list[str]:
    sides = [side for column in (few, many) for side in column.values() if isinstance(side, dict)]
    busy = max(side["others_cores"] for side in sides)
    alone, about = few["prepare_1"], result["machine"]
    hours = 40 * many["prepare_2"]["seconds"] / 3600
    times = many["forty"]["pairs"] / many["plan"]["pairs"]
    return [
        f"Pairs of {many['plan']['tokens_a_pair']:.0f} tokens on average; the third column has the "
        f"second's files {times:.0f} times, as links. Memory is the peak: a process's own + pages "
        "of files that it maps, its libraries among them, which the kernel takes back when it "
        f"needs them. The driver alone prepares {alone['pairs']:,} at "
        f"{alone['pairs_per_second']:,.0f} pairs/s in {memory(alone, 'driver')} MiB.",
        "",
        f"Forty million such pairs are {40 * many['source_bytes'] / 1e9:.0f} GB of JSONL and "
        f"{40 * many['disk_bytes'] / 1e9:.0f} GB prepared, in 2,000 shards: {hours:.1f} hours of "
        f"these two tasks, or {hours / 32:.1f} of 64. A worker holds 8 bytes a pair for the order "
        "of an epoch (0.32 GB), and some 0.3 GB of places in the shards; `lengths.npy` (0.32 GB) "
        "is mapped, once for all workers of a node. The driver holds 8 bytes a line of JSONL.",
        "",
        f"`{about['command']}` on {machine.in_words(about)}. Other processes took up to "
        f"{busy:.1f} cores of it meanwhile: the times are upper bounds.",
    ]


def memory(side: dict[str, Any], process: str) -> str:
    return "{anonymous:.0f} + {mapped:.0f}".format(**side["peak_mib"][process])


def cell(side: str, found: dict[str, Any]) -> str:
    speed = statistics.median(found["sequences_per_second"])
    if side == "scorer":
        return f"**{speed:.1f}**"
    return f"{speed:.1f}: {ratio(found['scorer_is_times_faster'])}"


def footnote(results: list[dict[str, Any]]) -> str:
    commands = "\n".join(result["machine"]["command"] for result in results)
    places = {machine.in_words(result["machine"]) for result in results}
    taken = max(cores for result in results for cores in others(result))
    disturbed = f" Other processes took up to {taken:.1f} cores of it." if taken > 0.2 else ""
    return (
        f"Measured on {'; and on '.join(sorted(places))}.{disturbed}\n\n```text\n{commands}\n```\n"
    )


def others(result: dict[str, Any]) -> list[float]:
    """Cores that other processes took while each figure was measured."""
    if "sides" in result:
        return []  # `as_good` tells
    if "speed" in result:
        rounds = [one for found in result["speed"].values() for one in found["rounds"]]
        return [one[side]["others_cores"] for one in rounds for side in one["order"]]
    sides = [side for work in result["workloads"].values() for side in work["sides"].values()]
    return [cores for side in sides for cores in side["others_cores"]]


def ratio(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}x"
    return f"{statistics.median(values):.2f}x ({min(values):.2f}-{max(values):.2f})"


def dtype(result: dict[str, Any]) -> str:
    return {"float32": "fp32", "bfloat16": "bf16"}[result["settings"]["dtype"]]


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
