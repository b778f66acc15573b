"""Hugging Face folders to Megatron-Core shards and back: one small table a model family."""
