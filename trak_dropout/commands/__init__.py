"""The subcommands of ``trak-dropout``, a module each.

A module is named like its command. Its docstring is what ``--help`` says (the first line in the
list of commands); ``add_arguments`` declares the options and ``run`` does the work. Heavy imports
belong into ``run``, so that ``--help`` is quick; ``EXTRA`` names the extra that installs what
``run`` needs beyond the core.
"""
