"""Answers that were paid for, and the ledger of what they cost."""

import sqlite3
from pathlib import Path


class Store:
    """Answers and the ledger in one SQLite file: what was paid for survives a kill, and is not paid for again.

    A request is noted before it is sent and its outcome is booked, with the answer, in one transaction. After a kill
    the requests without an outcome are booked as `killed`: whether the endpoint billed those, only it knows.
    """

    def __init__(self, path: Path, prices: tuple[float, float] = (0.0, 0.0)):
        """`prices` are money for a million input and output tokens."""
        self.prices = prices
        path.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=NORMAL")
        self.db.executescript(
            "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text, input_tokens, output_tokens);"
            "CREATE TABLE IF NOT EXISTS sent (number INTEGER PRIMARY KEY, role);"
            "CREATE TABLE IF NOT EXISTS ledger (role, outcome, calls INT, input_tokens INT, output_tokens INT,"
            " PRIMARY KEY (role, outcome));"
        )
        sums = self.db.execute("SELECT SUM(input_tokens), SUM(output_tokens) FROM ledger").fetchone()
        self.tokens = [count or 0 for count in sums]  # prompt and answer tokens of the run folder so far

    def get(self, key: str) -> tuple[str, int, int] | None:
        return self.db.execute("SELECT text, input_tokens, output_tokens FROM answers WHERE key=?", (key,)).fetchone()

    def begin(self, role: str) -> int:
        """Note that a request is about to be sent."""
        return self.db.execute("INSERT INTO sent (role) VALUES (?)", (role,)).lastrowid

    def end(self, number: int, role: str, outcome: str, used: tuple[int, int], key: str = "", text: str = "") -> None:
        """Book the outcome of a request, and keep its answer if it brought one."""
        with self.db:
            self.db.execute("BEGIN")
            self.db.execute("DELETE FROM sent WHERE number=?", (number,))
            self._book(role, outcome, 1, *used)
            if key:
                self.db.execute("INSERT OR REPLACE INTO answers VALUES (?,?,?,?)", (key, text, *used))
        self.tokens = [have + more for have, more in zip(self.tokens, used, strict=True)]

    def _book(self, role: str, outcome: str, calls: int, input_tokens: int = 0, output_tokens: int = 0) -> None:
        self.db.execute(
            "INSERT INTO ledger VALUES (?,?,?,?,?) ON CONFLICT DO UPDATE SET calls=calls+excluded.calls,"
            " input_tokens=input_tokens+excluded.input_tokens, output_tokens=output_tokens+excluded.output_tokens",
            (role, outcome, calls, input_tokens, output_tokens),
        )

    def settle(self) -> None:
        """Book what a killed process left without an outcome; for the one process that holds the run folder."""
        with self.db:
            self.db.execute("BEGIN")
            for role, calls in self.db.execute("SELECT role, COUNT(*) FROM sent GROUP BY role").fetchall():
                self._book(role, "killed", calls)
            self.db.execute("DELETE FROM sent")

    def ledger(self, roles: list[str], since: dict | None = None) -> dict:
        """What these roles have cost in this run folder so far, or since an earlier call of this method."""
        marks = ",".join("?" * len(roles))
        query = f"SELECT outcome, SUM(calls), SUM(input_tokens), SUM(output_tokens) FROM ledger WHERE role IN ({marks})"
        rows = self.db.execute(query + " GROUP BY outcome ORDER BY outcome", roles).fetchall()
        found = {
            "calls": sum(r[1] for r in rows),
            "retries": sum(r[1] for r in rows if r[0] != "ok"),
            "input_tokens": sum(r[2] for r in rows),
            "output_tokens": sum(r[3] for r in rows),
        }
        spent = {name: count - (since or {}).get(name, 0) for name, count in found.items()}
        spent["money"] = round(self.money(spent["input_tokens"], spent["output_tokens"]), 4)
        return spent | {"outcomes": {r[0]: r[1] for r in rows}}  # of the whole run folder

    def money(self, *tokens: int) -> float:
        """What so many input and output tokens cost."""
        return sum(count * price for count, price in zip(tokens, self.prices, strict=True)) / 1e6


def open_store(args) -> Store:
    """The answers and the ledger of --run, at the prices given."""
    return Store(args.run / "answers.sqlite", (args.price_in, args.price_out))
