"""Before the paper run: is there what it needs, and what will it take? Each failure comes with its remedy.

GPU and driver, memory of the GPU and of the machine, disk, the models, the agents' endpoint; then the hours and the
money that follow from the number of calls and greetings. Nothing is started, loaded or spent. `bash run.sh --paper`
runs this first; `bash run.sh --check` runs it alone.

The policy and what else decides about memory are the best of common/memory.py's SETTINGS that fit on the GPU that is
here; flags win. run.sh asks for them with --choose, docs/more_gpus.md has what --table prints.

Reads   the data files, the models' place on this disk; asks the endpoint for its models
Exit    0 all is there, 2 something is not
Example python tools/check.py
        python tools/check.py --base-url https://endpoint.example/v1 --model NAME --price-in 0.3 --price-out 1.2
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import memory, records, run_folder
from common.endpoint import OWN_SERVER, add_endpoint_flags, proxies_to
from common.engine import add_engine_flag
from common.policy import DEFAULT_POLICY, add_policy_flags
from common.report.cost import DRAWN, POINTS, ROUTES
from common.run_folder import ROOT
from common.trainers import add_grpo_flags

SIZES = {
    DEFAULT_POLICY: 14.2,
    memory.QWEN_1B: 2.9,
    memory.QWEN_HALF_B: 0.9,
    "Qwen/Qwen2.5-32B-Instruct-AWQ": 18.1,
}  # GiB of weights
OTHER_DISK = 8.0  # GiB for adapters, checkpoints, records and answers; an estimate
VERSIONS = 4  # versions of the principles under which step 3 judges the validation part; an estimate
CARDS = (80, 48, 24, 16, 12, 8)  # GB, of the table
CALL_TOKENS = (700, 160)  # input and output tokens of an agent's call; a guess
GREETING_TOKENS = 110  # output tokens of a greeting; a guess
SAMPLES, COMPARED = 2, 200  # step 5's defaults of --samples and --pairwise


def parse_args(settings: dict) -> argparse.Namespace:
    """The command line, with these settings where it has no flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what it will take").add_argument
    positive, data = run_folder.positive, ROOT / "data"
    add("--heldout", type=Path, default=data / "queries_heldout.jsonl", help="queries of step 5 (%(default)s)")
    add("--labelled", type=Path, default=data / "labelled.jsonl", help="of steps 3 and 5 (%(default)s)")
    add("--judge-speed", type=positive, default=800, help="tokens per second of the agents' model (%(default)s)")
    add("--write-speed", type=positive, default=2000, help="the same of the policy, in steps 1, 4 and 5 (%(default)s)")
    add("--train-speed", type=positive, default=1500, help="tokens per second in training (%(default)s)")
    add = parser.add_argument_group("instead of the checks").add_argument
    add("--choose", action="store_true", help="print the settings that fit here, as run.sh reads them")
    add("--table", action="store_true", help="print those of cards of the usual sizes")
    add_grpo_flags(parser)
    add_policy_flags(parser)
    add_engine_flag(parser)
    memory.add_memory_flags(parser)
    add_endpoint_flags(parser)
    run_folder.add_run_flags(parser)
    if os.environ.get("JUDGE_MEMORY"):  # is a choice of the user's, too
        settings = {name: value for name, value in settings.items() if name != "judge_memory"}
    parser.set_defaults(**settings, base_url=None)
    args = run_folder.parse(parser, {})
    args.policy = args.policy or DEFAULT_POLICY
    # Without --base-url, tools/with_judge.sh will start the judge on this machine.
    args.own_server = args.base_url is None
    args.base_url = args.base_url or OWN_SERVER
    args.models = [args.policy, args.model] if args.own_server else [args.policy]
    # GRPO with the reward model takes most: that is on the GPU too, and a judge answers the watch.
    args.reward, args.watch_every, args.rm = "rm", 1, args.run / "rm"
    return args


# ---- the settings that fit ------------------------------------------------------------------------------------------


def best_fit(**place: object) -> argparse.Namespace | None:
    """The first of the settings that fit, with the judge at `base_url` if the user names none, into `gpu_memory`."""
    for settings in memory.SETTINGS:
        args = parse_args(settings)
        if not args.own_server:
            place.pop("base_url", None)
        args, have, _ = memory.room(argparse.Namespace(**vars(args) | place))
        if memory.first_fit(args, args.policy, have, [{}]):
            return args
    return None


def in_words(args: argparse.Namespace) -> str:
    """The settings that decide about memory, as one line."""
    return f"{args.policy} in {args.bits} bits, {' '.join(engine_flags(args) + grpo_flags(args))}"


def grpo_flags(args: argparse.Namespace) -> list[str]:
    return ["--micro-batch", str(args.micro_batch)] + ["--sleep"] * args.sleep


def engine_flags(args: argparse.Namespace) -> list[str]:
    return ["--engine", args.engine] if args.engine else []


