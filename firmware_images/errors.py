"""The one error of the builder."""


class FirmwareError(Exception):
    """What cannot be done: which input (`field`), what is wrong with it, and what helps."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field, self.problem, self.remedy = field, problem, remedy
