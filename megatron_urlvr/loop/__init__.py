"""What a training step is made of, around the policy: engines, prompts ahead, signals, batches."""
