"""Served rewards beside vLLM's server, OpenRLHF's loop and a plain FastAPI app.

    python bench/serve.py --model FOLDER --data PAIRS.jsonl [--long PAIRS.jsonl] [--tiny]
        [--dtype bfloat16] [--sides raywards_haproxy,raywards,...] [--clients 1,8,64,256]
        [--workload single,best_of_16,mixed] [--seconds 15] [--rounds 2] [--vllm-python PYTHON]
        [--out RESULT.json]

Sides are in `bench/servers.py`. Every client sends one conversation a request, as text that is
rendered already, as RLHF trainers do; no two requests of a measurement are equal.

    single        one conversation each, of the file's rows
    best_of_16    a client sends 16 requests at once, with 16 responses to one prompt, and waits for
                  all; a prompt has 300 to 450 tokens. Clients are fewer by 16
    mixed         the same as single, of two files, the second with long conversations

Closed loop: a client sends the next request when the last is answered, for `--seconds` after a
warm-up. Open loop (on `single`): requests arrive at a rate, by a Poisson process, at half and at
nine tenths of what the side reached in the closed loop with 64 clients; a queue that grows shows in
p99. The clients run on the same cores. Servers start anew each round and take turns.

`scorer` is no server: `Scorer` in this process scores the same stream in waves of 64, tokenising
included: what HTTP, Ray and batching cost is the ratio to it. With `--tiny`, requests/s of a model
of one layer of 16 beside those of `/ping` through the same ingress, in the same run.

Latency is of one request, in ms. Rewards are compared with the Scorer's in fp32: the exit status is
1 where they are further away than AGREE times their spread. "others": cores that something else
kept busy in the two seconds before a side started.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import operator
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import machine
from score import AGREE, NUM_RESPONSES, SEED, as_pair, long_prompts
from servers import SIDES, body_of, reward_in, server

WARM_UP_S = 3.0
WAVE = 64
OPEN_LOOP_SHARES = (0.5, 0.9)

Stream = Iterator[list[str]]
"""Texts, as many as a client sends at once."""


def main() -> None:
    args = parse()
    about = machine.describe(args.threads)
    print(machine.in_words(about), flush=True)
    texts = Texts(args)
    rounds = [one_round(args, texts, number) for number in range(args.rounds)]
    result = {
        "machine": about,
        "settings": {
            "model": Path(args.model).name, "dtype": args.dtype, "seconds": args.seconds,
            "clients": args.clients, "rounds": args.rounds, "seed": SEED,
        },
        "rounds": rounds,
    }  # fmt: skip
    show(rounds)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [row for one in rounds for row in one if not row.get("agrees", True)]
    if wrong:
        raise SystemExit(f"rewards are too far from Scorer's: {wrong}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    split = operator.methodcaller("split", ",")
    parser.add_argument("--model", required=True, help="export folder")
    parser.add_argument("--data", required=True, help="JSONL file of preference rows")
    parser.add_argument("--long", help="another one, with long conversations: for `mixed`")
    parser.add_argument("--tiny", action="store_true", help="also a model of nothing, and /ping")
    parser.add_argument("--dtype", choices=list(AGREE), default="bfloat16")
    parser.add_argument("--sides", type=split, default=[*SIDES, "scorer"])
    parser.add_argument("--clients", type=lambda text: list(map(int, text.split(","))),
                        default=[1, 8, 64, 256])  # fmt: skip
    parser.add_argument("--workload", type=split, default=["single", "best_of_16", "mixed"])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vllm-python", help="interpreter that has vllm; without it: no vllm")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if unknown := set(args.sides) - {*SIDES, "scorer"}:
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(SIDES)}, scorer")
    if not args.vllm_python:
        args.sides = [side for side in args.sides if side != "vllm"]
    if not args.long:
        args.workload = [name for name in args.workload if name != "mixed"]
    return args


# ---------------------------------------------------------------- what is sent


class Texts:
    """Rendered conversations by workload, each given once in a measurement."""

    def __init__(self, args: argparse.Namespace) -> None:
        from raywards.loader import load_tokenizer
        from raywards.rendering import Rendering

        tokenizer = load_tokenizer(args.model)
        encode = Rendering(tokenizer).encode_conversation

        def rendered(talk: Any) -> str:
            return str(tokenizer.apply_chat_template(talk, tokenize=False))

        pairs = pairs_of(args.data)
        random.Random(SEED).shuffle(pairs)
        sides = [side for pair in pairs for side in pair]
        random.Random(SEED).shuffle(sides)
        self.single = list(dict.fromkeys(map(rendered, sides)))
        self.mixed: list[str] = []
        if args.long:
            long = [rendered(side) for pair in pairs_of(args.long) for side in pair]
            self.mixed = [text for both in zip(self.single, long, strict=False) for text in both]
        answers = list(dict.fromkeys(side[-1]["content"] for side in sides))
        draw = random.Random(SEED)
        self.best_of_16 = [
            [rendered([*prompt, {"role": "assistant", "content": answer}])
             for answer in draw.sample(answers, NUM_RESPONSES)]
            for prompt, _ in long_prompts(pairs, encode)
        ]  # fmt: skip

    def stream(self, workload: str) -> Stream:
        """Without end: a text that comes again differs in its first characters."""
        bursts = self.best_of_16 if workload == "best_of_16" else [
            [text] for text in getattr(self, workload)
        ]  # fmt: skip
        lap = 0
        while True:
            for burst in bursts:
                yield burst if not lap else [f"{lap} {text}" for text in burst]
            lap += 1


def pairs_of(file: str) -> list[Any]:
    return [as_pair(json.loads(line)) for line in Path(file).read_text().splitlines()]


# ---------------------------------------------------------------- one round


def one_round(args: argparse.Namespace, texts: Texts, number: int) -> list[dict[str, Any]]:
    turn = number % len(args.sides)
    rows: list[dict[str, Any]] = []
    job = {name: getattr(args, name) for name in ("model", "dtype", "threads", "vllm_python")}
    for side in args.sides[turn:] + args.sides[:turn]:
        others = machine.Others()
        time.sleep(2)
        rows.append({"side": side, "check": "others", "others_cores": others.cores()})
        if side == "scorer":
            rows += [in_waves(args, texts, workload) for workload in args.workload]
            continue
        try:
            with server(side, job) as url:
                rows += asyncio.run(asked(args, texts, side, url))
            if args.tiny and side in ("raywards", "raywards_haproxy", "raywards_bare"):
                with tempfile.TemporaryDirectory() as folder:
                    model = of_nothing(args.model, folder)
                    tiny = {**job, "model": model, "dtype": "float32", "threads": 1}
                    with server(side, tiny) as url:
                        rows += asyncio.run(beside_ping(args, texts, side, url))
        except RuntimeError as error:
            print(f"  {side} failed: {error}", flush=True)
    return rows


async def asked(
    args: argparse.Namespace, texts: Texts, side: str, url: str
) -> list[dict[str, Any]]:
    rows = []
    async with session() as http:
        for workload in args.workload:
            for clients in args.clients:
                at_once = max(1, clients // NUM_RESPONSES) if workload == "best_of_16" else clients
                row = {"side": side, "workload": workload, "clients": clients, "loop": "closed"}
                found = await closed(args, texts.stream(workload), side, http, url, at_once)
                rows.append({**row, **found})
                tell(rows[-1])
        reached = next((r["per_s"] for r in rows if r["clients"] == WAVE), None)
        for share in OPEN_LOOP_SHARES if reached else ():
            row = {"side": side, "workload": "single", "clients": share, "loop": "open"}
            found = await opened(args, texts.stream("single"), side, http, url, share * reached)
            rows.append({**row, **found})
            tell(rows[-1])
    found = await agreement(args, texts, side, url)
    return [*rows, {"side": side, "check": "rewards", **found}]


def of_nothing(model: str, folder: str) -> str:
    """A classifier with the tokenizer of `model` and next to no weights."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from raywards.loader import load_tokenizer

    tokenizer = load_tokenizer(model)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_labels=1, pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=8192,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


