"""The floor plan: a module imports only from rows above its own, or from its own package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "csm_studio"

# Modules and packages by row; the command modules are the last row.
ROWS = (
    (
        *("errors", "constants", "files", "options", "command", "configs", "fast_blas"),
        *("locks", "projects", "workspace"),
    ),
    ("checkpoints",),
    ("models", "text", "audio", "model_files"),
    ("model_folder", "dataset"),
    ("training", "generation", "export"),
    ("jobs",),
    ("finetune", "generate", "merge"),
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
COMMANDS = {
    "csm_studio/generate.py",
    "csm_studio/merge.py",
    "csm_studio/options.py",
    "csm_studio/finetune/create_dataset.py",
    "csm_studio/finetune/session.py",
}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imports(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, also inside functions, but not for types only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module == "csm_studio":
                yield from (f"csm_studio.{alias.name}" for alias in node.names)
            else:
                yield node.module


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_up(path: Path) -> None:
    own = part_of(path)
    assert own in ROW_OF, f"{own} has no row: give it one in ROWS"
    for module in imports(path):
        if not module.startswith("csm_studio."):
            continue
        other = module.split(".")[1]
        if other == own:
            continue
        allowed = ROW_OF[other] < ROW_OF[own] or ROW_OF[own] == 0 == ROW_OF[other]
        assert allowed, f"{path.name} imports {module}, which is not in a row above"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_commands_parse_arguments_and_draw(path: Path) -> None:
    name = str(path.relative_to(PACKAGE.parent))
    used = set(imports(path))
    if name not in COMMANDS:
        assert "argparse" not in used
        assert "tqdm" not in used
    if part_of(path) not in ("finetune", "generate", "merge", "command"):
        calls = [
            node.func.id
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        assert "print" not in calls


@pytest.mark.parametrize(
    "module",
    [
        "csm_studio",
        "csm_studio.finetune.create_dataset",
        "csm_studio.finetune.finetune_lora",
        "csm_studio.finetune.finetune",
        "csm_studio.generate",
        "csm_studio.merge",
    ],
)
def test_start_is_light(module: str) -> None:
    """Help must not wait for MLX."""
    code = f"import sys, {module}; print([m for m in sys.modules if m.split('.')[0] == 'mlx'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
