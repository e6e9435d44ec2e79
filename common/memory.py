"""The GPU's memory: what SFT or a GRPO step will take, what is free, and which settings fit into that."""

import argparse
import os
import socket
import subprocess
from urllib.parse import urlsplit

from common.endpoint import is_local
from common.policy import DEFAULT_POLICY, MAX_PROMPT, from_pretrained
from common.run_folder import fail, main_process, positive, read_summary

GIB = 1024**3
FREE = 0.98  # GiB that a card has free for each GB it is sold as
CARD = 80 * FREE  # what is planned for where there is no GPU
CONTEXT = 0.75 * GIB  # CUDA itself, in each process
ELSEWHERE = "https://elsewhere.invalid/v1"  # stands for any endpoint that is not on this machine

# What a plan needs to know of a model; for these without a download.
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPE += ("vocab_size", "tie_word_embeddings")
QWEN_1B, QWEN_HALF_B = "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"
SHAPES = {
    DEFAULT_POLICY: (3584, 18944, 28, 28, 4, 152064, False),
    QWEN_1B: (1536, 8960, 28, 12, 2, 151936, True),
    QWEN_HALF_B: (896, 4864, 24, 14, 2, 151936, True),
}
# The best settings first: a GPU gets the first that fit. Sleep costs more time than smaller passes do, and generation
# by transformers (hf) more than sleep. In 26 GiB a judge of 32B in 4 bits has room for few answers at once.
SETTINGS: list[dict] = [
    {"policy": DEFAULT_POLICY, "micro_batch": 32},
    {"policy": DEFAULT_POLICY, "micro_batch": 16},
    {"policy": DEFAULT_POLICY, "micro_batch": 8},
    {"policy": DEFAULT_POLICY, "micro_batch": 8, "sleep": True},
    {"policy": DEFAULT_POLICY, "micro_batch": 8, "engine": "hf", "judge_memory": 26},
    {"policy": QWEN_1B, "micro_batch": 16},
    {"policy": QWEN_1B, "micro_batch": 4, "sleep": True},
    {"policy": QWEN_HALF_B, "micro_batch": 8},
    {"policy": QWEN_HALF_B, "micro_batch": 8, "engine": "hf"},
]


