"""What tests/test_engine.py runs in processes of their own: step 4 with a part of it replaced, and LoRA modules alone.

python tests/engine.py as_is FLAGS OF 04_grpo.py    (or original_base, never_sent, sent_once)
python tests/engine.py modules                      prints {module: [gap, gap to the unperturbed policy]} as JSON
python tests/engine.py writer                       prints three lists of greetings
"""

import argparse
import hashlib
import importlib
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import engine as rooms
from common.engine import Writer, engine_class
from common.offline.tiny_model import tiny_policy
from common.policy import load_policy, lora, silence_libraries
from common.prompts import PROMPTS, conversation

QUERIES = ["给老师的教师节祝福", "生日祝福 朋友", "中秋节祝福语给妈妈", "新婚快乐祝福", "祝同事升职", "春节拜年短信"]


def quantised_hash(model) -> str:
    """Hash of every 4-bit weight and of its scales."""
    total = hashlib.sha256()
    for _, module in sorted(model.named_modules()):
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            for tensor in (module.weight.data, state.absmax):
                total.update(tensor.contiguous().view(-1).float().cpu().numpy().tobytes())
    return total.hexdigest()


def step_4(replaced: str) -> int:
    """Run 04_grpo.py with the flags that follow; prints whether the quantised base is the same after it."""
    grpo = importlib.import_module("04_grpo")
    load_as_is, class_as_is, loaded = grpo.load_policy, rooms.engine_class, []

    def loading(*args, **kwargs):
        model, tokenizer = load_as_is(*args, **kwargs)
        loaded.append((model, quantised_hash(model)))
        return model, tokenizer

    def engine(*args):
        kind = class_as_is(*args)
        use = kind.use

        def use_less(self, folder: Path) -> None:
            if replaced == "sent_once" and not self.swaps:
                use(self, folder)
            self.swaps += 1

        if replaced in ("never_sent", "sent_once"):
            kind.use = use_less
        return kind

    grpo.load_policy, rooms.engine_class = loading, engine
    if replaced == "original_base":
        rooms.rollout_base = lambda base, bits: base
    code = grpo.run_folder.launch(grpo.main, grpo.parse_args())
    print(json.dumps({"base_unchanged": all(quantised_hash(model) == before for model, before in loaded)}))
    return code


def modules() -> None:
    """Perturb one LoRA module after the other; how far is the engine from the trainer, and from the policy before?"""
    import torch
    from peft import get_peft_model
    from vllm import SamplingParams

    silence_libraries()
    base = str(tiny_policy())
    engine = engine_class(base, 4, 16, 0)(
        model=base, max_model_len=160, max_num_seqs=16, logprobs_mode="processed_logprobs"
    )
    model, tokenizer = load_policy(base, 4)
    model = get_peft_model(model, lora(16, "CAUSAL_LM"))
    asked = [conversation(query, PROMPTS) for query in QUERIES]
    asked = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=True)["input_ids"] for c in asked]
    sampling = SamplingParams(temperature=1.0, max_tokens=24, logprobs=0, seed=0)

    def distances() -> list[float]:
        """Mean difference of the engine's log-probabilities to the trainer's, with its adapter and without."""
        outputs = engine.generate(
            [{"prompt_token_ids": ids} for ids in asked], sampling_params=sampling, use_tqdm=False
        )
        found = []
        for adapted in (True, False):
            gaps = []
            for ids, output in zip(asked, outputs, strict=True):
                new = torch.tensor(output.outputs[0].token_ids)
                engines = torch.tensor([next(iter(at.values())).logprob for at in output.outputs[0].logprobs])
                with nullcontext() if adapted else model.disable_adapter(), torch.no_grad():
                    inputs = torch.tensor([ids + new.tolist()], device=model.device)
                    logits = model(input_ids=inputs).logits[0, len(ids) - 1 : -1].float().cpu()
                gaps.append((logits.log_softmax(-1).gather(1, new[:, None])[:, 0] - engines).abs())
            found.append(torch.cat(gaps).mean().item())
        return found

    found, torch_rng = {}, torch.Generator().manual_seed(0)
    parts = [(name, p) for name, p in model.named_parameters() if "lora_B" in name]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, part) in enumerate(
            [*parts, parts[0]]
        ):  # the first again: a swap back, with the same prompts
            part.data = (torch.randn(part.shape, generator=torch_rng) * 0.3).to(part.device)
            model.save_pretrained(f"{scratch}/{number}")
            engine.use(Path(scratch, str(number)))
            found[f"{number} {name}"] = distances()
            if number == 0 and torch.cuda.is_available():  # on a CPU vLLM ignores both
                engine.sleep()
                engine.wake_up()
                found["after sleep"] = distances()
            part.data.zero_()
    print(json.dumps(found))


def writer() -> None:
    """What Writer writes with the base, with an adapter, and with the base again."""
    import torch
    from peft import get_peft_model

    silence_libraries()
    base = str(tiny_policy())
    write = Writer(argparse.Namespace(engine="vllm", bits=4, max_tokens=24, seed=0, batch_size_generate=8))
    asked = [conversation(query, PROMPTS) for query in QUERIES]
    with tempfile.TemporaryDirectory() as scratch:
        model = get_peft_model(load_policy(base, 4)[0], lora(16, "CAUSAL_LM"))
        for name, part in model.named_parameters():
            if "lora_B" in name:
                part.data = torch.randn(part.shape, generator=torch.Generator().manual_seed(0)) * 0.3
        model.save_pretrained(scratch)
        how = {"temperature": 1.0, "seed": 5, "progress": ""}
        print(json.dumps([write(base, adapter, asked, **how) for adapter in (None, Path(scratch), None)]))


if __name__ == "__main__":
    mode = sys.argv.pop(1)
    sys.exit({"modules": modules, "writer": writer}.get(mode, lambda: step_4(mode))())
