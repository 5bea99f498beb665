"""Serving language models that learn from each of their users.

`ttt.serve.service.Service` answers requests, learns from them between the steps of others, and keeps what was learnt
in a `ttt.Store`; it knows nothing of HTTP. ``ttt serve`` puts OpenAI's API in front of it (`ttt.serve.http`).
"""
