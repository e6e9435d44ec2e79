"""vLLM in this process: it serves the weights that the trainer multiplies by, and is sent the adapter alone.

Two users: `Writer` writes the greetings of steps 1 and 5, `adapter_sync` the rollouts of step 4.
"""

import argparse
import gc
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import policy
from common.policy import MAX_PROMPT, from_pretrained, generate, load_policy, load_tokenizer, save_adapter
from common.records import Messages
from common.run_folder import ROOT, Stop, digest, fail

DEQUANTISED = ROOT / "outputs" / "dequantised"  # rollout bases, shared by every run
USUAL_RANK = 16  # of an adapter, as 04_grpo.py makes it by default
TRL_VERSION = "1.16.0"  # whose VLLMGeneration `adapter_sync` was written against
ENGINE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM makes room for an adapter in these sizes only


def add_engine_flag(parser: argparse.ArgumentParser) -> None:
    """--engine, in the group "models" that `add_policy_flags` has made."""
    group = next(group for group in parser._action_groups if group.title == "models")
    group.add_argument("--engine", choices=("hf", "vllm"), help="what writes (vllm on a GPU if installed, else hf)")


def choose_engine(args: argparse.Namespace) -> None:
    """Fill in --engine: vLLM where there is a GPU and it is installed, transformers elsewhere."""
    if args.engine is None:
        import torch

        args.engine = "vllm" if torch.cuda.is_available() and importlib.util.find_spec("vllm") else "hf"


def rollout_base(base: str, bits: int) -> str:
    """The folder of the weights that a trainer on this base really multiplies by: what the engine has to serve.

    In 4 bits that is not the checkpoint but its NF4 weights, dequantised to what the trainer computes in. They are
    written once, into outputs/dequantised/, and reused.
    """
    if bits != 4:
        return base
    import bitsandbytes
    import torch
    from transformers import AutoConfig

    revision = getattr(from_pretrained(AutoConfig, base), "_commit_hash", None)
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in Path(base).glob("*.*"))
    dtype = policy.compute_dtype(base, bits)
    folder = DEQUANTISED / digest(base, revision, files, bitsandbytes.__version__, str(dtype))
    if folder.is_dir():
        return str(folder)
    DEQUANTISED.mkdir(parents=True, exist_ok=True)
    for left in DEQUANTISED.glob("tmp*"):  # by a process that was killed; one that is still writing is younger
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left)
    scratch = Path(tempfile.mkdtemp(dir=DEQUANTISED))
    model, tokenizer = load_policy(base, 4)
    model.dequantize().to(dtype).save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    try:
        scratch.rename(folder)
    except OSError:  # another process was quicker
        shutil.rmtree(scratch)
    torch.cuda.empty_cache()
    return str(folder)


def engine_class(base: str, bits: int, rank: int, seed: int) -> type:
    """vLLM's LLM, serving the rollout base of `base` with one LoRA adapter at a time, of this rank at most.

    Call it before anything imports vLLM: it sets the environment that vLLM reads then.
    """
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
    room = [size for size in ENGINE_RANKS if size >= rank]
    if not room:
        fail(f"--rank {rank}: vLLM serves adapters of rank {ENGINE_RANKS[-1]} at most")
    settings = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": room[0]}
    settings |= {"dtype": policy.compute_dtype(base, bits), "enforce_eager": not cuda}
    settings |= {"model": rollout_base(base, bits), "quantization": None}  # TRL's own would quantise the base again
    # Without a seed vLLM sets every generator of the process to 0. The head is in fp32 here as in the trainer.
    settings |= {"seed": seed, "hf_overrides": {"head_dtype": "float32"}}

    class AdapterLLM(LLM):
        def __init__(self, **options):
            super().__init__(**{**options, **settings})
            self.adapter = None
            self.swaps = 0

        def use(self, folder: Path | None) -> None:
            """Answer with the adapter in this folder from now on, or with the base alone.

            Each time under a new name and number: an adapter loaded again under its old name can meet the prefix
            cache of its predecessor (vllm#42125).
            """
            self.swaps += 1
            self.adapter = None
            if folder is not None:
                self.adapter = LoRARequest(f"policy-{self.swaps}", self.swaps, str(folder))
                self.llm_engine.add_lora(self.adapter)
            self.reset_prefix_cache()

        def close(self) -> None:
            """Give the memory back: Python alone would not, as vLLM holds references to itself (vllm#21073)."""
            self.llm_engine.engine_core.shutdown()
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()

        def generate(self, *inputs, **options):
            return super().generate(*inputs, lora_request=self.adapter, **options)

        def sleep(self, level: int = 1) -> None:
            # TRL asks for level 2, which throws the base away, and then pushes all weights again. Level 1 keeps the
            # base in the machine's memory.
            super().sleep(level=1)

    return AdapterLLM


