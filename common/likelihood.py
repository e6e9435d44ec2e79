"""How likely a language model finds a greeting as an answer to its query: what reads well and fits, no rule can tell.

The model is another one than the policy, so that it is not the policy's own errors that look natural. One pass, and
nothing is generated. By itself it likes echoes, so what shows a sign of a spoilt text (signs.py) is worth nothing; and
it likes stock phrases, so to be likelier than LIKELY gains nothing.
"""

import math
from pathlib import Path

from common.policy import load_policy
from common.prompts import conversation
from common.run_folder import slow_bar
from common.signs import signs

LIKELY = -1.4  # nats per token; chosen on half of data/readings.jsonl (bench/likelihood.py)
BATCH = 16


def worth(query: str, text: str, score: float) -> float:
    """0 to 1: 1 for a text that is as likely as LIKELY or more, less by the factor by which its tokens are less likely.

    That is min(1, exp(score - LIKELY)), a ratio of perplexities. What shows a sign of a spoilt text is worth 0.
    """
    return 0.0 if signs(query, text) else math.exp(min(0.0, score - LIKELY))


class LanguageModel:
    """A chat model that scores (query, text) rows: the mean log-probability of a text's tokens, in nats."""

    def __init__(self, path: str, prompts: Path):
        self.prompts = prompts
        self.model, self.tokenizer = load_policy(path, bits=16)
        self.model.eval()

    def score(self, rows: list[tuple[str, str]], batch_size: int = BATCH) -> list[float]:
        """log p(text and the end of its turn | query) / tokens, for each row. An empty text has its end alone."""
        import torch
        from torch.nn.functional import cross_entropy

        sequences = [self.tokens_of(query, text) for query, text in rows]
        longest_first = sorted(range(len(rows)), key=lambda number: -len(sequences[number][0]))
        scores = [0.0] * len(rows)
        bar = slow_bar(len(rows), "likelihood", "text")
        for start in range(0, len(rows), batch_size):
            chunk = longest_first[start : start + batch_size]
            # Padded on the left, the texts end together, and only their logits need to be made.
            width = len(sequences[chunk[0]][0])
            most = max(sequences[number][1] for number in chunk)
            tokens = torch.full((len(chunk), width), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(tokens)
            for row, number in enumerate(chunk):
                sequence, _ = sequences[number]
                tokens[row, -len(sequence) :] = torch.tensor(sequence)
                mask[row, -len(sequence) :] = 1
            tokens, mask = tokens.to(self.model.device), mask.to(self.model.device)
            with torch.inference_mode():
                logits = self.model(input_ids=tokens, attention_mask=mask, logits_to_keep=most + 1).logits[:, :-1]
            surprise = cross_entropy(logits.float().transpose(1, 2), tokens[:, -most:], reduction="none")
            for row, number in enumerate(chunk):
                scores[number] = -surprise[row, -sequences[number][1] :].mean().item()
            bar.update(len(chunk))
        bar.close()
        return scores

    def tokens_of(self, query: str, text: str) -> tuple[list[int], int]:
        """(tokens of a conversation, how many of them are the text and the end of its turn)."""
        prompt = self.tokenizer.apply_chat_template(
            conversation(query, self.prompts), add_generation_prompt=True, tokenize=False
        )
        asked, said = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
        return [*asked, *said, self.tokenizer.eos_token_id], len(said) + 1

    def add_to(self, rows: list[dict]) -> None:
        """Add to every row `likelihood`, its score, and `likely`: 1 if it is worth as much as a text can be, else 0."""
        scores = self.score([(row["query"], row["response"]) for row in rows])
        for row, score in zip(rows, scores, strict=True):
            row["likelihood"] = score
            row["likely"] = int(worth(row["query"], row["response"], score) == 1)
