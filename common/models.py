"""Policy and reward model: 4-bit loading, adapters, generate(), score().

A policy is a base model and, unless it is the base itself, a folder with a LoRA adapter. A reward model is the same
base with a scalar head and an adapter, in a folder of its own. Torch and transformers are imported inside the
functions, so that `--help` answers at once.
"""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from common.llm import Refused, render
from common.records import ROOT, digest, fail, main_process, positive

DEFAULT_POLICY = "Qwen/Qwen2.5-7B-Instruct"
LORA_TARGETS = "all-linear"
DEQUANTISED = ROOT / "outputs" / "dequantised"  # rollout bases, shared by every run
MOST_PROMPT = 256  # tokens of a policy's prompt
USUAL = 512  # characters of a conversation up to which a full batch of them is scored at once
TRL_VERSION = "1.16.0"  # whose VLLMGeneration `adapter_sync` was written against


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
    from common import offline

    return str(offline.tiny_policy())


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


def trainer_settings(bits: int) -> dict:
    """Settings that every TRL trainer here shares: bf16 where load_base takes it, no tracker, no bar but ours."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "bf16": cuda or bits == 4,
        "use_cpu": not cuda,
        "gradient_checkpointing": cuda,
        "report_to": [],
        "disable_tqdm": True,
    }


def per_process(batch: int, accumulation: int) -> tuple[int, int]:
    """(batch, accumulation) of each process of `accelerate launch`, so that all together make the same update."""
    n = int(os.environ.get("WORLD_SIZE", 1))
    if accumulation % n and batch % n:
        fail(f"{n} processes cannot share {accumulation} batches of {batch} an update: make one of the two a multiple "
             f"of {n}, with --batch-size, --accumulation, --sft-batch-size, --mini-batch or --micro-batch")  # fmt: skip
    return (batch // n, accumulation) if accumulation % n else (batch, accumulation // n)


def of_all_processes(rows: list) -> list:
    """The rows of every process of `accelerate launch`, in the order of the processes, in each of them."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return rows
    from accelerate.utils import gather_object

    return gather_object(rows)


def peak_gib() -> float | None:
    """The most GPU memory that this process has had from torch so far, in GiB; None without a GPU."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 1024**3, 2) if torch.cuda.is_available() else None


def progress_callback(title: str, shown: list[str], metrics: Path | None = None):
    """A trainer callback: one bar with the time left and the figures named, and each log appended to a JSONL file."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            quiet = not main_process()
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=title, unit="step", disable=quiet)

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args, state, control, logs=None, **kwargs):
            figures = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
            self.bar.set_postfix({k: f"{figures[k]:.3g}" for k in shown if k in figures})
            if metrics and "loss" in figures and main_process():
                with open(metrics, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step} | figures) + "\n")

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    return Progress()


def prepare(trainer) -> None:
    """What every TRL trainer here needs once it is built.

    On a 4-bit base TRL turns the adapter to bf16, whose steps near 0.01 are larger than a whole update at the paper's
    learning rates: most weights would never move. So the adapter is trained in fp32, as QLoRA's authors do. The
    callbacks that print each log line go: the bar shows them.
    """
    from transformers import PrinterCallback, ProgressCallback

    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)


def conversation(query: str, prompts: Path) -> list[dict]:
    """What the policy is asked for a query: prompts/policy.md with the query in it, as chat messages."""
    return render("policy", prompts, query=query)


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


# ---- the engine of the rollouts -------------------------------------------------------------------------------------


def rollout_base(base: str, bits: int) -> str:
    """Where the weights lie that a trainer with this base really multiplies by: what the engine has to serve.

    With 4 bits that is not the checkpoint but its NF4 weights, dequantised to bf16. They are written once, into
    outputs/dequantised/, and reused.
    """
    if bits != 4:
        return base
    import bitsandbytes
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    weights = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in Path(base).glob("*.safetensors"))
    try:
        revision = getattr(AutoConfig.from_pretrained(base), "_commit_hash", None)
    except (OSError, ValueError) as e:
        _cannot_load(base, e)
    folder = DEQUANTISED / digest(base, revision, weights, bitsandbytes.__version__)
    if not folder.is_dir():
        DEQUANTISED.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=DEQUANTISED))
        load_base(AutoModelForCausalLM, base, 4).dequantize().to(torch.bfloat16).save_pretrained(scratch)
        load_tokenizer(base).save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process was quicker
            shutil.rmtree(scratch)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return str(folder)


