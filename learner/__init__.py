"""From trajectory groups to batches, losses and published weights."""
