"""The one error of images."""


class ImageError(Exception):
    """An image that is refused: `field` (which part of it), `problem`, `remedy`. Nothing of it has been kept."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field, self.problem, self.remedy = field, problem, remedy
