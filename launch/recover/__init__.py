"""What follows when a job ends: finished, requeued or held."""
