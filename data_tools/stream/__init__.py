"""The training stream: which sample comes when, from which dataset, on which rank."""
