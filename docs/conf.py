"""How Sphinx builds these pages: `sphinx-build -W --keep-going -n -b html docs DIR`. Nothing of it needs a network."""

import os

# The help of the commands names the user's cache folder; here it is anybody's.
os.environ["XDG_CACHE_HOME"] = "~/.cache"

project = "jaxunlearn"
html_title = "jaxunlearn"
html_theme = "furo"
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxarg.ext"]

myst_heading_anchors = 3  # as code hosts make them
default_role = "code"
autodoc_member_order = "bysource"
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# What others' types are could be looked up through a network alone.
nitpick_ignore_regex = [
    (r"py:class", r"(argparse|collections|os|pathlib)\..*"),  # of the standard library
    (r"py:class", r"(jax|numpy|optax|pandas)\..*"),  # of libraries
]
