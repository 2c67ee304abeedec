"""Profiles: stacks and how often they were met, as files that other programs show.

In come folded stacks, counted; out goes text: folded lines, speedscope's JSON, or a flame graph.
"""
