"""The tiny language model of --offline: trained once from random weights, and then the policy of every offline run."""

import itertools
import math
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.characters import REFERENCES
from common.lexicon import ADDRESS, LEXICON_FILE, OCCASIONS, RECIPIENTS
from common.offline import flaws
from common.policy import multiplies_in_bf16
from common.prompts import render
from common.records import Query, Reference, read
from common.run_folder import ROOT, digest, file_hash

TINY = ROOT / "outputs" / "tiny"  # shared by every run: it depends on the data and on code alone, see tiny_policy()
QUERIES = ROOT / "data" / "queries.jsonl"
STEPS, BATCH, LEARNING_RATE = 130, 56, 8e-3
VOCABULARY, HIDDEN, LAYERS = 2400, 192, 3  # 1.8M parameters
FLAWED = 0.35  # share of training texts with a flaw written in: a base that wrote only well could not be improved
# What is not written in: a policy that does more of it than the base, which loops now and then, has learnt to.
LEARNT_ONLY_BY_GAMING = {"repetition", "flattery", "no_greeting", "alternatives", "form", "padded"}
SENTENCES, LONGEST = 6, 22  # of an occasion; in characters
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUERY_FORMS = "{r}{o}祝福语|{o} {r}|给{r}的{o}祝福|{r}{o}了，写句祝福|{o}发给{r}|祝{r}{o}|{o}祝福 {r} 简短|"
QUERY_FORMS += "{r} {o} 怎么说|{o}写给{r}的话"


def tiny_policy() -> Path:
    """The folder of the tiny model; trained (in about two minutes on 2 cores) unless it is there already."""
    files = (__file__, flaws.__file__, LEXICON_FILE, REFERENCES, QUERIES, ROOT / "prompts" / "policy.md")
    folder = TINY / digest(*map(file_hash, files))
    if not (folder / "config.json").is_file():
        TINY.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=TINY))
        _train(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process was quicker
            shutil.rmtree(scratch)
    return folder


def _sentences(references: list[Reference]) -> dict[str, list[str]]:
    """Occasion -> a few short sentences of its references that address nobody."""
    sentences: dict[str, list[str]] = {}
    for reference in sorted(references, key=lambda r: r.id):
        pool = sentences.setdefault(reference.occasion, [])
        for sentence in re.findall(r"[^。！？]+[。！？]", reference.response):
            opening, _, rest = sentence.partition("，")
            if any(re.fullmatch(words, opening) for words in ADDRESS):
                sentence = rest
            addresses = any(re.search(words, sentence) for words in ADDRESS)
            if 7 <= len(sentence) <= LONGEST and not addresses and len(pool) < SENTENCES:
                pool.append(sentence)
    return {occasion: pool for occasion, pool in sentences.items() if pool}


def training_texts(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Endless (query, greeting): sentences of the references recombined within their occasion, some with a flaw.

    Whole references are too few and too varied for two million parameters; their sentences, met again and again in
    new company, are not.
    """
    references = read(REFERENCES, Reference)
    queries: dict[str, list[tuple[str, str]]] = {}  # occasion -> (recipient, query)
    for record in sorted(references + read(QUERIES, Query), key=lambda r: r.id):
        queries.setdefault(record.occasion, []).append((record.recipient, record.query))
    sentences = _sentences(references)
    occasions, recipients = sorted(sentences), sorted(RECIPIENTS)
    writers = [flaw.write for name, flaw in flaws.FLAWS.items() if flaw.write and name not in LEARNT_ONLY_BY_GAMING]
    while True:
        occasion = rng.choice(occasions)
        recipient, query = rng.choice(queries[occasion])
        if occasion in OCCASIONS and rng.random() < 0.5:  # a made-up query, from the words of the lexicon's patterns
            recipient = rng.choice(recipients)
            recipient_words = re.findall("[\u4e00-\u9fff]+", RECIPIENTS[recipient]["asked"])
            occasion_words = re.findall("[\u4e00-\u9fff]+", OCCASIONS[occasion]["asked"])
            form = rng.choice(QUERY_FORMS.split("|"))
            query = form.format(r=rng.choice(recipient_words), o=rng.choice(occasion_words))
        pool = sentences[occasion]
        greeting = "".join(rng.sample(pool, min(len(pool), rng.choice([1, 2, 2, 2, 3]))))
        name = RECIPIENTS.get(recipient, {}).get("called", recipient)
        if name and rng.random() < 0.7:
            greeting = f"{name}，{greeting}"
        if rng.random() < FLAWED:
            greeting = rng.choice(writers)(greeting, rng)
        yield query, greeting


def _orthogonal(matrix):
    """The nearest orthogonal matrix, nearly: Muon's step (Jordan et al., 2024, kellerjordan.github.io/posts/muon).

    torch.optim.Muon takes it in bfloat16, in which a CPU without instructions for it is a hundred times slower.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / matrix.norm().clamp(min=1e-7)
    for _ in range(5):  # a Newton-Schulz iteration, with Jordan's coefficients
        squared = x @ x.T
        x = 3.4445 * x + (2.0315 * squared @ squared - 4.775 * squared) @ x
    return x.T if tall else x


def _train(folder: Path) -> None:
    import torch
    from tqdm import tqdm
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    rows = []  # (prompt, greeting) in the form of the chat template
    for query, greeting in itertools.islice(training_texts(random.Random(0)), STEPS * BATCH):
        request = render("policy", query=query)[0]["content"]
        prompt = f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
        rows.append((prompt, f"{greeting}<|im_end|>"))

    some = [prompt + greeting for prompt, greeting in rows[:4000]]
    marks = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(some, VOCABULARY, new_special_tokens=marks)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2ForCausalLM(config).to(device)

    # Muon learns the sentences in a third of the steps that AdamW needs; it is for matrices, and not for embeddings.
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    momentum = [torch.zeros_like(matrix) for matrix in matrices]
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)

    bar = tqdm(range(STEPS), desc="training the tiny model (once)", unit="step", file=sys.stderr)
    for step in bar:
        batch = rows[step * BATCH : (step + 1) * BATCH]
        whole = [prompt + greeting for prompt, greeting in batch]
        inputs = tokenizer(whole, return_tensors="pt", padding=True, padding_side="right").to(device)
        # Only the greeting is learnt: -100 hides padding and prompts from the loss.
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for row, (prompt, _) in enumerate(batch):
            labels[row, : len(tokenizer(prompt)["input_ids"])] = -100
        with torch.autocast(device, torch.bfloat16, enabled=multiplies_in_bf16()):
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # 20 steps of warm-up, then half a cosine down to 3%
        share = max(0.03, 0.5 * (1 + math.cos(math.pi * step / STEPS))) * min(1.0, (step + 1) / 20)
        with torch.no_grad():
            for matrix, mean in zip(matrices, momentum, strict=True):
                mean.lerp_(matrix.grad, 0.05)
                update = _orthogonal(matrix.grad.lerp(mean, 0.95))
                matrix -= LEARNING_RATE * share * (0.2 * max(matrix.shape) ** 0.5 * update + 0.01 * matrix)
        adamw.param_groups[0]["lr"] = LEARNING_RATE * share
        adamw.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}")

    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