def add_memory_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that decide what fits on the GPU. They change no output but by rounding, so no stage names them."""
    add = parser.add_argument_group("GPU memory").add_argument
    add("--micro-batch", type=positive, default=8, help="completions in one pass (%(default)s)")
    add("--sleep", action="store_true", help="put vLLM's weights and cache away while the trainer works")
    # tools/with_judge.sh reads the same variable. run.sh could not pass a flag that only step 4 knows.
    judge = os.environ.get("JUDGE_MEMORY") or "30"
    add("--judge-memory", type=float, default=judge, help="GiB for a judge on this GPU ($JUDGE_MEMORY, else 30)")
    add("--gpu-memory", type=float, help="GiB to plan for (what is free here; without a GPU, on a card of 80 GB)")


def gpu_gib() -> tuple[float, float] | None:
    """(free, all) GiB of the first visible GPU, as its driver reports them; None where there is none to be used."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first in ("", "-1"):
        return None
    command = ["nvidia-smi", "-i", first, "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        free, total = answer.stdout.split(",")
        return float(free) / 1024, float(total) / 1024
    except ValueError:
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            fail(f"CUDA_VISIBLE_DEVICES={first}: nvidia-smi knows no such GPU; `nvidia-smi -L` lists those here")
    except (OSError, subprocess.SubprocessError):
        pass
    return None


def peak_gib() -> float | None:
    """The most GPU memory that this process has had from torch so far, in GiB; None without a GPU."""
    import torch

    return round(torch.cuda.max_memory_allocated() / GIB, 2) if torch.cuda.is_available() else None


def uses_likelihood(args: argparse.Namespace) -> bool:
    """Whether step 4 loads the language model that --likelihood names: as the reward, or for the watch."""
    return args.reward == "likelihood" or bool(args.likelihood and args.reward != "none" and args.watch_every > 0)


def shape_of(model: str) -> dict:
    """What a plan needs to know of a model: its config, or the part of it that is in SHAPES."""
    if model in SHAPES:
        return dict(zip(SHAPE, SHAPES[model], strict=True))
    from transformers import AutoConfig

    return from_pretrained(AutoConfig, model).get_text_config().to_dict()


def parameters(config: dict) -> tuple[int, int, int]:
    """(in linear layers, in the embedding, in a head of its own). A layer has four matrices of attention (query,
    output; key, value) and three of its MLP."""
    hidden, wide, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head * heads + 2 * hidden * head * config["num_key_value_heads"]
    embedding = config["vocab_size"] * hidden
    linear = config["num_hidden_layers"] * (attention + 3 * hidden * wide)
    return linear, embedding, 0 if config["tie_word_embeddings"] else embedding


def plan(args: argparse.Namespace, base: str) -> dict[str, float]:
    """GiB of each part on the GPU in SFT or in a GRPO step. Arithmetic, not a measurement: see bench/memory.py."""
    config = shape_of(base)
    hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]

    linear, embedding, lm_head = parameters(config)
    adapter = layers * args.rank * (2 * (hidden + q) + 2 * (hidden + kv) + 3 * (hidden + wide))
    # NF4: half a byte per weight, and a scale of 4 bytes for each 64 of them. Embeddings stay in bf16; the head, with
    # the embeddings where it shares their weights, is in fp32.
    nf4 = linear * (0.5 + 4 / 64)
    weights = (nf4 if args.bits == 4 else 2 * linear) + (2 * embedding + 4 * lm_head if lm_head else 4 * embedding)

    # One pass of the trainer. Gradient checkpointing keeps the input of each layer, in bf16; one layer at a time is
    # computed again, with its largest matrix dequantised. TRL makes the logits in tiles of 4096 tokens x 32768, in
    # fp32, beside the fp32 gradient of its input.
    length = MAX_PROMPT + args.max_tokens
    tokens = length * (args.sft_batch_size if args.reward == "none" else args.micro_batch)
    one_layer = tokens * (16 * hidden + 6 * wide) * 2 + 2 * hidden * wide
    working = layers * tokens * hidden * 2 + one_layer + 4 * (min(tokens, 4096) * 32768 + tokens * hidden)
    without_gradient = (4 * hidden + 3 * wide) * 2  # bytes a token

    sizes = {
        "CUDA itself": CONTEXT,
        "trainer: base": weights,
        "trainer: adapter, its gradient and Adam's two moments, fp32": 16 * adapter,
        "trainer: activations and a tile of logits": working,
        # Each pass has another shape, so that memory which served one does not suit the next.
        "trainer: gaps in memory, a guess": working / 4,
    }
    if args.reward != "none":
        cache = args.queries_per_step * args.samples * length * 4 * layers * kv
        sizes["trainer: adapter of the reference"] = 4 * adapter
        if args.engine == "hf":  # all prompts in one pass, then token by token
            prompts = args.queries_per_step * args.samples * MAX_PROMPT * without_gradient
            sizes["rollouts: KV cache and a pass"] = max(cache, cache * MAX_PROMPT / length + prompts)
        else:
            sizes["rollouts: base in bf16"] = 2 * (linear + embedding + lm_head)
            sizes["rollouts: KV cache of all completions"] = cache
            sizes["rollouts: vLLM's own activations and graphs"] = 2 * GIB
    if args.reward == "rm":  # it has the bits of step 2, and no LM head
        in_4_bits = read_summary(args.rm, "calibration").get("bits", 4) == 4
        sizes["reward model"] = (nf4 if in_4_bits else 2 * linear) + 2 * embedding + 4 * adapter
        sizes["reward model: a pass"] = tokens * without_gradient
    if uses_likelihood(args):
        other = shape_of(args.likelihood)
        sizes["language model"] = 2 * sum(parameters(other))
        sizes["language model: a pass"] = 2 * 128 * args.micro_batch * other["vocab_size"]  # the logits of 128 tokens
    judged = args.reward == "judge" or (args.reward != "none" and args.watch_every > 0)
    if judged and is_local(args) and args.judge_memory:
        sizes["judge's server"] = args.judge_memory * GIB + CONTEXT
    return {name: size / GIB for name, size in sizes.items()}


def rollouts(parts: dict[str, float]) -> float:
    return sum(size for name, size in parts.items() if name.startswith("rollouts"))