def table() -> str:
    """What cards of the usual sizes get, in Markdown: with a judge of 32B on the GPU, and with one elsewhere."""
    lines = ["| card | judge | policy | bits | flags of step 04 | peak |", "|---|---|---|---|---|---|"]
    for card in CARDS:
        for url in (OWN_SERVER, memory.ELSEWHERE):
            args = best_fit(gpu_memory=card * memory.FREE, base_url=url)
            if args is None:
                continue
            judge = f"on it, {args.judge_memory:g} GiB" if url == OWN_SERVER else "elsewhere"
            peak = memory.peak(args, memory.plan(args, args.policy))
            flags = f"`{' '.join(engine_flags(args) + grpo_flags(args))}`"
            cells = [f"{card} GB", judge, args.policy.rpartition("/")[2], str(args.bits), flags, f"{peak:.1f} GiB"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def choose() -> argparse.Namespace:
    """The arguments of the best settings that fit on the GPU here; of the best of all, where none does."""
    return best_fit() or parse_args(memory.SETTINGS[0])


# ---- what has to be there: each check returns ("", what is there) or (the remedy, what is not) ----------------------


def gpu(args: argparse.Namespace) -> tuple[str, str]:
    if memory.gpu_gib() is None:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
        finding = "CUDA_VISIBLE_DEVICES hides it" if hidden else "nvidia-smi finds none, or no driver"
        return "use a machine with an NVIDIA GPU, or --offline", f"no GPU: {finding}"
    import torch

    if torch.version.cuda is None:
        return "bash run.sh, or: pip install -r requirements.txt", f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "install a newer driver", f"the driver is too old for torch's CUDA {torch.version.cuda}"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability < (8, 0):
        return "use a GPU of the Ampere generation or newer, or --offline", f"{name} does not compute in bf16"
    return "", f"{name}, CUDA {torch.version.cuda}"


def gpu_memory(args: argparse.Namespace) -> tuple[str, str]:
    remedy, figures = memory.check_fit(args, args.policy)
    if remedy and args.own_server:
        elsewhere = best_fit(base_url=memory.ELSEWHERE)
        if elsewhere:
            remedy = f"name a judge elsewhere with --base-url: {elsewhere.policy} then fits"
    return remedy, f"{figures.strip()}: {in_words(args)}"


def machine_memory(args: argparse.Namespace) -> tuple[str, str]:
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / memory.GIB
    need = 2 * size_of(args.policy) + 8  # the base and its dequantised copy, when that is written
    remedy = "use a machine with more, or a smaller --policy" if have < need else ""
    return remedy, f"{have:.0f} GiB of memory, {need:.0f} needed"


def disk(args: argparse.Namespace) -> tuple[str, str]:
    need = size_of(args.policy) + OTHER_DISK  # the dequantised base is written beside the base
    for name in args.models:
        need += 0 if is_present(name) else size_of(name)
    have = shutil.disk_usage(ROOT).free / memory.GIB
    remedy = "make room, or set HF_HOME to a folder on another disk" if have < need else ""
    return remedy, f"{have:.0f} GiB free, {need:.0f} needed"


def model_files(args: argparse.Namespace) -> tuple[str, str]:
    missing = [name for name in args.models if not is_present(name)]
    if missing:
        return "; ".join(f"hf download {name}" for name in missing), f"not on this machine: {', '.join(missing)}"
    return "", ", ".join(args.models)


def engine(args: argparse.Namespace) -> tuple[str, str]:
    if not importlib.util.find_spec("vllm"):
        return "pip install -r requirements.txt", "vLLM is not installed"
    return "", f"vLLM {importlib.metadata.version('vllm')}"


def endpoint(args: argparse.Namespace) -> tuple[str, str]:
    if args.own_server:
        return port_is_free(args)
    import httpx2
    import openai

    key, route = os.environ.get(args.api_key_env) or "none", proxies_to(args.base_url)
    try:
        http = openai.DefaultHttpxClient(trust_env=bool(route))
        client = openai.OpenAI(base_url=args.base_url, api_key=key, max_retries=0, timeout=20, http_client=http)
        served = [model.id for model in client.models.list().data]
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        remedy = f"set {args.api_key_env}, or name another variable with --api-key-env"
        return remedy, f"{args.base_url} refuses the key"
    except (ValueError, httpx2.InvalidURL):
        return "name an http:// proxy there, or none", f"{args.base_url} cannot be asked{route}"
    except openai.APIConnectionError:
        remedy = "start it, name another with --base-url, or leave that out: the judge is then started here"
        return remedy, f"{args.base_url} does not answer"
    except (openai.APIError, AttributeError, TypeError):
        served = []  # not every server lists its models
    if served and args.model not in served:
        return f"name one with --model: {', '.join(served[:5])}", f"{args.base_url} has no {args.model}"
    return "", f"{args.base_url} answers"


def port_is_free(args: argparse.Namespace) -> tuple[str, str]:
    """Whether tools/with_judge.sh can start the judge on its port."""
    port = urlsplit(args.base_url).port
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    if taken:
        return "stop what answers there, or name an endpoint with --base-url", f"port {port} is taken"
    return "", f"port {port} is free for the judge's server"


def is_present(name: str) -> bool:
    """Whether a model's weights are on this machine: in a folder, or in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if Path(name).is_dir():
        return True
    try:
        return any(Path(snapshot_download(name, local_files_only=True)).glob("*.safetensors"))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return False


def size_of(name: str) -> float:
    """GiB of a model's weights; those of a folder are counted, an unknown one is taken for a 7B model."""
    if Path(name).is_dir():
        return sum(file.stat().st_size for file in Path(name).glob("*.safetensors")) / memory.GIB
    return SIZES.get(name, SIZES[DEFAULT_POLICY])


# ---- what it will take ----------------------------------------------------------------------------------------------


def estimate(args: argparse.Namespace) -> list[tuple[str, int, int, int]]:
    """(step, calls of the agents, greetings written by the policy, tokens trained on) at the paper's settings."""
    queries = len(records.read(args.queries, records.Query))
    heldout = len(records.read(args.heldout, records.Query))
    labelled = len(records.read(args.labelled, records.Labelled))
    candidates = 4 * queries
    length = GREETING_TOKENS + 40  # with its prompt
    pair_texts = 2 * 5 * candidates // 2  # two texts per pair; an epoch shows it twice, and three spoilt ones beside it
    judged = int(0.6 * labelled + 78) * VERSIONS + 2 * int(0.3 * labelled + 78)
    steps = int(args.epochs * (queries // args.queries_per_step))
    rollouts = steps * args.queries_per_step * args.samples
    watched = 64 * (1 + steps // 20)
    # Step 5: four policies write; rubric, judge and agents look at that and at labelled rows, the seed judge at these.
    test = int(0.3 * labelled)
    generated = 4 * SAMPLES * heldout
    curve = len(ROUTES) * POINTS * DRAWN  # rollouts, which the rubric grades for the curve of cost
    pairs = 6 * COMPARED + test // 2  # of policies, of labelled greetings; each is shown in both orders
    test += len(records.read(ROOT / "data/readings.jsonl", records.Record, unique=False))  # of greetings read blind
    evaluated = (generated + test + curve) + (generated + 2 * test) + 4 * (generated + test) + 2 * pairs
    return [
        ("01", 4 * candidates, candidates, 0),  # for, against, judge, reflect
        ("02", 0, 0, 5 * pair_texts * length),
        ("03", judged + 8 * 40, 0, 0),
        ("04 none", 0, 0, 3 * queries * length),
        ("04 rm", watched, rollouts + watched, 2 * rollouts * length),  # also through the reference
        ("04 judge", rollouts + watched, rollouts + watched, 2 * rollouts * length),
        ("05", evaluated, generated, 0),
    ]


def show_estimate(args: argparse.Namespace) -> None:
    print("\nstep        calls  greetings   hours   money   (at the paper's settings; speeds and lengths are guesses)")
    rows = []
    for step, calls, greetings, trained in estimate(args):
        seconds = calls * CALL_TOKENS[1] / args.judge_speed + greetings * GREETING_TOKENS / args.write_speed
        seconds += trained / args.train_speed
        money = calls * (CALL_TOKENS[0] * args.price_in + CALL_TOKENS[1] * args.price_out) / 1e6
        rows.append((step, calls, greetings, seconds / 3600, money))
    rows.append(("all", *(sum(row[column] for row in rows) for column in (1, 2, 3, 4))))
    for step, calls, greetings, hours, money in rows:
        print(f"{step:9} {calls:7} {greetings:10} {hours:7.1f} {money:7.2f}")


def show_choice(args: argparse.Namespace) -> int:
    """Print what run.sh reads, a line each: flags of every step, of steps 1, 4 and 5, of step 4; GiB of the judge."""
    for check in (gpu, gpu_memory):
        remedy, finding = check(args)
        if remedy:
            run_folder.fail(f"{finding}; {remedy}")
    print(f"this GPU gets {in_words(args)}", file=sys.stderr)
    policy = ["--policy", args.policy] if args.policy in memory.SHAPES else []  # else it is a flag of the user's
    for line in ([*policy, "--bits", str(args.bits)], engine_flags(args), grpo_flags(args), [f"{args.judge_memory:g}"]):
        print(" ".join(line))
    return 0


CHECKS: dict[str, Callable[[argparse.Namespace], tuple[str, str]]] = {
    "GPU and driver": gpu,
    "GPU memory": gpu_memory,
    "memory": machine_memory,
    "disk": disk,
    "models": model_files,
    "engine": engine,
    "endpoint": endpoint,
}


def main(args: argparse.Namespace) -> int:
    if args.table:
        print(table())
        return 0
    if args.choose:
        return show_choice(args)
    failed = 0
    for name, check in CHECKS.items():
        remedy, finding = check(args)
        print(f"{'FAILS' if remedy else 'ok':6} {name:15} {finding}")
        if remedy:
            failed += 1
            print(f"{'':22} remedy: {remedy}")
    show_estimate(args)
    if failed:
        run_folder.fail(f"{failed} of {len(CHECKS)} checks fail; each names its remedy above")
    return 0


if __name__ == "__main__":
    sys.exit(run_folder.launch(main, choose()))
