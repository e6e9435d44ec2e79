"""The reward model: a base, a LoRA adapter and a scalar head, with a calibration that removes the effect of length."""

import json
import math
import random
from pathlib import Path

from common import run_folder
from common.policy import check_adapter, load_base, load_tokenizer
from common.prompts import conversation
from common.records import Preference

TYPICAL_LENGTH = 512  # characters of a conversation up to which a full batch of them is scored at once


def fit_calibration(chosen: list[float], rejected: list[float], pairs: list[Preference], tolerance: float) -> dict:
    """What makes a score of the head's output: {"mean", "std", "length": {"slope", "shortest", "longest"}, "n"}.

    `chosen` and `rejected` are outputs for the pairs' texts, lengths are in characters, `tolerance` is the correlation
    with length among chosen texts that may stay. Chosen texts are all good, so the longer of them are not better.

    A least-squares line through the chosen texts gives s = a + b l + e: s the head's output, l the length, e
    uncorrelated with l. With k l subtracted, s - k l = a + (b - k) l + e has with l the correlation

        r = (b - k) sd(l) / sqrt((b - k)^2 sd(l)^2 + sd(e)^2)

    and r = +-t, t being the tolerance, solved for k, is

        k = b - sign(b) t sd(e) / (sd(l) sqrt(1 - t^2))

    which is b where nothing may stay. Where the correlation is within the tolerance already, k is 0. Lengths below the
    chosen texts' 1st percentile or above their 99th count as that: beyond, the line would invite a policy to extremes.
    """
    import numpy as np

    chosen_lengths = np.array([len(pair.texts[1]) for pair in pairs])
    rejected_lengths = np.array([len(pair.texts[2]) for pair in pairs])
    shortest, longest = (float(length) for length in np.percentile(chosen_lengths, [1, 99]))
    lengths = np.clip(chosen_lengths, shortest, longest)
    slope, tolerance = 0.0, min(tolerance, 0.999)  # at 1 the root would be 0
    if np.ptp(lengths) and abs(np.corrcoef(chosen, lengths)[0, 1]) > tolerance:
        b, a = np.polyfit(lengths, chosen, 1)
        sd_e = np.std(chosen - b * lengths - a)
        slope = float(b - np.sign(b) * tolerance * sd_e / (np.std(lengths) * math.sqrt(1 - tolerance**2)))

    # The unit of the scores is one standard deviation of chosen and rejected texts together.
    chosen_rest = np.array(chosen) - slope * lengths
    rejected_rest = np.array(rejected) - slope * np.clip(rejected_lengths, shortest, longest)
    rest = np.concatenate([chosen_rest, rejected_rest])
    line = {"slope": slope, "shortest": shortest, "longest": longest}
    return {"mean": float(rest.mean()), "std": float(rest.std()) or 1.0, "length": line, "n": len(rest)}


def apply_calibration(calibration: dict, output: float, length: int) -> float:
    """A head's output for a response of `length` characters, as a score: standard deviations from the mean."""
    line = calibration["length"]
    length = min(max(length, line["shortest"]), line["longest"])
    return (output - line["slope"] * length - calibration["mean"]) / calibration["std"]


class RewardModel:
    """A trained reward model: scores of (query, response).

    On a CPU in 16 bits a score depends on nothing but its text. In bf16, as on a GPU and in 4 bits, the other texts of
    a batch move it a little, because sums are rounded in another order. The tests hold the first below 1e-3 standard
    deviations, the second below 0.05.
    """

    def __init__(self, folder: Path, base: str, prompts: Path, bits: int = 0):
        """`bits` of the base are those that it was trained with; named here only before it is calibrated."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification

        check_adapter(folder, base)
        self.prompts, self.calibration_file = prompts, folder / "calibration.json"
        if not bits:
            if not self.calibration_file.is_file():
                run_folder.fail(
                    f"{self.calibration_file} is missing: the training did not end; run 02_train_rm.py again"
                )
            self.calibration = json.loads(self.calibration_file.read_text())
        self.bits = bits or self.calibration["bits"]
        self.tokenizer = load_tokenizer(base)
        self.tokenizer.padding_side = "right"
        model = load_base(AutoModelForSequenceClassification, base, self.bits, num_labels=1)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = PeftModel.from_pretrained(model, folder).eval()
        if self.bits == 16 and self.model.dtype == torch.float32:  # one product for each layer instead of three;
            self.model.merge_adapter()  # in 4 bits the sum would be rounded to NF4
        compute_in_fp32(self.model.base_model.model.score.modules_to_save["default"])

    def calibrate(self, pairs: list[Preference], tolerance: float, seed: int) -> None:
        """Write calibration.json, fitted to at most 1,000 pairs that were not trained on, and use it from now on."""
        sample = random.Random(seed).sample(pairs, min(len(pairs), 1000))
        chosen = self.outputs([pair.prompt + pair.chosen for pair in sample])
        rejected = self.outputs([pair.prompt + pair.rejected for pair in sample])
        self.calibration = {**fit_calibration(chosen, rejected, sample, tolerance), "bits": self.bits}
        run_folder.replace_file(self.calibration_file, json.dumps(self.calibration) + "\n")

    def score(self, rows: list[tuple[str, str]], batch_size: int = 64) -> list[float]:
        """A score for each (query, response), in standard deviations from the mean of the calibration's responses."""
        conversations = []
        for query, response in rows:
            conversations.append([*conversation(query, self.prompts), {"role": "assistant", "content": response}])
        return self.score_conversations(conversations, batch_size)

    def score_conversations(self, conversations: list[list[dict]], batch_size: int = 64) -> list[float]:
        """A score for each conversation that ends in a response."""
        outputs = self.outputs(conversations, batch_size)
        lengths = [len(messages[-1]["content"]) for messages in conversations]
        return [apply_calibration(self.calibration, *pair) for pair in zip(outputs, lengths, strict=True)]

    def outputs(self, conversations: list[list[dict]], batch_size: int = 64) -> list[float]:
        """The head's output for each conversation. They are batched by length and come back in the order given."""
        import torch

        texts = [self.tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
        longest_first = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        outputs = [0.0] * len(texts)
        with run_folder.slow_bar(len(texts), "reward model", "text") as count:
            while longest_first:
                # As many as `batch_size` of typical length: a batch of that many of the longest would not fit.
                size = max(1, min(batch_size, batch_size * TYPICAL_LENGTH // len(texts[longest_first[0]])))
                chunk, longest_first = longest_first[:size], longest_first[size:]
                chunk_texts = [texts[i] for i in chunk]
                batch = self.tokenizer(chunk_texts, return_tensors="pt", padding=True, add_special_tokens=False)
                half = self.model.dtype == torch.bfloat16  # adapter and head are in fp32
                with torch.inference_mode(), torch.autocast(self.model.device.type, torch.bfloat16, enabled=half):
                    logits = self.model(**batch.to(self.model.device)).logits[:, 0].float().tolist()
                for i, logit in zip(chunk, logits, strict=True):
                    outputs[i] = logit
                count(len(chunk))
        return outputs


def compute_in_fp32(head) -> None:
    """Have a head compute in fp32, under autocast too: in bf16 a score near 10 moves in steps of 0.06."""
    import torch

    linear = head.float().forward

    def forward(hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden.float())

    head.forward = forward
