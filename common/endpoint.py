"""The agents' endpoint: its flags and its name."""

import argparse
from pathlib import Path

from common.prompts import PROMPTS
from common.run_folder import fail, positive

PORT = 8000  # of a server on this machine


def address(text: str) -> str:
    """argparse type: an endpoint's address and nothing else; a key in it would end up in files and logs."""
    from urllib.parse import urlsplit

    parts = urlsplit(text)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError("more than an address; a key belongs in the variable that --api-key-env names")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError("no address such as http://127.0.0.1:8000/v1")
    return text.rstrip("/")


def odd(text: str) -> int:
    """argparse type: an odd number, or half of the votes could stand against the other half."""
    if positive(text) % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text} is even; an odd number always has a majority")
    return int(text)


def add_endpoint_flags(parser) -> None:
    """The flags of every script that talks to the agents' endpoint."""
    group = parser.add_argument_group("agents' endpoint")
    add, where = group.add_argument, group.add_mutually_exclusive_group().add_argument
    where("--base-url", type=address, default=own_address(PORT), help="OpenAI-compatible endpoint (%(default)s)")
    where("--serve", action=ServeHere, nargs="?", const=PORT, type=positive, metavar="PORT", help="start vLLM with "
          f"--model on this machine when the first answer is needed, and stop it at the end ({PORT})")  # fmt: skip
    add("--serve-flags", default="", metavar="FLAGS", help="further flags of that server, as one quoted word")
    add("--judge-memory", type=float, default=30.0, help="GiB of the GPU for a judge on it (%(default)s)")
    add("--model", default="Qwen/Qwen2.5-32B-Instruct-AWQ", help="model of the agents (%(default)s)")
    add("--api-key-env", default="OPENAI_API_KEY", help="variable that holds the key (%(default)s)")
    add("--concurrency", type=positive, default=64, help="requests under way at once, at most (%(default)s)")
    add("--timeout", type=float, default=120, help="seconds for one attempt (%(default)s)")
    add("--attempts", type=positive, default=5, help="attempts at one question (%(default)s)")
    add("--wait", type=float, default=600, help="seconds to wait for an endpoint that went away (%(default)s)")
    add("--votes", type=odd, default=1, help="verdicts asked for each greeting; the majority counts (1)")
    add("--graded", action="store_true", help="where the endpoint returns logprobs: the judge under principles also "
        "gives P(verdict = 1), and that is the judge reward of step 4")  # fmt: skip
    add("--price-in", type=float, default=0.0, help="money for a million prompt tokens")
    add("--price-out", type=float, default=0.0, help="money for a million answer tokens")
    add("--budget", type=float, help="stop when this run folder has cost so much: money with --price-*, tokens without")
    add("--prompts", type=Path, default=PROMPTS, help="folder of the prompts")


def own_address(port: int) -> str:
    return f"http://127.0.0.1:{port}/v1"


class ServeHere(argparse.Action):
    """--serve: the agents' endpoint is a server of this process."""

    def __call__(self, parser, namespace, port, option=None) -> None:
        namespace.serve, namespace.base_url = port, own_address(port)


def is_local(args) -> bool:
    """Whether the agents' endpoint is on this machine, and so perhaps on this GPU."""
    from urllib.parse import urlsplit

    return not args.offline and urlsplit(args.base_url).hostname in ("127.0.0.1", "localhost", "::1")


def endpoint_name(args) -> tuple[str, str]:
    """(model, endpoint): who answers; part of every cache key and of the settings of a stage."""
    if args.offline:
        if args.graded:
            fail("--graded needs an endpoint that returns logprobs, the rule-based critic has none: leave it out")
        from common.offline.critic import critic_name

        return critic_name(), "offline"
    return args.model, args.base_url
