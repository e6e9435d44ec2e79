"""The GPU's memory: what a GRPO step will take, what there is, what was used."""

import argparse
import os
import subprocess

from common.endpoint import is_local
from common.policy import DEFAULT_POLICY, MAX_PROMPT, from_pretrained
from common.run_folder import fail, positive

GIB = 1024**3
CARD = 79.0  # GiB that a card of 80 GB shows: what is planned for where there is no GPU

# The default model's architecture, so that its plan needs no download.
QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
QWEN_7B |= {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}


def add_memory_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that decide what fits on the GPU. They change no output but by rounding, so no stage names them."""
    add = parser.add_argument_group("GPU memory").add_argument
    add("--micro-batch", type=positive, default=8, help="completions in one pass (%(default)s)")
    add("--sleep", action="store_true", help="put vLLM's weights and cache away while the trainer works")
    # tools/with_judge.sh reads the same variable. run.sh could not pass a flag that only step 4 knows.
    judge = os.environ.get("JUDGE_MEMORY") or "30"
    add("--judge-memory", type=float, default=judge, help="GiB for a judge on this GPU ($JUDGE_MEMORY, else 30)")
    add("--gpu-memory", type=float, help=f"GiB of the GPU (the one there, else {CARD:g}: a card of 80 GB)")


def gpu_gib() -> float | None:
    """Memory of the first visible GPU in GiB, as its driver reports it; None where there is none."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "-i", first, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=60)) / 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def peak_gib() -> float | None:
    """The most GPU memory that this process has had from torch so far, in GiB; None without a GPU."""
    import torch

    return round(torch.cuda.max_memory_allocated() / GIB, 2) if torch.cuda.is_available() else None


def plan(args: argparse.Namespace, base: str) -> dict[str, float]:
    """GiB of each part on the GPU at the peak of a GRPO step. Arithmetic, not a measurement: see bench/memory.py."""
    config = QWEN_7B
    if base != DEFAULT_POLICY:
        from transformers import AutoConfig

        config = from_pretrained(AutoConfig, base).to_dict()
    hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    vocabulary = config["vocab_size"]

    # Parameters. A layer has four matrices of attention (query, output; key, value) and three of its MLP.
    linear = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * wide)
    embedded = vocabulary * hidden * (1 if config["tie_word_embeddings"] else 2)
    adapter = layers * args.rank * (4 * hidden + 2 * (hidden + kv) + 3 * (hidden + wide))
    # NF4: half a byte per weight, and a scale of 4 bytes for each 64 of them; embeddings and head stay in bf16.
    weights = 2 * embedded + linear * (0.5 + 4 / 64 if args.bits == 4 else 2)

    # One pass of the trainer. Gradient checkpointing keeps the input of each layer, in bf16; one layer at a time is
    # computed again, with its largest matrix dequantised. Logits exist as such, as softmax, and as gradients of both.
    length = MAX_PROMPT + args.max_tokens
    tokens = args.micro_batch * length
    checkpoints = layers * tokens * hidden * 2
    one_layer = tokens * (16 * hidden + 6 * wide) * 2 + 2 * hidden * wide
    logits = 4 * args.micro_batch * args.max_tokens * vocabulary * 2

    sizes = {
        "trainer: base": weights,
        "trainer: adapter, its gradient and Adam's two moments, fp32": 16 * adapter,
        "trainer: adapter of the reference": 4 * adapter,
        "trainer: activations": checkpoints + one_layer,
        "trainer: logits": logits,
        "CUDA itself": 1.5 * GIB,
    }
    if args.engine == "vllm":
        completions = args.queries_per_step * args.samples
        sizes["rollouts: base in bf16"] = 2 * (linear + embedded)
        sizes["rollouts: KV cache of all completions"] = completions * length * 2 * layers * kv * 2
        sizes["rollouts: vLLM's own activations and graphs"] = 2 * GIB
    if args.reward == "rm":
        sizes["reward model"] = weights + tokens * (4 * hidden + 3 * wide) * 2
    if is_local(args):
        sizes["judge's server"] = args.judge_memory * GIB
    return {name: size / GIB for name, size in sizes.items()}


def rollouts(parts: dict[str, float]) -> float:
    return sum(size for name, size in parts.items() if name.startswith("rollouts"))


def peak(args: argparse.Namespace, parts: dict[str, float]) -> float:
    """GiB at once. With --sleep the engine and the trainer's working memory take turns."""
    total = sum(parts.values())
    if not args.sleep:
        return total
    return total - min(rollouts(parts), parts["trainer: activations"] + parts["trainer: logits"])


def check_fit(args: argparse.Namespace, base: str) -> tuple[str, str]:
    """(the remedy, "" where a GRPO step fits; the peak beside the memory there is)."""
    need, have = peak(args, plan(args, base)), args.gpu_memory or gpu_gib() or CARD
    figures = f"{need:7.1f} GiB  at the peak, of {have:.1f} GiB (computed, not measured)"
    if need <= have:
        return "", figures
    # What costs least time comes first.
    smaller = [n for n in (8, 4, 2, 1) if n < args.micro_batch]
    changes: dict[str, dict] = {"--sleep": {"sleep": True}}
    changes |= {f"--micro-batch {n}": {"micro_batch": n} for n in smaller}
    changes |= {f"--sleep --micro-batch {n}": {"sleep": True, "micro_batch": n} for n in smaller}
    for flags, change in changes.items():
        other = argparse.Namespace(**{**vars(args), **change})
        if peak(other, plan(other, base)) <= have:
            return f"this does not fit; with {flags} it does", figures
    return "this does not fit; take a smaller --policy, fewer --max-tokens, or a judge elsewhere (--base-url)", figures


def show_plan(args: argparse.Namespace, base: str) -> None:
    """Print each part and the peak; end with the remedy where it does not fit."""
    for name, size in plan(args, base).items():
        print(f"{size:7.1f} GiB  {name}")
    remedy, figures = check_fit(args, base)
    print(figures)
    if remedy:
        fail(remedy)


def engine_share(args: argparse.Namespace, base: str) -> float:
    """The part of the GPU's memory that vLLM may take: what the plan gives it."""
    import torch

    if args.engine != "vllm" or not torch.cuda.is_available():
        return 0.3  # not used: there is no vLLM, or its CPU build, whose cache VLLM_CPU_KVCACHE_SPACE sizes
    return rollouts(plan(args, base)) / (args.gpu_memory or gpu_gib() or CARD)
