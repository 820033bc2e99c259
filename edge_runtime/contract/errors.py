"""The one error of the contract: names the field, what is wrong with it and what would mend it."""


class ContractError(ValueError):
    """A message or document that the contract refuses.

    Attributes:
        field: dotted path of the offending field (`records[3].seq`), or `payload` for the whole.
        problem: what is wrong, in words.
        remedy: what the sender can do.
        reason: a short constant word for counters (`json`, `type`, `limit`, `version`, `topic`, ...).
    """

    def __init__(self, field: str, problem: str, remedy: str, reason: str = "invalid") -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field = field
        self.problem = problem
        self.remedy = remedy
        self.reason = reason

    def to_json(self) -> dict[str, str]:
        """The error as a JSON object, for API answers and records."""
        return {"field": self.field, "problem": self.problem, "remedy": self.remedy, "reason": self.reason}
