"""Step 5 as a user runs it, its comparisons, and the two tools beside it: tools/ask.py and tools/ablations.py."""

import asyncio
import importlib
import json
import shutil
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, lines, run_script
from endpoint import chat, critic, data_of, endpoint, settings, status

from common.answers import Text
from common.client import Client
from common.greetings import Policy, greeting_settings
from common.records import write
from common.store import Store

step5 = importlib.import_module("05_evaluate")
sys.path.insert(0, str(ROOT / "tools"))
ablations = importlib.import_module("ablations")


# ---- comparisons ----------------------------------------------------------------------------------------------------


def compared(reply, one: str, other: str, run: Path) -> SimpleNamespace:
    """The outcome of a comparison whose judge replies like this, how often it was asked, and the failures."""
    rows = [{"id": name, "query": "祝福", "response": text} for name, text in (("1", one), ("2", other))]
    row, failures = step5.comparison(*rows), Counter()

    async def ask(url: str) -> None:
        async with Client(settings(url, run=run, attempts=1), "05") as client:
            await step5.add_outcome(client, row, *rows, failures)

    with endpoint(reply) as server:
        asyncio.run(ask(server.url))
        return SimpleNamespace(**row, asked=len(server.asked), failures=failures.total())


def prefers(text: str):
    def reply(request: dict):
        shown = data_of(request["messages"])
        return chat(json.dumps({"reason": "r", "better": "A" if shown["A"] == text else "B"}))

    return reply


def test_both_orders_are_asked_and_a_verdict_that_flips_is_a_tie(tmp_path: Path) -> None:
    first = chat('{"reason": "r", "better": "A"}')
    flips = compared(first, "甲", "乙", tmp_path / "1")
    assert (flips.outcome, flips.same, flips.asked) == (0.5, False, 2)
    holds = compared(prefers("乙"), "甲", "乙", tmp_path / "2")
    assert (holds.outcome, holds.same, holds.asked) == (0.0, True, 2)
    ties = compared(chat('{"reason": "r", "better": "tie"}'), "甲", "乙", tmp_path / "3")
    assert (ties.outcome, ties.same) == (0.5, True)
    same = compared(first, "甲", "甲", tmp_path / "4")
    assert (same.outcome, same.same, same.asked) == (0.5, None, 0)
    fails = compared(chat('{"better": "C"}'), "甲", "乙", tmp_path / "5")
    assert fails.outcome is None and fails.same is None and fails.failures == 1


# ---- as a user runs it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--policies", "nameless"], "'nameless' is not NAME=PATH"),
        (["--policies", "base=outputs/x", "base=outputs/y"], "two policies are named base"),
        (["--api", "big=model"], "not NAME=MODEL@URL, or NAME=MODEL@URL,KEY"),
        (["--api", "big=model@nowhere"], "an address such as"),
        (["--annotations", "missing.jsonl"], "missing.jsonl does not exist"),
    ],
)
def test_bad_flags_end_in_one_line(tmp_path: Path, monkeypatch, capsys, flags: list[str], told: str) -> None:
    monkeypatch.setattr("sys.argv", ["05_evaluate.py", "--offline", "--run", str(tmp_path / "run"), *flags])
    monkeypatch.setattr(step5, "policy_path", lambda args: "base")
    with pytest.raises(SystemExit) as stopped:
        step5.main(step5.parse_args())
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(errors) == 1 and told in errors[0], errors


