"""Commands of the CLI that are more than a call of another part."""
