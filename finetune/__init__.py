"""Fourth floor: retrieval heads, fine-tuning with accelerate, evaluating checkpoints, reports."""
