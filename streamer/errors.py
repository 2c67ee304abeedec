"""What can go wrong, as one tree.

StreamerError
├── ConfigError        exit 2: the configuration or command line
├── PrivilegeError     exit 3: missing capabilities
├── KernelError        exit 3: no BPF, no BTF, an object that does not load
│   ├── ContractError  exit 3: the object and `events/kinds.py` disagree
│   └── HelperGone     exit 3: the process that holds the privileges has ended
├── WorkerGone         exit 3: one of several processes that read has ended
├── SinkError          exit 4: a sink that cannot go on
└── NoAnswer           exit 3: no agent answers about itself

A run that ends in order, but could not deliver all that it had read, ends with exit code 5.

Exceptions of libraries are translated into these once, where the library is called.
"""

from __future__ import annotations


class StreamerError(Exception):
    """Base of every error raised on purpose. `exit_code` is what the command ends with."""

    exit_code = 1


class ConfigError(StreamerError):
    """A configuration that cannot be used; the message names file, key, found and allowed."""

    exit_code = 2


class PrivilegeError(StreamerError):
    """The process lacks capabilities that loading or attaching needs."""

    exit_code = 3


class KernelError(StreamerError):
    """The kernel refused, or lacks, something that no other hook can replace."""

    exit_code = 3


class ContractError(KernelError):
    """A record in the BPF object is laid out differently from the generated `events/kinds.py`."""


class HelperGone(KernelError):
    """The privileged helper has ended, or does not do what it should."""


class WorkerGone(StreamerError):
    """A further worker has ended, or does not do what it should."""

    exit_code = 3


class SinkError(StreamerError):
    """A sink that no retry can mend, such as a file that cannot be opened."""

    exit_code = 4


class NoAnswer(StreamerError):
    """No agent is running that can be asked, or it does not answer."""

    exit_code = 3
