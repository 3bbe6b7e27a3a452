"""Replicas that come with the load and go after it, second by second.

    python bench/scale.py --model FOLDER --data PAIRS.jsonl [--replicas 3] [--clients 64]
        [--out RESULT.json]

One replica is ready and idle. At 0 s clients begin to ask, one conversation after the other; when
all replicas have been there for some seconds, all clients but one stop. Settings are those of
`ServeConfig`, but for the target of tokens (a few batches of this load), the bound of replicas and
a short delay before replicas are removed. Every reply is compared with the Scorer's reward; a
request that is neither answered nor told when to come back is lost, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import aiohttp
import machine
from score import as_pair

HOLD_S, DOWN_DELAY_S, LIMIT_S = 10.0, 5.0, 180.0
DISTINCT = 200
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="export folder")
    parser.add_argument("--data", required=True, help="JSONL file of preference rows")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--port", type=int, default=21_980)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    about = machine.describe(len(os.sched_getaffinity(0)))
    print(machine.in_words(about), flush=True)
    lines = Path(args.data).read_text().splitlines()[:DISTINCT]
    talks = [as_pair(json.loads(line))[0] for line in lines]
    found = measure(args, talks)
    for second in found["seconds"]:
        print(f"  {second['s']:4d} s  {second['replicas']} replicas  {second['answers']} answers")
    print({name: found[name] for name in ("up_s", "down_s", "answers", "refused", "lost", "wrong")})
    if args.out:
        settings = {"model": Path(args.model).name, "clients": args.clients}
        result = {"machine": about, "settings": settings, **found}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if found["lost"] or found["wrong"]:
        raise SystemExit("requests were lost, or answered wrongly")


def measure(args: argparse.Namespace, talks: list[Any]) -> dict[str, Any]:
    import ray
    from ray import serve

    from raywards import Scorer, ServeConfig
    from raywards.serve import deploy

    scorer = Scorer.from_pretrained(args.model)
    expected = scorer.score(talks)
    config = ServeConfig(
        model=args.model,
        port=args.port,
        max_replicas=args.replicas,
        target_replica_tokens=2048,
        downscale_delay_s=DOWN_DELAY_S,
    )
    ray.init(address="local", num_cpus=args.replicas + 1, include_dashboard=False,
             log_to_driver=False)  # fmt: skip
    try:
        deploy(config)
        load = Load(
            f"http://127.0.0.1:{args.port}", talks, expected, TOLERANCE[scorer.info["dtype"]]
        )
        return asyncio.run(
            load.play(args.clients, args.replicas, lambda: replicas(serve, config.name))
        )
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas(serve: Any, name: str) -> int:
    [deployment] = serve.status().applications[name].deployments.values()
    return int(deployment.replica_states.get("RUNNING", 0))


class Load:
    def __init__(self, url: str, talks: list[Any], expected: list[float], tolerance: float) -> None:
        self.url, self.talks, self.expected, self.tolerance = url, talks, expected, tolerance
        self.counts: Counter[str] = Counter()
        self.clients = 0

    async def play(self, clients: int, most: int, count: Any) -> dict[str, Any]:
        """Up, hold, down."""
        self.clients = clients
        seconds: list[dict[str, int]] = []
        start, up_s, eased = time.monotonic(), None, None
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as http:
            asking = [asyncio.create_task(self.client(http, one)) for one in range(clients)]
            for second in itertools.count(1):
                before = self.counts["answers"]
                await asyncio.sleep(max(0.0, start + second - time.monotonic()))
                now = await asyncio.to_thread(count)
                answers = self.counts["answers"] - before
                seconds.append({"s": second, "replicas": now, "answers": answers})
                if up_s is None and now == most:
                    up_s = float(second)
                if up_s is not None and eased is None and second >= up_s + HOLD_S:
                    eased, self.clients = float(second), 1
                if second > LIMIT_S or (eased is not None and now == 1):
                    break
            self.clients = 0
            await asyncio.gather(*asking)
        down_s = None if eased is None else second - eased
        counted = {name: self.counts[name] for name in ("answers", "refused", "lost", "wrong")}
        times = {"up_s": up_s, "eased_s": eased, "down_s": down_s}
        return {**times, **counted, "seconds": seconds}

    async def client(self, http: aiohttp.ClientSession, number: int) -> None:
        for n in itertools.count(number * 7):
            if number >= self.clients:
                return
            await self.ask(http, n % len(self.talks))

    async def ask(self, http: aiohttp.ClientSession, n: int) -> None:
        try:
            body = {"messages": self.talks[n]}
            async with http.post(f"{self.url}/v1/reward", json=body) as reply:
                told = await reply.json()
        except (aiohttp.ClientError, ValueError):
            self.counts["lost"] += 1
            return
        if reply.status == 200:
            gap = abs(told["data"][0]["reward"] - self.expected[n])
            self.counts["answers"] += 1
            self.counts["wrong"] += gap > self.tolerance
        elif reply.status == 503 and "retry-after" in reply.headers:
            self.counts["refused"] += 1
            await asyncio.sleep(float(reply.headers["retry-after"]))
        else:
            self.counts["lost"] += 1


if __name__ == "__main__":
    sys.exit(main())