def peak(args: argparse.Namespace, parts: dict[str, float]) -> float:
    """GiB at once. Training and scoring take turns, and with them writing, if with --sleep or without an engine."""
    turns = [parts["trainer: activations and a tile of logits"]]
    turns += [parts.get(f"{model}: a pass", 0.0) for model in ("reward model", "language model")]
    if args.engine == "hf":
        turns.append(rollouts(parts))
    elif args.sleep:
        turns.append(max(0.0, rollouts(parts) - 1))  # a GiB of graphs and workspaces stays
    return sum(parts.values()) - sum(turns) + max(turns)


def room(args: argparse.Namespace) -> tuple[argparse.Namespace, float, str]:
    """(settings, GiB, the same in words) to plan with: --gpu-memory, or what is free on the GPU that is here.

    Where the judge's server answers already, its memory is not free, and the settings ask for none beside that.
    """
    gpu = None if args.gpu_memory else gpu_gib()
    if gpu is None:
        return args, args.gpu_memory or CARD, f"{args.gpu_memory or CARD:.1f} GiB"
    words = f"{gpu[0]:.1f} GiB" + (f" that are free, {gpu[1] - gpu[0]:.1f} are in use" if gpu[1] - gpu[0] > 1 else "")
    address = urlsplit(args.base_url)
    try:
        if is_local(args):
            socket.create_connection((address.hostname, address.port or 80), timeout=2).close()
            args = argparse.Namespace(**vars(args) | {"judge_memory": 0})
    except OSError:
        pass
    return args, gpu[0], words


def first_fit(args: argparse.Namespace, base: str, have: float, choices: list[dict]) -> argparse.Namespace | None:
    """The arguments, changed by the first of these settings with which a step takes at most `have` GiB."""
    for settings in choices:
        other = argparse.Namespace(**vars(args) | settings)
        if peak(other, plan(other, settings.get("policy", base))) <= have:
            return other
    return None


def check_fit(args: argparse.Namespace, base: str) -> tuple[str, str]:
    """(the remedy, "" where a step fits; the peak beside the memory there is)."""
    args, have, words = room(args)
    need = peak(args, plan(args, base))
    figures = f"{need:7.1f} GiB  at the peak, of {words} (computed, not measured)"
    if need <= have:
        return "", figures
    # The least change first: of this policy's passes, then a row of the table, then either with a judge elsewhere.
    choices = [{"sleep": True}, {"sleep": True, "micro_batch": 4}, {"engine": "hf"}, {"engine": "hf", "micro_batch": 4}]
    for place in ({}, {"base_url": ELSEWHERE}):
        other = first_fit(args, base, have, [settings | place for settings in [{}, *choices, *SETTINGS]])
        if other is not None:
            flags = ["--base-url ADDRESS (a judge elsewhere)"] if place else []
            for name in ("policy", "engine", "sleep", "micro_batch", *["judge_memory"] * is_local(other)):
                if vars(other)[name] != vars(args)[name]:
                    flags.append(f"--{name.replace('_', '-')} {vars(other)[name]}".removesuffix(" True"))
            return f"this does not fit; with {' '.join(flags)} it does", figures
    return "this does not fit; use a larger GPU, end what uses this one, or use --offline", figures


def check_gpu(args: argparse.Namespace, base: str) -> None:
    """End with one line, before anything is loaded, where the GPU cannot be used or has no room for this step."""
    import torch

    if args.offline or not main_process() or gpu_gib() is None:
        return
    if not torch.cuda.is_available():
        fail("torch cannot use the GPU that is here; `python tools/check.py` says why")
    remedy, figures = check_fit(args, base)
    if remedy:
        fail(f"{figures.strip()}: {remedy}")


def show_plan(args: argparse.Namespace, base: str) -> None:
    """Print each part and the peak; end with the remedy where it does not fit."""
    remedy, figures = check_fit(args, base)
    for name, size in plan(room(args)[0], base).items():
        print(f"{size:7.1f} GiB  {name}")
    print(figures)
    if remedy:
        fail(remedy)


def engine_share(args: argparse.Namespace, base: str) -> float:
    """The part of the GPU's memory that vLLM may take: what the plan gives it."""
    import torch

    if args.engine != "vllm" or not torch.cuda.is_available():
        return 0.3  # not used: there is no vLLM, or its CPU build, whose cache VLLM_CPU_KVCACHE_SPACE sizes
    return rollouts(plan(args, base)) * GIB / torch.cuda.mem_get_info()[1]
