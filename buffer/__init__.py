"""What crosses between rollout and learner, and how old it may be."""
