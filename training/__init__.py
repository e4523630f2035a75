"""Training: the loop that pretraining and fine-tuning share, with sick steps, resuming and profiling. It knows no model."""
