"""The reward model, its calibration, and the reward of a GRPO step."""

import argparse
import asyncio
import json
import math
import random
import re
import sys
import time
from pathlib import Path

from common.answers import Unusable
from common.client import Client, together
from common.judge import current_principles, judge
from common.policy import check_adapter, load_base, load_tokenizer
from common.prompts import conversation
from common.records import Preference
from common.run_folder import Refused, fail, main_process, replace_file
from common.trainers import of_all_processes

USUAL = 512  # characters of a conversation up to which a full batch of them is scored at once


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


def calibrate(args: argparse.Namespace, pairs: list[Preference], base: str) -> RewardModel:
    """Write rm/calibration.json from at most 1,000 pairs that were not trained on; returns the model that uses it.

    The score's slope over length is that of a straight line through the chosen texts, all of which are good: what is
    longer among them is not better. As much of it is taken off as brings the correlation down to --length-tolerance.
    Lengths beyond those seen count as the nearest that was.
    """
    import numpy as np

    path = args.run / "rm" / "calibration.json"
    path.unlink(missing_ok=True)  # of a run that was killed
    rm = RewardModel(args.run / "rm", base, args.bits, args.prompts, calibrating=True)
    some = random.Random(args.seed).sample(pairs, min(len(pairs), 1000))
    chosen, rejected = (
        np.array(rm.score_conversations([p.prompt + getattr(p, name) for p in some])) for name in ("chosen", "rejected")
    )
    lengths = np.array([len(p.texts[1]) for p in some])
    shortest, longest = (float(x) for x in np.percentile(lengths, [1, 99]))
    clipped = np.clip(lengths, shortest, longest)
    slope, left = 0.0, min(args.length_tolerance, 0.999)
    if np.ptp(clipped) and abs(np.corrcoef(chosen, clipped)[0, 1]) > left:
        whole, offset = np.polyfit(clipped, chosen, 1)
        rest = np.std(chosen - whole * clipped - offset)
        slope = float(whole - np.sign(whole) * left * rest / (np.std(clipped) * math.sqrt(1 - left**2)))
    line = {"slope": slope, "shortest": shortest, "longest": longest}
    both = np.concatenate([
        raw - slope * np.clip([len(p.texts[which]) for p in some], shortest, longest)
        for which, raw in ((1, chosen), (2, rejected))
    ])  # fmt: skip
    found = {"mean": float(both.mean()), "std": float(both.std()) or 1.0, "length": line}
    found |= {"n": len(both), "bits": args.bits}
    replace_file(path, json.dumps(found) + "\n")
    rm.calibration = found
    return rm


PAUSES = (5.0, 30.0)  # seconds before the judge is asked again for a step in which over a fifth of the answers failed
# What a policy learns to write once its reward can be had for it: shares of the completions, in every step's metrics.
GAMING = {
    "written_twice": re.compile(r"(.{6,}?)(\W*\1)+\W*", re.DOTALL),
    "flatters_reviewer": re.compile(".*(评委|评审|打分|满分|高分).*", re.DOTALL),
}


