"""A policy: a base model, in 4 bits or 16, and a LoRA adapter on it. Find it, load it, write with it."""

import argparse
import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.records import Messages
from common.run_folder import ROOT, fail, file_hash, positive

DEFAULT_POLICY = "Qwen/Qwen2.5-7B-Instruct"
MAX_PROMPT = 256  # tokens of a policy's prompt


def add_policy_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every script that loads a model."""
    add = parser.add_argument_group("models").add_argument
    add("--policy", help=f"base model, a hub name or a folder ({DEFAULT_POLICY})")
    add("--bits", type=int, choices=(4, 16), default=4, help="weights of the base: NF4 or bf16 (%(default)s)")
    add("--batch-size-generate", type=positive, default=64, help="sequences generated at once (%(default)s)")
    add = parser.add_argument_group("likelihood").add_argument
    add("--likelihood", metavar="MODEL", help="tells 04, 05 and 01 --labels likelihood how likely a text is")


def policy_path(args: argparse.Namespace) -> str:
    """Where the base model is; --policy is filled in. With --offline the tiny model, which is trained if need be."""
    if args.offline and not args.policy:
        from common.offline.tiny_model import tiny_policy

        args.policy = str(tiny_policy())
    path = args.policy or DEFAULT_POLICY
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        fail(f"--policy {path} is not a folder; name one that save_pretrained wrote, or a model on the hub")
    path = args.policy = model_folder(path)
    args.likelihood = args.likelihood and model_folder(args.likelihood)
    return path


def model_folder(path: str | Path) -> str:
    """A model by its name on the hub or the whole path of its folder, however that is written.

    A folder of the checkout from which this one was moved or copied is the one at the same place in this one.
    """
    folder = Path(path).expanduser()
    for start in range(1, len(folder.parts) if folder.is_absolute() else 0):
        here = ROOT.joinpath(*folder.parts[start:])
        if (here / "config.json").is_file() and (not folder.is_dir() or file_hash(here) == file_hash(folder)):
            return str(here)
    return str(folder.resolve()) if folder.is_dir() else str(path)


def find_policy(path: str | Path) -> tuple[str, Path | None]:
    """(base, adapter folder) of a policy: an adapter's folder names its own base; anything else is a base alone."""
    config = Path(path, "adapter_config.json")
    if not config.is_file():
        return model_folder(path), None
    try:
        with safe_open(config.with_name("adapter_model.safetensors"), "np"):  # fails where the file is cut off
            return model_folder(json.loads(config.read_text())["base_model_name_or_path"]), Path(path)
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        fail(f"the adapter in {path} is not whole: {e}; make it or copy it again")


def check_adapter(adapter: Path, base: str) -> None:
    """End with one line if the adapter is missing or was made for another base."""
    made_for, folder = find_policy(adapter)
    if folder is None:
        fail(f"{adapter} holds no adapter; README's table of the five steps names the command that makes it")
    if made_for != model_folder(base):
        fail(f"{adapter} was made for the base {made_for}, not {base}; pass --policy {made_for} or make it again")


