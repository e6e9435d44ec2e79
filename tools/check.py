"""Before the paper run: is there what it needs, and what will it take? Each failure comes with its remedy.

GPU and driver, memory of the GPU and of the machine, disk, the models, the agents' endpoint; then the hours and the
money that follow from the number of calls and greetings. Nothing is started, loaded or spent. `bash run.sh --paper`
runs this first; `bash run.sh --check` runs it alone.

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
from common.endpoint import OWN_SERVER, add_endpoint_flags
from common.policy import DEFAULT_POLICY, add_policy_flags
from common.report.cost import DRAWN, POINTS, ROUTES
from common.run_folder import ROOT
from common.trainers import add_grpo_flags

SIZES = {DEFAULT_POLICY: 14.2, "Qwen/Qwen2.5-32B-Instruct-AWQ": 18.1}  # GiB of the default models' weights
OTHER_DISK = 8.0  # GiB for adapters, checkpoints, records and answers; an estimate
VERSIONS = 4  # versions of the principles under which step 3 judges the validation part; an estimate
CALL_TOKENS = (700, 160)  # input and output tokens of an agent's call; a guess
GREETING_TOKENS = 110  # output tokens of a greeting; a guess
SAMPLES, COMPARED = 2, 200  # step 5's defaults of --samples and --pairwise


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what it will take").add_argument
    positive, data = run_folder.positive, ROOT / "data"
    add("--heldout", type=Path, default=data / "queries_heldout.jsonl", help="queries of step 5 (%(default)s)")
    add("--labelled", type=Path, default=data / "labelled.jsonl", help="of steps 3 and 5 (%(default)s)")
    add("--judge-speed", type=positive, default=800, help="tokens per second of the agents' model (%(default)s)")
    add("--write-speed", type=positive, default=2000, help="the same of the policy, in steps 1, 4 and 5 (%(default)s)")
    add("--train-speed", type=positive, default=1500, help="tokens per second in training (%(default)s)")
    add_grpo_flags(parser)
    add_policy_flags(parser)
    memory.add_memory_flags(parser)
    add_endpoint_flags(parser)
    run_folder.add_run_flags(parser)
    parser.set_defaults(base_url=None)
    args = run_folder.parse(parser, {})
    args.policy = args.policy or DEFAULT_POLICY
    # Without --base-url, tools/with_judge.sh will start the judge on this machine.
    args.own_server = args.base_url is None
    args.base_url = args.base_url or OWN_SERVER
    args.models = [args.policy, args.model] if args.own_server else [args.policy]
    return args


# ---- what has to be there: each check returns ("", what is there) or (the remedy, what is not) ----------------------


def gpu(args: argparse.Namespace) -> tuple[str, str]:
    gib = memory.gpu_gib()
    if gib is None:
        return "use a machine with an NVIDIA GPU of 80 GB, or --offline", "no GPU, or no driver: nvidia-smi fails"
    import torch

    if torch.version.cuda is None:
        return "bash run.sh, or: pip install -r requirements.txt", f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "install a driver for it", f"the driver is too old for torch's CUDA {torch.version.cuda}"
    return "", f"{torch.cuda.get_device_name()}, {gib:.0f} GiB, CUDA {torch.version.cuda}"


def gpu_memory(args: argparse.Namespace) -> tuple[str, str]:
    """GRPO with the judge on the same GPU, which is what takes most."""
    step = argparse.Namespace(**vars(args), reward="judge", engine="vllm")
    remedy, figures = memory.check_fit(step, args.policy)
    return remedy, figures.strip()


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
    import openai

    key = os.environ.get(args.api_key_env) or "none"
    client = openai.OpenAI(base_url=args.base_url, api_key=key, max_retries=0, timeout=20)
    try:
        served = [model.id for model in client.models.list().data]
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        remedy = f"set {args.api_key_env}, or name another variable with --api-key-env"
        return remedy, f"{args.base_url} refuses the key"
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
    sys.exit(run_folder.launch(main, parse_args()))
