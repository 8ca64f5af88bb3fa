"""Reward plug-ins: the API, the built-in ones and the processes that run them."""
