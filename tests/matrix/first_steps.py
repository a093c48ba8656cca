"""What README begins with, in the environment of the Python that runs this: the commands, and the first example.

    python first_steps.py README.md

Runs outside the repository, and imports moe_dispatch from where pip installed it.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = (
    ("--help",),
    ("doctor",),
    ("explain", "--machine", "h200", "--model", "deepseek-v3", "--dtype", "fp8", "--tokens", "1,64,4096"),
)


def main() -> None:
    readme = Path(sys.argv[1]).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["MOE_DISPATCH_CACHE_DIR"] = folder
        for command in COMMANDS:
            run_command(command)
        run_example(readme)


def run_command(arguments: tuple[str, ...]) -> None:
    """A command succeeds, and warns of nothing: without numpy, torch warns before every output."""
    program = str(Path(sys.executable).with_name("moe-dispatch"))
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    print(f"$ moe-dispatch {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    if done.returncode or done.stderr:
        sys.exit(f"moe-dispatch {' '.join(arguments)}: exit status {done.returncode}, standard error {done.stderr!r}")


def run_example(readme: str) -> None:
    """The first block of Python computes the layer: here with three tokens, against plain torch in a loop."""
    import torch

    example = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    E, K, N, M, topk = 4, 64, 32, 3, 2
    torch.manual_seed(0)
    values = {
        "gate_up": torch.randn(E, 2 * N, K) / 8,
        "down": torch.randn(E, K, N) / 8,
        "hidden_states": torch.randn(M, K),
        "topk_weights": torch.rand(M, topk),
        "topk_ids": torch.randint(E, (M, topk)),
    }
    variables = dict(values)
    exec(compile(example, "README.md", "exec"), variables)  # noqa: S102 - the README of this checkout
    expected = torch.zeros(M, K)
    for m in range(M):
        for weight, e in zip(values["topk_weights"][m], values["topk_ids"][m], strict=True):
            gate, up = (values["gate_up"][e] @ values["hidden_states"][m]).chunk(2)
            expected[m] += weight * (values["down"][e] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(variables["out"], expected, rtol=1e-4, atol=1e-5)
    import moe_dispatch

    print(f"README's first example is right; moe_dispatch {moe_dispatch.__version__} is {moe_dispatch.__file__}")
    if "site-packages" not in moe_dispatch.__file__:
        sys.exit("moe_dispatch was not imported from the environment")


if __name__ == "__main__":
    main()
