"""Answers that were paid for, and the ledger of what each step and role has cost.

Both are one SQLite file of the run folder, answers.sqlite: what was paid for survives a kill, and is not paid for
again. A request is noted before it is sent; its outcome is booked, with the answer, in one transaction. After a kill
the requests without an outcome are booked as `killed`: whether the endpoint billed those, only it knows.
"""

import sqlite3
import time
from pathlib import Path

TABLES = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text, input_tokens, output_tokens);
CREATE TABLE IF NOT EXISTS under_way (number INTEGER PRIMARY KEY, step, role);
CREATE TABLE IF NOT EXISTS costs (step, role, outcome, calls INT, input_tokens INT, output_tokens INT,
  PRIMARY KEY (step, role, outcome));
"""
StoredAnswer = tuple[str, int, int]  # text, input tokens, output tokens


class Store:
    """The answers of a run folder, and the ledger in which one step books what it asks."""

    def __init__(self, path: Path, step: str = "", prices: tuple[float, float] = (0.0, 0.0)):
        """`step` is who pays, such as "03"; `prices` are money for a million input and output tokens."""
        self.step, self.prices = step, prices
        path.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=NORMAL")
        self.db.executescript(TABLES)
        sums = self.db.execute("SELECT SUM(input_tokens), SUM(output_tokens) FROM costs").fetchone()
        self.tokens = [count or 0 for count in sums]  # input and output tokens of the whole run folder so far

    def get(self, key: str) -> StoredAnswer | None:
        """The answer to a question, whichever step has paid for it."""
        return self.db.execute("SELECT text, input_tokens, output_tokens FROM answers WHERE key=?", (key,)).fetchone()

    def begin(self, role: str) -> int:
        """Note that a request is about to be sent; returns its number."""
        return self.db.execute("INSERT INTO under_way (step, role) VALUES (?,?)", (self.step, role)).lastrowid

    def end(self, number: int, role: str, outcome: str, used: tuple[int, int], key: str = "", text: str = "") -> None:
        """Book the outcome of a request, and keep its answer if it brought one."""
        with self.db:
            self.db.execute("BEGIN")
            self.db.execute("DELETE FROM under_way WHERE number=?", (number,))
            self._book(self.step, role, outcome, 1, *used)
            if key:
                self.db.execute("INSERT OR REPLACE INTO answers VALUES (?,?,?,?)", (key, text, *used))
        self.tokens = [before + more for before, more in zip(self.tokens, used, strict=True)]

    def _book(self, step: str, role: str, outcome: str, calls: int, input_tokens: int = 0, output_tokens: int = 0):
        self.db.execute(
            "INSERT INTO costs VALUES (?,?,?,?,?,?) ON CONFLICT DO UPDATE SET calls=calls+excluded.calls,"
            " input_tokens=input_tokens+excluded.input_tokens, output_tokens=output_tokens+excluded.output_tokens",
            (step, role, outcome, calls, input_tokens, output_tokens),
        )

    def settle(self) -> None:
        """Book what a killed process left without an outcome; for the one process that holds the run folder."""
        with self.db:
            self.db.execute("BEGIN")
            left = self.db.execute("SELECT step, role, COUNT(*) FROM under_way GROUP BY step, role").fetchall()
            for step, role, calls in left:
                self._book(step, role, "killed", calls)
            self.db.execute("DELETE FROM under_way")

    def ledger(self, *roles: str) -> dict:
        """What this step has cost in this run folder so far, killed and resumed calls included; by default all roles.

        Returns {calls, retries, input_tokens, output_tokens, money, outcomes: {outcome: calls}}.
        """
        query = "SELECT outcome, SUM(calls), SUM(input_tokens), SUM(output_tokens) FROM costs WHERE step=?"
        if roles:
            query += f" AND role IN ({','.join('?' * len(roles))})"
        rows = self.db.execute(query + " GROUP BY outcome ORDER BY outcome", (self.step, *roles)).fetchall()
        outcomes = {outcome: calls for outcome, calls, _, _ in rows}
        tokens = [sum(row[column] for row in rows) for column in (2, 3)]
        calls = sum(outcomes.values())
        figures = {"calls": calls, "retries": calls - outcomes.get("ok", 0), "input_tokens": tokens[0]}
        return figures | {"output_tokens": tokens[1], "money": round(self.money(*tokens), 4), "outcomes": outcomes}

    def set_aside(self) -> None:
        """What this step has cost so far was for a result that --redo replaced: it counts for the budget alone."""
        name = f"{self.step}, replaced {time.time_ns()}"
        self.db.execute("UPDATE costs SET step=? WHERE step=?", (name, self.step))

    def money(self, input_tokens: int, output_tokens: int) -> float:
        """What this many tokens cost."""
        return (input_tokens * self.prices[0] + output_tokens * self.prices[1]) / 1e6


def open_store(args, step: str) -> Store:
    """The answers of --run, and the ledger of one of its steps, at the prices given."""
    return Store(args.run / "answers.sqlite", step, (args.price_in, args.price_out))
