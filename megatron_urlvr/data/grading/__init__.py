"""Reading answers from responses, and telling whether two answers are the same."""
