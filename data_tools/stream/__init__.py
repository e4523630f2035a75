"""The training stream: which sample comes when, from which sources, on which rank."""
