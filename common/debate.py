"""The five agents: retrieval, debate, judge, reflect."""

import argparse
import json
import math
from pathlib import Path

from common.answers import Points, Unusable, Verdict
from common.client import Client, settled
from common.policy import load_base, load_tokenizer, quiet
from common.records import Candidate, Judgement, Reference
from common.run_folder import ROOT, digest, replace_file

ROLES = ["positive", "negative", "judge", "reflect"]
INDEX = ROOT / "outputs" / "index"  # neighbours of queries, embeddings of references; shared by every run


class Retrieval:
    """The agent that needs no answer from a model: references for queries most like the one asked.

    Likeness is the cosine of character TF-IDF vectors, or of a sentence-embedding model's. Where references have a
    popularity, its logarithm at most doubles the likeness of the near ones.
    """

    WIDER = 5  # nearest references looked at for each that is shown

    def __init__(self, args: argparse.Namespace, references: list[Reference], queries: list[str]):
        """Find the nearest references of every query; those found in earlier runs are kept in outputs/index/."""
        self.references, self.k = references, args.examples
        self.wider = min(len(references), self.WIDER * self.k + 20)
        known = digest(args.embedding_model, self.wider, [(r.id, r.query) for r in references])
        path = INDEX / f"{known}{'-{}-of-{}'.format(*args.shard) if args.shard else ''}.json"
        self.nearest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if new := [query for query in queries if query not in self.nearest]:
            self.look_up(args.embedding_model, new, INDEX / f"{known}.npy")
            replace_file(path, json.dumps(self.nearest, ensure_ascii=False))

    def look_up(self, embedding_model: str | None, queries: list[str], vectors: Path, batch: int = 512) -> None:
        """Add the nearest references of many queries, a batch at once: a hundred times quicker than one by one."""
        import numpy as np

        asked = [r.query for r in self.references]
        if embedding_model:
            embed = Embedding(embedding_model)
            index = embed.kept(asked, vectors).T
        else:
            from sklearn.feature_extraction.text import TfidfVectorizer

            vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True)
            index, embed = vectorizer.fit_transform(asked).T, vectorizer.transform
        for start in range(0, len(queries), batch):
            part = queries[start : start + batch]
            likeness = embed(part) @ index
            likeness = likeness if isinstance(likeness, np.ndarray) else likeness.toarray()
            for query, row in zip(part, likeness, strict=True):
                top = np.argpartition(-row, self.wider - 1)[: self.wider]
                ranked = top[np.lexsort((top, -row[top]))].tolist()
                self.nearest[query] = [(i, round(float(row[i]), 4)) for i in ranked]

    def __call__(self, query: str, response: str) -> list[Reference]:
        """The references to show; never one for the very query or with the very text that is judged."""
        near = [(self.references[i], likeness) for i, likeness in self.nearest[query]]
        fair = [(r, like) for r, like in near if r.query != query and r.response != response]
        most = math.log1p(max((r.popularity or 0 for r, _ in fair), default=0)) or 1.0
        fair.sort(key=lambda pair: -pair[1] * (1 + math.log1p(pair[0].popularity or 0) / most))
        return [r for r, _ in fair[: self.k]]


async def judge_one(
    args: argparse.Namespace, client: Client, prompts: dict, examples: list[Reference], candidate: Candidate
) -> Judgement:
    """The debate about one candidate; where an agent cannot be heard, `error` says why and there is no label."""
    record = Judgement(
        **candidate.model_dump(), examples=[r.id for r in examples], model=client.model, prompts=prompts
    )  # fmt: skip
    seen = {
        "query": candidate.query, "response": candidate.response,
        "examples": [{"query": r.query, "response": r.response} for r in examples],
    }  # fmt: skip
    answers = []
    try:
        if not args.no_debate:
            sides = (client.ask(role, Points, **seen) for role in ("positive", "negative"))
            for heard in await settled(*sides):  # one that fails lets the other end
                if isinstance(heard, Unusable):
                    raise heard
                answers.append(heard)
            record.positive, record.negative = answers[0].points, answers[1].points
        debate = {"positive": record.positive, "negative": record.negative}
        heard = []  # of each vote: what Judge says, what stands after Reflect
        for sample in range(args.votes):
            vote = {"sample": sample, "temperature": 0.7 if sample else 0.0}
            answers.append(judge := await client.ask("judge", Verdict, **seen, **debate, **vote))
            if not args.no_reflect:
                said = seen | debate | vote | {"judge": judge.model_dump()}
                answers.append(await client.ask("reflect", Verdict, **said))
            heard.append((judge, answers[-1]))
        record.judge_votes, record.votes = ([vote[i].verdict for vote in heard] for i in (0, 1))
        record.label = int(2 * sum(record.votes) > args.votes)
        judge, verdict = next(vote for vote in heard if vote[1].verdict == record.label)
        record.judge, record.reflect = judge.model_dump(), None if args.no_reflect else verdict.model_dump()
    except Unusable as e:
        record.error = str(e)
    record.input_tokens, record.output_tokens = (sum(a.tokens[i] for a in answers) for i in (0, 1))
    return record


class Embedding:
    """A sentence-embedding model: texts to unit vectors, the mean of the last hidden states over the tokens."""

    def __init__(self, name: str):
        from transformers import AutoModel

        quiet()
        self.model, self.tokenizer = load_base(AutoModel, name, 16).eval(), load_tokenizer(name)

    def __call__(self, texts: list[str], batch_size: int = 256):
        """Unit vectors, (texts, hidden size), as float32."""
        import numpy as np
        import torch

        found = []
        for start in range(0, len(texts), batch_size):
            batch = self.tokenizer(texts[start : start + batch_size], return_tensors="pt", padding=True)
            with torch.inference_mode():
                hidden = self.model(**batch.to(self.model.device)).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
            found.append(vectors.cpu().numpy())
        return np.concatenate(found)

    def kept(self, texts: list[str], path: Path):
        """The vectors of these texts from a file, which is made first if it is not there."""
        import numpy as np

        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".tmp.npy")
            np.save(scratch, self(texts))
            scratch.replace(path)
        return np.load(path, allow_pickle=False)
