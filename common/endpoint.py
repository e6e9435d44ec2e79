"""The agents' endpoint: its flags and its name. Any OpenAI-compatible one will do, a server of yours or a service."""

import argparse
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from common.prompts import PROMPTS
from common.run_folder import fail, positive

OWN_SERVER = "http://127.0.0.1:8000/v1"  # where tools/with_judge.sh starts it


def address(text: str) -> str:
    """argparse type: an endpoint's address and nothing else; a key in it would end up in files and logs."""
    if not re.fullmatch(r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:[1-6]?\d{1,4})?(/[^\s?#]*)?", text, re.I):
        plain = "not an address such as http://127.0.0.1:8000/v1 and nothing more"
        raise argparse.ArgumentTypeError(f"{plain}; a key belongs in the variable that --api-key-env names")
    return text.rstrip("/")


def variable(text: str) -> str:
    """argparse type: the name of an environment variable. A key in its place would end up in files: it is refused."""
    if not re.fullmatch("[A-Z_][A-Z0-9_]*", text) and text not in os.environ:
        raise argparse.ArgumentTypeError("not the name of a variable that is set; put the key in one, and name that")
    return text


def add_endpoint_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every script that talks to the agents' endpoint.

    Those of the group "pace and cost" change no answer, so no stage counts them among its settings.
    """
    who = parser.add_argument_group("agents' endpoint").add_argument
    who("--base-url", type=address, default=OWN_SERVER, help="OpenAI-compatible endpoint (%(default)s)")
    who("--model", default="Qwen/Qwen2.5-32B-Instruct-AWQ", help="model of the agents (%(default)s)")
    who("--api-key-env", type=variable, default="OPENAI_API_KEY", help="variable that holds the key (%(default)s)")
    who("--graded", action="store_true", help="the judge's reward is P(verdict = 1), read from the logprobs")
    who("--prompts", type=Path, default=PROMPTS, help="folder of the prompts")
    pace = parser.add_argument_group("pace and cost").add_argument
    pace("--concurrency", type=positive, default=64, help="requests under way at once, at most (%(default)s)")
    pace("--timeout", type=float, default=120, help="seconds for one attempt (%(default)s)")
    pace("--attempts", type=positive, default=5, help="at a question; a wait for a rate limit is none (%(default)s)")
    pace("--wait", type=float, help="seconds to wait for an endpoint that loads, went away (600), or is not there (0)")
    pace("--price-in", type=float, default=0.0, help="money for a million input tokens")
    pace("--price-out", type=float, default=0.0, help="money for a million output tokens")
    pace("--budget", type=float, help="most that this run folder may cost: money if priced, else tokens")


def on_this_machine(url: str) -> bool:
    """Whether an address is this machine's own."""
    own = r"(.+\.)?localhost|127\.[\d.]+|0\.0\.0\.0|::1?"
    return bool(re.fullmatch(own, urlsplit(url).hostname))


def proxies_to(url: str) -> str:
    """The variables that may name a proxy for this address, as words of an error line; "" for this machine's own."""
    names = [name for name in os.environ if re.fullmatch("(https?|all|no)_proxy", name.lower()) and os.environ[name]]
    return f" by way of {', '.join(names)}" if names and not on_this_machine(url) else ""


def is_local(args: argparse.Namespace) -> bool:
    """Whether the agents' endpoint is on this machine, and so perhaps on this GPU."""
    return not args.offline and on_this_machine(args.base_url)


def endpoint_name(args: argparse.Namespace) -> tuple[str, str]:
    """(model, endpoint): who answers; part of the key of every stored answer and of the settings of a stage."""
    if args.offline:
        if args.graded:
            fail("--graded needs an endpoint that returns logprobs; the rule-based critic has none: leave it out")
        from common.offline.critic import critic_name

        return critic_name(), "offline"
    return args.model, args.base_url
