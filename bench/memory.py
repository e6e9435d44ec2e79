"""What training Qwen2.5-7B really takes on a GPU, beside the plan's arithmetic: its architecture with random weights.

    python bench/memory.py                    # a CUDA GPU, no download; about 35 GB of disk for the weights, kept
    python bench/memory.py --layers 2         # a slice of it, to try the bench itself

Steps 2 and 4 run as they are on texts as long as they may be, with a block of memory as large as the judge's server
beside them. Measured is what the whole device has in use at most, less what was in use before. Speeds and phases are
those of the second rollout: in the first, kernels are still compiled.
"""

import argparse
import importlib.util
import itertools
import json
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.endpoint import OWN_SERVER
from common.memory import GIB, SHAPE, SHAPES, add_memory_flags, check_fit, gpu_gib, peak, plan
from common.offline.tiny_model import tiny_policy
from common.policy import DEFAULT_POLICY, add_policy_flags, load_tokenizer
from common.trainers import add_grpo_flags

PHASES = ("sync", "generate", "reward", "train")
UPDATES = 2  # of each rollout, at step 4's defaults


def random_tokenizer(vocabulary: int):
    """The tiny model's tokenizer with a text for every id, or a random model would write next to nothing."""
    tokenizer = load_tokenizer(str(tiny_policy()))
    letters = [chr(0x5000 + number) for number in range(400)]
    words = ("".join(pair) for pair in itertools.product(letters, repeat=2))
    tokenizer.add_tokens(list(itertools.islice(words, vocabulary - len(tokenizer))))
    return tokenizer