def add_engine_flag(parser) -> None:
    """The flag of every script that writes with a policy."""
    parser.add_argument(
        "--engine", choices=("hf", "vllm"), help="what writes: vLLM, or transformers (vllm on a GPU where it is "
        "installed, else hf)",
    )  # fmt: skip


def choose_engine(args) -> None:
    """Fill in --engine: vLLM where there is a GPU and it is installed, transformers elsewhere."""
    import importlib.util

    if args.engine is None:
        args.engine = "hf"
        if importlib.util.find_spec("vllm"):
            import torch

            args.engine = "vllm" if torch.cuda.is_available() else "hf"


def engine_class(base: str, bits: int, rank: int):
    """vLLM's LLM, serving the rollout base of `base` with one LoRA adapter at a time, of this rank at most."""
    import torch

    cuda = torch.cuda.is_available()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine lives in this process
    if not cuda:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
    except ImportError as e:
        fail(f"--engine vllm: {e}; install vLLM (requirements.txt), or use --engine hf")
    served = {
        "model": rollout_base(base, bits), "quantization": None, "enable_lora": True, "max_loras": 1,
        "max_lora_rank": adapter_room(rank), "max_cpu_loras": 1,
        "dtype": "bfloat16" if cuda or bits == 4 else "float32", "enforce_eager": not cuda,
    }  # fmt: skip

    class AdapterLLM(LLM):
        def __init__(self, **kwargs):
            super().__init__(**kwargs | served)
            self.adapter, self.swaps = None, 0

        def use(self, folder: Path | None) -> None:
            """Answer with the adapter in this folder from now on, or with the base alone.

            Under a new name and number each time: an adapter loaded again under its old name can meet the prefix cache
            of its predecessor (vllm#42125).
            """
            self.swaps += 1
            self.adapter = None
            if folder is not None:
                self.adapter = LoRARequest(f"policy-{self.swaps}", self.swaps, str(folder))
                self.llm_engine.add_lora(self.adapter)
            self.reset_prefix_cache()

        def generate(self, *args, **kwargs):
            return super().generate(*args, lora_request=self.adapter, **kwargs)

        def sleep(self, level: int = 1) -> None:
            # TRL asks for level 2, which throws the base away, and pushes all weights again. Level 1 keeps it in the
            # machine's memory.
            super().sleep(level=1)

    return AdapterLLM


class Writer:
    """Writes with any base and any of its adapters: by vLLM where that is chosen, else by transformers.

    What the last call needed stays loaded: an engine takes a minute to start, an adapter a moment to change.
    """

    def __init__(self, args):
        self.args, self.loaded = args, None

    def __call__(
        self, base: str, adapter: Path | None, conversations: list[list[dict]], *, temperature: float, seed: int,
        progress: str = "",
    ) -> list[str]:  # fmt: skip
        """One sampled completion a conversation, in the order given; the same call gives the same texts."""
        if self.args.engine == "vllm":
            return self._by_engine(base, adapter, conversations, temperature, seed, bool(progress))
        if self.loaded != (base, adapter):
            self.model, self.tokenizer = load_policy(base, self.args.bits, adapter)
            self.loaded = (base, adapter)
        return generate(
            self.model, self.tokenizer, conversations, temperature=temperature, top_p=1.0, seed=seed,
            max_tokens=self.args.max_tokens, batch_size=self.args.batch_size_generate, progress=progress,
        )  # fmt: skip

    def _by_engine(self, base, adapter, conversations, temperature: float, seed: int, progress: bool) -> list[str]:
        if self.loaded != base:
            self.engine = None  # an earlier one gives its memory back before the next takes its own
            self.engine = engine_class(base, self.args.bits, 64)(
                model=base, max_model_len=self.args.max_tokens + 2 * MOST_PROMPT, seed=self.args.seed,
                gpu_memory_utilization=0.5,
            )  # fmt: skip
            self.tokenizer, self.loaded = load_tokenizer(base), base
        from vllm import SamplingParams

        if adapter is not None:
            check_adapter(adapter, base)
        self.engine.use(adapter)
        asked = [
            self.tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in conversations
        ]
        sampling = [
            SamplingParams(temperature=temperature, max_tokens=self.args.max_tokens, seed=seed + n)
            for n in range(len(asked))
        ]
        outputs = self.engine.generate(asked, sampling_params=sampling, use_tqdm=progress)
        return [output.outputs[0].text.strip() for output in outputs]


