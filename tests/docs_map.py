"""`docs/map.md`'s list of modules, made from their docstrings: `python -m tests.docs_map` writes it anew."""

import ast
import re

from tests.house import MODULES, PRODUCT, ROOT, TREES

PAGE = ROOT / "docs" / "map.md"
LIST = re.compile(r"(<!-- modules -->\n)(.*)(\n<!-- end -->)", re.DOTALL)


def first_sentence(module: str) -> str:
    """Of a module's docstring, on one line."""
    text = (ast.get_docstring(TREES[module]) or "").split("\n\n")[0]
    return " ".join(text.split())


def listed() -> dict[str, str]:
    """Path -> first sentence, for every module that says something, in the order of folders."""
    paths = {module: path for module, path in MODULES.items() if module.split(".")[0] in PRODUCT}
    chosen = {path.relative_to(ROOT).as_posix(): first_sentence(module) for module, path in paths.items()}
    return dict(
        sorted(chosen.items(), key=lambda item: (item[0].rpartition("/")[0], "__init__" not in item[0], item[0]))
    )


def expected() -> str:
    """The list as it has to be: a heading a folder with its docstring, a line a module."""
    lines: list[str] = []
    for path, sentence in listed().items():
        folder, _, file = path.rpartition("/")
        if file == "__init__.py":
            lines += ["", f"### {folder}/", "", sentence, ""]
        if file != "__init__.py" or len(TREES[folder.replace("/", ".")].body) > 1:
            lines.append(f"- [{file}](../{path})" + f": {sentence}" * (file != "__init__.py"))
    return "\n".join(lines).strip()


def main() -> None:
    """Write the list."""
    text, count = LIST.subn(lambda found: found[1] + expected() + found[3], PAGE.read_text(encoding="utf-8"))
    assert count == 1, f"{PAGE}: expected one list between its marks, found {count}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