async def beside_ping(
    args: argparse.Namespace, texts: Texts, side: str, url: str
) -> list[dict[str, Any]]:
    """A model of nothing, and no model: what is left is the way there."""
    rows = []
    async with session() as http:
        for what in ("ping", "single", "ping", "single"):
            row = {"side": side, "workload": f"tiny {what}", "clients": WAVE, "loop": "closed"}
            asks = None if what == "single" else ping
            found = await closed(args, texts.stream("single"), side, http, url, WAVE, asks)
            rows.append({**row, **found})
            tell(rows[-1])
    return rows


def in_waves(args: argparse.Namespace, texts: Texts, workload: str) -> dict[str, Any]:
    import torch

    from raywards import Scorer

    torch.set_num_threads(args.threads)
    key = (args.model, args.dtype)
    scorer = _SCORERS.setdefault(key, Scorer.from_pretrained(key[0], dtype=key[1]))
    stream = texts.stream(workload)

    def wave() -> int:
        found: list[str] = []
        while len(found) < WAVE:
            found += next(stream)
        scorer.score_ids([scorer.encode_rendered(text) for text in found])
        return len(found)

    wave()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < args.seconds:
        count += wave()
    per_s = count / (time.perf_counter() - start)
    row = {"side": "scorer", "workload": workload, "clients": WAVE, "loop": "waves", "per_s": per_s}
    tell(row)
    return row


