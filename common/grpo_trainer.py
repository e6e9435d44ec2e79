"""TRL's GRPO trainer, which learns from no rollout that is not the policy's, wastes no pass, and times its phases."""

import argparse
import statistics
import time

from common.rewards import Rewards
from common.run_folder import Stop

GAP = "sampling/sampling_logp_difference/mean"  # TRL's name for the engine's distance to the trainer, per token
# Rounding alone brings some: with both heads in fp32, as they are here, a model of 0.5B in bf16 has 0.02 to 0.05 nats a
# token, and 0.29 if the engine has other weights than NF4's (bench/README.md); a 7B model 0.023 as root mean square
# (ServiceNow/Fast-LLM#525). A run also stops beyond so many times the median of its own gaps, if that exceeds this.
GAP_RISE, GAP_NOISE = 2.5, 0.02
PASS = 32  # rows at most in one pass of the model: more gain no speed, and share more padding
# Tokens of padding in a pass beyond which two passes are quicker. On a GPU a pass of a 7B model takes about 35 ms
# however small it is, in which an H100 computes some 800 tokens (an estimate); a CPU has no such floor.
PADDING = {"cuda": 1024, "cpu": 128}


def gap_limit(before: list[float], cap: float) -> float:
    """The largest gap with which a step is learnt from, given those of the steps before: nats per token."""
    if len(before) < 3:
        return cap
    return min(cap, max(GAP_NOISE, GAP_RISE * statistics.median(before)))


def pass_sizes(lengths: list[int], most: int, padding: int) -> list[int]:
    """How many rows go into each pass, of rows in the order of their lengths: at most `most`, with little padding."""
    sizes, tokens = [], 0
    for length in lengths:
        if sizes and sizes[-1] < most and sizes[-1] * length - tokens <= padding:
            sizes[-1] += 1
            tokens += length
        else:
            sizes.append(1)
            tokens = length
    return sizes


def of_like_length(batches: list[dict], passes: int) -> list[dict]:
    """The rollouts of a step, of which every `passes` batches make an update, with those of like length in one batch.

    The sum over an update's rows is the same in any order, and a batch is as wide as its longest row. Batches are
    dicts of tensors (rows, ...), of one number for all rows, and of None.
    """
    import torch
    from trl.trainer.utils import split_tensor_dict

    ordered = []
    for start in range(0, len(batches), passes):
        update = batches[start : start + passes]
        widths = [batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1) for batch in update]
        order = torch.cat(widths).argsort()
        whole = {}
        for name, value in update[0].items():
            rows = torch.is_tensor(value) and value.ndim
            whole[name] = torch.cat([batch[name] for batch in update])[order] if rows else value
        ordered += split_tensor_dict(whole, passes)
    return ordered


def log_probabilities(trainer, model, ids, mask, width: int, most: int):
    """(log-probabilities, entropies), both (rows, width), of the last `width` tokens of each row: its completion.

    `ids` and `mask` are (rows, columns), prompts padded on the left, completions on the right. A prompt is computed
    once for all of its completions, and a pass is no wider than its own longest row (trl#7179). Each row brings its
    prompt where the base keeps more than keys and values (a sliding window, a state), and where activations are
    computed again in the backward pass, as on a GPU, which cannot go through a cache.
    """
    import torch
    from torch.nn.functional import pad
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    begin, prompts_end = int(mask.any(0).nonzero()[0]), ids.shape[1] - width
    read = prompts_end - 1  # a prompt's last token predicts the first of its completion
    base = trainer.accelerator.unwrap_model(model).get_base_model()
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=base.config).layers)
    shared = plain and read > begin and not (torch.is_grad_enabled() and trainer.args.gradient_checkpointing)
    if shared:
        prompts = torch.stack([ids, mask], 1)[:, :, begin:read]
        prompts, prompt_of = prompts.unique(dim=0, return_inverse=True)
        with trainer.accelerator.autocast():
            first = base.base_model(input_ids=prompts[:, 0], attention_mask=prompts[:, 1], use_cache=True)
        layers = first.past_key_values.layers
    else:
        read = begin
    lengths, by_length = mask[:, read:].sum(1).sort()
    logps, entropies = [], []
    for rows in by_length.split(pass_sizes(lengths.tolist(), most, PADDING[ids.device.type])):
        end = max(int(mask[rows].any(0).nonzero()[-1]) + 1, prompts_end + 1)
        labels = ids[rows, read:end].masked_fill(mask[rows, read:end] == 0, -100)
        labels[:, : prompts_end - read] = -100
        inputs = {"input_ids": ids[rows, read:end], "attention_mask": mask[rows, begin:end], "labels": labels}
        if shared:
            mine = prompt_of[rows]
            inputs["past_key_values"] = DynamicCache([(layer.keys[mine], layer.values[mine]) for layer in layers])
        with trainer.accelerator.autocast():
            outputs = model(**inputs, fused_lm_head=True)
        missing = (0, ids.shape[1] - end)
        logps.append(pad(outputs.log_probs[:, prompts_end - end :], missing))
        entropies.append(pad(outputs.entropy[:, prompts_end - end :], missing))
    order = by_length.argsort()
    return torch.cat(logps)[order], torch.cat(entropies)[order]


