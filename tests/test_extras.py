"""What is said where a package of another half is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

# As an environment without these packages: importing one fails, and looking for one finds none.
HIDE = "import sys\nsys.modules.update(dict.fromkeys({hidden!r}))\n"


def run_without(hidden: set[str], code: str) -> subprocess.CompletedProcess[str]:
    source = HIDE.format(hidden=hidden) + code
    command = [sys.executable, "-c", source]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("command", "flags", "extra"),
    [
        ("train", "'--model_name_or_path', 'm', '--dataset_name', 'd.jsonl'", "train"),
        ("serve", "'--model', 'm'", "serve"),
        ("score", "'--model', 'm', '--input', 'i', '--output', 'o'", "score"),
    ],
)
def test_a_command_names_the_extra_it_needs(command: str, flags: str, extra: str) -> None:
    code = f"from raywards.cli import main; sys.exit(main([{command!r}, {flags}]))"
    done = run_without({"torch", "ray", "transformers", "datasets"}, code)
    assert done.returncode == 1
    assert f"pip install 'raywards[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_name_of_another_half_names_its_extra() -> None:
    code = "from raywards import RewardClient\nfrom raywards import Scorer"
    done = run_without({"torch", "ray", "transformers"}, code)
    assert "Scorer needs torch: pip install 'raywards[score]'" in done.stderr


@pytest.mark.trains
def test_the_scorer_imports_without_ray_deepspeed_and_datasets() -> None:
    code = "import raywards; raywards.Scorer"
    done = run_without({"ray", "deepspeed", "datasets"}, code)
    assert done.returncode == 0, done.stderr[-2000:]