def silence_libraries() -> None:
    """Stop the libraries from printing what the scripts already say, and keep the trainers to one GPU."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # each step has new shapes
    if "WORLD_SIZE" not in os.environ:  # not started by `accelerate launch`: a trainer would split over every GPU
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    warnings.filterwarnings("ignore")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def from_pretrained(kind, path: str, **options):
    """`kind`.from_pretrained(path), or the end with one line where there is no such model."""
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError) as e:
        reason = str(e).splitlines()[0]
        fail(f"cannot load {path}: {reason}; name a folder or a model on the hub, or use --offline")


def multiplies_in_bf16() -> bool:
    """Whether bf16 is quicker here than fp32. A CPU without instructions for it is a hundred times slower in bf16."""
    import torch

    return torch.cuda.is_available() or bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def compute_dtype(path: str, bits: int):
    """What a base computes in: bf16 on a GPU; on a CPU that multiplies in it, if the weights have 4 or 16 bits."""
    import torch
    from transformers import AutoConfig

    if not multiplies_in_bf16():
        return torch.float32
    half = bits == 4 or from_pretrained(AutoConfig, path).dtype in (torch.bfloat16, torch.float16)
    return torch.bfloat16 if half or torch.cuda.is_available() else torch.float32


def load_base(kind, path: str, bits: int, **options):
    """A model of this class with the settings that all models here share."""
    import torch
    from transformers import BitsAndBytesConfig

    cuda, dtype = torch.cuda.is_available(), compute_dtype(path, bits)
    if bits == 4:
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        # A classification head (`score`) is trained whole, so it cannot be in NF4.
        options["quantization_config"] = BitsAndBytesConfig(**nf4, llm_int8_skip_modules=["lm_head", "score"])
    device = {"": int(os.environ.get("LOCAL_RANK", 0))} if cuda else None
    model = from_pretrained(kind, path, dtype=dtype, device_map=device, **options)
    for module in model.modules():
        # On a CPU bitsandbytes repacks the weights, in place, at the first pass in eval mode. A model trained after
        # that is another one: its log-probabilities are off by 0.23 per token.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@lru_cache(maxsize=1)
def load_embedding(name: str) -> Callable:
    """A function from texts to unit vectors, (texts, dimensions), as the model's authors pool and normalise them."""
    silence_libraries()
    try:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(name)
    except ImportError as e:
        fail(f"--embedding-model: {e}; pip install sentence-transformers")
    except (OSError, ValueError) as e:
        fail(f"--embedding-model {name} cannot be loaded: {str(e).splitlines()[0]}; name a folder or a hub model")
    return lambda texts: model.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def load_tokenizer(path: str):
    """The tokenizer of a base. It pads on the left, because generation goes on at the right.

    Its EOS is what ends a turn, it has a pad token, and its chat template renders training and generation alike. All
    of that is set in the tokenizer, because TRL renders and pads by itself.
    """
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, path, padding_side="left")
    if not tokenizer.chat_template:
        fail(f"{path} has no chat template; name a model that was trained to chat with --policy or --likelihood")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # Qwen3 and its like are to answer without thoughts.
    tokenizer.chat_template = "{%- set enable_thinking = false %}" + tokenizer.get_chat_template()
    chat = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    completion = tokenizer.apply_chat_template(chat, tokenize=False).removeprefix(prompt).strip()
    if not completion.startswith("答"):
        thinks = f"the chat template of {path} puts thoughts or tags before an answer"
        fail(f"{thinks}; name another model with --policy or --likelihood")
    # A chat model may come with its base's tokenizer, whose EOS is <|endoftext|> where a turn ends with <|im_end|>.
    after = tokenizer.tokenize(completion[1:].strip())
    if after and after[0] in tokenizer.get_added_vocab():
        tokenizer.add_special_tokens({"eos_token": after[0]})
    else:  # or training would teach no end
        tokenizer.chat_template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    return tokenizer


def load_policy(path: str, bits: int, adapter: Path | None = None, trainable: bool = False):
    """(model, tokenizer) of a base, with a LoRA adapter on it if one is given."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(path)  # first, because what is wrong with it shows in a second
    model = load_base(AutoModelForCausalLM, path, bits)
    # `generate` and TRL go by the generation config, which may not name the end of a turn, or a base's own EOS.
    named = model.generation_config.eos_token_id
    ends = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id, tokenizer.pad_token_id}
    model.generation_config.eos_token_id = sorted(ends - {None})
    if adapter is not None:
        check_adapter(adapter, path)
        model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    return model, tokenizer


def save_adapter(model, folder: Path) -> None:
    """Save the adapter alone. PEFT would ask the hub at each call whether the base's embeddings are its own."""
    model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)


def lora(rank: int, task: str, **options):
    """LoRA for every linear layer, alpha twice the rank, no dropout (Schulman et al. 2025, "LoRA Without Regret")."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task, **options)


def generate(
    model,
    tokenizer,
    conversations: list[Messages],
    *,
    temperature: float,
    max_tokens: int,
    batch_size: int,
    seed: int,
    progress: str = "",
) -> list[str]:
    """One sampled completion for each conversation, in their order, as text without special tokens.

    Sampling is seeded once for the whole call: the same list, batch size and seed give the same texts.
    """
    import torch
    from tqdm import tqdm

    # Named here, because Qwen's generation_config.json has another top_p, top_k and penalty.
    sampling = {"do_sample": temperature > 0, "temperature": temperature or 1.0}
    sampling |= {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    ending = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": model.generation_config.eos_token_id}
    torch.manual_seed(seed)
    was_training = model.training
    model.eval()
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in conversations]
    texts = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=progress, disable=not progress, unit="batch"):
        batch = prompts[start : start + batch_size]
        inputs = tokenizer(batch, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=max_tokens, **sampling, **ending)
        completions = tokens[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(completions, skip_special_tokens=True)
    model.train(was_training)
    return [text.strip() for text in texts]
