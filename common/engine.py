"""vLLM in this process: the dequantised base, and the adapter alone."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from common.policy import MOST_PROMPT, _cannot_load, check_adapter, generate, load_base, load_policy, load_tokenizer
from common.run_folder import ROOT, Refused, digest, fail

DEQUANTISED = ROOT / "outputs" / "dequantised"  # rollout bases, shared by every run
TRL_VERSION = "1.16.0"  # whose VLLMGeneration `adapter_sync` was written against


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