def test_an_endpoint_that_fails_is_counted_and_asked_again_without_writing_again(tmp_path: Path) -> None:
    queries = tmp_path / "queries.jsonl"
    write(queries, lines(ROOT / "data/queries_heldout.jsonl")[:6])
    rows = lines(ROOT / "data/labelled.jsonl")[:240]
    write(tmp_path / "labelled.jsonl", rows)
    broken = True

    def reply(request: dict):
        if "response_format" not in request:
            return chat("祝您节日快乐，桃李满园。")
        role = request["response_format"]["json_schema"]["name"]
        unlucky = sum(map(ord, request["messages"][-1]["content"])) % 3 == 0
        return status(500) if broken and role == "rubric" and unlucky else critic(request)

    run = tmp_path / "run"
    with endpoint(reply) as server:
        flags = ["--offline", "--run", run, "--queries", queries, "--labelled", tmp_path / "labelled.jsonl"]
        flags += ["--attempts", 1, "--samples", 2, "--eval-model", "other-judge", "--eval-base-url", server.url]
        flags += ["--api", f"big=large-model@{server.url}", "--policies", f"lost={tmp_path / 'lost'}"]
        done = run_script("05_evaluate.py", *flags)
        assert done.returncode == 3 and "rubric: HTTP 500" in done.stdout, done.stdout + done.stderr
        for reward in ("none", "rm", "judge"):
            assert f"make it with: python 04_grpo.py --reward {reward} --run {run}" in done.stderr
        assert f"{tmp_path / 'lost'} holds no model and no adapter: going on without lost" in done.stderr
        summary, report = json.loads((run / "05_summary.json").read_text()), (run / "report.md").read_text()
        assert set(summary["policies"]) == {"base", "big"} and summary["policies"]["big"]["greetings"] == 12
        assert summary["evaluators"]["rubric"]["failed"] > 0 and summary["failures"]["rubric: HTTP 500"] > 0
        assert " incomplete" in report and "other-judge, named for evaluation alone" in report
        written = {path.name: path.read_bytes() for path in (run / "generations").iterdir()}
        assert {row["response"] for row in lines(run / "generations/big.jsonl")} == {"祝您节日快乐，桃李满园。"}
        check_ledger(run, summary, server.asked)

        broken, before = False, len(server.asked)
        done = run_script("05_evaluate.py", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        again = server.asked[before:]
        assert {request["response_format"]["json_schema"]["name"] for request in again} == {"rubric"}
        assert json.loads((run / "05_summary.json").read_text())["evaluators"]["rubric"]["failed"] == 0
        assert written == {path.name: path.read_bytes() for path in (run / "generations").iterdir()}

        # Other labelled greetings: what was made is not made again.
        write(tmp_path / "labelled.jsonl", rows[:-2])
        refused = run_script("05_evaluate.py", *flags)
        assert refused.returncode == 2 and "labelled=" in refused.stderr and "--redo" in refused.stderr
        # A torn line, as a kill leaves it, and a greeting short: only that one is written.
        torn = run / "generations/big.jsonl"
        torn.write_bytes(written["big.jsonl"][:-30])
        stage = run / "stages/05_greetings_big.json"
        stage.write_text(stage.read_text().replace('"done": true', '"done": false'))
        before = len(server.asked)
        done = run_script("05_evaluate.py", *flags, "--redo")
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(server.asked) == before and torn.read_bytes() == written["big.jsonl"]  # from the answers kept
        assert (run / "generations/base.jsonl").read_bytes() == written["base.jsonl"]
    shutil.rmtree(run)


def check_ledger(run: Path, summary: dict, asked: list[dict]) -> None:
    """The ledger of step 5 holds everything that it asked: what an endpoint served, and the five agents too."""
    store = Store(run / "answers.sqlite", "05")
    assert summary["ledger"] == store.ledger()
    assert store.ledger("policy", "rubric", "pairwise")["calls"] == len(asked)
    agents = store.ledger("positive", "negative", "judge", "reflect")
    assert agents["calls"] > 0 and agents["calls"] % 4 == 0  # no principles here: nobody else was asked
    assert summary["ledger"]["calls"] == agents["calls"] + len(asked)


# ---- keys and addresses ---------------------------------------------------------------------------------------------

OWN_KEY = "sk-of-the-judge-alone"


def parse(monkeypatch, *flags: object):
    monkeypatch.setattr("sys.argv", ["05_evaluate.py", "--engine", "hf", *map(str, flags)])
    return step5.parse_args()


def ask_everybody(args) -> None:
    """Connect every client of step 5, and ask each something."""
    policies = [Policy(name, api=place) for name, place in args.api]

    async def ask() -> None:
        async with AsyncExitStack() as stack:
            agents, rubric, writers = await step5.open_clients(args, policies, stack)
            for client in (agents, rubric, *writers.values()):
                await client.ask("policy", Text, query=client.model)

    asyncio.run(ask())


@pytest.fixture
def hosts(monkeypatch):
    """Three endpoints, the first that of the agents; OWN_KEY is in the variable JUDGE_KEY."""
    monkeypatch.setenv("JUDGE_KEY", OWN_KEY)
    with endpoint(chat("好。")) as one, endpoint(chat("好。")) as two, endpoint(chat("好。")) as three:
        yield one, two, three


def test_a_key_reaches_no_address_that_it_was_not_named_for(tmp_path: Path, monkeypatch, hosts) -> None:
    agents, judge, policy = hosts
    flags = ["--run", tmp_path, "--base-url", agents.url, "--api-key-env", "JUDGE_KEY", "--eval-base-url", judge.url]
    ask_everybody(parse(monkeypatch, *flags, "--api", f"big=m@{policy.url}", f"same=n@{agents.url}"))
    assert set(agents.keys) == {f"Bearer {OWN_KEY}"} and len(agents.asked) == 2
    assert set(judge.keys) == set(policy.keys) == {"Bearer none"}


def test_every_address_can_have_a_key_of_its_own(tmp_path: Path, monkeypatch, hosts) -> None:
    agents, judge, policy = hosts
    monkeypatch.setenv("EVAL_KEY", "sk-eval")
    monkeypatch.setenv("big_key", "sk-big")
    flags = ["--run", tmp_path, "--base-url", agents.url, "--api-key-env", "JUDGE_KEY", "--eval-base-url", judge.url]
    flags += ["--eval-api-key-env", "EVAL_KEY", "--api", f"big=a@b,c@{policy.url},big_key", f"two=n@{policy.url}"]
    args = parse(monkeypatch, *flags)
    ask_everybody(args)
    assert [set(host.keys) for host in hosts] == [
        {f"Bearer {OWN_KEY}"}, {"Bearer sk-eval"}, {"Bearer sk-big", "Bearer none"},
    ]  # fmt: skip
    assert {request["model"] for request in policy.asked} == {"a@b,c", "n"}
    # Which variable holds the key makes no greeting another.
    renamed = Policy("big", api=("a@b,c", policy.url, ""))
    assert greeting_settings(args, Policy("big", api=args.api[0][1])) == greeting_settings(args, renamed)


@pytest.mark.parametrize("refuses", [True, False], ids=["refused", "nobody_there"])
@pytest.mark.parametrize(
    ("flags", "key", "address"),
    [
        (["--base-url", "URL"], "--api-key-env", "--base-url"),
        (["--eval-base-url", "URL"], "--eval-api-key-env", "--eval-base-url"),
        (["--api", "big=m@URL"], "--api NAME=MODEL@URL,KEY", "--api NAME=MODEL@URL,KEY"),
    ],
    ids=["agents", "evaluation", "policy"],
)
def test_an_error_line_names_the_flag_of_the_endpoint_that_fails(
    tmp_path: Path, monkeypatch, capsys, hosts, flags: list[str], key: str, address: str, refuses: bool
) -> None:
    agents, other, _ = hosts
    other.models = status(401, "wrong key")
    url = other.url if refuses else "http://127.0.0.1:1/v1"
    flags = ["--base-url", agents.url, *(word.replace("URL", url) for word in flags)]
    with pytest.raises(SystemExit) as stopped:
        ask_everybody(parse(monkeypatch, "--run", tmp_path, *flags))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and url in line
    assert (f"set the variable that {key} names" if refuses else f"name one with {address}") in line


@pytest.mark.parametrize(
    "flags",
    [
        ["--api", "big=m@http://user:KEY@host/v1"], ["--api", "big=m@http://host/v1,KEY"], ["--api", "m@http://u:KEY@h"],
        ["--api-key-env", "KEY"], ["--eval-api-key-env", "KEY"], ["--eval-base-url", "https://KEY@host/v1"],
        ["--base-url", "http://host/v1?key=KEY"], ["--base-url", "http://[::1/KEY"], ["--base-url", "http://host:KEY"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_key_in_place_of_a_variables_name_is_refused_and_shown_nowhere(
    tmp_path: Path, monkeypatch, capsys, flags: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(monkeypatch, "--run", tmp_path / "run", *(word.replace("KEY", "gsk_a1b2c3") for word in flags))
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and "gsk_a1b2c3" not in errors, errors
    assert errors.startswith(f"error: argument {flags[0]}: not ") and not (tmp_path / "run").exists()


# ---- tools/ask.py ---------------------------------------------------------------------------------------------------


def test_ask_prints_every_policys_answer(tmp_path: Path) -> None:
    with endpoint(chat("老师，节日快乐。")) as server:
        flags = ["--offline", "--run", tmp_path / "run", "--samples", 1, "--api", f"big=m@{server.url}"]
        done = run_script("tools/ask.py", "给班主任的教师节祝福", *flags)
    assert done.returncode == 0, done.stderr
    said = [line.split(maxsplit=1) for line in done.stdout.strip().splitlines()]
    assert said[0] == ["给班主任的教师节祝福"] and [line[0] for line in said[1:]] == ["base", "big"]
    prompt = server.asked[0]["messages"][0]["content"]
    assert said[2][1] == "老师，节日快乐。" and prompt.endswith("给班主任的教师节祝福")
    assert not (tmp_path / "run/generations.jsonl").exists()


# ---- tools/ablations.py ---------------------------------------------------------------------------------------------


@pytest.fixture
def ablation_args(tmp_path: Path, monkeypatch):
    """The arguments of tools/ablations.py for these flags."""

    def parse(*flags: object):
        monkeypatch.setattr("sys.argv", ["ablations.py", "--offline", "--run", str(tmp_path), *map(str, flags)])
        return ablations.parse_args()

    return parse


def test_ablations_leave_each_part_out_and_compare_on_the_same_rows(tmp_path: Path, monkeypatch, ablation_args) -> None:
    labels = {(row["query"], row["response"]): row["label"] for row in lines(ROOT / "data/labelled.jsonl")}
    shown, commands = Counter(), []

    async def pretend_debate(client, candidate, examples, *, debate: bool, reflect: bool):
        """The whole agents are always right, those without debate accept everything."""
        shown["examples" if examples else "none", debate, reflect] += 1
        label = labels[candidate.query, candidate.response] if debate else 1
        return SimpleNamespace(label=label, error=None)

    def pretend_step_3(command: list[str], **how) -> SimpleNamespace:
        folder = Path(command[command.index("--run") + 1])
        commands.append((Path(command[1]).name, folder.name, [flag for flag in command if flag.startswith("--no-")]))
        rule = "短的不合格" if "--no-reflection" in command else "写到一半就中断的不合格；不堆砌套话"
        write(folder / "principles.jsonl", [{"id": "0", "principles": [rule], "accepted": True}])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ablations.run_folder, "open_run", lambda run: run)  # or this process could not call it twice
    monkeypatch.setattr("common.debate.debate", pretend_debate)
    monkeypatch.setattr(ablations.subprocess, "run", pretend_step_3)
    assert ablations.main(ablation_args("--rows", 200)) == 0
    figures = {row["ablation"]: row for row in lines(tmp_path / "ablations.jsonl")}
    sample = lines(tmp_path / "ablations/labelled.jsonl")
    assert 200 <= len(sample) < 210
    assert shown == {
        ("examples", True, True): len(sample), ("none", True, True): len(sample),
        ("examples", False, True): len(sample), ("examples", True, False): len(sample),
    }  # fmt: skip
    assert [flags for _, _, flags in commands] == [[], ["--no-adversary"], ["--no-reflection"], ["--no-acceptance"]]
    assert len({folder for _, folder, _ in commands}) == 4  # none writes over another
    assert figures["agents, whole"]["n"] == len(sample) and figures["agents, whole"]["kappa"] == 1.0
    assert figures["agents, without retrieval"]["difference"]["value"] == 0
    good = sum(row["label"] for row in sample) / len(sample)
    assert figures["agents, without debate"]["accuracy"]["value"] == pytest.approx(good, abs=1e-4)
    assert figures["agents, without debate"]["difference"]["words"] == "more than noise"
    assert figures["principles, whole"]["n"] < len(sample) / 2  # the part that nothing was learnt from
    assert figures["principles, without adversary"]["difference"]["words"] == "inside noise"
    assert figures["principles, whole"]["kappa"] != figures["principles, without reflection"]["kappa"]
    asked = len(commands)
    assert ablations.main(ablation_args("--rows", 200)) == 0 and len(commands) == asked  # done already


def test_step_3_gets_the_same_endpoint_and_what_is_left_to_spend(tmp_path: Path, monkeypatch, ablation_args) -> None:
    args = ablation_args("--budget", 100, "--price-in", 1000, "--price-out", 2000, "--attempts", 2)
    own = tmp_path / "ablations/principles_whole"
    spent = {tmp_path: (10_000, 5_000), tmp_path / "ablations/other": (1_000, 0), own: (99, 99)}
    for folder, tokens in spent.items():
        store = Store(folder / "answers.sqlite", "03")
        store.end(store.begin("judge"), "judge", "ok", tokens)
    flags = ablations.endpoint_flags(args, own)
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    assert float(values["--price-in"]) == 1000 and float(values["--price-out"]) == 2000 and values["--attempts"] == "2"
    assert float(values["--budget"]) == pytest.approx(100 - 10 - 10 - 1)  # what its folder has cost step 3 counts
    monkeypatch.setattr("sys.argv", ["03_refine_judge.py", "--seed", "0", *flags])
    importlib.import_module("03_refine_judge").parse_args()  # knows every one of them
