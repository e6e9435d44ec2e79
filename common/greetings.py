"""Greetings of policies: which policies there are, and how they write, by an engine here or behind an endpoint."""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from common import records, run_folder
from common.answers import Text, Unusable
from common.client import Client, gather_all
from common.endpoint import add_endpoint_flags, address, variable
from common.engine import Writer, add_engine_flag, choose_engine
from common.policy import add_policy_flags, check_adapter, find_policy
from common.prompts import conversation, prompt_hashes

# The evaluator that was the reward of a policy, known by its folder.
REWARDS = {"policy_rm": "reward_model", "policy_judge": "judge", "policy_likelihood": "likelihood"}
# The policies of a run after the base, in the order of their making: name -> (folder, --reward of step 4).
OWN = {"sft": ("policy_sft", "none"), "grpo_rm": ("policy_rm", "rm"), "grpo_judge": ("policy_judge", "judge")}
OWN["grpo_likelihood"] = "policy_likelihood", "likelihood"
EMPTY = "（空）"  # in place of a greeting of no characters: a record needs a text


class Policy(NamedTuple):
    """Who writes: a base, a base with a LoRA adapter, or a model behind an endpoint."""

    name: str
    base: str = ""
    adapter: Path | None = None
    api: tuple[str, str, str] | None = None  # (model, endpoint, variable of its key or "")

    @property
    def trained_on(self) -> list[str]:
        """The evaluators that it was trained on, whose scores are no independent evidence for it: its reward, the
        rubric where it told the reward model what that overrates (02 --hard) or chose the best look (policy_*_best),
        and who made the labels (01).
        """
        if not self.adapter:
            return []
        run, name = self.adapter.parent, self.adapter.name.removesuffix("_best")
        own = [REWARDS[name]] if name in REWARDS else []
        taught = name == "policy_rm" and run_folder.read_summary(run, "02_summary").get("hard")
        if taught or (own and name != self.adapter.name):
            own.append("rubric")
        if labelling := run_folder.read_summary(run, "01_summary"):
            own.append(labelling["settings"].get("labels", "agents"))
        return sorted(set(own))


class Greeting(records.Record):
    """A line of generations/NAME.jsonl: one of a policy's samples for a query; until it is written, no `response`."""

    policy: str
    query_id: str
    query: str
    response: str = ""
    sample: int

    def content(self) -> tuple:
        return (self.policy, self.query_id, self.sample)


def parse_greeting_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the flags of every script in which policies write to be compared, and parse the command line."""
    who = parser.add_argument_group("policies").add_argument
    folders, models = "further policies: adapter folders or models", "others at an endpoint; KEY: variable of its key"
    who("--policies", type=_named, nargs="*", default=[], metavar="NAME=PATH", help=folders)
    who("--api", type=_named_api, nargs="*", default=[], metavar="NAME=MODEL@URL[,KEY]", help=models)
    how = parser.add_argument_group("greetings").add_argument
    how("--samples", type=run_folder.positive, default=2, help="greetings per policy and query (%(default)s)")
    how("--temperature", type=float, default=1.0, help="%(default)s")
    how("--max-tokens", type=int, default=512, help="of a greeting (%(default)s)")
    add_policy_flags(parser)
    add_engine_flag(parser)
    add_endpoint_flags(parser)
    run_folder.add_run_flags(parser)
    args = run_folder.parse(parser, {"bits": 16, "max_tokens": 48, "batch_size_generate": 260, "engine": "hf"})
    choose_engine(args)
    return args


def _named(text: str) -> tuple[str, str]:
    """argparse type: NAME=PATH; the name is also a file's."""
    name, _, path = text.partition("=")
    if not re.fullmatch(r"\w[\w.-]*", name) or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def _named_api(text: str) -> tuple[str, tuple[str, str, str]]:
    """argparse type: NAME=MODEL@URL or NAME=MODEL@URL,KEY. What is wrong is not shown: there may be a key in it."""
    match = re.fullmatch(r"(\w[\w.-]*)=(.+)@([^@,]+)(?:,(.*))?", text)
    if not match:
        raise argparse.ArgumentTypeError("not NAME=MODEL@URL, or NAME=MODEL@URL,KEY")
    name, model, url, key = match.groups()
    return name, (model, address(url), variable(key) if key is not None else "")


# ---- policies -------------------------------------------------------------------------------------------------------


