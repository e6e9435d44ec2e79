"""What TRL's trainers need here: GRPO's flags, shared settings, progress, several processes, resuming, curves."""

import argparse
import json
import os
from pathlib import Path

from common.policy import MAX_PROMPT, load_tokenizer, multiplies_in_bf16
from common.prompts import conversation
from common.records import Query, read
from common.run_folder import ROOT, fail, main_process, positive, replace_file, share


def add_grpo_flags(parser: argparse.ArgumentParser) -> None:
    """GRPO's settings, for step 4, the checks before it and the export to verl; departures: step 4's docstring."""
    add = parser.add_argument_group("GRPO").add_argument
    add("--queries", type=Path, default=ROOT / "data/queries.jsonl", help="what the policy writes for")
    add("--rank", type=positive, default=16, help="LoRA rank, also of the SFT (%(default)s)")
    add("--learning-rate", type=float, default=3e-6, help="%(default)s")
    add("--epochs", type=float, default=5, help="over the queries (%(default)s)")
    add("--steps", type=int, default=-1, help="updates (a GRPO step has several), instead of --epochs")
    add("--queries-per-step", type=positive, default=32, help="written for at once (%(default)s)")
    add("--mini-batch", type=positive, default=16, help="completions in one update, counted in queries (%(default)s)")
    add("--samples", type=positive, default=4, help="completions per query (%(default)s)")
    add("--max-tokens", type=positive, default=512, help="of a completion (%(default)s)")
    add("--temperature", type=float, default=1.0, help="of the rollouts (%(default)s)")
    add("--kl", type=float, default=0.001, help="coefficient of the KL term (%(default)s)")
    novelty = "how much of its reward a completion loses by being like others, 0 to 1 (%(default)s, as in the paper)"
    add("--novelty", type=share, default=0.0, metavar="W", help=novelty)
    rules = "a text that breaks a constraint of its query, as far as a rule can tell, gets no reward from the judge"
    add("--constraints", action=argparse.BooleanOptionalAction, default=True, help=rules)


def fitting_queries(args: argparse.Namespace, base: str) -> list[Query]:
    """The queries whose prompts fit: the engine has room for MAX_PROMPT + --max-tokens, and TRL cuts no prompt."""
    queries, fitting = read(args.queries, Query), []
    tokenizer = load_tokenizer(base)
    for query in queries:
        prompt = conversation(query.query, args.prompts)
        if len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]) <= MAX_PROMPT:
            fitting.append(query)
    if left_out := len(queries) - len(fitting):
        print(f"04: the prompts of {left_out} queries have over {MAX_PROMPT} tokens and are left out")
    if len(fitting) < args.queries_per_step:
        left = f"{args.queries} has {len(fitting)} queries whose prompts have at most {MAX_PROMPT} tokens"
        fail(f"{left}, under --queries-per-step {args.queries_per_step}; add queries, or lower it")
    return fitting


def trainer_settings(model, autocast: bool = False) -> dict:
    """Settings that every TRL trainer of this model shares: bf16 where its base is, what else a GPU asks for.

    autocast: bf16 also on a base in fp32, where that is quicker.
    """
    import torch

    cuda, half = torch.cuda.is_available(), model.dtype == torch.bfloat16
    bf16 = half or (autocast and multiplies_in_bf16())
    settings = {"bf16": bf16, "use_cpu": not cuda, "gradient_checkpointing": cuda}
    # Processes make different numbers of passes per update: DDP's broadcast of buffers in each would deadlock.
    return settings | {"ddp_broadcast_buffers": False}


def per_process(batch: int, accumulation: int) -> tuple[int, int]:
    """(batch, accumulation) of each process of `accelerate launch`, so that all together make the same update."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if accumulation % processes == 0:
        return batch, accumulation // processes
    if batch % processes == 0:
        return batch // processes, accumulation
    flags = "--batch-size, --accumulation, --sft-batch-size, --mini-batch or --micro-batch"
    problem = f"{processes} processes cannot share {accumulation} batches of {batch} per update"
    fail(f"{problem}: make one of the two a multiple of {processes}, with {flags}")


def gather_rows(rows: list) -> list:
    """The rows of every process of `accelerate launch`, in the order of the processes, in each of them."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return rows
    from accelerate.utils import gather_object

    return gather_object(rows)


