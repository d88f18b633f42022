"""Replicas of one server behind sglang-router: started, kept alive, restarted one by one, drained."""