def check_rollout_server(url: str, base: str, bits: int, rank: int) -> None:
    """End with the command that starts it if no vLLM server answers there."""
    import requests

    try:
        requests.get(f"{url}/health", timeout=10).raise_for_status()
    except requests.RequestException as e:
        fail(f"no vLLM server answers at {url} ({type(e).__name__}); on a GPU of its own, start: "
             "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_SERVER_DEV_MODE=1 "
             f"vllm serve {rollout_base(base, bits)} --enable-lora --max-lora-rank {adapter_room(rank)} "
             f"--logprobs-mode processed_logprobs --port {url.rpartition(':')[2]}")  # fmt: skip


def adapter_room(rank: int) -> int:
    """The least rank for which vLLM can make room that holds an adapter of this rank."""
    ranks = (8, 16, 32, 64, 128, 256, 320, 512)
    return next((n for n in ranks if n >= rank), 0) or fail(f"--rank {rank}: vLLM serves adapters of rank 512 at most")


def adapter_sync(base: str, bits: int, rank: int, run: Path, server: str | None):
    """A context in which TRL writes with the rollout base, and brings its engine the adapter alone each step.

    The engine lives in this process, or is a vLLM server (its URL) that sees the same files: it reads the adapter in
    the run folder. TRL itself merges the adapter into the base and pushes all weights, which is lossy or fails on 4
    bits (trl#3466, trl#4973, trl#5975). Each sync is in `syncs` of the trainer's `vllm_generation`: (seconds, bytes).
    """
    from contextlib import ExitStack
    from unittest.mock import patch

    import trl

    if trl.__version__ != TRL_VERSION:
        fail(f"--engine vllm was written against trl {TRL_VERSION}, this is {trl.__version__}: install that one, or "
             "use --engine hf")  # fmt: skip
    if not server:
        engine = engine_class(base, bits, rank)  # sets the environment that vLLM reads when TRL imports it
    import requests
    from trl.generation import vllm_client, vllm_generation
    from trl.trainer import grpo_trainer

    class AdapterClient(vllm_client.VLLMClient):
        swaps = 0

        def init_communicator(self, device=None) -> None:
            """TRL pushes all weights through one. Nothing is pushed here."""

        def _post(self, url: str, **kwargs):
            try:
                return super()._post(url, **kwargs)
            except requests.JSONDecodeError:  # it has said "Success" and no more
                return {}
            except requests.RequestException as e:
                raise Refused(f"the vLLM server at {self.base_url} is gone ({type(e).__name__}); start it again, and "
                              "run again: the run goes on at its last checkpoint") from e  # fmt: skip

        def use(self, folder: Path) -> None:
            """Answer with the adapter in this folder from now on; under a new name, as in AdapterLLM."""
            if self.swaps:
                self._post(f"{self.base_url}/v1/unload_lora_adapter", json={"lora_name": self.model})
            self.swaps += 1
            self.model = f"{folder.parent.name}-{folder.name}"
            try:
                asked = {"lora_name": self.model, "lora_path": str(folder)}
                self._post(f"{self.base_url}/v1/load_lora_adapter", json=asked)
            except Refused:
                raise
            except Exception as e:  # what TRL's client raises for a status that is not 200
                raise Refused(f"the vLLM server at {self.base_url} does not take the adapter in {folder}; it needs "
                              "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and the same files. "
                              f"{str(e)[:300]}") from e  # fmt: skip

    class AdapterGeneration(vllm_generation.VLLMGeneration):
        def _init_vllm(self):
            self.syncs = []
            self.scratch = tempfile.TemporaryDirectory(dir=run.resolve() if server else None, prefix="adapter-")
            super()._init_vllm()
            self.serving = self.llm if self.mode == "colocate" else getattr(self, "vllm_client", None)

        def sync_weights(self):
            if self.serving is None:  # the first process alone talks to a server
                return
            started = time.perf_counter()
            if self.enable_sleep_mode:
                vllm_generation.empty_cache()
                self.llm.wake_up(tags=["weights"])
                self._llm_weights_sleeping = False
            folder, old = (Path(self.scratch.name, str(self.serving.swaps + n)) for n in (1, 0))
            self.model.save_pretrained(folder, selected_adapters=["default"])
            self.serving.use(folder)
            shutil.rmtree(old, ignore_errors=True)
            size = sum(file.stat().st_size for file in folder.iterdir())
            self.syncs.append((time.perf_counter() - started, size))

    stack = ExitStack()
    name, kind = ("VLLMClient", AdapterClient) if server else ("LLM", engine)
    stack.enter_context(patch.object(vllm_generation, name, kind))
    stack.enter_context(patch.object(grpo_trainer, "VLLMGeneration", AdapterGeneration))
    return stack


