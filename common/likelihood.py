"""How likely a language model finds a greeting as an answer to its query: what reads well and fits, no rule can tell.

The model is another one than the policy, so that it is not the policy's own errors that look natural. One pass, and
nothing is generated. By itself it likes echoes, so what shows a sign of a spoilt text (signs.py) is worth nothing; and
it likes stock phrases, so to be likelier than LIKELY gains nothing, and a wish that would do for anybody is worth less.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from common import records
from common.failures import NO_NUMBER
from common.policy import load_policy
from common.prompts import conversation, prompt_hashes
from common.records import Judgement
from common.run_folder import slow_bar
from common.signs import signs

# Nats per token, both chosen on readings: bench/README.md.
LIKELY = -1.4
HELPED = 0.5  # by which its query has to make a text likelier than ANYBODY does
ANYBODY = "写一句祝福语"  # a query that says nothing of whom the greeting is for
WORTH = (LIKELY, HELPED, ANYBODY)  # what a worth depends on, besides the model
APART = 1.0  # nats per token by which a text must be less likely than the best of its query to be called worse
BATCH, TYPICAL = 16, 128  # conversations in one pass, of so many tokens; of longer ones fewer


class Likelihood(records.Record):
    """A line of likelihood.jsonl: a score of `LanguageModel`; null if it was no number."""

    model: str
    prompt: str  # hash of prompts/policy.md
    query: str
    response: str
    score: float | None = None

    def content(self) -> tuple:
        return (self.model, self.prompt, self.query, self.response)


def worth(score: float, for_anybody: float) -> float:
    """0 to 1, of the scores of a text as an answer to its query and to ANYBODY; nan if one is no number.

    min(1, exp(score - LIKELY)) * min(1, exp(score - for_anybody - HELPED)): two ratios of perplexities. 1 is what is as
    likely as LIKELY or more, and has something of its query.
    """
    return math.exp(min(score - LIKELY, 0.0) + min(score - for_anybody - HELPED, 0.0))


class LanguageModel:
    """A chat model that scores (query, text) rows: the mean log-probability of a text's tokens, in nats."""

    def __init__(self, path: str, prompts: Path):
        self.prompts = prompts
        self.model, self.tokenizer = load_policy(path, bits=16)
        self.model.eval()

    def score(self, rows: list[tuple[str, str]], batch_size: int = BATCH) -> list[float]:
        """log p(text and the end of its turn | query) / tokens, for each row. An empty text has its end alone."""
        scores = dict(self.scored(rows, batch_size))
        return [scores[number] for number in range(len(rows))]

    def worths(self, rows: list[tuple[str, str]], batch_size: int = BATCH) -> list[float]:
        """What each row is `worth`: 0, without a pass of the model, if it shows a sign of a spoilt text."""
        values = [0.0] * len(rows)
        clean = [number for number, row in enumerate(rows) if not signs(*row)]
        asked = [rows[number] for number in clean] + [(ANYBODY, rows[number][1]) for number in clean]
        scores = self.score(asked, batch_size)
        for place, number in enumerate(clean):
            values[number] = worth(scores[place], scores[len(clean) + place])
        return values

    def scored(self, rows: list[tuple[str, str]], batch_size: int = BATCH) -> Iterator[tuple[int, float]]:
        """What `score` returns, as it is computed, the longest first: (number of the row, score)."""
        sequences = [self.tokens_of(query, text) for query, text in rows]
        longest_first = sorted(range(len(rows)), key=lambda number: -len(sequences[number][0]))
        with slow_bar(len(rows), "likelihood", "text") as count:
            while longest_first:
                longest = len(sequences[longest_first[0]][0])
                size = max(1, min(batch_size, batch_size * TYPICAL // longest))
                chunk, longest_first = longest_first[:size], longest_first[size:]
                yield from zip(chunk, self._pass([sequences[number] for number in chunk]), strict=True)
                count(len(chunk))

    def tokens_of(self, query: str, text: str) -> tuple[list[int], int]:
        """(tokens of a conversation, how many of them are the text and the end of its turn)."""
        asked = conversation(query, self.prompts)
        prompt = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        before, said = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
        return [*before, *said, self.tokenizer.eos_token_id], len(said) + 1

    def _pass(self, sequences: list[tuple[list[int], int]]) -> list[float]:
        """The scores of some conversations, in one pass."""
        import torch
        from torch.nn.functional import cross_entropy

        # Padded on the left, the texts end together, and only their logits need to be made.
        longest, most = (max(lengths) for lengths in zip(*((len(t), n) for t, n in sequences), strict=True))
        tokens = torch.full((len(sequences), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(tokens)
        for row, (sequence, _) in enumerate(sequences):
            tokens[row, -len(sequence) :] = torch.tensor(sequence)
            mask[row, -len(sequence) :] = 1
        tokens, mask = tokens.to(self.model.device), mask.to(self.model.device)
        with torch.inference_mode():
            logits = self.model(input_ids=tokens, attention_mask=mask, logits_to_keep=most + 1).logits[:, :-1]
            # Row by row: in fp32 the logits of all would take as much memory again, several times.
            losses = []
            for row, (_, length) in enumerate(sequences):
                losses.append(cross_entropy(logits[row, -length:].float(), tokens[row, -length:]))
        return [-loss.item() for loss in losses]


def scores_of(path: str, prompts: Path, rows: list[tuple[str, str]], kept: Path) -> list[float | None]:
    """The scores of (query, text) rows; None for one that is no number.

    They are also kept in a file as they come: what is there is not computed again, whatever the call.
    """
    prompt = prompt_hashes(["policy"], prompts)["policy"]
    asked = [Likelihood(model=path, prompt=prompt, query=query, response=text) for query, text in rows]
    with records.Appender(kept) as append:
        missing = list({one.id: one for one in asked if one.id not in append.done}.values())
        if missing:
            texts = [(one.query, one.response) for one in missing]
            for number, score in LanguageModel(path, prompts).scored(texts):
                missing[number].score = score if math.isfinite(score) else None
                append(missing[number])
    scores = {one.id: one.score for one in records.stream(kept, Likelihood)}
    return [scores[one.id] for one in asked]


def add_likelihoods(path: str, prompts: Path, rows: list[dict], kept: Path) -> None:
    """Add to every row `likelihood`, its score, and `likely`: 1 if it is worth as much as a text can be, else 0.

    What depends on a score that is no number stays empty.
    """
    texts = [(row["query"], row["response"]) for row in rows]
    scores = dict(zip(texts, scores_of(path, prompts, texts, kept), strict=True))
    likely = [text for text, score in scores.items() if score is not None and score >= LIKELY and not signs(*text)]
    for_anybody = scores_of(path, prompts, [(ANYBODY, text) for _, text in likely], kept)
    verdicts = {text: None if score is None else 0 for text, score in scores.items()}
    for text, score in zip(likely, for_anybody, strict=True):
        verdicts[text] = None if score is None else int(worth(scores[text], score) == 1)
    for row, text in zip(rows, texts, strict=True):
        row |= {"likelihood": scores[text], "likely": verdicts[text]}


def label_best(path: str, prompts: Path, judgements: list[Judgement], kept: Path) -> None:
    """Label the likeliest text of each query, of those without a sign of a spoilt text, 1.

    What shows a sign or is less likely by APART gets 0. What lies between gets no label: it is hardly worse.
    """
    scores = scores_of(path, prompts, [(one.query, one.response) for one in judgements], kept)
    best: dict[str, float] = {}  # query -> the highest score of a text without a sign
    for one, score in zip(judgements, scores, strict=True):
        one.model = path
        if score is None:
            one.error = NO_NUMBER
        elif not signs(one.query, one.response):
            best[one.query] = max(score, best.get(one.query, score))
    for one, score in zip(judgements, scores, strict=True):
        if score is None:
            continue
        if signs(one.query, one.response) or score <= best[one.query] - APART:
            one.label = 0
        elif score == best[one.query]:
            one.label = 1
        one.judge = {"reason": f"{score:.2f} nats per token", "verdict": one.label}
