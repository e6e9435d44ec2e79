"""What training Qwen2.5-7B really takes on a GPU, beside the plan's arithmetic: its architecture with random weights.

    python bench/memory.py                    # a CUDA GPU, no download; about 35 GB of disk for the weights
    python bench/memory.py --layers 2         # a slice of it, to try the bench itself

Steps 2 and 4 run as they are, for a few steps, on texts as long as they may be: peak memory, tokens per second.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.memory import QWEN_7B, add_memory_flags, peak, plan
from common.offline.tiny_model import tiny_policy
from common.policy import add_policy_flags, load_tokenizer
from common.trainers import add_grpo_flags


def random_model(folder: Path, layers: int | None) -> None:
    """Write a model of the default policy's architecture, with random weights and the tiny model's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    sizes = {**QWEN_7B, "num_hidden_layers": layers or QWEN_7B["num_hidden_layers"]}
    tokenizer = load_tokenizer(str(tiny_policy()))
    config = Qwen2Config(**sizes, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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


def run(script: str, run_folder: Path, policy: Path, *flags: object) -> None:
    command = [sys.executable, script, "--run", run_folder, "--policy", policy, *flags]
    if subprocess.run([str(part) for part in command], cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")


def default_settings(**settings: str) -> argparse.Namespace:
    """What the plan is made from: step 4's defaults, with nothing but the reward model beside it on the GPU."""
    parser = argparse.ArgumentParser()
    for add_flags in (add_grpo_flags, add_policy_flags, add_memory_flags):
        add_flags(parser)
    elsewhere = {"offline": False, "base_url": "https://elsewhere.invalid/v1"}
    return argparse.Namespace(**vars(parser.parse_args([])), **elsewhere, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/bench_memory")
    parser.add_argument("--layers", type=int, help="of the model, instead of all")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf", help="of the rollouts (%(default)s)")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing to measure; `python 04_grpo.py --reward judge --plan` prints the arithmetic")
        return
    policy, folder = args.out / f"model_{args.layers}", args.out / f"run_{args.layers}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (policy / "config.json").is_file():
        random_model(policy, args.layers)
        torch.cuda.empty_cache()
    write_data(folder, 500)
    run("02_train_rm.py", folder, policy, "--epochs", 0.1, "--derived", 0, "--stress-size", 2, "--redo")
    run("04_grpo.py", folder, policy, "--reward", "none", "--sft-epochs", 0.2, "--redo")
    short = ["--steps", 3, "--watch-every", 0, "--queries", folder / "queries.jsonl", "--engine", args.engine, "--redo"]
    run("04_grpo.py", folder, policy, "--reward", "rm", *short)

    planned = default_settings(reward="rm", engine=args.engine)
    rm, tuned = (json.loads((folder / f"{name}.json").read_text()) for name in ("02_summary", "04_summary_rm"))
    log = rm["log"][-1]
    steps = [json.loads(line) for line in (folder / "metrics_rm.jsonl").read_text().splitlines()]
    tokens = sum(s.get("completions/mean_length", 0.0) for s in steps) * planned.queries_per_step * planned.samples
    expected = peak(planned, plan(planned, str(policy)))
    seen = max(entry.get("num_tokens", 0) for entry in rm["log"]) / log["train_runtime"]
    written, trained = (tokens / tuned["seconds"][phase] for phase in ("generate", "train"))
    print(f"{torch.cuda.get_device_name()}, {args.layers or 'all'} layers, random weights, rollouts by {args.engine}")
    print("| step | peak, measured | plan | tokens per second |\n|---|---|---|---|")
    print(f"| 02, reward model | {rm['peak_gib']:.1f} GiB | - | {seen:.0f} trained |")
    row = f"| 04, GRPO with it | {tuned['peak_gib']:.1f} GiB | {expected:.1f} GiB |"
    print(f"{row} {written:.0f} written, {trained:.0f} trained |")


if __name__ == "__main__":
    main()