def _in_fp32(head) -> None:
    """Have a head compute in fp32, under autocast too: in bf16 a score near 10 moves in steps of 0.06."""
    import torch

    linear = head.float().forward

    def forward(hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden.float())

    head.forward = forward


class RewardModel:
    """A trained reward model: scores of (query, response), standardised and freed of length by calibration.json.

    On a CPU in 16 bits a score depends on nothing but its text. In bf16, as on a GPU and in 4 bits, the other texts of
    a batch move it a little: sums are rounded in another order. The tests hold the first below 1e-3 standard
    deviations, the second below 0.05.
    """

    def __init__(self, folder: Path, base: str, bits: int, prompts: Path, calibrating: bool = False):
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification

        check_adapter(folder, base)
        path = folder / "calibration.json"
        self.calibration = {"mean": 0.0, "std": 1.0, "length": {"slope": 0.0, "shortest": 0, "longest": 0}}
        if not calibrating:
            if not path.is_file():
                fail(f"{folder} holds no calibration.json: its training did not end; run 02_train_rm.py again")
            self.calibration = json.loads(path.read_text())
            if self.calibration["bits"] != bits:
                fail(f"{folder} was trained with --bits {self.calibration['bits']}, not {bits}: its scores would be "
                     "others; pass the same, or train it again")  # fmt: skip
        self.prompts, self.tokenizer = prompts, load_tokenizer(base)
        self.tokenizer.padding_side = "right"
        model = load_base(AutoModelForSequenceClassification, base, bits, num_labels=1)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = PeftModel.from_pretrained(model, folder).eval()
        _in_fp32(self.model.base_model.model.score.modules_to_save["default"])

    def score(self, rows: list[tuple[str, str]], batch_size: int = 64) -> list[float]:
        """A score a (query, response) row, in standard deviations from the mean of the calibration responses."""
        answers = [[{"role": "assistant", "content": response}] for _, response in rows]
        asked = [conversation(query, self.prompts) for query, _ in rows]
        return self.score_conversations([a + b for a, b in zip(asked, answers, strict=True)], batch_size)

    def score_conversations(self, conversations: list[list[dict]], batch_size: int = 64) -> list[float]:
        """A score a whole conversation. Rows are batched by length, which changes no score, and come back in order."""
        import torch

        texts = [self.tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        scores = [0.0] * len(texts)
        while order:
            # As many as `batch_size` of usual length: a batch of that many of the longest would not fit.
            size = max(1, min(batch_size, batch_size * USUAL // len(texts[order[0]])))
            chunk, order = order[:size], order[size:]
            batch = self.tokenizer(
                [texts[i] for i in chunk], return_tensors="pt", padding=True, add_special_tokens=False
            )
            half = self.model.dtype == torch.bfloat16  # adapter and head are in fp32
            with torch.inference_mode(), torch.autocast(self.model.device.type, torch.bfloat16, enabled=half):
                logits = self.model(**batch.to(self.model.device)).logits[:, 0].float().tolist()
            for i, logit in zip(chunk, logits, strict=True):
                scores[i] = self.calibrated(logit, len(conversations[i][-1]["content"]))
        return scores

    def calibrated(self, logit: float, length: int) -> float:
        """A head's output without its slope over length (characters), in standard deviations from the mean."""
        line = self.calibration["length"]
        length = min(max(length, line["shortest"]), line["longest"])
        return (logit - line["slope"] * length - self.calibration["mean"]) / self.calibration["std"]


def draw_curves(path: Path, panels: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    """An SVG file with a panel for each title, in it a line for each label, through its (step, value) points."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3), layout="constrained", squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, points in lines.items():
            if points:
                axis.plot(*zip(*points, strict=True), label=label)
        axis.set(xlabel="step", title=title)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


class Embedding:
    """A sentence-embedding model: texts to unit vectors, the mean of the last hidden states over the tokens."""

    def __init__(self, name: str):
        from transformers import AutoModel

        quiet()
        self.model, self.tokenizer = load_base(AutoModel, name, 16).eval(), load_tokenizer(name)

    def __call__(self, texts: list[str], batch_size: int = 256):
        """Unit vectors, (texts, hidden size), as float32."""
        import numpy as np
        import torch

        found = []
        for start in range(0, len(texts), batch_size):
            batch = self.tokenizer(texts[start : start + batch_size], return_tensors="pt", padding=True)
            with torch.inference_mode():
                hidden = self.model(**batch.to(self.model.device)).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
            found.append(vectors.cpu().numpy())
        return np.concatenate(found)

    def kept(self, texts: list[str], path: Path):
        """The vectors of these texts from a file, which is made first if it is not there."""
        import numpy as np

        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".tmp.npy")
            np.save(scratch, self(texts))
            scratch.replace(path)
        return np.load(path, allow_pickle=False)


class NgramClassifier:
    """A null baseline: logistic regression on character 1-2-grams. What it gets right needs no understanding."""

    def __init__(self, texts: list[str], labels: list[int], seed: int = 0):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        least = 2 if len(texts) > 20 else 1  # a handful of texts may share no n-gram
        vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True, min_df=least)
        self.pipeline = make_pipeline(vectors, LogisticRegression(C=10.0, max_iter=1000, random_state=seed))
        self.pipeline.fit(texts, labels)

    def __call__(self, texts: list[str]) -> list[float]:
        """The log-odds of each text being one of label 1."""
        return self.pipeline.decision_function(texts).tolist()


def length_rule(texts: list[str], labels: list[int]) -> int:
    """A null baseline: the number of characters from which saying "good" is most often right on these texts."""
    lengths = [len(text) for text in texts]
    return max(
        range(1, max(lengths) + 2), key=lambda n: sum((k >= n) == y for k, y in zip(lengths, labels, strict=True))
    )


def null_verdicts(texts: list[str], labels: list[int], unseen: list[str]) -> dict[str, list[int]]:
    """What both null baselines, fitted on labelled texts, say of unseen ones: 1 good, 0 not."""
    least, ngrams = length_rule(texts, labels), NgramClassifier(texts, labels)
    return {
        "length": [int(len(text) >= least) for text in unseen],
        "n-grams": [int(odds > 0) for odds in ngrams(unseen)],
    }
