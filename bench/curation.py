"""How close step 1 comes to what the endpoint allows: time, stragglers, throttling, memory, a cached run.

An endpoint on this machine answers every agent after a fixed latency; what is measured is the script. Each figure
is shown beside its bound or its rival, measured in the same run, alternated; medians of --repeats.

    python bench/curation.py            # all of it, some minutes; prints the table of bench/README.md
    python bench/curation.py --only speed stragglers
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.answers import Points, Verdict
from common.client import Client
from common.prompts import PROMPTS

LATENCY, CONCURRENCY = 0.05, 64


class Answering(asyncio.Protocol):
    """One keep-alive connection. Answers chat completions after LATENCY; a share of them `slow` times later."""

    def __init__(self, options: dict, counts: dict):
        self.options, self.counts, self.buffer = options, counts, b""

    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
        if len(rest) < length:
            return
        self.buffer = b""
        if head.startswith(b"GET"):
            self.send(200, json.dumps(self.counts).encode())
        else:
            self.answer(rest)

    def answer(self, body: bytes) -> None:
        counts, now = self.counts, time.monotonic()
        counts["requests"] += 1
        if rate := self.options.get("rate"):
            counts["window"] = [t for t in counts["window"] if t > now - 1]
            if len(counts["window"]) >= rate:
                self.send(429, b"{}", b"Retry-After: 2\r\n")
                return
            counts["window"].append(now)
        counts["answered"] += 1
        role = body.partition(b'"name":"')[2].split(b'"')[0]
        verdict = {"reason": "通篇得体", "verdict": hash(body) % 2}
        text = json.dumps({"points": ["有自己的意象"]} if role in (b"positive", b"negative") else verdict)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": len(body) // 4, "completion_tokens": 20, "total_tokens": 20 + len(body) // 4}
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
        slow = 10 if random.random() < self.options.get("slow", 0) else 1
        asyncio.get_running_loop().call_later(
            self.options["latency"] * slow, self.send, 200, json.dumps(reply).encode()
        )

    def send(self, code: int, body: bytes, more: bytes = b"") -> None:
        head = b"HTTP/1.1 %d x\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n"
        self.transport.write(head % (code, more, len(body)) + body)


def serve(options: dict, port) -> None:
    async def forever() -> None:
        counts = {"requests": 0, "answered": 0, "window": []}
        server = await asyncio.get_running_loop().create_server(
            lambda: Answering(options, counts), "127.0.0.1", 0, backlog=256
        )
        port.value = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    asyncio.run(forever())


class Endpoint:
    """The endpoint in a process of its own, so that its work is not the script's."""

    def __init__(self, **options):
        self.port = multiprocessing.Value("i", 0)
        self.process = multiprocessing.Process(target=serve, args=({"latency": LATENCY} | options, self.port))

    def __enter__(self):
        self.process.start()
        while not self.port.value:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.port.value}/v1"
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.join()

    def counts(self) -> dict:
        import urllib.request

        return json.loads(urllib.request.urlopen(f"{self.url}/models").read())


def write_candidates(path: Path, count: int) -> Path:
    """`count` different greetings, four a query."""
    queries = [json.loads(line)["query"] for line in (ROOT / "data/queries.jsonl").open(encoding="utf-8")]
    rng, letters = random.Random(0), "春风灯火山河明月花茶舟雪桥窗岁安康乐喜暖愿祝你我他们今日此刻"
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            query = f"{queries[n // 4 % len(queries)]} {n // 4}"
            row = {"query": query, "response": "".join(rng.choices(letters, k=40)) + "。"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def curate(run: Path, candidates: Path, url: str) -> tuple[dict, float, float]:
    """(summary, seconds of the whole process, its peak memory in MB) of step 1 on a file of candidates."""
    command = [sys.executable, "01_curate_preferences.py", "--samples", "0", "--candidates", str(candidates)]
    command += ["--run", str(run), "--base-url", url, "--model", "m", "--concurrency", str(CONCURRENCY)]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(errors.decode()[-2000:])
    seconds = time.monotonic() - started
    return json.loads((run / "01_summary.json").read_text()), seconds, usage.ru_maxrss / 1024


def stage_by_stage(run: Path, candidates: Path, url: str, barrier: str) -> float:
    """Seconds for the same calls, agent by agent: with a barrier after each agent, or after each batch of calls."""
    args = SimpleNamespace(run=run, base_url=url, model="m", api_key_env="NONE", concurrency=CONCURRENCY, seed=0)
    args.prompts, args.offline, args.graded = PROMPTS, False, False
    args.timeout, args.attempts, args.wait = 60, 5, 60
    args.price_in, args.price_out, args.budget = 0, 0, None
    rows = [json.loads(line) | {"examples": []} for line in candidates.open(encoding="utf-8")]

    async def stages() -> float:
        async with Client(args, "01") as client:
            started = time.monotonic()
            size = CONCURRENCY if barrier == "batch" else len(rows)

            async def ask_all(role: str, answer: type, questions: list[dict]) -> list:
                answers = []
                for at in range(0, len(questions), size):
                    asking = (client.ask(role, answer, **question) for question in questions[at : at + size])
                    answers += await asyncio.gather(*asking)
                return answers

            positive = await ask_all("positive", Points, rows)
            negative = await ask_all("negative", Points, rows)
            debates = [
                row | {"positive": p.points, "negative": n.points}
                for row, p, n in zip(rows, positive, negative, strict=True)
            ]
            verdicts = await ask_all("judge", Verdict, debates)
            audits = [d | {"judge": v.model_dump()} for d, v in zip(debates, verdicts, strict=True)]
            await ask_all("reflect", Verdict, audits)
            return time.monotonic() - started

    return asyncio.run(stages())


def bare_client(url: str, calls: int) -> float:
    """Seconds for as many calls by openai's client alone: no prompts, no cache, no ledger, no order among them."""
    import httpx2
    import openai

    body = {"model": "m", "messages": [{"role": "user", "content": "春" * 700}], "name": "judge"}

    async def all_at_once() -> float:
        slots = asyncio.Semaphore(CONCURRENCY)
        client = openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0, http_client=openai.DefaultAioHttpClient())

        async def one() -> None:
            async with slots:
                await client.post("/chat/completions", body=body, cast_to=httpx2.Response)

        await one()
        started = time.monotonic()
        await asyncio.gather(*(one() for _ in range(calls)))
        seconds = time.monotonic() - started
        await client.close()
        return seconds

    return asyncio.run(all_at_once())


