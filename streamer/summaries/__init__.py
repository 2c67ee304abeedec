"""Summaries: what programs count in tables is read here once a period, and becomes records.

In come the mapped tables of the loaded sensors; out go `events/summaries.py` records.
"""
