"""Sphinx: `make docs`. Pages are Markdown; the reference of the API is made from docstrings."""

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

import pyfused

project = "pyfused"
author = "pyfused contributors"
copyright = author
version = release = pyfused.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
# Any heading can be linked to, as on a page of a repository.
myst_heading_anchors = 4

# A name in single backticks is code.
default_role = "code"

# Models are imported when they are asked for, and their signatures need nothing of what they wrap.
autodoc_mock_imports = ["timm", "torchvision"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"pyfused {release}"
html_show_copyright = False
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
# MathJax would be fetched from the network by every reader.
html_math_renderer = "mathml"


def _inline(translator, node):
    translator.body.append(tex2mathml(node.astext()))
    raise SkipNode


def _block(translator, node):
    translator.body.append(tex2mathml(node.astext(), as_block=True))
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