def untie_head(base) -> None:
    """Give a base whose head is its embeddings a head of its own: TRL can compute in fp32 with no other."""
    import torch

    if base.config.tie_word_embeddings:
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False


def grpo_trainer(args: argparse.Namespace, model, rewards: Rewards, *parts, **options):
    """The trainer of this policy with these rewards; the other parts are those of TRL's trainer."""
    from trl import GRPOTrainer
    from trl.trainer.utils import RepeatSampler

    class EpochSampler(RepeatSampler):
        def set_epoch(self, epoch: int) -> None:
            # TRL's sampler draws each epoch's order after the one before; a run that is resumed would draw the first
            # epoch's again, and show some queries twice and others never.
            self.generator.manual_seed(self.seed + epoch)

    class CheckedTrainer(GRPOTrainer):
        def _get_train_sampler(self, dataset=None):
            sampler = super()._get_train_sampler(dataset)
            sampler.__class__ = EpochSampler
            return sampler

        def _generate(self, *inputs, **options):
            started = time.perf_counter()
            output = super()._generate(*inputs, **options)
            synced = self.vllm_generation.syncs[-1][0] if self.use_vllm else 0.0
            self._metrics["train"]["seconds/sync"].append(synced)
            self._metrics["train"]["seconds/generate"].append(time.perf_counter() - started - synced)
            rewards.start(self.async_loop, self.queries, output[3])
            return output

        def _generate_and_score_completions(self, inputs):
            self.queries = [row["query"] for row in inputs]
            output = super()._generate_and_score_completions(inputs)
            if self.use_vllm:
                # An adapter that did not reach the engine, or a base quantised otherwise, shows here.
                gap = self._metrics["train"][GAP][-1]
                limit = gap_limit([log[GAP] for log in self.state.log_history if GAP in log], args.max_gap)
                if not gap <= limit:  # nan stops the run too
                    distance = f"the engine's log-probabilities are {gap:.3f} per token away from the trainer's"
                    reason = f"{distance}, more than {limit:.3f} (see --max-gap): these rollouts are not the policy's"
                    raise Stop(f"step {self.state.global_step}: {reason}, and nothing was learnt from them")
            return output

        def _prepare_inputs(self, generation_batch):
            before = self._buffered_inputs
            inputs = super()._prepare_inputs(generation_batch)
            if self._buffered_inputs is not before:
                self._buffered_inputs = of_like_length(self._buffered_inputs, self.args.gradient_accumulation_steps)
                inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
            return inputs

        def _get_per_token_logps_and_entropies(
            self, model, ids, mask, width, batch_size=None, compute_entropy=False, **no_images
        ):
            logps, entropies = log_probabilities(self, model, ids, mask, width, min(batch_size or PASS, PASS))
            return logps, entropies if compute_entropy else None, None

    untie_head(model.get_base_model())
    return CheckedTrainer(model, rewards, *parts, **options)
