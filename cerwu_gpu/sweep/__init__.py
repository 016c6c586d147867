"""Sweeps: a grid of settings for one model, a durable table of results, and its Pareto fronts."""
