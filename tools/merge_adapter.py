"""Write a base and its LoRA adapter as one bf16 model, which every inference server can load.

In 4 bits the base is the dequantised one: the weights that the adapter was trained on.

Example python tools/merge_adapter.py outputs/run/policy_judge outputs/greetings
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run_folder
from common.engine import rollout_base
from common.policy import find_policy, load_tokenizer, silence_libraries


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder such as RUN/policy_judge")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the model is written")
    parser.add_argument("--bits", type=int, choices=(4, 16), default=4, help="of the base in training (%(default)s)")
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    base, adapter = find_policy(args.adapter)
    if adapter is None:
        run_folder.fail(f"{args.adapter} holds no adapter; name a folder such as outputs/run/policy_judge")
    silence_libraries()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(rollout_base(base, args.bits), dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(args.directory)
    load_tokenizer(base).save_pretrained(args.directory)
    print(f"{adapter} and its base are one model in {args.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(run_folder.launch(main, parse_args()))