def present_policies(args: argparse.Namespace, base: str) -> list[Policy]:
    """The policies to compare; one that is missing is named, with the command that makes it, and left out."""
    policies = [Policy("base", base)]
    expected = {"none", "rm"} if (args.run / OWN["grpo_likelihood"][0]).is_dir() else {"none", "rm", "judge"}
    for name, (folder, reward) in OWN.items():
        adapter = args.run / folder
        if find_policy(adapter)[1] and not run_folder.unfinished(args.run, f"04_{reward}"):
            check_adapter(adapter, base)
            policies.append(Policy(name, base, adapter))
        elif reward in expected or run_folder.unfinished(args.run, f"04_{reward}"):
            command = f"python 04_grpo.py --reward {reward} --run {args.run}"
            print(f"policies: no finished {adapter}; make it with: {command}", file=sys.stderr)
    for name, path in args.policies:
        is_hub_name = not path.startswith((".", "/", "~"))
        policy = Policy(name, *find_policy(path))
        if is_hub_name or policy.adapter or Path(path, "config.json").is_file():
            policies.append(policy)
        else:
            print(f"policies: {path} holds no model and no adapter: going on without {name}", file=sys.stderr)
    for name, place in args.api:
        policies.append(Policy(name, api=place))
    for name, count in Counter(policy.name for policy in policies).items():
        if count > 1:
            run_folder.fail(f"two policies are named {name}; choose another name in --policies or --api")
    return policies


def greeting_settings(args: argparse.Namespace, policy: Policy) -> dict:
    """What a policy's greetings depend on."""
    made_with = run_folder.settings(args, "greetings")
    made_with |= {"queries": run_folder.file_hash(args.queries), "prompts": prompt_hashes(["policy"], args.prompts)}
    if policy.api:
        return made_with | {"api": policy.api[:2]}
    weights = run_folder.file_hash(policy.adapter / "adapter_model.safetensors") if policy.adapter else ""
    return made_with | run_folder.settings(args, "models") | {"base": policy.base, "adapter": weights}


def client_at(args: argparse.Namespace, step: str, model: str, url: str, key: str, flags: str = "") -> Client:
    """A client of another endpoint than the agents'; --offline does not hold for it.

    `key` names the variable of its key. The agents' key is sent to no other address than theirs.
    """
    key = key or (args.api_key_env if url == args.base_url else "")
    changed = {"model": model, "base_url": url, "api_key_env": key, "offline": False}
    return Client(argparse.Namespace(**vars(args) | changed), step, flags or "--api NAME=MODEL@URL,KEY")


# ---- writing --------------------------------------------------------------------------------------------------------


def write_greetings(
    args: argparse.Namespace,
    writer: Writer,
    base: str,
    adapter: Path | None,
    slots: list[tuple[str, str]],
    temperature: float,
    title: str,
) -> Iterator[str]:
    """Yield a greeting for each (key, query) slot, in their order; keys are hexadecimal digests.

    They are written a chunk at a time, seeded by the key of its first slot, so that a killed run loses one chunk and
    a resumed one does not repeat it.
    """
    size = 4 * args.batch_size_generate
    for start in range(0, len(slots), size):
        chunk = slots[start : start + size]
        prompts = [conversation(query, args.prompts) for _, query in chunk]
        seed = int(chunk[0][0][:8], 16)
        progress = f"{title} {start + len(chunk)}/{len(slots)}"
        for text in writer(base, adapter, prompts, temperature=temperature, seed=seed, progress=progress):
            yield text or EMPTY


async def greet(
    args: argparse.Namespace,
    policy: Policy,
    writer: Client | Writer,
    slots: list[Greeting],
    keep: Callable[[Greeting], None],
    failures: Counter,
) -> None:
    """Fill in each slot's `response` and `keep` it; what a policy's endpoint fails to answer is counted, not kept."""
    if policy.api:

        async def ask(slot: Greeting) -> None:
            how = {"temperature": args.temperature, "sample": slot.sample}
            try:
                answer = await writer.ask("policy", Text, query=slot.query, **how)
            except Unusable as e:
                failures[f"greetings of {policy.name}: {e}"] += 1
            else:
                slot.response = answer.text
                keep(slot)

        await gather_all(*map(ask, slots))
        return
    # The keys leave the policy's name out: every policy draws with the same seeds.
    keyed = [(run_folder.digest(args.seed, slot.sample, slot.query), slot.query) for slot in slots]
    title = f"greetings of {policy.name}"
    texts = write_greetings(args, writer, policy.base, policy.adapter, keyed, args.temperature, title)
    for slot, text in zip(slots, texts, strict=True):
        slot.response = text
        keep(slot)


async def greetings_of(
    args: argparse.Namespace, policy: Policy, queries: list[records.Query], writer: Client | Writer, failures: Counter
) -> list[dict]:
    """A policy's --samples greetings per query, in generations/NAME.jsonl; a killed run goes on where it was."""
    file, made_with = f"generations/{policy.name}.jsonl", greeting_settings(args, policy)
    path = args.run / file
    stage = run_folder.Stage(args.run, f"05_greetings_{policy.name}", [file], made_with, args.redo)
    if not stage.done:
        slots = []
        for sample in range(args.samples):
            for query in queries:
                slots.append(Greeting(policy=policy.name, query_id=query.id, query=query.query, sample=sample))
        with records.Appender(path) as append:
            missing = [slot for slot in slots if slot.id not in append.done]
            await greet(args, policy, writer, missing, append, failures)
            if len(append.done) == len(slots):
                stage.finish()
    if not path.stat().st_size:
        print(f"05: {policy.name} wrote nothing: going on without it", file=sys.stderr)
        return []
    return [greeting.model_dump() for greeting in records.read(path, Greeting)]