class Rewards:
    """The reward function of a GRPO run, which also writes rollouts_*.jsonl and a step's figures about its rewards."""

    def __init__(self, args: argparse.Namespace, base: str):
        self.args, self.path = args, args.run / f"rollouts_{args.reward}.jsonl"
        if args.reward in ("rm", "both"):
            self.model = RewardModel(args.rm, base, args.bits, args.prompts)
        if args.reward in ("judge", "both"):
            self.principles = current_principles(args.principles)
            self.client = Client(args, args.run)

    async def judged(self, query: str, response: str) -> tuple[float | None, str]:
        """(reward, reason); the reward is None where the judge gave no usable verdict."""
        if not response.strip():
            return 0.0, "empty"
        try:
            verdict = await judge(self.client, query, response, self.principles)
        except Unusable as e:
            return None, f"failed: {e}"
        except SystemExit as e:  # would end TRL's thread and leave the trainer waiting for it
            raise Refused("see the error above") from e
        return verdict.reward, verdict.reason

    async def verdicts(self, rows: list[tuple[str, str]]) -> list[tuple[float | None, str]]:
        """(reward, reason) of every row. Too many failures pause the step; half of them stop the run.

        Raises:
            Refused: more than half of the judgements failed, also after the pauses.
        """
        from tqdm import tqdm

        found: list = [(None, "")] * len(rows)
        for pause in (*PAUSES, None):
            missing = [i for i, (reward, _) in enumerate(found) if reward is None]
            answers = await together(*(self.judged(*rows[i]) for i in missing))
            for i, answer in zip(missing, answers, strict=True):
                found[i] = answer
            reasons = [reason for reward, reason in found if reward is None]
            if len(reasons) <= 0.2 * len(rows):
                return found
            if pause is not None:
                failed = f"{len(reasons)} of {len(rows)} judgements of a step {reasons[0]}"
                tqdm.write(f"{failed}; asking again in {pause:.0f} s", file=sys.stderr)
                await asyncio.sleep(pause)
                self.client.failed.clear()
        if len(reasons) > 0.5 * len(rows):
            raise Refused(f"{failed}; mend the endpoint and run again: the run goes on at its last checkpoint")
        return found

    async def of(self, rows: list[tuple[str, str]]) -> list[tuple[float | None, str]]:
        """(reward, reason) of every (query, text) row of a step; the reward is None where there is none."""
        found: list = [(0.0, "")] * len(rows)
        if self.args.reward in ("rm", "both"):
            scores = self.model.score(rows, self.args.micro_batch)
            worst = min(scores)  # nothing written is no greeting, whatever the model makes of it
            found = [(s, "") if t.strip() else (worst, "empty") for s, (_, t) in zip(scores, rows, strict=True)]
        if self.args.reward in ("judge", "both"):
            share = self.args.judge_weight if self.args.reward == "both" else 1.0
            found = [
                (None if verdict is None else (1 - share) * score + share * verdict, reason)
                for (score, _), (verdict, reason) in zip(found, await self.verdicts(rows), strict=True)
            ]
        cost = self.args.length_penalty / 100
        found = [(None if r is None else r - cost * len(t), why) for (r, why), (_, t) in zip(found, rows, strict=True)]
        return [(float(r) if r is not None and math.isfinite(r) else None, why) for r, why in found]

    async def __call__(self, completions: list, query: list[str], trainer_state, log_metric, **kwargs) -> list:
        """One reward a completion of the step, as TRL asks for them; None gives no learning signal."""
        import numpy as np

        started = time.perf_counter()
        texts = [completion[0]["content"] for completion in completions]
        found = await self.of(list(zip(query, texts, strict=True)))
        mine = [reward for reward, _ in found]
        every = of_all_processes(list(zip(query, texts, found, strict=True)))
        texts, rewards = [text for _, text, _ in every], [reward for _, _, (reward, _) in every]
        if main_process():
            with open(self.path, "a", encoding="utf-8") as file:
                for q, text, (reward, reason) in every:
                    row = {"query": q, "response": text, "reward": reward, "reason": reason}
                    file.write(json.dumps({"step": trainer_state.global_step} | row, ensure_ascii=False) + "\n")
        scored = np.array([(r, len(t)) for r, t in zip(rewards, texts, strict=True) if r is not None])
        flat = len(scored) < 2 or not scored.std(axis=0).all()
        grams = [text[i : i + 2] for text in texts for i in range(len(text) - 1)]
        log_metric("reward_length_correlation", 0.0 if flat else float(np.corrcoef(scored.T)[0, 1]))
        log_metric("distinct_2", len(set(grams)) / max(1, len(grams)))
        for name, pattern in GAMING.items():
            log_metric(name, sum(bool(pattern.fullmatch(text)) for text in texts) / len(texts))
        log_metric("failed_judgements", float(sum(r is None for r in rewards)))
        log_metric("seconds/reward", time.perf_counter() - started)
        return mine
