"""What MkDocs does not know of the docstrings' reStructuredText: formulas are drawn, and an example has one colon."""

import base64
import re
from io import BytesIO
from typing import Any

import matplotlib
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image

matplotlib.rcParams |= {"mathtext.fontset": "cm", "svg.hashsalt": "formula"}

_BLOCK = re.compile(r"^( *)\.\. math::[ \n]*(.+(?:\n+\1 +.+)*)", re.MULTILINE)


def _drawn(block: re.Match[str]) -> str:
    formula = " ".join(block[2].split())
    picture = BytesIO()
    # matplotlib wants braces around what TeX reads as one letter, and knows one size of fractions.
    plain = re.sub(r"\\[tf]?frac(\w)(\w)", r"\\frac{\1}{\2}", formula).replace(r"\tfrac", r"\frac")
    plain = re.sub(r"\\sqrt (\w)", r"\\sqrt{\1}", plain).replace(r"\le ", r"\leq ")
    math_to_image(f"${plain}$", picture, format="svg", prop=FontProperties(size=13))
    source = base64.b64encode(picture.getvalue()).decode()
    return f'\n{block[1]}<p><img class="formula" alt="{formula}" src="data:image/svg+xml;base64,{source}"></p>\n'


class _Docstrings(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        text = _BLOCK.sub(_drawn, "\n".join(lines))
        text = re.sub(r":math:`([^`]+)`", r"`\1`", text)
        return re.sub(r"^Example::$", "Example:", text, flags=re.MULTILINE).split("\n")


class _Extension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Docstrings(md), "docstrings", 28)  # before code and HTML are looked for


def on_config(config: Any) -> Any:
    """Add the extension; MkDocs calls this."""
    config.markdown_extensions.append(_Extension())
    return config
