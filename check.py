"""Before the paper run: is there what it needs, and what will it take? Each failure comes with its remedy.

GPU and driver, memory of the GPU and of the machine, disk, the models, the agents' endpoint; then the hours and the
money that follow from the number of calls and greetings. Nothing is started, loaded or spent. `bash run.sh --paper`
runs this first; `bash run.sh --check` runs it alone.

Reads   the data files, the models' place on this disk; asks the endpoint for its models
Exit    0 all is there, 2 something is not
Example python check.py --serve
        python check.py --base-url https://endpoint.example/v1 --model NAME --price-in 0.3 --price-out 1.2
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from common.endpoint import add_endpoint_flags
from common.memory import gpu_gib
from common.policy import DEFAULT_POLICY, add_policy_flags
from common.records import Labelled, Query, read
from common.run_folder import ROOT, add_run_flags, fail, launch, parse, positive

GIB = 1024**3
SIZES = {DEFAULT_POLICY: 14.2, "Qwen/Qwen2.5-32B-Instruct-AWQ": 18.1}  # GiB of the default models' weights
OTHER_DISK = 8.0  # GiB for adapters, checkpoints, records and answers; an estimate
VERSIONS = 4  # of the principles that step 3 judges the validation part under, old and new; an estimate
CALL = (700, 160)  # tokens in and out of an agent's call, and
GREETING = 110  # of a greeting: both guesses, see --help for those of the speeds


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--queries", type=Path, default=ROOT / "data/queries.jsonl", help="of steps 1 and 4 (%(default)s)")
    add("--heldout", type=Path, default=ROOT / "data/queries_heldout.jsonl", help="of step 5 (%(default)s)")
    add("--labelled", type=Path, default=ROOT / "data/labelled.jsonl", help="of steps 3 and 5 (%(default)s)")
    add("--judge-speed", type=positive, default=800, help="tokens a second that the agents' model writes (%(default)s)")
    add("--write-speed", type=positive, default=2000, help="and the policy, in steps 1, 4 and 5 (%(default)s)")
    add("--train-speed", type=positive, default=1500, help="tokens a second in training (%(default)s)")
    add_policy_flags(parser)
    add_endpoint_flags(parser)
    add_run_flags(parser)
    return parse(parser, {})


# ---- what has to be there: each check returns ("", what is there) or (the remedy, what is not) ----------------------


def gpu(args: argparse.Namespace) -> tuple[str, str]:
    if gpu_gib() is None:
        return (
            "use a machine with an NVIDIA GPU of 80 GB, or --offline",
            "no GPU, or no driver: nvidia-smi fails",
        )
    import torch

    if torch.version.cuda is None:
        return "bash run.sh, or: pip install -r requirements.txt", f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "install a driver for it", f"the driver is too old for torch's CUDA {torch.version.cuda}"
    return "", f"{torch.cuda.get_device_name()}, {gpu_gib():.0f} GiB, CUDA {torch.version.cuda}"


def gpu_memory(args: argparse.Namespace) -> tuple[str, str]:
    command = [sys.executable, ROOT / "04_grpo.py", "--reward", "judge", "--plan", "--judge-memory", args.judge_memory]
    command += ["--base-url", args.base_url] + (["--policy", args.policy] if args.policy else [])
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    peak = (done.stdout.splitlines() or [""])[-1].strip()
    return (done.stderr.strip().removeprefix("error: "), peak) if done.returncode else ("", peak)


def memory(args: argparse.Namespace) -> tuple[str, str]:
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    need = 2 * size_of(policy(args)) + 8  # the base and its dequantised copy, when that is written
    said = f"{have:.0f} GiB of memory, {need:.0f} needed"
    return ("use a machine with more, or a smaller --policy" if have < need else ""), said


def disk(args: argparse.Namespace) -> tuple[str, str]:
    missing = [name for name in wanted(args) if not present(name)]
    need = sum(map(size_of, missing)) + size_of(policy(args)) + OTHER_DISK  # the dequantised base is one more
    have = shutil.disk_usage(ROOT).free / GIB
    said = f"{have:.0f} GiB free, {need:.0f} needed"
    return ("make room, or set HF_HOME to a folder on another disk" if have < need else ""), said


def model_files(args: argparse.Namespace) -> tuple[str, str]:
    missing = [name for name in wanted(args) if not present(name)]
    if missing:
        return "; ".join(f"hf download {name}" for name in missing), f"not on this machine: {', '.join(missing)}"
    return "", ", ".join(wanted(args))


def engine(args: argparse.Namespace) -> tuple[str, str]:
    if not importlib.util.find_spec("vllm"):
        return "pip install -r requirements.txt", "vLLM is not installed"
    return "", f"vLLM {importlib.metadata.version('vllm')}"


def endpoint(args: argparse.Namespace) -> tuple[str, str]:
    if args.serve:
        with socket.socket() as probe:
            taken = not probe.connect_ex(("127.0.0.1", args.serve))
        said = f"port {args.serve} is {'taken' if taken else 'free for the server'}"
        return (
            f"use what answers there with --base-url {args.base_url}, or --serve another port" if taken else ""
        ), said
    import openai

    key = os.environ.get(args.api_key_env, "")
    try:
        listed = openai.OpenAI(base_url=args.base_url, api_key=key or "none", max_retries=0, timeout=20).models.list()
        served = [model.id for model in listed.data]
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        return (
            f"set {args.api_key_env}, or name another variable with --api-key-env",
            f"{args.base_url} refuses the key",
        )
    except openai.APIConnectionError:
        return "start it, name another with --base-url, or use --serve", f"{args.base_url} does not answer"
    except (openai.APIError, AttributeError, TypeError):
        served = []  # not every server lists its models
    if served and args.model not in served:
        return f"name one with --model: {', '.join(served[:5])}", f"{args.base_url} has no {args.model}"
    return "", f"{args.base_url} answers"


def policy(args: argparse.Namespace) -> str:
    return args.policy or DEFAULT_POLICY


def wanted(args: argparse.Namespace) -> list[str]:
    """The models that have to be on this machine."""
    return [policy(args), args.model] if args.serve else [policy(args)]


def present(name: str) -> bool:
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
        return sum(file.stat().st_size for file in Path(name).glob("*.safetensors")) / GIB
    return SIZES.get(name, SIZES[DEFAULT_POLICY])


# ---- what it will take ----------------------------------------------------------------------------------------------


def estimate(args: argparse.Namespace) -> list[tuple[str, int, int, int]]:
    """(step, calls of the agents, greetings written by the policy, tokens trained on) at the paper's settings."""
    queries, heldout, rows = (len(read(path, kind)) for path, kind in (
        (args.queries, Query), (args.heldout, Query), (args.labelled, Labelled)))  # fmt: skip
    candidates, length = 4 * queries, GREETING + 40
    pairs = candidates // 2
    grpo = 5 * (queries // 32) * 32 * 4
    watch = 64 * (1 + grpo // (32 * 4 * 20))
    generated = 4 * heldout
    judged = int(0.6 * rows + 78) * VERSIONS + 2 * int(0.3 * rows + 78)
    return [
        ("01", candidates * (2 + 2 * args.votes), candidates, 0),
        ("02", 0, 0, 5 * 2 * 4 * pairs * length),  # two texts a pair, three spoilt pairs beside each
        ("03", judged * args.votes + 8 * 40, 0, 0),
        ("04 none", 0, 0, 3 * queries * length),
        ("04 rm", watch, grpo + watch, 2 * grpo * length),  # also through the reference
        ("04 judge", watch + grpo * args.votes, grpo + watch, 2 * grpo * length),
        ("05", (generated + rows) * (1 + 2 * args.votes) + (generated + int(0.3 * rows)) * (2 + 2 * args.votes),
         generated, 0),
    ]  # fmt: skip


def show_estimate(args: argparse.Namespace) -> None:
    print("\nstep        calls  greetings   hours   money   (at the paper's settings; speeds and lengths are guesses)")
    total = [0, 0, 0.0, 0.0]
    for step, calls, greetings, trained in estimate(args):
        seconds = calls * CALL[1] / args.judge_speed + greetings * GREETING / args.write_speed
        hours = (seconds + trained / args.train_speed) / 3600
        money = calls * (CALL[0] * args.price_in + CALL[1] * args.price_out) / 1e6
        total = [a + b for a, b in zip(total, (calls, greetings, hours, money), strict=True)]
        print(f"{step:9} {calls:7} {greetings:10} {hours:7.1f} {money:7.2f}")
    print(f"{'all':9} {total[0]:7} {total[1]:10} {total[2]:7.1f} {total[3]:7.2f}")


CHECKS: dict[str, Callable[[argparse.Namespace], tuple[str, str]]] = {
    "GPU and driver": gpu, "GPU memory": gpu_memory, "memory": memory, "disk": disk, "models": model_files,
    "engine": engine, "endpoint": endpoint,
}  # fmt: skip


def main(args: argparse.Namespace) -> int:
    failed = 0
    for name, check in CHECKS.items():
        remedy, said = check(args)
        failed += bool(remedy)
        print(f"{'FAILS' if remedy else 'ok':6} {name:15} {said}" + (f"\n{'':22} remedy: {remedy}" if remedy else ""))
    show_estimate(args)
    if failed:
        fail(f"{failed} of {len(CHECKS)} checks fail; each names its remedy above")
    return 0


if __name__ == "__main__":
    sys.exit(launch(main, parse_args()))
