"""The tiny language model of --offline, trained from random weights, once."""

import inspect
import math
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.lexicon import ADDRESS, OCCASIONS, RECIPIENTS
from common.offline.flaws import FLAWS, REFERENCES
from common.prompts import render
from common.records import Query, Reference, read
from common.run_folder import ROOT, digest, file_hash

TINY = ROOT / "outputs" / "tiny"  # shared by every run: it depends on the data and this file alone
STEPS, BATCH, LEARNING_RATE = 130, 56, 8e-3
VOCABULARY, HIDDEN, LAYERS = 2400, 192, 4  # 2.2M parameters
FLAWED = 0.35  # share of training texts with a flaw written in: a base that wrote only well could not be improved
# What is not written in: a policy that does more of it than the base, which loops now and then, has learnt to.
LEARNT_ONLY_BY_GAMING = {"repetition", "flattery"}
SENTENCES, LONGEST = 6, 22  # of an occasion; in characters
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKING = (
    "{r}{o}祝福语", "{o} {r}", "给{r}的{o}祝福", "{r}{o}了，写句祝福", "{o}发给{r}", "祝{r}{o}",
    "{o}祝福 {r} 简短", "{r} {o} 怎么说", "{o}写给{r}的话",
)  # fmt: skip


def _training_texts(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Endless (query, greeting): sentences of the references recombined within their occasion, some with a flaw.

    Whole references are too few and too varied for two million parameters; their sentences, met again and again in
    new company, are not.
    """
    references, asked = read(REFERENCES, Reference), {}
    for record in sorted(references + read(ROOT / "data" / "queries.jsonl", Query), key=lambda r: r.id):
        asked.setdefault(record.occasion, []).append((record.recipient, record.query))
    sentences: dict[str, list[str]] = {}
    for reference in sorted(references, key=lambda r: r.id):
        for sentence in re.findall(r"[^。！？]+[。！？]", reference.response):
            start, _, rest = sentence.partition("，")
            if any(re.fullmatch(words, start) for words in ADDRESS):
                sentence = rest
            if 7 <= len(sentence) <= LONGEST and not any(re.search(words, sentence) for words in ADDRESS):
                sentences.setdefault(reference.occasion, []).append(sentence)
    sentences = {occasion: found[:SENTENCES] for occasion, found in sentences.items()}
    occasions, recipients = sorted(sentences), sorted(RECIPIENTS)
    flawed = [flaw.write for name, flaw in FLAWS.items() if flaw.write and name not in LEARNT_ONLY_BY_GAMING]
    while True:
        occasion = rng.choice(occasions)
        recipient, query = rng.choice(asked[occasion])
        if occasion in OCCASIONS and rng.random() < 0.5:
            recipient = rng.choice(recipients)
            words = [
                re.findall("[\u4e00-\u9fff]+", patterns)
                for patterns in (RECIPIENTS[recipient]["asked"], OCCASIONS[occasion]["asked"])
            ]
            query = rng.choice(ASKING).format(r=rng.choice(words[0]), o=rng.choice(words[1]))
        pool = sentences[occasion]
        text = "".join(rng.sample(pool, min(len(pool), rng.choice([1, 2, 2, 2, 3]))))
        called = RECIPIENTS.get(recipient, {}).get("called", recipient)
        if called and rng.random() < 0.7:
            text = f"{called}，{text}"
        yield query, rng.choice(flawed)(text, rng) if rng.random() < FLAWED else text


def tiny_policy() -> Path:
    """The folder of the tiny model; trained from random weights (about 100 s on 2 cores) unless it is there already."""
    files = ("data/references.jsonl", "data/queries.jsonl", "data/lexicon.json", "prompts/policy.md")
    recipe = (
        STEPS,
        BATCH,
        LEARNING_RATE,
        VOCABULARY,
        HIDDEN,
        LAYERS,
        FLAWED,
        SENTENCES,
        LONGEST,
        ASKING,
        CHAT_TEMPLATE,
        sorted(LEARNT_ONLY_BY_GAMING),
    )
    code = [inspect.getsource(function) for function in (_training_texts, _train_tiny)]
    folder = TINY / digest(recipe, code, *(file_hash(ROOT / name) for name in files))
    if not (folder / "config.json").is_file():
        TINY.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=TINY))
        _train_tiny(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process was quicker
            shutil.rmtree(scratch)
    return folder


def _train_tiny(folder: Path) -> None:
    import torch
    from tqdm import tqdm
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    rng = random.Random(0)
    texts, rows = _training_texts(rng), []
    for _ in range(STEPS * BATCH):
        query, greeting = next(texts)
        prompt = f"<|im_start|>user\n{render('policy', query=query)[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        rows.append((prompt, f"{greeting}<|im_end|>"))
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [p + c for p, c in rows[:4000]], vocab_size=VOCABULARY, new_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = "<|im_end|>", "<|endoftext|>", CHAT_TEMPLATE
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=1024,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    # Muon learns the sentences in a third of the steps that AdamW needs.
    muon = torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    bar = tqdm(range(STEPS), desc="training the tiny model (once)", unit="step", file=sys.stderr)
    for step in bar:
        share = max(0.03, 0.5 * (1 + math.cos(math.pi * step / STEPS))) * min(1.0, (step + 1) / 20)
        batch = rows[step * BATCH : (step + 1) * BATCH]
        ids = tokenizer([p + c for p, c in batch], return_tensors="pt", padding=True, padding_side="right").to(device)
        labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
        for row, (prompt, _) in enumerate(batch):
            labels[row, : len(tokenizer(prompt)["input_ids"])] = -100
        with torch.autocast(device, torch.bfloat16):
            loss = model(**ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser_ in (muon, adamw):
            for group in optimiser_.param_groups:
                group["lr"] = LEARNING_RATE * share
            optimiser_.step()
            optimiser_.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
