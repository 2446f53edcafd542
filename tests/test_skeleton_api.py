"""The public API: lazy, and a recipe's name always means the recipe."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_else() -> None:
    assert run(
        "import sys, pipeline; print(sorted(n for n in sys.modules if n.startswith(('pipeline', 'trio'))))"
    ) == ("['pipeline']")


@pytest.mark.parametrize("name", ["check", "dump", "inspect", "migrate", "restore", "serve"])
@pytest.mark.parametrize("first", ["", "import pipeline.{0}", "from pipeline.{0} import {0}"])
def test_a_recipes_name_is_the_recipe_whoever_imported_its_module(name: str, first: str) -> None:
    assert (
        run(f"""
        import inspect as standard, pipeline
        {first.format(name)}
        print(standard.iscoroutinefunction(pipeline.{name}))
    """)
        == "True"
    )


def test_every_promised_name_is_there() -> None:
    run("import pipeline; [getattr(pipeline, name) for name in pipeline.__all__]")


def test_an_unknown_name_is_an_attribute_error() -> None:
    import pipeline

    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = pipeline.frobnicate


@pytest.mark.parametrize("bridge", ["blocking", "aio"])
def test_the_bridges_take_the_recipes_arguments(bridge: str) -> None:
    import importlib
    import inspect

    import pipeline

    module = importlib.import_module(f"pipeline.{bridge}")
    for name in ("check", "dump", "inspect", "migrate", "restore", "serve"):
        recipe = inspect.signature(getattr(pipeline, name)).parameters
        bridged = inspect.signature(getattr(module, name)).parameters
        assert set(bridged) == set(recipe), name
        for parameter, value in bridged.items():
            assert value.default == recipe[parameter].default, (name, parameter)
            assert value.kind == recipe[parameter].kind, (name, parameter)
