"""The five agents of reward A: retrieval, a debate between Positive and Negative, Judge, Reflect.

Step 1 asks them about every candidate; step 5 asks them as one of its evaluators. Retrieval needs no model's answer;
the other four are prompt files: positive.md, negative.md, judge.md, reflect.md.
"""

import math
from collections import Counter
from functools import lru_cache

from common.answers import Points, Unusable, Verdict
from common.client import Client, gather_or_unusable
from common.policy import load_embedding
from common.prompts import prompt_hashes
from common.records import Candidate, Judgement, Reference

ROLES = ["positive", "negative", "judge", "reflect"]


class Retrieval:
    """Finds references to show beside a greeting: good ones, written for the queries most like the one at hand.

    Likeness is the cosine of character TF-IDF vectors, or of a sentence-embedding model's. Where references have a
    popularity, its logarithm at most doubles the likeness of the near ones.
    """

    def __init__(self, references: list[Reference], k: int = 3, embedding_model: str | None = None):
        self.references, self.k, self.embedding_model = references, k, embedding_model
        # More than are shown, because those for the very query are left out and popularity moves others up.
        self.pool_size = min(len(references), 5 * k + 20)
        self.nearest: dict[str, list[tuple[int, float]]] = {}  # query -> (index of a reference, likeness)

    def look_up(self, queries: list[str]) -> None:
        """Find the nearest references of all queries, once, before the debates: one by one takes 100 times longer."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.neighbors import NearestNeighbors

        if not queries:
            return
        reference_queries = [reference.query for reference in self.references]
        if self.embedding_model:
            embed = load_embedding(self.embedding_model)
        else:
            vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True)
            embed = vectorizer.fit(reference_queries).transform
        index = NearestNeighbors(n_neighbors=self.pool_size, metric="cosine").fit(embed(reference_queries))
        distances, places = index.kneighbors(embed(queries))
        for query, near, at in zip(queries, distances.tolist(), places.tolist(), strict=True):
            ranked = sorted(zip(near, at, strict=True))  # ties in the order of the file
            self.nearest[query] = [(place, round(1 - distance, 4)) for distance, place in ranked]

    def __call__(self, query: str, response: str) -> list[Reference]:
        """The k references to show; never one for the very query or with the very text that is judged."""
        pool = [(self.references[i], likeness) for i, likeness in self.nearest[query]]
        pool = [near for near in pool if near[0].query != query and near[0].response != response]
        scale = math.log1p(max((reference.popularity or 0 for reference, _ in pool), default=0)) or 1.0
        pool.sort(key=lambda near: near[1] * (1 + math.log1p(near[0].popularity or 0) / scale), reverse=True)
        return [reference for reference, _ in pool[: self.k]]


def roles_asked(debate: bool = True, reflect: bool = True) -> tuple[str, ...]:
    """The agents that are left where an ablation leaves some out."""
    sides = ("positive", "negative") if debate else ()
    return (*sides, "judge", "reflect") if reflect else (*sides, "judge")


read_prompt_hashes = lru_cache(prompt_hashes)  # read once per process, as the prompts themselves are


async def debate(
    client: Client, candidate: Candidate, examples: list[Reference], *, debate: bool = True, reflect: bool = True
) -> Judgement:
    """What the agents say of one candidate; where one gave no usable answer, `error` says why and there is no label.

    `debate` and `reflect` leave agents out, for ablations. Raises Stop where the whole run has to stop.
    """
    record = Judgement(**candidate.model_dump(), examples=[reference.id for reference in examples], model=client.model)
    record.prompts = read_prompt_hashes(roles_asked(debate, reflect), client.args.prompts)
    shown = [{"query": reference.query, "response": reference.response} for reference in examples]
    slots = {"query": candidate.query, "response": candidate.response, "examples": shown}
    answers = []
    try:
        if debate:
            # Neither side hears the other, so both are asked at once. If one fails, the other is still waited for:
            # its answer has been paid for, and is kept for the next attempt.
            sides = [client.ask(side, Points, **slots) for side in ("positive", "negative")]
            for points in await gather_or_unusable(*sides):
                if isinstance(points, Unusable):
                    raise points
                answers.append(points)
            record.positive, record.negative = answers[0].points, answers[1].points
        slots |= {"positive": record.positive, "negative": record.negative}

        answers.append(await client.ask("judge", Verdict, **slots))
        verdict = answers[-1].model_dump()
        if reflect:  # it audits the verdict with all that Judge saw; its verdict is final
            answers.append(await client.ask("reflect", Verdict, judge=verdict, **slots))
            record.reflect = answers[-1].model_dump()
        record.judge, record.label = verdict, answers[-1].verdict
    except Unusable as e:
        record.error = str(e)
    record.input_tokens = sum(answer.tokens[0] for answer in answers)
    record.output_tokens = sum(answer.tokens[1] for answer in answers)
    return record


async def add_agents_verdict(
    client: Client, retrieval: Retrieval, row: dict, failures: Counter, name: str = "agents", left_out: str = ""
) -> None:
    """Add to a row the agents' verdict, in the column `name`; None where none came, the reason counted.

    `left_out` is the part that an ablation leaves out: "retrieval", "debate" or "reflect".
    """
    candidate = Candidate(query=row["query"], response=row["response"])
    examples = [] if left_out == "retrieval" else retrieval(candidate.query, candidate.response)
    judgement = await debate(client, candidate, examples, debate=left_out != "debate", reflect=left_out != "reflect")
    row[name] = judgement.label
    if judgement.error:
        failures[f"{name}: {judgement.error}"] += 1
