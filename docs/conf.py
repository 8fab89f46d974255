"""Sphinx: the pages in this folder and the API from the docstrings. `make docs` builds them."""

from importlib import metadata, util

project = "mmsoftpool"
release = metadata.version("mmsoftpool")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"mmsoftpool {release}"
html_theme_options = {
    "source_repository": metadata.metadata("mmsoftpool")["Project-URL"].partition(", ")[2],
    "source_branch": "main",
    "source_directory": "docs/",
}
# The copy button leaves out prompts and outputs.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_favicon = "_static/favicon.svg"

# The same anchors as GitHub's, so that links between pages work in both places.
myst_heading_anchors = 3
# The notebook is shown with the outputs that are in its file.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Stand-ins where OpenMMLab's compiled packages are missing, as in .github/workflows/docs.yml.
autodoc_mock_imports = [name for name in ("mmcv", "mmdet") if util.find_spec(name) is None]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
