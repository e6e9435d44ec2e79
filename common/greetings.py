"""Greetings of policies, written in chunks by an engine or behind an endpoint."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from common.answers import Text, Unusable
from common.client import Client, together
from common.engine import Writer
from common.policy import check_adapter
from common.prompts import conversation, prompt_hashes
from common.records import Record
from common.run_folder import digest, fail, file_hash

# The evaluator that was the reward of a policy, known by its folder: what it says of that policy is nothing new.
REWARDS = {"policy_rm": "reward_model", "policy_judge": "judge"}
OWN = {"sft": ("policy_sft", "none"), "grpo_rm": ("policy_rm", "rm"), "grpo_judge": ("policy_judge", "judge")}


class Policy(NamedTuple):
    name: str
    base: str = ""
    adapter: Path | None = None
    api: tuple[str, str] | None = None  # (model, endpoint)

    @property
    def reward(self) -> str | None:
        """The evaluator that was its reward."""
        return REWARDS.get(self.adapter.name) if self.adapter else None


class Greeting(Record):
    """A line of generations/NAME.jsonl."""

    policy: str
    query_id: str
    query: str
    response: str = Field(min_length=1)
    sample: int


def present_policies(args: argparse.Namespace, base: str) -> list[Policy]:
    """The policies to compare; one that is missing is named, with the command that makes it, and left out."""
    found = [Policy("base", base)]
    for name, (folder, reward) in OWN.items():
        adapter = args.run / folder
        if (adapter / "adapter_config.json").is_file():
            check_adapter(adapter, base)
            found.append(Policy(name, base, adapter))
        else:
            made_by = f"python 04_grpo.py --reward {reward} --run {args.run}"
            print(f"05: no {adapter}; make it with: {made_by}", file=sys.stderr)
    for name, path in args.policies:
        config = Path(path, "adapter_config.json")
        if config.is_file():
            found.append(Policy(name, json.loads(config.read_text())["base_model_name_or_path"], Path(path)))
        elif path.startswith((".", "/", "~")) and not Path(path, "config.json").is_file():
            print(f"05: {path} holds no model and no adapter: going on without {name}", file=sys.stderr)
        else:
            found.append(Policy(name, path))
    found += [Policy(name, api=where) for name, where in args.api]
    if twice := [name for name, n in Counter(p.name for p in found).items() if n > 1]:
        fail(f"two policies are named {twice[0]}; choose another name in --policies or --api")
    return found


def made_with(args: argparse.Namespace, policy: Policy) -> dict:
    """What a policy's greetings depend on."""
    made = {key: getattr(args, key) for key in ("seed", "samples", "temperature")}
    made |= {"queries": file_hash(args.queries), "prompts": prompt_hashes(["policy"], args.prompts)}
    if policy.api:
        return made | {"api": policy.api}
    weights = file_hash(policy.adapter / "adapter_model.safetensors") if policy.adapter else ""
    made |= {key: getattr(args, key) for key in ("max_tokens", "bits", "batch_size_generate", "engine")}
    return made | {"base": policy.base, "adapter": weights}


def endpoint_args(args: argparse.Namespace, model: str, url: str) -> argparse.Namespace:
    """The settings of a client for another endpoint."""
    return argparse.Namespace(**vars(args) | {"model": model, "base_url": url, "offline": False})


async def greet(args: argparse.Namespace, policy: Policy, writer: Client | Writer, asked: list, keep, failures) -> None:
    """`keep(n, text)` for each n-th (sample, query) asked, as it is written; failures of an endpoint are counted."""
    if policy.api:

        async def one(n: int, sample: int, query: str) -> None:
            try:
                answer = await writer.ask("policy", Text, temperature=args.temperature, sample=sample, query=query)
                keep(n, answer.text)
            except Unusable as e:
                failures[f"greetings of {policy.name}: {e}"] += 1

        await together(*(one(n, *slot) for n, slot in enumerate(asked)))
        return
    chunk = 4 * args.batch_size_generate  # kept as it is done: a killed run loses one chunk
    for start in range(0, len(asked), chunk):
        part = asked[start : start + chunk]
        texts = writer(
            policy.base, policy.adapter, [conversation(query, args.prompts) for _, query in part],
            temperature=args.temperature, seed=int(digest(args.seed, *part[0])[:8], 16),
            progress=f"greetings of {policy.name}",
        )  # fmt: skip
        for n, text in enumerate(texts, start):
            keep(n, text or "（空）")
