"""A base model and its LoRA adapter: find, load in 4 bits, ask, generate."""

import json
import os
from pathlib import Path
from typing import NoReturn

from common.run_folder import fail, positive

DEFAULT_POLICY = "Qwen/Qwen2.5-7B-Instruct"
LORA_TARGETS = "all-linear"
MOST_PROMPT = 256  # tokens of a policy's prompt


def add_policy_flags(parser) -> None:
    """The flags of every script that loads a model."""
    group = parser.add_argument_group("models")
    group.add_argument("--policy", default=None, help=f"base model, a hub name or a folder ({DEFAULT_POLICY})")
    group.add_argument(
        "--bits", type=int, choices=(4, 16), default=4, help="weights of the base: NF4 or bf16 (%(default)s)"
    )
    group.add_argument(
        "--batch-size-generate", type=positive, default=64, help="sequences generated at once (%(default)s)"
    )


def policy_path(args) -> str:
    """Where the base model is: --policy, or with --offline the tiny model, made first if need be."""
    if args.policy:
        if args.policy.startswith((".", "/", "~")) and not Path(args.policy).expanduser().is_dir():
            fail(f"--policy {args.policy} is no folder; name one that save_pretrained wrote, or a model on the hub")
        return args.policy
    if not args.offline:
        return DEFAULT_POLICY
    from common.offline.tiny_model import tiny_policy

    return str(tiny_policy())


def quiet() -> None:
    """Libraries that only repeat what the scripts say themselves keep still; torch uses every core."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if "WORLD_SIZE" not in os.environ:  # not started by `accelerate launch`
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU is enough, and the trainers would split over all
    warnings.filterwarnings("ignore")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load_base(kind, path: str, bits: int, **kwargs):
    """from_pretrained with the settings that every model here shares, and one line where it cannot be loaded."""
    import torch
    from transformers import BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda or bits == 4 else torch.float32
    if bits == 4:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head", "score"],
        )  # fmt: skip
    device = {"": int(os.environ.get("LOCAL_RANK", 0))} if cuda else None
    try:
        model = kind.from_pretrained(path, dtype=dtype, device_map=device, **kwargs)
    except (OSError, ValueError) as e:
        _cannot_load(path, e)
    for module in model.modules():
        # On a CPU bitsandbytes repacks the weights, in place, at the first pass in eval mode. What is trained after
        # that is not the same model any more: its log-probabilities are 0.23 a token away.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _cannot_load(path: str, error: Exception) -> NoReturn:
    reason = str(error).splitlines()[0]
    fail(f"cannot load {path}: {reason}; name a folder or a hub model with --policy, or use --offline")


def load_tokenizer(path: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, padding_side="left")
    except (OSError, ValueError) as e:
        _cannot_load(path, e)


def load_policy(path: str, bits: int, adapter: Path | None = None, trainable: bool = False):
    """(model, tokenizer) of a base, with a LoRA adapter on it if one is given."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = load_base(AutoModelForCausalLM, path, bits)
    if adapter is not None:
        check_adapter(adapter, path)
        model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    return model, load_tokenizer(path)


def check_adapter(adapter: Path, base: str) -> None:
    """End with one line if the adapter is missing or was made for another base."""
    config = adapter / "adapter_config.json"
    if not config.is_file():
        fail(f"{adapter} holds no adapter; README's table of the five steps names the command that makes it")
    made_for = json.loads(config.read_text())["base_model_name_or_path"]
    if made_for != base:
        fail(f"{adapter} was made for the base {made_for}, not {base}; pass --policy {made_for} or make it again")


def lora(rank: int, alpha: int, task: str, **kwargs):
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=LORA_TARGETS, task_type=task, **kwargs)


def generate(
    model, tokenizer, conversations: list[list[dict]], *, temperature: float, top_p: float, max_tokens: int,
    batch_size: int, seed: int, progress: str = "",
) -> list[str]:  # fmt: skip
    """One sampled completion a conversation, as text without special tokens, in the order given.

    Sampling is seeded once for the whole call: the same list, batch size and seed give the same texts.
    """
    import torch
    from tqdm import tqdm

    torch.manual_seed(seed)
    was_training = model.training
    model.eval()
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in conversations]
    texts = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=progress, disable=not progress, unit="batch"):
        batch = tokenizer(
            prompts[start : start + batch_size], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.device)
        with torch.inference_mode():
            tokens = model.generate(
                **batch, do_sample=True, temperature=temperature, top_p=top_p, top_k=0, repetition_penalty=1.0,
                max_new_tokens=max_tokens,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        new = tokens[:, batch["input_ids"].shape[1] :]
        texts += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    model.train(was_training)
    return texts
