"""The error of unusable data."""

from ..exit_codes import UnusableInput


class DataError(UnusableInput):
    """A data set, task or tokenizer cannot be used; the message is a sentence that says what to do."""
