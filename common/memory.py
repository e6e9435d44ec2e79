"""The GPU's memory: what is planned, what there is, what was used."""

import argparse
import os
import subprocess

from common.endpoint import is_local
from common.policy import DEFAULT_POLICY, MOST_PROMPT, _cannot_load
from common.run_folder import fail


def gpu_gib() -> float | None:
    """Memory of the GPU that is used first, in GiB, as its driver tells; None where there is none."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "-i", first, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return float(done.stdout) / 1024 if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


# What `04_grpo.py --plan` needs of the default models, so that it needs no download.
ARCHITECTURES = {
    DEFAULT_POLICY: {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip


def architecture(path: str) -> dict:
    """The configuration of a Qwen2-like model as a dictionary: sizes of layers, heads and vocabulary."""
    from transformers import AutoConfig

    if path in ARCHITECTURES:
        return ARCHITECTURES[path]
    try:
        return AutoConfig.from_pretrained(path).to_dict()
    except (OSError, ValueError) as e:
        _cannot_load(path, e)


def peak_gib() -> float | None:
    """The most GPU memory that this process has had from torch so far, in GiB; None without a GPU."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 1024**3, 2) if torch.cuda.is_available() else None


GIB = 1024**3


def plan(args: argparse.Namespace, base: str) -> dict[str, float]:
    """GiB of each part on the GPU at the peak of a GRPO step. Arithmetic, not a measurement: see bench/memory.py."""
    c = architecture(base)
    h, wide, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    kv = h // c["num_attention_heads"] * c["num_key_value_heads"]
    linear = layers * (2 * h * h + 2 * h * kv + 3 * h * wide)
    embedded = c["vocab_size"] * h * (1 if c["tie_word_embeddings"] else 2)
    adapter = layers * args.rank * (4 * h + 2 * (h + kv) + 3 * (h + wide))
    # NF4: half a byte a weight, and a scale of 4 bytes for each 64 of them; embeddings and head stay in bf16.
    weights = 2 * embedded + linear * (0.5 + 4 / 64 if args.bits == 4 else 2)
    length = MOST_PROMPT + args.max_tokens
    tokens = args.micro_batch * length
    kept = layers * tokens * h * 2  # what gradient checkpointing keeps: the input of each layer, in bf16
    layer = tokens * (16 * h + 6 * wide) * 2 + 2 * h * wide  # one layer made again, and its largest matrix dequantised
    logits = 4 * args.micro_batch * args.max_tokens * c["vocab_size"] * 2  # forward, softmax, and the gradients of both
    bytes_ = {
        "trainer: base": weights,
        "trainer: adapter, its gradient and Adam's two moments, fp32": 16 * adapter,
        "trainer: adapter of the reference": 4 * adapter,
        "trainer: activations": kept + layer,
        "trainer: logits": logits,
        "CUDA itself": 1.5 * GIB,
    }
    if args.engine == "vllm" and not args.rollout_server:
        completions = args.queries_per_step * args.samples
        bytes_["rollouts: base in bf16"] = 2 * (linear + embedded)
        bytes_["rollouts: KV cache of all completions"] = completions * length * 2 * layers * kv * 2
        bytes_["rollouts: vLLM's own activations and graphs"] = 2 * GIB
    if args.reward in ("rm", "both"):
        bytes_["reward model"] = weights + args.micro_batch * length * (4 * h + 3 * wide) * 2
    if is_local(args):
        bytes_["judge's server"] = args.judge_memory * GIB
    return {name: size / GIB for name, size in bytes_.items()}


def peak(args: argparse.Namespace, parts: dict[str, float]) -> float:
    """GiB at once. With --sleep the engine and the trainer's working memory take turns."""
    engine, working = (
        sum(size for name, size in parts.items() if name.startswith(kind))
        for kind in ("rollouts", ("trainer: act", "trainer: logits"))
    )
    return sum(parts.values()) - (min(engine, working) if args.sleep else 0.0)


def show_plan(args: argparse.Namespace, base: str) -> int:
    parts = plan(args, base)
    for name, size in parts.items():
        print(f"{size:7.1f} GiB  {name}")
    need, have = peak(args, parts), gpu_memory(args)
    print(f"{need:7.1f} GiB  at the peak, of {have:.1f} GiB (computed, not measured)")
    if need <= have:
        return 0
    lighter = ({"micro_batch": n} for n in (8, 4, 2, 1) if n < args.micro_batch)
    for change in ({"sleep": True}, *lighter, *({"sleep": True, "micro_batch": n} for n in (4, 2, 1))):
        other = argparse.Namespace(**vars(args) | change)
        if peak(other, plan(other, base)) <= have:
            flags = " ".join(f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in change.items())
            fail(f"this does not fit; with {flags} it does")
    fail("this does not fit; take a smaller --policy, fewer --max-tokens, or a judge elsewhere (--base-url)")


def gpu_memory(args: argparse.Namespace) -> float:
    return args.gpu_memory or gpu_gib() or 79.0


def engine_share(args: argparse.Namespace, base: str) -> float:
    """The part of the GPU's memory that vLLM may take: what the plan gives it."""
    import torch

    if args.engine != "vllm" or not torch.cuda.is_available():
        return 0.3  # of nothing
    return sum(size for name, size in plan(args, base).items() if name.startswith("rollouts")) / gpu_memory(args)
