"""`surogate env init`: a package with an environment, to begin from."""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path
from string import Template

from surogate.cli.exits import OK, usage

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

_PROJECT = Template("""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$name"
version = "0.1.0"
description = "An environment for GRPO with Surogate"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["surogate"]

[project.entry-points."surogate.environments"]
$name = "$module:$module"

[tool.hatch.build]
dev-mode-dirs = ["src"]

[tool.hatch.build.targets.wheel]
packages = ["src/$module"]
""")

_MODULE = Template('''\
"""The environment `$name`: sums of two numbers. Replace the prompts and the reward by your own."""

import random
import re
from collections.abc import Iterator

from surogate.reward import Score, reward


def prompts() -> Iterator[dict[str, str]]:
    """Prompts with their answers; a tenth is held out. Further columns reach the reward as `fields`."""
    rng = random.Random(0)
    for _ in range(1000):
        a, b = rng.randrange(100), rng.randrange(100)
        yield {"prompt": f"What is {a} + {b}?", "answer": str(a + b)}


@reward("$name", min_reward=0, max_reward=1, examples=prompts)
def $module(completion: str, answer: str) -> Score:
    """Ends with the right number: 1; has it somewhere: a half."""
    numbers = re.findall(r"-?\\d+", completion)
    last, somewhere = numbers[-1:] == [answer], answer in numbers
    return Score(reward=(last + somewhere) / 2, components={"has_number": bool(numbers)})
''')

_TEST = Template('''\
"""The environment `$name` does what it says."""

import pytest
from $module import $module

from surogate.reward import Split


@pytest.mark.parametrize(
    ("completion", "reward"),
    [("It is 5", 1), ("5 or 6", 0.5), ("6", 0), ("five", 0), ("", 0)],
)
def test_rewards(completion: str, reward: float) -> None:
    assert $module(completion, answer="5").reward == reward


def test_no_held_out_prompt_is_trained_on() -> None:
    args = $module.parse({})
    train, held_out = (
        {example.prompt[-1].content for example in $module.examples(args, split, seed=0)} for split in Split
    )
    assert train and held_out and not train & held_out
''')

_README = Template("""\
# $name

An environment for GRPO with Surogate: prompts, and a reward for completions. It is in
[`src/$module/__init__.py`](src/$module/__init__.py).

    pip install -e .
    pytest
    surogate env list
    surogate env eval $name --inference HOST:PORT

In orch.yaml, where the reward service has the package installed:

```yaml
env:
  - id: $name
```

Or served by itself, for `env[].address`:

    python -c "from $module import $module; from surogate.reward import serve; serve($module)" --listen 127.0.0.1:50080
    surogate reward check 127.0.0.1:50080
""")


def init(name: str, parent: Path) -> int:
    """Writes the package into `parent`/`name`. Raises InvalidInputError for a bad name or a folder with files in it."""
    if not _NAME.fullmatch(name):
        raise usage("NAME", f"{name!r}: lowercase letters, digits and single hyphens, a letter first, as in my-env")
    module = name.replace("-", "_")
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or module == "surogate":
        raise usage("NAME", f"{name!r} would hide Python's module {module}: choose another")
    folder = parent / name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise usage("NAME", f"{folder} is there already, and not empty")
    files = {
        "pyproject.toml": _PROJECT,
        f"src/{module}/__init__.py": _MODULE,
        f"tests/test_{module}.py": _TEST,
        "README.md": _README,
    }
    try:
        for path, template in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(template.substitute(name=name, module=module), encoding="utf-8")
    except OSError as error:
        raise usage("--directory", f"{folder} cannot be written: {error.strerror}") from error
    sys.stdout.write(f"{folder}: pip install -e {folder}, then `env: [{{id: {name}}}]` works\n")
    return OK