def speed(scratch: Path, repeats: int) -> str:
    candidates, ratios, floors = write_candidates(scratch / "400.jsonl", 400), [], []
    with Endpoint() as endpoint:
        for n in range(repeats):
            summary, _, _ = curate(scratch / f"speed{n}", candidates, endpoint.url)
            calls = summary["ledger"]["calls"]
            ratios.append(summary["seconds_by_phase"]["judge"] / (calls * LATENCY / CONCURRENCY))
            floors.append(bare_client(endpoint.url, calls) / (calls * LATENCY / CONCURRENCY))
    title = "wall time over calls × latency / concurrency"
    return row(title, ratios, "1.15") + "\n" + row(f"{title}: openai's client alone", floors, "")


def stragglers(scratch: Path, repeats: int) -> str:
    candidates, ratios = write_candidates(scratch / "400.jsonl", 400), {"agent": [], "batch": []}
    floors: dict[str, list[float]] = {"agent": [], "batch": []}  # what a client that never leaves a slot idle reaches
    with Endpoint(slow=0.1) as endpoint:
        for n in range(repeats):
            summary, _, _ = curate(scratch / f"slow{n}", candidates, endpoint.url)
            for barrier, found in ratios.items():
                rival = stage_by_stage(scratch / f"{barrier}{n}", candidates, endpoint.url, barrier)
                found.append(summary["seconds_by_phase"]["judge"] / rival)
                floors[barrier].append(summary["ledger"]["calls"] * 1.9 * LATENCY / CONCURRENCY / rival)
    title = "10% of answers 10 times slower: time over that with a barrier after each"
    lines = [row(f"{title} {barrier}", found, "0.6") for barrier, found in ratios.items()]
    lines += [row(f"{title} {barrier}: the least possible", found, "") for barrier, found in floors.items()]
    return "\n".join(lines)


def throttled(scratch: Path, repeats: int) -> str:
    candidates, ratios = write_candidates(scratch / "100.jsonl", 100), []
    for n in range(min(repeats, 3)):
        with Endpoint(rate=50) as endpoint:
            curate(scratch / f"throttled{n}", candidates, endpoint.url)
            counts = endpoint.counts()
            ratios.append(counts["requests"] / counts["answered"])
    return row("50 requests/s allowed, Retry-After 2: requests a success", ratios, "1.2")


def memory(scratch: Path, repeats: int) -> str:
    peaks = []
    with Endpoint(latency=0.0) as endpoint:
        for count in (1000, 20000):
            candidates = write_candidates(scratch / f"{count}.jsonl", count)
            peaks.append(curate(scratch / f"memory{count}", candidates, endpoint.url)[2])
    title = f"peak memory at 20,000 candidates ({peaks[1]:.0f} MB) over that at 1,000 ({peaks[0]:.0f} MB)"
    return row(title, [peaks[1] / peaks[0]], "1.3")


def cached(scratch: Path, repeats: int) -> str:
    candidates, run, times = write_candidates(scratch / "3000.jsonl", 3000), scratch / "cached", []
    with Endpoint(latency=0.0) as endpoint:
        curate(run, candidates, endpoint.url)
        asked = endpoint.counts()["requests"]
        for _ in range(repeats):
            for name in ("judgements.jsonl", "stages/01_judgements.json"):
                (run / name).unlink()
            times.append(curate(run, candidates, endpoint.url)[1])
        sent = endpoint.counts()["requests"] - asked
    return row(f"seconds for 3,000 rows whose answers are all cached ({sent} requests sent)", times, "3")


def row(title: str, values: list[float], target: str) -> str:
    each = " ".join(f"{value:.2f}" for value in values)
    return f"| {title} | {statistics.median(values):.2f} | {target} | {each} |"


PARTS = {f.__name__: f for f in (speed, stragglers, throttled, memory, cached)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--repeats", type=int, default=5, help="of each figure (%(default)s)")
    args = parser.parse_args()
    os.environ["NO_PROXY"] = "127.0.0.1"
    print("| figure | median | target | each repeat |\n|---|---|---|---|")
    for name in args.only:
        with tempfile.TemporaryDirectory() as scratch:
            print(PARTS[name](Path(scratch), args.repeats), flush=True)


if __name__ == "__main__":
    main()
