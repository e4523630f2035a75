"""One head a file: how encodings become scores, and what its fine-tuning minimises."""