@contextmanager
def adapter_sync(base: str, bits: int, rank: int, seed: int) -> Iterator[None]:
    """Build a GRPO trainer within it: TRL then writes with the rollout base, and each step it sends the adapter alone.

    TRL itself merges the adapter into the base and pushes all weights, which loses precision or fails on 4 bits
    (trl#3466, trl#4973, trl#5975), and it has no hook to do otherwise. So while the trainer is built, TRL's two
    classes for it are replaced. `trainer.vllm_generation.syncs` then holds (seconds, bytes) of every sync.
    """
    import trl

    if trl.__version__ != TRL_VERSION:
        fail(f"--engine vllm needs trl {TRL_VERSION}, this is {trl.__version__}: install that one, or use --engine hf")
    engine = engine_class(base, bits, rank, seed)  # before TRL imports vLLM
    from trl.generation import vllm_generation
    from trl.trainer import grpo_trainer

    class AdapterGeneration(vllm_generation.VLLMGeneration):
        def _init_vllm(self) -> None:
            self.syncs: list[tuple[float, int]] = []
            self.scratch = tempfile.TemporaryDirectory(prefix="adapter-")
            super()._init_vllm()

        def sync_weights(self) -> None:
            started = time.perf_counter()
            if self.enable_sleep_mode:
                vllm_generation.empty_cache()
                self.llm.wake_up(tags=["weights"])
                self._llm_weights_sleeping = False
            previous = Path(self.scratch.name, str(self.llm.swaps))
            folder = Path(self.scratch.name, str(self.llm.swaps + 1))
            save_adapter(self.model, folder)
            self.llm.use(folder)
            if self.llm.swaps not in self.llm.llm_engine.list_loras():
                raise Stop("the engine did not take the adapter: its rollouts would not be the policy's")
            shutil.rmtree(previous, ignore_errors=True)
            size = sum(file.stat().st_size for file in folder.iterdir())
            self.syncs.append((time.perf_counter() - started, size))

    originals = vllm_generation.LLM, grpo_trainer.VLLMGeneration
    vllm_generation.LLM, grpo_trainer.VLLMGeneration = engine, AdapterGeneration
    try:
        yield
    finally:
        vllm_generation.LLM, grpo_trainer.VLLMGeneration = originals


def free_share() -> float:
    """The part of a GPU's memory that `Writer`'s engine may take: most of what is free beside a judge's server."""
    import torch

    if not torch.cuda.is_available():
        return 0.3  # not used: VLLM_CPU_KVCACHE_SPACE sizes the CPU build's cache
    free, total = torch.cuda.mem_get_info()
    return 0.85 * free / total


class Writer:
    """Writes with any base and any of its adapters: by vLLM where that is chosen, else by transformers.

    What the last call needed stays loaded: an engine takes a minute to start, an adapter a moment to change.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.loaded = None  # the base in the engine, or (base, adapter) with transformers
        self.engine = self.model = None

    def close(self) -> None:
        """Give back the memory of what is loaded."""
        if self.engine:
            self.engine.close()
        self.engine = self.model = self.loaded = None

    def __call__(
        self, base: str, adapter: Path | None, prompts: list[Messages], *, temperature: float, seed: int, progress: str
    ) -> list[str]:
        """One sampled completion for each prompt, in their order; the same call gives the same texts."""
        max_tokens = self.args.max_tokens
        if self.args.engine == "hf":
            if self.loaded != (base, adapter):
                self.model, self.tokenizer = load_policy(base, self.args.bits, adapter)
                self.loaded = (base, adapter)
            sampling = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed, "progress": progress}
            return generate(self.model, self.tokenizer, prompts, batch_size=self.args.batch_size_generate, **sampling)

        rank = json.loads((adapter / "adapter_config.json").read_text())["r"] if adapter else USUAL_RANK
        if self.loaded != base or rank > self.rank:
            self.close()  # an earlier engine gives its memory back before the next takes its own
            self.tokenizer = load_tokenizer(base)
            kind = engine_class(base, self.args.bits, rank, self.args.seed)
            sizes = {"max_model_len": max_tokens + 2 * MAX_PROMPT, "max_num_seqs": 4 * self.args.batch_size_generate}
            self.engine = kind(model=base, gpu_memory_utilization=free_share(), **sizes)
            self.loaded, self.rank = base, rank
        from vllm import SamplingParams

        self.engine.use(adapter)
        # By itself vLLM stops at what the generation config names, see load_policy.
        how = {"stop_token_ids": [self.tokenizer.eos_token_id, self.tokenizer.pad_token_id], "max_tokens": max_tokens}
        inputs, sampling = [], []
        for number, prompt in enumerate(prompts):
            # Token ids, because to a text vLLM would add a second BOS.
            tokens = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
            inputs.append({"prompt_token_ids": tokens})
            # A seed for each prompt, so that a text does not depend on what else is being written.
            sampling.append(SamplingParams(temperature=temperature, seed=seed + number, **how))
        outputs = self.engine.generate(inputs, sampling_params=sampling, use_tqdm=bool(progress))
        return [output.outputs[0].text.strip() for output in outputs]
