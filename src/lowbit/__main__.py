"""`python -m lowbit`: the `lowbit` command."""

from lowbit.cli.main import entry

entry()
