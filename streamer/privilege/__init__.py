"""Two processes, by privilege: the worker, which the user starts, and its privileged helper.

The worker names every file that it may need, starts the helper and then gives up everything; it
reads rings and talks to brokers. The helper keeps the capabilities and no socket but the one
between the two; in come requests of a fixed list, out go answers and descriptors.
"""
