"""What is read off the rows of one run of compare.py: ours over the other libraries, over our own float32, over dense."""

OURS = "ditattn"  # the library's name in rows
EXACT = "FLASH_ATTN"  # the member of ours that the others are compared with
LOWER_PRECISION = 8  # times our error: a library that does not compute in the dtype it was asked for


def member(row):
    return row["configuration"].split("-")[0]


def quotient(row, other):
    return row["ms"] / other["ms"] if row and other else None


class RunRows:
    """Rows that have a time. A case is (shape, variant, dtype); what is made of a row that is not there is None."""

    def __init__(self, rows):
        self.cases = {}
        for row in (r for r in rows if "ms" in r):
            case = row["shape"], row.get("variant", "dense"), row["dtype"]
            self.cases.setdefault(case, []).append(row)
        self.members = list(dict.fromkeys(member(r) for r in rows if r["library"] == OURS))

    def ours(self, case, name=EXACT):
        rows = self.cases.get(case, [])
        return next((r for r in rows if r["library"] == OURS and member(r) == name), None)

    def peers(self, case):
        """The rows of the others that compute as exactly as we do, and of those that do not."""
        mine = self.ours(case)
        others = [r for r in self.cases.get(case, []) if r["library"] != OURS]
        lower = [r for r in others if mine and r["rel_l2"] > LOWER_PRECISION * mine["rel_l2"]]
        return [r for r in others if r not in lower], lower

    def best_peer(self, case):
        return min(self.peers(case)[0], key=lambda r: r["ms"], default=None)

    def over_best_peer(self, case):
        """How many times as fast as the fastest of the others."""
        return quotient(self.best_peer(case), self.ours(case))

    def over_own_float32(self, case, name):
        shape, variant, _ = case
        return quotient(self.ours((shape, variant, "fp32")), self.ours(case, name))

    def time_over_dense(self, case, name):
        shape, _, dtype = case
        return quotient(self.ours(case, name), self.ours((shape, "dense", dtype), name))
