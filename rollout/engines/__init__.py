"""Engines behind the protocol of `rollout.engine`; each is imported only when it is built."""