def random_model(folder: Path, layers: int | None) -> None:
    """Write a model of the default policy's architecture with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    sizes = dict(zip(SHAPE, SHAPES[DEFAULT_POLICY], strict=True))
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    tokenizer = random_tokenizer(sizes["vocab_size"])
    config = Qwen2Config(**sizes, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def write_data(folder: Path, characters: int) -> None:
    """Pairs and demonstrations of this many random characters."""
    rng, letters = random.Random(0), "春风灯火山河明月花茶舟雪桥窗岁安康乐喜暖愿祝你我他们今日此刻"
    files = {name: (folder / f"{name}.jsonl").open("w", encoding="utf-8") for name in ("preferences", "sft", "queries")}
    for n in range(400):
        query = f"给第{n}位朋友的生日祝福"
        prompt = [{"role": "user", "content": f"请只生成一条祝福语：{query}"}]
        good, bad = ([{"role": "assistant", "content": "".join(rng.choices(letters, k=characters))}] for _ in range(2))
        for name, row in (("preferences", {"prompt": prompt, "chosen": good, "rejected": bad, "query": query}),
                          ("sft", {"prompt": prompt, "completion": good}), ("queries", {"query": query})):  # fmt: skip
            files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
    for file in files.values():
        file.close()


def copy_of(folder: Path, copy: Path) -> Path:
    shutil.rmtree(copy, ignore_errors=True)
    return shutil.copytree(folder, copy)


class Device:
    """What the whole GPU has in use at most while this is entered, in GiB beyond what others used before."""

    def __init__(self, others: float):
        self.others, self.most = others, 0.0

    def __enter__(self) -> "Device":
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        import torch

        while not self.ended.wait(0.05):
            free, total = torch.cuda.mem_get_info()
            self.most = max(self.most, (total - free) / GIB - self.others)

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()


def run(script: str, run_folder: Path, policy: Path, *flags: object) -> None:
    command = [sys.executable, script, "--run", run_folder, "--policy", policy, *flags]
    if subprocess.run([str(part) for part in command], cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")


def default_settings(**settings: object) -> argparse.Namespace:
    """What the plan is made from: step 4's defaults, with the reward model and a judge's server on the GPU."""
    parser = argparse.ArgumentParser()
    for add_flags in (add_grpo_flags, add_policy_flags, add_memory_flags):
        add_flags(parser)
    here = {"offline": False, "base_url": OWN_SERVER, "reward": "rm", "watch_every": 1, "rm": Path("none")}
    return argparse.Namespace(**vars(parser.parse_args([])) | here | settings)


def of_the_last_rollout(steps: list[dict], completions: int) -> dict[str, float]:
    """From the metrics of some GRPO steps: seconds of each phase of the last one, tokens per second in two of them.

    `step_time` holds all phases of an update, and the first update of a rollout is the one that writes and scores.
    """
    last = steps[-UPDATES:]
    figures = {phase: sum(step.get(f"seconds/{phase}", 0.0) for step in last) for phase in PHASES[:-1]}
    figures["train"] = sum(step["step_time"] for step in last) - sum(figures.values())
    tokens = completions * last[0]["completions/mean_length"]
    return figures | {"written": tokens / figures["generate"], "trained": tokens / figures["train"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench_gpu")
    parser.add_argument("--layers", type=int, help="of the model, instead of all")
    parser.add_argument("--engine", choices=("hf", "vllm"), help="of the rollouts (vllm if installed)")
    parser.add_argument("--judge", type=float, default=30, help="GiB that stand for the judge's server (%(default)s)")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing to measure; `python 04_grpo.py --reward judge --plan` prints the arithmetic")
        return
    free, total = gpu_gib()
    policy, folder = args.out / f"model_{args.layers}", args.out / f"run_{args.layers}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (policy / "config.json").is_file():
        random_model(policy, args.layers)
    engine = args.engine or ("vllm" if importlib.util.find_spec("vllm") else "hf")
    planned = default_settings(policy=str(policy), engine=engine, judge_memory=args.judge, gpu_memory=free)
    remedy, figures = check_fit(planned, planned.policy)
    if remedy:
        print(f"{figures.strip()}: nothing to measure on this GPU; take less --judge, or --engine hf")
        return
    write_data(folder, 500)
    run("02_train_rm.py", folder, policy, "--epochs", 0.1, "--derived", 0, "--stress-size", 2)
    run("04_grpo.py", folder, policy, "--reward", "none", "--sft-epochs", 0.2)
    short = ["--steps", 2 * UPDATES, "--watch-every", 0, "--queries", folder / "queries.jsonl", "--engine", engine]
    judge = torch.empty(int(args.judge * GIB), dtype=torch.uint8, device="cuda")
    grpo = copy_of(folder, args.out / "grpo")  # a second run of the bench would find step 4 done in the other
    with Device(total - free) as device:
        run("04_grpo.py", grpo, policy, "--reward", "rm", "--max-gap", 9, *short)
    del judge

    rm, tuned = (json.loads((grpo / f"{name}.json").read_text()) for name in ("02_summary", "04_summary_rm"))
    steps = [json.loads(line) for line in (grpo / "metrics_rm.jsonl").read_text().splitlines()]
    report = of_the_last_rollout(steps, planned.queries_per_step * planned.samples)
    report |= {"gpu": torch.cuda.get_device_name(), "layers": args.layers, "engine": engine, "judge": args.judge}
    report |= {"device_gib": device.most, "plan_gib": peak(planned, plan(planned, planned.policy))}
    report |= {"process_gib": tuned["peak_gib"], "rm_process_gib": rm["peak_gib"]}
    (args.out / "memory.json").write_text(json.dumps(report, indent=1) + "\n")
    layers = args.layers or "all"
    print(
        f"{report['gpu']}, {layers} layers, random weights, rollouts by {engine}, {args.judge:g} GiB as the judge's\n"
    )
    print("| step | whole device | plan | the step's own tensors |\n|---|---|---|---|")
    print(f"| 02, reward model | - | - | {rm['peak_gib']:.1f} GiB |")
    plan_and_own = f"{report['plan_gib']:.1f} GiB | {tuned['peak_gib']:.1f} GiB"
    print(f"| 04, GRPO with it | {device.most:.1f} GiB | {plan_and_own} |\n")
    print("| phase of a step | seconds | tokens per second |\n|---|---|---|")
    speeds = {"generate": f"{report['written']:.0f} written", "train": f"{report['trained']:.0f} trained"}
    for phase in PHASES:
        print(f"| {phase} | {report[phase]:.1f} | {speeds.get(phase, '')} |")


if __name__ == "__main__":
    main()
