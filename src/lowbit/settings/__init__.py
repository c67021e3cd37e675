"""The user's settings: `Settings` and `RunOptions`, from flags, from Python or from a YAML recipe.

A recipe has the flags' long names in YAML:

    scheme: W4A16
    group_size: 64
    range: mse
    ignore: ['\\.0\\.mlp\\.']
    overrides: {'down_proj$': W8A16}

The fields of both are the one table of options (`lowbit.knobs`). A setting that the run would not read is an error
(`refuse_unread`), and so is a pattern that matches nothing (`patterns.check_patterns`).
"""

from lowbit.settings.recipes import make_settings
from lowbit.settings.run_options import RunOptions
from lowbit.settings.table import DEFAULT_IGNORE, MEASURE, QUALITIES, READ_BY_REFINE, Settings
from lowbit.settings.unread import facts_of, refuse_unread, unread_flags

__all__ = [
    "DEFAULT_IGNORE", "MEASURE", "QUALITIES", "READ_BY_REFINE", "RunOptions", "Settings", "facts_of", "make_settings",
    "refuse_unread", "unread_flags",
]  # fmt: skip
