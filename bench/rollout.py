"""What it costs to bring a step's weights to the engine: the adapter alone, against merging it and pushing everything.

    python bench/rollout.py                 # vLLM's GPU or CPU build; after `bash run.sh`; minutes on two cores

Two models, both in 16 bits: the tiny one, and one of Qwen2.5-0.5B's architecture with random weights. For each, in the
same process and in turns: (a) the sync of step 4: write the adapter, load it into vLLM, reset its prefix cache; (b) the
least that a merge and push can be: merge the adapter into the base, copy every weight once, take the adapter out again.
Then GRPO of the tiny model with the judge, 4 bits, seconds by phase.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.engine import engine_class
from common.offline.tiny_model import tiny_policy
from common.policy import load_tokenizer, lora, silence_libraries

HALF_B = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip


def random_model(folder: Path) -> str:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = load_tokenizer(str(tiny_policy()))
    config = Qwen2Config(**HALF_B, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def measure(base: str, rounds: int) -> dict:
    """Median milliseconds of both ways, and the bytes that travel."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    engine = engine_class(base, 16, 16, 0)(
        model=base, max_model_len=128, max_num_seqs=4, dtype="bfloat16", gpu_memory_utilization=0.4
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(model.to("cuda" if torch.cuda.is_available() else "cpu"), lora(16, "CAUSAL_LM"))
    times: dict[str, list[float]] = {"adapter": [], "everything": []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            started = time.perf_counter()
            folder = Path(scratch, str(number))
            model.save_pretrained(folder)
            engine.use(folder)
            times["adapter"].append(time.perf_counter() - started)
            started = time.perf_counter()
            model.merge_adapter()
            copies = [p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name]
            model.unmerge_adapter()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times["everything"].append(time.perf_counter() - started)
        sent = sum(file.stat().st_size for file in folder.iterdir())
    adapter = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "lora_" in name)
    everything = sum(p.numel() * p.element_size() for p in copies)
    return {
        "parameters": sum(p.numel() for p in copies), "adapter_bytes": adapter, "sent_bytes": sent,
        "everything_bytes": everything, **{k: 1000 * statistics.median(v) for k, v in times.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "outputs/run", help="with sft.jsonl and principles.jsonl")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:  # an engine has a process of its own
        silence_libraries()
        print(json.dumps(measure(args.one, args.rounds)))
        return
    print("| model | adapter, bytes sent / its own | sync of the adapter | merge and push, at least | ratio |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        bases = {
            "tiny": str(tiny_policy()),
            "Qwen2.5-0.5B's architecture": random_model(Path(scratch, "model")),
        }
        for name, base in bases.items():
            command = [sys.executable, __file__, "--one", base, "--rounds", str(args.rounds)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            m = json.loads(done.stdout.splitlines()[-1])
            bytes_, ratio = m["sent_bytes"] / m["adapter_bytes"], m["everything_bytes"] / m["sent_bytes"]
            shown = [f"{name}, {m['parameters'] / 1e6:.0f}M", f"{bytes_:.3f}", f"{m['adapter']:.1f} ms"]
            shown += [f"{m['everything']:.1f} ms, {ratio:.0f} times the bytes", f"{m['adapter'] / m['everything']:.2f}"]
            print("|", " | ".join(shown), "|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("sft.jsonl", "principles.jsonl"):
            shutil.copy(args.run / name, scratch)
        flags = ["--offline", "--bits", "4", "--run", scratch, "--watch-every", "0", "--steps", "8"]
        for reward in ("none", "judge"):
            command = [sys.executable, "04_grpo.py", "--reward", reward, "--engine", "vllm", *flags]
            if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
                sys.exit(f"failed: {' '.join(command)}")
        summary = json.loads(Path(scratch, "04_summary_judge.json").read_text())
    phases = ", ".join(f"{name} {seconds / summary['steps']:.2f}" for name, seconds in summary["seconds"].items())
    written = summary["completions"] // summary["steps"]
    print(f"\nThe tiny model in 4 bits, {written} completions per step; seconds per step: {phases}; "
          f"gap {summary['logp_gap']['mean']:.4f}, at most {summary['logp_gap']['most']:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
