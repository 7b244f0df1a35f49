"""What judging many answers over a network takes, against a loop that asks one at a time.

    python benchmarks/judging.py [--rows 400] [--latency 0.2] [--at-once 20] [--out folder]

A server on the loopback address waits as long as a call to a provider takes. The peer is a plain loop over the openai
client; the scores of both are compared first. The second table kills a judging process again and again (SIGKILL) and
counts what was asked twice. Prints Markdown, and writes it with a JSON file into --out.
"""

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from loopback_server import Said, serving

from piggyback_lens import Endpoint, Judge
from piggyback_lens.files import read_jsonl, write_json

CHILD = """
import sys
from piggyback_lens import Endpoint, Judge
Judge(Endpoint(sys.argv[1], "m", key_variable=None, concurrency=int(sys.argv[4]), cache=sys.argv[2])).score(
    [{"prompt": f"Question {i}?", "response": f"Answer {i}."} for i in range(int(sys.argv[3]))]
)
"""


def answers(count):
    return [{"prompt": f"Question {i}?", "response": f"Answer {i}."} for i in range(count)]


def grade(latency):
    def said(body, number):
        value = sum(map(ord, body["messages"][-1]["content"])) % 100
        return Said(str(value), {str(value): math.log(0.8), str(value + 1): math.log(0.2)}, wait=latency)

    return said


def serial(client, judge, rows):
    """The loop that users write: one call after another, with the same requests."""
    found = []
    for request in judge.requests(rows):
        reply = client.chat.completions.create(
            model="m", messages=request.messages, max_tokens=request.max_tokens, temperature=0, logprobs=True,
            top_logprobs=20,
        )  # fmt: skip
        top = reply.choices[0].logprobs.content[0].top_logprobs
        weights = {int(entry.token): math.exp(entry.logprob) for entry in top}
        found.append(sum(number * weight for number, weight in weights.items()) / sum(weights.values()))
    return found


def throughput(args, folder):
    """Rows per second of both, and of a second call on the cache."""
    rows = answers(args.rows)
    import openai  # before the clock runs

    with serving(grade(args.latency)) as server:
        own = Endpoint(server.url, "m", key_variable=None, concurrency=args.at_once, cache=folder / "cache.jsonl")
        judge, client = Judge(own), openai.OpenAI(base_url=server.url, api_key="none")
        few = rows[: max(1, args.rows // args.at_once)]
        peer, peer_s = timed(lambda: serial(client, judge, few))
        found, own_s = timed(lambda: judge.score(rows))
        assert [score.number for score in found[: len(few)]] == [min(x, 100.0) for x in peer], "the scores differ"
        assert server.peak <= args.at_once
        calls = server.calls
        _, again_s = timed(lambda: judge.score(rows))
        assert server.calls == calls, "the second call asked again"
    peer_rate, own_rate = len(few) / peer_s, len(rows) / own_s
    return [
        {"work": "serial loop", "rows": len(few), "seconds": peer_s, "rows/s": peer_rate, "ratio": 1.0},
        {"work": f"{args.at_once} at once", "rows": len(rows), "seconds": own_s, "rows/s": own_rate,
         "ratio": own_rate / peer_rate},
        {"work": "again, from the cache", "rows": len(rows), "seconds": again_s, "rows/s": len(rows) / again_s,
         "ratio": len(rows) / again_s / peer_rate},
    ]  # fmt: skip


def timed(work):
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def kills(args, folder):
    """Kill a judging process at random moments until it ends, and count the calls that were made twice."""
    cache, draw, count = folder / "killed.jsonl", random.Random(0), 0
    with serving(grade(0.02)) as server:
        command = [sys.executable, "-c", CHILD, server.url, str(cache), str(args.rows), str(args.at_once)]
        while count < args.kills:
            process, before = subprocess.Popen(command, env={**os.environ, "NO_PROXY": "127.0.0.1"}), server.calls
            wanted = before + draw.randrange(1, max(2, args.rows // args.kills))
            while server.calls < wanted and process.poll() is None:
                time.sleep(0.002)
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            count += 1
        subprocess.run(command, check=True)
        kept = len({row["key"] for row in read_jsonl(cache)})
        return {"kills": count, "rows": args.rows, "kept": kept, "calls": server.calls,
                "twice": server.calls - args.rows, "in flight at most": count * args.at_once}  # fmt: skip


def table(rows):
    shown = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    head = f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in shown)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ["NO_PROXY"] = "127.0.0.1"
    with tempfile.TemporaryDirectory() as folder:
        speed, killed = throughput(args, Path(folder)), kills(args, Path(folder))
    assert killed["kept"] == args.rows
    assert killed["twice"] <= killed["in flight at most"]
    text = f"{table(speed)}\n{table([killed])}"
    print(text)
    if args.out:
        write_json(args.out / "judging.json", {"facts": vars(args), "rows": speed, "kills": killed})
        (args.out / "judging.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
