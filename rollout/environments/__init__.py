"""Environments: conversations in which the policy acts more than once."""
