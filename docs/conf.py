"""The Sphinx configuration: `tox -e docs`."""

import os
import sys

sys.path[:0] = [os.path.abspath("_ext"), os.path.abspath("..")]

import harness_ipc  # noqa: E402

project = "harness_ipc"
author = "The harness_ipc contributors"
project_copyright = author
version = release = harness_ipc.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "markdown_docstrings", "benchmarks"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"harness_ipc {release}"
html_static_path = ["_static"]
html_css_files = ["plots.css"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
# Types of the standard library and private aliases have no page.
nitpick_ignore_regex = [(r"py:.*", r".*")]

linkcheck_anchors = False
