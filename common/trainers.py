"""What TRL's trainers need here: settings, progress, several processes, curves."""

import argparse
import json
import os
from pathlib import Path

from common.run_folder import fail, main_process, replace_file


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


def go_on(args: argparse.Namespace, trainer, checkpoints: Path) -> None:
    """Train from the last checkpoint if there is one; what was logged after it is dropped, for it comes again."""
    from peft import load_peft_weights, set_peft_model_state_dict
    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None
    done = json.loads(Path(last, "trainer_state.json").read_text())["global_step"] if last else 0
    for kind, least in (("metrics", 1), ("rollouts", 0), ("watch", 0)):  # rollouts carry the step they are made in
        path = args.run / f"{kind}_{args.reward}.jsonl"
        if path.is_file():
            whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]
            rows = [(json.loads(line)["step"], line) for line in whole]
            kept = [line for step, line in rows if last and step < done + (least or kind == "watch")]
            replace_file(path, "".join(kept))
    if last and Path(last, "ref").is_dir():
        # Where TRL has put a reference beside it, the trainer restores that and forgets the adapter that is trained.
        set_peft_model_state_dict(trainer.model, load_peft_weights(last), adapter_name="default")
    trainer.train(resume_from_checkpoint=last)
