"""The docs as a site: ``make docs`` writes it to site/."""

from psl_flower import __version__

project = "psl_flower"
copyright = "The psl_flower authors"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"psl_flower {__version__}"
exclude_patterns = ["_*"]

myst_heading_anchors = 3
# pages link to files of the repository, which are no pages: tests/integration/test_readme.py sees that they are there
suppress_warnings = ["myst.xref_missing"]

autodoc_typehints = "none"  # they stand in the signature
toc_object_entries_show_parents = "hide"
autodoc_default_options = {"members": True, "inherited-members": False}
napoleon_google_docstring = False
napoleon_use_rtype = False