_SCORERS: dict[tuple[str, str], Any] = {}

# ---------------------------------------------------------------- clients

Ask = Callable[[aiohttp.ClientSession, str, str, str], Awaitable[Any]]


def session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(300))


async def ask(http: aiohttp.ClientSession, url: str, side: str, text: str) -> Any:
    while True:
        async with http.post(url + SIDES[side], json=body_of(side, text)) as reply:
            if reply.status in (429, 503):
                await asyncio.sleep(float(reply.headers.get("retry-after", 1)))
                continue
            reply.raise_for_status()
            return await reply.json()


async def ping(http: aiohttp.ClientSession, url: str, side: str, text: str) -> Any:
    async with http.get(f"{url}/ping") as reply:
        reply.raise_for_status()
        return await reply.read()


async def closed(
    args: argparse.Namespace,
    stream: Stream,
    side: str,
    http: aiohttp.ClientSession,
    url: str,
    clients: int,
    asks: Ask | None = None,
) -> dict[str, Any]:
    asks = asks or ask
    taken: list[tuple[float, float]] = []  # when it was answered, and how long it took
    end = time.perf_counter() + WARM_UP_S + args.seconds

    async def timed(text: str) -> None:
        start = time.perf_counter()
        await asks(http, url, side, text)
        now = time.perf_counter()
        taken.append((now, now - start))

    async def client() -> None:
        while time.perf_counter() < end:
            await asyncio.gather(*map(timed, next(stream)))

    await asyncio.gather(*(client() for _ in range(clients)))
    counted = [s for when, s in taken if end - args.seconds <= when <= end]
    return {"per_s": len(counted) / args.seconds, **latency(counted)}


async def opened(
    args: argparse.Namespace,
    stream: Stream,
    side: str,
    http: aiohttp.ClientSession,
    url: str,
    per_s: float,
) -> dict[str, Any]:
    draw, taken, asking = random.Random(SEED), [], []
    start = time.perf_counter()
    due = start

    async def timed(text: str, due: float) -> None:
        await ask(http, url, side, text)
        taken.append(time.perf_counter() - due)

    while (due := due + draw.expovariate(per_s)) < start + args.seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        [text] = next(stream)
        asking.append(asyncio.create_task(timed(text, due)))
    await asyncio.gather(*asking)
    return {"per_s": len(taken) / (time.perf_counter() - start), **latency(taken)}


def latency(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{p}_ms": 1e3 * cuts[p - 1] for p in (50, 95, 99)}


async def agreement(args: argparse.Namespace, texts: Texts, side: str, url: str) -> dict[str, Any]:
    """Of 64 conversations: how far its rewards are from those of transformers, in fp32."""
    from raywards import Scorer

    scorer = _SCORERS.setdefault(
        f"{args.model} fp32", Scorer.from_pretrained(args.model, dtype="float32")
    )
    sample = texts.single[:64]
    expected = scorer.score_ids([scorer.encode_rendered(text) for text in sample])
    # New connections: servers close idle ones, and loading the model took some seconds.
    async with session() as http:
        found = [reward_in(side, await ask(http, url, side, text)) for text in sample]
    gap = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    return {
        "largest_difference": gap,
        "agrees": gap <= AGREE[args.dtype] * statistics.pstdev(expected),
    }


# ---------------------------------------------------------------- the report


def tell(row: dict[str, Any]) -> None:
    cuts = "  ".join(
        f"{name} {row[name]:.0f}" for name in row if name.startswith("p") and name != "per_s"
    )
    print(f"  {row['side']:<18}{row['workload']:<12}{row['loop']:<7}{row['clients']:<6}"
          f"{row['per_s']:8.1f}/s  {cuts}", flush=True)  # fmt: skip


def show(rounds: list[list[dict[str, Any]]]) -> None:
    """Medians over the rounds."""
    keys = dict.fromkeys(
        (r["workload"], r["loop"], r["clients"], r["side"])
        for one in rounds
        for r in one
        if "per_s" in r
    )
    print("\nmedians")
    for workload, loop, clients, side in sorted(keys, key=str):
        rows = [
            r for one in rounds for r in one
            if (r.get("workload"), r.get("loop"), r.get("clients"), r["side"])
            == (workload, loop, clients, side)
        ]  # fmt: skip
        names = [name for name in rows[0] if name == "per_s" or name.endswith("_ms")]
        tell({"side": side, "workload": workload, "loop": loop, "clients": clients,
              **{n: statistics.median(r[n] for r in rows) for n in names}})  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
