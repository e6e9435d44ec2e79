"""Ask every policy of a run for greetings, and print their answers side by side.

No result of the run changes; only answers from an endpoint (--api) are stored, in answers.sqlite.

Example python tools/ask.py 给班主任的教师节祝福 --offline --run outputs/mine
"""

import argparse
import asyncio
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import run_folder
from common.engine import Writer
from common.greetings import Greeting, Policy, client_at, greet, parse_greeting_args, present_policies
from common.policy import policy_path, silence_libraries


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    question = parser.add_argument_group("question").add_argument
    question("ask", nargs="+", metavar="QUERY", help="what to ask the policies for")
    return parse_greeting_args(parser)


async def answers_of(args: argparse.Namespace, policies: list[Policy]) -> dict[tuple[str, str, int], str]:
    """The greetings by (policy, query, sample); what an endpoint failed to write is missing, the reason on stderr."""
    greetings: list[Greeting] = []
    failures: Counter = Counter()
    writer = Writer(args)
    async with AsyncExitStack() as stack:
        for policy in policies:
            written_by = writer
            if policy.api:
                written_by = await stack.enter_async_context(client_at(args, "ask", *policy.api))
            slots = []
            for query in args.ask:
                for sample in range(args.samples):
                    slots.append(Greeting(policy=policy.name, query_id=query, query=query, sample=sample))
            await greet(args, policy, written_by, slots, greetings.append, failures)
    for reason in failures:
        print(f"ask: {reason}", file=sys.stderr)
    return {(greeting.policy, greeting.query, greeting.sample): greeting.response for greeting in greetings}


def main(args: argparse.Namespace) -> int:
    base = policy_path(args)
    run_folder.open_run(args.run)
    policies = present_policies(args, base)
    silence_libraries()
    answers = asyncio.run(answers_of(args, policies))
    width = max(len(policy.name) for policy in policies)
    for query in args.ask:
        print(f"\n{query}")
        for policy in policies:
            for sample in range(args.samples):
                name = policy.name if sample == 0 else ""
                print(f"  {name:{width}}  {answers.get((policy.name, query, sample), '-')}")
    return 0


if __name__ == "__main__":
    sys.exit(run_folder.launch(main, parse_args()))
