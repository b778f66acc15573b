"""Stands where SGLang would be, for tests of what starts it."""
