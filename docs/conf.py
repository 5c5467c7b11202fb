"""Configuration of Sphinx."""

from trak_dropout import __version__

project = "trak_dropout"
author = "the trak_dropout contributors"
release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
default_role = "py:obj"
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "trak_dropout"
nitpicky = False
