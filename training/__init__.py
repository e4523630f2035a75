"""The loop that pretraining and fine-tuning share: steps, skipped steps, resuming, checkpoints. No DeepSpeed here."""