def own_rows(rows: list, count: int) -> list:
    """What belongs to this process, of rows in the order of `gather_rows`, of which it had given `count`."""
    start = int(os.environ.get("RANK", 0)) * count
    return rows[start : start + count]


def progress_callback(title: str, shown: list[str], metrics: Path | None = None):
    """A trainer callback: one bar with the time left and the figures named, and each log appended to a JSONL file."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            hidden = not main_process()
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=title, unit="step", disable=hidden)

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args, state, control, logs, **kwargs):
            figures = {name: value for name, value in logs.items() if isinstance(value, int | float)}
            self.bar.set_postfix({name: f"{figures[name]:.3g}" for name in shown if name in figures})
            if metrics and "loss" in figures and main_process():
                with open(metrics, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, **figures}) + "\n")

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    return Progress()


def fix_trainer(trainer) -> None:
    """What every TRL trainer here needs once it is built.

    On a 4-bit base TRL turns the adapter to bf16, whose steps near 0.01 are larger than a whole update at the paper's
    learning rates: most weights would never move. So the adapter is trained in fp32, as QLoRA's authors do. The
    callbacks that print each log line go: the bar shows them.
    """
    from transformers import PrinterCallback, ProgressCallback

    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def drop_rows_after(path: Path, last_step: int) -> None:
    """Drop what was logged after the last checkpoint, because it will be logged again, and a torn last line."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline is torn, or empty
    remaining = [line + "\n" for line in lines if json.loads(line)["step"] <= last_step]
    replace_file(path, "".join(remaining))


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The last one that is whole, if there is one: trainer_state.json is written last, and ends with a brace."""
    states = checkpoints.glob("checkpoint-*/trainer_state.json")
    whole = [path.parent for path in states if path.read_text(encoding="utf-8").endswith("\n}\n")]
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def train_from(trainer, last: Path | None) -> None:
    """Train, from this checkpoint if there is one. Of a training that had ended with it, only the result is loaded."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(last / "trainer_state.json")) if last else trainer.state
    if last and state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
        trainer.state = state  # by itself the trainer would go on, by an update or until the next check
        trainer.model.load_adapter(state.best_model_checkpoint or last, "default")
    else:
        trainer.train(resume_from_checkpoint=last and str(last))
    if not trainer.state.global_step:
        fail("no update was made; raise --steps, --epochs or --sft-epochs")


def resume_training(args: argparse.Namespace, trainer, checkpoints: Path) -> None:
    """Train from the last checkpoint if there is one. What step 4 has logged after it is dropped."""
    from peft import load_peft_weights, set_peft_model_state_dict

    last = last_checkpoint(checkpoints)
    done = int(last.name.rpartition("-")[2]) if last else -1  # -1: nothing was saved, so all of it is done again
    drop_rows_after(args.run / f"metrics_{args.reward}.jsonl", done)
    drop_rows_after(args.run / f"watch_{args.reward}.jsonl", done)
    drop_rows_after(args.run / f"rollouts_{args.reward}.jsonl", done - 1)  # they carry the step before their update
    if last and Path(last, "ref").is_dir():
        # Where TRL has put a reference beside it, the trainer restores that and forgets the adapter that is trained.
        set_peft_model_state_dict(trainer.model, load_peft_weights(last), adapter_name="default")
    train_from(trainer, last)


def draw_curves(path: Path, panels: dict[str, dict[str, list[tuple[float, float]]]], xlabel: str = "step") -> None:
    """An SVG file with a panel for each title, in it a line for each label, through its (x, value) points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, points in lines.items():
            if points:
                axis.plot(*zip(*points, strict=True), label=label)
        axis.set(xlabel=xlabel, title=title)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
