"""From an experiment file to a running system."""
