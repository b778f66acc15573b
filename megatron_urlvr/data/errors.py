"""The error of unusable data."""


class DataError(ValueError):
    """A data set, task or tokenizer cannot be used; the message is a sentence that says what to do."""

    exit_code = 2
